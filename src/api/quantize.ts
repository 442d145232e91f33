/** Converts a model folder to another weight format. Norms, biases and the router become float32. Runs no model. */
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { checkFinite, convertStored, randomMatrix } from "../backend/native.ts";
import type { BlockMatrix } from "../checkpoint/blocks.ts";
import { openCheckpoint, readJson } from "../checkpoint/checkpoint.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import { ggufFile } from "../checkpoint/gguf/locate.ts";
import { checkTiedHead, locate, partName, unusedText } from "../checkpoint/names.ts";
import { readTensor, type StoredDtype, type TensorEntry } from "../checkpoint/safetensors.ts";
import { type ErnieConfig, readConfig } from "../model/config.ts";
import { ernie, parameters } from "../model/ernie.ts";
import { configFor } from "../model/fit.ts";
import { PRESETS } from "../model/presets.ts";
import { Calibration } from "./calibration.ts";
import { CHECKSUMS, FORMATS, type Origin, writeModel } from "./folder.ts";
import { openTokenizer } from "./tokenizer.ts";
import { readWindows } from "./windows.ts";

export interface QuantizeOptions {
  readonly dtype: "int8" | "int4" | "fp8" | "bf16" | "fp16" | "fp32";
  /** Called after each tensor, with bytes of the result. */
  readonly onProgress?: (progress: { readonly tensor: string; readonly doneBytes: number; readonly totalBytes: number }) => void;
  /**
   * int4 only: a file of UTF-8 text, or `builtin` for the text that comes with mixtape. It is run through the model, and scales and values
   * are chosen by what each matrix sees there, which takes much longer. Default: each matrix is rounded by itself.
   */
  readonly calibration?: string;
  readonly signal?: AbortSignal;
  /** Called with tensors that are left out because the model does not use them. Default: a process warning. */
  readonly onWarning?: (message: string) => void;
  /** For `random:` sources: override the number of layers or experts, and the seed (default 0). */
  readonly layers?: number;
  readonly experts?: number;
  readonly seed?: number;
}

/** Formats of tensors that are not in blocks and hold numbers that may not be finite. */
const FLOATS: Partial<Record<StoredDtype, "f32" | "bf16" | "f16">> = { F32: "f32", BF16: "bf16", F16: "f16" };

/**
 * Reads the model folder `source` and writes `out`, in the hub's layout. Matrices are converted a few at a time, so memory use
 * stays small for any model. The weights are written last and renamed when complete: an interrupted run leaves a folder that
 * does not load, and running again resumes it. `checksums.json` holds a SHA-256 of each tensor for `verify`.
 *
 * `random:21b-a3b`, `random:0.3b` and `random:CONFIG.json` are models of that shape with seeded random weights.
 * @throws CheckpointError for a source that can't be used, Error when `out` already holds a model
 */
export async function quantize(source: string, out: string, options: QuantizeOptions): Promise<{ bytes: number; tensors: number }> {
  if (!Object.hasOwn(FORMATS, options.dtype))
    throw new RangeError(`dtype '${options.dtype}' is not known; known are ${Object.keys(FORMATS).join(", ")}`);
  if (options.calibration !== undefined) {
    if (options.dtype !== "int4") throw new RangeError(`a calibration chooses int4 values; dtype is ${options.dtype}, which needs none`);
    if (source.startsWith("random:")) throw new RangeError(`${source} has no tokenizer to read a calibration text with; name a model`);
  }
  const origin = source.startsWith("random:")
    ? await randomOrigin(source.slice(7), options)
    : await checkpointOrigin(source, options.onWarning);
  const config = origin.model;
  if (resolve(source) === resolve(out)) throw new Error(`${out}: source and result are the same folder; name another for the result`);
  await mkdir(out, { recursive: true });
  if ((await readdir(out)).includes("model.safetensors"))
    throw new Error(`${out}: already contains a model; name another folder or delete it first`);

  const archive = origin.folder === null ? undefined : await ggufFile(resolve(source));
  const settings = { ...options, format: FORMATS[options.dtype], archive };
  if (options.calibration === undefined) return writeModel(origin, out, settings);
  const calibrated = await calibrate(source, out, origin, config, options);
  try {
    return await writeModel(calibrated, out, settings);
  } finally {
    calibrated.dispose();
  }
}

/**
 * Compares every tensor of a model folder with `checksums.json`, which `quantize` wrote beside it, and checks that all its numbers
 * are finite.
 * @returns the names of tensors whose bytes have changed; none if all is well
 * @throws CheckpointError when there are no checksums or the file itself does not open, Error when a tensor whose bytes are
 * unchanged holds NaN or infinity
 */
