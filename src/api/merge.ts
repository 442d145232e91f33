/**
 * Merges adapters into matrices: W + scale * B A, in memory or from folder to folder. An embedding and a head that share one matrix get one
 * each when either has an adapter. Runs no model.
 */
import { readdir } from "node:fs/promises";
import { resolve } from "node:path";
import { convertStored } from "../backend/native.ts";
import { type AdapterFolder, adaptersIn, checkCopies, expertName, openAdapter, readAdapter } from "../checkpoint/adapter.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import { ggufFile } from "../checkpoint/gguf/locate.ts";
import { type AdapterConfig, lowRankAt, namesModule } from "../checkpoint/lora.ts";
import { locate, partName } from "../checkpoint/names.ts";
import type { ErnieConfig, Problem } from "../model/config.ts";
import { ernie } from "../model/ernie.ts";
import { configFor } from "../model/fit.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import { FORMATS, type WriteModelOptions, writeModel } from "./folder.ts";
import { hasHead, headOf } from "./head.ts";
import type { Head } from "./load.ts";
import { checkpointOrigin } from "./quantize.ts";
import { classifierFields, encode } from "./tuning.ts";

/** The adapter of one matrix, or of a stack of them. */
export interface Branch {
  /** The name of the matrix, and its shape. */
  readonly weight: string;
  readonly shape: readonly number[];
  readonly experts?: number;
  readonly rank: number;
  readonly scale: number;
  /** [experts, rank, in], [experts, out, rank]; of an embedding, whose rows are tokens, [rank, hidden], [vocab, rank]. */
  readonly a: Float32Array;
  readonly b: Float32Array;
  /** The lengths of the adapted matrix's rows (DoRA), [out] or [experts, out]. */
  readonly magnitude?: Float32Array;
}

export function adapterParameters(model: Model): ModelParameter[] {
  return model.parameters.filter((p) => p.kind === "adapter");
}

/** The adapters of a model, one after the other. @param read the numbers of an adapter's parameter */
export function* branchesOf(model: Model, config: AdapterConfig, read: (name: string) => Float32Array): Generator<Branch> {
  const byName = new Map(model.parameters.map((p) => [p.name, p]));
  const parts = new Map(adapterParameters(model).map((p) => [`${p.branch?.module} ${p.branch?.part}`, p]));
  for (const p of adapterParameters(model)) {
    if (p.branch?.part !== "a") continue;
    const { module, rankLast } = p.branch;
    const weight = byName.get(`${module}.weight`) ?? (module === HEAD ? byName.get(model.embedding) : undefined);
    if (!weight) throw new Error(`internal: ${module} has an adapter and no weight`);
    const { rank, scale } = lowRankAt(config, p.experts === undefined ? module : expertName(module, 0));
    const of = (part: "a" | "b" | "magnitude") => read(parts.get(`${module} ${part}`)?.name as string);
    const [a, b] = rankLast ? [columns(of("b"), rank), of("a")] : [of("a"), of("b")];
    const magnitude = config.use_dora ? { magnitude: of("magnitude") } : {};
    yield { weight: `${module}.weight`, shape: weight.shape, experts: p.experts, rank, scale, a, b, ...magnitude };
  }
}

/** A matrix [n, rank] as [rank, n]. */
function columns(values: Float32Array, rank: number): Float32Array {
  const n = values.length / rank;
  return values.map((_, i) => values[(i % n) * rank + Math.floor(i / n)]);
}

const HEAD = "lm_head";
/** The head's matrix, if it has one of its own. */
export const HEAD_WEIGHT = `${HEAD}.weight`;

/**
 * What the merged model is, and the parameter from which each of its own begins: where embedding and head share a matrix and one of them has an
 * adapter, they share it no longer. PEFT adds both products to the shared one, which is another model than the adapted one.
 */
export function mergedConfig(config: ErnieConfig, model: Model): { config: ErnieConfig; from: (parameter: string) => string } {
  const theirs = (p: ModelParameter) => p.branch?.module === HEAD || `${p.branch?.module}.weight` === model.embedding;
  const apart = config.tied && model.classes === null && adapterParameters(model).some(theirs);
  if (!apart) return { config, from: (name) => name };
  return { config: { ...config, tied: false }, from: (name) => (name === HEAD_WEIGHT ? model.embedding : name) };
}

/** The parameters of modules that an adapter trains and saves as a whole. */
export function savedParameters(model: Model, { modules_to_save }: AdapterConfig): ModelParameter[] {
  const saved = model.parameters.filter(
    (p) => p.kind !== "adapter" && namesModule(modules_to_save, p.name.replace(/\.(weight|bias)$/, "")),
  );
  const stacked = saved.find((p) => p.experts !== undefined);
  if (stacked)
    throw new RangeError(`modules_to_save: ${stacked.name} belongs to routed experts; give them adapters, or train them by themselves`);
  const tied = model.classes === null && !model.parameters.some((p) => p.name === HEAD_WEIGHT);
  if (tied && saved.some((p) => p.name === model.embedding) && adapterParameters(model).some((p) => p.branch?.module === HEAD))
    throw new RangeError(`modules_to_save: the head shares the matrix of ${model.embedding} and has an adapter; choose one of the two`);
  return saved;
}

