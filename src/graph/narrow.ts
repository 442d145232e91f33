/**
 * Mixed precision: products with bfloat16 matrices take activations rounded to bfloat16, which halves their work on processors that
 * multiply such pairs, and so do those of attention. Gradients are rounded likewise, and sums stay float32 (https://arxiv.org/abs/1905.12322).
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
    const count = op === "attention" ? 3 : PRODUCTS.has(op) && w.dtype === "bf16" ? 1 : 0;
    if (count === 0 || x.dtype !== "f32") {
      next.push(call);
      continue;
    }
    next.within(scope, () => {
      const halves = inputs.slice(0, count).map((t) => {
        const half = rounded.get(t) ?? next.call("castBf16", [t])[0];
        rounded.set(t, half);
        return half;
      });
      next.call(op, [...halves, ...inputs.slice(count)], params, sizes, outputs);
    });
  }
  return checked(next, "narrow");
}
