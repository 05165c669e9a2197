// The public HTTP API as functions. The token dialog is the only part of the document it uses.

import { one } from "./dom.js";

/** An error with the server's message and code; the code is "offline" if the server does not answer. */
export class ApiError extends Error {
  constructor(message, code, retryAfter = 0) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

const OFFLINE = "The server does not answer. Is it still running?";
const PAUSES = [1, 1, 1, 2, 3, 5]; // seconds before each retry of a lost connection; the last one repeats
let maxBodyBytes = Infinity;
let tokenRequest = null;

/** The server's configuration: tasks, defaults, limits. */
export async function config() {
  const found = await call("GET", "/api/qwen-image/config");
  maxBodyBytes = found.limits?.max_body_bytes ?? Infinity;
  return found;
}

/** Composites layers: {image} for PNG, {file, name} for other formats. */
export const compose = (layers, format) => call("POST", "/api/qwen-image/compose", { layers, format });

/** What a ControlNet is shown of an image: {image}. */
export const controlImage = (image, kind) => call("POST", "/api/qwen-image/control-image", { image, kind });

/** Starts a job for a task, "generate", "edit" or "decompose", and returns its id. */
export const submit = async (task, fields) => (await call("POST", "/jobs", { task, ...fields })).id;

/**
 * Follows a job to its end and returns its result. Reconnects if the connection is lost.
 *
 * @param {string} id of the job.
 * @param {(event: string, data: object) => void} tell receives the events queued, stage, step, preview and "lost" (no connection).
 * @param {AbortSignal} signal cancels the job.
 * @throws {ApiError} the job's error. The code is "cancelled" if the signal cancelled the job, "stopped" if
 *   something else did, and "gone" if the server does not know the job.
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
        if (ended.status === "cancelled") throw new ApiError("The job was cancelled from outside this page.", "stopped");
      } catch (error) {
        if (error.code === "not_found") throw new ApiError("The server was restarted or has deleted this job, so its result is lost. The settings are still here.", "gone");
        if (error.code !== "offline") throw error;
        if (signal.aborted) throw new ApiError("The server does not answer. The job may still be running.", "offline");
      }
      await new Promise((resolve) => setTimeout(resolve, 1000 * PAUSES[Math.min(lost, PAUSES.length - 1)]));
    }
  } finally {
    signal.removeEventListener("abort", cancel);
  }
}

/** Reads a stream of events to its end. Uses fetch because EventSource cannot send the token in a header. */
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
  if (text && text.length > maxBodyBytes) {
    throw new ApiError(`The images are too large. This server accepts at most ${Math.round(maxBodyBytes / 2 ** 20)} MB.`, "too_large");
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

/** Asks the user for the token, in one dialog for all waiting requests; false if the user cancels. */
function askToken(wrong) {
  tokenRequest ??= new Promise((resolve) => {
    const dialog = one("#token");
    const input = one("input", dialog);
    input.value = "";
    one("p", dialog).textContent = wrong ? "That token is wrong." : "The browser keeps it until this tab is closed.";
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      tokenRequest = null;
      const entered = dialog.returnValue === "done" ? input.value.trim() : "";
      if (entered) sessionStorage.setItem("token", entered);
      resolve(Boolean(entered));
    }, { once: true });
  });
  return tokenRequest;
}

/** A message as a sentence: with a capital letter and a full stop. */
export function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