/** Adds an adapter's product to a matrix [out, in], in place, and gives its rows their lengths, if any. @param expert which of a stack's */
export function addProduct(matrix: Float32Array, { shape, rank, scale, a, b, magnitude }: Branch, expert: number): void {
  const [out, into] = shape.slice(-2);
  for (let i = 0; i < out; i++) {
    const row = matrix.subarray(i * into, (i + 1) * into);
    for (let r = 0; r < rank; r++) {
      const by = scale * b[(expert * out + i) * rank + r];
      if (by === 0) continue;
      const from = a.subarray((expert * rank + r) * into, (expert * rank + r + 1) * into);
      for (let j = 0; j < into; j++) row[j] += by * from[j];
    }
    if (magnitude) {
      const factor = magnitude[expert * out + i] / lengthOf(row);
      for (let j = 0; j < into; j++) row[j] *= factor;
    }
  }
}

export function lengthOf(row: Float32Array): number {
  let sum = 0;
  for (const x of row) sum += x * x;
  return Math.sqrt(sum);
}

export interface MergeOptions extends Pick<WriteModelOptions, "onProgress" | "signal"> {
  /** Default: the stored format, bf16 where that is in blocks. */
  readonly dtype?: "fp32" | "bf16" | "fp16";
  readonly onWarning?: (message: string) => void;
  /** Of a classifier's head in the adapter: the names of the classes, by number. Default: the base's, else LABEL_0, LABEL_1, ... */
  readonly id2label?: Readonly<Record<number, string>>;
  /** Default: the base's, else by the number of classes. */
  readonly problem_type?: Problem;
}

/**
 * Reads a model and an adapter and writes the merged model, a few matrices in memory at a time. Modules that the adapter has as a whole take
 * the base's place; with a head `score` the result is a classifier.
 * @throws CheckpointError naming what does not fit, Error when `out` already holds a model
 */
export async function mergeAdapter(
  source: string,
  adapterFolder: string,
  out: string,
  options: MergeOptions = {},
): Promise<{ tensors: number; merged: number; classes: number | null }> {
  if (resolve(source) === resolve(out)) throw new Error(`${out}: source and result are the same folder; name another for the result`);
  if ((await readdir(out).catch(() => [] as string[])).includes("model.safetensors"))
    throw new Error(`${out}: already contains a model; name another folder or delete it first`);
  const checkpoint = await openCheckpoint(source);
  const stored = configFor(checkpoint);
  const adapter = await openAdapter(adapterFolder);
  const head = classifierOf(stored, adapter, checkpoint.config, options);
  const base = head ? { ...stored, classifier: head.classifier } : stored;
  const model = ernie(base, adaptersIn(adapter));
  const { config, from } = mergedConfig(base, model);
  const saved = savedParameters(model, adapter.config);
  const values = await readAdapter(adapter, [...adapterParameters(model), ...saved]);
  const branches = new Map(
    [...branchesOf(model, adapter.config, (name) => values.get(name) as Float32Array)].map((branch) => [branch.weight, branch]),
  );
  const { sources } = locate(ernie(stored).parameters, checkpoint);
  await checkCopies(adapter, (name) => sources.get(from(name)) ?? (name === HEAD_WEIGHT ? sources.get(model.embedding) : undefined));
  const origin = await checkpointOrigin(source, options.onWarning);
  const format = [...sources.values()].find((s) => s.shape.length > 1)?.dtype;
  const usual = format === "f32" ? "fp32" : format === "f16" ? "fp16" : "bf16";
  const written = await writeModel(
    {
      ...origin,
      model: config,
      config: {
        ...origin.config,
        ...(config.classifier ? classifierFields(config, config.classifier) : {}),
        ...(config.tied === stored.tied ? {} : { tie_word_embeddings: config.tied }),
      },
      async fill(p, index, dtype, n, k, to) {
        const own = values.get(p.name);
        if (own) return encode(own, dtype, to);
        const branch = branches.get(p.name);
        const name = from(p.name);
        if (!branch) return origin.fill({ ...p, name }, index, dtype, n, k, to);
        const found = sources.get(name);
        if (!found) throw new Error(`internal: ${p.name} was not located`);
        const matrix = new Float32Array(n * k);
        await convertStored(
          found.parts[index],
          found.dtype,
          "f32",
          n,
          k,
          new Uint8Array(matrix.buffer),
          partName(p.name, index, p.experts !== undefined),
        );
        addProduct(matrix, branch, index);
        encode(matrix, dtype, to);
      },
    },
    out,
    { ...options, format: FORMATS[options.dtype ?? usual], archive: origin.folder === null ? undefined : await ggufFile(resolve(source)) },
  );
  return { tensors: written.tensors, merged: branches.size, classes: config.classifier?.labels.length ?? null };
}

/** The head that an adapter gives to its base; null: it has none, or the base has one already. */
function classifierOf(
  base: ErnieConfig,
  adapter: AdapterFolder,
  raw: Readonly<Record<string, unknown>>,
  { id2label, problem_type }: MergeOptions,
): Pick<Head, "classifier"> | null {
  if (!hasHead(adapter)) {
    if (id2label === undefined && problem_type === undefined) return null;
    throw new CheckpointError(adapter.folder, "has no head 'score' whose classes could have names; leave them out");
  }
  const { classifier } = headOf(adapter, id2label ?? ownLabels(adapter, base, raw));
  return { classifier: { ...classifier, problem: problem_type ?? base.classifier?.problem ?? null } };
}

/** The names in the base's config, if it names as many classes as the head has. */
function ownLabels(adapter: AdapterFolder, { classifier }: ErnieConfig, { id2label }: Readonly<Record<string, unknown>>) {
  const rows = [...adapter.tensors].find(([name]) => /^(?:.*\.)?score\.weight$/.test(name))?.[1].shape[0];
  const names = classifier ? Object.fromEntries(classifier.labels.entries()) : (id2label as Record<number, string> | undefined);
  return names && Object.keys(names).length === rows ? names : undefined;
}
