/**
 * Serves token sequences: ids in, ids out. Its loop is the definition of serving: who is next, one step of the model,
 * what came of it. Knows no text.
 */
import { freemem } from "node:os";
import { setImmediate } from "node:timers/promises";
import type { Backend, Numbers, Weights } from "../backend/backend.ts";
import { kvShapes } from "../graph/graph.ts";
import { bytesOf } from "../graph/plan.ts";
import type { ErnieConfig } from "../model/config.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import { isBlockDtype } from "../tensor/quantized.ts";
import { BLOCK_TOKENS, Blocks } from "./blocks.ts";
import { type Inspection, inspect, meanHidden, type Wanted } from "./inspection.ts";
import { Programs } from "./programs.ts";
import { checkSampling, layOut, likeliest } from "./sampling.ts";
import { type BatchEntry, Scheduler } from "./scheduler.ts";
import { type GeneratedToken, type Request, Sequence } from "./sequence.ts";
import { type EngineStats, type StepReport, Tally } from "./stats.ts";
import { Steps } from "./steps.ts";

export type { Inspection, RoutedLayer } from "./inspection.ts";
export type { EngineStats, StepReport } from "./stats.ts";

export interface EngineOptions {
  readonly config: ErnieConfig;
  readonly backend: Backend;
  readonly weights: Weights;
  /** The format that each parameter was loaded in. */
  readonly dtypeOf: (parameter: string) => Dtype;
  /** Format of the KV cache. Default: f32 where the embeddings are f32, int8kv where they are int8, else f16. */
  readonly kvDtype?: KvDtype;
  /** Tokens that the KV cache has room for, of all sequences together. Default: 16 full sequences, or as many as fit half of the memory that the weights leave. */
  readonly kvTokens?: number;
  /** Rows of one step at most; longer prompts are computed in pieces. Default 512. */
  readonly maxRows?: number;
  /** Sequences that are computed at the same time; others wait. Default 512. */
  readonly maxSequences?: number;
  /** Milliseconds that prompts may add to a step while others wait for their next token. Default 200. */
  readonly promptMs?: number;
  /** Keep what full blocks hold, for requests that begin alike. Default true. */
  readonly prefixCache?: boolean;
}

/** However slow the machine: fewer rows of prompts in a step would hardly save time. */
const LEAST_PROMPT_ROWS = 16;

export class Engine {
  readonly config: ErnieConfig;
  readonly kvDtype: KvDtype;
  /** Bytes of KV cache that one token takes. */
  readonly kvBytesPerToken: number;
  /** Told of every step that has ended. For metrics; it must not throw. */
  onStep: ((report: StepReport) => void) | null = null;
  readonly #backend: Backend;
  readonly #weights: Weights;
  readonly #programs: Programs;
  readonly #steps: Steps;
  readonly #blocks: Blocks;
  readonly #scheduler: Scheduler;
  readonly #maxRows: number;
  readonly #promptMs: number;
  readonly #tally: Tally;
  #running = false;

  constructor(options: EngineOptions) {
    const { config, backend, weights, dtypeOf, maxRows = 512, maxSequences = 512, promptMs = 200, prefixCache = true } = options;
    for (const [name, value] of Object.entries({ maxRows, maxSequences }))
      if (!Number.isInteger(value) || value < 1) throw new RangeError(`${name} is ${value}; it must be a whole number of at least 1`);
    const embedded = dtypeOf("model.embed_tokens.weight");
    const kvDtype = options.kvDtype ?? (embedded === "f32" ? "f32" : isBlockDtype(embedded) ? "int8kv" : "f16");
    this.config = config;
    this.kvDtype = kvDtype;
    this.kvBytesPerToken = kvBytesPerToken(config, kvDtype);
    const available = freemem(); // what files in the page cache take counts as free, the weights' too
    const left = Math.max(available - weights.mappedBytes, available / 16); // a model larger than memory runs from disk
    const fits = Math.floor(left / 2 / this.kvBytesPerToken);
    const kvTokens = options.kvTokens ?? Math.min(16 * config.maxPositions, Math.max(fits, BLOCK_TOKENS));
    this.#backend = backend;
    this.#weights = weights;
    this.#maxRows = maxRows;
    this.#promptMs = promptMs;
    this.#blocks = new Blocks(Math.ceil(kvTokens / BLOCK_TOKENS));
    this.#scheduler = new Scheduler(this.#blocks, { maxRows, maxSequences, prefixCache });
    this.#programs = new Programs(config, dtypeOf, backend, weights, { dtype: kvDtype, blocks: this.#blocks.count });
    this.#steps = new Steps(this.#programs);
    this.#tally = new Tally(this.#programs.mixtures.length, config.moe?.experts ?? 0);
  }

