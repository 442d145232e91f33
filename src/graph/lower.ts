/**
 * Brings a graph into a backend's own formats: activations as its products take them, keys and values as its kernels lay them out.
 * What that is, the backend says; this pass only knows where.
 */
import type { Dtype } from "../tensor/dtype.ts";
import type { Shape } from "../tensor/shape.ts";
import type { Call, OpTable, Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

export interface Lowering {
  /** The op table, with the backend's own rows. */
  readonly table: OpTable;
  /** The op that converts activations for products with weights of a format; null where they are taken as they come. */
  activations(weight: Dtype): string | null;
  /**
   * Attention straight from the cache: the shapes in which the halves of a cache [blocks, tokens, heads, width] are laid out, for the
   * ops `pagedWrite(k, v, keys, values, segments, pages)` and `pagedAttention(q, keys, values, segments, pages)`.
   */
  cache(half: Tensor): { readonly keys: Shape; readonly values: Shape };
}

/** Ops whose first input is activations and whose second is a weight. */
const PRODUCTS = new Set(["linear", "groupedLinear", "gatedLinear", "groupedGatedLinear"]);

export function lower(graph: Graph, lowering: Lowering): Graph {
  const next = graph.branch(lowering.table);
  const makers = new Map<Tensor, Call>();
  const reads = new Map<Tensor, number>();
  for (const call of graph.calls) {
    for (const t of call.outputs) makers.set(t, call);
    for (const t of call.inputs) reads.set(t, (reads.get(t) ?? 0) + 1);
  }
  const returned = new Set(graph.outputs.values());

  const converted = new Map<string, Tensor>();
  const activations = (x: Tensor, weight: Tensor): Tensor => {
    const op = lowering.activations(weight.dtype);
    if (!op || x.dtype !== "f32") return x;
    const key = `${op}:${x.id}`;
    const made = converted.get(key) ?? next.call(op, [x])[0];
    converted.set(key, made);
    return made;
  };

  const halves = new Map<Tensor, Tensor>();
  const half = (state: Tensor, which: "keys" | "values"): Tensor => {
    const made = halves.get(state) ?? next.state(state.name as string, lowering.cache(state)[which], state.dtype);
    halves.set(state, made);
    return made;
  };
  /** The reads of a cache that attention alone is made of; null where something else wants what they give. */
  const cached = ({ op, inputs, outputs, params }: Call): readonly [Call, Call] | null => {
    if (op !== "attention" || params.causal !== 1 || reads.has(outputs[1]) || returned.has(outputs[1])) return null;
    const [k, v] = [makers.get(inputs[1]), makers.get(inputs[2])];
    if (k?.op !== "cacheRead" || v?.op !== "cacheRead" || reads.get(inputs[1]) !== 1 || reads.get(inputs[2]) !== 1) return null;
    return [k, v];
  };
  const dropped = new Set(graph.calls.flatMap((call) => cached(call) ?? []));

  for (const call of graph.calls) {
    const { op, inputs, outputs, params, sizes, scope } = call;
    next.within(scope, () => {
      const found = cached(call);
      if (found) {
        const [keys, values] = [half(found[0].inputs[0], "keys"), half(found[1].inputs[0], "values")];
        next.call("pagedAttention", [inputs[0], keys, values, ...found[0].inputs.slice(1)], {}, {}, outputs.slice(0, 1));
      } else if (op === "cacheWrite") {
        const [k, v, keys, values, segments, pages] = inputs;
        next.call("pagedWrite", [k, v, half(keys, "keys"), half(values, "values"), segments, pages]);
      } else if (PRODUCTS.has(op)) {
        next.call(op, [activations(inputs[0], inputs[1]), ...inputs.slice(1)], params, sizes, outputs);
      } else if (!dropped.has(call)) {
        next.push(call);
      }
    });
  }
  return checked(next, "lower");
}
