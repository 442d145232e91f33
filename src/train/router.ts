/** What training does about routers: losses that balance and restrain them, counts of what they chose, and the update of their biases. */
import type { Numbers, State } from "../backend/backend.ts";
import type { Graph, Tensor } from "../graph/graph.ts";
import type { Forward } from "../model/model.ts";
import type { Trainee } from "./trainee.ts";

export interface RouterOptions {
  /** Weight of the load-balancing loss (https://arxiv.org/abs/2101.03961, equation 4). 0: none. */
  readonly aux: number;
  /** Weight of the z-loss (https://arxiv.org/abs/2202.08906, equation 5). 0: none. */
  readonly z: number;
  /** How far a step moves the correction biases (https://arxiv.org/abs/2408.15664, algorithm 1). 0: not at all. */
  readonly biasRate: number;
}

/** The input by which a batch's losses of the routers are multiplied: its share of the step. */
const SHARE = "router.share";
const [AUX, Z] = ["router.aux", "router.z"];
const offsetsName = (layer: number) => `router.offsets.${layer}`;

/**
 * Outputs the routers' losses of a batch, where either counts, and returns them. Both are means over all tokens of all mixture layers together. The
 * load-balancing loss is that of transformers' `load_balancing_loss_func`: experts * sum of f_e * P_e, where f_e is the share of tokens that have
 * e among their largest logits, the correction bias left out, and P_e its mean probability.
 */
export function routerLosses(g: Graph, { routing }: Forward, { aux, z }: RouterOptions): { balance: Tensor; restraint: Tensor } | null {
  if (routing.length === 0 || (aux === 0 && z === 0)) return null;
  const layers = routing.map(({ logits, experts }) => g.routerLoad(logits, Number(experts.shape[1])));
  const mean = (values: readonly Tensor[]) =>
    g.scale(
      values.reduce((a, b) => g.add(a, b)),
      1 / layers.length,
    );
  const count = Number(routing[0].logits.shape[1]);
  const balance = g.scale(g.dot(mean(layers.map((l) => l.load)), mean(layers.map((l) => l.probability))), count);
  const restraint = mean(layers.map((l) => l.z));
  g.output(AUX, balance);
  g.output(Z, restraint);
  return { balance, restraint };
}

/** Adds the routers' losses to `loss`, and outputs for `Routers`. */
export function routedLoss(g: Graph, loss: Tensor, forward: Forward, options: RouterOptions): Tensor {
  for (const { layer, logits, experts } of forward.routing) g.output(offsetsName(layer), g.group(experts, Number(logits.shape[1])).offsets);
  const losses = routerLosses(g, forward, options);
  if (!losses) return loss;
  const share = g.input(SHARE, [1], "f32");
  const parts = [
    [options.aux, losses.balance],
    [options.z, losses.restraint],
  ] as const;
  return parts.reduce((sum, [by, part]) => (by === 0 ? sum : g.add(sum, g.scale(g.dot(part, share), by))), loss);
}

/** The routers' losses of a batch, by the names of the log, and what they add to its loss. */
export interface RouterLosses {
  readonly aux_loss: number;
  readonly router_z_loss: number;
  readonly added: number;
}

/** The routers' losses of an evaluation. */
export class EvaluatedRouters {
  #sums: RouterLosses | null = null;
  #count = 0;