export async function verify(
  folder: string,
  onProgress?: (progress: { doneBytes: number; totalBytes: number }) => void,
): Promise<string[]> {
  const checkpoint = await openCheckpoint(folder);
  configFor(checkpoint);
  const { tensors, blocks } = checkpoint;
  const path = join(folder, CHECKSUMS);
  const known = await readFile(path, "utf8").then(
    (text) => JSON.parse(text)?.tensors as unknown,
    () => null,
  );
  const checked = typeof known === "object" && known !== null;
  const expected = new Map(Object.entries(checked ? known : {}));
  const totalBytes = [...tensors.values()].reduce((sum, t) => sum + t.bytes, 0);
  const changed: string[] = [];
  let doneBytes = 0;
  for (const [name, entry] of tensors) {
    const digest = createHash("sha256")
      .update(await readTensor(entry))
      .digest("hex");
    if (checked && digest !== expected.get(name)) changed.push(name);
    else await checkTensor(entry, blocks.get(name));
    expected.delete(name);
    doneBytes += entry.bytes;
    onProgress?.({ doneBytes, totalBytes });
  }
  if (!checked) throw new CheckpointError(path, "all numbers are finite, but there are no checksums; 'mixtape quantize' writes them");
  return [...changed, ...expected.keys()];
}

/** Rejects, naming file and tensor, if one of the tensor's numbers is NaN or infinite. */
async function checkTensor(entry: TensorEntry, block: BlockMatrix | undefined): Promise<void> {
  const stored = block?.dtype ?? FLOATS[entry.dtype];
  const shape = block?.shape ?? entry.shape;
  const k = shape.at(-1) ?? 1;
  const n = k === 0 ? 0 : shape.reduce((product, size) => product * size, 1) / k;
  if (stored && n > 0) await checkFinite(entry, stored, n, k, entry.name);
}

/** The numbers of a checkpoint's tensors, in its own layout or another. */
export async function checkpointOrigin(source: string, onWarning: (message: string) => void = process.emitWarning): Promise<Origin> {
  const checkpoint = await openCheckpoint(source);
  const model = configFor(checkpoint);
  const located = locate(parameters(model), checkpoint);
  await checkTiedHead(located, checkpoint);
  const unused = unusedText(located);
  if (unused) onWarning(`${source}: ${unused}`);
  const { sources } = located;
  return {
    config: checkpoint.config,
    model,
    folder: checkpoint.folder,
    sources,
    async fill(p, index, dtype, n, k, to) {
      const found = sources.get(p.name);
      if (!found) throw new Error(`internal: ${p.name} was not located`);
      await convertStored(found.parts[index], found.dtype, dtype, n, k, to, partName(p.name, index, p.experts !== undefined));
    },
  };
}

/** The same weights, but matrices in int4 are rounded by what they see when the calibration's text runs through the model. */
async function calibrate(
  source: string,
  out: string,
  origin: Origin,
  config: ErnieConfig,
  { calibration = "", signal }: QuantizeOptions,
): Promise<Origin & { dispose(): void }> {
  const { sources } = origin;
  if (!sources) throw new Error("internal: a calibration needs stored weights");
  const done = [...sources.values()].find(({ dtype }) => dtype === "int4" || dtype === "q4_0");
  if (done)
    throw new CheckpointError(
      source,
      `${done.name} is ${done.dtype} already, and what rounding it lost is gone; a calibration needs the model in bf16, fp16, fp32 or int8`,
    );
  const model = ernie(config);
  const { tokens: windows, digest } = await readWindows(calibration, await openTokenizer(source), config.maxPositions);
  const rounding = new Calibration({ model, sources, windows, scratch: join(out, "calibration.partial"), signal });
  return {
    ...origin,
    digest,
    async fill(p, index, dtype, n, k, to) {
      if (dtype === "int4") to.set(await rounding.take(p.name, index));
      else await origin.fill(p, index, dtype, n, k, to);
    },
    dispose: () => rounding.dispose(),
  };
}

async function randomOrigin(name: string, { layers, experts, seed = 0 }: QuantizeOptions): Promise<Origin> {
  const preset = Object.hasOwn(PRESETS, name) ? PRESETS[name] : null;
  if (!preset && !name.endsWith(".json"))
    throw new RangeError(
      `random:${name} is not known; known are ${Object.keys(PRESETS)
        .map((p) => `random:${p}`)
        .join(", ")} and random:CONFIG.json`,
    );
  const base = preset ?? (await readJson(name));
  if (!base) throw new CheckpointError(name, "no such file");
  const last = base["moe_layer_end_index"];
  const config = {
    ...base,
    ...(layers
      ? { num_hidden_layers: layers, ...(typeof last === "number" ? { moe_layer_end_index: Math.min(last, layers - 1) } : {}) }
      : {}),
    ...(experts ? { moe_num_experts: experts } : {}),
  };
  const model = readConfig(config);
  const numbers = new Map(parameters(model).map((p, i) => [p.name, i]));
  return {
    config,
    model,
    folder: null,
    async fill(p, index, dtype, n, k, to) {
      if (/norm\.weight$/.test(p.name)) return void new Float32Array(to.buffer).fill(1);
      const deviation = p.name.endsWith("bias") ? 0.001 : 1 / Math.sqrt(k);
      await randomMatrix(seed * 2 ** 32 + (numbers.get(p.name) ?? 0) * 4096 + index, deviation, dtype, n, k, to);
    },
  };
}
