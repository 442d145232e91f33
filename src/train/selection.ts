/** Which parameters of a model are trained, from names of layers, modules and experts. Knows no adapters. */
import { namesModule } from "../checkpoint/lora.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import { kindOf, layerOf, ranges } from "./trainee.ts";

export interface Selection {
  /** Layers: `20-27`, `0, 3-5`, or a list. Default: all, and what is outside of layers. */
  readonly layers?: string | readonly number[];
  /** Modules: parts of their names (`self_attn`, `mlp.experts`, `q_proj`), or a regular expression for whole names. Default: all. */
  readonly modules?: readonly string[] | string;
  /** Of routed experts' matrices, only these: all, or experts by layer. Default: all. */
  readonly experts?: "all" | Readonly<Record<string, readonly number[]>>;
  /** Layers that are not: `0-5`. With layer 0 the embeddings are frozen too. Default: none. */
  readonly freeze_layers?: string | readonly number[];
  /** Modules that are not, as `modules`. Default: none. */
  readonly freeze_modules?: readonly string[] | string;
  /** Modules outside of layers that are trained whatever else is chosen, such as a new head. Default: none. */
  readonly always?: readonly string[];
  /** Keep the routers' correction biases as states, so that a Trainer can update them by load. Default false. */
  readonly router_bias?: boolean;
}

export interface Selected {
  readonly trained: ReadonlySet<string>;
  /** Stacked parameters of which only some experts are trained. */
  readonly experts: ReadonlyMap<string, readonly number[]>;
}

/** Updated by another rule than the gradient, if at all. */
export const ROUTER_BIAS = /e_score_correction_bias$/;

/** Throws RangeError for a selection that matches nothing, listing what can be selected, and for layers and experts that do not exist. */
export function select(model: Model, selection: Selection): Selected {
  const { layers, modules, experts = "all", freeze_layers, freeze_modules, always = [] } = selection;
  const wanted = layers === undefined ? null : parseLayers(layers, model.layers);
  const frozen = freeze_layers === undefined ? [] : parseLayers(freeze_layers, model.layers);
  const byLayer =
    experts === "all"
      ? null
      : new Map(Object.entries(experts).map(([layer, ids]) => [checkedLayer(layer, model), checkedExperts(ids, layer, model)]));
  const trained = new Set<string>();
  const some = new Map<string, readonly number[]>();
  /** Whether the selection means a parameter, apart from the experts that it names. */
  const means = (p: ModelParameter): boolean => {
    if (p.kind === "adapter" || ROUTER_BIAS.test(p.name)) return false;
    const layer = layerOf(p.name);
    if (wanted && (layer === null || !wanted.includes(layer))) return false;
    if (frozen.includes(layer ?? (p.name === model.embedding ? 0 : -1))) return false;
    if (freeze_modules !== undefined && matches(freeze_modules, p.name)) return false;
    return modules === undefined || matches(modules, p.name);
  };
  for (const p of model.parameters) {
    if (!means(p)) continue;
    if (byLayer && p.experts !== undefined) {
      const ids = byLayer.get(layerOf(p.name) ?? -1);
      if (!ids || ids.length === 0) continue;
      if (ids.length < p.experts) some.set(p.name, ids);
    }
    trained.add(p.name);
  }
  if (trained.size === 0) {
    const kinds = [
      ...new Set(model.parameters.filter((p) => p.kind !== "adapter" && !ROUTER_BIAS.test(p.name)).map((p) => kindOf(p.name))),
    ];
    throw new RangeError(
      `the selection ${JSON.stringify({ layers, modules, experts: experts === "all" ? undefined : experts, freeze_layers, freeze_modules })} matches no parameter; layers are ${ranges([...Array(model.layers).keys()])}, modules ${kinds.join(", ")}`,
    );
  }
  for (const p of model.parameters) if (always.length > 0 && matches(always, p.name)) trained.add(p.name);
  return { trained, experts: some };
}

function matches(modules: readonly string[] | string, name: string): boolean {
  const module = name.replace(/\.(weight|bias)$/, "");
  if (typeof modules === "string") return namesModule(modules, module);
  return modules.some((part) => `.${module}.`.includes(`.${part}.`));
}

/** `0, 20-27` as numbers. Throws RangeError for what is no list of layers. */
export function parseLayers(text: string | readonly number[], count: number): number[] {
  const numbers =
    typeof text === "string"
      ? text.split(",").flatMap((part) => {
          const [, from, to = from] = /^\s*(\d+)(?:\s*-\s*(\d+))?\s*$/.exec(part) ?? [];
          if (from === undefined) throw new RangeError(`layers: '${part.trim()}' is neither a layer nor a range; write 20-27 or 0, 3`);
          const [a, b] = [Number(from), Number(to)];
          if (b < a || b >= count) throw new RangeError(`layers: '${part.trim()}' is outside of 0-${count - 1}`);
          return Array.from({ length: b - a + 1 }, (_, i) => a + i);
        })
      : [...text];
  const wrong = numbers.find((n) => !Number.isInteger(n) || n < 0 || n >= count);
  if (wrong !== undefined) throw new RangeError(`layers: ${wrong} is outside of 0-${count - 1}`);
  return [...new Set(numbers)].sort((a, b) => a - b);
}

function checkedLayer(layer: string, { mixtures }: Model): number {
  const number = Number(layer);
  if (!mixtures.layers.includes(number))
    throw new RangeError(
      `experts: layer ${layer} has no routed experts; ${mixtures.layers.length > 0 ? `layers ${ranges(mixtures.layers)} have` : "the model has none"}`,
    );
  return number;
}

function checkedExperts(ids: readonly number[], layer: string, { mixtures }: Model): readonly number[] {
  const wrong = Array.isArray(ids) ? ids.find((id) => !Number.isInteger(id) || id < 0 || id >= mixtures.experts) : ids;
  if (wrong !== undefined)
    throw new RangeError(`experts: layer ${layer} has no expert ${JSON.stringify(wrong)}; they are 0-${mixtures.experts - 1}`);
  return [...new Set(ids)].sort((a, b) => a - b);
}
