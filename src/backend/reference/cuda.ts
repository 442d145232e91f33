/** The fused ops of GPUs, composed of the ops that they replace; and the cache in their layout, [blocks, heads, tokens, width]. */
import { roundBf16, roundE4m3 } from "../../tensor/dtype.ts";
import { GROUP } from "../../tensor/quantized.ts";
import type { Numbers } from "../backend.ts";
import type { FusedOpName } from "../cuda/fused.ts";
import { CASTS, NARROWED } from "../cuda/ops.ts";
import { forEachRow, pageOf, rounded } from "./attention.ts";
import { ELEMENTWISE_KERNELS } from "./elementwise.ts";
import { EXPERT_KERNELS } from "./experts.ts";
import { MATRIX_KERNELS } from "./matrix.ts";
import { dot, type Kernel, type Operand, softmax } from "./operand.ts";

const { add, addRmsNorm, rmsNorm, rope } = ELEMENTWISE_KERNELS;
const { combine, route } = EXPERT_KERNELS;
const { gatedLinear, group, groupedGatedLinear, groupedLinear, linear } = MATRIX_KERNELS;

export const CUDA_KERNELS: Readonly<Record<FusedOpName, Kernel>> = {
  addRmsNormRoute([a, b, norm, gate, bias], [sum, normed, ...routing], { eps, k, normMin }) {
    addRmsNorm([a, b, norm], [sum, normed], { eps });
    route([normed, gate, bias], routing, { k, normMin });
  },

  linearAdd([x, w, residual], [y]) {
    linear([x, w], [y]);
    add([y, residual], [y]);
  },

  combineAdd([slots, weights, shared, residual], [y]) {
    combine([slots, weights], [y]);
    add([y, shared], [y]);
    add([residual, y], [y]);
  },

  combineAddNorm([slots, weights, shared, residual, norm], [sum, normed], { eps }) {
    CUDA_KERNELS.combineAdd([slots, weights, shared, residual], [sum], {});
    rmsNorm([sum, norm], [normed], { eps });
  },

  expertsGated(inputs, [h, hs], { shared }) {
    const [x, gate, up] = inputs;
    const experts = inputs[shared === 1 ? 5 : 3];
    groupedGatedLinear([x, gate, up, ...sorted(experts, gate.dims[0])], [h], { slots: experts.dims[1] });
    if (shared === 1) gatedLinear([x, inputs[3], inputs[4]], [hs]);
  },

  expertsDown(inputs, [y], { shared, residual }) {
    const down = inputs[shared === 1 ? 2 : 1];
    const [experts, weights, added] = inputs.slice(shared === 1 ? 4 : 2);
    const slots = made([inputs[0].dims[0], down.dims[1]]);
    groupedLinear([inputs[0], down, ...sorted(experts, down.dims[0])], [slots], { slots: 1 });
    combine([slots, weights], [y]);
    if (shared === 1) {
      const common = made(y.dims);
      linear([inputs[1], inputs[3]], [common]);
      add([y, common], [y]);
    }
    if (residual === 1) add([added, y], [y]);
  },

  qkvRope([x, wq, wk, wv, angles, ...cache], [q]) {
    const [k, v] = [wk, wv].map((w) => made([x.dims[0], w.dims[0]]));
    linear([x, wq], [q]);
    linear([x, wk], [k]);
    linear([x, wv], [v]);
    CUDA_KERNELS.ropeWrite([q, k, v, angles, ...cache], [q], {});
  },

  ropeWrite([q, k, v, angles, ...cache], [turned]) {
    const keys = made(k.dims);
    rope([k, angles], [keys], {});
    rope([q, angles], [turned], {});
    CUDA_KERNELS.pagedWrite([keys, v, ...cache], [], {});
  },

  pagedWrite([k, v, keys, values, segments, pages]) {
    const [, heads, tokens, dim] = keys.dims;
    forEachRow(segments, (s, row, position) => {
      const block = pageOf(pages, s, position, tokens) * heads * tokens * dim;
      for (let h = 0; h < heads; h++) {
        const from = (row * heads + h) * dim;
        const to = block + (h * tokens + (position % tokens)) * dim;
        keys.data.set(stored(k.data.subarray(from, from + dim), keys.dtype), to);
        values.data.set(stored(v.data.subarray(from, from + dim), values.dtype), to);
      }
    });
  },

  pagedAttention([q, keys, values, segments, pages], [y]) {
    const [, kvHeads, tokens, dim] = keys.dims;
    const heads = q.dims[1] / dim;
    forEachRow(segments, (s, row, position) => {
      for (let h = 0; h < heads; h++) {
        const kv = Math.floor(h / (heads / kvHeads));
        const at = (row * heads + h) * dim;
        const places = Array.from(
          { length: position + 1 },
          (_, t) => ((pageOf(pages, s, t, tokens) * kvHeads + kv) * tokens + (t % tokens)) * dim,
        );
        const p = softmax(places.map((place) => dot(q.data, at, keys.data, place, dim) / Math.sqrt(dim)));
        for (let d = 0; d < dim; d++) y.data[at + d] = places.reduce((sum, place, t) => sum + p[t] * values.data[place + d], 0);
      }
    });
  },
};

/** Kernels that write a result in another format: the same, with that result rounded. float16 is rounded by nobody here, as elsewhere. */
export function narrowedKernels(kernels: Readonly<Record<string, Kernel>>): Readonly<Record<string, Kernel>> {
  return Object.fromEntries(
    Object.entries(NARROWED).flatMap(([op, at]) =>
      Object.entries(CASTS).map(([cast, ending]) => [`${op}${ending}`, rounding(kernels[op], at, cast)]),
    ),
  );
}

function rounding(kernel: Kernel, at: number, cast: string): Kernel {
  return (inputs, outputs, params) => {
    kernel(inputs, outputs, params);
    const { data } = outputs[at];
    if (cast === "castBf16") data.forEach((x, i) => void (data[i] = roundBf16(x)));
  };
}

function made(dims: readonly number[], dtype: Operand["dtype"] = "f32"): Operand {
  const count = dims.reduce((a, b) => a * b);
  return { dims, data: dtype === "i32" ? new Int32Array(count) : new Float32Array(count), dtype };
}

/** Order and offsets of the slots. */
function sorted(experts: Operand, count: number): [Operand, Operand] {
  const [order, offsets] = [made([experts.data.length], "i32"), made([count + 1], "i32")];
  group([experts], [order, offsets], { count });
  return [order, offsets];
}

/** A key or value as a cache of this format stores it; float16 is rounded by nobody here, as elsewhere in the reference backend. */
function stored(head: Numbers, dtype: Operand["dtype"]): Numbers {
  if (dtype === "int8kv") return rounded(head, GROUP);
  if (dtype === "bf16") return Float32Array.from(head, roundBf16);
  return dtype === "fp8kv" ? Float32Array.from(head, roundE4m3) : head;
}
