// The page: two ways to work with the model, one composer, and what happens at each press of a button.

import { Answer } from "./answer.js";
import { ServerError, apiKey, describe } from "./api.js";
import { announce, button, byId, count, local, plural } from "./dom.js";
import { Hood } from "./hood.js";
import { patiently, run } from "./run.js";
import { Settings, theme } from "./settings.js";
import { Transcript, View, copier } from "./transcript.js";

const transcripts = { write: new Transcript("write"), chat: new Transcript("chat") };
const settings = new Settings();
const hood = new Hood();
const view = new View(byId("log"), { edit: edited, redraw: draw });
let mode = "write";
let model = null;
let running = null; // AbortController of the answer in the making
let skipWait = null;

const transcript = () => transcripts[mode];

// ---- the server

async function connect() {
  hideNotice();
  byId("empty-title").textContent = "Connecting …";
  try {
    model = await describe();
  } catch (error) {
    model = null;
    byId("empty-title").textContent = "Not connected.";
    await complain(error, connect);
    return;
  }
  document.title = `${model.id} · Cadre`;
  byId("model").textContent = model.id;
  byId("model").title = model.id;
  settings.fit(model.context);
  hood.describe(model);
  const kept = local.get(`cadre.mode.${model.id}`);
  // A model is asked to continue texts, which all have learned, unless the server knows that it has learned to chat.
  setMode(kept === "write" || kept === "chat" ? kept : model.chat_template && model.base_model === false ? "chat" : "write");
}

// ---- drawing

function draw() {
  const { shown, answer, past } = transcript();
  view.draw(transcript(), model?.id ?? "Model");
  byId("empty").hidden = shown.length > 0;
  byId("end").hidden = !shown.length || running !== null || view.editing !== null;
  byId("end-actions").replaceChildren(...endActions());
  byId("end-note").textContent = answer ? summary(answer, past) : "";
  compose();
  hood.look(answer);
}

function endActions() {
  const { last, mode } = transcript();
  const actions = [];
  if (last?.who === "model") actions.push(button("Try again", retry));
  else if (mode === "chat") actions.push(button("Answer", generate));
  if (mode === "write") actions.push(button("Edit", () => view.edit(true)), copier(() => transcript().text));
  actions.push(button("Clear", clear));
  return actions;
}

function summary({ tokens, seconds, finish }, past) {
  const said = [];
  if (tokens.length) said.push(plural(tokens.length, "token"));
  if (seconds > 0 && tokens.length > 1) said.push(`${count(Math.round(tokens.length / seconds))} a second`);
  const reasons = { length: "length limit reached", stop: "the model ended here", stopped: "stopped", lost: "incomplete" };
  if (reasons[finish]) said.push(reasons[finish]);
  if (past) said.push(`grey: beyond the context of ${plural(model.context, "token")}`);
  return said.join(" · ");
}

