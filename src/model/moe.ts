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
  /** Matrices [experts, out, in]. */
  readonly experts: MlpWeights;
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
export function mlp(g: Graph, x: Tensor, w: MlpWeights): Tensor {
  return linear(g, g.siluMul(linear(g, x, w.gate), linear(g, x, w.up)), w.down);
}

/** x [rows, hidden] to [rows, hidden], and how it was routed. */
export function moe(g: Graph, x: Tensor, w: MoeWeights): { y: Tensor; routing: Routing } {
  const routing = g.route(x, w.router, w.bias, w.chosen, w.normMin);
  const { order, offsets } = g.group(routing.experts, Number(w.router.shape[0]));
  const expert = (input: Tensor, m: Linear, slots: number) => g.groupedLinear(input, m.weight, order, offsets, slots, m.bias);
  const h = g.siluMul(expert(x, w.experts.gate, w.chosen), expert(x, w.experts.up, w.chosen)); // [chosen * rows, width]
  const routed = g.combine(expert(h, w.experts.down, 1), routing.weights);
  return { y: w.shared ? g.add(routed, mlp(g, x, w.shared)) : routed, routing };
}
