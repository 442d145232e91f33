/**
 * Mixed precision: products with bfloat16 matrices take activations rounded to bfloat16, which halves their work on processors that
 * multiply such pairs. Gradients are rounded likewise, and sums stay float32 (https://arxiv.org/abs/1905.12322). Attention may take its operands
 * for sums of two bfloat16 numbers each.
 */
import type { Tensor } from "./call.ts";
import { checked, type Graph } from "./graph.ts";

/** Products and losses whose first input is an activation and whose second is a matrix. */
const PRODUCTS = new Set(["linear", "groupedLinear", "crossEntropy", "adaptedCrossEntropy"]);

/** Run it before `backward`, which then rounds gradients too. */
export function narrow(graph: Graph): Graph {
  const next = graph.branch();
  const rounded = new Map<Tensor, Tensor>();
  for (const call of graph.calls) {
    const { op, inputs, outputs, params, sizes, scope } = call;
    const [x, w] = inputs;
    if (op === "attention") {
      next.within(scope, () => next.call(op, inputs, { ...params, pairs: 1 }, sizes, outputs));
      continue;
    }
    if (!PRODUCTS.has(op) || x.dtype !== "f32" || w.dtype !== "bf16") {
      next.push(call);
      continue;
    }
    next.within(scope, () => {
      const half = rounded.get(x) ?? next.call("castBf16", [x])[0];
      rounded.set(x, half);
      next.call(op, [half, ...inputs.slice(1)], params, sizes, outputs);
    });
  }
  return checked(next, "narrow");
}
