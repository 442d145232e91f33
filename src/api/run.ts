/** Makes the trainer that a configuration describes: model, parameters to train, data. Trains nothing itself. */
import { adaptersOf, expertName } from "../checkpoint/adapter.ts";
import { adapterAt } from "../checkpoint/lora.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { Dataset } from "../train/data/dataset.ts";
import type { CausalExample } from "../train/data/example.ts";
import { openDataset } from "../train/data/open.ts";
import type { TrainerCallback } from "../train/report.ts";
import { parseLayers, type Selection } from "../train/selection.ts";
import { layerOf } from "../train/trainee.ts";
import { Trainer } from "../train/trainer.ts";
import { AutoModelForCausalLM, type CausalLM } from "./model.ts";
import { LoraConfig, PeftModel } from "./peft.ts";
import type { Recipe } from "./recipe.ts";
import { openTokenizer } from "./tokenizer.ts";

export interface Run {
  readonly trainer: Trainer<CausalExample>;
  readonly model: PeftModel | CausalLM;
  readonly base: CausalLM;
  readonly tokenizer: Tokenizer;
  readonly rows: Dataset<CausalExample>;
  readonly evaluation: Dataset<CausalExample> | null;
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

/** @param folder the model's folder, found from `recipe.model`. Rejects with the errors of loading, data, adapters and arguments. */
export async function openRun(recipe: Recipe, folder: string, options: RunOptions = {}): Promise<Run> {
  const { dtype, device, threads, args, data } = recipe;
  const tokenizer = await openTokenizer(folder);
  const open = (source: string | readonly string[]) =>
    openDataset(source, {
      ...data,
      seed: args.data_seed ?? args.seed,
      ...(args.max_length === null ? {} : { max_length: args.max_length }),
      tokenizer,
      task: "causal-lm",
      signal: options.signal,
      onProgress: options.onData,
    });
  const all = await open(recipe.dataset);
  const parts = recipe.validation_fraction === undefined ? null : all.split(recipe.validation_fraction);
  const rows = parts?.train ?? all;
  const evaluation = parts?.validation ?? (recipe.eval_dataset === undefined ? null : await open(recipe.eval_dataset));
  const base = await AutoModelForCausalLM.from_pretrained(folder, { dtype, device, threads, warning_callback: options.warning_callback });
  try {
    const model = await modelOf(recipe, base, rows);
    const trainer = new Trainer<CausalExample>({
      model,
      args,
      train_dataset: rows,
      eval_dataset: evaluation ?? undefined,
      callbacks: options.callbacks,
    });
    return {
      ...{ trainer, model, base, tokenizer, rows, evaluation },
      async dispose() {
        trainer.dispose();
        if (model !== base) await model.dispose();
        await base.dispose();
        await all.close();
        if (evaluation && !parts) await evaluation.close();
      },
    };
  } catch (error) {
    await base.dispose();
    throw error;
  }
}

async function modelOf(recipe: Recipe, base: CausalLM, rows: Dataset<CausalExample>): Promise<PeftModel | CausalLM> {
  const { method, train, adapter } = recipe;
  const experts =
    train.experts !== undefined && typeof train.experts === "object" && "top_by_routing_load" in train.experts
      ? await busiest(base, rows, Number(train.experts.top_by_routing_load))
      : (train.experts as Selection["experts"]);
  if (method !== "lora") {
    const modules = train.modules ?? (method === "experts" ? ["mlp.experts"] : undefined);
    await base.trainable({ layers: train.layers, modules, experts });
    return base;
  }
  if (adapter !== undefined) return PeftModel.from_pretrained(base, adapter, { is_trainable: true });
  const config = new LoraConfig({
    ...(recipe.lora as object),
    ...(recipe.target_modules === undefined ? {} : { target_modules: recipe.target_modules }),
  });
  return PeftModel.create(base, narrowed(config, base, train.layers, experts), { seed: recipe.args.seed });
}

/** The configuration with only those of its modules that are in these layers, and of routed experts only these. */
function narrowed(config: LoraConfig, base: CausalLM, layers: Selection["layers"], experts: Selection["experts"]): LoraConfig {
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
async function busiest(base: CausalLM, rows: Dataset<CausalExample>, count: number): Promise<Record<string, number[]>> {
  const loads = new Map<number, Float64Array>();
  const { mixtures } = base.loaded.model;
  for (let i = 0; i < Math.min(MEASURED, rows.length); i++) {
    const { input_ids } = await rows.row(i);
    const { routing } = await base.engine.inspect(input_ids, { logits: false, routing: true });
    for (const { layer, experts } of routing) {
      const load = loads.get(layer) ?? new Float64Array(mixtures.experts);
      loads.set(layer, load);
      for (const expert of experts) load[expert]++;
    }
  }
  const best = (load: Float64Array) => [...load.keys()].sort((a, b) => load[b] - load[a] || a - b).slice(0, count);
  return Object.fromEntries([...loads].map(([layer, load]) => [layer, best(load).sort((a, b) => a - b)]));
}
