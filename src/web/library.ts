/** Stores conversations and traces in the browser (IndexedDB). Knows nothing of the server or the page. */
import type { Conversation } from "./conversation.ts";
import type { StoredTrace } from "./trace.ts";

const NAME = "mixtape";
const VERSION = 1;

/** The browser's database failed; `full` is true when its storage quota is used up. */
export class LibraryError extends Error {
  override readonly name = "LibraryError";
  readonly full: boolean;

  constructor(cause: unknown) {
    super((cause as Error | null)?.message ?? "the browser's database failed without giving a reason", { cause });
    this.full = (cause as Error | null)?.name === "QuotaExceededError";
  }
}

interface KeptTrace extends StoredTrace {
  readonly message: string;
  readonly conversation: string;
}

export class Library {
  readonly #open: Promise<IDBDatabase>;

  constructor() {
    this.#open = new Promise((resolve, reject) => {
      const opening = indexedDB.open(NAME, VERSION);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore("conversations", { keyPath: "id" });
        opening.result.createObjectStore("traces", { keyPath: "message" }).createIndex("conversation", "conversation");
      };
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(new LibraryError(opening.error));
      opening.onblocked = () =>
        reject(new LibraryError(new Error("another tab has an older version of the database open: close it and reload")));
    });
    this.#open.catch(() => {}); // every method below reports the failure
  }

  /** All conversations, newest first. */
  async all(): Promise<Conversation[]> {
    const found = await this.#run<Conversation[]>("readonly", (stores) => stores("conversations").getAll());
    return found.sort((a, b) => b.updated - a.updated);
  }

  async save(conversation: Conversation): Promise<void> {
    await this.#run("readwrite", (stores) => stores("conversations").put(conversation));
  }

  /** Removes a conversation and its traces. */
  async remove(id: string): Promise<void> {
    await this.#run("readwrite", (stores) => {
      const keys = stores("traces").index("conversation").getAllKeys(id);
      keys.onsuccess = () => {
        for (const key of keys.result) stores("traces").delete(key);
      };
      return stores("conversations").delete(id);
    });
  }

  async saveTrace(conversation: string, message: string, trace: StoredTrace): Promise<void> {
    await this.#run("readwrite", (stores) => stores("traces").put({ ...trace, conversation, message } satisfies KeptTrace));
  }

  async trace(message: string): Promise<StoredTrace | null> {
    return (await this.#run<KeptTrace | undefined>("readonly", (stores) => stores("traces").get(message))) ?? null;
  }

  /** Runs one transaction and resolves once it has completed. Throws LibraryError. */
  async #run<T>(mode: IDBTransactionMode, use: (stores: (name: string) => IDBObjectStore) => IDBRequest): Promise<T> {
    const database = await this.#open;
    return new Promise<T>((resolve, reject) => {
      const fail = (cause: unknown) => reject(new LibraryError(cause));
      try {
        const transaction = database.transaction(["conversations", "traces"], mode);
        const request = use((name) => transaction.objectStore(name));
        transaction.oncomplete = () => resolve(request.result as T);
        transaction.onabort = () => fail(transaction.error ?? request.error);
        transaction.onerror = () => fail(transaction.error ?? request.error);
      } catch (error) {
        fail(error);
      }
    });
  }
}
