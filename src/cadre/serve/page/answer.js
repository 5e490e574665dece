// A text in the making: its tokens as spans, and how often each expert worked for it.

import { element } from "./dom.js";

// How servers write a token whose bytes are no whole character.
const INCOMPLETE = /^bytes:|\ufffd/;

export class Answer {
  constructor() {
    // Arrow keys move inside it, so an answer of hundreds of tokens is one stop of the Tab key.
    this.node = element("span", { className: "answer", tabIndex: -1 });
    this.text = "";
    this.tokens = []; // { text, experts, span }: experts per sparse layer, span null for one without visible text
    this.waiting = []; // tokens whose text has not come yet
    this.uses = []; // [layer][expert] -> tokens it worked for
    this.promptTokens = null;
    this.finish = null;
    this.seconds = 0;
  }

  // Text that is now certain, and the tokens generated since the last call. The two need not end together: half a
  // character, or what may become a stop string, is held back by the server.
  add(text, tokens = []) {
    for (const { text: own = "", experts = null } of tokens) {
      const token = { text: own, experts, span: null };
      this.tokens.push(token);
      this.waiting.push(token);
      this.#count(experts);
    }
    this.text += text;
    let rest = text;
    let group = [];
    while (rest && this.waiting.length) {
      const token = this.waiting.shift();
      group.push(token);
      const shown = this.text.length === rest.length ? token.text.trimStart() : token.text;
      if (!shown || INCOMPLETE.test(shown)) continue;
      if (!rest.startsWith(shown)) {
        // No telling which letters are whose: the rest belongs to all that wait.
        group.push(...this.waiting.splice(0));
        break;
      }
      this.#append(shown, group);
      rest = rest.slice(shown.length);
      group = [];
    }
    if (rest) this.#append(rest, group);
    else this.waiting.unshift(...group);
  }

  #append(text, tokens) {
    const span = element("span", {});
    this.node.append(span);
    if (!tokens.length) {
      span.append(text);
      return;
    }
    // The space before a word is its token's, but a highlight looks better without it.
    const word = text.trimStart();
    span.className = "tok";
    span.append(text.slice(0, text.length - word.length), element("b", {}, word));
    for (const token of tokens) token.span = span;
  }

  #count(experts) {
    experts?.forEach((chosen, layer) => {
      this.uses[layer] ??= [];
      for (const expert of chosen) this.uses[layer][expert] = (this.uses[layer][expert] ?? 0) + 1;
    });
  }

  indexOf(span) {
    return this.tokens.findIndex((token) => token.span === span);
  }

  // Positions the cache holds: the newest token has been chosen, but not read yet.
  get cached() {
    return (this.promptTokens ?? 0) + Math.max(0, this.tokens.length - 1);
  }

  // Mark the tokens that an expert worked for; layer null clears.
  light(layer, expert) {
    const spans = new Set(this.tokens.filter(({ experts }) => experts?.[layer]?.includes(expert)).map(({ span }) => span));
    for (const { span } of this.tokens) span?.classList.toggle("lit", spans.has(span));
  }
}
