/**
 * Serves token sequences: ids in, ids out. The serving loop schedules a batch, runs one step of the model, and hands out
 * the results. Knows no text.
 */
import { setImmediate as turn } from "node:timers/promises";
import type { Backend, Placement, State, Weights } from "../backend/backend.ts";
import { NOT_FINITE } from "../graph/ops/sampling.ts";
import { bytesOf } from "../graph/plan.ts";
import { type Content, checkContent } from "../model/content.ts";
import type { Model } from "../model/model.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import { type AdapterLimits, type Branches, type LoadedAdapter, LoadedAdapters } from "./adapters.ts";
import { type Drawn, drawBatch } from "./batch.ts";
import { BLOCK_TOKENS, Blocks } from "./blocks.ts";
import { type Inspection, inspect, meanHidden, notFinite, type Task, type Wanted, type Watch } from "./inspection.ts";
import { Programs } from "./programs.ts";
import { checkSampling, GREEDY } from "./sampling.ts";
import { type BatchEntry, Scheduler } from "./scheduler.ts";
import { type GeneratedToken, type Request, Sequence } from "./sequence.ts";
import { type EngineStats, type StepReport, Tally } from "./stats.ts";
import { Steps } from "./steps.ts";

export type { AdapterLimits, Branch, Branches } from "./adapters.ts";
export type { Inspection, RoutedLayer, Watch } from "./inspection.ts";
export type { EngineStats, StepReport } from "./stats.ts";

export interface EngineOptions {
  readonly model: Model;
  readonly backend: Backend;
  readonly weights: Weights;
  /** The format that each parameter was loaded in. */
  readonly dtypeOf: (parameter: string) => Dtype;
  /** Parameters that are float32 states of the backend, such as those under training, by name; all others are weights. Default: none. */
  readonly states?: ReadonlyMap<string, State>;
  /** Format of the KV cache. Default: what suits the backend. */
  readonly kvDtype?: KvDtype;
  /** Capacity of the KV cache in tokens, for all sequences together. Default: 16 full sequences, or as many as fit in the backend's share of the memory that the weights leave. */
  readonly kvTokens?: number;
  /** The most rows in one step; longer prompts are computed in chunks. Default: what suits the backend. */
  readonly maxRows?: number;
  /** The most sequences computed at once; others wait. Default 512. */
  readonly maxSequences?: number;
  /** Milliseconds that prompts may add to a step while other sequences wait for their next token. Default 200. */
  readonly promptMs?: number;
  /** Keep full blocks for requests that share a prefix. Default true. */
  readonly prefixCache?: boolean;
  /** How many adapters may be loaded, and their largest rank. */
  readonly adapters?: AdapterLimits;
}

const READERS_AT_ONCE = 32;
/** The most tokens that the cache has room for by default, unless one sequence may be longer. */
const MOST_KV_TOKENS = 2 ** 22;
/** The fewest prompt rows allowed in a step, however slow the machine: fewer would hardly save time. */
const LEAST_PROMPT_ROWS = 16;

export class Engine {
  readonly model: Model;
  readonly kvDtype: KvDtype;
  /** Bytes of KV cache per token. */
  readonly kvBytesPerToken: number;
  /** Called after every step, for metrics; it must not throw. */
  onStep: ((report: StepReport) => void) | null = null;
  readonly #backend: Backend;
  readonly #weights: Weights;
  readonly #programs: Programs;
  readonly #steps: Steps;
  readonly #adapters: LoadedAdapters;
  /** Adapters of texts that `inspect` and `embed` are computing. */
  readonly #inspecting: LoadedAdapter[] = [];
  readonly #blocks: Blocks;
  readonly #scheduler: Scheduler;
  readonly #maxRows: number;
  readonly #promptMs: number;
  readonly #tally: Tally;
  /** Sequences whose readers have not been woken for their newest token. */
  #unread: Sequence[] = [];
  #running = false;

