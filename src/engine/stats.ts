/** An engine's counters, updated after each step. Knows no requests. */

/** One finished step. */
export interface StepReport {
  readonly seconds: number;
  readonly rows: number;
  readonly sequences: number;
  /** Prompt tokens computed, and those of completed prompts that came from the prefix cache. */
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly generatedTokens: number;
}

export interface EngineStats {
  readonly running: number;
  readonly waiting: number;
  /** `free` counts blocks without a holder; `remembered` ones among them are in the prefix cache. */
  readonly blocks: { readonly count: number; readonly free: number; readonly remembered: number };
  readonly preemptions: number;
  readonly steps: number;
  readonly seconds: number;
  readonly rows: number;
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly generatedTokens: number;
  /** How often each expert was chosen in the sampled steps: [mixture layers][experts]. */
  readonly expertLoad: readonly Float64Array[];
}

/** Routing is recorded for one in this many steps. */
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
  /** Seconds per prompt row in recent steps with many prompt rows; 0 before the first such step. */
  secondsPerPromptRow = 0;

  constructor(mixtures: number, experts: number) {
    this.#load = Array.from({ length: mixtures }, () => new Float64Array(experts));
  }

  /** Whether the next step should return its routing. */
  get wantsRouting(): boolean {
    return this.#load.length > 0 && this.#steps % ROUTING_EVERY === 0;
  }

  /** @param experts the chosen experts of each mixture layer */
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
