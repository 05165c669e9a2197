// A well: the place of a form where pictures are dropped, put in order and masked.

import { button, el, iconButton, reorderable, say } from "./dom.js";
import { paintMask } from "./mask.js";
import { markSmall, readPicture } from "./pictures.js";

let wells = 0;

/**
 * Makes a well of an element.
 *
 * @param {HTMLElement} node where it is shown; `data-most` how many pictures it holds, `data-mask` if the first can be masked.
 * @param {() => void} changed called after every change.
 * @param {(message: string) => void} refuse called with a sentence when a file is no picture.
 */
export function makeWell(node, changed, refuse) {
  const most = Number(node.dataset.most);
  const canMask = "mask" in node.dataset;
  const id = `file-${(wells += 1)}`;
  const list = el("ol", { class: "pictures", "aria-label": "Chosen pictures" });
  const input = el("input", { type: "file", id, accept: "image/*", multiple: most > 1, class: "visually-hidden" });
  const words = el("span", {});
  node.append(list, input, el("label", { class: "drop", for: id }, words));
  let pictures = [];
  let mask = null;

  function set(next, nextMask = null) {
    mask = nextMask && next.length ? nextMask : null;
    pictures = next.slice(0, most);
    list.replaceChildren(...pictures.map(card));
    node.classList.toggle("full", pictures.length >= most);
    words.textContent = pictures.length
      ? most > 1 ? "Add another" : "Choose another"
      : most > 1 ? `Drop up to ${most} pictures here, paste, or choose` : "Drop a picture here, paste, or choose";
    changed();
  }

  async function add(files) {
    for (const file of files) {
      try {
        const picture = await readPicture(file);
        const kept = most === 1 ? [] : pictures;
        if (kept.length >= most) throw new Error(`There is room for ${most} pictures; remove one first.`);
        set([...kept, picture], kept.length ? mask : null);
      } catch (error) {
        refuse(error.message);
      }
    }
  }

  function move(from, to) {
    const next = [...pictures];
    next.splice(to, 0, ...next.splice(from, 1));
    set(next, next[0] === pictures[0] ? mask : null);
    say(`Picture ${from + 1} is now picture ${to + 1}.`);
    const moved = list.children[to];
    (moved?.querySelector(to > from ? "[data-later]:enabled" : "[data-earlier]:enabled") ?? moved?.querySelector("button:enabled"))?.focus();
  }

  function card(picture, index) {
    const image = el("img", { src: picture.url, alt: `Picture ${index + 1}: ${picture.name}`, draggable: "false" });
    const shown = el("div", { class: most > 1 && pictures.length > 1 ? "shown grip" : "shown" }, image);
    markSmall(shown, picture.width, picture.height);
    if (index === 0 && mask) shown.append(el("img", { class: "overlay", src: mask.overlay, alt: "Its mask" }));
    if (most > 1) shown.append(el("span", { class: "number", "aria-hidden": "true" }, String(index + 1)));
    const tools = el("div", { class: "row" });
    if (pictures.length > 1) {
      tools.append(
        iconButton("left", `Move picture ${index + 1} earlier`, () => move(index, index - 1), { disabled: !index, "data-earlier": "" }),
        iconButton("right", `Move picture ${index + 1} later`, () => move(index, index + 1), {
          disabled: index === pictures.length - 1, "data-later": "",
        }),
      );
    }
    const remove = iconButton("remove", `Remove picture ${index + 1}`, () => {
      set(pictures.filter((other) => other !== picture), index ? mask : null);
      input.focus();
    });
    const masking = el("div", { class: "row" });
    if (canMask && index === 0) {
      masking.append(button(mask ? "Change mask" : "Paint a mask", async () => {
        const painted = await paintMask(picture, mask);
        if (pictures[0] === picture) set(pictures, painted);
      }, { "data-paint-mask": "" }));
      if (mask) masking.append(button("Remove mask", () => set(pictures), { class: "link" }));
    }
    return el("li", {}, shown, el("div", { class: "about" },
      el("div", { class: "row title" }, el("p", { class: "name grow" }, picture.name), remove), el("p", { class: "faint" }, `${picture.width} × ${picture.height}`), masking, tools));
  }

  input.addEventListener("change", async () => {
    await add([...input.files]);
    input.value = "";
  });
  if (most > 1) reorderable(list, ".grip", move);
  set([]);
  return { name: node.dataset.well, most, node, add, set, get pictures() { return pictures; }, get mask() { return mask; } };
}
