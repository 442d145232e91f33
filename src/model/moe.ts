/** The feed-forward half of a layer: one MLP, or a mixture of experts with a router and shared experts. */
import type { Graph, Tensor } from "../graph/graph.ts";
import { type Linear, linear } from "./linear.ts";

export interface MlpWeights {
  readonly gate: Linear;
  readonly up: Linear;
  readonly down: Linear;
}

export interface MoeWeights {
  /** [experts, hidden], float32 always: rounding it changes which experts are chosen. */
  readonly router: Tensor;
  /** [experts], float32 always; decides who is chosen, not with what weight (https://arxiv.org/abs/2408.15664). */
  readonly bias: Tensor;
  /** Matrices [experts, out, in]; they have no biases. */
  readonly experts: { readonly gate: Tensor; readonly up: Tensor; readonly down: Tensor };
  /** The shared experts, fused into one MLP; null where there are none. */
  readonly shared: MlpWeights | null;
  readonly chosen: number;
  readonly normMin: number;
}

/** What the router decided for each row. */
export interface Routing {
  /** [rows, experts] */
  readonly logits: Tensor;
  /** [rows, chosen] i32, best first */
  readonly experts: Tensor;
  /** [rows, chosen], summing to one */
  readonly weights: Tensor;
}

/** SwiGLU: down(silu(gate(x)) * up(x)). */
export function mlp(g: Graph, x: Tensor, { gate, up, down }: MlpWeights): Tensor {
  const plain = !gate.bias && !up.bias;
  return linear(g, plain ? g.gatedLinear(x, gate.weight, up.weight) : g.siluMul(linear(g, x, gate), linear(g, x, up)), down);
}

/** x [rows, hidden] to [rows, hidden], and how it was routed. */
export function moe(g: Graph, x: Tensor, w: MoeWeights): { y: Tensor; routing: Routing } {
  const routing = g.route(x, w.router, w.bias, w.chosen, w.normMin);
  const { order, offsets } = g.group(routing.experts, Number(w.router.shape[0]));
  const { gate, up, down } = w.experts;
  const h = g.groupedGatedLinear(x, gate, up, order, offsets, w.chosen); // [chosen * rows, width]
  const routed = g.combine(g.groupedLinear(h, down, order, offsets, 1), routing.weights);
  return { y: w.shared ? g.add(routed, mlp(g, x, w.shared)) : routed, routing };
}
