// What was painted in this browser: settings, pictures and results in IndexedDB, bounded in number and bytes.

const MOST = 40;
const MOST_BYTES = 100 * 2 ** 20;
const STORE = "painted";
let memory = []; // where the browser keeps nothing, for instance in private windows

const database = new Promise((resolve) => {
  try {
    const opening = indexedDB.open("qwen-image", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => resolve(null);
  } catch {
    resolve(null);
  }
});

/** All entries, newest first: {id, time, task, settings, wells, result, thumbnail}. */
export async function entries() {
  const found = (await request("readonly", (store) => store.getAll())) ?? memory;
  return [...found].reverse();
}

/** Keeps an entry and drops the oldest beyond the bounds. */
export async function remember(entry) {
  const added = await request("readwrite", (store) => store.add(entry));
  if (added == null) memory.push({ ...entry, id: Date.now() + Math.random() });
  let bytes = 0;
  for (const [number, { id, ...rest }] of (await entries()).entries()) {
    bytes += JSON.stringify(rest).length;
    if (number && (number >= MOST || bytes > MOST_BYTES)) await forget(id);
  }
}

/** Drops one entry, or all of them. */
export async function forget(id) {
  memory = id == null ? [] : memory.filter((entry) => entry.id !== id);
  await request("readwrite", (store) => (id == null ? store.clear() : store.delete(id)));
}

/** The result of one request to the store; null where there is no database or it refuses. */
async function request(mode, ask) {
  const open = await database;
  if (!open) return null;
  return new Promise((resolve) => {
    try {
      const transaction = open.transaction(STORE, mode);
      const asked = ask(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onabort = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
}
