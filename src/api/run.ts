/** Makes the trainer that a configuration describes: model, parameters to train, data. Trains nothing itself. */
import { adaptersOf, expertName } from "../checkpoint/adapter.ts";
import { adapterAt } from "../checkpoint/lora.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { Dataset } from "../train/data/dataset.ts";
import type { ClassExample, Example, PreferenceExample } from "../train/data/example.ts";
import { openDataset } from "../train/data/open.ts";
import { DPOTrainer } from "../train/dpo.ts";
import type { TrainerCallback } from "../train/report.ts";
import { parseLayers, type Selection } from "../train/selection.ts";
import { layerOf } from "../train/trainee.ts";
import { Trainer, type TrainerOptions } from "../train/trainer.ts";
import { AutoModelForSequenceClassification, type SequenceClassifier } from "./classifier.ts";
import { AutoModelForCausalLM, type CausalLM } from "./model.ts";
import { LoraConfig, PeftModel } from "./peft.ts";
import { type Recipe, tuningOf } from "./recipe.ts";
import { openTokenizer } from "./tokenizer.ts";

export interface Run {
  readonly trainer: Trainer<Example>;
  readonly model: PeftModel<CausalLM | SequenceClassifier> | CausalLM | SequenceClassifier;
  readonly base: CausalLM | SequenceClassifier;
  readonly tokenizer: Tokenizer;
  readonly rows: Dataset;
  readonly evaluation: Dataset | null;
  dispose(): Promise<void>;
}

export interface RunOptions {
  readonly callbacks?: readonly TrainerCallback[];
  readonly warning_callback?: (message: string) => void;
  readonly onData?: (progress: { readonly doneBytes: number; readonly totalBytes: number; readonly examples: number }) => void;
  readonly signal?: AbortSignal;
}

/** Rows whose routing is measured for `top_by_routing_load`. */
const MEASURED = 64;

const TASKS = { classification: "classification", dpo: "preference" } as const;

