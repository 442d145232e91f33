/**
 * Reads and writes PEFT's adapter folders: adapter_config.json and adapter_model.safetensors. Finds a model's adapter parameters in
 * them, in the layout of one pair of matrices per routed expert and in transformers 5's fused one, and checks every name and shape
 * before a number is read. An embedding's first matrix is stored as PEFT stores it, [rank, vocab], and is a table [vocab, rank] here. Knows no model: it is asked for parameters by name and shape.
 */
import { mkdir } from "node:fs/promises";
import { join, resolve } from "node:path";
import { fromF16 } from "../tensor/dtype.ts";
import { exists, readJson } from "./checkpoint.ts";
import { CheckpointError } from "./error.ts";
import { ADAPTER_DEFAULTS, type AdapterConfig, adapterAt, type LowRank, lowRankAt, parseAdapterConfig } from "./lora.ts";
import type { Parameter } from "./names.ts";
import { readHeader, readTensor, type Slice, type TensorEntry } from "./safetensors.ts";
import { writeAll, writeWhole } from "./stream.ts";
import { type TensorData, writeSafetensors } from "./writer.ts";

export const ADAPTER_CONFIG = "adapter_config.json";
export const ADAPTER_WEIGHTS = "adapter_model.safetensors";
const PREFIX = "base_model.model.";
const COPY = /^((?:.*\.)?(?:embed_tokens|lm_head))\.base_layer\.weight$/;
/** The module of an embedding, whose adapter has names and a first matrix of its own. */
const EMBEDDING = /(^|\.)embed_tokens$/;
const TABLE = ".lora_embedding_A";
/** The first version whose fused experts' A has the width of the inputs. */
const SWAPPED_SINCE = [0, 19];

/** An adapter folder whose files have been opened and checked by themselves. */
export interface AdapterFolder {
  readonly folder: string;
  /** Path of the weights. */
  readonly file: string;
  readonly config: AdapterConfig;
  /** By name without PEFT's prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`. */
  readonly tensors: ReadonlyMap<string, TensorEntry>;
  /** Whether fused experts' A and B have each other's widths, as PEFT wrote them before version 0.19. */
  readonly exchanged: boolean;
  /** Copies of the base's own matrices, by module, which PEFT adds where it adapts the embedding or the head; see `checkCopies`. */
  readonly copies: ReadonlyMap<string, TensorEntry>;
}

/** A module of a base model that can have an adapter. */
export interface Adaptable {
  /** As in the hub's checkpoints, for stacked experts without the expert's number: `model.layers.3.mlp.experts.gate_proj`. */
  readonly name: string;
  /** Number of stacked experts, if any. */
  readonly experts?: number;
}

/** What an adapter's config says of its base: its name or path, and a revision. @throws CheckpointError for a config that is not valid */
export async function readBase(folder: string): Promise<{ readonly name: string | null; readonly revision?: string }> {
  const json = join(folder, ADAPTER_CONFIG);
  const raw = await readJson(json);
  if (raw === null) throw notAdapter(folder);
  const { base_model_name_or_path: name } = parseAdapterConfig(raw, json);
  return { name: name || null, ...(typeof raw.revision === "string" ? { revision: raw.revision } : {}) };
}

function notAdapter(folder: string): CheckpointError {
  return new CheckpointError(folder, `has no ${ADAPTER_CONFIG}: not an adapter folder of PEFT's format`);
}

