/**
 * Serves token sequences: ids in, ids out. Its loop is the definition of serving: who is next, one step of the model,
 * what came of it. Knows no text.
 */
import { freemem } from "node:os";
import { setImmediate } from "node:timers/promises";
import type { Backend, Numbers, Weights } from "../backend/backend.ts";
import { kvShapes } from "../graph/graph.ts";
import { bytesOf } from "../graph/plan.ts";
import { type ErnieConfig, isMoeLayer } from "../model/config.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import { isBlockDtype } from "../tensor/quantized.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import { BLOCK_TOKENS, Blocks } from "./blocks.ts";
import { Programs, type Purpose } from "./programs.ts";
import { checkSampling, layOut } from "./sampling.ts";
import { type BatchEntry, Scheduler } from "./scheduler.ts";
import { type GeneratedToken, type Request, Sequence } from "./sequence.ts";

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
}

/** Everything a model computes on the way from tokens to logits. */
export interface Inspection {
  /** [tokens, vocab] */
  readonly logits: Float32Array;
  /** [tokens, hidden] before each layer, then after the final norm. Empty unless asked for. */
  readonly hiddenStates: readonly Float32Array[];
  /** Of each mixture layer. Empty unless asked for. */
  readonly routing: readonly RoutedLayer[];
}

export interface RoutedLayer {
  readonly layer: number;
  /** [tokens, experts] */
  readonly logits: Float32Array;
  /** [tokens, chosen], best first */
  readonly experts: Int32Array;
  /** [tokens, chosen] */
  readonly weights: Float32Array;
}

export class Engine {
  readonly config: ErnieConfig;
  readonly kvDtype: KvDtype;
  /** Bytes of KV cache that one token takes. */
  readonly kvBytesPerToken: number;
  readonly #backend: Backend;
  readonly #weights: Weights;
  readonly #programs: Programs;
  readonly #blocks: Blocks;
  readonly #scheduler: Scheduler;
  readonly #maxRows: number;
  #running = false;
  #disposed = false;
  /** Settles when the last step that was asked for has ended: steps run one at a time. */
  #last: Promise<unknown> = Promise.resolve();

  constructor(options: EngineOptions) {
    const { config, backend, weights, dtypeOf, maxRows = 512 } = options;
    if (!Number.isInteger(maxRows) || maxRows < 1) throw new RangeError(`maxRows is ${maxRows}; it must be a whole number of at least 1`);
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
    this.#blocks = new Blocks(Math.ceil(kvTokens / BLOCK_TOKENS));
    this.#scheduler = new Scheduler(this.#blocks, maxRows);
    this.#programs = new Programs(config, dtypeOf, backend, weights, { dtype: kvDtype, blocks: this.#blocks.count });
  }

