// What has been said and written, and how it looks: one text by two hands, or messages in turn.

import { button, copy, element } from "./dom.js";

// Pieces are { who: "you", text } or { who: "model", answer }.
const textOf = (piece) => (piece.who === "you" ? piece.text : piece.answer.text);

export class Transcript {
  constructor(mode) {
    this.mode = mode;
    this.clear();
  }

  clear() {
    this.pieces = [];
    // What no longer fits the model's context: characters at the start of a text, messages at the start of a chat.
    this.past = 0;
    // The answer being written: seen already, but no part of what the model reads.
    this.growing = null;
  }

  get shown() {
    return this.growing ? [...this.pieces, { who: "model", answer: this.growing }] : this.pieces;
  }

  get last() {
    return this.pieces.at(-1);
  }

  get answer() {
    return this.shown.findLast(({ who }) => who === "model")?.answer ?? null;
  }

  get text() {
    return this.pieces.map(textOf).join(this.mode === "chat" ? "\n\n" : "");
  }

  get messages() {
    return this.pieces.slice(this.past).map((piece) => ({ role: piece.who === "you" ? "user" : "assistant", content: textOf(piece) }));
  }

  // Your words. In a text they follow what is there: a space is put between two words, and none left at the end, where
  // it would belong to the model's next word.
  say(words) {
    const own = this.mode === "chat" ? words.trim() : words.replace(/[ \t]+$/, "");
    if (!own) return;
    const joint = this.mode === "write" && /\S$/.test(this.text) && /^[\p{L}\p{N}"“(]/u.test(own) ? " " : "";
    this.pieces.push({ who: "you", text: joint + own });
  }

  // The growing answer is complete, or as complete as it gets; an empty one leaves no trace.
  settle() {
    if (this.growing?.text) this.pieces.push({ who: "model", answer: this.growing });
    this.growing = null;
  }

  // Forget the last answer, so that another can take its place.
  retract() {
    if (this.last?.who === "model") this.pieces.pop();
  }

  // The message changes, and what followed from it is gone; a text becomes yours altogether.
  replace(piece, text) {
    if (this.mode === "write") this.clear();
    else this.pieces.length = this.pieces.indexOf(piece);
    this.past = Math.min(this.past, this.pieces.length);
    this.say(text);
  }
}

// Draws the transcript into `log`. on: { edit(piece, text), redraw() }; hooded: whether tokens can be reached with the keyboard.
export class View {
  constructor(log, on) {
    Object.assign(this, { log, on, hooded: false, editing: null });
  }

  draw(transcript, name) {
    for (const { answer } of transcript.shown) if (answer) this.#reachable(answer.node);
    this.log.replaceChildren(...(transcript.mode === "chat" ? this.#turns(transcript, name) : this.#text(transcript)));
  }

  #reachable(node) {
    if (this.hooded) {
      node.tabIndex = 0;
      node.setAttribute("role", "group");
      node.setAttribute("aria-label", "The model’s words. The arrow keys move from token to token.");
    } else {
      for (const name of ["tabindex", "role", "aria-label"]) node.removeAttribute(name);
    }
  }

  #text(transcript) {
    if (!transcript.shown.length) return [];
    if (this.editing) return [this.#editor(transcript.text, "Keep", (text) => this.on.edit(null, text))];
    let start = 0;
    const nodes = transcript.shown.map((piece) => {
      const past = Math.max(0, transcript.past - start);
      start += textOf(piece).length;
      return piece.who === "you" ? words(piece.text, past) : fade(piece.answer.node, past);
    });
    return [element("article", { className: "prose", ariaLabel: "The text" }, ...nodes)];
  }

  #turns(transcript, name) {
    return transcript.shown.map((piece, index) => {
      const mine = piece.who === "you";
      const turn = element("article", { className: mine ? "turn mine" : "turn" }, element("h2", {}, mine ? "You" : name));
      turn.classList.toggle("past", index < transcript.past);
      if (piece === this.editing) {
        turn.append(this.#editor(piece.text, "Send", (text) => this.on.edit(piece, text)));
        return turn;
      }
      const actions = element("div", { className: "actions" }, copier(() => textOf(piece)));
      if (mine) actions.prepend(button("Edit", () => this.edit(piece)));
      turn.append(element("div", { className: "prose" }, mine ? piece.text : piece.answer.node), actions);
      return turn;
    });
  }

  // piece: the message to edit, or true for a whole text.
  edit(piece) {
    this.editing = piece;
    this.on.redraw();
    const area = this.log.querySelector("textarea");
    area.style.height = `${area.scrollHeight + 2}px`;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #editor(text, label, save) {
    const area = element("textarea", { value: text, ariaLabel: "Edit the text" });
    const close = (text) => {
      this.editing = null;
      if (text === null) this.on.redraw();
      else save(text);
    };
    const form = element(
      "form",
      { className: "editor" },
      area,
      element("div", { className: "actions" }, button("Cancel", () => close(null)), element("button", { className: "primary" }, label)),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      close(area.value);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close(null);
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
      else return;
      event.stopPropagation();
      event.preventDefault();
    });
    return form;
  }
}

// A button that copies and says so.
export function copier(text) {
  const node = button("Copy", async () => {
    await copy(text());
    node.textContent = "Copied";
    setTimeout(() => (node.textContent = "Copy"), 1600);
  });
  return node;
}

function words(text, past) {
  const node = element("span", { className: "mine" });
  if (past > 0) node.append(element("span", { className: "past" }, text.slice(0, past)));
  if (past < text.length) node.append(text.slice(Math.max(0, past)));
  return node;
}

// Grey out the spans within the first `past` characters of an answer.
function fade(node, past) {
  let start = 0;
  for (const span of node.children) {
    span.classList.toggle("past", start < past);
    start += span.textContent.length;
  }
  return node;
}
