// The results of this browser and its running jobs: settings, images, results, jobs and forms in IndexedDB.

const MAX_ENTRIES = 40;
const MAX_BYTES = 100 * 2 ** 20;
const CARDS = "cards"; // entries of the list
const WHOLE = "whole"; // the rest, by the card's id
const NOTES = "notes"; // running jobs and forms, by {id}: a page that is opened again resumes them
const MAX_FORMS = 9; // of a few tabs
const memory = { [CARDS]: new Map(), [WHOLE]: new Map(), [NOTES]: new Map() }; // used if the browser stores nothing, as in some private windows

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

/** The cards of the list, newest first: {id, bytes} and the card passed to `remember`. */
export async function cards() {
  const found = await ask(CARDS, "readonly", (store) => store.getAll());
  return [...found.value ?? [], ...memory[CARDS].values()].sort((one, other) => other.id - one.id);
}

/** The whole of an entry. */
export async function recall(id) {
  return upgrade(memory[WHOLE].get(id) ?? (await ask(WHOLE, "readonly", (store) => store.get(id))).value);
}

/** This tab's name, which stays the same after a reload. */
export const tab = sessionStorage.getItem("tab") ?? `${Date.now()}-${Math.random()}`;
sessionStorage.setItem("tab", tab);
navigator.locks?.request(`tab ${tab}`, () => new Promise(() => {})); // held while the tab is open

/** A record whose wells list their images under `images`; earlier versions of the page used a different key. */
function upgrade(record) {
  for (const well of Object.values(record?.wells ?? {})) well.images ??= Object.values(well).find(Array.isArray) ?? [];
  return record;
}

/** Names of the open tabs; empty if the browser has no locks. */
async function openTabs() {
  const { held = [] } = (await navigator.locks?.query()) ?? {};
  return held.map(({ name }) => name.replace("tab ", ""));
}

/** A new id for an entry; later ids are larger. */
export const newId = () => Date.now() + Math.random();

/** Saves a note: {id, kind: "job" or "form", task} and the fields of its kind. */
export async function note(fields) {
  const entry = { ...fields, tab, time: Date.now() };
  const { kept } = await ask(NOTES, "readwrite", (store) => store.put(entry));
  if (!kept) memory[NOTES].set(entry.id, entry);
}

/** The notes of a kind, this tab's first, then the newest; without the jobs of other open tabs. */
export async function notes(kind) {
  const found = await ask(NOTES, "readonly", (store) => store.getAll());
  const open = await openTabs();
  return [...found.value ?? [], ...memory[NOTES].values()]
    .map(upgrade)
    .filter((entry) => entry.kind === kind && (kind === "form" || entry.tab === tab || !open.includes(entry.tab)))
    .sort((one, other) => (other.tab === tab) - (one.tab === tab) || other.time - one.time);
}

/** Deletes a note. */
export async function unnote(id) {
  memory[NOTES].delete(id);
  await ask(NOTES, "readwrite", (store) => store.delete(id));
}

/** Deletes the oldest forms beyond the maximum number. */
export async function tidy() {
  for (const old of (await notes("form")).slice(MAX_FORMS)) await unnote(old.id);
}

/** Saves an entry as a card and a whole, and deletes the oldest entries beyond the limits. */
export async function remember(card, whole, id) {
  const bytes = JSON.stringify(whole).length;
  await put({ [WHOLE]: { ...whole, id }, [CARDS]: { ...card, id, bytes } });
  let total = 0;
  for (const [number, old] of (await cards()).entries()) {
    total += old.bytes;
    if (number && (number >= MAX_ENTRIES || total > MAX_BYTES)) await forget(old.id);
  }
}

/** Adds the changes made to an entry's layers; the original layers stay in the entry. */
export async function amend(id, work) {
  const whole = await recall(id);
  if (whole) await put({ [WHOLE]: { ...whole, work } });
}

/** Restores entries that `forget` deleted. */
export async function restore(deleted) {
  for (const entry of deleted) await put(entry);
}

async function put(entries) {
  for (const [name, entry] of Object.entries(entries)) {
    const { kept } = await ask(name, "readwrite", (store) => store.put(entry));
    if (!kept) memory[name].set(entry.id, entry);
  }
}

/** Deletes one entry, or all of them; returns the deleted entries, for `restore`. */
export async function forget(id) {
  const deleted = [];
  for (const card of await cards()) {
    const whole = id == null || card.id === id ? await recall(card.id) : null;
    if (whole) deleted.push({ [WHOLE]: whole, [CARDS]: card });
  }
  for (const name of [CARDS, WHOLE]) {
    if (id == null) memory[name].clear();
    else memory[name].delete(id);
    await ask(name, "readwrite", (store) => (id == null ? store.clear() : store.delete(id)));
  }
  return deleted;
}

/** Sends one request to a store: whether the transaction was completed, and the request's value. */
async function ask(name, mode, request) {
  const open = await database;
  if (!open) return { kept: false };
  return new Promise((resolve) => {
    try {
      const transaction = open.transaction(name, mode);
      const sent = request(transaction.objectStore(name));
      transaction.oncomplete = () => resolve({ kept: true, value: sent.result });
      transaction.onabort = () => resolve({ kept: false });
    } catch {
      resolve({ kept: false });
    }
  });
}