  add({ routers, count }: { readonly routers: RouterLosses | null; readonly count: number }): void {
    if (!routers) return;
    const before = this.#sums ?? { aux_loss: 0, router_z_loss: 0, added: 0 };
    this.#sums = {
      aux_loss: before.aux_loss + routers.aux_loss * count,
      router_z_loss: before.router_z_loss + routers.router_z_loss * count,
      added: before.added + routers.added * count,
    };
    this.#count += count;
  }

  /** Entries of the log; `eval_loss` has the routers' in it, as the training loss has. @param loss without them */
  losses(loss: number): Record<string, number> {
    if (!this.#sums) return { eval_loss: loss };
    const { aux_loss, router_z_loss, added } = this.#sums;
    const count = Math.max(1, this.#count);
    return {
      eval_loss: loss + added / count,
      eval_task_loss: loss,
      eval_aux_loss: aux_loss / count,
      eval_router_z_loss: router_z_loss / count,
    };
  }
}

/** The routers of a model under training. */
export class Routers {
  readonly #options: RouterOptions;
  readonly #experts: number;
  /** Slots of each expert in the current step, by layer. */
  readonly #loads: ReadonlyMap<number, Float64Array>;
  readonly #biases: ReadonlyMap<number, State>;
  readonly #offsets: ReadonlyMap<number, Int32Array>;
  readonly #losses: Readonly<Record<string, Float32Array>>;
  #sums = { aux: 0, z: 0 };

  /** Throws a RangeError for biases that are to be updated and are no states. */
  constructor({ model, states }: Trainee, options: RouterOptions) {
    const { layers, experts } = model.mixtures;
    this.#options = options;
    this.#experts = experts;
    this.#loads = new Map(layers.map((layer) => [layer, new Float64Array(experts)]));
    this.#offsets = new Map(layers.map((layer) => [layer, new Int32Array(experts + 1)]));
    const losses = layers.length > 0 && (options.aux > 0 || options.z > 0);
    this.#losses = losses ? { [AUX]: new Float32Array(1), [Z]: new Float32Array(1) } : {};
    const wanted = options.biasRate > 0 ? layers : [];
    this.#biases = new Map(
      wanted.map((layer) => {
        const state = states.get(`model.layers.${layer}.mlp.moe_statics.e_score_correction_bias`);
        if (!state)
          throw new RangeError(
            "router_bias_update_rate: the routers' biases belong to the base model, which stays as it is under adapters; train the model itself, after trainable({ router_bias: true })",
          );
        return [layer, state];
      }),
    );
    const named = Object.entries({ aux: options.aux, z: options.z, bias: options.biasRate }).find(([, rate]) => rate > 0);
    if (layers.length === 0 && named) throw new RangeError("router_...: the model has no routed experts");
  }

  /** Arrays for a run's outputs. */
  get outputs(): Record<string, Numbers> {
    return { ...this.#losses, ...Object.fromEntries([...this.#offsets].map(([layer, offsets]) => [offsetsName(layer), offsets])) };
  }

  /** Of an evaluation, which counts no loads. */
  get evaluationOutputs(): Record<string, Float32Array> {
    return this.#losses;
  }

  /** The losses of the batch that was run last, and what they add to its loss; null: none do. */
  get losses(): RouterLosses | null {
    if (!(AUX in this.#losses)) return null;
    const [aux_loss, router_z_loss] = [this.#losses[AUX][0], this.#losses[Z][0]];
    return { aux_loss, router_z_loss, added: this.#options.aux * aux_loss + this.#options.z * router_z_loss };
  }

  /** @param share of the batch in its step */
  inputs(share: number): Record<string, Numbers> {
    return AUX in this.#losses ? { [SHARE]: Float32Array.of(share) } : {};
  }

  begin(): void {
    for (const load of this.#loads.values()) load.fill(0);
    this.#sums = { aux: 0, z: 0 };
  }

  /** Takes note of a batch that was run. */
  add(share: number): void {
    for (const [layer, offsets] of this.#offsets) {
      const load = this.#loads.get(layer) as Float64Array;
      for (let e = 0; e < load.length; e++) load[e] += offsets[e + 1] - offsets[e];
    }
    if (!(AUX in this.#losses)) return;
    this.#sums.aux += share * this.#losses[AUX][0];
    this.#sums.z += share * this.#losses[Z][0];
  }

  /**
   * Moves the biases, if wanted, and returns measures of the step: losses, and the load of the busiest and the idlest expert.
   * @param loss the step's, with the routers'
   */
  end(loss: number): Record<string, number> {
    let [most, least] = [0, 0];
    for (const [layer, load] of this.#loads) {
      const mean = load.reduce((a, b) => a + b, 0) / this.#experts;
      most += load.reduce((a, b) => Math.max(a, b)) / mean / this.#loads.size;
      least += load.reduce((a, b) => Math.min(a, b)) / mean / this.#loads.size;
      const state = this.#biases.get(layer);
      if (state) state.write(moved(state.read(), load, mean, this.#options.biasRate));
    }
    if (this.#loads.size === 0) return {};
    return {
      ...(AUX in this.#losses
        ? {
            aux_loss: this.#sums.aux,
            router_z_loss: this.#sums.z,
            task_loss: loss - this.#options.aux * this.#sums.aux - this.#options.z * this.#sums.z,
          }
        : {}),
      expert_load_max: most,
      expert_load_min: least,
    };
  }
}

/** b + u * sign(mean load - load). */
export function moved(bias: Float32Array, load: ArrayLike<number>, mean: number, rate: number): Float32Array {
  return bias.map((b, e) => b + rate * Math.sign(mean - load[e]));
}
