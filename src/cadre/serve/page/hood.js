// Under the hood: the experts of one token, their use over the answer, and the cache beside multi-head attention's.

import { announce, byId, bytes, count, decimal, plural } from "./dom.js";
import { Grid } from "./grid.js";

const percent = (part, all) => `${Math.round((100 * part) / all)}%`;

export class Hood {
  constructor() {
    this.answer = null;
    this.chosen = null; // index of the token held by a click or the arrow keys
    this.pointed = null; // index of the one under the pointer
    this.held = null; // [row, expert] held in the map of use
    this.layers = [];
    this.token = new Grid(byId("token-grid"));
    this.use = new Grid(byId("use-grid"));
    this.queued = false;

    const map = byId("use-grid");
    map.addEventListener("pointermove", (event) => event.pointerType === "mouse" && this.#point(this.use.at(event)));
    map.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#point(this.held));
    map.addEventListener("click", (event) => this.#hold(this.use.at(event)));
    map.addEventListener("keydown", (event) => this.#key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  describe(model) {
    this.model = model;
    const { experts, top_k: active, sparse_layers: sparse } = model;
    const numbers = Array.isArray(sparse) ? sparse : Array.from({ length: sparse ?? 0 }, (_, layer) => layer + 1);
    this.layers = numbers;
    byId("hood-experts").hidden = !experts || !numbers.length;
    if (!byId("hood-experts").hidden) {
      this.token.shape(numbers, experts);
      this.use.shape(numbers, experts);
      byId("token-lead").textContent = `For every token each of ${plural(numbers.length, "layer")} puts ${count(active)} of its ${plural(experts, "expert")} to work.`;
    }
    this.refresh();
  }

  // Look at an answer; it may still be growing: refresh() follows it.
  look(answer) {
    if (this.answer !== answer) {
      this.answer?.light(null);
      this.#mark(null);
      Object.assign(this, { chosen: null, pointed: null, held: null });
      this.use.cursor = null;
      this.answer = answer;
    }
    this.refresh();
  }

  // At most once a frame, however fast the tokens come.
  refresh() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      this.redraw();
    });
  }

  redraw() {
    this.#drawToken();
    this.#drawUse();
    this.#drawCache();
  }

  // index: of the token under the pointer, null for none.
  point(answer, index) {
    if (index !== null) this.look(answer);
    this.pointed = index;
    this.#drawToken();
  }

  // Hold a token until another is held; the same again lets go.
  choose(answer, index, aloud = false) {
    this.look(answer);
    this.chosen = index === this.chosen && !aloud ? null : index;
    this.#mark(this.chosen);
    this.#drawToken();
    if (aloud) announce(`${byId("token-text").textContent} · ${this.#inWords(answer.tokens[index])}`);
  }

  // Arrow keys in the text: step to the next token with visible text.
  step(answer, by) {
    const { tokens } = answer;
    let index = this.answer === answer && this.chosen !== null ? this.chosen + by : by > 0 ? 0 : tokens.length - 1;
    while (tokens[index] && (!tokens[index].span || tokens[index].span === tokens[index - by]?.span)) index += by;
    if (!tokens[index]) return;
    this.choose(answer, index, true);
    tokens[index].span.scrollIntoView({ block: "nearest" });
  }

  // Let go of whatever is held.
  release() {
    this.chosen = null;
    this.#mark(null);
    this.#drawToken();
    this.#hold(null);
  }

