/** The model with the API of transformers: `from_pretrained`, `generate`, `forward`. Knows no messages. */
import { CheckpointError } from "../checkpoint/error.ts";
import type { Inspection } from "../engine/engine.ts";
import type { GeneratedToken } from "../engine/sequence.ts";
import type { ErnieConfig } from "../model/config.ts";
import { optionFault } from "../tokenizer/options.ts";
import { StopStrings } from "../tokenizer/stops.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { Selection } from "../train/selection.ts";
import type { Trainee } from "../train/trainee.ts";
import { type LoadAdapterOptions, RuntimeAdapters, type WeightedAdapterOptions } from "./adapters.ts";
import { answerRows } from "./answers.ts";
import { constrainBy } from "./constraint.ts";
import type { GenerationDefaults } from "./defaults.ts";
import { HUB_OPTIONS, type HubOptions, resolveWhole } from "./find.ts";
import { type GenerationOptions, type ModelInputs, readRows, resolveGeneration } from "./generation.ts";
import { type LoadedModel, type LoadOptions, loadModel } from "./load.ts";
import { saveModel, traineeOf, unfrozen } from "./tuning.ts";

/** How to find and load a model: a folder, a hub id, or `default` for the bundled model. */
export interface PretrainedOptions extends LoadOptions, HubOptions {
  /** Same as `device`; `auto` is the CPU. */
  readonly device_map?: string;
}

/** A tensor: its dimensions and its numbers, row-major. */
export interface NamedTensor<T = Float32Array> {
  readonly dims: readonly number[];
  readonly data: T;
}

export interface ForwardOptions extends ModelInputs {
  readonly output_hidden_states?: boolean;
  readonly output_router_logits?: boolean;
  /** The name of a loaded adapter; null: the base model. Default: the active one. */
  readonly adapter?: string | null;
}

/** Padded positions hold zeros. `length` is that of the longest row. */
export interface CausalLMOutput {
  /** [batch, length, vocab] */
  readonly logits: NamedTensor;
  /** [batch, length, hidden] before each layer, the last after the final norm. */
  readonly hidden_states?: readonly NamedTensor[];
  /** One entry per mixture layer, with the tokens of all rows: [batch * length, ...]. */
  readonly router_logits?: readonly RouterOutput[];
}

export interface RouterOutput {
  /** Index of the decoder layer, from 0. */
  readonly layer: number;
  /** [tokens, experts] */
  readonly logits: NamedTensor;
  /** [tokens, chosen], best first. */
  readonly experts: NamedTensor<Int32Array>;
  /** [tokens, chosen], summing to one. */
  readonly weights: NamedTensor;
}

/** Result of `generate` with `return_dict_in_generate`. One entry per answer; answers to the same prompt are consecutive. */
export interface GenerateOutput {
  /** Prompt and answer. */
  readonly sequences: number[][];
  /** Natural logarithm of each new token's probability by the model alone, before sampling controls. */
  readonly logprobs: number[][];
  /** With `top_logprobs`: the alternatives of each new token, likeliest first. */
  readonly top_logprobs?: { id: number; logprob: number }[][][];
  /** `stop`: an end token or stop string; `length`: the length limit. */
  readonly finish_reasons: ("stop" | "length")[];
}

const PRETRAINED = [
  ...HUB_OPTIONS,
  "device_map",
  "dtype",
  "threads",
  "device",
  "isa",
  "kv_cache_dtype",
  "kv_cache_tokens",
  "weights",
  "chunk_size",
  "prefix_cache",
  "max_sequences",
  "max_loras",
  "max_lora_rank",
  "warning_callback",
] as const satisfies readonly (keyof PretrainedOptions)[];
const FORWARD = [
  "input_ids",
  "attention_mask",
  "output_hidden_states",
  "output_router_logits",
  "adapter",
] as const satisfies readonly (keyof ForwardOptions)[];
/** Options of other libraries, and what takes their place. */
const REMEDIES: Readonly<Record<string, string>> = {
  torch_dtype: "give dtype",
  load_in_8bit: "give dtype: 'int8'",
  load_in_4bit: "give dtype: 'int4'",
  quantization_config: "give dtype: 'int8' or 'int4'",
  quantized: "give dtype: 'int8' or 'int4'",
  trust_remote_code: "code of a repository is never run; leave it out",
  use_auth_token: "give token",
  subfolder: "give the folder itself",
  use_safetensors: "only safetensors and GGUF are read; leave it out",
  attn_implementation: "there is one; leave it out",
  low_cpu_mem_usage: "weights are always mapped; leave it out",
  use_fast: "there is one tokenizer; leave it out",
};