/** @throws CheckpointError for a folder that is no adapter's, and for a config or a tensor that is not supported, by name */
export async function openAdapter(path: string): Promise<AdapterFolder> {
  const folder = resolve(path);
  const json = join(folder, ADAPTER_CONFIG);
  const raw = await readJson(json);
  if (raw === null) throw notAdapter(folder);
  const file = join(folder, ADAPTER_WEIGHTS);
  if (!(await exists(file))) {
    const pickled = await exists(join(folder, "adapter_model.bin"));
    throw new CheckpointError(
      folder,
      `has no ${ADAPTER_WEIGHTS}${pickled ? "; save adapter_model.bin as safetensors: pickled files are not read" : ""}`,
    );
  }
  const config = parseAdapterConfig(raw, json);
  const header = await readHeader(file);
  const tensors = new Map<string, TensorEntry>();
  const copies = new Map<string, TensorEntry>();
  for (const [name, entry] of header.tensors) {
    const plain = (name.startsWith(PREFIX) ? name.slice(PREFIX.length) : name).replace(
      /\.lora_magnitude_vector\.weight$/,
      ".lora_magnitude_vector",
    );
    if (/\.lora_[AB]\.bias$/.test(plain)) throw new CheckpointError(file, `tensor ${name}: biases of adapters are not supported`);
    if (entry.dtype !== "F32" && entry.dtype !== "F16" && entry.dtype !== "BF16")
      throw new CheckpointError(file, `tensor ${name} is stored as ${entry.dtype}; F32, F16 and BF16 are read`);
    const copied = COPY.exec(plain)?.[1];
    if (copied === undefined) tensors.set(plain, entry);
    else copies.set(copied, entry);
  }
  if (tensors.size === 0) throw new CheckpointError(file, "holds no tensors");
  const version = typeof raw.peft_version === "string" ? raw.peft_version.split(".").map(Number) : [0, 0];
  const [major, minor] = [version[0] ?? 0, version[1] ?? 0];
  const exchanged = major < SWAPPED_SINCE[0] || (major === SWAPPED_SINCE[0] && minor < SWAPPED_SINCE[1]);
  return { folder, file, config, tensors, exchanged, copies };
}

/** The name in the hub's layout of one expert's part of a stacked parameter or module. */
export function expertName(name: string, expert: number): string {
  return name.replace(".experts.", `.experts.${expert}.`);
}

/**
 * The adapters that a folder holds, for building a model: `at(module)` gives the adapter of a module, or null. What is there follows
 * from the tensors, since a name in `target_modules` can mean fewer modules in another library's model.
 */
export function adaptersIn(adapter: AdapterFolder): { at(module: Adaptable): LowRank | null } {
  return {
    at: (module) => (module.experts === undefined ? plainAt(adapter, module.name) : stackedAt(adapter, module.name, module.experts)),
  };
}

/** The adapters that a configuration asks for, for building a model. */
export function adaptersOf(config: AdapterConfig, source = "LoraConfig"): { at(module: Adaptable): LowRank | null } {
  return {
    at({ name, experts }) {
      const whole = adapterAt(config, name);
      if (experts === undefined) return whole;
      const each = Array.from({ length: experts }, (_, e) => adapterAt(config, expertName(name, e)));
      const some = each.filter((lowRank) => lowRank !== null);
      const [first] = some;
      if (first === undefined) return whole;
      const other = some.find((l) => l.rank !== first.rank || l.scale !== first.scale);
      if (other)
        throw new CheckpointError(
          source,
          `experts of ${name} would have ranks or alphas that differ; give all of a layer's experts the same`,
        );
      return first;
    },
  };
}

/** The experts of a stacked module that a configuration selects: all, if it selects the module as a whole. */
export function selectedExperts(config: AdapterConfig, { name, experts = 0 }: Adaptable): number[] {
  const all = Array.from({ length: experts }, (_, e) => e);
  const some = all.filter((e) => adapterAt(config, expertName(name, e)) !== null);
  return some.length > 0 || adapterAt(config, name) === null ? some : all;
}

/**
 * Reads the numbers of adapter parameters, after all names and shapes have been checked. Experts that the folder leaves out get zeros.
 * @param parameters all adapter parameters of the model that was built with `adaptersIn`
 * @throws CheckpointError naming the first tensor that is missing, that has another shape, or that the model has no place for
 */
