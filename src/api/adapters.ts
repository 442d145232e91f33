/** Adapters at run time: reads PEFT's folders into an engine, and gives models PEFT's methods. Trains nothing and merges nothing. */
import { type AdapterFolder, adaptersIn, openAdapter, readAdapter } from "../checkpoint/adapter.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import type { Branch, Branches, Engine } from "../engine/engine.ts";
import { COMBINATIONS, type Combination, combined } from "../engine/weighted.ts";
import type { ErnieConfig } from "../model/config.ts";
import { ernie } from "../model/ernie.ts";
import { optionFault } from "../tokenizer/options.ts";
import { HUB_OPTIONS, type HubOptions, resolveAdapter } from "./find.ts";

/** The longest name of an adapter: errors and metrics repeat it. */
const LONGEST_NAME = 200;
/** The most adapters in one combination. */
const MOST_COMBINED = 64;

/** What a model that generates cannot take from a folder. */
const HEAD = /^(?:.*\.)?score(\.|$)/;

/**
 * Reads an adapter for steps that mix adapters. Rejects with CheckpointError that names the file and the tensor or field: for a folder that is
 * no adapter, for one of another base, for numbers that are not finite, and for what only a merged model can compute; with RangeError for a rank
 * above the limit, before a number is read.
 * @param withHead the model takes a classifier's `score` from the folder; default false
 */
export async function readBranches(
  folder: string,
  config: ErnieConfig,
  limits: { readonly rank: number },
  withHead = false,
): Promise<Branches> {
  const adapter = await openAdapter(folder);
  const merge = (what: string) =>
    new CheckpointError(adapter.folder, `${what}, which cannot share steps with other adapters; merge it into its base (mixtape merge)`);
  if (adapter.config.use_dora || [...adapter.tensors.keys()].some((name) => name.endsWith(".lora_magnitude_vector")))
    throw merge("is a DoRA adapter");
  // PEFT lists modules that the model does not have, too: those leave no tensor.
  const saved = adapter.config.modules_to_save.find(
    (name) => !HEAD.test(name) && [...adapter.tensors.keys()].some((tensor) => `.${tensor}`.endsWith(`.${name}.weight`)),
  );
  if (saved !== undefined) throw merge(`replaces the module ${saved} as a whole (modules_to_save)`);
  const head = [...adapter.tensors.keys()].filter((name) => HEAD.test(name));
  if (head.length > 0 && !withHead)
    throw new CheckpointError(adapter.folder, "is a classifier: it has a head 'score'; load it with AutoModelForSequenceClassification");
  const tensors = new Map([...adapter.tensors].filter(([name]) => !HEAD.test(name)));
  const own: AdapterFolder = { ...adapter, tensors };
  if (tensors.size === 0) return new Map(); // only a head
  const found = adaptersIn(own);
  const parameters = ernie(config, found).parameters.filter((p) => p.kind === "adapter");
  const router = parameters.find((p) => p.branch?.module.endsWith(".mlp.gate"));
  if (router) throw merge(`adapts the router ${router.branch?.module}`);
  const ranks = parameters.map((p) => Number(p.shape[p.shape.length - (p.branch?.rankLast ? 1 : 2)]));
  const rank = ranks.reduce((most, each) => Math.max(most, each), 0);
  if (rank > limits.rank)
    throw new RangeError(`${adapter.folder}: an adapter of rank ${rank}, and max_lora_rank is ${limits.rank}; raise it if memory allows`);
  const values = await readAdapter(own, parameters);
  const branches = new Map<string, Branch>();
  const partNames = new Map(parameters.map(({ name, branch }) => [`${branch?.module} ${branch?.part}`, name]));
  for (const { branch, experts = 1 } of parameters) {
    if (branch?.part !== "a") continue;
    const { module, rankLast } = branch;
    const lowRank = found.at({ name: module, ...(experts > 1 || /\.experts\.(gate|up|down)_proj$/.test(module) ? { experts } : {}) });
    const [a, b] = ["a", "b"].map((part) => values.get(partNames.get(`${module} ${part}`) as string));
    if (!lowRank || !a || !b) throw new Error(`internal: ${module} was not read`);
    branches.set(module, { rank: lowRank.rank, scale: lowRank.scale, experts, a, b, ...(rankLast ? { table: true } : {}) });
  }
  return branches;
}

