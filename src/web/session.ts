/** What the page shows and what the user does to it: conversations, answers under way, models, troubles. Draws nothing. */
import { Answer } from "./answer.ts";
import { type ChatMessage, type ChatRequest, type Client, ClientError } from "./client.ts";
import {
  append,
  type Controls,
  type Conversation,
  change,
  DEFAULT_CONTROLS,
  emptyAnswer,
  type Message,
  messagesUpTo,
  newConversation,
  shownMessages,
  userMessage,
} from "./conversation.ts";
import { type Library, LibraryError } from "./library.ts";
import { Trace } from "./trace.ts";

/** Milliseconds between two drawings of an answer that is being written, and between two savings of it. */
const [DRAW_MS, SAVE_MS] = [40, 1000];
/** Times that a busy server is asked again by itself, and the longest it may ask to wait for that. */
const [RETRIES, LONGEST_WAIT_SECONDS] = [3, 120];

export interface View {
  /** False until the library has been read. */
  readonly loaded: boolean;
  /** The newest first. */
  readonly conversations: readonly Conversation[];
  readonly models: readonly string[];
  readonly connection: "unknown" | "good" | "key" | "unreachable";
  /** Why nothing is kept at the moment. */
  readonly storage: "good" | "full" | "failed";
  /** Conversations with an answer under way. */
  readonly running: ReadonlySet<string>;
  /** Answers that wait for a busy server: until when, in milliseconds since 1970. */
  readonly waits: ReadonlyMap<string, number>;
  /** Counts up whenever a trace has changed. */
  readonly traced: number;
}

const NOTHING: View = {
  loaded: false,
  conversations: [],
  models: [],
  connection: "unknown",
  storage: "good",
  running: new Set(),
  waits: new Map(),
  traced: 0,
};

export class Session {
  readonly #client: Client;
  readonly #library: Library;
  readonly #listeners = new Set<() => void>();
  readonly #answers = new Map<string, AbortController>();
  readonly #traces = new Map<string, Trace | null>();
  readonly #experts = new Map<string, number>();
  #view = NOTHING;
  /** Whether answers are asked for with their routing. */
  wantRouting = false;

  constructor(client: Client, library: Library) {
    this.#client = client;
    this.#library = library;
  }

  get view(): View {
    return this.#view;
  }

