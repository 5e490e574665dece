// One answer: what to ask so that it fits the model's context, and the stream that comes back.

import { detokenize, stream, tokenize } from "./api.js";

// Fills `answer` with the model's continuation of the transcript; onToken() after each piece. Raises ServerError, or
// AbortError once the signal says stop.
export async function run({ transcript, answer, model, settings, signal, onToken }) {
  const chat = transcript.mode === "chat";
  const { tokens, ...prompt } = await (chat ? fitMessages : fitText)(transcript, model, settings.maxTokens, signal);
  const room = model.context && tokens !== null ? Math.max(1, model.context - tokens) : Infinity;
  const request = { model: model.id, ...prompt, ...settings.sampling, max_tokens: Math.min(settings.maxTokens, room) };
  answer.promptTokens = tokens;
  const started = performance.now();
  for await (const chunk of stream(chat ? "v1/chat/completions" : "v1/completions", request, signal)) {
    const choice = chunk.choices?.[0];
    const { tokens: generated = [], positions } = chunk.cadre ?? {};
    const piece = (chat ? choice?.delta?.content : choice?.text) ?? "";
    const text = chat && !answer.text ? piece.trimStart() : piece;
    if (positions) answer.promptTokens = positions - answer.tokens.length - generated.length;
    answer.finish = choice?.finish_reason ?? answer.finish;
    if (!text && !generated.length) continue;
    answer.add(text, generated);
    answer.seconds = (performance.now() - started) / 1000;
    onToken();
  }
}

// No text has more tokens than bytes, so a short one needs no counting. (A few more for what a tokenizer or template adds.)
const surelyFits = (text, room, context) => !context || 4 * text.length + 64 + room <= context;

// The end of the text that leaves `room` tokens for the answer; tokens: how many it has, null where nobody counted.
async function fitText(transcript, model, room, signal) {
  const { text } = transcript;
  const { id, context } = model;
  transcript.past = 0;
  if (surelyFits(text, room, context)) return { prompt: text, tokens: null };
  let cut = 0;
  let ids = await tokenize(id, { prompt: text }, signal);
  // The rest of a cut text may fall into other tokens than before, so the count is taken again until it fits.
  for (let tries = 0; ids.length > context - room && tries < 5; tries += 1) {
    const gone = await detokenize(id, ids.slice(0, ids.length - (context - room)), signal);
    cut = boundary(text, cut + Math.max(1, gone.length));
    ids = await tokenize(id, { prompt: text.slice(cut) }, signal);
  }
  transcript.past = cut;
  return { prompt: text.slice(cut), tokens: ids.length };
}

// The next good place to begin reading: a line or sentence, else a word, else right here, but not within a character of two
// UTF-16 halves, one of which alone the server refuses.
function boundary(text, from) {
  const ahead = text.slice(from, from + 160);
  const place = [/\n\s*/, /[.!?]["”’)]*\s+/, /\s+/].map((end) => end.exec(ahead)).find((found) => found);
  return from + (place ? place.index + place[0].length : Number(/^[\udc00-\udfff]/.test(ahead)));
}

// The newest messages that leave room for the answer, beginning with one of yours; the last one in any case.
async function fitMessages(transcript, model, room, signal) {
  const { id, context } = model;
  transcript.past = 0;
  for (;;) {
    const { messages } = transcript;
    const short = surelyFits(transcript.text, room + 32 * messages.length, context);
    if (short) return { messages, tokens: null };
    const ids = await tokenize(id, { messages }, signal);
    if (ids.length + room <= context || messages.length === 1) return { messages, tokens: ids.length };
    do transcript.past += 1;
    while (transcript.pieces[transcript.past].who !== "you");
  }
}

// Runs `attempt` again while the server is full, as often as it makes sense: wait(seconds) is told how long it asks for.
export async function patiently(attempt, wait) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (error.status !== 429 || tries >= 7) throw error;
      await wait(Math.min(60, Math.ceil(error.retryAfter ?? 2 ** tries)));
    }
  }
}