export async function readAdapter(adapter: AdapterFolder, parameters: readonly Parameter[]): Promise<Map<string, Float32Array>> {
  const used = new Set<string>();
  checkCopiedShapes(adapter, parameters);
  const readers = new Map(
    parameters.map((p) => [p.name, p.experts === undefined ? plainReader(adapter, p, used) : stackedReader(adapter, p, used)]),
  );
  for (const [name, entry] of adapter.tensors)
    if (!used.has(name))
      throw new CheckpointError(
        adapter.file,
        `tensor ${entry.name} [${entry.shape}] has no place in the base model: it has no such module; ${another(adapter)}`,
      );
  const values = new Map<string, Float32Array>();
  for (const [name, read] of readers) values.set(name, await read());
  return values;
}

/** Throws if a copy of the base's embedding or head has another size than the base's: the tokens of a resized vocabulary have other ids. */
function checkCopiedShapes(adapter: AdapterFolder, parameters: readonly Parameter[]): void {
  for (const [module, entry] of adapter.copies) {
    const shapeOf = (name: string) => parameters.find((p) => p.name === `${module}.${name}`)?.shape;
    const [a, b, table, rows] = ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"].map(shapeOf);
    if (a && b) checkShape(adapter, entry, [b[0], a[1]]);
    if (table && rows) checkShape(adapter, entry, [table[0], rows[0]]);
  }
}

/** Numbers of a copy that are compared at its beginning, in its middle and at its end. */
const SAMPLE = 64;
const PLAIN: Readonly<Record<string, TensorEntry["dtype"]>> = { f32: "F32", f16: "F16", bf16: "BF16" };

/**
 * Throws if a copy of the base's embedding or head holds other numbers than the base's, beyond what rounding to bfloat16 changes: PEFT would put it in
 * the base's place. Of a base that is stored in blocks, nothing can be compared.
 * @param stored where a parameter of the base is; undefined: it has none of its own
 */
export async function checkCopies(
  adapter: AdapterFolder,
  stored: (parameter: string) => { readonly dtype: string; readonly parts: readonly Slice[] } | undefined,
): Promise<void> {
  for (const [module, copy] of adapter.copies) {
    const own = stored(`${module}.weight`);
    const dtype = own && PLAIN[own.dtype];
    if (!own || !dtype) continue;
    const count = copy.shape.reduce((a, b) => a * b, 1);
    const taken = Math.min(SAMPLE, count);
    for (const at of [0, Math.floor((count - taken) / 2), count - taken]) {
      const part = (entry: TensorEntry) => {
        const width = entry.dtype === "F32" ? 4 : 2;
        return floats({ ...entry, offset: entry.offset + at * width, bytes: taken * width });
      };
      const [theirs, ours] = [await part(copy), await part({ ...copy, ...own.parts[0], dtype })];
      const other = theirs.findIndex((x, i) => Math.abs(x - ours[i]) > Math.abs(ours[i]) / 128 + 1e-6);
      if (other < 0) continue;
      throw new CheckpointError(
        adapter.file,
        `tensor ${copy.name} is a copy of the base's, and its element ${at + other} is ${theirs[other]}, not ${ours[other]}; ${another(adapter)}`,
      );
    }
  }
}

export interface AdapterValues extends Parameter {
  readonly values: Float32Array;
}

/**
 * Writes an adapter folder, each file whole or not at all; routed experts get a pair of matrices each, as PEFT writes for the hub's layout. An
 * expert whose matrices are all zero is left out.
 * @param modules every module of the base that could have an adapter: the config that is written selects just those that have one
 */
