/** Low-rank adapters with the API of PEFT: make, load, train, save and merge them. */
import type { State } from "../backend/backend.ts";
import {
  type Adaptable,
  adaptersIn,
  adaptersOf,
  checkCopies,
  openAdapter,
  readAdapter,
  selectedExperts,
  writeAdapter,
} from "../checkpoint/adapter.ts";
import { type AdapterConfig, parseAdapterConfig } from "../checkpoint/lora.ts";
import { ernie } from "../model/ernie.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import { elements } from "../tensor/shape.ts";
import { optionFault } from "../tokenizer/options.ts";
import { normal, Random } from "../train/random.ts";
import { kindOf, type Trainable, type Trainee, trainableLine, trainableTable } from "../train/trainee.ts";
import { SequenceClassifier } from "./classifier.ts";
import { HUB_OPTIONS, type HubOptions, resolveAdapter } from "./find.ts";
import type { GenerationOptions, ModelInputs } from "./generation.ts";
import type { LoadedModel } from "./load.ts";
import { adapterParameters, addProduct, branchesOf, HEAD_WEIGHT, lengthOf, mergedConfig, savedParameters } from "./merge.ts";
import { CausalLM, type GenerateOutput } from "./model.ts";
import { traineeOf, valuesOf, withStates } from "./tuning.ts";

export type LoraOptions = Partial<Omit<AdapterConfig, "target_modules" | "exclude_modules">> & {
  readonly target_modules?: readonly string[] | string | null;
  readonly exclude_modules?: readonly string[] | string | null;
  readonly bias?: "none";
};

/** The configuration of adapters, with PEFT's names and defaults. Throws for a field that is unknown, not supported or out of range. */
export class LoraConfig {
  readonly config: AdapterConfig;

  constructor(options: LoraOptions = {}) {
    const known = [...Object.keys(parseAdapterConfig({}, "LoraConfig")), "bias", "peft_type"];
    const fault = optionFault("LoraConfig", options, known);
    if (fault !== null) throw new RangeError(fault);
    this.config = parseAdapterConfig({ task_type: "CAUSAL_LM", ...options }, "LoraConfig");
  }
}

export interface CreateOptions {
  /** Of the adapters' first numbers. Default 42. */
  readonly seed?: number;
}

/** A model that adapters can be made for. */
type Base = CausalLM | SequenceClassifier;

/** A base model with adapters. It shares the base's weights; the base itself goes on without them. */
export class PeftModel<B extends Base = CausalLM> implements Trainable {
  /** The model without adapters. */
  readonly base_model: B;
  readonly peft_config: AdapterConfig;
  readonly #adapted: B;

  private constructor(base: B, config: AdapterConfig, adapted: LoadedModel) {
    this.base_model = base;
    this.peft_config = config;
    this.#adapted = modelOf(base, adapted);
  }

  /**
   * Loads adapters from a folder of PEFT's format, or from the hub.
   * @param idOrFolder a folder, or a hub id
   * @param options.is_trainable whether a Trainer may change them. Default false
   * @throws CheckpointError naming the tensor or field that does not fit the base, before any is loaded
   */
  static async from_pretrained<B extends Base = CausalLM>(
    base: B,
    idOrFolder: string,
    options: { readonly is_trainable?: boolean } & HubOptions = {},
  ): Promise<PeftModel<B>> {
    const fault = optionFault("PeftModel.from_pretrained", options, ["is_trainable", ...HUB_OPTIONS]);
    if (fault !== null) throw new RangeError(fault);
    const adapter = await openAdapter(await resolveAdapter(idOrFolder, options));
    const model = ernie(base.config, adaptersIn(adapter));
    const values = await readAdapter(adapter, ownParameters(model, adapter.config));
    const stored = new Map(base.loaded.weights.map(({ name, stored: dtype, parts }) => [name, { dtype, parts }]));
    await checkCopies(adapter, (name) => stored.get(name) ?? (name === HEAD_WEIGHT ? stored.get(model.embedding) : undefined));
    return new PeftModel(base, adapter.config, adapted(base, model, values, options.is_trainable ?? false));
  }

