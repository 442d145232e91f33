/**
 * The GPU's passes before planning. Steps of few rows keep float32 activations and become about seven calls per layer; steps of many
 * rows round activations to the format of the tensor cores where they meet a matrix, in the kernels that compute them.
 */
import type { Call, Tensor } from "../../graph/call.ts";
import { fuse } from "../../graph/fuse.ts";
import { checked, type Graph } from "../../graph/graph.ts";
import { type Lowering, lower } from "../../graph/lower.ts";
import { CASTS, CUDA_TABLE, NARROWED } from "./ops.ts";

/** The most rows of a step that is computed by the kernels for few rows: with more, most experts are read anyway, and matrix units read them faster. */
export const FEW_ROWS = 4;

const GENERAL = new Set(["gatedLinear", "groupedGatedLinear", "addRmsNorm"]);

function lowering(few: boolean): Lowering {
  return {
    table: CUDA_TABLE,
    product: () => null,
    activations(weight) {
      if (few || weight === "f32") return null;
      return weight === "f16" ? "castF16" : "castBf16";
    },
    cache({ shape: [blocks, tokens, heads, dim] }) {
      const half = [blocks, heads, tokens, dim];
      return { keys: half, values: half };
    },
  };
}

/** @param rows the most rows of a step @param has whether there is a kernel for an op */
export function loweredForCuda(graph: Graph, rows: number, has: (op: string) => boolean): Graph {
  const few = rows <= FEW_ROWS;
  const plain = lower(
    fuse(graph, (op) => GENERAL.has(op) && has(op)),
    lowering(few),
  );
  const rules: readonly Rule[] = few ? [attentionOf, mixtureOf, routedNorm] : [rotatedWrite, combinedNorm];
  const fused = rewrite(plain, rules, has);
  return few ? fused : narrow(fused, has);
}

/** A call, and the call of another op that takes its place; `gone` are replaced with it. */
interface Rewrite {
  readonly at: Call;
  readonly op: string;
  readonly inputs: readonly Tensor[];
  readonly params?: Call["params"];
  readonly outputs: readonly Tensor[];
  readonly gone: readonly Call[];
}

class Uses {
  readonly #positions: ReadonlyMap<Call, number>;
  readonly #makers = new Map<Tensor, Call>();
  readonly #readers = new Map<Tensor, Call[]>();
  readonly #returned: ReadonlySet<Tensor>;

  constructor(graph: Graph) {
    for (const call of graph.calls) {
      for (const t of call.outputs) this.#makers.set(t, call);
      for (const t of new Set(call.inputs)) this.#readers.set(t, [...(this.#readers.get(t) ?? []), call]);
    }
    this.#positions = new Map(graph.calls.map((call, i) => [call, i]));
    this.#returned = new Set(graph.outputs.values());
  }

  /** Whether its inputs are computed before the call whose place it takes, and its results read after it. */
  fits({ at, inputs, outputs, gone }: Rewrite): boolean {
    const position = (call: Call) => this.#positions.get(call) as number;
    const before = (t: Tensor) => {
      const maker = this.#makers.get(t);
      return !maker || position(maker) < position(at);
    };
    const after = (call: Call) => call === at || gone.includes(call) || position(call) > position(at);
    return inputs.every(before) && outputs.every((t) => this.readers(t).every(after));
  }

  /** The call that computes a value, if it is of this op. */
  made(t: Tensor, op: string): Call | null {
    const call = this.#makers.get(t);
    return call?.op === op ? call : null;
  }
  readers(t: Tensor): readonly Call[] {
    return this.#readers.get(t) ?? [];
  }
  /** Whether only these calls read it, and no run can return it. */
  onlyFor(t: Tensor, ...calls: readonly Call[]): boolean {
    return !this.#returned.has(t) && this.readers(t).every((call) => calls.includes(call));
  }
  /** The only call that reads it, if it is of this op and no run can return the value. */
  only(t: Tensor, op: string): Call | null {
    const [call, ...more] = this.readers(t);
    return call?.op === op && more.length === 0 && !this.#returned.has(t) ? call : null;
  }
}

