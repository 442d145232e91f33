/** Applies weight matrices to activations, one matrix or one per expert, with an optional bias and low-rank adapter. */
import type { Graph, Tensor } from "../graph/graph.ts";
import { times } from "../tensor/shape.ts";

/** A low-rank branch beside a matrix: scale * B(A(x)) (https://arxiv.org/abs/2106.09685). */
export interface Adapter<T = Tensor> {
  /** [rank, in], or [experts, rank, in]; of a stack of n adapters [n, rank, in], or [n * experts, rank, in]. */
  readonly a: T;
  /** [out, rank], or [experts, out, rank]; of a stack [n, out, rank], or [n * experts, out, rank]. */
  readonly b: T;
  /** The length of each row of the adapted matrix, [out] or [experts, out], in place of the one that it has (DoRA); never of a stack. */
  readonly magnitude?: T;
  readonly scale: number;
  readonly dropout: number;
  /** The stream of random numbers for this adapter's dropout, distinct from every other's. */
  readonly stream: number;
}

/** The rows of a step that have an adapter of a stack; the others have none. */
export interface Adapted {
  /** How many adapters the stack has. */
  readonly count: number;
  /** [adapted], and the adapter of each, [adapted, 1] i32. */
  readonly rows: Tensor;
  readonly ids: Tensor;
  /** These rows by adapter. */
  readonly groups: Slots;
  /** These rows of x. */
  pick(x: Tensor): Tensor;
}

/** @param count how many adapters the stack has @param rows [adapted] i32 @param ids [adapted, 1] i32 */
export function adaptedRows(g: Graph, count: number, rows: Tensor, ids: Tensor): Adapted {
  const picked = new Map<Tensor, Tensor>(); // several matrices read the same activations
  const pick = (x: Tensor): Tensor => {
    const found = picked.get(x) ?? g.gather(x, rows);
    picked.set(x, found);
    return found;
  };
  return { count, rows, ids, groups: g.group(ids, count), pick };
}

/** What a step says to the branches of all matrices. */
export interface Branches {
  /** Seeds the dropout of adapters; without it nothing is dropped. */
  readonly seed?: Tensor;
  /** Set where adapters are a stack. */
  readonly adapted?: Adapted;
}

export interface Linear<T = Tensor> {
  /** [out, in] */
  readonly weight: T;
  /** [out] */
  readonly bias?: T;
  readonly adapter?: Adapter<T>;
}

/** Stacked matrices, one per expert. */
export interface ExpertLinear<T = Tensor> {
  /** [experts, out, in] */
  readonly weight: T;
  readonly adapter?: Adapter<T>;
}

/** The expert slots sorted by expert, from `route` and `group`. */
export interface Slots {
  readonly order: Tensor;
  readonly offsets: Tensor;
}

/** Maps x [rows, in] to [rows, out]. */
export function linear(g: Graph, x: Tensor, { weight, bias, adapter }: Linear, { seed, adapted }: Branches = {}): Tensor {
  if (adapter?.magnitude) return decomposed(g, x, weight, bias, adapter, seed);
  const y = g.linear(x, weight, bias);
  if (!adapter) return y;
  if (adapted) return g.addRows(y, stacked(g, adapted.pick(x), adapter, adapted.groups, 1), adapted.rows);
  // The scale is applied where there are the fewest numbers.
  return g.add(y, g.linear(g.scale(g.linear(dropped(g, x, adapter, seed), adapter.a), adapter.scale), adapter.b));
}

/** The expert slots of a mixture, sorted by expert; and those of rows that have an adapter of a stack, sorted by adapter and expert. */
export interface ExpertSlots extends Slots {
  /** [rows, chosen] i32: the expert of each slot. */
  readonly experts: Tensor;
  /** `slots` says where these slots are among all, [chosen * adapted]. */
  readonly adapted?: Pick<Adapted, "pick"> & { readonly slots: Tensor; readonly groups: Slots };
}

/** @param experts [rows, chosen] i32, from `route` @param count how many experts there are */
export function expertSlots(g: Graph, experts: Tensor, count: number, { adapted }: Branches): ExpertSlots {
  const slots = { ...g.group(experts, count), experts };
  if (!adapted) return slots;
  const found = g.adaptedSlots(experts, adapted.rows, adapted.ids, count);
  return { ...slots, adapted: { pick: adapted.pick, slots: found.slots, groups: g.group(found.keys, adapted.count * count) } };
}

/** A float32 matrix with its adapter's product added: for an op that takes a whole matrix. Drops nothing: the branch sees no inputs. */
export function adapted(g: Graph, { weight, adapter }: Linear): Tensor {
  if (adapter?.magnitude) throw new RangeError("use_dora: a router has no magnitudes, as in PEFT; leave mlp.gate out");
  return adapter ? g.add(weight, g.scale(g.linearT(adapter.b, adapter.a), adapter.scale)) : weight;
}