export async function writeAdapter(
  path: string,
  config: AdapterConfig,
  parameters: readonly AdapterValues[],
  modules: readonly Adaptable[],
): Promise<void> {
  const folder = resolve(path);
  await mkdir(folder, { recursive: true });
  const parts = parameters.flatMap(
    ({ name, shape, experts, values }): { name: string; shape: readonly number[]; values: Float32Array }[] => {
      if (name.endsWith(TABLE)) return [{ name, shape: [...shape].reverse(), values: transposed(values, shape[0], shape[1]) }];
      if (experts === undefined) return [{ name, shape, values }];
      const each = values.length / experts;
      return Array.from({ length: experts }, (_, e) => ({
        name: expertName(name, e),
        shape: shape.slice(1),
        values: values.subarray(e * each, (e + 1) * each),
      }));
    },
  );
  const idle = idleModules(parts);
  const written = parts.filter(({ name }) => !idle.has(moduleOf(name) ?? name));
  const tensors = written.map(
    ({ name, shape, values }): TensorData => ({
      name: `${PREFIX}${name}`,
      dtype: "F32",
      shape,
      data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
    }),
  );
  await writeSafetensors(join(folder, ADAPTER_WEIGHTS), tensors, { metadata: { format: "pt" } });
  const adapted = new Set(written.flatMap(({ name }) => moduleOf(name) ?? []));
  const names = modules.flatMap(({ name, experts }) =>
    experts === undefined ? [name] : Array.from({ length: experts }, (_, e) => expertName(name, e)),
  );
  const json = `${JSON.stringify(portable(config, adapted, names), null, 2)}\n`;
  const file = join(folder, ADAPTER_CONFIG);
  const bytes = Buffer.from(json);
  await writeWhole(file, bytes.byteLength, false, (target) => writeAll(target, bytes, file, bytes.byteLength));
}

/** The module that an adapter's tensor belongs to; undefined for the tensors of modules that are saved whole. */
function moduleOf(name: string): string | undefined {
  return /^(.*)\.lora_(?:[AB]\.weight|embedding_[AB]|magnitude_vector)$/.exec(name)?.[1];
}

/** Experts of which both matrices are zero: they compute nothing and never learn. */
function idleModules(parts: readonly { name: string; values: Float32Array }[]): Set<string> {
  const idle = new Set<string>();
  const busy = new Set<string>();
  for (const { name, values } of parts) {
    const module = /\.experts\.\d+\./.test(name) ? moduleOf(name) : undefined;
    if (module === undefined) continue;
    (values.every((x) => x === 0) ? idle : busy).add(module);
  }
  return new Set([...idle].filter((module) => !busy.has(module)));
}

/** The fields of adapter_config.json, with `target_modules` such that PEFT selects the adapted modules and no others. */
function portable(config: AdapterConfig, adapted: ReadonlySet<string>, modules: readonly string[]): Record<string, unknown> {
  const others = modules.filter((name) => !adapted.has(name));
  const exact = (c: AdapterConfig) => [...adapted].every((name) => adapterAt(c, name)) && !others.some((name) => adapterAt(c, name));
  const parameters = config.target_parameters.filter((t) => !/(gate_up|down)_proj$/.test(t));
  const same: AdapterConfig = { ...config, target_parameters: parameters };
  const plain: AdapterConfig = { ...same, exclude_modules: null, layers_to_transform: null, layers_pattern: null };
  const short: AdapterConfig = {
    ...plain,
    target_modules: [...new Set([...adapted].map((name) => name.slice(name.lastIndexOf(".") + 1)))].sort(),
  };
  const chosen =
    config.target_modules !== "all-linear" && exact(same) ? same : exact(short) ? short : { ...plain, target_modules: [...adapted].sort() };
  return {
    ...ADAPTER_DEFAULTS,
    ...chosen,
    bias: "none",
    fan_in_fan_out: false,
    inference_mode: true,
    lora_bias: false,
    modules_to_save: config.modules_to_save.length > 0 ? config.modules_to_save : null,
    peft_type: "LORA",
    revision: null,
  };
}

function checkRank({ file, config }: AdapterFolder, entry: TensorEntry, module: string, rank: number): LowRank {
  const expected = lowRankAt(config, module);
  if (rank !== expected.rank)
    throw new CheckpointError(
      file,
      `tensor ${entry.name} has the shape [${entry.shape}], of rank ${rank}, but ${ADAPTER_CONFIG} implies rank ${expected.rank}`,
    );
  return expected;
}

function plainAt(adapter: AdapterFolder, module: string): LowRank | null {
  const embeds = EMBEDDING.test(module);
  const [name, other] = ["A", "B"].map((half) => `${module}.${embeds ? `lora_embedding_${half}` : `lora_${half}.weight`}`);
  const entry = adapter.tensors.get(name);
  if (entry) return checkRank(adapter, entry, module, entry.shape[0]);
  const lost = adapter.tensors.has(other) || adapterAt({ ...adapter.config, target_parameters: [] }, module) !== null;
  if (lost) throw missing(adapter, name);
  return null;
}

