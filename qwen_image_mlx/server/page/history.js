// What was painted in this browser, and what is being painted: settings, pictures, results, jobs and forms in IndexedDB.

const MOST = 40;
const MOST_BYTES = 100 * 2 ** 20;
const CARDS = "cards"; // what the list shows
const WHOLE = "whole"; // the rest, by the card's id
const NOTES = "notes"; // jobs that run and forms, by {id}: what a page that is opened again takes up
const FORMS = 9; // that are kept: of a few tabs
const memory = { [CARDS]: new Map(), [WHOLE]: new Map(), [NOTES]: new Map() }; // where the browser keeps nothing, as in some private windows

const database = new Promise((resolve) => {
  try {
    const opening = indexedDB.open("qwen-image", 2);
    opening.onupgradeneeded = () => [CARDS, WHOLE, NOTES].filter((name) => !opening.result.objectStoreNames.contains(name)).forEach((name) => opening.result.createObjectStore(name, { keyPath: "id" }));
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => resolve(null);
  } catch {
    resolve(null);
  }
});

/** What the list shows, newest first: {id, bytes} and what `remember` was given. */
export async function cards() {
  const found = await ask(CARDS, "readonly", (store) => store.getAll());
  return [...found.value ?? [], ...memory[CARDS].values()].sort((one, other) => other.id - one.id);
}

/** All that was kept of an entry. */
export async function recall(id) {
  return memory[WHOLE].get(id) ?? (await ask(WHOLE, "readonly", (store) => store.get(id))).value;
}

/** This tab's name, which outlives a reload. */
export const tab = sessionStorage.getItem("tab") ?? `${Date.now()}-${Math.random()}`;
sessionStorage.setItem("tab", tab);
navigator.locks?.request(`tab ${tab}`, () => new Promise(() => {})); // held while the tab is open

/** Names of the tabs that are open, as far as the browser tells. */
async function openTabs() {
  const { held = [] } = (await navigator.locks?.query()) ?? {};
  return held.map(({ name }) => name.replace("tab ", ""));
}

/** A new id of an entry: later ones are larger. */
export const newId = () => Date.now() + Math.random();

/** Keeps a note: {id, kind: "job" or "form", task} and whatever belongs to it. */
export async function note(given) {
  const entry = { ...given, tab, time: Date.now() };
  const { kept } = await ask(NOTES, "readwrite", (store) => store.put(entry));
  if (!kept) memory[NOTES].set(entry.id, entry);
}

/** The notes of a kind that this tab may take up, its own first, then the newest: not the jobs of other open tabs. */
export async function notes(kind) {
  const found = await ask(NOTES, "readonly", (store) => store.getAll());
  const open = await openTabs();
  return [...found.value ?? [], ...memory[NOTES].values()]
    .filter((entry) => entry.kind === kind && (kind === "form" || entry.tab === tab || !open.includes(entry.tab)))
    .sort((one, other) => (other.tab === tab) - (one.tab === tab) || other.time - one.time);
}

/** Drops a note. */
export async function unnote(id) {
  memory[NOTES].delete(id);
  await ask(NOTES, "readwrite", (store) => store.delete(id));
}

/** Drops the forms of tabs that are long closed. */
export async function tidy() {
  for (const old of (await notes("form")).slice(FORMS)) await unnote(old.id);
}

/** Keeps an entry, a card and the whole of it, and drops the oldest beyond the bounds. */
export async function remember(card, whole, id) {
  const bytes = JSON.stringify(whole).length;
  await put({ [WHOLE]: { ...whole, id }, [CARDS]: { ...card, id, bytes } });
  let total = 0;
  for (const [number, old] of (await cards()).entries()) {
    total += old.bytes;
    if (number && (number >= MOST || total > MOST_BYTES)) await forget(old.id);
  }
}

/** Keeps an entry's work, of layers, beside what it was made from. */
export async function amend(id, work) {
  const whole = await recall(id);
  if (whole) await put({ [WHOLE]: { ...whole, work } });
}

/** Brings back what `forget` dropped. */
export async function restore(dropped) {
  for (const entry of dropped) await put(entry);
}

async function put(entries) {
  for (const [name, entry] of Object.entries(entries)) {
    const { kept } = await ask(name, "readwrite", (store) => store.put(entry));
    if (!kept) memory[name].set(entry.id, entry);
  }
}

/** Drops one entry, or all of them; what `restore` needs to bring them back. */
export async function forget(id) {
  const dropped = [];
  for (const card of await cards()) {
    const whole = id == null || card.id === id ? await recall(card.id) : null;
    if (whole) dropped.push({ [WHOLE]: whole, [CARDS]: card });
  }
  for (const name of [CARDS, WHOLE]) {
    if (id == null) memory[name].clear();
    else memory[name].delete(id);
    await ask(name, "readwrite", (store) => (id == null ? store.clear() : store.delete(id)));
  }
  return dropped;
}

/** One request to a store: whether it was kept, and its value. */
async function ask(name, mode, request) {
  const open = await database;
  if (!open) return { kept: false };
  return new Promise((resolve) => {
    try {
      const transaction = open.transaction(name, mode);
      const asked = request(transaction.objectStore(name));
      transaction.oncomplete = () => resolve({ kept: true, value: asked.result });
      transaction.onabort = () => resolve({ kept: false });
    } catch {
      resolve({ kept: false });
    }
  });
}
