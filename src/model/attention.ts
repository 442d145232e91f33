/** A decoder layer's self-attention: grouped-query heads over whole sequences or a paged KV cache. */
import type { Graph, KvCache, Tensor } from "../graph/graph.ts";
import { type Branches, type Linear, linear } from "./linear.ts";
import type { Step } from "./model.ts";

export interface AttentionWeights<T = Tensor> {
  readonly q: Linear<T>;
  readonly k: Linear<T>;
  readonly v: Linear<T>;
  readonly o: Linear<T>;
}

/**
 * Maps x [rows, hidden] to [rows, hidden], after writing this step's keys and values to the cache.
 * @param angles [rows, head width]: cosine and sine of each row's rotation
 */
export function attention(
  g: Graph,
  x: Tensor,
  w: AttentionWeights,
  angles: Tensor,
  step: Pick<Step, "segments" | "cache"> & Branches,
  cache?: KvCache,
): Tensor {
  const { segments } = step;
  const q = g.rope(linear(g, x, w.q, step), angles); // [rows, heads * dim]
  const k = g.rope(linear(g, x, w.k, step), angles); // [rows, kv heads * dim]
  const v = linear(g, x, w.v, step); // [rows, kv heads * dim]
  const dim = Number(angles.shape[1]);
  if (!step.cache || !cache) return linear(g, g.attention(q, k, v, segments, dim).y, w.o, step);
  const { pages, context } = step.cache;
  g.cacheWrite(k, v, cache, segments, pages);
  const keys = g.cacheRead(cache.keys, segments, pages, context); // [context, kv heads * dim]
  const values = g.cacheRead(cache.values, segments, pages, context);
  return linear(g, g.attention(q, keys, values, segments, dim).y, w.o, step);
}
