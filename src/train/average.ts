/** A moving average of the trained parameters (https://arxiv.org/abs/1803.05407 studies averaging weights), kept outside of the backend. */
import type { State } from "../backend/backend.ts";

export class Average {
  readonly #decay: number;
  readonly #states: ReadonlyMap<string, State>;
  readonly #values: Map<string, Float32Array>;

  /** @param states the trained parameters; the average begins at their present values */
  constructor(states: ReadonlyMap<string, State>, decay: number) {
    this.#decay = decay;
    this.#states = states;
    this.#values = new Map([...states].map(([name, state]) => [name, state.read()]));
  }

  /** Moves the average towards the present values: decay * average + (1 - decay) * value. */
  update(): void {
    for (const [name, state] of this.#states) {
      const average = this.#values.get(name) as Float32Array;
      const now = state.read();
      for (let i = 0; i < now.length; i++) average[i] = this.#decay * average[i] + (1 - this.#decay) * now[i];
    }
  }

  /** Puts the average in place of the parameters while `use` runs. */
  async inPlace<T>(use: () => Promise<T>): Promise<T> {
    const present = new Map([...this.#states].map(([name, state]) => [name, state.read()]));
    this.apply();
    try {
      return await use();
    } finally {
      for (const [name, state] of this.#states) state.write(present.get(name) as Float32Array);
    }
  }

  /** Puts the average in place of the parameters for good. */
  apply(): void {
    for (const [name, state] of this.#states) state.write(this.#values.get(name) as Float32Array);
  }

  /** The averages as states `average.NAME`, for checkpoints. */
  states(): Map<string, Pick<State, "bytes" | "read" | "write">> {
    return new Map(
      [...this.#values].map(([name, values]) => [
        `average.${name}`,
        { bytes: values.byteLength, read: () => values.slice(), write: (numbers: Float32Array) => values.set(numbers) },
      ]),
    );
  }
}
