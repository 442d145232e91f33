/** Low-rank adapters with the API of PEFT: make, load, train, save and merge them. */
import type { State } from "../backend/backend.ts";
import { type Adaptable, adaptersIn, adaptersOf, openAdapter, readAdapter, selectedExperts, writeAdapter } from "../checkpoint/adapter.ts";
import { type AdapterConfig, parseAdapterConfig } from "../checkpoint/lora.ts";
import { ernie } from "../model/ernie.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import { elements } from "../tensor/shape.ts";
import { optionFault } from "../tokenizer/options.ts";
import { Random } from "../train/random.ts";
import { kindOf, type Trainable, type Trainee, trainableLine, trainableTable } from "../train/trainee.ts";
import type { GenerationOptions, ModelInputs } from "./generation.ts";
import type { LoadedModel } from "./load.ts";
import { adapterParameters, addProduct, branchesOf, refuseParts } from "./merge.ts";
import { CausalLM, type CausalLMOutput, type ForwardOptions, type GenerateOutput } from "./model.ts";
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

/** A base model with adapters. It shares the base's weights; the base itself goes on without them. */
export class PeftModel implements Trainable {
  /** The model without adapters. */
  readonly base_model: CausalLM;
  readonly peft_config: AdapterConfig;
  readonly #adapted: CausalLM;

  private constructor(base: CausalLM, config: AdapterConfig, adapted: LoadedModel) {
    this.base_model = base;
    this.peft_config = config;
    this.#adapted = new CausalLM(adapted);
  }

  /**
   * Loads adapters from a folder of PEFT's format.
   * @param options.is_trainable whether a Trainer may change them. Default false
   * @throws CheckpointError naming the tensor or field that does not fit the base, before any is loaded
   */
  static async from_pretrained(base: CausalLM, folder: string, options: { readonly is_trainable?: boolean } = {}): Promise<PeftModel> {
    const fault = optionFault("PeftModel.from_pretrained", options, ["is_trainable"]);
    if (fault !== null) throw new RangeError(fault);
    const adapter = await openAdapter(folder);
    refuseParts(adapter.config);
    const model = ernie(base.config, adaptersIn(adapter));
    const values = await readAdapter(adapter, adapterParameters(model));
    return new PeftModel(base, adapter.config, adapted(base, model, values, options.is_trainable ?? false));
  }

  /** New adapters, to be trained. Throws RangeError, listing the modules, if the configuration selects none. */
  static async create(base: CausalLM, config: LoraConfig | LoraOptions, { seed = 42 }: CreateOptions = {}): Promise<PeftModel> {
    const { config: read } = config instanceof LoraConfig ? config : new LoraConfig(config);
    refuseParts(read);
    const chosen = { ...read, target_modules: read.target_modules ?? (read.target_parameters.length > 0 ? null : DEFAULT_TARGETS) };
    const model = ernie(base.config, adaptersOf(chosen));
    const parameters = adapterParameters(model);
    if (parameters.length === 0) {
      const kinds = [...new Set(modulesOf(ernie(base.config)).map(({ name }) => kindOf(name)))];
      throw new RangeError(
        `target_modules ${JSON.stringify(chosen.target_modules)} match no module of the model; it has ${kinds.join(", ")}`,
      );
    }
    const values = new Map(parameters.map((p) => [p.name, beginning(p, chosen, seed)]));
    return new PeftModel(
      base,
      { ...chosen, base_model_name_or_path: read.base_model_name_or_path ?? base.folder },
      adapted(base, model, values, true),
    );
  }

  get config(): CausalLM["config"] {
    return this.base_model.config;
  }

  /** The engine of the model with its adapters. */
  get engine(): CausalLM["engine"] {
    return this.#adapted.engine;
  }

  /** As `CausalLM.generate`, with the adapters. */
  generate(options: ModelInputs & GenerationOptions & { readonly return_dict_in_generate: true }): Promise<GenerateOutput>;
  generate(options: ModelInputs & GenerationOptions): Promise<number[][]>;
  generate(options: ModelInputs & GenerationOptions): Promise<number[][] | GenerateOutput> {
    return this.#adapted.generate(options);
  }

  /** As `CausalLM.forward`, with the adapters. */
  forward(options: ForwardOptions): Promise<CausalLMOutput> {
    return this.#adapted.forward(options);
  }

