// The public HTTP API as functions. Knows nothing about the document but the token dialog.

import { one } from "./dom.js";

/** What the server refused, in its own sentence; `code` "offline" where it does not answer. */
export class ApiError extends Error {
  constructor(message, code, retryAfter = 0) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

const OFFLINE = "The server does not answer. Is it still running?";
const RETRIES = 30; // times a lost connection to a job is taken up again, a second apart
let largestBody = Infinity;
let asking = null;

/** What the server offers: tasks, defaults, limits. */
export async function config() {
  const found = await call("GET", "/api/qwen-image/config");
  largestBody = found.limits?.max_body_bytes ?? Infinity;
  return found;
}

/** Layers laid together: {image} for PNG, {file, name} for other formats. */
export const compose = (layers, format) => call("POST", "/api/qwen-image/compose", { layers, format });

/**
 * Runs a job to its end and returns its result.
 *
 * @param {string} task "generate", "edit" or "decompose".
 * @param {object} fields of the task.
 * @param {(event: string, data: object) => void} tell hears queued, stage, step, preview and "lost" (no connection).
 * @param {AbortSignal} signal cancels the job.
 * @throws {ApiError} what the server says; code "cancelled" if it was.
 */
export async function run(task, fields, tell, signal) {
  const job = await call("POST", "/jobs", { task, ...fields });
  const path = `/jobs/${encodeURIComponent(job.id)}`;
  const cancel = () => call("DELETE", path).catch(() => {});
  if (signal.aborted) cancel();
  signal.addEventListener("abort", cancel);
  try {
    for (let lost = 0; ; lost += 1) {
      try {
        if (lost) tell("lost", {});
        await listen(`${path}/events`, (event, data) => {
          lost = 0;
          tell(event, data);
        });
        const ended = await call("GET", path);
        if (ended.status === "done") return ended.result;
        if (ended.status === "failed") throw new ApiError(ended.error.message, ended.error.code);
        if (ended.status === "cancelled") throw new ApiError("Cancelled.", "cancelled");
      } catch (error) {
        if (error.code !== "offline" || lost >= RETRIES) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  } finally {
    signal.removeEventListener("abort", cancel);
  }
}

/** Reads a stream of events to its end. fetch instead of EventSource, so that the token travels in a header. */
async function listen(path, hear) {
  const response = await send("GET", path);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new ApiError(OFFLINE, "offline");
    });
    if (done) return;
    const blocks = (text + value.replaceAll("\r", "")).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const part = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim());
      const [event] = part("event");
      if (event) hear(event, JSON.parse(part("data").join("\n") || "{}"));
    }
  }
}

async function call(method, path, body) {
  return (await send(method, path, body)).json();
}

async function send(method, path, body) {
  const text = body === undefined ? undefined : JSON.stringify(body);
  if (text && text.length > largestBody) {
    throw new ApiError(`The pictures are too large for this server, which takes ${Math.round(largestBody / 2 ** 20)} MB.`, "too_large");
  }
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    if (text) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, body: text, cache: "no-store" });
    } catch {
      throw new ApiError(OFFLINE, "offline");
    }
    if (response.ok) return response;
    const { error } = await response.json().catch(() => ({}));
    if (response.status === 401) {
      if (token !== sessionStorage.getItem("token") || (await askToken(Boolean(token)))) continue;
    }
    const message = error?.message ?? `The server answered ${response.status}.`;
    throw new ApiError(sentence(message), error?.code ?? "internal", Number(response.headers.get("Retry-After")) || 0);
  }
}

/** Asks for the token, once for all who want it; false if there will be none. */
function askToken(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = one("#token");
    const input = one("input", dialog);
    input.value = "";
    one("p", dialog).textContent = wrong ? "That token was not the right one." : "It is kept until this browser tab is closed.";
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "done" ? input.value.trim() : "";
      if (given) sessionStorage.setItem("token", given);
      resolve(Boolean(given));
    }, { once: true });
  });
  return asking;
}

/** A message as a sentence: a capital, and a full stop. */
export function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
