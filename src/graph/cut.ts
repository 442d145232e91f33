/** Takes a part out of a graph: some of its computed values become inputs, and only what the wanted values need of the rest stays. */
import type { Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

/**
 * @param from values that runs will give, f32, by the name of their input
 * @param to values that runs can return, by name
 * @returns a graph with the calls between them, and those that write the states which these read
 */
export function cut(graph: Graph, from: ReadonlyMap<string, Tensor>, to: ReadonlyMap<string, Tensor>): Graph {
  const next = graph.branch();
  next.outputs.clear();
  const given = new Map<Tensor, Tensor>();
  for (const [name, t] of from) given.set(t, next.input(name, t.shape, "f32"));
  for (const [name, t] of to) next.output(name, t);
  const wanted = new Set<Tensor>(to.values());
  const found = graph.calls.toReversed().filter(({ inputs, outputs, effects }) => {
    if (!outputs.some((t) => wanted.has(t)) && !effects.writes.some((t) => wanted.has(t))) return false;
    for (const t of inputs) if (!given.has(t)) wanted.add(t);
    return true;
  });
  for (const { op, inputs, outputs, params, sizes, scope } of found.reverse())
    next.within(scope, () =>
      next.call(
        op,
        inputs.map((t) => given.get(t) ?? t),
        params,
        sizes,
        outputs,
      ),
    );
  return checked(next, "cut");
}
