/** The mixture of experts: the router, the weighted sum of the experts' outputs, and their gradients. */
import { sameDim, sameShape, times } from "../../tensor/shape.ts";
import { FIRST_ORDER, type Op, WHOLE_NUMBERS } from "../call.ts";
import { f32, i32, matches } from "./shapes.ts";

export const EXPERT_OPS = {
  /**
   * The router: probabilities softmax(x . gate^T), then the `k` best by probability plus bias [experts], best first. Their
   * probabilities are divided by their sum, or by `normMin` if that is larger. Returns logits [rows, experts], experts [rows, k] i32,
   * weights [rows, k].
   */
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
    // The choice itself has no slope; the bias only affects the choice, and is updated by another rule than the gradient.
    gradient: (emit, { inputs: [x, gate], outputs: [logits, experts, weights], params }, [dLogits, , dWeights], [wantsX, wantsGate]) => {
      const chosen = dWeights && emit("routeGrad", [dWeights, logits, experts, weights], { normMin: params.normMin })[0];
      const d = chosen && dLogits ? emit("add", [chosen, dLogits])[0] : (chosen ?? dLogits);
      return [wantsX && d ? emit("linearT", [d, gate])[0] : null, wantsGate && d ? emit("outer", [d, x])[0] : null, null];
    },
    kept: "what routing chose must not be chosen again: a tie could fall the other way on another device",
  },
  /** The gradient of the router's logits [rows, experts], given that of the chosen experts' weights [rows, k]. */
  routeGrad: {
    params: ["normMin"],
    outputs: ([dWeights, logits, experts, weights]) =>
      matches(dWeights, "f32", 2) &&
      matches(logits, "f32", 2) &&
      matches(experts, "i32", 2) &&
      matches(weights, "f32", 2) &&
      sameShape(dWeights.shape, weights.shape) &&
      sameShape(experts.shape, weights.shape) &&
      sameDim(logits.shape[0], weights.shape[0])
        ? [f32(...logits.shape)]
        : null,
    gradient: FIRST_ORDER,
  },
  /**
   * For rows that have an adapter, `rows` [m] of the experts [rows, k], with adapters `ids` [m, 1]: the (adapter, expert) of each of their
   * expert slots as id * count + expert, [m, k] i32, and where these slots are among all, [k * m] i32.
   */
  adaptedSlots: {
    params: ["count"],
    outputs: ([experts, rows, ids]) =>
      matches(experts, "i32", 2) &&
      matches(rows, "i32", 1) &&
      matches(ids, "i32", 2) &&
      ids.shape[1] === 1 &&
      sameDim(rows.shape[0], ids.shape[0])
        ? [i32(rows.shape[0], experts.shape[1]), i32(times(rows.shape[0], Number(experts.shape[1])))]
        : null,
    gradient: WHOLE_NUMBERS,
  },
  /** The weighted sum of each row's expert slots: [k * rows, n], [rows, k] to [rows, n]. */
  combine: {
    outputs: ([slots, weights]) =>
      matches(slots, "f32", 2) && matches(weights, "f32", 2) && sameDim(slots.shape[0], times(weights.shape[0], Number(weights.shape[1])))
        ? [f32(weights.shape[0], slots.shape[1])]
        : null,
    gradient: (emit, { inputs: [slots, weights] }, [dy], [wantsSlots, wantsWeights]) => [
      wantsSlots && dy ? emit("spread", [dy, weights])[0] : null,
      wantsWeights && dy ? emit("slotDots", [dy, slots], { k: Number(weights.shape[1]) })[0] : null,
    ],
  },
  /** Each row times the weight of each of its slots: [rows, n], [rows, k] to [k * rows, n]. The gradient of `combine`'s slots. */
  spread: {
    outputs: ([dy, weights]) =>
      matches(dy, "f32", 2) && matches(weights, "f32", 2) && sameDim(dy.shape[0], weights.shape[0])
        ? [f32(times(dy.shape[0], Number(weights.shape[1])), dy.shape[1])]
        : null,
    gradient: FIRST_ORDER,
  },
  /** The dot product of each row with each of its slots: [rows, n], [k * rows, n] to [rows, k]. The gradient of `combine`'s weights. */
  slotDots: {
    params: ["k"],
    outputs: ([dy, slots], { k }) =>
      matches(dy, "f32", 2) &&
      matches(slots, "f32", 2) &&
      sameDim(slots.shape[0], times(dy.shape[0], k)) &&
      sameDim(dy.shape[1], slots.shape[1])
        ? [f32(dy.shape[0], k)]
        : null,
    gradient: FIRST_ORDER,
  },
} satisfies Record<string, Op>;
