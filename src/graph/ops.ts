/**
 * The op table: one row an op, with its parameters, shape rule and gradient rule. Backends bring one kernel a row, matched
 * by name; nothing else knows the list.
 */
import type { Dtype } from "../tensor/dtype.ts";
import { type Dim, type Shape, sameDim, sameShape, times } from "../tensor/shape.ts";
import type { Call, Graph, Tensor } from "./graph.ts";

/** Scalars of a call, by name. */
export type Params = Readonly<Record<string, number>>;

export interface Result {
  readonly shape: Shape;
  readonly dtype: Dtype;
}

export interface Op {
  /** Names of the scalar parameters, in the order in which kernels get them. */
  readonly params: readonly string[];
  /** Shapes and dtypes of the outputs, or null when the inputs do not agree. */
  outputs(inputs: readonly Tensor[], params: Params): readonly Result[] | null;
  /** Gradients of the inputs, given those of the outputs; null where none is defined (serving only, or not differentiable). */
  readonly gradient: ((g: Graph, call: Call, dy: readonly Tensor[]) => readonly (Tensor | null)[]) | null;
}

/** Columns of the sampling controls [outs, n], in order. Kernels index by these positions. */
export const SAMPLING_FLOATS = ["temperature", "topP", "minP", "repetitionPenalty", "presencePenalty", "frequencyPenalty"] as const;
/** `mask` is a row of the masks, -1 for none. `history*` and `bias*` are ranges in the concatenated lists; `prompt` counts the prompt's tokens in the history. `seed` and `step` drive the random draw. */
export const SAMPLING_INTS = [
  "topK",
  "noRepeatNgram",
  "seedLow",
  "seedHigh",
  "step",
  "historyStart",
  "historyCount",
  "promptCount",
  "biasStart",
  "biasCount",
  "mask",
] as const;

const MATRIX_INPUTS: Partial<Record<Dtype, Dtype>> = { f32: "f32", f16: "f32", bf16: "bf16pair", int8: "int8row", int4: "int8row" };

const f32 = (...shape: Dim[]): Result => ({ shape, dtype: "f32" });
const i32 = (...shape: Dim[]): Result => ({ shape, dtype: "i32" });
const matches = (t: Tensor | undefined, dtype: Dtype, rank: number) => t?.dtype === dtype && t.shape.length === rank;
const sameAs = ([a, b]: readonly Tensor[]) =>
  matches(a, "f32", 2) && matches(b, "f32", 2) && sameShape(a.shape, b.shape) ? [f32(...a.shape)] : null;

/** The inputs of an op that only converts a matrix of activations. */
function converted(dtype: Dtype): Op {
  return {
    params: [],
    outputs: ([x]) => (matches(x, "f32", 2) ? [{ shape: x.shape, dtype }] : null),
    gradient: (_g, _c, [dy]) => [dy], // straight through: the rounding has no slope
  };
}

function biasFits(bias: Tensor | undefined, shape: Shape): boolean {
  return !bias || (bias.dtype === "f32" && sameShape(bias.shape, shape));
}

/** Two matrices of the same shape and format, and activations for them. */
function gatesFit(x: Tensor | undefined, gate: Tensor | undefined, up: Tensor | undefined, rank: number): boolean {
  return (
    x?.shape.length === 2 &&
    gate?.shape.length === rank &&
    up !== undefined &&
    gate.dtype === up.dtype &&
    sameShape(gate.shape, up.shape) &&
    x.dtype === MATRIX_INPUTS[gate.dtype] &&
    sameDim(x.shape[1], gate.shape[rank - 1])
  );
}

function cacheFits(keys: Tensor, values: Tensor, segments: Tensor, pages: Tensor): boolean {
  const [blocks, heads, tokens, dim] = values.shape;
  return (
    values.shape.length === 4 &&
    keys.dtype === values.dtype &&
    sameShape(keys.shape, keys.dtype === "int8kv" ? values.shape : [blocks, heads, dim, tokens]) &&
    matches(segments, "i32", 2) &&
    sameDim(segments.shape[1], 3) &&
    matches(pages, "i32", 2) &&
    sameDim(segments.shape[0], pages.shape[0])
  );
}