  constructor(options: EngineOptions) {
    const { model, backend, weights, dtypeOf, maxSequences = 512, promptMs = 200, prefixCache = true } = options;
    const { maxRows = backend.defaults.rows } = options;
    for (const [name, value] of Object.entries({ maxRows, maxSequences }))
      if (!Number.isInteger(value) || value < 1) throw new RangeError(`${name} is ${value}; it must be a whole number of at least 1`);
    const kvDtype = options.kvDtype ?? backend.defaults.kvDtype(dtypeOf(model.embedding));
    this.model = model;
    this.kvDtype = kvDtype;
    this.kvBytesPerToken = kvBytesPerToken(model, kvDtype);
    const available = backend.memory().free; // the page cache counts as free, including pages of mapped weights
    const mapped = weights.mappedBytes - weights.placement().movedBytes; // moved bytes are no longer available
    const left = Math.max(available - mapped, available / 16); // a model larger than memory is paged in from disk
    const fits = Math.floor((left * backend.defaults.cacheShare) / this.kvBytesPerToken);
    const sequences = Math.max(model.maxPositions, Math.min(16 * model.maxPositions, MOST_KV_TOKENS));
    const kvTokens = options.kvTokens ?? Math.min(sequences, Math.max(fits, BLOCK_TOKENS));
    this.#backend = backend;
    this.#weights = weights;
    this.#maxRows = maxRows;
    this.#promptMs = promptMs;
    this.#blocks = new Blocks(Math.ceil(kvTokens / BLOCK_TOKENS));
    this.#scheduler = new Scheduler(this.#blocks, { maxRows, maxSequences, prefixCache });
    this.#programs = new Programs(model, dtypeOf, backend, weights, { dtype: kvDtype, blocks: this.#blocks.count }, options.states);
    this.#steps = new Steps(this.#programs);
    this.#adapters = new LoadedAdapters(model, backend, options.adapters);
    this.#tally = new Tally(model.mixtures.layers.length, model.mixtures.experts);
  }

  /** Whether the weights' files were truncated or changed while mapped: every request fails until the model is loaded again. */
  get lost(): boolean {
    return !this.#steps.disposed && this.#weights.lost();
  }

