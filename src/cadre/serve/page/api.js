// What the page asks of the server: OpenAI's endpoints, and the two that count tokens.

import { session } from "./dom.js";

const KEY = "cadre.api-key";
export const apiKey = {
  get: () => session.get(KEY) ?? "",
  set: (value) => session.set(KEY, value || null),
};

// Why a request failed, in words for people. status 0: no answer from the server at all.
export class ServerError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

const unreachable = () => new ServerError("The server cannot be reached. Is it still running?", { code: "unreachable" });
const lost = () => new ServerError("The connection was lost before the text was complete.", { code: "lost" });

async function call(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw unreachable();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not the server's own JSON: a proxy's page, perhaps.
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ServerError(error.message || `The server refused with status ${status}.`, {
    status,
    code: error.code ?? null,
    retryAfter: Number.isFinite(seconds) ? Math.max(0, seconds) : null,
  });
}

async function json(path, body, signal) {
  const response = await call(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw lost();
  }
}

// The first model the server names, with Cadre's own facts about it.
export async function describe() {
  const { data } = await json("v1/models");
  if (!data?.length) throw new ServerError("The server offers no model.");
  return { id: data[0].id, ...data[0].cadre };
}

// text: { prompt } or { messages }.
export async function tokenize(model, text, signal) {
  return (await json("tokenize", { model, ...text }, signal)).tokens;
}

export async function detokenize(model, tokens, signal) {
  return (await json("detokenize", { model, tokens }, signal)).prompt;
}

// Chunks of a streamed completion, in order; raises ServerError if it ends before its end.
export async function* stream(path, body, signal) {
  const response = await call(path, { ...body, stream: true, stream_options: { include_usage: true }, cadre: { routes: true } }, signal);
  let complete = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message ?? "The server stopped with an error.", chunk.error);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || signal?.aborted) throw error;
    throw lost();
  }
  if (!complete) throw lost();
}

// The data of each server-sent event: bytes may be cut anywhere, also inside a character or between CR and LF.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