/** @param folder the model's folder, found from `recipe.model`. Rejects with the errors of loading, data, adapters and arguments. */
export async function openRun(recipe: Recipe, folder: string, options: RunOptions = {}): Promise<Run> {
  const { args, data, method } = recipe;
  const tokenizer = await openTokenizer(folder);
  const task = method === "classification" || method === "dpo" ? TASKS[method] : "causal-lm";
  const open = (source: string | readonly string[], labels: readonly string[] | null): Promise<Dataset> =>
    openDataset(source, {
      ...data,
      ...(labels ? { labels: [...labels] } : {}),
      seed: args.data_seed ?? args.seed,
      ...(args.max_length === null ? {} : { max_length: args.max_length }),
      ...{ tokenizer, task, signal: options.signal, onProgress: options.onData },
    });
  const undo: (() => Promise<void> | void)[] = [];
  const dispose = async () => {
    for (const each of undo.reverse()) await each();
  };
  try {
    const all = await open(recipe.dataset, null);
    undo.push(() => all.close());
    const parts = recipe.validation_fraction === undefined ? null : all.split(recipe.validation_fraction);
    const rows = parts?.train ?? all;
    const other = parts || recipe.eval_dataset === undefined ? null : await open(recipe.eval_dataset, all.labels);
    if (other) undo.push(() => other.close());
    const evaluation = parts?.validation ?? other;
    const base = await baseOf(recipe, folder, all, options);
    undo.push(() => base.dispose());
    const model = await modelOf(recipe, base, rows);
    if (model !== base) undo.push(() => model.dispose());
    const given = { model, args, train_dataset: rows, eval_dataset: evaluation ?? undefined, callbacks: options.callbacks };
    if (method === "dpo") {
      const { beta, label_smoothing } = recipe;
      // Adapters are compared with their base; a model that changes itself, with another one of the same files and formats.
      const ref_model = tuningOf(recipe) === "lora" ? undefined : await baseOf(recipe, folder, all, options);
      if (ref_model) undo.push(() => ref_model.dispose());
      if (ref_model) await modelOf(recipe, ref_model, rows);
      const preferences = { ...given, train_dataset: rows as Dataset<PreferenceExample>, eval_dataset: (evaluation ?? undefined) as never };
      const dpo = new DPOTrainer({ ...preferences, ref_model, args: { ...args, beta, label_smoothing } });
      undo.push(() => dpo.dispose());
      return { trainer: dpo.trainer as unknown as Trainer<Example>, model, base, tokenizer, rows, evaluation, dispose };
    }
    const trainer = new Trainer<Example>(given as TrainerOptions<Example>);
    undo.push(() => trainer.dispose());
    return { trainer, model, base, tokenizer, rows, evaluation, dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

async function baseOf(recipe: Recipe, folder: string, rows: Dataset, options: RunOptions): Promise<CausalLM | SequenceClassifier> {
  const { dtype, device, threads, data, args } = recipe;
  const loading = { dtype, device: device === "auto" ? "cpu" : device, threads, warning_callback: options.warning_callback };
  if (recipe.method !== "classification") return AutoModelForCausalLM.from_pretrained(folder, loading);
  const labels = rows.labels ?? [];
  const several = Array.isArray(((await rows.row(0)) as ClassExample).labels);
  const problem_type = data.problem_type ?? (several ? "multi_label_classification" : "single_label_classification");
  const head = problem_type === "regression" ? { num_labels: 1 } : { id2label: Object.fromEntries(labels.entries()) };
  return AutoModelForSequenceClassification.from_pretrained(folder, { ...loading, ...head, problem_type, seed: args.seed });
}

async function modelOf(recipe: Recipe, base: CausalLM | SequenceClassifier, rows: Dataset): Promise<Run["model"]> {
  const { train, adapter } = recipe;
  const tuning = tuningOf(recipe);
  const experts =
    train.experts !== undefined && typeof train.experts === "object" && "top_by_routing_load" in train.experts
      ? await busiest(base, rows, Number(train.experts.top_by_routing_load))
      : (train.experts as Selection["experts"]);
  if (tuning !== "lora") {
    const { layers, freeze_layers, freeze_modules } = train;
    const modules = train.modules ?? (tuning === "experts" ? ["mlp.experts"] : undefined);
    const router_bias = recipe.args.router_bias_update_rate > 0;
    await base.trainable({ layers, modules, experts, freeze_layers, freeze_modules, router_bias });
    return base;
  }
  if (adapter !== undefined) return PeftModel.from_pretrained<CausalLM | SequenceClassifier>(base, adapter, { is_trainable: true });
  const config = new LoraConfig({
    ...(recipe.lora as object),
    ...(recipe.target_modules === undefined ? {} : { target_modules: recipe.target_modules }),
  });
  return PeftModel.create<CausalLM | SequenceClassifier>(base, narrowed(config, base, train.layers, experts), { seed: recipe.args.seed });
}

/** The configuration with only those of its modules that are in these layers, and of routed experts only these. */
function narrowed(
  config: LoraConfig,
  base: CausalLM | SequenceClassifier,
  layers: Selection["layers"],
  experts: Selection["experts"],
): LoraConfig {
  if (layers === undefined && (experts === undefined || experts === "all")) return config;
  const { model } = base.loaded;
  const inLayers = layers === undefined ? null : parseLayers(layers, model.layers);
  const adapters = adaptersOf(config.config);
  const names: string[] = [];
  for (const p of model.parameters) {
    const name = p.name.replace(/\.weight$/, "");
    if (!p.name.endsWith(".weight") || !adapters.at({ name, experts: p.experts })) continue;
    const layer = layerOf(p.name);
    if (inLayers && (layer === null || !inLayers.includes(layer))) continue;
    if (p.experts === undefined) {
      names.push(name);
      continue;
    }
    const chosen = experts === undefined || experts === "all" ? [...Array(p.experts).keys()] : (experts[String(layer)] ?? []);
    names.push(...chosen.map((e) => expertName(name, e)).filter((own) => adapterAt(config.config, own) || adapterAt(config.config, name)));
  }
  return new LoraConfig({
    ...config.config,
    target_modules: names,
    exclude_modules: null,
    layers_to_transform: null,
    layers_pattern: null,
    target_parameters: [],
  });
}

/** Of each mixture layer, the experts to which the model routes most tokens of the first rows. */
async function busiest(base: CausalLM | SequenceClassifier, rows: Dataset, count: number): Promise<Record<string, number[]>> {
  const loads = new Map<number, Float64Array>();
  const { mixtures } = base.loaded.model;
  for (let i = 0; i < Math.min(MEASURED, rows.length); i++) {
    const row = await rows.row(i);
    const ids = "input_ids" in row ? row.input_ids : [...row.prompt_ids, ...row.chosen_ids];
    const { routing } = await base.engine.inspect(ids, { logits: false, routing: true });
    for (const { layer, experts } of routing) {
      const load = loads.get(layer) ?? new Float64Array(mixtures.experts);
      loads.set(layer, load);
      for (const expert of experts) load[expert]++;
    }
  }
  const best = (load: Float64Array) => [...load.keys()].sort((a, b) => load[b] - load[a] || a - b).slice(0, count);
  return Object.fromEntries([...loads].map(([layer, load]) => [layer, best(load).sort((a, b) => a - b)]));
}
