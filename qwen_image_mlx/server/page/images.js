// Images as data URLs: read, decode, scale down, save. Independent of the server.

import { el } from "./dom.js";

const ACCEPTED = ["image/png", "image/jpeg", "image/webp"]; // formats the API accepts; others are converted to PNG

/** Decodes a data URL into an image element. */
export async function decode(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** A file as {url, width, height, name}; throws an Error with a message for the user. */
export async function readImage(file) {
  const name = file.name || "the clipboard";
  try {
    let url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = reject;
      reader.readAsDataURL(file);
    });
    const image = await decode(url);
    if (!ACCEPTED.includes(file.type)) url = toCanvas(image, image.naturalWidth, image.naturalHeight).toDataURL("image/png");
    return { url, width: image.naturalWidth, height: image.naturalHeight, name };
  } catch {
    throw new Error(`“${name}” is not an image that this browser can read.`);
  }
}

/** An image of a result as {url, width, height, name}. */
export async function asImage(url, name) {
  const image = await decode(url);
  return { url, width: image.naturalWidth, height: image.naturalHeight, name };
}

/** A canvas of this size with an image stretched over it. */
export function toCanvas(image, width, height) {
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return canvas;
}

/** A small WebP or PNG of an image, at most `side` pixels wide and high. */
export async function thumbnail(url, side = 160) {
  const image = await decode(url);
  const scale = Math.min(1, side / Math.max(image.naturalWidth, image.naturalHeight));
  const size = [image.naturalWidth, image.naturalHeight].map((length) => Math.max(1, Math.round(length * scale)));
  return toCanvas(image, ...size).toDataURL("image/webp", 0.85);
}

/** Images with sides shorter than this, in pixels, are enlarged with square pixels. */
const SMALL = 160;

/** Marks an element that shows a small image, so that its pixels stay square. */
export function markSmall(node, width, height) {
  node.classList.toggle("small", Math.max(width, height) < SMALL);
}

/** Saves a data URL as a file. */
export function download(url, name) {
  const [head, data] = url.split(",");
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const address = URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** A file name made of the beginning of a prompt and the seed. */
export function fileName(prompt, seed) {
  const words = (prompt ?? "").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 48);
  return `${words || "qwen-image"}${seed == null ? "" : `-${seed}`}`;
}

/**
 * `after` with `before` over its left part, and a slider that moves the border between them.
 *
 * @param {HTMLElement} after an element that shows the result.
 * @param {string} before URL of the original.
 * @returns {{frame: HTMLElement, slider: HTMLElement}}
 */
export function comparison(after, before) {
  const over = el("img", { class: "before", src: before, alt: "The original", draggable: "false" });
  const range = el("input", { type: "range", min: 0, max: 100, value: 0, "aria-label": "Compare with the original" });
  const show = () => {
    over.style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
    over.hidden = range.value === "0";
  };
  range.addEventListener("input", show);
  show();
  return {
    frame: el("div", { class: "frame" }, after, over),
    slider: el("label", { class: "slider compare" }, el("span", {}, "Original"), range, el("span", {}, "Result")),
  };
}
