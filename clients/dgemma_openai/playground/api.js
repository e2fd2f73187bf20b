// The server's API: requests, streams, errors in its own words. Knows no page.

import { events } from "./sse.js";

const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/** What the server refused, in its words; `status` is that of HTTP, or null within a stream. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function address(path) {
  return new URL(path, document.baseURI).href;
}

/** A number as JSON, with all its digits; what is none goes as text, for the server to judge. */
export function number(text) {
  return NUMBER.test(text) ? text : JSON.stringify(text);
}

/** JSON as it is; what is none goes as text. */
export function json(text) {
  try {
    return JSON.stringify(JSON.parse(text));
  } catch {
    return JSON.stringify(text);
  }
}

/** The body of a chat request as JSON text. `fields` are [name, JSON text]. */
export function chatBody(model, messages, fields) {
  const all = [
    ["model", JSON.stringify(model)],
    ["messages", JSON.stringify(messages)],
    ...fields,
    ["stream", "true"],
    ["diffusing", "true"],
    ["stream_options", '{"include_usage": true}'],
  ];
  return `{\n${all.map(([name, value]) => `  ${JSON.stringify(name)}: ${value}`).join(",\n")}\n}`;
}

/** The same request for a shell, without the key itself. */
export function asCurl(body, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
  const url = quoted(address("v1/chat/completions"));
  return `curl -N ${url} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(body)}`;
}

/** [{id, max_model_len}] */
export async function models(key) {
  return (await (await ask("v1/models", key)).json()).data;
}

/** The chunks of a streamed answer; ends after the server's last word, throws where that does not come. */
export async function* chat(body, key, signal) {
  const init = { method: "POST", body, signal, headers: { "Content-Type": "application/json" } };
  const response = await ask("v1/chat/completions", key, init);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(null, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(null, "the stream ended before the answer did");
}

async function ask(path, key, init = {}) {
  const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(address(path), { ...init, headers, credentials: "omit", cache: "no-store" });
  if (!response.ok) throw new ApiError(response.status, await message(response));
  return response;
}

async function message(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || response.statusText; // not this server's answer: a proxy's
  }
}