  /**
   * New adapters, to be trained. Those of a classifier come with its head, which is trained and saved as a whole. Throws RangeError, listing the
   * modules, if the configuration selects none.
   */
  static async create<B extends Base = CausalLM>(
    base: B,
    config: LoraConfig | LoraOptions,
    { seed = 42 }: CreateOptions = {},
  ): Promise<PeftModel<B>> {
    const { config: read } = config instanceof LoraConfig ? config : new LoraConfig(config);
    const classifies = base.config.classifier !== null;
    const chosen: AdapterConfig = {
      ...read,
      target_modules: read.target_modules ?? (read.target_parameters.length > 0 ? null : DEFAULT_TARGETS),
      base_model_name_or_path: read.base_model_name_or_path ?? base.folder,
      ...(classifies ? { task_type: "SEQ_CLS", modules_to_save: [...new Set([...HEADS, ...read.modules_to_save])] } : {}),
    };
    const model = ernie(base.config, adaptersOf(chosen));
    const parameters = adapterParameters(model);
    if (parameters.length === 0) {
      const kinds = [...new Set(modulesOf(ernie(base.config)).map(({ name }) => kindOf(name)))];
      throw new RangeError(
        `target_modules ${JSON.stringify(chosen.target_modules)} match no module of the model; it has ${kinds.join(", ")}`,
      );
    }
    const values = new Map(parameters.map((p) => [p.name, beginning(p, chosen, seed)]));
    for (const p of savedParameters(model, chosen)) values.set(p.name, await valuesOf(base.loaded, p.name));
    if (chosen.use_dora) await measure(base.loaded, model, chosen, values);
    return new PeftModel(base, chosen, adapted(base, model, values, true));
  }

  get config(): B["config"] {
    return this.base_model.config;
  }

  /** The engine of the model with its adapters. */
  get engine(): B["engine"] {
    return this.#adapted.engine;
  }

