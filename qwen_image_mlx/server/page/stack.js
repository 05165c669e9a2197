// The layer editor. It composites layers in the browser; the user moves, fades, hides, orders, edits and saves them.

import { ApiError, compose, follow, submit } from "./api.js";
import { button, duration, el, icon, iconButton, reorderable, say } from "./dom.js";
import { amend, note, notes, unnote } from "./history.js";
import { asImage, comparison, decode, download, fileName, markSmall, toCanvas } from "./images.js";
import { drawMask } from "./mask.js";

const FORMATS = { png: "PNG", psd: "PSD", ora: "ORA", zip: "ZIP" };
const NUDGES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const HAZE = 40; // pixels with at most this alpha are ignored by clicks and outlines
const FAR = 10; // pixels an arrow key moves a layer with Shift
const NEW = "new"; // of a job: the layer that it makes
const OF_ALL_LAYERS = ["prompt", "num_layers", "caption_language", "layer_prompt", "layer_mask"]; // settings

/**
 * An editor for the layers of a result.
 *
 * @param {{layers: Array<{image: string}>, prompt: string, psnr: ?number, seed: number}} result as the API returns it.
 * @param {object} settings the form's fields.
 * @param {?string} original URL of the image that was decomposed.
 * @param {(task: string) => ?Function} way null if the server does not offer the task.
 * @param {{id: number, work: ?Array<object>}} kept its id in the history and the saved state of its layers.
 */
