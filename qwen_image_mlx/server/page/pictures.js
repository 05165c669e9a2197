// Pictures as data URLs: reading, looking at, reducing, saving. Knows nothing about the server.

import { el } from "./dom.js";

const TAKEN = ["image/png", "image/jpeg", "image/webp"]; // as the API takes them; others are turned into PNG

/** A picture that has been decoded, at its natural size. */
export async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** A file as {url, width, height, name}; throws an Error with a sentence for people. */
export async function readPicture(file) {
  const name = file.name || "the clipboard";
  try {
    let url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = reject;
      reader.readAsDataURL(file);
    });
    const image = await decoded(url);
    if (!TAKEN.includes(file.type)) url = drawn(image, image.naturalWidth, image.naturalHeight).toDataURL("image/png");
    return { url, width: image.naturalWidth, height: image.naturalHeight, name };
  } catch {
    throw new Error(`“${name}” is not a picture that this browser can read.`);
  }
}

/** A picture of a result as {url, width, height, name}. */
export async function asPicture(url, name) {
  const image = await decoded(url);
  return { url, width: image.naturalWidth, height: image.naturalHeight, name };
}

/** A canvas of this size with an image stretched over it. */
export function drawn(image, width, height) {
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return canvas;
}

/** A small WebP or PNG of a picture, at most `side` pixels wide and high. */
export async function thumbnail(url, side = 160) {
  const image = await decoded(url);
  const scale = Math.min(1, side / Math.max(image.naturalWidth, image.naturalHeight));
  const size = [image.naturalWidth, image.naturalHeight].map((length) => Math.max(1, Math.round(length * scale)));
  return drawn(image, ...size).toDataURL("image/webp", 0.85);
}

/** Pictures smaller than this are shown enlarged, pixel by pixel. */
const SMALL = 160;

/** Marks what shows a small picture, so that its pixels stay squares. */
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

/** A part of a prompt that can be a file's name. */
export function fileName(prompt, seed) {
  const words = (prompt ?? "").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 48);
  return `${words || "qwen-image"}${seed == null ? "" : `-${seed}`}`;
}

/**
 * `after` with `before` drawn over its left part, and a slider that says how far; its labels stand where the two do.
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
