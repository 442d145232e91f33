/** Self-attention of a decoder layer: grouped query heads over a paged cache of keys and values. */
import type { Graph, KvCache, Tensor } from "../graph/graph.ts";
import { type Linear, linear } from "./linear.ts";

export interface AttentionWeights {
  readonly q: Linear;
  readonly k: Linear;
  readonly v: Linear;
  readonly o: Linear;
}

/** What a step brings along besides its tokens: where each row stands, and where each sequence's cache lies. */
export interface Step {
  /** [rows, head width]: cosine and sine of each row's angles. */
  readonly angles: Tensor;
  /** [sequences, 3]: first row, rows, position of the first row. */
  readonly segments: Tensor;
  /** [sequences, pages]: the cache blocks of each sequence in order. */
  readonly pages: Tensor;
}

/** x [rows, hidden] to [rows, hidden]; this step's keys and values go into the cache first. */
export function attention(g: Graph, x: Tensor, w: AttentionWeights, cache: KvCache, step: Step): Tensor {
  const q = g.rope(linear(g, x, w.q), step.angles); // [rows, heads * dim]
  const k = g.rope(linear(g, x, w.k), step.angles); // [rows, kv heads * dim]
  const v = linear(g, x, w.v); // [rows, kv heads * dim]
  g.cacheWrite(k, v, cache, step.segments, step.pages);
  return linear(g, g.attention(q, cache, step.segments, step.pages), w.o);
}