export async function stackEditor(result, settings, original, way, { id, work }) {
  const nameOf = (from) => (from ? `Layer ${from}` : result.layers.length > 1 ? "Background" : settings.layer_prompt || "Layer");
  const untouched = result.layers.map((_, from) => ({ from, x: 0, y: 0, opacity: 1, visible: true, undo: [] }));
  let layers = await Promise.all((work ?? untouched).map(async (state) => {
    const url = state.url ?? result.layers[state.from].image;
    const undo = await Promise.all(state.undo.map(async (before) => ({ url: before, image: await decode(before) })));
    return { ...state, name: state.name ?? nameOf(state.from), url, image: await decode(url), undo };
  }));
  const past = []; // states before each change, for undo
  const width = Math.max(...layers.map(({ image }) => image.naturalWidth));
  const height = Math.max(...layers.map(({ image }) => image.naturalHeight));
  const name = fileName(settings.prompt || result.prompt, result.seed);
  let selected = layers.at(-1);

  const canvas = el("canvas", { width, height, tabindex: 0, role: "application", "aria-label": "The composited layers. Drag a layer, or move it with the arrow keys." });
  const outline = el("div", { class: "outline", "aria-hidden": "true" });
  const { frame, slider } = original ? comparison(canvas, original) : { frame: el("div", { class: "frame" }, canvas), slider: null };
  frame.append(outline);
  frame.classList.add("checkered");
  markSmall(frame, width, height);
  const list = el("ol", { class: "layers", "aria-label": "Layers, front to back" });
  const notice = el("p", { class: "notice", role: "alert", hidden: true });

  function draw() {
    keep();
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    for (const { image, x, y, opacity, visible } of layers) {
      context.globalAlpha = visible ? opacity : 0;
      context.drawImage(image, x, y);
    }
    const { left, top, right, bottom } = bounds(selected);
    const at = { left: (left + selected.x) / width, top: (top + selected.y) / height, width: (right - left) / width, height: (bottom - top) / height };
    for (const [side, part] of Object.entries(at)) outline.style[side] = `${100 * part}%`;
    outline.hidden = !selected.visible;
    for (const layer of layers) {
      layer.row?.classList.toggle("selected", layer === selected);
      layer.row?.classList.toggle("unseen", !layer.visible);
      if (layer.place) layer.place.textContent = layer.x || layer.y ? `moved by ${layer.x}, ${layer.y}` : "not moved";
      if (layer.back) layer.back.hidden = !(layer.x || layer.y);
    }
  }

  /** Saves the state of the layers in the history, shortly after the last change. */
  let keeping = 0;
  function keep() {
    clearTimeout(keeping);
    keeping = setTimeout(() => amend(id, layers.map(({ from, name, url, x, y, opacity, visible, undo }) => ({
      from, name, url: url === result.layers[from]?.image ? undefined : url, x, y, opacity, visible, undo: undo.map((before) => before.url),
    }))), 200);
  }

  /** Saves a state that `back` restores. */
  function mark() {
    past.push(layers.map((layer) => [layer, { x: layer.x, y: layer.y, opacity: layer.opacity, visible: layer.visible }]));
    backward.disabled = false;
  }

  function back() {
    const state = past.pop();
    if (!state) return;
    layers = state.map(([layer, before]) => Object.assign(layer, before));
    if (!layers.includes(selected)) selected = layers.at(-1);
    backward.disabled = !past.length;
    rows();
    say("Undone.");
  }

  const backward = button("Undo", back, { class: "link", disabled: true, title: "Undo the last change of place, order or opacity (Ctrl Z)", "data-back": "" });

  function select(layer) {
    selected = layer;
    draw();
  }

  function move(layer, x, y) {
    Object.assign(layer, { x: Math.round(x), y: Math.round(y) });
    draw();
  }

  function order(layer, to) {
    const from = layers.indexOf(layer);
    mark();
    layers.splice(to, 0, ...layers.splice(from, 1));
    selected = layer;
    rows();
    say(`${layer.name} is now ${to + 1} of ${layers.length} from the back.`);
  }

  function rows() {
    list.replaceChildren(...[...layers].reverse().map(row));
    draw();
  }

  function row(layer) {
    const at = layers.indexOf(layer);
    const raise = (by, which) => () => {
      order(layer, at + by);
      const next = layer.row.querySelector(`[data-${which}]`);
      (next.disabled ? layer.row.querySelector(".name") : next).focus();
    };
    const eye = iconButton(layer.visible ? "visible" : "hidden", `Show ${layer.name}`, () => {
      mark();
      layer.visible = !layer.visible;
      rows();
      layer.row.querySelector("[data-eye]").focus();
    }, { "aria-pressed": String(layer.visible), "data-eye": "" });
    const opacity = el("input", { type: "range", min: 0, max: 100, value: Math.round(100 * layer.opacity), "aria-label": `Opacity of ${layer.name}` });
    const percent = el("output", {}, `${opacity.value}%`);
    let sliding = false;
    opacity.addEventListener("change", () => { sliding = false; });
    opacity.addEventListener("input", () => {
      if (!sliding) mark();
      sliding = true;
      layer.opacity = opacity.value / 100;
      percent.textContent = `${opacity.value}%`;
      select(layer);
    });
    layer.place = el("span", { class: "faint" });
    layer.back = button("Reset position", () => {
      mark();
      move(layer, 0, 0);
    }, { class: "link" });
    layer.row = el("li", {},
      el("div", { class: "row" },
        el("span", { class: "grip icon", title: "Drag to reorder" }, icon("grip")),
        el("span", { class: "thumb checkered" }, el("img", { src: layer.url, alt: "", draggable: "false" })),
        button(layer.name, () => select(layer), { class: "name", "aria-label": `Select ${layer.name}` }),
        eye,
        iconButton("up", `Move ${layer.name} to the front`, raise(1, "up"), { disabled: at === layers.length - 1, "data-up": "" }),
        iconButton("down", `Move ${layer.name} to the back`, raise(-1, "down"), { disabled: at === 0, "data-down": "" })),
      el("div", { class: "inside" },
        el("label", { class: "slider" }, el("span", {}, "Opacity"), opacity, percent),
        el("div", { class: "row" }, layer.place, layer.back, el("span", { class: "grow" }),
          button("Save", () => download(layer.url, `${name}-${layer.name.toLowerCase().replace(" ", "-")}.png`), { class: "link", title: "Download this layer as PNG" })),
        way("edit") ? promptFor(layer) : null));
    return layer.row;
  }

  /** The form that edits one layer with a prompt. The edit sees only this layer and keeps its transparency. */
  function promptFor(layer) {
    const words = el("input", { type: "text", placeholder: "Make it blue", "aria-label": `What to change in ${layer.name}`, required: true, value: layer.words ?? "" });
    const go = el("button", { class: "primary" }, layer.stop ? "Cancel" : "Edit");
    const undo = layer.undo.length && !layer.stop ? button("Undo edit", () => {
      Object.assign(layer, layer.undo.pop());
      rows();
    }, { class: "link" }) : null;
    layer.bar = el("progress", { max: 1, hidden: !layer.stop, "aria-label": `Progress of ${layer.name}` });
    layer.now = el("span", { class: "faint", "aria-hidden": "true" });
    const form = el("form", { class: "words" }, el("div", { class: "row" }, words, go), layer.bar, el("div", { class: "row" }, layer.now, undo));
    words.addEventListener("input", () => { layer.words = words.value; });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        event.stopPropagation();
        form.requestSubmit();
      } else if (event.key === "Escape" && layer.stop) {
        event.stopPropagation();
        layer.stop.abort();
      }
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (layer.stop) {
        layer.stop.abort();
        return;
      }
      const fields = { prompt: layer.words, image: layer.url, keep_alpha: true, size: "source" };
      const edited = attend(layer, async () => {
        const job = await submit("edit", fields);
        await note({ id: `job ${job}`, kind: "job", job, task: "edit", entry: id, layer: layer.from });
        return job;
      });
      layer.row.querySelector(".words button").focus();
      await edited;
    });
    return form;
  }

  /**
   * Follows a job to its end, gives its result to `finish`, and then forgets the job; what goes wrong is shown.
   * `place` has a bar and a text for the progress, and `stop`, which cancels the job while there is one.
   */
  async function runJob(place, begin, finish) {
    let job = null;
    place.stop = new AbortController();
    notice.hidden = true;
    try {
      job = await begin();
      await finish(await follow(job, (event, data) => tell(place, event, data), place.stop.signal));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.code !== "cancelled") Object.assign(notice, { hidden: false, textContent: error.message });
    } finally {
      try {
        if (job) await unnote(`job ${job}`);
      } finally {
        place.stop = null;
      }
    }
  }

  /** An image and its address, resized if it does not have the size. */
  async function sized(url, w, h) {
    const image = await decode(url);
    if (image.naturalWidth === w && image.naturalHeight === h) return { url, image };
    const resized = toCanvas(image, w, h).toDataURL("image/png");
    return { url: resized, image: await decode(resized) };
  }

  /** Follows the job that edits a layer. */
  async function attend(layer, begin) {
    const done = runJob(layer, begin, async ({ images }) => {
      const undo = { url: layer.url, image: layer.image };
      Object.assign(layer, await sized(images[0].image, layer.image.naturalWidth, layer.image.naturalHeight));
      layer.undo.push(undo);
      say(`${layer.name} has been edited.`);
    });
    rows();
    try {
      await done;
    } finally {
      const here = layer.row.contains(document.activeElement);
      rows();
      if (here) layer.row.querySelector(".words input").focus();
    }
  }

  /** The form that adds one layer, of what is named or marked on the original. */
  function adder() {
    const place = {};
    const words = el("input", { type: "text", placeholder: "The boat", "aria-label": "What a new layer shows" });
    let mask = null;
    const marking = button("Mark it", async () => {
      mask = await drawMask(await asImage(original, ""), mask, "Mark what the layer shows");
      marking.textContent = mask ? "Change mask" : "Mark it";
    });
    place.go = el("button", { class: "primary" }, "Add layer");
    place.bar = el("progress", { max: 1, hidden: true, "aria-label": "Progress of the new layer" });
    place.now = el("span", { class: "faint", "aria-hidden": "true" });
    const form = el("form", { class: "words", "data-add": "" }, el("div", { class: "row" }, words, marking, place.go), place.bar, place.now);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (place.stop) {
        place.stop.abort();
        return;
      }
      const named = words.value.trim();
      if (!named && !mask) {
        Object.assign(notice, { hidden: false, textContent: "Name what the layer shows, or mark it." });
        return;
      }
      const fields = Object.fromEntries(Object.entries(settings).filter(([field]) => !OF_ALL_LAYERS.includes(field)));
      await add(place, named || "Marked layer", async () => {
        const job = await submit("decompose", {
          ...fields, image: original, ...(named ? { layer_prompt: named } : {}), ...(mask ? { layer_mask: mask.url } : {}),
        });
        await note({ id: `job ${job}`, kind: "job", job, task: "decompose", entry: id, layer: NEW, name: named });
        return job;
      });
    });
    return Object.assign(place, { form });
  }

  /** Follows the job that makes a layer, and lays the layer in front. */
  async function add(place, name, begin) {
    place.go.textContent = "Cancel";
    place.bar.value = 0;
    place.bar.hidden = false;
    try {
      await runJob(place, begin, async ({ layers: [made] }) => {
        const one = await sized(made.image, width, height);
        const from = Math.max(result.layers.length - 1, ...layers.map((layer) => layer.from)) + 1;
        mark();
        selected = { from, name, ...one, x: 0, y: 0, opacity: 1, visible: true, undo: [] };
        layers = [...layers, selected];
        rows();
        say(`${name} is a layer now.`);
      });
    } finally {
      place.go.textContent = "Add layer";
      place.bar.hidden = true;
      place.now.textContent = "";
    }
  }

  function tell(layer, event, { step, total, seconds_left: left, position }) {
    if (event === "step") layer.bar.value = step / total;
    if (event === "queued") layer.now.textContent = position ? `Waiting, ${position} ahead in the queue` : "Waiting";
    if (event === "step") layer.now.textContent = left == null ? `Step ${step} of ${total}` : `${duration(left)} left`;
  }

  function pointOf(event) {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    const [x, y] = pointOf(event);
    const hit = [...layers].reverse().find((layer) => layer.visible && layer.opacity && isVisible(layer, x - layer.x, y - layer.y));
    if (hit) select(hit);
    const begun = [selected.x - x, selected.y - y];
    let moved = false;
    canvas.setPointerCapture(event.pointerId);
    const follow = (at) => {
      const [toX, toY] = pointOf(at);
      if (!moved) mark();
      moved = true;
      move(selected, begun[0] + toX, begun[1] + toY);
    };
    canvas.addEventListener("pointermove", follow);
    canvas.addEventListener("lostpointercapture", () => canvas.removeEventListener("pointermove", follow), { once: true });
  });
  canvas.addEventListener("keydown", (event) => {
    const way = NUDGES[event.key];
    if (!way) return;
    event.preventDefault();
    const far = event.shiftKey ? FAR : 1;
    mark();
    move(selected, selected.x + way[0] * far, selected.y + way[1] * far);
    say(`${selected.name} moved by ${selected.x}, ${selected.y}.`);
  });
  reorderable(list, ".grip", (from, to) => order([...layers].reverse()[from], layers.length - 1 - to));

  async function save(format, pressed) {
    notice.hidden = true;
    pressed.disabled = true;
    try {
      const sent = layers.map(({ name, url: image, x, y, opacity, visible }) => ({ name, image, x, y, opacity, visible }));
      const { image, file } = await compose(sent, format);
      download(image ?? file, `${name}.${format}`);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      Object.assign(notice, { hidden: false, textContent: error.message });
    } finally {
      pressed.disabled = false;
    }
  }

  const saving = Object.entries(FORMATS).map(([format, text]) =>
    button(text, (event) => save(format, event.currentTarget), { "data-format": format, "aria-label": `Download as ${text}` }));
  const near = result.psnr == null ? "" : ` · ${result.psnr.toFixed(1)} dB from the original`;
  rows();
  const adding = original && way("decompose") ? adder() : null;
  for (const { job, entry, layer, name: named } of await notes("job")) {
    if (entry !== id) continue;
    const edited = way("edit") && layers.find(({ from }) => from === layer);
    if (edited && !edited.stop) attend(edited, async () => job);
    if (adding && layer === NEW && !adding.stop) add(adding, named || "Marked layer", async () => job);
  }
  const editor = el("div", { class: "stack" },
    el("div", { class: "table" }, frame, slider, el("div", { class: "row" }, backward),
      el("div", { class: "row save" }, el("span", { class: "faint" }, "Download"), ...saving),
      notice,
      el("p", { class: "faint" }, `${width} × ${height} · seed ${result.seed}${near}`),
      result.prompt && ![settings.prompt, settings.layer_prompt].includes(result.prompt) ? el("p", { class: "faint" }, `Described as: ${result.prompt}`) : null),
    el("div", {}, list, adding?.form));
  editor.addEventListener("keydown", (event) => {
    if (event.key !== "z" || !(event.ctrlKey || event.metaKey) || event.target.matches("[type=text]")) return;
    event.preventDefault();
    back();
  });
  return editor;
}

