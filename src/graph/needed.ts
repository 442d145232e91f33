/** Finds the calls that a run needs for its requested outputs. */
import type { Call, Tensor } from "./call.ts";
import type { Graph } from "./graph.ts";

/** The calls that the named outputs depend on and those that write a state, in order. Throws on an unknown output name. */
export function needed({ calls, outputs }: Pick<Graph, "calls" | "outputs">, names: Iterable<string>): Call[] {
  const wanted = new Set<Tensor>();
  for (const name of names) {
    const t = outputs.get(name);
    if (!t) throw new Error(`internal: the program has no output '${name}'`);
    wanted.add(t);
  }
  const found: Call[] = [];
  for (let i = calls.length - 1; i >= 0; i--) {
    const call = calls[i];
    if (call.effects.writes.length === 0 && !call.outputs.some((t) => wanted.has(t))) continue;
    for (const t of call.inputs) wanted.add(t);
    found.push(call);
  }
  return found.reverse();
}
