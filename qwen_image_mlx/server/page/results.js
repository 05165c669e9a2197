// The images of a result, with their actions.

import { button, el } from "./dom.js";
import { comparison, decode, download, fileName, markSmall } from "./images.js";

/**
 * A gallery of generated images.
 *
 * @param {{images: Array<{image: string, seed: number}>}} result as the API returns it.
 * @param {object} settings the form's fields.
 * @param {?string} before URL of the image that was edited.
 * @param {(task: string) => ?((url: string, name: string) => void)} way returns a function that sends an image to a task's
 *   form; null if the server does not offer the task.
 */
export async function gallery(result, settings, before, way) {
  const figures = await Promise.all(result.images.map(async ({ image: url, seed }) => {
    const name = fileName(settings.prompt, seed);
    const image = await decode(url);
    image.alt = settings.prompt;
    const { frame, slider } = before ? comparison(image, before) : { frame: el("div", { class: "frame" }, image), slider: null };
    markSmall(frame, image.naturalWidth, image.naturalHeight);
    const actions = [
      button("Download", () => download(url, `${name}.png`), { "data-do": "download" }),
      ...[["edit", "Edit"], ["decompose", "Decompose"]].map(([task, text]) => {
        const go = way(task);
        return go && button(text, () => go(url, `${name}.png`), { "data-do": task });
      }),
    ].filter(Boolean);
    return el("figure", { class: "result" }, frame, slider, el("figcaption", { class: "row" },
      el("span", { class: "faint" }, `${image.naturalWidth} × ${image.naturalHeight} · seed ${seed}`), el("span", { class: "grow" }), ...actions));
  }));
  return el("div", { class: figures.length > 1 ? "gallery many" : "gallery" }, ...figures);
}
