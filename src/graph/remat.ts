/**
 * Activation checkpointing (https://arxiv.org/abs/1604.06174): recomputes a layer's activations when its gradients are computed, so
 * that only the values passed between layers are stored in between. The results are bit-identical.
 */
import { BACKWARD, type Call, type Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

/**
 * Clones the calls of each layer whose scope `again` accepts to where the layer's gradients begin. Calls with effects, and those
 * whose row marks them as kept (such as routing), are not cloned. Run it after `backward`.
 */
export function remat(graph: Graph, again: (scope: string) => boolean = (scope) => scope !== ""): Graph {
  const makers = new Map<Tensor, Call>();
  /** Values that other layers read in the forward pass: they are stored anyway. */
  const passed = new Set<Tensor>();
  for (const call of graph.calls) {
    if (call.scope.startsWith(BACKWARD)) continue;
    for (const t of call.inputs) if (makers.has(t) && makers.get(t)?.scope !== call.scope) passed.add(t);
    for (const t of call.outputs) makers.set(t, call);
  }

  const next = graph.branch();
  /** The clones of each layer's values, by scope. */
  const clones = new Map<string, Map<Tensor, Tensor>>();
  const cloned = (t: Tensor, scope: string): Tensor => {
    const maker = makers.get(t);
    if (!maker || maker.scope !== scope || passed.has(t) || maker.effects.writes.length > 0 || graph.row(maker.op).kept) return t;
    const made = clones.get(scope) ?? new Map<Tensor, Tensor>();
    clones.set(scope, made);
    const before = made.get(t);
    if (before) return before;
    const inputs = maker.inputs.map((x) => cloned(x, scope));
    const outputs = next.within(BACKWARD + scope, () => next.call(maker.op, inputs, maker.params, maker.sizes));
    maker.outputs.forEach((o, i) => {
      made.set(o, outputs[i]);
    });
    return made.get(t) as Tensor;
  };
  for (const call of graph.calls) {
    const scope = call.scope.startsWith(BACKWARD) ? call.scope.slice(BACKWARD.length) : "";
    if (!scope || !again(scope)) next.push(call);
    else next.push({ ...call, inputs: call.inputs.map((t) => cloned(t, scope)) });
  }
  return checked(next, "remat");
}