/** Whether a layer is visible at a point of its own image. */
function isVisible({ image }, x, y) {
  if (x < 0 || y < 0 || x >= image.naturalWidth || y >= image.naturalHeight) return false;
  const context = el("canvas", { width: 1, height: 1 }).getContext("2d");
  context.drawImage(image, -Math.floor(x), -Math.floor(y));
  return context.getImageData(0, 0, 1, 1).data[3] > HAZE;
}

/** The bounding box of a layer's visible pixels, in pixels of its own image. */
function bounds(layer) {
  if (layer.boundsOf === layer.image) return layer.box;
  const { naturalWidth: width, naturalHeight: height } = layer.image;
  const scale = Math.min(1, 256 / Math.max(width, height));
  const [w, h] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const { data } = toCanvas(layer.image, w, h).getContext("2d").getImageData(0, 0, w, h);
  let [left, top, right, bottom] = [w, h, 0, 0];
  for (let y = 0; y < h; y += 1) {
    for (let x = 0; x < w; x += 1) {
      if (data[4 * (y * w + x) + 3] <= HAZE) continue;
      left = Math.min(left, x);
      right = Math.max(right, x + 1);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y + 1);
    }
  }
  const empty = right <= left;
  layer.boundsOf = layer.image;
  layer.box = empty
    ? { left: 0, top: 0, right: width, bottom: height }
    : { left: (left * width) / w, top: (top * height) / h, right: (right * width) / w, bottom: (bottom * height) / h };
  return layer.box;
}