type Rule = (call: Call, uses: Uses) => readonly Rewrite[] | null;

function rewrite(graph: Graph, rules: readonly Rule[], has: (op: string) => boolean): Graph {
  const uses = new Uses(graph);
  const made = new Map<Call, Rewrite>();
  const gone = new Set<Call>();
  for (const call of graph.calls) {
    for (const rule of rules) {
      const found = gone.has(call) || made.has(call) ? null : rule(call, uses);
      if (!found?.every((r) => has(r.op) && uses.fits(r) && ![r.at, ...r.gone].some((c) => gone.has(c) || made.has(c)))) continue;
      for (const r of found) {
        made.set(r.at, r);
        for (const c of r.gone) gone.add(c);
      }
    }
  }
  const next = graph.branch();
  for (const call of graph.calls) {
    const r = made.get(call);
    if (r) next.within(call.scope, () => next.call(r.op, r.inputs, r.params ?? {}, {}, r.outputs));
    else if (!gone.has(call)) next.push(call);
  }
  return checked(next, "cuda");
}

/** `rope` of a query and a key, and the write of the key and its value -> `ropeWrite`; the write's inputs behind k and v. */
const rotatedWrite: Rule = (call, uses) => {
  if (call.op !== "pagedWrite") return null;
  const [k, v, keys, values, segments, pages] = call.inputs;
  const turned = uses.made(k, "rope");
  if (!turned || !uses.onlyFor(k, call)) return null;
  const [from, angles] = turned.inputs;
  // The query is rotated by the same angles, for the attention that reads this cache.
  const attention = uses.readers(keys).find((c) => c.op === "pagedAttention" && c.inputs[1] === keys);
  const query = attention && uses.made(attention.inputs[0], "rope");
  if (!query || query.inputs[1] !== angles || !uses.onlyFor(query.outputs[0], attention)) return null;
  const inputs = [query.inputs[0], from, v, angles, keys, values, segments, pages];
  return [{ at: call, op: "ropeWrite", inputs, outputs: query.outputs, gone: [turned, query] }];
};

/** The same with the products that make query, key and value -> `qkvRope`. */
const attentionOf: Rule = (call, uses) => {
  const [write] = rotatedWrite(call, uses) ?? [];
  if (!write) return null;
  const [q, k, v, ...rest] = write.inputs;
  const products = [q, k, v].map((t) => uses.made(t, "linear"));
  const readers = [write.gone[1], write.gone[0], call];
  const alone = products.every((p, i) => p?.inputs.length === 2 && uses.onlyFor(p.outputs[0], readers[i]));
  if (!alone) return null;
  const [wq, wk, wv] = products.map((p) => (p as Call).inputs[1]);
  const x = (products[0] as Call).inputs[0];
  const formats = new Set([wq, wk, wv].map((w) => w.dtype));
  if (formats.size > 1 || !products.every((p) => p?.inputs[0] === x)) return null;
  return [{ ...write, op: "qkvRope", inputs: [x, wq, wk, wv, ...rest], gone: [...write.gone, ...(products as Call[])] }];
};

