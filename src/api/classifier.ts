/**
 * Classifiers with the API of transformers: `AutoModelForSequenceClassification`. The head `score` reads the hidden state of a text's last
 * token. Knows no text.
 */
import { openAdapter } from "../checkpoint/adapter.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import type { Request } from "../engine/sequence.ts";
import { type ClassifierConfig, type ErnieConfig, PROBLEMS, type Problem, readClassifier } from "../model/config.ts";
import { configFor } from "../model/fit.ts";
import { optionFault } from "../tokenizer/options.ts";
import { classification } from "../train/classification.ts";
import type { ClassExample } from "../train/data/example.ts";
import type { Objective } from "../train/loss.ts";
import type { Selection } from "../train/selection.ts";
import type { Trainee } from "../train/trainee.ts";
import { type LoadAdapterOptions, RuntimeAdapters, readBranches, type WeightedAdapterOptions } from "./adapters.ts";
import { resolveAdapter, resolveWhole } from "./find.ts";
import { type ModelInputs, readRows } from "./generation.ts";
import { headOf, newHead } from "./head.ts";
import { type LoadedModel, loadModel } from "./load.ts";
import { checkPretrained, type NamedTensor, type PretrainedOptions } from "./model.ts";
import { saveModel, traineeOf, unfrozen } from "./tuning.ts";

export interface ClassifierOptions extends PretrainedOptions {
  /** A folder in PEFT's format, or a hub id, with a head among its `modules_to_save`: makes a classifier of a model that predicts tokens. */
  readonly adapter?: string;
  /** Names of the classes, by number. Default: those of config.json, else LABEL_0, LABEL_1, ... */
  readonly id2label?: Readonly<Record<number, string>>;
  /** Default: that of config.json, else by the number of classes. */
  readonly problem_type?: Problem;
  /** With this, or `id2label`, a model that predicts tokens gets a new head, to be trained: numbers with a standard deviation of 0.02. */
  readonly num_labels?: number;
  /** Of a new head. Default 42. */
  readonly seed?: number;
}

export interface ClassifyOptions extends ModelInputs {
  /** The name of a loaded adapter; null: the base model. Default: the active one. */
  readonly adapter?: string | null;
  readonly signal?: AbortSignal;
}

/** How logits become scores. */
export type ActivationName = "softmax" | "sigmoid" | "none";

const INPUTS = ["input_ids", "attention_mask", "adapter", "signal"] as const satisfies readonly (keyof ClassifyOptions)[];
/** What the adapter of `from_pretrained` is called, as in PEFT. */
const DEFAULT = "default";

/** Loads classifiers. */
export const AutoModelForSequenceClassification = {
  /**
   * Loads a classifier: a folder or hub id of one (`ForSequenceClassification` in its config); a model that predicts tokens with
   * `adapter`; or the adapter's folder itself, whose config names its base. Rejects with a one-line error that says what is wrong with files,
   * config or options.
   */
  async from_pretrained(idOrFolder: string, options: ClassifierOptions = {}): Promise<SequenceClassifier> {
    const { adapter: given, id2label, problem_type, num_labels, seed, ...rest } = options;
    checkPretrained(rest);
    const { folder, adapter: alone } = await resolveWhole(idOrFolder, rest);
    const adapter = given === undefined ? alone : await resolveAdapter(given, { ...rest, revision: undefined });
    const loaded = await loadClassifier(
      folder,
      { ...rest, device: rest.device ?? rest.device_map },
      { adapter, id2label, problem_type, num_labels, seed },
    );
    return new SequenceClassifier(loaded, adapter !== null && loaded.engine.adapters.names.length > 0 ? DEFAULT : null);
  },
};

/** The options of from_pretrained that say what classifies, for callers that resolve folders themselves. */
export interface ClassifierParts {
  readonly adapter?: string | null;
  readonly id2label?: Readonly<Record<number, string>>;
  readonly problem_type?: Problem;
  readonly num_labels?: number;
  readonly seed?: number;
}