function compose() {
  const chat = mode === "chat";
  const field = byId("prompt");
  const go = byId("go");
  go.textContent = running ? "Stop" : chat ? "Send" : "Continue";
  go.classList.toggle("stop", running !== null);
  go.disabled = !running && (!model || view.editing !== null || (chat && !field.value.trim()));
  field.placeholder = chat ? "Your message" : transcript().pieces.length ? "Your words, if you like" : "Your opening";
  byId("prompt-label").textContent = chat ? "Your message" : "Your words";
  byId("hint").textContent = `Enter ${chat ? "sends" : "continues"} · Shift Enter for a new line · Escape stops`;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function setMode(wanted) {
  mode = wanted;
  view.editing = null;
  for (const input of document.querySelectorAll("[name=mode]")) input.checked = input.value === mode;
  const name = model.id;
  byId("empty-title").textContent = mode === "chat" ? `Talk to ${name}.` : `Begin a text, and ${name} goes on.`;
  const facts = [];
  if (mode === "chat" && !model.chat_template) facts.push("It has no chat template: your lines and its answers are one transcript, which it continues.");
  const layers = Array.isArray(model.sparse_layers) ? model.sparse_layers.length : model.sparse_layers;
  if (model.experts && layers) {
    facts.push(`${count(model.experts)} experts in each of ${plural(layers, "layer")}, ${count(model.top_k)} at work for every token.`);
  }
  if (model.context) facts.push(`It sees ${plural(model.context, "token")} at a time.`);
  byId("empty-note").textContent = facts.join(" ");
  hideNotice();
  draw();
}

// The view follows a growing text until its reader scrolls up, and again once they are back at its end.
let following = true;
let followed = 0; // where the last following led: the scroll event it causes is nobody's wish
let place = 0;
function follow() {
  const box = byId("scroll");
  if (!following) return;
  box.scrollTop = box.scrollHeight;
  followed = box.scrollTop;
}

// ---- an answer

async function generate() {
  if (running || !model) return;
  hideNotice();
  const at = transcript();
  const answer = new Answer();
  running = new AbortController();
  const { signal } = running;
  const onToken = () => {
    hood.refresh();
    follow();
  };
  const attempt = () => {
    at.growing = answer;
    answer.node.classList.add("writing");
    draw();
    follow();
    return run({ transcript: at, answer, model, settings, signal, onToken });
  };
  following = true;
  view.editing = null;
  announce("Writing …");
  let failure = null;
  try {
    await patiently(attempt, (seconds) => busy(seconds, signal));
  } catch (error) {
    failure = signal.aborted ? null : error;
    answer.finish = signal.aborted ? "stopped" : "lost";
  }
  answer.node.classList.remove("writing");
  at.settle();
  running = null;
  draw();
  follow();
  if (failure) await complain(failure, answer.text ? retry : generate);
  else announce(at.mode === "chat" ? answer.text : `Done: ${byId("end-note").textContent}`);
}

function retry() {
  transcript().retract();
  generate();
}

function send() {
  const field = byId("prompt");
  if (mode === "chat" && !field.value.trim()) return;
  transcript().say(field.value);
  field.value = "";
  if (matchMedia("(pointer: coarse)").matches) field.blur();
  generate();
}

function edited(piece, text) {
  transcript().replace(piece, text);
  if (piece && transcript().last?.who === "you") generate();
  else draw();
}

function clear() {
  const { pieces, past } = transcript();
  const at = transcript();
  at.clear();
  draw();
  notify("Cleared.", [
    button("Undo", () => {
      hideNotice();
      Object.assign(at, { pieces: [...pieces, ...at.pieces], past });
      draw();
    }),
  ]);
  byId("prompt").focus();
}

// ---- what went wrong

function notify(text, actions = []) {
  byId("notice-text").textContent = text;
  byId("notice-actions").replaceChildren(...actions);
  byId("notice").hidden = false;
  follow();
}

function hideNotice() {
  byId("notice").hidden = true;
  byId("notice-text").textContent = "";
}

async function complain(error, again) {
  if (!(error instanceof ServerError)) throw error;
  if (error.status === 401) {
    notify("The server asks for an API key.", [button("Enter it", ask)]);
    await ask();
    return;
  }
  async function ask() {
    const before = apiKey.get();
    await settings.open(error.message);
    // Closed without another key, it must not come back by itself.
    if (apiKey.get() !== before) again();
  }
  notify(error.message, [button("Try again", again)]);
}

// Wait for a full server; Stop, or its button, ends the waiting.
async function busy(seconds, signal) {
  const now = button("", () => skipWait?.());
  notify("The server is busy with other requests. The page tries again by itself.", [now]);
  try {
    for (let left = seconds; left > 0; left -= 1) {
      now.textContent = `Try now (${left} s)`;
      const over = await new Promise((resolve, reject) => {
        const timer = setTimeout(() => resolve(false), 1000);
        skipWait = () => (clearTimeout(timer), resolve(true));
        signal.onabort = () => (clearTimeout(timer), reject(signal.reason));
      });
      if (over) break;
    }
  } finally {
    skipWait = null;
    hideNotice();
  }
}

// ---- hands

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (!byId("go").disabled) send();
});
byId("prompt").addEventListener("input", compose);
byId("prompt").addEventListener("keydown", (event) => {
  // On a phone the key makes a line, and the button sends.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  if (!running) byId("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || settings.dialog.open) return;
  if (running) running.abort();
  else hood.release();
});
for (const input of document.querySelectorAll("[name=mode]")) {
  input.addEventListener("change", () => {
    if (running) running.abort();
    if (!model) return;
    local.set(`cadre.mode.${model.id}`, input.value);
    setMode(input.value);
  });
}
byId("scroll").addEventListener("scroll", ({ target: { scrollTop, scrollHeight, clientHeight } }) => {
  if (Math.abs(scrollTop - followed) >= 2) following = scrollTop >= place && scrollHeight - scrollTop - clientHeight < 48;
  place = scrollTop;
});
// Scrolling is animated: without these the next token would pull the reader back before it has begun.
byId("scroll").addEventListener("wheel", ({ deltaY }) => deltaY < 0 && (following = false), { passive: true });
byId("scroll").addEventListener("touchmove", () => (following = false), { passive: true });

const wide = matchMedia("(min-width: 1021px)");
function openHood(open) {
  byId("hood").hidden = !open;
  byId("hood-toggle").setAttribute("aria-expanded", String(open));
  document.querySelector(".stage").classList.toggle("open", open);
  view.hooded = open;
  if (!open) hood.release();
  draw();
  hood.refresh();
}
byId("hood-toggle").addEventListener("click", () => {
  const open = byId("hood").hidden;
  local.set("cadre.hood", open ? "open" : "closed");
  openHood(open);
});

// The token under the pointer, a tap or the arrow keys.
function tokenAt({ target }) {
  const span = view.hooded && target.closest?.(".tok");
  const answer = span && transcript().shown.find((piece) => piece.answer?.node.contains(span))?.answer;
  return answer ? { answer, index: answer.indexOf(span) } : null;
}
byId("log").addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse") return;
  const found = tokenAt(event);
  hood.point(found?.answer ?? null, found?.index ?? null);
});
byId("log").addEventListener("pointerleave", () => hood.point(null, null));
byId("log").addEventListener("click", (event) => {
  const found = tokenAt(event);
  if (found && getSelection().isCollapsed) hood.choose(found.answer, found.index);
});
byId("log").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const answer = by && event.target.classList.contains("answer") && transcript().shown.find((piece) => piece.answer?.node === event.target)?.answer;
  if (!answer) return;
  event.preventDefault();
  hood.step(answer, by);
});

theme(() => hood.refresh());
openHood((local.get("cadre.hood") ?? (wide.matches ? "open" : "closed")) === "open");
connect();