  /** Blocks of the cache that no sequence holds, and all of them. */
  get cache(): { free: number; count: number } {
    return { free: this.#blocks.free, count: this.#blocks.count };
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

  /** Runs `tokens` through the model and hands over logits, and on request hidden states and routing, of every position. */
  async inspect(tokens: readonly number[], want: { hiddenStates?: boolean; routing?: boolean } = {}): Promise<Inspection> {
    this.#check(tokens);
    const { config } = this;
    const purpose: Purpose = want.hiddenStates || want.routing ? "inspect" : "logits";
    const pages: number[] = [];
    if (!this.#blocks.cover(pages, tokens.length))
      throw new Error(
        `the KV cache is taken by running requests: ${this.#blocks.free} blocks of ${BLOCK_TOKENS} tokens are free, ${tokens.length} tokens were given; try again when they have ended`,
      );
    const n = tokens.length;
    const moeLayers = Array.from({ length: config.layers }, (_, i) => i).filter((i) => isMoeLayer(config, i));
    const [experts, chosen] = [config.moe?.experts ?? 0, config.moe?.chosen ?? 0];
    const logits = new Float32Array(n * config.vocabSize);
    const inspects = purpose === "inspect";
    const hiddenStates = inspects ? Array.from({ length: config.layers + 1 }, () => new Float32Array(n * config.hiddenSize)) : [];
    const routing = (inspects ? moeLayers : []).map((layer) => ({
      layer,
      logits: new Float32Array(n * experts),
      experts: new Int32Array(n * chosen),
      weights: new Float32Array(n * chosen),
    }));
    try {
      for (let from = 0; from < n; from += this.#maxRows) {
        const to = Math.min(n, from + this.#maxRows);
        const part = <T extends Numbers>(all: T, width: number) => all.subarray(from * width, to * width) as T;
        const outputs: Numbers[] = [part(logits, config.vocabSize), ...hiddenStates.map((h) => part(h, config.hiddenSize))];
        for (const r of routing) outputs.push(part(r.logits, experts), part(r.experts, chosen), part(r.weights, chosen));
        const picked = Int32Array.from({ length: to - from }, (_, i) => i);
        await this.#step(purpose, [{ ids: tokens.slice(from, to), start: from, pages }], picked, [], outputs);
      }
    } finally {
      this.#blocks.release(pages);
    }
    return { logits, hiddenStates: want.hiddenStates ? hiddenStates : [], routing: want.routing ? routing : [] };
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
    if (this.#disposed) return;
    this.#disposed = true;
    await this.#last.catch(() => {}); // its caller hears of a failure
    this.#programs.dispose();
    this.#weights.dispose();
    this.#backend.dispose();
  }

  async #serve(): Promise<void> {
    if (this.#running) return;
    this.#running = true;
    while (this.#scheduler.busy) {
      const batch = this.#scheduler.next();
      if (batch.length === 0) {
        // Nobody is left, or `inspect` holds the blocks that the others wait for, and needs the event loop to give them back.
        await this.#last.catch(() => {});
        await setImmediate();
        continue;
      }
      try {
        this.#settle(batch, await this.#generate(batch));
      } catch (error) {
        for (const { sequence } of batch) {
          sequence.fail(error);
          this.#scheduler.remove(sequence);
        }
      }
    }
    this.#running = false;
  }

  async #generate(batch: readonly BatchEntry[]): Promise<GeneratedToken[]> {
    const sampled = batch.filter((e) => e.samples).map((e) => e.sequence);
    const wantLogits = sampled.some((s) => s.request.wantLogits);
    const { vocabSize } = this.config;
    const ids = new Int32Array(sampled.length);
    const logprobs = new Float32Array(sampled.length);
    const logits = new Float32Array(wantLogits ? sampled.length * vocabSize : 0);
    let row = -1;
    const picked = Int32Array.from(
      batch.flatMap((e) => {
        row += e.count;
        return e.samples ? [row] : [];
      }),
    );
    const controls = layOut(sampled.map((s) => ({ sampling: s.request.sampling, tokens: s.tokens, promptCount: s.promptCount })));
    await this.#step(
      wantLogits ? "sample+logits" : "sample",
      batch.map(({ sequence: s, count }) => ({ ids: s.tokens.slice(s.cached, s.cached + count), start: s.cached, pages: s.pages })),
      picked,
      [controls.floats, controls.ints, controls.history, controls.biasIds, controls.biasValues],
      wantLogits ? [ids, logprobs, logits] : [ids, logprobs],
    );
    return sampled.map((s, i) => ({
      id: ids[i],
      logprob: logprobs[i],
      ...(s.request.wantLogits ? { logits: logits.slice(i * vocabSize, (i + 1) * vocabSize) } : {}),
    }));
  }

  #settle(batch: readonly BatchEntry[], tokens: readonly GeneratedToken[]): void {
    let next = 0;
    for (const { sequence, count, samples } of batch) {
      sequence.cached += count;
      if (!samples) continue;
      const token = tokens[next++];
      if (sequence.done) continue; // its reader left meanwhile
      const stops = sequence.request.stopIds?.includes(token.id);
      const answered = sequence.tokens.length + 1 - sequence.promptCount;
      const full = answered >= sequence.request.maxNewTokens || sequence.tokens.length + 1 >= this.#longest;
      sequence.append({ ...token, ...(stops ? { finish: "stop" } : full ? { finish: "length" } : {}) });
      if (sequence.done) this.#scheduler.remove(sequence);
    }
  }

  /** Positions that one sequence can have. */
  get #longest(): number {
    return Math.min(this.config.maxPositions, this.#blocks.count * BLOCK_TOKENS);
  }

  /** Runs one step once those before it have ended. Inputs are in the order in which `programs.ts` declares them. */
  #step(
    purpose: Purpose,
    parts: readonly Part[],
    picked: Int32Array,
    controls: readonly Numbers[],
    outputs: readonly Numbers[],
  ): Promise<void> {
    const rows = parts.reduce((n, p) => n + p.ids.length, 0);
    const widest = Math.max(...parts.map((p) => p.pages.length));
    const ids = new Int32Array(rows);
    const positions = new Int32Array(rows);
    const segments = new Int32Array(parts.length * 3);
    const pages = new Int32Array(parts.length * widest).fill(-1);
    let row = 0;
    parts.forEach((p, s) => {
      ids.set(p.ids, row);
      segments.set([row, p.ids.length, p.start], s * 3);
      pages.set(p.pages, s * widest);
      for (let i = 0; i < p.ids.length; i++) positions[row + i] = p.start + i;
      row += p.ids.length;
    });
    const [, , history, biases] = controls;
    const sizes: SymbolValues = {
      rows,
      outs: picked.length,
      sequences: parts.length,
      pages: widest,
      history: history?.length ?? 0,
      biases: biases?.length ?? 0,
    };
    const run = this.#last
      .catch(() => {}) // whoever ran that step hears of its failure
      .then(() => {
        if (this.#disposed) throw new Error("the model has been disposed of");
        return this.#programs.for(purpose, rows).program.run(sizes, [ids, positions, segments, pages, picked, ...controls], outputs);
      });
    this.#last = run;
    return run;
  }

  #check(tokens: readonly number[]): void {
    if (this.#disposed) throw new Error("the model has been disposed of");
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

/** Bytes of KV cache that one token takes. */
export function kvBytesPerToken({ layers, kvHeads, headDim }: ErnieConfig, dtype: KvDtype): number {
  const { keys, values } = kvShapes(dtype, 1, kvHeads, headDim, BLOCK_TOKENS);
  return (layers * (bytesOf({ dtype, shape: keys }, {}) + bytesOf({ dtype, shape: values }, {}))) / BLOCK_TOKENS;
}

/** The tokens of one sequence in a step. */
interface Part {
  readonly ids: readonly number[];
  /** Position of the first. */
  readonly start: number;
  readonly pages: readonly number[];
}