/** Loads a classifier from local files; the adapter, if it has more than a head, is loaded as `default`. */
export async function loadClassifier(
  folder: string,
  options: Parameters<typeof loadModel>[1],
  parts: ClassifierParts,
): Promise<LoadedModel> {
  const { adapter = null, id2label, problem_type, num_labels } = parts;
  if (problem_type !== undefined && !PROBLEMS.includes(problem_type))
    throw new RangeError(`problem_type '${problem_type}' is not known; known are ${PROBLEMS.join(", ")}`);
  const count = num_labels ?? (id2label && Object.keys(id2label).length);
  if (num_labels !== undefined && id2label !== undefined && Object.keys(id2label).length !== num_labels)
    throw new RangeError(`id2label names ${Object.keys(id2label).length} classes, and num_labels is ${num_labels}`);
  const asked = count === undefined ? null : newHead(parts);
  const own = adapter === null && (asked === null || (await classifies(folder)));
  const head = own ? null : adapter === null ? asked : headOf(await openAdapter(adapter), id2label);
  const loaded = await loadModel(folder, options, head);
  try {
    const { classifier } = loaded.config;
    if (!classifier)
      throw new CheckpointError(folder, "has no head 'score', so it is no classifier; give an adapter that has one, or train one");
    const named = id2label === undefined ? classifier.labels : readClassifier({ id2label }, "").labels;
    if ((count ?? named.length) !== classifier.labels.length || named.length !== classifier.labels.length)
      throw new RangeError(
        `${id2label === undefined ? "num_labels is" : "id2label names"} ${count ?? named.length} classes, and the model has ${classifier.labels.length}`,
      );
    const config: ErnieConfig = {
      ...loaded.config,
      classifier: { ...classifier, labels: named, problem: problem_type ?? classifier.problem },
    };
    if (adapter !== null) {
      const branches = await readBranches(adapter, config, loaded.engine.adapters.limits, true);
      if (branches.size > 0) await loaded.engine.loadAdapter(DEFAULT, branches);
    }
    return { ...loaded, config };
  } catch (error) {
    await loaded.engine.dispose();
    throw error;
  }
}

export class SequenceClassifier {
  readonly folder: string;
  readonly config: ErnieConfig;
  readonly classifier: ClassifierConfig;
  /** What computes, for display: `avx512bf16, 2 threads`, or `cuda:0, NVIDIA H200`. */
  readonly device: string;
  #parts: LoadedModel;
  #adapters: RuntimeAdapters;

  constructor(loaded: LoadedModel, active: string | null) {
    const { config, checkpoint, engine, backend } = loaded;
    this.#parts = loaded;
    if (!config.classifier) throw new Error("internal: a model without classes");
    this.folder = checkpoint.folder;
    this.config = config;
    this.classifier = config.classifier;
    this.device = backend.device;
    this.#adapters = new RuntimeAdapters(engine, config);
    this.#adapters.set(active);
  }

  /** The underlying engine: `classify` takes many concurrent requests. */
  get engine(): LoadedModel["engine"] {
    return this.#parts.engine;
  }

  /** Model, weights and backend, for adapters and trainers. */
  get loaded(): LoadedModel {
    return this.#parts;
  }

  /** As `CausalLM.trainable`; the head is always trained. */
  async trainable(selection: Selection = {}): Promise<void> {
    this.#parts = await unfrozen(this.#parts, { ...selection, always: ["score"] });
    this.#adapters = new RuntimeAdapters(this.engine, this.config);
  }

