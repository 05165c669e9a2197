// Puts the page together: tabs, keys, theme, history. Everything the server is asked goes through api.js.

import { config, follow } from "./api.js";
import { all, button, el, one, say } from "./dom.js";
import { cards, forget, note, notes, recall, remember, restore, tidy, unnote } from "./history.js";
import { Panel } from "./panel.js";
import { asPicture, thumbnail } from "./pictures.js";
import { gallery } from "./results.js";
import { stackEditor } from "./stack.js";

const VERBS = { generate: "Paint", edit: "Change it", decompose: "Take apart" };
const NAMES = { generate: "Painted", edit: "Changed", decompose: "Taken apart" };
const tabs = all("[role=tab]");
const panels = {};
let configured = false;
let restoring = null;

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
  decompose: (result, settings, before, kept) => stackEditor(result, settings, before, way, kept),
};

const elsewhere = "BroadcastChannel" in window ? new BroadcastChannel("history") : null; // other tabs

async function painted({ task, settings, wells, result, id }) {
  const first = result.images?.[0] ?? result.layers.at(-1);
  const shown = task === "decompose" ? wells.image.pictures[0].url : first.image;
  const card = { task, prompt: settings.prompt, thumbnail: await thumbnail(shown), time: Date.now() };
  await remember(card, { task, settings, wells, result }, id);
  await historyChanged();
}

async function useAgain(id) {
  const kept = await recall(id);
  if (!kept) {
    await showHistory(); // another tab has dropped it
    return;
  }
  const { task, settings, wells, result, work } = kept;
  const panel = panels[task];
  panel.fill({ ...settings, seed: result.images?.[0].seed ?? result.seed }, wells);
  open(task);
  if (!panel.running) await panel.present(result, settings, wells, { id, work });
  window.scrollTo({ top: 0, behavior: "smooth" });
  say("The settings are back.");
}

async function showHistory() {
  const found = await cards();
  const section = one(".history");
  section.hidden = !found.length && one("#forgotten").hidden;
  one("#forget").hidden = !found.length;
  one("ul", section).replaceChildren(...found.map((card) => el("li", {},
    el("img", { src: card.thumbnail, alt: "", loading: "lazy" }),
    el("div", {},
      el("p", { class: "words", title: card.prompt ?? "" }, card.prompt || "No words"),
      el("p", { class: "faint" }, `${NAMES[card.task]} · ${new Date(card.time).toLocaleString([], { dateStyle: "short", timeStyle: "short" })}`),
      el("div", { class: "row" },
        button("Use these settings again", () => useAgain(card.id), { class: "link" }),
        button("Forget", () => forgetThen(card.id), { class: "link quiet" }))))));
}

async function historyChanged() {
  await showHistory();
  elsewhere?.postMessage("");
}

/** Drops one entry of the history, or all, and offers to bring them back. */
async function forgetThen(id) {
  const dropped = await forget(id);
  const notice = one("#forgotten");
  const undo = button("Undo", async () => {
    notice.hidden = true;
    await restore(dropped);
    await historyChanged();
    say("The history is back.");
  }, { class: "link" });
  notice.replaceChildren(dropped.length === 1 ? "One entry is forgotten. " : `${dropped.length} entries are forgotten. `, undo);
  notice.hidden = !dropped.length;
  await historyChanged();
  undo.focus();
}

/** Puts forms back as they were left, and what was on their stages. */
async function restoreForms() {
  const forms = await notes("form");
  for (const [task, panel] of Object.entries(panels)) {
    const form = forms.find((entry) => entry.task === task);
    if (form) panel.fill(form.settings, form.wells);
    const kept = form?.shown && await recall(form.shown);
    if (kept) await panel.present(kept.result, kept.settings, kept.wells, kept);
    panel.restored = true;
  }
  await tidy();
}

/** Takes up the jobs that this tab, or one that is closed, has begun: one on each stage, the others unseen. */
async function resumeJobs() {
  for (const record of await notes("job")) {
    if (record.layer != null) continue; // the editor of layers takes it up
    const panel = panels[record.task];
    await note(record); // this tab's from now on
    if (panel.running) follow(record.job, () => {}, new AbortController().signal)
      .then((result) => painted({ ...record, result, id: record.entry }), () => {})
      .finally(() => unnote(record.id));
    else panel.resume(record);
  }
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
  } catch (error) {
    one("#offline").firstChild.textContent = `${error.message} `;
    one("#offline").hidden = false;
    await (restoring ??= restoreForms());
    return;
  }
  await (restoring ??= restoreForms());
  if (configured) return;
  configured = true;
  await resumeJobs();
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
one("#forget").addEventListener("click", () => forgetThen());
elsewhere?.addEventListener("message", showHistory);

open(tabs.map((tab) => tab.id.slice(4)).find((task) => location.hash === `#${task}`) ?? "generate");
await Promise.all([connect(), showHistory()]);
document.documentElement.dataset.ready = "";
