/**
 * Reverse-mode differentiation: appends calls that compute the gradients of a loss, using the rule in each op's row. Only calls
 * between a trained parameter and the loss are differentiated; frozen parts of the model cost nothing.
 */
import { BACKWARD, type Emit, type Tensor } from "./call.ts";
import { checked, type Graph, show } from "./graph.ts";

/** The name of the output that holds a trained state's gradient. */
export function gradientName(state: string): string {
  return `gradient.${state}`;
}

/**
 * The graph followed by the gradients of `loss` (an output of shape [1]) with respect to the states named `trained`, as outputs
 * `gradient.NAME`. Throws if one is not a state of the graph, if the loss does not depend on it, or if the path to it leads
 * through an op without a gradient, with the reason.
 */
export function backward(graph: Graph, loss: string, trained: readonly string[]): Graph {
  const start = graph.outputs.get(loss);
  if (!start) throw new Error(`internal: backward: there is no output '${loss}'`);
  if (show(start) !== "f32[1]") throw new Error(`internal: backward: the loss '${loss}' is ${show(start)}, it must be f32[1]`);
  const named = new Map(graph.values.filter((t) => t.kind === "state").map((t) => [t.name as string, t]));
  const parameters = trained.map((name) => named.get(name) ?? fail(`there is no state '${name}' to train`));

  // Values that depend on a trained parameter.
  const active = new Set<Tensor>(parameters);
  for (const { inputs, outputs } of graph.calls) if (inputs.some((t) => active.has(t))) for (const t of outputs) active.add(t);

  const next = graph.branch();
  for (const call of graph.calls) next.push(call);
  const gradients = new Map<Tensor, Tensor>();
  const add = (t: Tensor, gradient: Tensor): void => {
    const before = gradients.get(t);
    gradients.set(t, before ? next.call("add", [before, gradient])[0] : gradient);
  };
  /** A matrix and its adapter round the same gradient. */
  const rounded = new Map<Tensor, Tensor[]>();
  next.within(BACKWARD, () => gradients.set(start, next.call("fill", [], { value: 1 }, { n: 1 })[0]));
  for (const call of [...graph.calls].reverse()) {
    const dy = call.outputs.map((t) => gradients.get(t) ?? null);
    const wanted = call.inputs.map((t) => active.has(t) && t.dtype !== "i32");
    if (dy.every((t) => t === null) || !wanted.includes(true)) continue;
    const { gradient } = graph.row(call.op);
    if (typeof gradient === "string") {
      throw new Error(`internal: backward: ${call.op}${call.scope ? ` of ${call.scope}` : ""} has no gradient: ${gradient}`);
    }
    const emit: Emit = (op, inputs, params, sizes) => {
      if (op !== "castBf16") return next.call(op, inputs, params, sizes);
      const made = rounded.get(inputs[0] as Tensor) ?? next.call(op, inputs, params, sizes);
      rounded.set(inputs[0] as Tensor, made);
      return made;
    };
    next.within(BACKWARD + call.scope, () => {
      gradient(emit, call, dy, wanted).forEach((d, i) => {
        if (d && wanted[i]) add(call.inputs[i], d);
      });
    });
  }
  for (const t of parameters)
    next.output(gradientName(t.name as string), gradients.get(t) ?? fail(`the loss '${loss}' does not depend on '${t.name}'`));
  return checked(next, "backward");
}

function fail(message: string): never {
  throw new Error(`internal: backward: ${message}`);
}