/** Maps x [rows, in], with `slots` slots per row, to [slots * rows, out]: each slot by its expert's matrix. */
export function expertLinear(
  g: Graph,
  x: Tensor,
  { weight, adapter }: ExpertLinear,
  { order, offsets, experts, adapted }: ExpertSlots,
  slots: number,
  { seed }: Branches = {},
): Tensor {
  const y = g.groupedLinear(x, weight, order, offsets, slots);
  if (!adapter) return y;
  if (adapted) {
    const own = slots === 1 ? g.gather(x, adapted.slots) : adapted.pick(x); // x has a row per slot, or one per token
    return g.addRows(y, stacked(g, own, adapter, adapted.groups, slots), adapted.slots);
  }
  const input = dropped(g, x, adapter, seed);
  const low = g.groupedLinear(input, adapter.a, order, offsets, slots);
  const branch = g.groupedLinear(g.scale(low, adapter.scale), adapter.b, order, offsets, 1);
  if (!adapter.magnitude) return g.add(y, branch);
  const [count, out] = weight.shape;
  const rows = g.reshape(experts, [times(experts.shape[0], Number(experts.shape[1]))]);
  const by = g.gather(g.reshape(lengthened(g, weight, adapter), [Number(count), Number(out)]), rows); // [slots, out]
  if (input === x) return g.mul(g.add(y, branch), by);
  const without = g.groupedLinear(input, weight, order, offsets, slots);
  return g.add(y, g.add(g.mul(g.add(without, branch), by), g.scale(without, -1)));
}

/** A table with a row for each token, and its adapter. */
export interface Embedding<T = Tensor> {
  /** [vocab, hidden] */
  readonly table: T;
  /** A low-rank branch: a [vocab, rank], of a stack of n adapters [n * vocab, rank]; b [hidden, rank], or [n, hidden, rank]. */
  readonly adapter?: Pick<Adapter<T>, "a" | "b" | "scale">;
}

/**
 * The rows of a table, [rows, hidden]; its branch is scale * B(A's row), and nothing of it is dropped, as in PEFT.
 * @param tokens of the rows that have an adapter of a stack: their rows in A
 */
export function embedded(g: Graph, ids: Tensor, { table, adapter }: Embedding, { adapted }: Branches, tokens?: Tensor): Tensor {
  const x = g.embed(ids, table);
  if (!adapter) return x;
  if (!adapted || !tokens) return g.add(x, g.linear(g.scale(g.embed(ids, adapter.a), adapter.scale), adapter.b));
  const { order, offsets } = adapted.groups;
  return g.addRows(x, g.groupedLinear(g.embed(tokens, adapter.a), adapter.b, order, offsets, 1), adapted.rows);
}

/** -log softmax(head(x))[label] of each row, 0 where the label is negative; see the op `crossEntropy`. */
export function crossEntropy(
  g: Graph,
  x: Tensor,
  { weight, bias, adapter }: Linear,
  labels: Tensor,
  chunk: number,
  { seed }: Branches = {},
): Tensor {
  if (!adapter) return g.crossEntropy(x, weight, labels, chunk, bias);
  const low = g.scale(g.linear(dropped(g, x, adapter, seed), adapter.a), adapter.scale);
  return g.adaptedCrossEntropy(x, weight, labels, { low, up: adapter.b }, chunk, bias);
}

/**
 * A matrix whose rows have learnt lengths (DoRA, https://arxiv.org/abs/2402.09353): W' = m / |W + s B A| (W + s B A). As in PEFT, gradients take
 * the norm for a constant, and with dropout the branch adds (W' - W) times what is left of x.
 */
function decomposed(g: Graph, x: Tensor, weight: Tensor, bias: Tensor | undefined, adapter: Adapter, seed?: Tensor): Tensor {
  const by = lengthened(g, weight, adapter);
  const input = dropped(g, x, adapter, seed);
  const branch = g.linear(g.scale(g.linear(input, adapter.a), adapter.scale), adapter.b);
  if (input === x) return g.scaleColumns(g.add(g.linear(x, weight), branch), by, bias);
  const without = g.linear(input, weight);
  return g.add(g.linear(x, weight, bias), g.add(g.scaleColumns(g.add(without, branch), by), g.scale(without, -1)));
}

/** m / |W + s B A| of each row, [out] or [experts * out]. */
function lengthened(g: Graph, weight: Tensor, { a, b, magnitude, scale }: Adapter): Tensor {
  const float = (t: Tensor) => (t.dtype === "f32" ? t : g.call("castF32", [t])[0]);
  const inverse = g.inverseNorms(weight, float(a), float(b), scale);
  return g.mul(g.reshape(magnitude as Tensor, inverse.shape), inverse);
}

/** B(A(x)) for rows with different adapters; the scale is part of B. */
function stacked(g: Graph, x: Tensor, { a, b }: Adapter, { order, offsets }: Slots, slots: number): Tensor {
  return g.groupedLinear(g.groupedLinear(x, a, order, offsets, slots), b, order, offsets, 1);
}

function dropped(g: Graph, x: Tensor, { dropout, stream }: Adapter, seed?: Tensor): Tensor {
  return seed && dropout > 0 ? g.dropout(x, seed, dropout, stream) : x;
}