  /** As `CausalLM.generate`, with the adapters. */
  generate(options: ModelInputs & GenerationOptions & { readonly return_dict_in_generate: true }): Promise<GenerateOutput>;
  generate(options: ModelInputs & GenerationOptions): Promise<number[][]>;
  generate(options: ModelInputs & GenerationOptions): Promise<number[][] | GenerateOutput> {
    if (!(this.#adapted instanceof CausalLM)) throw new RangeError("generate: the model is a classifier; call forward");
    return this.#adapted.generate(options);
  }

  /** As the base's `forward`, with the adapters. */
  forward(options: Parameters<B["forward"]>[0]): ReturnType<B["forward"]> {
    return this.#adapted.forward(options as never) as ReturnType<B["forward"]>;
  }

  /** The model with its adapters, as one of the base's kind: for a pipeline, say. */
  get model(): B {
    return this.#adapted;
  }

  trainee(): Trainee {
    return traineeOf(this.#adapted.loaded);
  }

  /** The base's. */
  get objective(): Trainable["objective"] {
    return this.base_model instanceof SequenceClassifier ? this.base_model.objective : undefined;
  }

  /** The base without adapters, for training that compares with it. */
  reference(): Trainee {
    return traineeOf(this.base_model.loaded);
  }

  /** The line that PEFT prints; `table` adds the parameters by kind of module. */
  print_trainable_parameters(options: { readonly table?: boolean; readonly print?: (text: string) => void } = {}): void {
    const { print = console.log } = options;
    print(options.table ? trainableTable(this.trainee()) : trainableLine(this.trainee()));
  }

  /** Writes adapter_config.json and adapter_model.safetensors, each whole or not at all. */
  async save_pretrained(folder: string): Promise<void> {
    const { model, states } = this.#adapted.loaded;
    const parameters = ownParameters(model, this.peft_config).map((p) => ({ ...p, values: (states.get(p.name) as State).read() }));
    await writeAdapter(folder, this.peft_config, parameters, modulesOf(model));
  }

  /**
   * The base model with the adapters' products added to its matrices, which become float32. It shares the base's other weights; the base
   * stays as it is.
   */
  async merge_and_unload(): Promise<B> {
    const { loaded } = this.base_model;
    const { model, states } = this.#adapted.loaded;
    const { config, from } = mergedConfig(loaded.config, model);
    const merged = new Map(loaded.states);
    const put = (name: string, shape: readonly number[], values: Float32Array) => {
      const state = loaded.backend.state("f32", shape);
      state.write(values);
      merged.set(name, state);
    };
    for (const branch of branchesOf(model, this.peft_config, (name) => (states.get(name) as State).read())) {
      const values = await valuesOf(loaded, from(branch.weight));
      const each = values.length / (branch.experts ?? 1);
      for (let e = 0; e < (branch.experts ?? 1); e++) addProduct(values.subarray(e * each, (e + 1) * each), branch, e);
      put(branch.weight, branch.shape, values);
    }
    for (const { name, shape } of savedParameters(model, this.peft_config)) put(name, shape, (states.get(name) as State).read());
    const whole = config === loaded.config ? loaded.model : ernie(config);
    for (const { name, shape } of whole.parameters)
      if (from(name) !== name && !merged.has(name)) put(name, shape, await valuesOf(loaded, from(name)));
    return modelOf(this.base_model, withStates(loaded, whole, merged, { config, trained: new Set(), experts: new Map() }));
  }

  /** Frees the adapters and their engine. The base model stays. */
  async dispose(): Promise<void> {
    const { model, states, engine } = this.#adapted.loaded;
    await engine.close();
    for (const p of ownParameters(model, this.peft_config)) states.get(p.name)?.dispose();
  }
}

/** As `PeftModel.create`, by PEFT's name. */
export function get_peft_model<B extends Base = CausalLM>(
  base: B,
  config: LoraConfig | LoraOptions,
  options: CreateOptions = {},
): Promise<PeftModel<B>> {
  return PeftModel.create(base, config, options);
}

/** What PEFT trains and saves as a whole for SEQ_CLS; models have one of them. */
const HEADS = ["classifier", "score"];

/** Another model of the base's kind. */
function modelOf<B extends Base>(base: B, loaded: LoadedModel): B {
  return (base instanceof CausalLM ? new CausalLM(loaded) : new SequenceClassifier(loaded, null)) as B;
}

/** What an adapter's folder holds. */
function ownParameters(model: Model, config: AdapterConfig): ModelParameter[] {
  return [...adapterParameters(model), ...savedParameters(model, config)];
}

/** Gives magnitudes the lengths of the rows that they begin with, as PEFT does. */
async function measure(base: LoadedModel, model: Model, config: AdapterConfig, values: Map<string, Float32Array>): Promise<void> {
  for (const branch of branchesOf(model, config, (name) => values.get(name) as Float32Array)) {
    const matrices = await valuesOf(base, branch.weight);
    const name = branch.weight.replace(/\.weight$/, ".lora_magnitude_vector");
    const into = branch.shape[branch.shape.length - 1];
    const each = matrices.length / (branch.experts ?? 1);
    for (let e = 0; e < (branch.experts ?? 1); e++)
      addProduct(matrices.subarray(e * each, (e + 1) * each), { ...branch, magnitude: undefined }, e);
    const lengths = values.get(name) as Float32Array;
    for (let i = 0; i < lengths.length; i++) lengths[i] = lengthOf(matrices.subarray(i * into, (i + 1) * into));
  }
}

const EMBEDDING = "embed_tokens";

/** PEFT's usual choice for models of this kind. */
const DEFAULT_TARGETS = ["q_proj", "v_proj"];

/** Every module that can have an adapter. */
function modulesOf(model: Model): Adaptable[] {
  const own = model.parameters
    .filter((p) => p.kind === "matrix" || /\.mlp\.gate\.weight$/.test(p.name))
    .map(({ name, experts }) => ({ name: name.replace(/\.weight$/, ""), ...(experts ? { experts } : {}) }));
  // A head that shares the embedding's matrix is a module without a parameter of its own.
  const shares = model.classes === null && !own.some(({ name }) => name === "lm_head");
  return shares ? [...own, { name: "lm_head" }] : own;
}

function adapted(base: Base, model: Model, values: ReadonlyMap<string, Float32Array>, trains: boolean): LoadedModel {
  const { loaded } = base;
  const states = new Map(loaded.states);
  for (const { name, shape } of model.parameters) {
    const own = values.get(name);
    if (!own) continue;
    const state = loaded.backend.state("f32", shape);
    state.write(own);
    states.set(name, state);
  }
  const trained = new Set(trains ? values.keys() : []);
  return withStates(loaded, model, states, { trained, experts: new Map() });
}

/** The first numbers of an adapter's matrix, as PEFT draws them; zero for experts that are not selected, which then stay zero. */
function beginning({ name, shape, experts, branch }: ModelParameter, config: AdapterConfig, seed: number): Float32Array {
  const values = new Float32Array(elements(shape));
  if (!branch || branch.part === "magnitude") return values; // measured when the others have begun
  const [rank, into] = shape.slice(-2);
  const { init_lora_weights: how } = config;
  const random = new Random(seed, name);
  if (branch.module.endsWith(EMBEDDING)) {
    // As in PEFT: of a table's pair it is A that begins with zeros, and B is normal whatever the others' beginning.
    return branch.part === "a" && how !== false ? values : values.map(() => normal(random));
  }
  if (branch.part === "b" && how !== false) return values;
  const bound = 1 / Math.sqrt(into); // torch's default for a linear layer: Kaiming's uniform with a = sqrt(5)
  const draw = how === "gaussian" ? () => normal(random) / rank : () => (2 * random.real() - 1) * bound;
  const module: Adaptable = { name: branch.module, experts };
  const chosen = experts === undefined ? [0] : selectedExperts(config, module);
  if (config.use_dora && chosen.length < (experts ?? 1))
    throw new RangeError(`use_dora: ${module.name} has magnitudes for all of its experts or for none; select all ${experts}`);
  const each = values.length / (experts ?? 1);
  for (const e of chosen) for (let i = 0; i < each; i++) values[e * each + i] = draw();
  return values;
}