  /** Calls `listener` after each change, until what it gives back is called. */
  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  async load(): Promise<void> {
    await Promise.all([this.#read(), this.connect()]);
  }

  async #read(): Promise<void> {
    try {
      // What was being written when the page was closed is not written any more.
      const conversations = (await this.#library.all()).map((c) => ({
        ...c,
        messages: c.messages.map((m) => (m.end === null ? { ...m, end: "stopped" as const } : m)),
      }));
      this.#set({ loaded: true, conversations });
    } catch (error) {
      this.#set({ loaded: true });
      this.#storageFailed(error);
    }
  }

  /** Asks which models there are: also the way to find out whether the server is there and the key right. */
  async connect(): Promise<void> {
    try {
      this.#set({ models: await this.#client.models(), connection: "good" });
    } catch (error) {
      this.#set({ connection: error instanceof ClientError && error.kind === "key" ? "key" : "unreachable" });
    }
  }

  find(id: string): Conversation | undefined {
    return this.#view.conversations.find((c) => c.id === id);
  }

  /** A conversation with the controls of the newest one. It is kept once it has a message. */
  create(): Conversation {
    const [newest] = this.#view.conversations;
    return newConversation({ model: newest?.model ?? "", system: newest?.system ?? "", controls: newest?.controls ?? DEFAULT_CONTROLS });
  }

  /** The model that a conversation talks to: its own where the server has it, else the first. */
  modelOf({ model }: Conversation): string {
    const { models } = this.#view;
    return models.includes(model) || models.length === 0 ? model : models[0];
  }

  /** Replaces a conversation, or adds it, and keeps it. */
  put(conversation: Conversation): void {
    this.#replace(conversation);
    void this.#save(conversation.id);
  }

  async remove(id: string): Promise<void> {
    this.stop(id);
    for (const { id: message } of this.find(id)?.messages ?? []) this.#traces.delete(message);
    this.#set({ conversations: this.#view.conversations.filter((c) => c.id !== id) });
    await this.#library.remove(id).catch((error: unknown) => this.#storageFailed(error));
  }

  /** Says something behind what is shown, and has it answered. */
  send(conversation: Conversation, text: string): void {
    const message = userMessage(shownMessages(conversation).at(-1)?.id ?? null, text);
    this.put(append(conversation, message));
    this.#answer(conversation.id, message.id);
  }

  /** Puts a branch with another text beside a message; behind a changed question comes a new answer. */
  edit(conversation: Conversation, message: Message, text: string): void {
    const { id } = conversation;
    const edited =
      message.role === "user"
        ? userMessage(message.parent, text)
        : { ...emptyAnswer(message.parent, message.model), content: text, end: "stop" as const };
    this.put(append(conversation, edited));
    if (edited.role === "user") this.#answer(id, edited.id);
  }

  /** Has the message before an answer answered once more, in a branch beside it. */
  regenerate(conversation: Conversation, answer: Message): void {
    this.#answer(conversation.id, answer.parent);
  }

  /** Has a failed answer written again in its place. */
  retry(conversation: Conversation, answer: Message): void {
    this.#answer(conversation.id, answer.parent, answer);
  }

  stop(id: string): void {
    this.#answers.get(id)?.abort();
  }

  /** The experts of an answer; null where there are none, or they are still read from the library. */
  trace(message: string): Trace | null {
    const known = this.#traces.get(message);
    if (known !== undefined) return known;
    this.#traces.set(message, null);
    this.#library.trace(message).then(
      (stored) => {
        if (!stored || this.#traces.get(message)) return;
        this.#traces.set(message, new Trace(stored));
        this.#set({ traced: this.#view.traced + 1 });
      },
      (error: unknown) => this.#storageFailed(error),
    );
    return null;
  }

  /** How many experts a layer of a model has. Asked of the server once; null until it answered, and for unknown models. */
  experts(model: string): number | null {
    const known = this.#experts.get(model);
    if (known !== undefined) return known || null;
    if (!this.#view.models.includes(model)) return null;
    this.#experts.set(model, 0);
    this.#client.shape(model).then(
      (shape) => {
        this.#experts.set(model, shape?.experts ?? 0);
        this.#set({ traced: this.#view.traced + 1 });
      },
      () => {}, // a busy server: asked again with the next answer
    );
    return null;
  }

  /** @param again the answer to write once more in its place; without it, a new branch */
  #answer(id: string, parent: string | null, again?: Message): void {
    const conversation = this.find(id);
    if (!conversation || this.#answers.has(id)) return;
    const model = this.modelOf(conversation);
    if (this.#experts.get(model) === 0) this.#experts.delete(model);
    const message = again ? { ...emptyAnswer(parent, model), id: again.id } : emptyAnswer(parent, model);
    this.put(again ? change(conversation, again.id, message) : append(conversation, message));
    const stop = new AbortController();
    this.#answers.set(id, stop);
    this.#traces.set(message.id, null); // one written before, in the same place, is no longer true
    this.#set({ running: new Set(this.#answers.keys()) });
    void this.#write(id, message.id, this.#request(conversation, model, parent), stop.signal).then((trace) => {
      this.#answers.delete(id);
      this.#set({ running: new Set(this.#answers.keys()) });
      return this.#keep(id, message.id, trace);
    });
  }

  #request(conversation: Conversation, model: string, parent: string | null): ChatRequest {
    const { system, controls } = conversation;
    // An answer that failed before its first word is not one that the model gave.
    const real = messagesUpTo(conversation, parent).filter((m) => m.role === "user" || m.content !== "");
    const said = real.map(({ role, content }): ChatMessage => ({ role, content }));
    return {
      model,
      messages: system.trim() === "" ? said : [{ role: "system", content: system }, ...said],
      ...controlFields(controls),
      ...(this.wantRouting ? { routing: true as const } : {}),
    };
  }

  /** Writes an answer into its message until it ends, is stopped or fails. Resolves with its trace; never rejects. */
  async #write(id: string, message: string, request: ChatRequest, signal: AbortSignal): Promise<Trace | null> {
    const update = (changes: Partial<Message>) => {
      const now = this.find(id);
      if (now) this.#replace(change(now, message, changes));
    };
    for (let attempt = 0; ; attempt++) {
      const answer = new Answer();
      let [drawn, saved] = [0, performance.now()];
      let drawing: ReturnType<typeof setTimeout> | undefined;
      const draw = () => {
        drawing = undefined;
        drawn = performance.now();
        update(answer.parts);
        if (answer.trace) this.#traced(message, answer.trace);
      };
      try {
        for await (const delta of this.#client.chat(request, signal)) {
          answer.take(delta);
          const now = performance.now();
          drawing ??= setTimeout(draw, Math.max(0, drawn + DRAW_MS - now)); // what came last is drawn too, whatever follows
          if (now - saved >= SAVE_MS) {
            saved = now;
            void this.#save(id);
          }
        }
        clearTimeout(drawing);
        update({ ...answer.parts, end: answer.end });
      } catch (error) {
        clearTimeout(drawing);
        if (!signal.aborted && error instanceof ClientError && error.kind === "busy" && attempt < RETRIES) {
          const { retryAfterSeconds } = error;
          if (retryAfterSeconds !== null && retryAfterSeconds <= LONGEST_WAIT_SECONDS) {
            if (await this.#wait(message, retryAfterSeconds, signal)) continue;
          }
        }
        if (error instanceof ClientError && error.kind === "key") this.#set({ connection: "key" });
        const failed = !signal.aborted;
        update({ ...answer.parts, end: failed ? "failed" : "stopped", error: failed ? describe(error) : null });
      }
      if (answer.trace && this.find(id)) this.#traced(message, answer.trace);
      return answer.trace;
    }
  }

  async #keep(id: string, message: string, trace: Trace | null): Promise<void> {
    if (trace && this.find(id))
      await this.#library.saveTrace(id, message, trace.stored()).catch((error: unknown) => this.#storageFailed(error));
    await this.#save(id);
  }

  /** False when it was stopped meanwhile. */
  async #wait(message: string, seconds: number, signal: AbortSignal): Promise<boolean> {
    this.#set({ waits: new Map(this.#view.waits).set(message, Date.now() + seconds * 1000) });
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      signal.addEventListener("abort", () => {
        clearTimeout(timer);
        resolve();
      });
    });
    const waits = new Map(this.#view.waits);
    waits.delete(message);
    this.#set({ waits });
    return !signal.aborted;
  }

  #traced(message: string, trace: Trace): void {
    this.#traces.set(message, trace);
    this.#set({ traced: this.#view.traced + 1 });
  }

  #replace(conversation: Conversation): void {
    const others = this.#view.conversations.filter((c) => c.id !== conversation.id);
    this.#set({ conversations: [conversation, ...others].sort((a, b) => b.updated - a.updated) });
  }

  /** The newest state of it. */
  async #save(id: string): Promise<void> {
    const conversation = this.find(id);
    if (!conversation || conversation.messages.length === 0) return;
    try {
      await this.#library.save(conversation);
      if (this.#view.storage !== "good") this.#set({ storage: "good" });
    } catch (error) {
      this.#storageFailed(error);
    }
  }

  #storageFailed(error: unknown): void {
    this.#set({ storage: error instanceof LibraryError && error.full ? "full" : "failed" });
  }

  #set(changes: Partial<View>): void {
    this.#view = { ...this.#view, ...changes };
    for (const listener of this.#listeners) listener();
  }
}

/** Controls as the API names them; those left to the model are left out. */
function controlFields(controls: Controls): Record<string, number> {
  const fields = {
    temperature: controls.temperature,
    top_p: controls.topP,
    top_k: controls.topK,
    max_completion_tokens: controls.maxTokens,
    seed: controls.seed,
    presence_penalty: controls.presencePenalty,
    frequency_penalty: controls.frequencyPenalty,
    repetition_penalty: controls.repetitionPenalty,
  };
  return Object.fromEntries(Object.entries(fields).filter((entry): entry is [string, number] => entry[1] !== null));
}

function describe(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