function stackedAt(adapter: AdapterFolder, module: string, experts: number): LowRank | null {
  let found: LowRank | null = null;
  for (let e = 0; e < experts; e++) {
    const own = expertName(module, e);
    const lowRank =
      adapter.tensors.has(`${own}.lora_A.weight`) || adapter.tensors.has(`${own}.lora_B.weight`) ? plainAt(adapter, own) : null;
    if (!lowRank) continue;
    if (found && (lowRank.rank !== found.rank || lowRank.scale !== found.scale))
      throw new CheckpointError(
        adapter.file,
        `experts of ${module} have ranks or alphas that differ (expert ${e}); those of a layer share one`,
      );
    found = lowRank;
  }
  if (found) return found;
  const fused = fusedOf(adapter, module);
  return fused && checkRank(adapter, fused.a, expertName(module, 0), fused.a.shape[0] / experts);
}

/** The pair of matrices of fused experts that holds a stacked module's. PEFT wraps the parameter that comes first innermost. */
function fusedOf({ tensors, config }: AdapterFolder, module: string): { a: TensorEntry; b: TensorEntry | undefined; bName: string } | null {
  const [, prefix, which] = /^(.*\.experts)\.(gate|up|down)_proj$/.exec(module) ?? [];
  if (prefix === undefined) return null;
  const nested = tensors.has(`${prefix}.base_layer.lora_A.weight`);
  if (!nested && adapterAt({ ...config, target_modules: null }, expertName(module, 0)) === null) return null;
  const at = nested && which !== "down" ? `${prefix}.base_layer` : prefix;
  const a = tensors.get(`${at}.lora_A.weight`);
  const bName = `${at}.lora_B.weight`;
  return a ? { a, b: tensors.get(bName), bName } : null;
}

type Read = () => Promise<Float32Array>;

function plainReader(adapter: AdapterFolder, { name, shape }: Parameter, used: Set<string>): Read {
  const entry = adapter.tensors.get(name);
  if (!entry) throw missing(adapter, name);
  const table = name.endsWith(TABLE);
  checkShape(adapter, entry, table ? [...shape].reverse() : shape);
  used.add(name);
  return async () => (table ? transposed(await floats(entry), shape[1], shape[0]) : floats(entry));
}

function stackedReader(adapter: AdapterFolder, parameter: Parameter, used: Set<string>): Read {
  const { name, shape } = parameter;
  const [experts] = shape;
  const each = shape.slice(1).reduce((a, b) => a * b, 1);
  const twin = name.endsWith(".lora_A.weight") ? name.replace(/A\.weight$/, "B.weight") : name.replace(/B\.weight$/, "A.weight");
  const parts: (TensorEntry | null)[] = [];
  for (let e = 0; e < experts; e++) {
    const own = expertName(name, e);
    const entry = adapter.tensors.get(own);
    const alone = name === twin && adapter.tensors.has(expertName(name.replace(/magnitude_vector$/, "A.weight"), e));
    if (!entry && (alone || adapter.tensors.has(expertName(twin, e)))) throw missing(adapter, own);
    if (entry) checkShape(adapter, entry, shape.slice(1));
    if (entry) used.add(own);
    parts.push(entry ?? null);
  }
  if (parts.every((part) => part === null)) return fusedReader(adapter, parameter, used);
  return async () => {
    const values = new Float32Array(experts * each);
    for (const [e, entry] of parts.entries()) if (entry) values.set(await floats(entry), e * each);
    return values;
  };
}

/**
 * A stacked parameter out of a fused pair: A [r * experts, in], B [out, experts' r interleaved], with gate's rows before up's in B;
 * before version 0.19 with in and out exchanged.
 */