/** Throws a RangeError unless adapters may be called this. */
export function checkAdapterName(name: unknown): asserts name is string {
  if (typeof name === "string" && /^[\w.@-]+$/.test(name) && name.length <= LONGEST_NAME) return;
  throw new RangeError(`adapter_name is ${JSON.stringify(name)}; it must be 1 to ${LONGEST_NAME} letters, digits and . @ _ -`);
}

export interface LoadAdapterOptions extends HubOptions {
  /** Name for `set_adapter` and `generate`. One that exists is replaced. Default `default`. */
  readonly adapter_name?: string;
  /** Multiplies the adapter's own scale, lora_alpha / r. Default 1. */
  readonly scale?: number;
}

export interface WeightedAdapterOptions {
  readonly adapter_name: string;
  /** `cat`: exactly the weighted sum of what the adapters add. `linear`: PEFT's weighted sums of all A and all B. Default `cat`. */
  readonly combination_type?: Combination;
}

/** PEFT's methods on a loaded model. Requests with different adapters share steps; weights are never merged. */
export class RuntimeAdapters {
  readonly #engine: Engine;
  readonly #config: ErnieConfig;
  #active: string | null = null;

  constructor(engine: Engine, config: ErnieConfig) {
    this.#engine = engine;
    this.#config = config;
  }

  /** The adapter of calls that name none; null: the base model. */
  get active(): string | null {
    return this.#active;
  }

  get names(): readonly string[] {
    return this.#engine.adapters.names;
  }

  /** @param idOrFolder a folder of PEFT's format, or the hub id of one */
  async load(idOrFolder: string, options: LoadAdapterOptions = {}): Promise<void> {
    const { adapter_name: name = "default", scale = 1, ...hub } = options;
    const fault = optionFault("load_adapter", options, ["adapter_name", "scale", ...HUB_OPTIONS]);
    if (fault !== null) throw new RangeError(fault);
    checkAdapterName(name);
    checkWeight("scale", scale);
    const folder = await resolveAdapter(idOrFolder, hub);
    const branches = await readBranches(folder, this.#config, this.#engine.adapters.limits);
    await this.#engine.loadAdapter(name, scaled(branches, scale));
  }

  async addWeighted(
    names: readonly string[],
    weights: readonly number[],
    { adapter_name: name, combination_type: combination = "cat" }: WeightedAdapterOptions,
  ): Promise<void> {
    checkAdapterName(name);
    if (!COMBINATIONS.includes(combination))
      throw new RangeError(`combination_type '${combination}' is not known; known are ${COMBINATIONS.join(", ")}`);
    if (names.length === 0 || names.length > MOST_COMBINED || weights.length !== names.length)
      throw new RangeError(
        `${names.length} adapters with ${weights.length} weights: give one weight each, for 1 to ${MOST_COMBINED} adapters`,
      );
    for (const weight of weights) checkWeight("a weight", weight);
    const parts = names.map((each, i) => ({ name: each, branches: this.#engine.adapterBranches(each), weight: weights[i] }));
    await this.#engine.loadAdapter(name, combined(parts, combination));
  }

  set(name: string | null): void {
    if (name !== null) this.#check(name);
    this.#active = name;
  }

  delete(name: string): void {
    this.#engine.deleteAdapter(name);
    if (this.#active === name) this.#active = null;
  }

  /** The adapter of a call: the one that it names, none for null, else the active one. */
  of(named: string | null | undefined): { readonly adapter?: string } {
    const name = named === undefined ? this.#active : named;
    return name === null ? {} : { adapter: name };
  }

  #check(name: string): void {
    if (this.names.includes(name)) return;
    const known = this.names.length > 0 ? `there are ${this.names.join(", ")}` : "none is loaded";
    throw new RangeError(`there is no adapter '${name}'; ${known}`);
  }
}

/** The same branches, scaled once more. */
export function scaled(branches: Branches, by: number): Branches {
  return by === 1 ? branches : new Map([...branches].map(([module, branch]) => [module, { ...branch, scale: branch.scale * by }]));
}

function checkWeight(what: string, value: number): void {
  if (typeof value === "number" && Math.abs(value) <= 1e6) return;
  throw new RangeError(`${what} is ${String(value)}; it must be a number from -1e6 to 1e6`);
}