  /** Blocks of the cache without a holder, and in total. */
  get cache(): { free: number; count: number } {
    return { free: this.#blocks.free, count: this.#blocks.count };
  }

  /** The current load, and totals since the start. */
  stats(): EngineStats {
    const { count, free, idle } = this.#blocks;
    const { running, waiting, preemptions } = this.#scheduler;
    return { running, waiting, blocks: { count, free, remembered: idle }, preemptions, ...this.#tally.totals() };
  }

  /**
   * Generates from a prompt; concurrent requests share steps. Throws immediately on an empty prompt, ids outside the vocabulary, a
   * prompt longer than the model's positions or the cache, an unknown adapter, invalid controls, or a model that is a classifier. Leaving the loop or aborting the signal cancels it.
   */
  submit(request: Request): AsyncGenerator<GeneratedToken, void, undefined> {
    if (this.model.classes !== null) throw new RangeError("the model is a classifier: it has classes to choose from, and no tokens");
    this.check(request);
    checkSampling(request.sampling, this.model.vocabSize);
    if (!Number.isInteger(request.maxNewTokens) || request.maxNewTokens < 0)
      throw new RangeError(`maxNewTokens is ${request.maxNewTokens}; it must be a whole number of at least 0`);
    const { topLogprobs = 0 } = request;
    if (!Number.isInteger(topLogprobs) || topLogprobs < 0 || topLogprobs > this.model.vocabSize)
      throw new RangeError(`topLogprobs is ${topLogprobs}; it must be a whole number from 0 to the vocabulary's ${this.model.vocabSize}`);
    return this.#enter(request);
  }

  #enter(request: Request): AsyncGenerator<GeneratedToken, void, undefined> {
    const sequence = new Sequence(request, this.model.cacheKey(request), this.#adapterOf(request));
    if (request.maxNewTokens === 0) sequence.fail(null);
    else {
      this.#scheduler.add(sequence);
      void this.#serve();
    }
    return sequence.read();
  }

  /**
   * A classifier's logits, [classes], from the last token's hidden state. Concurrent requests share steps and prefixes like prompts do. Rejects
   * with RangeError as `submit` throws it, and for a model that is no classifier.
   */
  async classify(request: Omit<Request, "sampling" | "maxNewTokens">): Promise<Float32Array> {
    if (this.model.classes === null) throw new RangeError("the model is no classifier: it predicts tokens and has no head 'score'");
    this.check(request);
    for await (const { scores } of this.#enter({ ...request, sampling: GREEDY, maxNewTokens: 1 })) if (scores) return scores;
    throw request.signal?.aborted ? request.signal.reason : new Error("internal: a text was not classified");
  }

  /**
   * Runs `tokens` through the model and returns what is wanted for every position: logits by default, hidden states, routing.
   * Waits for room in the cache. Rejects with the signal's reason between two steps once it is aborted.
   */
  async inspect(tokens: readonly number[], want: Wanted = {}, watch: Watch = {}): Promise<Inspection> {
    return this.#whole(tokens, watch, (task) => inspect(this.#steps, this.model, task, want));
  }

  /** The mean over all positions of the hidden state after the final norm, [hidden]: an embedding of the text. Ends early as `inspect` does. */
  async embed(tokens: readonly number[], watch: Watch = {}): Promise<Float32Array> {
    return this.#whole(tokens, watch, (task) => meanHidden(this.#steps, this.model, task));
  }

  /** The adapters that requests can name, the bytes of memory that they take together, and how many of which rank there may be. */
  get adapters(): Pick<LoadedAdapters, "names" | "bytes" | "limits"> {
    return this.#adapters;
  }

  /**
   * Loads an adapter, also while requests run: they share steps with those of other adapters and of the base model. Requests that began
   * with another adapter of this name go on with that one. Rejects with RangeError for branches that do not fit the model, are not finite
   * or exceed a limit, or for lack of memory.
   */
  async loadAdapter(name: string, branches: Branches): Promise<void> {
    this.#adapters.check(name, branches);
    await this.#steps.between(async () => {
      if (this.#steps.disposed) throw new Error("the model has been disposed of");
      const used = (a: LoadedAdapter) => this.#inspecting.includes(a) || this.#scheduler.some((s) => s.adapter === a);
      const { room: before } = this.#adapters;
      try {
        await this.#adapters.add(name, branches, used);
      } finally {
        const { room } = this.#adapters;
        if (room && room !== before) this.#programs.adapt(room.model, room.states);
      }
    });
  }

  /** Takes away an adapter's name. Requests that use it go on. Throws RangeError if there is none. */
  deleteAdapter(name: string): void {
    this.#adapters.remove(name);
  }

  /** A loaded adapter's branches. Throws RangeError if there is none. */
  adapterBranches(name: string): Branches {
    return this.#adapters.branches(name);
  }

  /** Seconds by op over all steps so far, and its number of calls in the prepared programs; with `rows`, only for steps of about that many rows. */
  profile(rows?: number): ReadonlyMap<string, { readonly seconds: number; readonly calls: number }> {
    return this.#programs.profile(rows);
  }

  /** Resolves when no more weights will move. */
  get settled(): Promise<void> {
    return this.#weights.settled;
  }

  /** Where the weights are; `ownedBytes` are copies in another format than the file's. */
  placement(): Placement & { readonly ownedBytes: number } {
    return { ...this.#weights.placement(), ownedBytes: this.#weights.ownedBytes };
  }

  /** Bytes of memory behind the weights, by kind of page. */
  pages(): ReturnType<Weights["pages"]> {
    return this.#weights.pages();
  }

  /** Names of the weights that each op reads. Empty before the first step. */
  weightsByOp(): ReadonlyMap<string, ReadonlySet<string>> {
    return this.#programs.weightsByOp();
  }

  /** Ends all requests with an error and frees weights, cache and threads. */
  async dispose(): Promise<void> {
    if (!(await this.close())) return;
    this.#weights.dispose();
    this.#backend.dispose();
  }

  /** As `dispose`, but weights and backend stay, for those who share them. Returns whether it was open. */
  async close(): Promise<boolean> {
    if (this.#steps.disposed) return false;
    const ended = this.#steps.dispose();
    this.#scheduler.close(new Error("the model has been disposed of"));
    await ended;
    this.#programs.dispose();
    this.#adapters.dispose();
    return true;
  }

  async #serve(): Promise<void> {
    if (this.#running) return;
    this.#running = true;
    while (this.#scheduler.busy) {
      const batch = this.#next();
      if (batch.length === 0) {
        // No requests are left, or `inspect` holds the blocks that they wait for and needs the event loop to release them.
        this.#wakeReaders();
        await this.#steps.idle();
        await turn();
        continue;
      }
      try {
        const start = performance.now();
        const drawn = await this.#draw(batch);
        if (!drawn) continue;
        const report = this.#settle(drawn, (performance.now() - start) / 1000);
        this.onStep?.(report);
      } catch (error) {
        for (const { sequence } of batch) {
          sequence.fail(error);
          this.#scheduler.discard(sequence);
        }
      }
    }
    this.#wakeReaders();
    this.#running = false;
  }

  /** The next batch. If the scheduler throws, all requests end with its error; later ones start afresh. */
  #next(): BatchEntry[] {
    try {
      return this.#scheduler.next(this.#promptRows());
    } catch (error) {
      this.#scheduler.close(error);
      return [];
    }
  }

  /** The most prompt rows in a step while other sequences generate, estimated from recent steps. */
  #promptRows(): number {
    const fits = Math.floor(this.#promptMs / 1000 / this.#tally.secondsPerPromptRow);
    return Math.min(this.#maxRows, Math.max(LEAST_PROMPT_ROWS, Number.isFinite(fits) ? fits : this.#maxRows));
  }

  /** The same for `inspect` and `embed`, whose steps alternate with generation. */
  readonly #inspectedRows = (): number => (this.#scheduler.running > 0 ? this.#promptRows() : this.#maxRows);

  /** Computes one step. Null if every sequence ended while constraints were evaluated. */
  async #draw(batch: readonly BatchEntry[]): Promise<Drawn | null> {
    const constrained = batch.some((e) => e.samples && e.sequence.request.constraint);
    if (constrained || this.#steps.busy) this.#wakeReaders(); // the step will not start immediately
    const masks = constrained ? await Promise.all(batch.map((e) => (e.samples ? this.#mask(e.sequence) : null))) : null;
    const left = batch.filter((e) => !e.sequence.done);
    const masked = masks?.filter((_, i) => !batch[i].sequence.done) ?? null;
    if (left.length === 0) return null;
    const wake = () => this.#wakeReaders();
    return drawBatch(this.#steps, this.#programs, left, masked, this.#tally.wantsRouting, wake);
  }

  /** The tokens that a sequence's constraint allows next. If it throws, only its own request fails. */
  async #mask(sequence: Sequence): Promise<Int32Array | null> {
    try {
      const mask = (await sequence.request.constraint?.next()) ?? null;
      const { maskWords } = this.#programs;
      if (mask && mask.length !== maskWords)
        throw new RangeError(`the constraint's mask has ${mask.length} words; ${this.model.vocabSize} tokens take ${maskWords}`);
      return mask;
    } catch (error) {
      sequence.fail(error);
      return null;
    }
  }

  #settle({ entries, tokens, rows, experts }: Drawn, seconds: number): StepReport {
    if (experts) this.#tally.route(experts);
    let [next, promptTokens, cachedTokens, generatedTokens] = [0, 0, 0, 0];
    for (const { sequence, count, samples } of entries) {
      const reading = Math.max(0, Math.min(sequence.promptCount - sequence.cached, count));
      promptTokens += reading;
      const first = samples && sequence.tokens.length === sequence.promptCount;
      this.#scheduler.settle(sequence, count);
      if (reading > 0) sequence.request.onPrompt?.(Math.min(sequence.cached, sequence.promptCount), sequence.reused ?? 0);
      if (!samples) continue;
      const token = tokens[next++];
      if (first) cachedTokens += sequence.reused ?? 0;
      if (sequence.done) continue; // its reader left meanwhile
      try {
        if (token.id === NOT_FINITE || token.scores?.some((x) => !Number.isFinite(x))) throw notFinite();
        if (token.id < 0) throw new Error("no token is left to choose: the request's bias, n-grams and constraint rule all of them out");
        sequence.request.constraint?.accept(token.id);
      } catch (error) {
        sequence.fail(error);
        if (token.id === NOT_FINITE || token.scores)
          this.#scheduler.discard(sequence); // so are its keys and values
        else this.#scheduler.remove(sequence);
        continue;
      }
      const stops = sequence.request.stopIds?.includes(token.id);
      const answered = sequence.tokens.length + 1 - sequence.promptCount;
      const full = answered >= sequence.request.maxNewTokens || sequence.tokens.length + 1 >= this.#longest;
      sequence.append({
        ...token,
        ...(first ? { cachedTokens: sequence.reused ?? 0 } : {}),
        ...(stops ? { finish: "stop" } : full ? { finish: "length" } : {}),
      });
      generatedTokens++;
      this.#unread.push(sequence);
      if (sequence.done) this.#scheduler.remove(sequence);
    }
    const report = { seconds, rows, sequences: entries.length, promptTokens, cachedTokens, generatedTokens };
    this.#tally.add(report);
    return report;
  }

  /**
   * Wakes readers of new tokens once the next step is running, so that their work does not delay it; in small groups, so that
   * hundreds of them do not block the event loop.
   */
  #wakeReaders(): void {
    const unread = this.#unread;
    this.#unread = [];
    const wake = (from: number): void => {
      for (const sequence of unread.slice(from, from + READERS_AT_ONCE)) sequence.wake();
      if (from + READERS_AT_ONCE < unread.length) setImmediate(() => wake(from + READERS_AT_ONCE));
    };
    wake(0);
  }

  /** The most tokens that one sequence can have. */
  get #longest(): number {
    return Math.min(this.model.maxPositions, this.#blocks.count * BLOCK_TOKENS);
  }

  /** Calls `use` with pages for `tokens`, once enough are free. */
  async #withPages<T>(tokens: number, use: (pages: readonly number[]) => Promise<T>): Promise<T> {
    const reserved = this.#scheduler.reserve(tokens);
    if (!Array.isArray(reserved)) void this.#serve(); // the loop lends blocks between its steps
    const pages = Array.isArray(reserved) ? reserved : await reserved;
    try {
      return await use(pages);
    } finally {
      this.#scheduler.giveBack(pages);
    }
  }

  #adapterOf({ adapter }: { readonly adapter?: string }): LoadedAdapter | null {
    return adapter === undefined ? null : this.#adapters.find(adapter);
  }

  /** Computes one text outside of the schedule. */
  async #whole<T>(tokens: readonly number[], watch: Watch, compute: (task: Task) => Promise<T>): Promise<T> {
    this.check({ tokens });
    const adapter = this.#adapterOf(watch);
    if (adapter) this.#inspecting.push(adapter);
    try {
      return await this.#withPages(tokens.length, (pages) =>
        compute({ tokens, pages, rows: this.#inspectedRows, watch, ...(adapter ? { adapter: adapter.slot } : {}) }),
      );
    } finally {
      if (adapter) this.#inspecting.splice(this.#inspecting.indexOf(adapter), 1);
    }
  }

  /** Throws a RangeError for a prompt that cannot be computed: an empty one, ids outside the vocabulary, one that is too long. */
  check(content: Content): void {
    if (this.#steps.disposed) throw new Error("the model has been disposed of");
    const { vocabSize, maxPositions, positionAxes, hiddenSize } = this.model;
    const { tokens } = content;
    if (tokens.length === 0) throw new RangeError("the prompt is empty: at least one token is needed");
    const wrong = tokens.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize);
    if (wrong !== undefined) throw new RangeError(`token id ${wrong} is outside the vocabulary of ${vocabSize}`);
    checkContent(content, positionAxes, hiddenSize);
    if (tokens.length > maxPositions)
      throw new RangeError(`the prompt has ${tokens.length} tokens; the model's longest position is ${maxPositions}`);
    if (tokens.length > this.#longest) {
      const gib = (n: number) => ((n * this.kvBytesPerToken) / 2 ** 30).toFixed(2);
      throw new RangeError(
        `the prompt has ${tokens.length} tokens and needs ${gib(tokens.length)} GiB of KV cache; the cache holds ${this.#longest} tokens (${gib(this.#longest)} GiB)`,
      );
    }
  }
}

/** Bytes of KV cache per token. */
export function kvBytesPerToken({ layers, cache: { heads, width } }: Pick<Model, "layers" | "cache">, dtype: KvDtype): number {
  return 2 * layers * bytesOf({ dtype, shape: [1, 1, heads, width] }, {});
}
