// A well: the part of a form that holds images. The user drops, orders and masks them there.

import { button, el, iconButton, reorderable, say } from "./dom.js";
import { drawMask } from "./mask.js";
import { markSmall, readImage } from "./images.js";

const MASK_TITLES = { layer_mask: "Mark what the layer shows" };
let wells = 0;

/**
 * Turns an element into a well.
 *
 * @param {HTMLElement} node the element; `data-max` is the maximum number of images, `data-mask` allows a mask on the first; its
 *   value is the API's field for it, if that is not "mask".
 * @param {() => void} changed called after every change.
 * @param {(message: string) => void} refuse called with a message when a file is not an image.
 */
export function makeWell(node, changed, refuse) {
  const max = Number(node.dataset.max);
  const canMask = "mask" in node.dataset;
  const maskField = node.dataset.mask || "mask";
  const id = `file-${(wells += 1)}`;
  const list = el("ol", { class: "images", "aria-label": "Chosen images" });
  const input = el("input", { type: "file", id, accept: "image/*", multiple: max > 1, class: "visually-hidden" });
  const words = el("span", {});
  node.append(list, input, el("label", { class: "drop", for: id }, words));
  let images = [];
  let mask = null;

  function set(next, nextMask = null) {
    mask = nextMask && next.length ? nextMask : null;
    images = next.slice(0, max);
    list.replaceChildren(...images.map(card));
    node.classList.toggle("full", images.length >= max);
    words.textContent = images.length
      ? max > 1 ? "Add an image" : "Replace the image"
      : max > 1 ? `Drop up to ${max} images here, paste, or choose` : "Drop an image here, paste, or choose";
    changed();
  }

  async function add(files) {
    for (const file of files) {
      try {
        const image = await readImage(file);
        const kept = max === 1 ? [] : images;
        if (kept.length >= max) throw new Error(`At most ${max} images fit; remove one first.`);
        set([...kept, image], kept.length ? mask : null);
      } catch (error) {
        refuse(error.message);
      }
    }
  }

  function move(from, to) {
    const next = [...images];
    next.splice(to, 0, ...next.splice(from, 1));
    set(next, next[0] === images[0] ? mask : null);
    say(`Image ${from + 1} is now image ${to + 1}.`);
    const moved = list.children[to];
    (moved?.querySelector(to > from ? "[data-later]:enabled" : "[data-earlier]:enabled") ?? moved?.querySelector("button:enabled"))?.focus();
  }

  function card(image, index) {
    const img = el("img", { src: image.url, alt: `Image ${index + 1}: ${image.name}`, draggable: "false" });
    const shown = el("div", { class: max > 1 && images.length > 1 ? "shown grip" : "shown" }, img);
    markSmall(shown, image.width, image.height);
    if (index === 0 && mask) shown.append(el("img", { class: "overlay", src: mask.overlay, alt: "Its mask" }));
    if (max > 1) shown.append(el("span", { class: "number", "aria-hidden": "true" }, String(index + 1)));
    const tools = el("div", { class: "row" });
    if (images.length > 1) {
      tools.append(
        iconButton("left", `Move image ${index + 1} earlier`, () => move(index, index - 1), { disabled: !index, "data-earlier": "" }),
        iconButton("right", `Move image ${index + 1} later`, () => move(index, index + 1), {
          disabled: index === images.length - 1, "data-later": "",
        }),
      );
    }
    const remove = iconButton("remove", `Remove image ${index + 1}`, () => {
      set(images.filter((other) => other !== image), index ? mask : null);
      input.focus();
    });
    const masking = el("div", { class: "row" });
    if (canMask && index === 0) {
      masking.append(button(mask ? "Change mask" : "Draw a mask", async () => {
        const changedMask = await drawMask(image, mask, MASK_TITLES[maskField]);
        if (images[0] === image) set(images, changedMask);
      }, { "data-draw-mask": "" }));
      if (mask) masking.append(button("Remove mask", () => set(images), { class: "link" }));
    }
    return el("li", {}, shown, el("div", { class: "about" },
      el("div", { class: "row title" }, el("p", { class: "name grow" }, image.name), remove), el("p", { class: "faint" }, `${image.width} × ${image.height}`), masking, tools));
  }

  input.addEventListener("change", async () => {
    await add([...input.files]);
    input.value = "";
  });
  if (max > 1) reorderable(list, ".grip", move);
  set([]);
  return { name: node.dataset.well, max, maskField, node, add, set, get images() { return images; }, get mask() { return mask; } };
}