function fusedReader(adapter: AdapterFolder, { name, shape }: Parameter, used: Set<string>): Read {
  const [, module, half] = /^(.*)\.lora_([AB])\.weight$/.exec(name) ?? [];
  const fused = module === undefined ? null : fusedOf(adapter, module);
  if (!fused) throw missing(adapter, expertName(name, 0));
  const { a, b, bName } = fused;
  if (!b) throw missing(adapter, bName);
  for (const entry of [a, b]) used.add([...adapter.tensors].find(([, each]) => each === entry)?.[0] ?? "");
  const [experts, n, k] = shape; // A: [experts, rank, in]; B: [experts, out, rank]
  const rank = half === "A" ? n : k;
  const width = half === "A" ? k : n * (/\.(gate|up)_proj\./.test(name) ? 2 : 1);
  const [ofA, ofB] = [a.shape[1], b.shape[0]];
  const sound = a.shape.length === 2 && b.shape.length === 2 && a.shape[0] === rank * experts && b.shape[1] === rank * experts;
  if (!sound || (ofA !== width && ofB !== width))
    throw new CheckpointError(
      adapter.file,
      `tensors ${a.name} [${a.shape}] and ${b.name} [${b.shape}] do not fit ${name} [${shape}] of the base model`,
    );
  const exchanged = ofA === ofB ? adapter.exchanged : (half === "A" ? ofB : ofA) === width;
  const fromA = (half === "A") !== exchanged; // A holds [experts, rank, width], B holds [width, rank, experts]
  const skip = half === "B" && /\.up_proj\./.test(name) ? n : 0;
  return async () => {
    const values = new Float32Array(experts * n * k);
    const stored = await floats(fromA ? a : b);
    for (let e = 0; e < experts; e++)
      for (let i = 0; i < n; i++)
        for (let j = 0; j < k; j++) {
          const [r, w] = half === "A" ? [i, j] : [j, i + skip];
          values[(e * n + i) * k + j] = fromA ? stored[(e * rank + r) * width + w] : stored[(w * rank + r) * experts + e];
        }
    return values;
  };
}

/** A matrix [n, k] as [k, n]. */
function transposed(values: Float32Array, n: number, k: number): Float32Array {
  const out = new Float32Array(values.length);
  for (let i = 0; i < n; i++) for (let j = 0; j < k; j++) out[j * n + i] = values[i * k + j];
  return out;
}

/** What an adapter that does not fit says of its base. */
function another({ config }: AdapterFolder): string {
  const name = config.base_model_name_or_path;
  return `the adapter belongs to another base${name ? `: it names '${name}'` : ""}`;
}

function checkShape(adapter: AdapterFolder, entry: TensorEntry, expected: readonly number[]): void {
  if (entry.shape.length === expected.length && entry.shape.every((n, i) => n === expected[i])) return;
  throw new CheckpointError(
    adapter.file,
    `tensor ${entry.name} has the shape [${entry.shape}], but the base model implies [${expected}]; ${another(adapter)}`,
  );
}

function missing(adapter: AdapterFolder, name: string): CheckpointError {
  return new CheckpointError(adapter.file, `tensor ${PREFIX}${name} is missing: the file is incomplete, or ${another(adapter)}`);
}

async function floats(entry: TensorEntry): Promise<Float32Array> {
  const bytes = await readTensor(entry);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const width = entry.dtype === "F32" ? 4 : 2;
  const values = new Float32Array(bytes.byteLength / width);
  const word = new DataView(new ArrayBuffer(4));
  for (let i = 0; i < values.length; i++) {
    if (entry.dtype === "F32") values[i] = view.getFloat32(i * 4, true);
    else if (entry.dtype === "F16") values[i] = fromF16(view.getUint16(i * 2, true));
    else {
      word.setUint32(0, view.getUint16(i * 2, true) << 16);
      values[i] = word.getFloat32(0);
    }
    if (!Number.isFinite(values[i]))
      throw new CheckpointError(
        entry.file,
        `tensor ${entry.name} holds ${values[i]}, element ${i}: the file is damaged, or training had diverged`,
      );
  }
  return values;
}
