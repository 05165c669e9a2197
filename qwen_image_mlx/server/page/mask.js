// The dialog in which a mask is drawn over an image. A mask is a list of strokes; the white area is inpainted.

import { all, one } from "./dom.js";
import { decode, markSmall, toCanvas } from "./images.js";

const TINT = "#e0218a";
const NUDGE = 24; // presses of an arrow key that cross the image

/**
 * Lets the user draw or change a mask.
 *
 * @param {{url: string, width: number, height: number}} image the image under the mask.
 * @param {?{strokes: Array}} before the mask to change.
 * @param {string} title of the dialog.
 * @returns {Promise<?{url: string, overlay: string, strokes: Array}>} null without a mask;
 *   `url` is a PNG of the image's size, `overlay` a tinted PNG for the thumbnail.
 */
export async function drawMask(image, before, title = "Mark the area to change") {
  const below = await decode(image.url);
  const dialog = one("#mask");
  one("#mask-title", dialog).textContent = title;
  const canvas = one("canvas", dialog);
  const brush = one("[name=brush]", dialog);
  const { width, height } = image;
  const strokes = [...(before?.strokes ?? [])];
  const cursor = [width / 2, height / 2];
  Object.assign(canvas, { width, height });
  canvas.before(below);
  below.alt = "";
  markSmall(below.parentNode, width, height);
  const context = canvas.getContext("2d");

  const show = (at = null) => {
    context.clearRect(0, 0, width, height);
    strokes.forEach((stroke) => draw(context, stroke, TINT));
    if (at) ring(context, at, radius());
    one("[data-act=undo]", dialog).disabled = one("[data-act=clear]", dialog).disabled = !strokes.length;
  };
  const radius = () => Math.max(0.5, (Number(brush.value) / 300) * Math.max(width, height));
  const begin = (point) => strokes.push({ erase: one("[name=tool]:checked", dialog).value === "erase", radius: radius(), points: [point] });
  const pointOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };
  let drawing = false;
  const acts = {
    undo: () => strokes.pop(),
    clear: () => strokes.splice(0),
  };
  const listeners = {
    pointerdown(event) {
      if (event.target !== canvas || event.button) return;
      canvas.setPointerCapture(event.pointerId);
      drawing = true;
      begin(pointOf(event));
      show();
    },
    pointermove(event) {
      if (event.target !== canvas) return;
      if (drawing) strokes.at(-1).points.push(...(event.getCoalescedEvents?.() ?? [event]).map(pointOf));
      show(pointOf(event));
    },
    pointerup: () => { drawing = false; },
    pointercancel: () => { drawing = false; },
    pointerout: () => show(),
    click(event) {
      const act = event.target.closest("[data-act]")?.dataset.act;
      if (!act) return;
      acts[act]();
      show();
    },
    keydown(event) {
      if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        strokes.pop();
        show();
      } else if (event.target === canvas) {
        const step = Math.max(width, height) / NUDGE;
        const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
        if (!way) return;
        event.preventDefault();
        cursor[0] = Math.min(width, Math.max(0, cursor[0] + way[0] * step));
        cursor[1] = Math.min(height, Math.max(0, cursor[1] + way[1] * step));
        if (event.key === " ") begin([...cursor]);
        show(cursor);
      }
    },
  };
  for (const [name, listener] of Object.entries(listeners)) dialog.addEventListener(name, listener);
  dialog.returnValue = "cancel";
  dialog.showModal();
  show();
  canvas.focus();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  for (const [name, listener] of Object.entries(listeners)) dialog.removeEventListener(name, listener);
  all("img", dialog).forEach((node) => node.remove());
  if (dialog.returnValue !== "done") return before ?? null;
  return strokes.some((stroke) => !stroke.erase) ? render(strokes, width, height) : null;
}

function render(strokes, width, height) {
  const tinted = canvasOf(width, height);
  strokes.forEach((stroke) => draw(tinted.getContext("2d"), stroke, TINT));
  const mask = canvasOf(width, height);
  const context = mask.getContext("2d");
  strokes.forEach((stroke) => draw(context, stroke, "#fff"));
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  const scale = Math.min(1, 320 / Math.max(width, height));
  const overlay = toCanvas(tinted, Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  return { url: mask.toDataURL("image/png"), overlay: overlay.toDataURL("image/png"), strokes };
}

const canvasOf = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

function draw(context, { erase, radius, points }, colour) {
  context.save();
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.strokeStyle = colour;
  context.lineWidth = 2 * radius;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...points[0]);
  points.forEach((point) => context.lineTo(...point));
  context.stroke();
  context.restore();
}

function ring(context, [x, y], radius) {
  context.save();
  context.strokeStyle = "#000";
  context.lineWidth = Math.max(0.5, context.canvas.width / 400);
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.stroke();
  context.restore();
}
