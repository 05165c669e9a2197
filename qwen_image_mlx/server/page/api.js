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
const PAUSES = [1, 1, 1, 2, 3, 5]; // seconds until a lost connection to a job is tried again; then the last
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

/** Begins a job of a task, "generate", "edit" or "decompose", and returns its id. */
export const submit = async (task, fields) => (await call("POST", "/jobs", { task, ...fields })).id;

/**
 * Follows a job to its end, over lost connections, and returns its result.
 *
 * @param {string} id of the job.
 * @param {(event: string, data: object) => void} tell hears queued, stage, step, preview and "lost" (no connection).
 * @param {AbortSignal} signal cancels the job.
 * @throws {ApiError} what the server says; code "cancelled" if the signal did, "stopped" if something else did, "gone"
 *   if the server does not know the job (any more).
 */
export async function follow(id, tell, signal) {
  const path = `/jobs/${encodeURIComponent(id)}`;
  const heard = { last: "" };
  const cancel = () => call("DELETE", path).catch(() => {});
  if (signal.aborted) cancel();
  signal.addEventListener("abort", cancel);
  try {
    for (let lost = 0; ; lost += 1) {
      try {
        if (lost) tell("lost", {});
        await listen(`${path}/events`, heard, (event, data) => {
          lost = 0;
          tell(event, data);
        });
        const ended = await call("GET", path);
        if (ended.status === "done") return ended.result;
        if (ended.status === "failed") throw new ApiError(ended.error.message, ended.error.code);
        if (ended.status === "cancelled" && signal.aborted) throw new ApiError("Cancelled.", "cancelled");
        if (ended.status === "cancelled") throw new ApiError("The job was cancelled, but not here.", "stopped");
      } catch (error) {
        if (error.code === "not_found") throw new ApiError("The server was started again, or has dropped this job: there is no picture. The settings are still here.", "gone");
        if (error.code !== "offline") throw error;
        if (signal.aborted) throw new ApiError("The server does not answer, so the job may not be cancelled.", "offline");
      }
      await new Promise((resolve) => setTimeout(resolve, 1000 * PAUSES[Math.min(lost, PAUSES.length - 1)]));
    }
  } finally {
    signal.removeEventListener("abort", cancel);
  }
}

/** Reads a stream of events to its end. fetch instead of EventSource, so that the token travels in a header. */
async function listen(path, heard, hear) {
  const response = await send("GET", path, undefined, heard.last ? { "Last-Event-ID": heard.last } : {});
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
      heard.last = part("id")[0] ?? heard.last;
      if (event) hear(event, JSON.parse(part("data").join("\n") || "{}"));
    }
  }
}

async function call(method, path, body) {
  return (await send(method, path, body)).json();
}

async function send(method, path, body, more = {}) {
  const text = body === undefined ? undefined : JSON.stringify(body);
  if (text && text.length > largestBody) {
    throw new ApiError(`The pictures are too large for this server, which takes ${Math.round(largestBody / 2 ** 20)} MB.`, "too_large");
  }
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = token ? { ...more, Authorization: `Bearer ${token}` } : { ...more };
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
