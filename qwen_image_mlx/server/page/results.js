// The pictures of a result, with what can be done with them.

import { button, el } from "./dom.js";
import { comparison, decoded, download, fileName, markSmall } from "./pictures.js";

/**
 * A gallery of painted pictures.
 *
 * @param {{images: Array<{image: string, seed: number}>}} result as the API gives it.
 * @param {object} settings what was asked for.
 * @param {?string} before URL of the picture that was changed.
 * @param {(task: string) => ?((url: string, name: string) => void)} way takes a picture on to a task, if that is offered.
 */
export async function gallery(result, settings, before, way) {
  const figures = await Promise.all(result.images.map(async ({ image: url, seed }) => {
    const name = fileName(settings.prompt, seed);
    const image = await decoded(url);
    image.alt = settings.prompt;
    const { frame, slider } = before ? comparison(image, before) : { frame: el("div", { class: "frame" }, image), slider: null };
    markSmall(frame, image.naturalWidth, image.naturalHeight);
    const actions = [
      button("Download", () => download(url, `${name}.png`), { "data-do": "download" }),
      ...[["edit", "Edit this"], ["decompose", "Take apart"]].map(([task, text]) => {
        const go = way(task);
        return go && button(text, () => go(url, `${name}.png`), { "data-do": task });
      }),
    ].filter(Boolean);
    return el("figure", { class: "result" }, frame, slider, el("figcaption", { class: "row" },
      el("span", { class: "faint" }, `${image.naturalWidth} × ${image.naturalHeight} · seed ${seed}`), el("span", { class: "grow" }), ...actions));
  }));
  return el("div", { class: figures.length > 1 ? "gallery many" : "gallery" }, ...figures);
}
