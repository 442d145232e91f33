/**
 * Activation checkpointing (https://arxiv.org/abs/1604.06174): what a layer computes on its way forward is computed again
 * when its gradients are taken, so that only what layers pass to each other is held in between. The numbers are the same to the bit.
 */
import { BACKWARD, type Call, type Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

/**
 * Clones calls of each layer whose scope `again` accepts to where the layer's gradients begin. Calls with effects, and those whose
 * row says that they are kept (what routing chose), are not cloned. To be used behind `backward`.
 */
export function remat(graph: Graph, again: (scope: string) => boolean = (scope) => scope !== ""): Graph {
  const makers = new Map<Tensor, Call>();
  /** Values that calls of other layers read on the way forward: they are held anyway. */
  const passed = new Set<Tensor>();
  for (const call of graph.calls) {
    if (call.scope.startsWith(BACKWARD)) continue;
    for (const t of call.inputs) if (makers.has(t) && makers.get(t)?.scope !== call.scope) passed.add(t);
    for (const t of call.outputs) makers.set(t, call);
  }

  const next = graph.branch();
  /** Of each layer, the clones of its values. */
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
