/** Replaces neighbouring calls by one that computes the same in one pass over memory, where the backend has a kernel for it. */
import type { Call, Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

/** A call in the place of others. */
interface Fusion {
  readonly op: string;
  readonly inputs: readonly Tensor[];
  readonly params: Call["params"];
  /** Values that it computes, in the order of its row. */
  readonly outputs: readonly Tensor[];
  /** Calls that it replaces besides the one that was looked at. */
  readonly replaced: readonly Call[];
}

/** What a pattern may ask about values. */
interface Uses {
  maker(t: Tensor): Call | undefined;
  /** Whether nothing but one call reads it, and no run can ask for it. */
  single(t: Tensor): boolean;
}

type Pattern = (call: Call, uses: Uses) => Fusion | null;

/** gate and up products of the same activations, and `siluMul` of both -> `gatedLinear`, or grouped by expert. */
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

/** A sum and its norm -> `addRmsNorm`. The sum itself is a result too: the next residual connection reads it. */
const addNorm: Pattern = (call, { maker }) => {
  if (call.op !== "rmsNorm") return null;
  const sum = maker(call.inputs[0]);
  if (sum?.op !== "add") return null;
  const outputs = [call.inputs[0], call.outputs[0]];
  return { op: "addRmsNorm", inputs: [...sum.inputs, call.inputs[1]], params: call.params, outputs, replaced: [sum] };
};

const PATTERNS: readonly Pattern[] = [gated, addNorm];

/** @param has whether the backend has a kernel for an op */
export function fuse(graph: Graph, has: (op: string) => boolean): Graph {
  // By value id: the call that makes it, the first that reads it, and how many do.
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

  /** By position: a call that is replaced, and the fusion that stands where the last one of its calls stood. */
  const gone = new Set<Call>();
  const fusions = new Map<number, Fusion>();
  graph.calls.forEach((call, at) => {
    for (const pattern of PATTERNS) {
      const found = pattern(call, uses);
      if (!found || !has(found.op) || found.replaced.some((c) => gone.has(c))) continue;
      // Whatever a replaced call computed must not be read before the fusion computes it.
      const early = found.replaced.some((c) => c.outputs.some((t) => firstRead[t.id] < at));
      if (early) continue;
      for (const c of found.replaced) gone.add(c);
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
