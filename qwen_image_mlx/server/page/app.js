// Puts the page together: tabs, keys, theme, history. Everything the server is asked goes through api.js.

import { config } from "./api.js";
import { all, button, el, one, say } from "./dom.js";
import { cards, forget, recall, remember } from "./history.js";
import { Panel } from "./panel.js";
import { asPicture, thumbnail } from "./pictures.js";
import { gallery } from "./results.js";
import { stackEditor } from "./stack.js";

const VERBS = { generate: "Paint", edit: "Change it", decompose: "Take apart" };
const NAMES = { generate: "Painted", edit: "Changed", decompose: "Taken apart" };
const tabs = all("[role=tab]");
const panels = {};
let configured = false;

/** The function that takes a picture on to a task; null where the task is not offered. */
function way(task) {
  const panel = panels[task];
  if (!panel.offered) return null;
  return async (url, name) => {
    panel.wells[0].set([await asPicture(url, name)]);
    open(task);
    one("[name=prompt]", panel.form).focus();
  };
}

const shows = {
  generate: (result, settings) => gallery(result, settings, null, way),
  edit: (result, settings, before) => gallery(result, settings, before, way),
  decompose: (result, settings, before) => stackEditor(result, settings, before, way),
};

async function painted({ task, settings, wells, result }) {
  const first = result.images?.[0] ?? result.layers.at(-1);
  const shown = task === "decompose" ? wells.image.pictures[0].url : first.image;
  const card = { task, prompt: settings.prompt, thumbnail: await thumbnail(shown), time: Date.now() };
  await remember(card, { task, settings, wells, result });
  await showHistory();
}

async function useAgain(id) {
  const kept = await recall(id);
  if (!kept) {
    await showHistory(); // another tab has dropped it
    return;
  }
  const { task, settings, wells, result } = kept;
  const panel = panels[task];
  panel.fill({ ...settings, seed: result.images?.[0].seed ?? result.seed }, wells);
  open(task);
  if (!panel.running) await panel.present(result, settings, wells);
  window.scrollTo({ top: 0, behavior: "smooth" });
  say("The settings are back.");
}

async function showHistory() {
  const found = await cards();
  const section = one(".history");
  section.hidden = !found.length;
  one("ul", section).replaceChildren(...found.map((card) => el("li", {},
    el("img", { src: card.thumbnail, alt: "", loading: "lazy" }),
    el("div", {},
      el("p", { class: "words", title: card.prompt ?? "" }, card.prompt || "No words"),
      el("p", { class: "faint" }, `${NAMES[card.task]} · ${new Date(card.time).toLocaleString([], { dateStyle: "short", timeStyle: "short" })}`),
      el("div", { class: "row" },
        button("Use these settings again", () => useAgain(card.id), { class: "link" }),
        button("Forget", async () => {
          await forget(card.id);
          await showHistory();
        }, { class: "link quiet" }))))));
}

function open(task) {
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${task}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    panels[tab.id.slice(4)].section.hidden = !chosen;
  }
  history.replaceState(null, "", `#${task}`);
}

const current = () => Object.values(panels).find(({ section }) => !section.hidden);

async function connect() {
  try {
    const offered = await config();
    one("#offline").hidden = true;
    if (!configured) Object.values(panels).forEach((panel) => panel.configure(offered));
    configured = true;
  } catch (error) {
    one("#offline").firstChild.textContent = `${error.message} `;
    one("#offline").hidden = false;
  }
}

function themed() {
  const remembered = document.documentElement.dataset.theme;
  return remembered ? remembered === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

for (const tab of tabs) {
  const task = tab.id.slice(4);
  panels[task] = new Panel(one(`#panel-${task}`), VERBS[task], shows[task], painted);
  tab.addEventListener("click", () => open(task));
}
one("[role=tablist]").addEventListener("keydown", (event) => {
  const at = tabs.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const tab = tabs.at(to % tabs.length);
  tab.click();
  tab.focus();
});
document.addEventListener("keydown", (event) => {
  if (one("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    current().start();
  } else if (event.key === "Escape") current().cancel();
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length && !one("dialog[open]")) current().take(files);
});
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());

const theme = one("#theme");
theme.setAttribute("aria-pressed", themed());
theme.addEventListener("click", () => {
  const next = themed() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  theme.setAttribute("aria-pressed", themed());
});
one("#retry").addEventListener("click", connect);
window.addEventListener("online", connect);
one("#forget").addEventListener("click", async () => {
  await forget();
  await showHistory();
});

open(tabs.map((tab) => tab.id.slice(4)).find((task) => location.hash === `#${task}`) ?? "generate");
await Promise.all([connect(), showHistory()]);
document.documentElement.dataset.ready = "";
