/** From loaded models to models under training and back: parameters as float32 states, an engine that follows them, merging, saving. */
import type { State, WeightSource } from "../backend/backend.ts";
import { convertStored } from "../backend/native.ts";
import { readWeight } from "../backend/reference/weights.ts";
import { partName } from "../checkpoint/names.ts";
import { Engine } from "../engine/engine.ts";
import type { ClassifierConfig } from "../model/config.ts";
import type { Model } from "../model/model.ts";
import { roundBf16, toF16 } from "../tensor/dtype.ts";
import { isBlockDtype } from "../tensor/quantized.ts";
import { elements } from "../tensor/shape.ts";
import { ROUTER_BIAS, type Selection, select } from "../train/selection.ts";
import type { Trainee } from "../train/trainee.ts";
import { FORMATS, type Origin, writeModel } from "./folder.ts";
import type { LoadedModel } from "./load.ts";

/** What a trainer needs of a loaded model. */
export function traineeOf({ model, backend, tensors, settings, states, trained, experts }: LoadedModel): Trainee {
  return { model, backend, weights: tensors, dtypeOf: settings.dtypeOf, states, trained, experts };
}

/** Another engine on the same weights, in which the parameters in `states` are states. Prefixes are not kept: what computed them changes. */
export function withStates(
  loaded: LoadedModel,
  model: Model,
  states: ReadonlyMap<string, State>,
  more: Partial<LoadedModel> = {},
): LoadedModel {
  const { backend, tensors, settings } = loaded;
  const engine = new Engine({ ...settings, model, backend, weights: tensors, states, prefixCache: false });
  return { ...loaded, model, states, engine, ...more };
}

/** The model with the selected parameters as states. Its engine takes the place of the loaded one's, which is closed. */
export async function unfrozen(loaded: LoadedModel, selection: Selection): Promise<LoadedModel> {
  if (loaded.trained.size > 0) throw new RangeError("the parameters to train were chosen before; load the model again to choose others");
  const { trained, experts } = select(loaded.model, selection);
  const states = new Map(loaded.states);
  for (const p of loaded.model.parameters) {
    const updated = selection.router_bias === true && ROUTER_BIAS.test(p.name);
    if ((!trained.has(p.name) && !updated) || states.has(p.name)) continue;
    const values = await valuesOf(loaded, p.name);
    const state = loaded.backend.state("f32", p.shape);
    state.write(values);
    states.set(p.name, state);
  }
  await loaded.engine.close();
  return withStates(loaded, loaded.model, states, { trained, experts });
}

/** The numbers of a parameter as the model computes with them. */
export async function valuesOf({ states, weights }: LoadedModel, name: string): Promise<Float32Array> {
  const state = states.get(name);
  if (state) return state.read();
  const source = weights.find((w) => w.name === name);
  if (!source) throw new Error(`internal: ${name} was not loaded`);
  return source.dtype === source.stored || source.dtype === "f32" ? stored(source) : readWeight(source);
}

/** Decodes a weight to float32, off the event loop. */
async function stored(source: WeightSource): Promise<Float32Array> {
  const values = new Float32Array(elements(source.shape));
  const each = values.length / source.parts.length;
  const k = source.shape[source.shape.length - 1];
  for (const [i, part] of source.parts.entries()) {
    const to = new Uint8Array(values.buffer, i * each * 4, each * 4);
    await convertStored(part, source.stored, "f32", each / k, k, to, source.name);
  }
  return values;
}

/** Writes the model with its states in the hub's layout. */
export async function saveModel(loaded: LoadedModel, folder: string, dtype?: string): Promise<void> {
  const matrix = loaded.weights.find((w) => w.shape.length > 1 && w.dtype !== "f32") ?? loaded.weights[0];
  const usual = isBlockDtype(matrix.dtype) || matrix.dtype === "bf16" ? "bf16" : matrix.dtype === "f16" ? "fp16" : "fp32";
  const name = dtype ?? usual;
  if (name !== "fp32" && name !== "bf16" && name !== "fp16")
    throw new RangeError(
      `save_pretrained: dtype '${name}' is not known; known are fp32, bf16, fp16; for int8, int4 and fp8 quantise the saved model`,
    );
  await writeModel(originOf(loaded), folder, { format: FORMATS[name], resumable: false });
}

function originOf(loaded: LoadedModel): Origin {
  const { checkpoint, config, states, weights } = loaded;
  const sources = new Map(weights.map((w) => [w.name, w]));
  return {
    config: {
      ...checkpoint.config,
      ...(config.classifier ? classifierFields(config, config.classifier) : {}),
      ...(config.tied ? {} : { tie_word_embeddings: false }),
    },
    model: config,
    folder: checkpoint.folder,
    async fill(p, index, dtype, n, k, to) {
      const source = sources.get(p.name);
      if (!states.has(p.name) && source && (source.dtype === source.stored || source.dtype === "f32"))
        return convertStored(source.parts[index], source.stored, dtype, n, k, to, partName(p.name, index, p.experts !== undefined));
      const values = await valuesOf(loaded, p.name);
      encode(values.subarray(index * n * k, (index + 1) * n * k), dtype, to);
    },
  };
}

/** What config.json says of a classifier. */
export function classifierFields({ architecture }: LoadedModel["config"], { labels, problem }: ClassifierConfig): Record<string, unknown> {
  return {
    architectures: [architecture.replace("ForCausalLM", "ForSequenceClassification")],
    id2label: Object.fromEntries(labels.entries()),
    label2id: Object.fromEntries([...labels.entries()].map(([id, label]) => [label, id])),
    ...(problem ? { problem_type: problem } : {}),
  };
}

/** Float32 numbers in a format of 16 or 32 bits. */
export function encode(values: Float32Array, dtype: string, to: Uint8Array): void {
  if (dtype === "f32") return void new Float32Array(to.buffer).set(values);
  const halves = new Uint16Array(to.buffer);
  const [word, bits] = [new Float32Array(1), new Uint32Array(1)];
  const both = new Uint32Array(word.buffer);
  for (let i = 0; i < values.length; i++) {
    if (dtype === "f16") halves[i] = toF16(values[i]);
    else {
      word[0] = roundBf16(values[i]);
      bits[0] = both[0];
      halves[i] = bits[0] >>> 16;
    }
  }
}