  #mark(index) {
    this.answer?.node.querySelector(".chosen")?.classList.remove("chosen");
    if (index !== null) this.answer?.tokens[index]?.span?.classList.add("chosen");
  }

  #drawToken() {
    const tokens = this.answer?.tokens ?? [];
    const index = this.pointed ?? this.chosen ?? tokens.length - 1;
    const token = tokens[index];
    byId("token-text").textContent = token ? visible(token) : "";
    byId("token-place").textContent = token ? `token ${count(index + 1)} of ${count(tokens.length)}` : "";
    this.token.show((row, expert) => (token?.experts?.[row]?.includes(expert) ? 1 : 0));
    const words = token ? this.#inWords(token) : "Point at a word of the answer, tap it, or use the arrow keys in it.";
    byId("token-grid").setAttribute("aria-label", words);
    // In many layers the words are longer than the picture: then they are for screen readers alone.
    byId("token-experts").textContent = token && this.layers.length > 6 ? "" : words;
  }

  #inWords(token) {
    if (!token?.experts) return "The server did not say which experts worked for this token.";
    return token.experts.map((chosen, row) => `layer ${this.layers[row]}: ${chosen.join(", ")}`).join(" · ");
  }

  #drawUse() {
    const uses = this.answer?.uses ?? [];
    const most = uses.reduce((high, layer) => layer.reduce((a, b) => Math.max(a, b ?? 0), high), 0);
    this.use.show((row, expert) => (most ? (uses[row]?.[expert] ?? 0) / most : 0));
    const all = this.answer?.tokens.length ?? 0;
    byId("use-most").textContent = all ? `${percent(most, all)} of tokens` : "";
    this.#caption();
  }

  #caption() {
    const cell = this.use.cursor;
    const all = this.answer?.tokens.length ?? 0;
    const { experts, top_k: active } = this.model ?? {};
    let text = experts ? `Used evenly, each expert would see ${decimal((100 * active) / experts)}% of the tokens. Point at one to find its words.` : "";
    if (cell) {
      const seen = this.answer?.uses[cell[0]]?.[cell[1]] ?? 0;
      text = `Layer ${this.layers[cell[0]]}, expert ${cell[1]}: ${count(seen)} of ${plural(all, "token")}${all ? `, ${percent(seen, all)}` : ""}`;
    }
    if (byId("use-caption").textContent !== text) byId("use-caption").textContent = text;
  }

  #point(cell) {
    this.use.cursor = cell;
    this.use.draw();
    if (cell) this.answer?.light(...cell);
    else this.answer?.light(null);
    this.#caption();
  }

  #hold(cell) {
    const same = cell && this.held && cell[0] === this.held[0] && cell[1] === this.held[1];
    this.held = same ? null : cell;
    this.#point(this.held);
  }

  #key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape" && this.held) {
      event.stopPropagation();
      this.#hold(null);
    }
    const step = steps[event.key];
    if (!step || !this.layers.length) return;
    event.preventDefault();
    const [row, expert] = this.held ?? [0, step[1] ? -step[1] : 0];
    this.held = [
      Math.min(this.layers.length - 1, Math.max(0, row + step[0])),
      Math.min(this.model.experts - 1, Math.max(0, expert + step[1])),
    ];
    this.#point(this.held);
  }

  #drawCache() {
    const { cache_bytes_per_token: each, cache_bytes_per_token_mha: dense, context } = this.model ?? {};
    if (!each || !dense) return;
    const tokens = this.answer?.cached ?? 0;
    const kept = bytes(each * tokens);
    const instead = bytes(dense * tokens);
    byId("cache-now").textContent = kept;
    byId("cache-instead").textContent =
      each < dense
        ? `Multi-head attention of the same width would keep ${tokens ? `${instead}, ` : ""}${decimal(dense / each)} times as much.`
        : "As much as multi-head attention of the same width.";
    byId("cache-part").style.width = `${Math.min(100, (100 * each) / dense)}%`;
    byId("cache-each").textContent = bytes(each);
    byId("cache-mha").textContent = bytes(dense);
    byId("cache-tokens").textContent = `${count(tokens)} of ${plural(context, "token")}`;
    byId("cache-meter").setAttribute("aria-label", `${kept} of the ${instead} that multi-head attention would keep`);
  }
}

// White space is a token like any other, but shows nothing.
function visible({ text, span }) {
  const shown = text || span?.textContent || "no text";
  return shown.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
}
