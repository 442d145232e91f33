/**
 * Converts a graph to a backend's own formats: those of activations in products, and the layout of keys and values. The backend
 * defines the formats; this pass only knows where they apply.
 */
import type { Dtype } from "../tensor/dtype.ts";
import type { Shape } from "../tensor/shape.ts";
import type { Call, OpTable, Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

export interface Lowering {
  /** The op table, with the backend's own rows. */
  readonly table: OpTable;
  /** The op that computes a product of activations as they are with weights of a format; null: the product itself, of converted ones. */
  product(op: string, weight: Dtype): string | null;
  /** The op that converts activations for products with weights of a format; null if they need no conversion. */
  activations(weight: Dtype): string | null;
  /**
   * The layout of a cache for attention that reads it directly: the shapes of the halves of a cache [blocks, tokens, heads, width] for
   * the ops `pagedWrite(k, v, keys, values, segments, pages)` and `pagedAttention(q, keys, values, segments, pages)`.
   */
  cache(half: Tensor): { readonly keys: Shape; readonly values: Shape };
}

/** Ops whose first input is an activation and whose second is a weight. */
const PRODUCTS = new Set(["linear", "groupedLinear", "gatedLinear", "groupedGatedLinear"]);

export function lower(graph: Graph, lowering: Lowering): Graph {
  const next = graph.branch(lowering.table);
  // By value id: the call that computes it, and how often it is read.
  const makers: (Call | undefined)[] = [];
  const reads = new Int32Array(graph.values.length);
  for (const call of graph.calls) {
    for (const t of call.outputs) makers[t.id] = call;
    for (const t of call.inputs) reads[t.id]++;
  }
  const returned = new Set(graph.outputs.values());

  /** Converted activations, by conversion op and value id. */
  const converted = new Map<string, (Tensor | undefined)[]>();
  const activations = (x: Tensor, weight: Tensor): Tensor => {
    const op = lowering.activations(weight.dtype);
    if (!op || x.dtype !== "f32") return x;
    let made = converted.get(op);
    if (!made) {
      made = [];
      converted.set(op, made);
    }
    made[x.id] ??= next.call(op, [x])[0];
    return made[x.id] as Tensor;
  };

  const halves = new Map<Tensor, Tensor>();
  const half = (state: Tensor, which: "keys" | "values"): Tensor => {
    const made = halves.get(state) ?? next.state(state.name as string, lowering.cache(state)[which], state.dtype);
    halves.set(state, made);
    return made;
  };
  /** The two cache reads that feed only this attention call; null if anything else uses their results. */
  const cached = ({ inputs, outputs, params }: Call): readonly [Call, Call] | null => {
    if (params.causal !== 1 || reads[outputs[1].id] > 0 || returned.has(outputs[1])) return null;
    const [k, v] = [makers[inputs[1].id], makers[inputs[2].id]];
    if (k?.op !== "cacheRead" || v?.op !== "cacheRead" || reads[inputs[1].id] !== 1 || reads[inputs[2].id] !== 1) return null;
    return [k, v];
  };
  const attentions = new Map<Call, readonly [Call, Call]>();
  for (const call of graph.calls) {
    const found = call.op === "attention" ? cached(call) : null;
    if (found) attentions.set(call, found);
  }
  const dropped = new Set([...attentions.values()].flat());

  for (const call of graph.calls) {
    const { op, inputs, outputs, params, sizes, scope } = call;
    next.within(scope, () => {
      const found = attentions.get(call);
      if (found) {
        const [keys, values] = [half(found[0].inputs[0], "keys"), half(found[1].inputs[0], "values")];
        next.call("pagedAttention", [inputs[0], keys, values, ...found[0].inputs.slice(1)], {}, {}, outputs.slice(0, 1));
      } else if (op === "cacheWrite") {
        const [k, v, keys, values, segments, pages] = inputs;
        next.call("pagedWrite", [k, v, half(keys, "keys"), half(values, "values"), segments, pages]);
      } else if (PRODUCTS.has(op) && lowering.product(op, inputs[1].dtype)) {
        next.call(lowering.product(op, inputs[1].dtype) as string, inputs, params, sizes, outputs);
      } else if (PRODUCTS.has(op)) {
        next.call(op, [activations(inputs[0], inputs[1]), ...inputs.slice(1)], params, sizes, outputs);
      } else if (!dropped.has(call)) {
        next.push(call);
      }
    });
  }
  return checked(next, "lower");
}
