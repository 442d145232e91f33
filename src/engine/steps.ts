/** Runs steps of the model, one at a time: lays out which tokens stand where. Knows no requests and no schedule. */
import type { Numbers } from "../backend/backend.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { Programs, Purpose } from "./programs.ts";

/** The tokens of one sequence in a step. */
export interface Part {
  readonly ids: readonly number[];
  /** Position of the first. */
  readonly start: number;
  readonly pages: readonly number[];
}

export class Steps {
  readonly #programs: Programs;
  #disposed = false;
  /** Steps that were asked for and have not ended. */
  #pending = 0;
  /** Settles when the last step that was asked for has ended. */
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

  /** Settles, without an error, when the step that was asked for last has ended. */
  async idle(): Promise<void> {
    await this.#last.catch(() => {}); // its caller hears of a failure
  }

  /**
   * Runs one step once those before it have ended. Controls and outputs are in the order in which `programs.ts` declares them.
   * @param picked rows of all parts together whose logits are wanted
   * @param started called once native code is at work, and the event loop has time for others
   */
  run(
    purpose: Purpose,
    parts: readonly Part[],
    picked: Int32Array,
    controls: readonly Numbers[],
    outputs: readonly Numbers[],
    started?: () => void,
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
    const [, , history, biases, , masks] = controls;
    const sizes: SymbolValues = {
      rows,
      outs: picked.length,
      sequences: parts.length,
      pages: widest,
      history: history?.length ?? 0,
      biases: biases?.length ?? 0,
      masks: (masks?.length ?? 0) / this.#programs.maskWords,
    };
    const begin = () => {
      if (this.#disposed) throw new Error("the model has been disposed of");
      const inputs = [ids, positions, segments, pages, picked, ...controls];
      const running = this.#programs.for(purpose, rows).program.run(sizes, inputs, outputs);
      started?.();
      return running;
    };
    this.#pending++;
    const run = this.#last
      .catch(() => {}) // whoever ran that step hears of its failure
      .then(begin)
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