  trainee(): Trainee {
    return traineeOf(this.#adapted.loaded);
  }

  /** The line that PEFT prints; `table` adds the parameters by kind of module. */
  print_trainable_parameters(options: { readonly table?: boolean; readonly print?: (text: string) => void } = {}): void {
    const { print = console.log } = options;
    print(options.table ? trainableTable(this.trainee()) : trainableLine(this.trainee()));
  }

  /** Writes adapter_config.json and adapter_model.safetensors, each whole or not at all. */
  async save_pretrained(folder: string): Promise<void> {
    const { model, states } = this.#adapted.loaded;
    const parameters = adapterParameters(model).map((p) => ({ ...p, values: (states.get(p.name) as State).read() }));
    await writeAdapter(folder, this.peft_config, parameters, modulesOf(model));
  }

  /**
   * The base model with the adapters' products added to its matrices, which become float32. It shares the base's other weights; the base
   * stays as it is.
   */
  async merge_and_unload(): Promise<CausalLM> {
    const { loaded } = this.base_model;
    const { model, states } = this.#adapted.loaded;
    const merged = new Map(loaded.states);
    for (const branch of branchesOf(model, this.peft_config, (name) => (states.get(name) as State).read())) {
      const { weight: name, shape } = branch;
      const state = loaded.backend.state("f32", shape);
      const values = await valuesOf(loaded, name);
      const each = values.length / (branch.experts ?? 1);
      for (let e = 0; e < (branch.experts ?? 1); e++) addProduct(values.subarray(e * each, (e + 1) * each), branch, e);
      state.write(values);
      merged.set(name, state);
    }
    return new CausalLM(withStates(loaded, loaded.model, merged, { trained: new Set(), experts: new Map() }));
  }

  /** Frees the adapters and their engine. The base model stays. */
  async dispose(): Promise<void> {
    await this.#adapted.engine.close();
    for (const p of adapterParameters(this.#adapted.loaded.model)) this.#adapted.loaded.states.get(p.name)?.dispose();
  }
}

/** As `PeftModel.create`, by PEFT's name. */
export function get_peft_model(base: CausalLM, config: LoraConfig | LoraOptions, options: CreateOptions = {}): Promise<PeftModel> {
  return PeftModel.create(base, config, options);
}

/** PEFT's usual choice for models of this kind. */
const DEFAULT_TARGETS = ["q_proj", "v_proj"];

/** Every module that can have an adapter. */
function modulesOf(model: Model): Adaptable[] {
  return model.parameters
    .filter((p) => (p.kind === "matrix" || /\.mlp\.gate\.weight$/.test(p.name)) && !/(^|\.)(embed_tokens|lm_head)\./.test(p.name))
    .map(({ name, experts }) => ({ name: name.replace(/\.weight$/, ""), ...(experts ? { experts } : {}) }));
}

function adapted(base: CausalLM, model: Model, values: ReadonlyMap<string, Float32Array>, trains: boolean): LoadedModel {
  const { loaded } = base;
  const states = new Map(loaded.states);
  for (const p of adapterParameters(model)) {
    const state = loaded.backend.state("f32", p.shape);
    state.write(values.get(p.name) as Float32Array);
    states.set(p.name, state);
  }
  const trained = new Set(trains ? values.keys() : []);
  return withStates(loaded, model, states, { trained, experts: new Map() });
}

/** The first numbers of an adapter's matrix, as PEFT draws them; zero for experts that are not selected, which then stay zero. */
function beginning({ name, shape, experts }: ModelParameter, config: AdapterConfig, seed: number): Float32Array {
  const values = new Float32Array(elements(shape));
  const [rank, into] = shape.slice(-2);
  const half = name.endsWith(".lora_A.weight") ? "A" : "B";
  const { init_lora_weights: how } = config;
  if (half === "B" && how !== false) return values;
  const random = new Random(seed, name);
  const bound = 1 / Math.sqrt(into); // torch's default for a linear layer: Kaiming's uniform with a = sqrt(5)
  const draw = how === "gaussian" ? () => normal(random) / rank : () => (2 * random.real() - 1) * bound;
  const module: Adaptable = { name: name.replace(/\.lora_[AB]\.weight$/, ""), experts };
  const chosen = experts === undefined ? [0] : selectedExperts(config, module);
  const each = values.length / (experts ?? 1);
  for (const e of chosen) for (let i = 0; i < each; i++) values[e * each + i] = draw();
  return values;
}

/** Box and Muller's transform. */
function normal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random.real())) * Math.cos(2 * Math.PI * random.real());
}