  /** Blocks of the cache that no sequence holds, and all of them. */
  get cache(): { free: number; count: number } {
    return { free: this.#blocks.free, count: this.#blocks.count };
  }

  /** What is going on, and what has been done since the start. */
  stats(): EngineStats {
    const { count, free, idle } = this.#blocks;
    const { running, waiting, preemptions } = this.#scheduler;
    return { running, waiting, blocks: { count, free, remembered: idle }, preemptions, ...this.#tally.totals() };
  }

  /**
   * Generates from a prompt; many at once share the steps. Throws at once on an empty prompt, ids outside the vocabulary, a
   * prompt beyond the longest position or the cache, or impossible controls. Leaving the loop, or the signal, cancels it.
   */
  submit(request: Request): AsyncGenerator<GeneratedToken, void, undefined> {
    this.#check(request.tokens);
    checkSampling(request.sampling, this.config.vocabSize);
    if (!Number.isInteger(request.maxNewTokens) || request.maxNewTokens < 0)
      throw new RangeError(`maxNewTokens is ${request.maxNewTokens}; it must be a whole number of at least 0`);
    const sequence = new Sequence(request);
    if (request.maxNewTokens === 0) sequence.fail(null);
    else {
      this.#scheduler.add(sequence);
      void this.#serve();
    }
    return sequence.read();
  }

  /**
   * Runs `tokens` through the model and hands over what is wanted of every position: logits unless told otherwise, hidden
   * states, routing. Waits for room in the cache.
   */
  async inspect(tokens: readonly number[], want: Wanted = {}): Promise<Inspection> {
    this.#check(tokens);
    return this.#withPages(tokens.length, (pages) => inspect(this.#steps, this.#programs, tokens, pages, this.#maxRows, want));
  }

  /** The mean over all positions of the hidden state after the final norm, [hidden]: an embedding of the text. */
  async embed(tokens: readonly number[]): Promise<Float32Array> {
    this.#check(tokens);
    return this.#withPages(tokens.length, (pages) => meanHidden(this.#steps, this.config, tokens, pages, this.#maxRows));
  }

  /** Seconds by op of all steps so far, and how many calls of it the traced programs have; with `rows`, of steps of about so many rows alone. */
  profile(rows?: number): ReadonlyMap<string, { readonly seconds: number; readonly calls: number }> {
    return this.#programs.profile(rows);
  }

  /** Names of the weights that each op reads. Empty before the first step. */
  weightsByOp(): ReadonlyMap<string, ReadonlySet<string>> {
    return this.#programs.weightsByOp();
  }

  /** Ends all requests with an error and frees weights, cache and threads. */
  async dispose(): Promise<void> {
    if (this.#steps.disposed) return;
    await this.#steps.dispose();
    this.#programs.dispose();
    this.#weights.dispose();
    this.#backend.dispose();
  }

  async #serve(): Promise<void> {
    if (this.#running) return;
    this.#running = true;
    while (this.#scheduler.busy) {
      const batch = this.#scheduler.next(this.#promptRows());
      if (batch.length === 0) {
        // Nobody is left, or `inspect` holds the blocks that the others wait for, and needs the event loop to give them back.
        await this.#steps.idle();
        await setImmediate();
        continue;
      }
      try {
        const start = performance.now();
        const { tokens, rows } = await this.#generate(batch);
        const report = this.#settle(batch, tokens, rows, (performance.now() - start) / 1000);
        this.onStep?.(report);
      } catch (error) {
        for (const { sequence } of batch) {
          sequence.fail(error);
          this.#scheduler.remove(sequence);
        }
      }
    }
    this.#running = false;
  }

  /** Rows of prompts that a step may add while others generate, by how long a row took lately. */
  #promptRows(): number {
    const fits = Math.floor(this.#promptMs / 1000 / this.#tally.secondsPerPromptRow);
    return Math.min(this.#maxRows, Math.max(LEAST_PROMPT_ROWS, Number.isFinite(fits) ? fits : this.#maxRows));
  }

  async #generate(batch: readonly BatchEntry[]): Promise<{ tokens: GeneratedToken[]; rows: number }> {
    const sampled = batch.filter((e) => e.samples).map((e) => e.sequence);
    const wantLogits = sampled.some((s) => (s.request.topLogprobs ?? 0) > 0);
    const wantRouting = sampled.some((s) => s.request.wantRouting) || this.#tally.wantsRouting;
    const { vocabSize, moe } = this.config;
    let rows = 0;
    const picked = Int32Array.from(
      batch.flatMap((e) => {
        rows += e.count;
        return e.samples ? [rows - 1] : [];
      }),
    );
    const ids = new Int32Array(sampled.length);
    const logprobs = new Float32Array(sampled.length);
    const outputs: Numbers[] = [ids, logprobs];
    const logits = new Float32Array(wantLogits ? sampled.length * vocabSize : 0);
    if (wantLogits) outputs.push(logits);
    const chosen = moe?.chosen ?? 0;
    const routed = (wantRouting ? this.#programs.mixtures : []).map(() => {
      const layer = { experts: new Int32Array(rows * chosen), weights: new Float32Array(rows * chosen) };
      outputs.push(layer.experts, layer.weights);
      return layer;
    });
    const constrained = sampled.some((s) => s.request.constraint);
    const masks = constrained ? await Promise.all(sampled.map(maskOf)) : [];
    const controls = layOut(
      sampled.map((s, i) => ({ sampling: s.request.sampling, tokens: s.tokens, promptCount: s.promptCount, mask: masks[i] })),
    );
    await this.#steps.run(
      `sample${wantLogits ? "+logits" : ""}${wantRouting ? "+routing" : ""}`,
      batch.map(({ sequence: s, count }) => ({ ids: s.tokens.slice(s.cached, s.cached + count), start: s.cached, pages: s.pages })),
      picked,
      [controls.floats, controls.ints, controls.history, controls.biasIds, controls.biasValues, controls.masks],
      outputs,
    );
    if (wantRouting) this.#tally.route(routed.map((layer) => layer.experts));
    const tokens = sampled.map((s, i): GeneratedToken => {
      const at = picked[i] * chosen;
      const row = <T extends Numbers>(of: (layer: (typeof routed)[number]) => T, out: T): T => {
        routed.forEach((layer, l) => {
          out.set(of(layer).subarray(at, at + chosen), l * chosen);
        });
        return out;
      };
      return {
        id: ids[i],
        logprob: logprobs[i],
        // Only they are kept: a reader that lags would hold whole logits by the hundred.
        ...(s.request.topLogprobs ? { top: likeliest(logits.subarray(i * vocabSize, (i + 1) * vocabSize), s.request.topLogprobs) } : {}),
        ...(s.request.wantRouting
          ? {
              routing: {
                experts: row((layer) => layer.experts, new Int32Array(routed.length * chosen)),
                weights: row((layer) => layer.weights, new Float32Array(routed.length * chosen)),
              },
            }
          : {}),
      };
    });
    return { tokens, rows };
  }

  #settle(batch: readonly BatchEntry[], tokens: readonly GeneratedToken[], rows: number, seconds: number): StepReport {
    let [next, promptTokens, cachedTokens] = [0, 0, 0];
    for (const { sequence, count, samples } of batch) {
      const reading = Math.max(0, Math.min(sequence.promptCount - sequence.cached, count));
      promptTokens += reading;
      const first = samples && sequence.tokens.length === sequence.promptCount;
      this.#scheduler.settle(sequence, count);
      if (!samples) continue;
      const token = tokens[next++];
      if (first) cachedTokens += sequence.reused ?? 0;
      if (sequence.done) continue; // its reader left meanwhile
      try {
        sequence.request.constraint?.accept(token.id);
      } catch (error) {
        sequence.fail(error); // it alone
        this.#scheduler.remove(sequence);
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
      if (sequence.done) this.#scheduler.remove(sequence);
    }
    const report = { seconds, rows, sequences: batch.length, promptTokens, cachedTokens, generatedTokens: tokens.length };
    this.#tally.add(report);
    return report;
  }

  /** Positions that one sequence can have. */
  get #longest(): number {
    return Math.min(this.config.maxPositions, this.#blocks.count * BLOCK_TOKENS);
  }

  /** Lends pages for `tokens`, once there are enough. */
  async #withPages<T>(tokens: number, use: (pages: readonly number[]) => Promise<T>): Promise<T> {
    const pages: number[] = [];
    while (!this.#blocks.cover(pages, tokens)) {
      await this.#steps.idle();
      await setImmediate(); // requests that have ended give their blocks back
      if (this.#steps.disposed) throw new Error("the model has been disposed of");
    }
    try {
      return await use(pages);
    } finally {
      this.#blocks.release(pages);
    }
  }

  #check(tokens: readonly number[]): void {
    if (this.#steps.disposed) throw new Error("the model has been disposed of");
    const { vocabSize, maxPositions } = this.config;
    if (tokens.length === 0) throw new RangeError("the prompt is empty: at least one token is needed");
    const wrong = tokens.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize);
    if (wrong !== undefined) throw new RangeError(`token id ${wrong} is outside the vocabulary of ${vocabSize}`);
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

/** What a sequence's constraint allows next; one that fails ends its own request and nobody else's. */
async function maskOf(sequence: Sequence): Promise<Int32Array | null> {
  try {
    return (await sequence.request.constraint?.next()) ?? null;
  } catch (error) {
    sequence.fail(error);
    return null;
  }
}

/** Bytes of KV cache that one token takes. */
export function kvBytesPerToken({ layers, kvHeads, headDim }: ErnieConfig, dtype: KvDtype): number {
  const { keys, values } = kvShapes(dtype, 1, kvHeads, headDim, BLOCK_TOKENS);
  return (layers * (bytesOf({ dtype, shape: keys }, {}) + bytesOf({ dtype, shape: values }, {}))) / BLOCK_TOKENS;
}
