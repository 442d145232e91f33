/** What an engine has done so far, counted step by step. Knows no requests. */

/** One step that has ended. */
export interface StepReport {
  readonly seconds: number;
  readonly rows: number;
  readonly sequences: number;
  /** Prompt tokens that were computed, and those of prompts read to their end that the prefix cache held. */
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly generatedTokens: number;
}

export interface EngineStats {
  readonly running: number;
  readonly waiting: number;
  /** `free` counts blocks that nobody holds; of those, `remembered` ones serve requests that begin alike. */
  readonly blocks: { readonly count: number; readonly free: number; readonly remembered: number };
  readonly preemptions: number;
  readonly steps: number;
  readonly seconds: number;
  readonly rows: number;
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly generatedTokens: number;
  /** How often each expert was chosen in the steps that were looked at: [mixture layers][experts]. */
  readonly expertLoad: readonly Float64Array[];
}

/** Every so many steps one is looked at for its routing. */
const ROUTING_EVERY = 16;
const SMOOTHING = 0.2;

export class Tally {
  readonly #load: readonly Float64Array[];
  #steps = 0;
  #sums: Pick<EngineStats, "seconds" | "rows" | "promptTokens" | "cachedTokens" | "generatedTokens"> = {
    seconds: 0,
    rows: 0,
    promptTokens: 0,
    cachedTokens: 0,
    generatedTokens: 0,
  };
  /** Seconds that a row of a prompt took in the latest steps that had many; 0 before the first. */
  secondsPerPromptRow = 0;

  constructor(mixtures: number, experts: number) {
    this.#load = Array.from({ length: mixtures }, () => new Float64Array(experts));
  }

  /** True when the next step should hand its routing over. */
  get wantsRouting(): boolean {
    return this.#load.length > 0 && this.#steps % ROUTING_EVERY === 0;
  }

  /** @param experts of each mixture layer, those that were chosen */
  route(experts: readonly Int32Array[]): void {
    experts.forEach((chosen, layer) => {
      const load = this.#load[layer];
      for (const e of chosen) load[e]++;
    });
  }

  add(report: StepReport): void {
    this.#steps++;
    const { seconds, rows, promptTokens, cachedTokens, generatedTokens } = this.#sums;
    this.#sums = {
      seconds: seconds + report.seconds,
      rows: rows + report.rows,
      promptTokens: promptTokens + report.promptTokens,
      cachedTokens: cachedTokens + report.cachedTokens,
      generatedTokens: generatedTokens + report.generatedTokens,
    };
    if (report.promptTokens >= 16 && report.promptTokens * 2 > report.rows) {
      const now = report.seconds / report.rows;
      this.secondsPerPromptRow =
        this.secondsPerPromptRow === 0 ? now : this.secondsPerPromptRow + SMOOTHING * (now - this.secondsPerPromptRow);
    }
  }

  totals() {
    return { steps: this.#steps, ...this.#sums, expertLoad: this.#load.map((layer) => layer.slice()) };
  }
}
