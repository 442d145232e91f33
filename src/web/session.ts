/** The state of the page and the user's actions on it: conversations, running answers, models, failures. Renders nothing. */
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
import type { ServedModel } from "./wire.ts";

/** Minimum milliseconds between two updates of a streaming answer on the page, and between two saves of it. */
const [DRAW_MS, SAVE_MS] = [40, 1000];
/** How often a request to a busy server is retried automatically, and the longest `Retry-After` for which it is. */
const [RETRIES, LONGEST_WAIT_SECONDS] = [3, 120];

export interface View {
  /** False until the library has been read. */
  readonly loaded: boolean;
  /** Newest first. */
  readonly conversations: readonly Conversation[];
  readonly models: readonly ServedModel[];
  readonly connection: "unknown" | "good" | "key" | "unreachable";
  /** Whether conversations can be saved at the moment, and if not, why. */
  readonly storage: "good" | "full" | "failed";
  /** Ids of conversations with a running answer. */
  readonly running: ReadonlySet<string>;
  /** Answers waiting for a busy server: message id to the time of the next attempt, in milliseconds since 1970. */
  readonly waits: ReadonlyMap<string, number>;
  /** Incremented whenever a trace or the known shape of a model changes. */
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
  /** Whether requests ask for routing. */
  wantRouting = false;

  constructor(client: Client, library: Library) {
    this.#client = client;
    this.#library = library;
  }

  get view(): View {
    return this.#view;
  }

  /** Calls `listener` after each change. Returns a function that unsubscribes. */
  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  async load(): Promise<void> {
    await Promise.all([this.#read(), this.connect()]);
  }

  async #read(): Promise<void> {
    try {
      // An answer that was being generated when the page was closed counts as stopped.
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

  /** Loads the list of models. This also shows whether the server is reachable and the key valid. */
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

  /** A new conversation with the settings of the latest one. It is saved once it has a message. */
  create(): Conversation {
    const [newest] = this.#view.conversations;
    return newConversation({ model: newest?.model ?? "", system: newest?.system ?? "", controls: newest?.controls ?? DEFAULT_CONTROLS });
  }

  /** The model that answers a conversation: its own if the server has it, else the server's first. */
  modelOf({ model }: Conversation): string {
    const { models } = this.#view;
    return models.length === 0 || models.some(({ id }) => id === model) ? model : models[0].id;
  }

  /** Adds or replaces a conversation, and saves it. */
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

  /** Appends a user message to the visible branch and requests an answer. */
  send(conversation: Conversation, text: string): void {
    const message = userMessage(shownMessages(conversation).at(-1)?.id ?? null, text);
    this.put(append(conversation, message));
    this.#answer(conversation.id, message.id);
  }

  /** Adds an edited copy of a message as a new branch; an edited user message also gets a new answer. */
  edit(conversation: Conversation, message: Message, text: string): void {
    const { id } = conversation;
    const edited =
      message.role === "user"
        ? userMessage(message.parent, text)
        : { ...emptyAnswer(message.parent, message.model), content: text, end: "stop" as const };
    this.put(append(conversation, edited));
    if (edited.role === "user") this.#answer(id, edited.id);
  }

  /** Generates another answer to the same message, as a new branch. */
  regenerate(conversation: Conversation, answer: Message): void {
    this.#answer(conversation.id, answer.parent);
  }

  /** Generates a failed answer again, in its place. */
  retry(conversation: Conversation, answer: Message): void {
    this.#answer(conversation.id, answer.parent, answer);
  }

  stop(id: string): void {
    this.#answers.get(id)?.abort();
  }

  /** The routing of an answer; null when there is none, or while it is being read from the library. */
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

  /** The number of experts per layer of a model, asked of the server once; null until it answers, and for unknown models. */
  experts(model: string): number | null {
    const known = this.#experts.get(model);
    if (known !== undefined) return known || null;
    if (!this.#view.models.some(({ id }) => id === model)) return null;
    this.#experts.set(model, 0);
    this.#client.shape(model).then(
      (shape) => {
        this.#experts.set(model, shape?.experts ?? 0);
        this.#set({ traced: this.#view.traced + 1 });
      },
      () => {}, // a busy server or a dense model: asked again with the next answer
    );
    return null;
  }

  /** @param again the answer to replace; without it, the answer becomes a new branch */
  #answer(id: string, parent: string | null, again?: Message): void {
    const conversation = this.find(id);
    if (!conversation || this.#answers.has(id)) return;
    const model = this.modelOf(conversation);
    if (this.#experts.get(model) === 0) this.#experts.delete(model);
    const message = again ? { ...emptyAnswer(parent, model), id: again.id } : emptyAnswer(parent, model);
    this.put(again ? change(conversation, again.id, message) : append(conversation, message));
    const stop = new AbortController();
    this.#answers.set(id, stop);
    this.#traces.set(message.id, null); // a retried answer must not keep its old trace
    this.#set({ running: new Set(this.#answers.keys()) });
    void this.#write(id, message.id, this.#request(conversation, model, parent), stop.signal).then((trace) => {
      this.#answers.delete(id);
      this.#set({ running: new Set(this.#answers.keys()) });
      return this.#keep(id, message.id, trace);
    });
  }

  #request(conversation: Conversation, model: string, parent: string | null): ChatRequest {
    const { system, controls } = conversation;
    // Leave out answers that failed before their first token: the model did not say anything.
    const real = messagesUpTo(conversation, parent).filter((m) => m.role === "user" || m.content !== "");
    const said = real.map(({ role, content }): ChatMessage => ({ role, content }));
    return {
      model,
      messages: system.trim() === "" ? said : [{ role: "system", content: system }, ...said],
      ...controlFields(controls),
      ...(this.wantRouting ? { routing: true as const } : {}),
    };
  }

  /** Streams an answer into its message until it ends, is stopped or fails. Resolves with its trace; never rejects. */
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
          drawing ??= setTimeout(draw, Math.max(0, drawn + DRAW_MS - now)); // a timer, so that the last delta is shown even if nothing follows
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

  /** Waits before a retry. Resolves with false if the answer was stopped meanwhile. */
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

  /** Saves the latest state of a conversation, if it has messages. */
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

/** The controls under their API names, without those left at the model's default. */
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