/** A mixture without adapters: its products, their weighted sum, and the shared experts -> `expertsGated` and `expertsDown`. */
const mixtureOf: Rule = (call, uses): readonly Rewrite[] | null => {
  if (call.op !== "groupedGatedLinear") return null;
  const [x, gate, up, order] = call.inputs;
  const group = uses.made(order, "group");
  const down = uses.only(call.outputs[0], "groupedLinear");
  const combine = down && uses.only(down.outputs[0], "combine");
  if (!group || !down || !combine || down.inputs.length !== 4 || down.inputs[2] !== order) return null;
  const [experts] = group.inputs;
  const weights = combine.inputs[1];
  if (down.inputs[1].dtype !== gate.dtype || call.params.slots !== Number(experts.shape[1])) return null;
  const sum = uses.only(combine.outputs[0], "add");
  const sharedDown = sum && uses.made(sum.inputs.find((t) => t !== combine.outputs[0]) as Tensor, "linear");
  const shared = sharedDown && uses.made(sharedDown.inputs[0], "gatedLinear");
  const joined =
    sum &&
    sharedDown &&
    shared &&
    shared.inputs[0] === x &&
    shared.inputs[1].dtype === gate.dtype &&
    sharedDown.inputs[1].dtype === gate.dtype;
  if (joined && sharedDown.inputs.length === 2 && uses.onlyFor(shared.outputs[0], sharedDown) && uses.onlyFor(sharedDown.outputs[0], sum)) {
    const [h, hs] = [call.outputs[0], shared.outputs[0]];
    return [
      {
        at: call,
        op: "expertsGated",
        inputs: [x, gate, up, shared.inputs[1], shared.inputs[2], experts],
        params: { shared: 1 },
        outputs: [h, hs],
        gone: [shared],
      },
      {
        at: sum,
        op: "expertsDown",
        inputs: [h, hs, down.inputs[1], sharedDown.inputs[1], experts, weights],
        params: { shared: 1, residual: 0 },
        outputs: sum.outputs,
        gone: [down, combine, sharedDown],
      },
    ];
  }
  return [
    { at: call, op: "expertsGated", inputs: [x, gate, up, experts], params: { shared: 0 }, outputs: call.outputs, gone: [] },
    {
      at: combine,
      op: "expertsDown",
      inputs: [call.outputs[0], down.inputs[1], experts, weights],
      params: { shared: 0, residual: 0 },
      outputs: combine.outputs,
      gone: [down],
    },
  ];
};

/** A norm and the routing of its result -> `addRmsNormRoute`. */
const routedNorm: Rule = (call, uses) => {
  if (call.op !== "route") return null;
  const norm = uses.made(call.inputs[0], "addRmsNorm");
  if (!norm) return null;
  return [
    {
      at: call,
      op: "addRmsNormRoute",
      inputs: [...norm.inputs, call.inputs[1], call.inputs[2]],
      params: { ...norm.params, ...call.params },
      outputs: [...norm.outputs, ...call.outputs],
      gone: [norm],
    },
  ];
};

/** The sum of a mixture's experts, its shared experts and what came before, and the norm -> `combineAddNorm`. */
const combinedNorm: Rule = (call, uses) => {
  if (call.op !== "addRmsNorm") return null;
  const [a, b, w] = call.inputs;
  const sum = uses.made(b, "add");
  if (!sum || !uses.onlyFor(b, call)) return null;
  const combine = uses.made(sum.inputs[0], "combine");
  if (!combine || !uses.onlyFor(combine.outputs[0], sum)) return null;
  const [slots, weights] = combine.inputs;
  return [
    {
      at: call,
      op: "combineAddNorm",
      inputs: [slots, weights, sum.inputs[1], a, w],
      params: call.params,
      outputs: call.outputs,
      gone: [sum, combine],
    },
  ];
};

/** Results that only a cast reads are written in its format by the kernel that computes them. */
function narrow(graph: Graph, has: (op: string) => boolean): Graph {
  const uses = new Uses(graph);
  const made = new Map<Call, { readonly op: string; readonly outputs: readonly Tensor[] }>();
  const gone = new Set<Call>();
  for (const call of graph.calls) {
    const ending = CASTS[call.op];
    const [x] = call.inputs;
    const maker = ending
      ? Object.keys(NARROWED)
          .map((op) => uses.made(x, op))
          .find((c) => c !== null)
      : null;
    if (ending === "ToF16" && maker?.op === "pagedAttention") continue; // its kernels write float32 and bfloat16
    if (!maker || made.has(maker) || maker.outputs[NARROWED[maker.op]] !== x || !uses.onlyFor(x, call) || !has(maker.op)) continue;
    made.set(maker, { op: `${maker.op}${ending}`, outputs: maker.outputs.map((t) => (t === x ? call.outputs[0] : t)) });
    gone.add(call);
  }
  const next = graph.branch();
  for (const call of graph.calls) {
    const found = made.get(call);
    if (found) next.within(call.scope, () => next.call(found.op, call.inputs, call.params, call.sizes, found.outputs));
    else if (!gone.has(call)) next.push(call);
  }
  return checked(next, "cuda narrow");
}
