// Puts the page together: tabs, keys, theme, history. All requests to the server go through api.js.

import { config, follow } from "./api.js";
import { all, button, el, one, say } from "./dom.js";
import { cards, forget, note, notes, recall, remember, restore, tidy, unnote } from "./history.js";
import { Panel } from "./panel.js";
import { asImage, thumbnail } from "./images.js";
import { gallery } from "./results.js";
import { stackEditor } from "./stack.js";

const VERBS = { generate: "Generate", edit: "Edit", decompose: "Decompose" };
const NAMES = { generate: "Generated", edit: "Edited", decompose: "Decomposed" };
const tabs = all("[role=tab]");
const panels = {};
let configured = false;
let restoring = null;

/** A function that sends an image to a task's form; null if the server does not offer the task. */
function way(task) {
  const panel = panels[task];
  if (!panel.offered) return null;
  return async (url, name) => {
    panel.wells[0].set([await asImage(url, name)]);
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

/** Adds a result to the history. */
async function keepResult({ task, settings, wells, result, id }) {
  const first = result.images?.[0] ?? result.layers.at(-1);
  const preview = task === "decompose" ? wells.image.images[0].url : first.image;
  const card = { task, prompt: settings.prompt ?? settings.layer_prompt, thumbnail: await thumbnail(preview), time: Date.now() };
  await remember(card, { task, settings, wells, result }, id);
  await historyChanged();
}

async function useAgain(id) {
  const kept = await recall(id);
  if (!kept) {
    await showHistory(); // a different tab has deleted it
    return;
  }
  const { task, settings, wells, result, work } = kept;
  const panel = panels[task];
  panel.fill({ ...settings, seed: result.images?.[0].seed ?? result.seed }, wells);
  open(task);
  if (!panel.running) await panel.present(result, settings, wells, { id, work });
  window.scrollTo({ top: 0, behavior: "smooth" });
  say("The settings are restored.");
}

async function showHistory() {
  const found = await cards();
  const section = one(".history");
  section.hidden = !found.length && one("#deleted").hidden;
  one("#delete").hidden = !found.length;
  one("ul", section).replaceChildren(...found.map((card) => el("li", {},
    el("img", { src: card.thumbnail, alt: "", loading: "lazy" }),
    el("div", {},
      el("p", { class: "words", title: card.prompt ?? "" }, card.prompt || "No prompt"),
      el("p", { class: "faint" }, `${NAMES[card.task]} · ${new Date(card.time).toLocaleString([], { dateStyle: "short", timeStyle: "short" })}`),
      el("div", { class: "row" },
        button("Use these settings again", () => useAgain(card.id), { class: "link" }),
        button("Delete", () => deleteEntries(card.id), { class: "link quiet" }))))));
}

async function historyChanged() {
  await showHistory();
  elsewhere?.postMessage("");
}

/** Deletes one entry of the history, or all of them, and offers to restore them. */
async function deleteEntries(id) {
  const deleted = await forget(id);
  const notice = one("#deleted");
  const undo = button("Undo", async () => {
    notice.hidden = true;
    await restore(deleted);
    await historyChanged();
    say("The history is restored.");
  }, { class: "link" });
  notice.replaceChildren(deleted.length === 1 ? "1 entry deleted. " : `${deleted.length} entries deleted. `, undo);
  notice.hidden = !deleted.length;
  await historyChanged();
  undo.focus();
}

/** Restores the forms and the results that were visible when the page was closed. */
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

/** Resumes the jobs of this tab and of closed tabs. Each panel shows one job; the others run in the background. */
async function resumeJobs() {
  for (const record of await notes("job")) {
    if (record.layer != null) continue; // the layer editor resumes it
    const panel = panels[record.task];
    await note(record); // it belongs to this tab from now on
    if (panel.running) follow(record.job, () => {}, new AbortController().signal)
      .then((result) => keepResult({ ...record, result, id: record.entry }), () => {})
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

function isDark() {
  const remembered = document.documentElement.dataset.theme;
  return remembered ? remembered === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

for (const tab of tabs) {
  const task = tab.id.slice(4);
  panels[task] = new Panel(one(`#panel-${task}`), VERBS[task], shows[task], keepResult);
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
theme.setAttribute("aria-pressed", isDark());
theme.addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  theme.setAttribute("aria-pressed", isDark());
});
one("#retry").addEventListener("click", connect);
window.addEventListener("online", connect);
one("#delete").addEventListener("click", () => deleteEntries());
elsewhere?.addEventListener("message", showHistory);

open(tabs.map((tab) => tab.id.slice(4)).find((task) => location.hash === `#${task}`) ?? "generate");
await Promise.all([connect(), showHistory()]);
document.documentElement.dataset.ready = "";
