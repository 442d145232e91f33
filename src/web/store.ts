/** Conversations as trees of messages, kept in this browser. Knows no server and no page. */
import type { Routing } from "./wire.ts";

export interface Node {
  readonly id: string;
  /** The message that it follows; null for the first. */
  readonly parent: string | null;
  readonly role: "user" | "assistant";
  readonly content: string;
  readonly reasoning?: string;
  readonly calls?: readonly { readonly name: string; readonly arguments: string }[];
  readonly routing?: readonly Routing[];
  readonly stats?: { readonly tokens: number; readonly firstMs: number; readonly perSecond: number };
  readonly error?: string;
}

export interface Sampling {
  readonly temperature: string;
  readonly topP: string;
  readonly topK: string;
  readonly maxTokens: string;
  readonly seed: string;
  readonly repetition: string;
}

export interface Conversation {
  readonly id: string;
  readonly title: string;
  readonly updated: number;
  readonly system: string;
  readonly sampling: Sampling;
  readonly nodes: readonly Node[];
  /** The message that is shown last; null in an empty one. */
  readonly leaf: string | null;
}

const DEFAULT_SAMPLING: Sampling = { temperature: "", topP: "", topK: "", maxTokens: "512", seed: "", repetition: "" };

export function emptyConversation(): Conversation {
  return { id: crypto.randomUUID(), title: "", updated: Date.now(), system: "", sampling: DEFAULT_SAMPLING, nodes: [], leaf: null };
}

/** The messages from the first to the one that is shown last. */
export function pathOf({ nodes, leaf }: Conversation): Node[] {
  const byId = new Map(nodes.map((n) => [n.id, n]));
  const path: Node[] = [];
  for (let at = leaf === null ? undefined : byId.get(leaf); at; at = at.parent === null ? undefined : byId.get(at.parent)) path.unshift(at);
  return path;
}

/** Messages that stand in the same place, in the order in which they were made. */
export function versionsOf({ nodes }: Conversation, node: Node): Node[] {
  return nodes.filter((n) => n.parent === node.parent && n.role === node.role);
}

/** Shows another version, and what was said last after it. */
export function showVersion(conversation: Conversation, node: Node): Conversation {
  let leaf = node;
  for (;;) {
    const next = conversation.nodes.findLast((n) => n.parent === leaf.id);
    if (!next) return { ...conversation, leaf: leaf.id };
    leaf = next;
  }
}

export function addNode(conversation: Conversation, node: Node): Conversation {
  const title = conversation.title || node.content.trim().slice(0, 60);
  return { ...conversation, title, nodes: [...conversation.nodes, node], leaf: node.id, updated: Date.now() };
}

export function changeNode(conversation: Conversation, id: string, change: Partial<Node>): Conversation {
  return { ...conversation, nodes: conversation.nodes.map((n) => (n.id === id ? { ...n, ...change } : n)), updated: Date.now() };
}

const STORE = "conversations";

function opened(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("mixtape", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function transact<T>(mode: IDBTransactionMode, act: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = act(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** All conversations, the latest first. */
export async function loadAll(): Promise<Conversation[]> {
  const all = (await transact("readonly", (s) => s.getAll())) as Conversation[];
  return all.sort((a, b) => b.updated - a.updated);
}

export async function save(conversation: Conversation): Promise<void> {
  await transact("readwrite", (s) => s.put(conversation));
}

export async function remove(id: string): Promise<void> {
  await transact("readwrite", (s) => s.delete(id));
}

/** Conversations of a file that the page wrote; null where it holds none. Everything in it is taken as mere text. */
export function parseExport(text: string): Conversation[] | null {
  try {
    const { mixtape, conversations } = JSON.parse(text) as { mixtape?: unknown; conversations?: unknown };
    if (mixtape !== 1 || !Array.isArray(conversations)) return null;
    return conversations.map((c: Record<string, unknown>) => {
      const nodes = (Array.isArray(c["nodes"]) ? c["nodes"] : []).map(
        (n: Record<string, unknown>): Node => ({
          id: String(n["id"]),
          parent: n["parent"] === null ? null : String(n["parent"]),
          role: n["role"] === "assistant" ? "assistant" : "user",
          content: String(n["content"] ?? ""),
          ...(typeof n["reasoning"] === "string" ? { reasoning: n["reasoning"] } : {}),
        }),
      );
      const empty = emptyConversation();
      return {
        ...empty,
        title: String(c["title"] ?? ""),
        system: String(c["system"] ?? ""),
        updated: Number(c["updated"]) || empty.updated,
        nodes,
        leaf: nodes.some((n) => n.id === c["leaf"]) ? String(c["leaf"]) : (nodes.at(-1)?.id ?? null),
      };
    });
  } catch {
    return null;
  }
}

export function exported(conversations: readonly Conversation[]): string {
  return JSON.stringify({ mixtape: 1, conversations }, null, 1);
}
