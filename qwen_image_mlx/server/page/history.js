// What was painted in this browser: settings, pictures and results in IndexedDB, bounded in number and bytes.

const MOST = 40;
const MOST_BYTES = 100 * 2 ** 20;
const CARDS = "cards"; // what the list shows
const WHOLE = "whole"; // the rest, by the card's id
const memory = { [CARDS]: new Map(), [WHOLE]: new Map() }; // where the browser keeps nothing, as in some private windows

const database = new Promise((resolve) => {
  try {
    const opening = indexedDB.open("qwen-image", 1);
    opening.onupgradeneeded = () => [CARDS, WHOLE].forEach((name) => opening.result.createObjectStore(name, { keyPath: "id" }));
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

/** Keeps an entry, a card and the whole of it, and drops the oldest beyond the bounds. */
export async function remember(card, whole) {
  const id = Date.now() + Math.random();
  const bytes = JSON.stringify(whole).length;
  for (const [name, entry] of [[WHOLE, { ...whole, id }], [CARDS, { ...card, id, bytes }]]) {
    const { kept } = await ask(name, "readwrite", (store) => store.put(entry));
    if (!kept) memory[name].set(id, entry);
  }
  let total = 0;
  for (const [number, old] of (await cards()).entries()) {
    total += old.bytes;
    if (number && (number >= MOST || total > MOST_BYTES)) await forget(old.id);
  }
}

/** Drops one entry, or all of them. */
export async function forget(id) {
  for (const name of [CARDS, WHOLE]) {
    if (id == null) memory[name].clear();
    else memory[name].delete(id);
    await ask(name, "readwrite", (store) => (id == null ? store.clear() : store.delete(id)));
  }
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
