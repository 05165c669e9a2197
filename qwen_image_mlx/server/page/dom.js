// Small helpers for the document. Independent of images and the server.

export const one = (selector, root = document) => root.querySelector(selector);
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];

/** Creates an element. Attributes that begin with `on` are listeners; the remaining arguments are children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** A button that calls `act`. */
export const button = (text, act, attributes = {}) => el("button", { type: "button", onclick: act, ...attributes }, text);

const ICONS = {
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M19 12H5M11 6l-6 6 6 6",
  right: "M5 12h14M13 6l6 6-6 6",
  remove: "M6 6l12 12M18 6 6 18",
  visible: "M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12ZM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6",
  hidden: "M4 4l16 16M9.5 5.8A9 9 0 0 1 12 5.5c6 0 9.5 6.5 9.5 6.5a17 17 0 0 1-3 3.7M6.2 7.8A17 17 0 0 0 2.5 12S6 18.5 12 18.5a9 9 0 0 0 3.8-.8",
  grip: "M9 6h.01M15 6h.01M9 12h.01M15 12h.01M9 18h.01M15 18h.01",
  home: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
};

/** An icon by name, hidden from screen readers. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; its label is its accessible name. */
export function iconButton(name, label, act, attributes = {}) {
  const node = button("", act, { class: "icon", "aria-label": label, title: label, ...attributes });
  node.append(icon(name));
  return node;
}

/** Announces a text to screen readers only. */
export function say(text) {
  one("#announcement").textContent = text;
}

/** A duration as text, from seconds. */
export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/**
 * Lets the user reorder the children of a list by dragging their handles.
 * `moved(from, to)` is called with indices when a child is dropped at a new position.
 */
export function reorderable(list, handle, moved) {
  list.addEventListener("pointerdown", (event) => {
    const item = event.target.closest(handle)?.closest("li");
    if (!item || event.button) return;
    event.preventDefault();
    const place = () => [...list.children].indexOf(item);
    const from = place();
    item.classList.add("dragged");
    const follow = (at) => {
      const over = document.elementFromPoint(at.clientX, at.clientY)?.closest("li");
      if (!over || over === item || over.parentNode !== list) return;
      over[[...list.children].indexOf(over) > place() ? "after" : "before"](item);
    };
    const end = () => {
      item.classList.remove("dragged");
      document.removeEventListener("pointermove", follow);
      document.removeEventListener("pointerup", end);
      document.removeEventListener("pointercancel", end);
      if (place() !== from) moved(from, place());
    };
    document.addEventListener("pointermove", follow);
    document.addEventListener("pointerup", end);
    document.addEventListener("pointercancel", end);
  });
}
