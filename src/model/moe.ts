/** The feed-forward half of a layer: one MLP, or a mixture of experts with a router and shared experts. */
import type { Graph, Tensor } from "../graph/graph.ts";
import { adapted, type Branches, type ExpertLinear, expertLinear, expertSlots, type Linear, linear } from "./linear.ts";

export interface MlpWeights<T = Tensor> {
  readonly gate: Linear<T>;
  readonly up: Linear<T>;
  readonly down: Linear<T>;
}

export interface MoeWeights<T = Tensor> {
  /** [experts, hidden], always float32: rounding it changes which experts are chosen. */
  readonly router: Linear<T>;
  /** [1, experts], always float32; affects which experts are chosen, not their weights (https://arxiv.org/abs/2408.15664). */
  readonly bias: T;
  /** Without biases. */
  readonly experts: { readonly gate: ExpertLinear<T>; readonly up: ExpertLinear<T>; readonly down: ExpertLinear<T> };
  /** The shared experts, fused into one MLP; null if there are none. */
  readonly shared: MlpWeights<T> | null;
  readonly chosen: number;
  readonly normMin: number;
}

/** The router's decision for each row. */
export interface Routing {
  /** [rows, experts] */
  readonly logits: Tensor;
  /** [rows, chosen] i32, best first */
  readonly experts: Tensor;
  /** [rows, chosen], summing to one */
  readonly weights: Tensor;
}

/** SwiGLU: down(silu(gate(x)) * up(x)). */
export function mlp(g: Graph, x: Tensor, { gate, up, down }: MlpWeights, branches: Branches = {}): Tensor {
  return linear(g, g.siluMul(linear(g, x, gate, branches), linear(g, x, up, branches)), down, branches);
}

/** Maps x [rows, hidden] to [rows, hidden], and returns the routing. */
export function moe(g: Graph, x: Tensor, w: MoeWeights, branches: Branches = {}): { y: Tensor; routing: Routing } {
  const router = adapted(g, w.router);
  const experts = router.shape[0];
  const routing = g.route(x, router, g.reshape(w.bias, [experts]), w.chosen, w.normMin);
  const slots = expertSlots(g, routing.experts, Number(experts), branches);
  const gate = expertLinear(g, x, w.experts.gate, slots, w.chosen, branches); // [chosen * rows, width]
  const up = expertLinear(g, x, w.experts.up, slots, w.chosen, branches);
  const down = expertLinear(g, g.siluMul(gate, up), w.experts.down, slots, 1, branches);
  const routed = g.combine(down, routing.weights);
  return { y: w.shared ? g.add(routed, mlp(g, x, w.shared, branches)) : routed, routing };
}