/** Throws RangeError for an option of `from_pretrained` that does not exist, saying what to use. */
export function checkPretrained(options: PretrainedOptions): void {
  const fault = optionFault("from_pretrained", options, PRETRAINED, REMEDIES);
  if (fault !== null) throw new RangeError(fault);
}

/** Loads causal language models. */
export const AutoModelForCausalLM = {
  /**
   * Loads a model from a folder, a hub id, or `default`; of an adapter, the base that it names, with the adapter loaded and active. Rejects with
   * a one-line error that says what is wrong with files, config or options, before anything runs.
   */
  async from_pretrained(idOrFolder: string, options: PretrainedOptions = {}): Promise<CausalLM> {
    checkPretrained(options);
    const { folder, adapter } = await resolveWhole(idOrFolder, options);
    const loaded = await loadModel(folder, { ...options, device: options.device ?? options.device_map });
    if (loaded.config.classifier) {
      await loaded.engine.dispose();
      throw new CheckpointError(folder, "is a classifier; load it with AutoModelForSequenceClassification");
    }
    const model = new CausalLM(loaded);
    if (adapter === null) return model;
    try {
      await model.load_adapter(adapter);
      model.set_adapter(ALONE);
      return model;
    } catch (error) {
      await model.dispose();
      throw error;
    }
  },
};

/** What an adapter that was given alone is called, as in PEFT. */
const ALONE = "default";

export class CausalLM {
  /** The model's folder. */
  readonly folder: string;
  readonly config: ErnieConfig;
  /** generation_config.json as it is. */
  readonly generation_config: Readonly<Record<string, unknown>>;
  /** What generation_config.json sets for `generate`. */
  readonly defaults: GenerationDefaults;
  /** What computes, for display: `avx512bf16, 2 threads`, or `cuda:0, NVIDIA H200`. */
  readonly device: string;
  /** The underlying engine: `submit` streams tokens of many concurrent requests. */
  get engine(): LoadedModel["engine"] {
    return this.#parts.engine;
  }
  #parts: LoadedModel;
  #adapters: RuntimeAdapters;

  constructor(loaded: LoadedModel) {
    const { config, checkpoint, defaults, backend } = loaded;
    this.folder = checkpoint.folder;
    this.config = config;
    this.generation_config = checkpoint.generationConfig ?? {};
    this.defaults = defaults;
    this.#parts = loaded;
    this.#adapters = new RuntimeAdapters(loaded.engine, config);
    this.device = backend.device;
  }

  /**
   * Continues prompts. Returns one sequence per answer, prompt included as given; sequences are not padded to one length.
   * Rejects with RangeError for an empty prompt, ids outside the vocabulary, a prompt that is too long, options that make no
   * sense, or a `response_format` that can't be enforced.
   */
  generate(options: ModelInputs & GenerationOptions & { readonly return_dict_in_generate: true }): Promise<GenerateOutput>;
  generate(options: ModelInputs & GenerationOptions): Promise<number[][]>;
  async generate(options: ModelInputs & GenerationOptions): Promise<number[][] | GenerateOutput> {
    const settings = resolveGeneration(options, this.defaults, this.config);
    const rows = readRows(options);
    const { tokenizer } = options;
    const answers = await answerRows(this.engine, this.config.vocabSize, rows, {
      settings,
      options,
      ...this.adapterOf(options.adapter),
      constrain: constrainBy(settings, { kind: "tokens", tokens: [] }, this.config, tokenizer),
      watch: tokenizer ? stopsAt(settings.stopStrings, tokenizer) : null,
    });
    const sequences = answers.map((a) => [...a.row.given, ...a.tokens.map((t) => t.id)]);
    if (!options.return_dict_in_generate) return sequences;
    return {
      sequences,
      logprobs: answers.map((a) => a.tokens.map((t) => t.logprob)),
      ...(options.top_logprobs ? { top_logprobs: answers.map((a) => a.top) } : {}),
      finish_reasons: answers.map((a) => a.finish),
    };
  }