  /** What a Trainer trains. */
  async trainee(): Promise<Trainee> {
    if (this.#parts.trained.size === 0) await this.trainable();
    return traineeOf(this.#parts);
  }

  /** The loss of its problem; without a `problem_type`, one class a text, or regression for a head of one number. */
  get objective(): Objective<ClassExample> {
    const { labels, problem } = this.classifier;
    const usual = labels.length === 1 ? "regression" : "single_label_classification";
    return classification({ problem: problem ?? usual, classes: labels.length });
  }

  /** Writes the model in the hub's layout, as `CausalLM.save_pretrained`. */
  async save_pretrained(folder: string, options: { readonly dtype?: string } = {}): Promise<void> {
    await saveModel(this.#parts, folder, options.dtype);
  }

  /**
   * Logits [batch, classes]. As in transformers, a row's last token that is not padding counts, padding being the mask's zeros and
   * `pad_token_id` at the end. Rows share steps. Rejects with RangeError for an empty row or ids outside the vocabulary.
   */
  async forward(options: ClassifyOptions): Promise<{ readonly logits: NamedTensor }> {
    const fault = optionFault("forward", options, INPUTS);
    if (fault !== null) throw new RangeError(fault);
    const rows = readRows(options).map(({ tokens }) => tokens);
    const each = await this.classify(rows, { adapter: options.adapter, signal: options.signal });
    const classes = this.classifier.labels.length;
    const data = new Float32Array(rows.length * classes);
    each.forEach((logits, i) => {
      data.set(logits, i * classes);
    });
    return { logits: { dims: [rows.length, classes], data } };
  }

  /** Logits of each text, [classes]. The first failure ends the others. */
  async classify(
    texts: readonly (readonly number[])[],
    { adapter, signal }: Pick<ClassifyOptions, "adapter" | "signal"> = {},
  ): Promise<Float32Array[]> {
    signal?.throwIfAborted();
    const leave = new AbortController();
    const own: Request["signal"] = signal ? AbortSignal.any([signal, leave.signal]) : leave.signal;
    const all = texts.map((tokens) =>
      this.engine.classify({ tokens: withoutPadding(tokens, this.config.padTokenId), ...this.#adapters.of(adapter), signal: own }),
    );
    try {
      return await Promise.all(all);
    } catch (error) {
      leave.abort(error);
      await Promise.allSettled(all);
      throw error;
    }
  }

  /** As CausalLM's. The head stays this model's: an adapter with a head of its own is refused. */
  load_adapter(idOrFolder: string, options: LoadAdapterOptions = {}): Promise<void> {
    return this.#adapters.load(idOrFolder, options);
  }

  set_adapter(name: string | null): void {
    this.#adapters.set(name);
  }

  delete_adapter(name: string): void {
    this.#adapters.delete(name);
  }

  add_weighted_adapter(names: readonly string[], weights: readonly number[], options: WeightedAdapterOptions): Promise<void> {
    return this.#adapters.addWeighted(names, weights, options);
  }

  get active_adapter(): string | null {
    return this.#adapters.active;
  }

  get adapter_names(): readonly string[] {
    return this.#adapters.names;
  }

  async dispose(): Promise<void> {
    await this.engine.dispose();
    for (const state of this.#parts.states.values()) state.dispose();
  }
}

/** Without the padding at a text's end, as transformers pools: up to the last token that is not `pad`, or the first if all are. */
export function withoutPadding(tokens: readonly number[], pad: number | null): readonly number[] {
  let count = tokens.length;
  while (count > 1 && tokens[count - 1] === pad) count--;
  return count === tokens.length ? tokens : tokens.slice(0, count);
}

/** The function that transformers and vLLM apply to logits when none is asked for. */
export function activationOf({ labels, problem }: ClassifierConfig): ActivationName {
  if (problem === "regression") return "none";
  return problem === "multi_label_classification" || labels.length === 1 ? "sigmoid" : "softmax";
}

export function activated(logits: Float32Array, name: ActivationName): Float32Array {
  if (name === "none") return logits;
  if (name === "sigmoid") return logits.map((x) => 1 / (1 + Math.exp(-x)));
  const top = logits.reduce((most, x) => Math.max(most, x), Number.NEGATIVE_INFINITY);
  const powers = Array.from(logits, (x) => Math.exp(x - top));
  const sum = powers.reduce((total, x) => total + x, 0);
  return Float32Array.from(powers, (x) => x / sum);
}

async function classifies(folder: string): Promise<boolean> {
  return configFor(await openCheckpoint(folder)).classifier !== null;
}