export const OPS = {
  embed: {
    params: [],
    outputs: ([ids, table]) => (matches(ids, "i32", 1) && table?.shape.length === 2 ? [f32(ids.shape[0], table.shape[1])] : null),
    gradient: null,
  },
  rmsNorm: {
    params: ["eps"],
    outputs: ([x, w]) => (matches(x, "f32", 2) && matches(w, "f32", 1) && sameDim(x.shape[1], w.shape[0]) ? [f32(...x.shape)] : null),
    gradient: null,
  },
  toBf16Pair: converted("bf16pair"),
  toInt8: converted("int8row"),
  linear: {
    params: [],
    outputs: ([x, w, bias]) =>
      x?.shape.length === 2 &&
      w?.shape.length === 2 &&
      x.dtype === MATRIX_INPUTS[w.dtype] &&
      sameDim(x.shape[1], w.shape[1]) &&
      biasFits(bias, [w.shape[0]])
        ? [f32(x.shape[0], w.shape[0])]
        : null,
    gradient: null,
  },
  groupedLinear: {
    params: ["slots"],
    outputs: ([x, w, order, offsets, bias], { slots }) =>
      x?.shape.length === 2 &&
      w?.shape.length === 3 &&
      x.dtype === MATRIX_INPUTS[w.dtype] &&
      sameDim(x.shape[1], w.shape[2]) &&
      matches(order, "i32", 1) &&
      sameDim(order.shape[0], times(x.shape[0], slots)) &&
      matches(offsets, "i32", 1) &&
      biasFits(bias, w.shape.slice(0, 2))
        ? [f32(order.shape[0], w.shape[1])]
        : null,
    gradient: null,
  },
  gatedLinear: {
    params: [],
    outputs: ([x, gate, up]) => (gatesFit(x, gate, up, 2) ? [f32(x.shape[0], gate.shape[0])] : null),
    gradient: null,
  },
  groupedGatedLinear: {
    params: ["slots"],
    outputs: ([x, gate, up, order, offsets], { slots }) =>
      gatesFit(x, gate, up, 3) &&
      matches(order, "i32", 1) &&
      sameDim(order.shape[0], times(x.shape[0], slots)) &&
      matches(offsets, "i32", 1)
        ? [f32(order.shape[0], gate.shape[1])]
        : null,
    gradient: null,
  },
  add: { params: [], outputs: sameAs, gradient: (_g, _c, [dy]) => [dy, dy] },
  siluMul: { params: [], outputs: sameAs, gradient: null },
  angles: {
    params: ["dim", "theta"],
    outputs: ([positions], { dim }) => (matches(positions, "i32", 1) && dim % 2 === 0 ? [f32(positions.shape[0], dim)] : null),
    gradient: null,
  },
  rope: {
    params: [],
    outputs: ([x, angles]) =>
      matches(x, "f32", 2) &&
      matches(angles, "f32", 2) &&
      sameDim(x.shape[0], angles.shape[0]) &&
      Number(x.shape[1]) % Number(angles.shape[1]) === 0
        ? [f32(...x.shape)]
        : null,
    gradient: null,
  },
  cacheWrite: {
    params: [],
    outputs: ([k, v, keys, values, segments, pages]) =>
      matches(k, "f32", 2) &&
      matches(v, "f32", 2) &&
      sameShape(k.shape, v.shape) &&
      cacheFits(keys, values, segments, pages) &&
      k.shape[1] === Number(values.shape[1]) * Number(values.shape[3])
        ? []
        : null,
    gradient: null,
  },
  attention: {
    params: [],
    outputs: ([q, keys, values, segments, pages]) =>
      matches(q, "f32", 2) &&
      cacheFits(keys, values, segments, pages) &&
      Number(q.shape[1]) % (Number(values.shape[1]) * Number(values.shape[3])) === 0
        ? [f32(...q.shape)]
        : null,
    gradient: null,
  },
  route: {
    params: ["k", "normMin"],
    outputs: ([x, gate, bias], { k }) =>
      matches(x, "f32", 2) &&
      matches(gate, "f32", 2) &&
      sameDim(x.shape[1], gate.shape[1]) &&
      matches(bias, "f32", 1) &&
      sameDim(bias.shape[0], gate.shape[0]) &&
      k <= Number(gate.shape[0])
        ? [f32(x.shape[0], gate.shape[0]), i32(x.shape[0], k), f32(x.shape[0], k)]
        : null,
    gradient: null,
  },
  group: {
    params: ["count"],
    outputs: ([experts], { count }) =>
      matches(experts, "i32", 2) ? [i32(times(experts.shape[0], Number(experts.shape[1]))), i32(count + 1)] : null,
    gradient: null,
  },
  combine: {
    params: [],
    outputs: ([slots, weights]) =>
      matches(slots, "f32", 2) && matches(weights, "f32", 2) && sameDim(slots.shape[0], times(weights.shape[0], Number(weights.shape[1])))
        ? [f32(weights.shape[0], slots.shape[1])]
        : null,
    gradient: null,
  },
  gather: {
    params: [],
    outputs: ([x, index]) => (matches(x, "f32", 2) && matches(index, "i32", 1) ? [f32(index.shape[0], x.shape[1])] : null),
    gradient: null,
  },
  /** The second output is scratch. */
  processLogits: {
    params: [],
    outputs: ([logits, floats, ints, history, biasIds, biasValues, masks]) =>
      samplingFits(logits, floats, ints) &&
      matches(history, "i32", 1) &&
      matches(biasIds, "i32", 1) &&
      matches(biasValues, "f32", 1) &&
      matches(masks, "i32", 2) &&
      masks.shape[1] === Math.ceil(Number(logits.shape[1]) / 32)
        ? [f32(...logits.shape), i32(...logits.shape)]
        : null,
    gradient: null,
  },
  sample: {
    params: [],
    outputs: ([logits, processed, floats, ints]) =>
      samplingFits(logits, floats, ints) && matches(processed, "f32", 2) && sameShape(logits.shape, processed.shape)
        ? [i32(logits.shape[0]), f32(logits.shape[0])]
        : null,
    gradient: null,
  },
  topLogprobs: {
    params: ["k"],
    outputs: ([logits], { k }) =>
      matches(logits, "f32", 2) && k >= 1 && k <= Number(logits.shape[1]) ? [i32(logits.shape[0], k), f32(logits.shape[0], k)] : null,
    gradient: null,
  },
} satisfies Record<string, Op>;

function samplingFits(logits: Tensor, floats: Tensor, ints: Tensor): boolean {
  return (
    matches(logits, "f32", 2) &&
    matches(floats, "f32", 2) &&
    matches(ints, "i32", 2) &&
    sameShape(floats.shape, [logits.shape[0], SAMPLING_FLOATS.length]) &&
    sameShape(ints.shape, [logits.shape[0], SAMPLING_INTS.length])
  );
}

export type OpName = keyof typeof OPS;