  /** Logits of every position and, on request, hidden states and routing. Has no side effects on other requests. */
  async forward(options: ForwardOptions): Promise<CausalLMOutput> {
    const fault = optionFault("forward", options, FORWARD);
    if (fault !== null) throw new RangeError(fault);
    const rows = readRows(options);
    const want = { hiddenStates: options.output_hidden_states, routing: options.output_router_logits };
    const length = Math.max(...rows.map((r) => r.given.length));
    const each: Inspection[] = [];
    for (const row of rows) each.push(await this.engine.inspect(row.tokens, want, this.adapterOf(options.adapter)));
    const place = <T extends Float32Array | Int32Array>(parts: readonly T[], dims: (width: number) => number[]): NamedTensor<T> => {
      const width = parts[0].length / rows[0].tokens.length;
      const size = rows.length * length * width;
      const data = (parts[0] instanceof Int32Array ? new Int32Array(size) : new Float32Array(size)) as T;
      parts.forEach((p, i) => {
        data.set(p, (i * length + rows[i].start) * width);
      });
      return { dims: dims(width), data };
    };
    const batched = (parts: readonly Float32Array[]) => place(parts, (width) => [rows.length, length, width]);
    const flat = <T extends Float32Array | Int32Array>(parts: readonly T[]) => place(parts, (width) => [rows.length * length, width]);
    return {
      logits: batched(each.map((e) => e.logits)),
      ...(want.hiddenStates ? { hidden_states: each[0].hiddenStates.map((_, i) => batched(each.map((e) => e.hiddenStates[i]))) } : {}),
      ...(want.routing
        ? {
            router_logits: each[0].routing.map(({ layer }, i) => ({
              layer,
              logits: flat(each.map((e) => e.routing[i].logits)),
              experts: flat(each.map((e) => e.routing[i].experts)),
              weights: flat(each.map((e) => e.routing[i].weights)),
            })),
          }
        : {}),
    };
  }

  /**
   * Loads a LoRA adapter from a folder in PEFT's format, under a name. As in PEFT it is not active until `set_adapter`; calls can name it.
   * Loading never disturbs requests that run. Rejects with CheckpointError or RangeError, in one line, for a folder that is no adapter or
   * belongs to another base, and for DoRA, router adapters and `modules_to_save`, which need a merged model.
   */
  load_adapter(idOrFolder: string, options: LoadAdapterOptions = {}): Promise<void> {
    return this.#adapters.load(idOrFolder, options);
  }

  /** Makes an adapter the one that calls use unless they name another; null: the base model. Throws RangeError if there is none. */
  set_adapter(name: string | null): void {
    this.#adapters.set(name);
  }

  /** Removes an adapter; requests that use it go on. Throws RangeError if there is none. */
  delete_adapter(name: string): void {
    this.#adapters.delete(name);
  }

  /** Makes an adapter of loaded ones, each with a weight. Rejects with RangeError for unknown names and ranks that do not fit. */
  add_weighted_adapter(names: readonly string[], weights: readonly number[], options: WeightedAdapterOptions): Promise<void> {
    return this.#adapters.addWeighted(names, weights, options);
  }

  /** The adapter that calls use unless they name another; null: the base model. */
  get active_adapter(): string | null {
    return this.#adapters.active;
  }

  /** Names of the loaded adapters. */
  get adapter_names(): readonly string[] {
    return this.#adapters.names;
  }

  /** The adapter of a call that names one, null, or nothing. */
  adapterOf(named: string | null | undefined): { readonly adapter?: string } {
    return this.#adapters.of(named);
  }

  /** Model, weights and backend, for adapters and trainers. */
  get loaded(): LoadedModel {
    return this.#parts;
  }

  /**
   * Chooses the parameters that a Trainer trains; they become float32 numbers beside the frozen weights, and `generate` follows them. Without a
   * choice a Trainer trains all but the routers' correction bias. Rejects with RangeError for a selection that matches nothing, listing
   * what there is, and once one was made.
   */
  async trainable(selection: Selection = {}): Promise<void> {
    this.#parts = await unfrozen(this.#parts, selection);
    this.#adapters = new RuntimeAdapters(this.engine, this.config);
  }

  /** What a Trainer trains. */
  async trainee(): Promise<Trainee> {
    if (this.#parts.trained.size === 0) await this.trainable();
    return traineeOf(this.#parts);
  }

  /** The model as it is, for one under training to be compared with. */
  frozen(): Trainee {
    return traineeOf(this.#parts);
  }

  /**
   * Writes the model in the hub's layout, with config, tokenizer and what else belongs to it.
   * @param options.dtype `fp32`, `bf16` or `fp16`; default: the stored format, bf16 where that is in blocks
   */
  async save_pretrained(folder: string, options: { readonly dtype?: string } = {}): Promise<void> {
    await saveModel(this.#parts, folder, options.dtype);
  }

  /** Frees weights, cache and threads. Running requests fail, and so does using the model afterwards. */
  async dispose(): Promise<void> {
    await this.engine.dispose();
    for (const state of this.#parts.states.values()) state.dispose();
  }
}

/** Watches answers for stop strings; null when there are none. */
function stopsAt(stopStrings: readonly string[], tokenizer: Tokenizer): (() => (token: GeneratedToken) => boolean) | null {
  if (stopStrings.length === 0) return null;
  return () => {
    const stops = new StopStrings(stopStrings);
    const text = tokenizer.detokenizer({ skip_special_tokens: false });
    return ({ id }) => stops.push(text.push(id)).stopped;
  };
}
