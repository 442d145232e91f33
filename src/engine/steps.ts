/** Runs the model's steps, one at a time, and lays out each step's tokens. Knows no requests and no schedule. */
import type { Numbers } from "../backend/backend.ts";
import type { EmbeddedSpan } from "../model/content.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { Programs } from "./programs.ts";
import type { Controls } from "./sampling.ts";

/** The tokens of one sequence in a step. */
export interface Part {
  readonly ids: readonly number[];
  /** Index of the first one in its sequence: how many tokens precede it in the cache. */
  readonly start: number;
  readonly pages: readonly number[];
  /** Position of a token on an axis. Default: its index. */
  readonly position?: (index: number, axis: number) => number;
  /** Embeddings that replace those of the ids; `at` counts from the sequence's first token. */
  readonly embeddings?: readonly EmbeddedSpan[];
  /** The adapter's place in the stack. Default: no adapter. */
  readonly adapter?: number;
}

const NOTHING = { floats: new Float32Array(), ints: new Int32Array() };

export class Steps {
  readonly #programs: Programs;
  #disposed = false;
  /** Steps requested and not finished. */
  #pending = 0;
  /** Settles when the last requested step has finished. */
  #last: Promise<unknown> = Promise.resolve();

  constructor(programs: Programs) {
    this.#programs = programs;
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  get busy(): boolean {
    return this.#pending > 0;
  }

  /** Resolves when the last requested step has finished, even if it failed. */
  async idle(): Promise<void> {
    await this.#last.catch(() => {}); // its caller gets the error
  }

  /**
   * Runs one step after all earlier ones have finished.
   * @param picked rows whose logits are wanted, counted over all parts
   * @param controls for sampling, one row per picked row; null where nothing is sampled
   * @param outputs arrays to fill, by the names in `OUTPUTS`; only those are computed
   * @param top how many of the likeliest tokens to return
   * @param started called once native code is running and the event loop is free
   */
  run(
    parts: readonly Part[],
    picked: Int32Array,
    controls: Controls | null,
    outputs: Readonly<Record<string, Numbers>>,
    top = 0,
    started?: () => void,
  ): Promise<void> {
    const { sizes, inputs } = layOutParts(parts, picked, this.#programs);
    const all: SymbolValues = {
      ...sizes,
      outs: picked.length,
      top,
      history: controls?.history.length ?? 0,
      biases: controls?.biasIds.length ?? 0,
      masks: (controls?.masks.length ?? 0) / this.#programs.maskWords,
    };
    const begin = () => {
      if (this.#disposed) throw new Error("the model has been disposed of");
      const running = this.#programs
        .for(all["rows"], picked.length, sizes.adapted > 0)
        .run(all, { ...inputs, picked, ...controls }, outputs);
      started?.();
      return running;
    };
    return this.between(begin);
  }

  /** Calls `work` when all earlier steps have finished, and holds back later ones until it settles. */
  between<T>(work: () => T | Promise<T>): Promise<T> {
    this.#pending++;
    const run = this.#last
      .catch(() => {}) // the caller of that step handles its failure
      .then(work)
      .finally(() => {
        this.#pending--;
      });
    this.#last = run;
    return run;
  }

  /** Refuses further steps, and waits for the one that runs. */
  async dispose(): Promise<void> {
    this.#disposed = true;
    await this.idle();
  }
}

function layOutParts(parts: readonly Part[], picked: Int32Array, { model }: Programs) {
  const axes = model.positionAxes;
  const spans = parts.flatMap((p) => p.embeddings ?? []);
  const embedded = spans.reduce((n, s) => n + s.count, 0);
  const rows = parts.reduce((n, p) => n + p.ids.length, 0);
  const pages = Math.max(...parts.map((p) => p.pages.length));
  const adapted = parts.reduce((n, p) => n + (p.adapter === undefined ? 0 : p.ids.length), 0);
  const context = parts.reduce((n, p) => n + p.start + p.ids.length, 0);
  const outs = adapted > 0 ? adaptedOuts(parts, picked) : { rows: NOTHING.ints, ids: NOTHING.ints };
  const sizes = { rows, sequences: parts.length, pages, context, embedded, adapted, adaptedOuts: outs.rows.length };
  const inputs = {
    ids: new Int32Array(rows),
    positions: new Int32Array(axes * rows),
    segments: new Int32Array(parts.length * 3),
    pages: new Int32Array(parts.length * pages).fill(-1),
    embeddings: embedded > 0 ? new Float32Array(embedded * model.hiddenSize) : NOTHING.floats,
    embeddedRows: embedded > 0 ? new Int32Array(embedded) : NOTHING.ints,
    ...(adapted > 0
      ? {
          ...{ adaptedRows: new Int32Array(adapted), adapterIds: new Int32Array(adapted), adaptedTokens: new Int32Array(adapted) },
          ...{ adaptedPicked: outs.rows, pickedAdapters: outs.ids },
        }
      : {}),
  };
  let [row, filled, branched] = [0, 0, 0];
  parts.forEach((p, s) => {
    inputs.ids.set(p.ids, row);
    inputs.segments.set([row, p.ids.length, p.start], s * 3);
    inputs.pages.set(p.pages, s * pages);
    for (let axis = 0; axis < axes; axis++)
      for (let i = 0; i < p.ids.length; i++)
        inputs.positions[axis * rows + row + i] = p.position ? p.position(p.start + i, axis) : p.start + i;
    for (const { at, count, values } of p.embeddings ?? []) {
      inputs.embeddings.set(values, filled * model.hiddenSize);
      for (let i = 0; i < count; i++) inputs.embeddedRows[filled++] = row + at - p.start + i;
    }
    if (p.adapter !== undefined) {
      inputs.adapterIds?.fill(p.adapter, branched, branched + p.ids.length);
      for (let i = 0; i < p.ids.length; i++) {
        (inputs.adaptedTokens as Int32Array)[branched] = p.adapter * model.vocabSize + p.ids[i];
        (inputs.adaptedRows as Int32Array)[branched++] = row + i;
      }
    }
    row += p.ids.length;
  });
  return { sizes, inputs };
}

/** Which of the picked rows have an adapter, counted among the picked ones, and the adapter of each. */
function adaptedOuts(parts: readonly Part[], picked: Int32Array): { readonly rows: Int32Array; readonly ids: Int32Array } {
  const [rows, ids]: [number[], number[]] = [[], []];
  const ends: number[] = [];
  for (const { ids: own } of parts) ends.push((ends[ends.length - 1] ?? 0) + own.length);
  let part = 0;
  picked.forEach((row, i) => {
    if (part > 0 && row < ends[part - 1]) part = 0; // picked rows usually ascend
    while (row >= ends[part]) part++;
    const { adapter } = parts[part];
    if (adapter === undefined) return;
    rows.push(i);
    ids.push(adapter);
  });
  return { rows: Int32Array.from(rows), ids: Int32Array.from(ids) };
}
