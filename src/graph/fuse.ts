/** Replaces related calls with one that computes the same in a single pass over memory, if the backend has a kernel for it. */
import type { Call, Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

/** A call that replaces others. */
interface Fusion {
  readonly op: string;
  readonly inputs: readonly Tensor[];
  readonly params: Call["params"];
  /** The values that it computes, in the order of its row's outputs. */
  readonly outputs: readonly Tensor[];
  /** The calls that it replaces besides the one matched. */
  readonly replaced: readonly Call[];
}

/** Queries about values, for patterns. */
interface Uses {
  maker(t: Tensor): Call | undefined;
  /** Whether exactly one call reads it and no run can return it. */
  single(t: Tensor): boolean;
}

type Pattern = (call: Call, uses: Uses) => Fusion | null;

/** Gate and up products of the same activations and their `siluMul` -> `gatedLinear` or `groupedGatedLinear`. */
const gated: Pattern = (call, { maker, single }) => {
  if (call.op !== "siluMul" || !call.inputs.every(single)) return null;
  const [gate, up] = call.inputs.map(maker);
  if (!gate || !up || gate === up || gate.op !== up.op || !(gate.op === "linear" || gate.op === "groupedLinear")) return null;
  const [[x, first, ...rest], [y, second, ...others]] = [gate.inputs, up.inputs];
  const alike = x === y && first.dtype === second.dtype && rest.length === others.length && rest.every((t, i) => t === others[i]);
  const biases = rest.length !== (gate.op === "linear" ? 0 : 2);
  if (!alike || biases || gate.params.slots !== up.params.slots || String(first.shape) !== String(second.shape)) return null;
  const op = gate.op === "linear" ? "gatedLinear" : "groupedGatedLinear";
  return { op, inputs: [x, first, second, ...rest], params: gate.params, outputs: call.outputs, replaced: [gate, up] };
};

/** A sum and its norm -> `addRmsNorm`. The sum is also a result, because the next residual connection reads it. */
const addNorm: Pattern = (call, { maker }) => {
  if (call.op !== "rmsNorm") return null;
  const sum = maker(call.inputs[0]);
  if (sum?.op !== "add") return null;
  const outputs = [call.inputs[0], call.outputs[0]];
  return { op: "addRmsNorm", inputs: [...sum.inputs, call.inputs[1]], params: call.params, outputs, replaced: [sum] };
};

/** Products that a sum can continue, by the axis of the matrix that they sum over. */
const ADDED: Readonly<Record<string, { readonly op: string; readonly depth: number; readonly inputs: number }>> = {
  linear: { op: "addLinear", depth: 1, inputs: 2 },
  linearT: { op: "addLinearT", depth: 0, inputs: 2 },
  groupedLinear: { op: "addGroupedLinear", depth: 2, inputs: 4 },
};
/** A product of more numbers takes so long that a sum of its own does not matter. */
const NARROW = 256;

/** An adapter's narrow product, or the gradient of one, and a sum -> `addLinear`, `addLinearT` or `addGroupedLinear`. */
const added: Pattern = (call, { maker, single }) => {
  if (call.op !== "add") return null;
  for (const [product, other] of [call.inputs, [...call.inputs].reverse()]) {
    const made = maker(product);
    const kind = made && Object.hasOwn(ADDED, made.op) ? ADDED[made.op] : undefined;
    if (!made || !kind || product === other || !single(product) || made.inputs.length !== kind.inputs) continue;
    const { dtype, shape } = made.inputs[1];
    if (Number(shape[kind.depth]) > NARROW || !["f32", "f16", "bf16"].includes(dtype)) continue;
    return { op: kind.op, inputs: [...made.inputs, other], params: made.params, outputs: call.outputs, replaced: [made] };
  }
  return null;
};

const PATTERNS: readonly Pattern[] = [gated, addNorm, added];

/** @param has whether the backend has a kernel for an op */
export function fuse(graph: Graph, has: (op: string) => boolean): Graph {
  // By value id: the call that computes it, the first call that reads it, and how many read it.
  const makers: (Call | undefined)[] = [];
  const firstRead = new Int32Array(graph.values.length).fill(graph.calls.length);
  const readers = new Int32Array(graph.values.length);
  graph.calls.forEach((call, at) => {
    for (const t of call.outputs) makers[t.id] = call;
    call.inputs.forEach((t, i) => {
      if (call.inputs.indexOf(t) !== i) return; // read twice by one call
      readers[t.id]++;
      firstRead[t.id] = Math.min(firstRead[t.id], at);
    });
  });
  const returned = new Set(graph.outputs.values());
  const uses: Uses = { maker: (t) => makers[t.id], single: (t) => readers[t.id] === 1 && !returned.has(t) };

  // Replaced calls; and fusions, by the position of the last call that they replace.
  const [gone, matched] = [new Set<Call>(), new Set<Call>()];
  const fusions = new Map<number, Fusion>();
  graph.calls.forEach((call, at) => {
    for (const pattern of PATTERNS) {
      const found = pattern(call, uses);
      if (!found || !has(found.op) || found.replaced.some((c) => gone.has(c) || matched.has(c))) continue;
      // No result of a replaced call may be read before the fusion computes it.
      const early = found.replaced.some((c) => c.outputs.some((t) => firstRead[t.id] < at));
      if (early) continue;
      for (const c of found.replaced) gone.add(c);
      matched.add(call);
      fusions.set(at, found);
      break;
    }
  });

  const next = graph.branch();
  graph.calls.forEach((call, at) => {
    const found = fusions.get(at);
    if (found) next.within(call.scope, () => next.call(found.op, found.inputs, found.params, {}, found.outputs));
    else if (!gone.has(call)) next.push(call);
  });
  return checked(next, "fuse");
}
