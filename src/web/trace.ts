/** Which experts the tokens of one answer used, per token and in total. Knows nothing of server or page. */
import type { RoutedExperts } from "./wire.ts";

/** A trace as it is stored: tokens in order; experts and weights are [tokens, layers, chosen]. */
export interface StoredTrace {
  readonly layers: readonly number[];
  readonly chosen: number;
  readonly texts: readonly string[];
  readonly experts: Uint16Array<ArrayBuffer>;
  readonly weights: Float32Array<ArrayBuffer>;
}

/** The experts of one layer for one token, largest weight first. */
export type Choice = readonly { readonly expert: number; readonly weight: number }[];

export class Trace {
  readonly layers: readonly number[];
  /** Number of experts chosen in each layer. */
  readonly chosen: number;
  readonly #texts: string[];
  #experts: Uint16Array<ArrayBuffer>;
  #weights: Float32Array<ArrayBuffer>;

  constructor({ layers, chosen, texts, experts, weights }: StoredTrace) {
    this.layers = layers;
    this.chosen = chosen;
    this.#texts = [...texts];
    this.#experts = experts;
    this.#weights = weights;
  }

  /** An empty trace for tokens of this shape. */
  static like({ layers, experts }: RoutedExperts): Trace {
    return new Trace({ layers, chosen: experts[0]?.length ?? 0, texts: [], experts: new Uint16Array(0), weights: new Float32Array(0) });
  }

  /** Number of tokens so far. */
  get length(): number {
    return this.#texts.length;
  }

  get texts(): readonly string[] {
    return this.#texts;
  }

  /** Adds a token. Returns false, adding nothing, when its shape differs. */
  push({ text, layers, experts, weights }: RoutedExperts): boolean {
    if (layers.length !== this.layers.length || (experts[0]?.length ?? 0) !== this.chosen) return false;
    const at = this.length * this.#stride;
    if (at + this.#stride > this.#experts.length) {
      const room = Math.max(64 * this.#stride, 2 * this.#experts.length);
      this.#experts = grown(this.#experts, new Uint16Array(room));
      this.#weights = grown(this.#weights, new Float32Array(room));
    }
    this.#experts.set(experts.flat(), at);
    this.#weights.set(weights.flat(), at);
    this.#texts.push(text);
    return true;
  }

  /** The experts of a token, layer by layer in the order of `layers`. */
  choices(token: number): Choice[] {
    return this.layers.map((_, layer) => {
      const from = token * this.#stride + layer * this.chosen;
      return Array.from({ length: this.chosen }, (_, k) => ({ expert: this.#experts[from + k], weight: this.#weights[from + k] })).sort(
        (a, b) => b.weight - a.weight,
      );
    });
  }

  /** The largest expert id seen, plus one. */
  get leastExperts(): number {
    return this.#experts.subarray(0, this.length * this.#stride).reduce((most, e) => Math.max(most, e + 1), 0);
  }

  /** How often each expert was chosen, [layers, experts], by the first `tokens` tokens. */
  load(experts: number, tokens = this.length): Uint32Array {
    const load = new Uint32Array(this.layers.length * experts);
    for (let i = 0; i < tokens * this.#stride; i++) {
      const layer = Math.floor((i % this.#stride) / this.chosen);
      if (this.#experts[i] < experts) load[layer * experts + this.#experts[i]]++;
    }
    return load;
  }

  stored(): StoredTrace {
    const used = this.length * this.#stride;
    const { layers, chosen } = this;
    return { layers, chosen, texts: this.#texts, experts: this.#experts.slice(0, used), weights: this.#weights.slice(0, used) };
  }

  get #stride(): number {
    return this.layers.length * this.chosen;
  }
}

function grown<T extends Uint16Array | Float32Array>(from: T, to: T): T {
  to.set(from);
  return to;
}
