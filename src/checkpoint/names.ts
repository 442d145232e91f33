/**
 * Locates a model's parameters in a checkpoint: in the hub's layout (one tensor per expert), in transformers 5's fused one,
 * and in our block matrices. Checks presence, shape and dtype before anything runs, and refuses what would be left out. Reads
 * no bytes but those of a tied head, and knows no forward pass.
 */
import type { ELEMENT_BYTES } from "../tensor/dtype.ts";
import type { StoredFormat } from "../tensor/stored.ts";
import type { Checkpoint } from "./checkpoint.ts";
import { CheckpointError } from "./error.ts";
import { readExactly, withFile } from "./file.ts";
import type { Slice, StoredDtype, TensorEntry } from "./safetensors.ts";

export type { Slice } from "./safetensors.ts";

/** A tensor that a model needs, by its name in the hub's `-PT` checkpoints. */
export interface Parameter {
  /** For stacked experts, without the expert's number: `model.layers.3.mlp.experts.gate_proj.weight`. */
  readonly name: string;
  /** For stacked experts, with the number of experts first: [experts, rows, columns]. */
  readonly shape: readonly number[];
  /** Number of stacked experts, if it has any. Equals `shape[0]`. */
  readonly experts?: number;
  /** If the checkpoint lacks it, omit it from the result instead of throwing. Default false. */
  readonly optional?: boolean;
}

/** Location of a parameter's bytes. */
export interface Source {
  readonly name: string;
  readonly dtype: StoredFormat;
  /** As requested. */
  readonly shape: readonly number[];
  /** One; for stacked experts, one per expert in order. */
  readonly parts: readonly Slice[];
}

export interface Located {
  /** By parameter name, in the order requested. */
  readonly sources: Map<string, Source>;
  /** Stored tensors that the model does not use, that are not known to be superfluous, and whose names are not of its parts. */
  readonly unused: string[];
}

/** The name of part `index` of a parameter in the hub's layout. */
export function partName(parameter: string, index: number, stacked: boolean): string {
  return stacked ? parameter.replace(".experts.", `.experts.${index}.`) : parameter;
}

/** A part of a parameter as stored. */
interface Part {
  readonly dtype: StoredFormat;
  readonly slice: Slice;
}

const DTYPES: Partial<Record<StoredDtype, keyof typeof ELEMENT_BYTES>> = { F32: "f32", F16: "f16", BF16: "bf16" };
const CHUNK_BYTES = 2 ** 22;
const CORRECTION_BIAS = /\.mlp\.moe_statics\.e_score_correction_bias$/;
/** Multi-token prediction, which transformers ignores too; RoPE tables of old files. */
const SUPERFLUOUS = /(^|\.)mtp_|\.rotary_emb\.inv_freq$/;
/** Tensors that take part in the forward pass wherever they occur: a model without them is another model. `blk` is GGUF's. */
const OF_THE_MODEL = /^(model\.(embed_tokens|norm|layers)|lm_head|blk)\./;
const HEAD = "lm_head.weight";
const EMBEDDING = "model.embed_tokens.weight";

/**
 * Finds every parameter in a checkpoint.
 * @throws CheckpointError naming the first tensor that is missing, whose shape or dtype differs from the model's, or that
 * belongs to such a model but not to this one: a bias, a layer or an expert too many
 */
export function locate(parameters: Iterable<Parameter>, checkpoint: Checkpoint): Located {
  const reader = new Reader(checkpoint);
  const sources = new Map<string, Source>();
  const missing: string[] = [];
  for (const parameter of parameters) {
    const { name, shape, optional } = parameter;
    const parts = reader.parts(parameter);
    if (typeof parts !== "string")
      sources.set(name, { name, dtype: sameDtype(parameter, parts, checkpoint), shape, parts: parts.map((p) => p.slice) });
    else if (!optional) missing.push(parts);
  }
  if (missing.length > 0) throw new CheckpointError(checkpoint.folder, missingText(missing));
  const unused = [...checkpoint.tensors.keys()].filter((name) => !reader.used.has(name) && !SUPERFLUOUS.test(name));
  const extra = unused.filter((name) => OF_THE_MODEL.test(name) && name !== HEAD);
  if (extra.length > 0) throw new CheckpointError(checkpoint.folder, extraText(extra));
  return { sources, unused: unused.filter((name) => name !== HEAD) };
}

/**
 * Checks a head that is stored although the embeddings take its place (`tie_word_embeddings`): harmless if it is the same.
 * @throws CheckpointError if it is not
 */
export async function checkTiedHead({ sources }: Located, checkpoint: Checkpoint): Promise<void> {
  const [head, table] = [checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)];
  if (!head || !table || sources.has(HEAD)) return;
  if (head.dtype === table.dtype && head.bytes === table.bytes && (await sameBytes(head, table))) return;
  throw new CheckpointError(
    checkpoint.folder,
    `${HEAD} differs from ${EMBEDDING}, but config.json says tie_word_embeddings, which leaves the head unused; set it to false, or remove the tensor`,
  );
}

/** One line about tensors that are ignored; undefined if there are none. */
export function unusedText({ unused }: Located): string | undefined {
  if (unused.length === 0) return undefined;
  const more = unused.length > 3 ? ` and ${unused.length - 3} more` : "";
  return `the model does not use ${unused.length === 1 ? "the tensor" : "the tensors"} ${unused.slice(0, 3).join(", ")}${more}`;
}

function extraText(extra: readonly string[]): string {
  const [first] = extra;
  const others = extra.length > 1 ? ` (and ${extra.length - 1} more)` : "";
  const look = first.endsWith(".bias")
    ? "use_bias in config.json"
    : /\.experts\.|\.mlp\./.test(first)
      ? "moe_num_experts and the moe_layer fields in config.json"
      : "whether config.json belongs to these files";
  return `tensor ${first}${others} is stored, but the model that config.json describes has no such part and would compute something else; check ${look}, or remove the tensor`;
}

async function sameBytes(a: TensorEntry, b: TensorEntry): Promise<boolean> {
  return withFile(a.file, (left) =>
    withFile(b.file, async (right) => {
      for (let at = 0; at < a.bytes; at += CHUNK_BYTES) {
        const bytes = Math.min(CHUNK_BYTES, a.bytes - at);
        const [x, y] = await Promise.all([
          readExactly(left, a.file, a.offset + at, bytes),
          readExactly(right, b.file, b.offset + at, bytes),
        ]);
        if (!x.equals(y)) return false;
      }
      return true;
    }),
  );
}

function missingText(missing: readonly string[]): string {
  const others = missing.length > 1 ? ` (and ${missing.length - 1} more of the model's tensors)` : "";
  const first = missing.find((name) => !CORRECTION_BIAS.test(name));
  if (first !== undefined) return `tensor ${first} is missing${others}; the files are incomplete, or config.json belongs to another model`;
  return `the correction bias ${missing[0]} is missing${others}: routing would be wrong without it, so the checkpoint is rejected`;
}

/** Looks up tensors in a checkpoint and records which were used. */
class Reader {
  readonly used = new Set<string>();
  private readonly checkpoint: Checkpoint;

  constructor(checkpoint: Checkpoint) {
    this.checkpoint = checkpoint;
  }

  /** The parts of a parameter, or the name of the missing tensor. */
  parts({ name, shape, experts }: Parameter): readonly Part[] | string {
    if (experts === undefined) {
      const part = this.tensor(name, shape) ?? this.tensor(renamed(name), shape);
      return part ? [part] : name;
    }
    if (shape[0] !== experts) throw new Error(`internal: ${name} [${shape}] does not have ${experts} experts first`);
    return this.fused(name, shape) ?? this.separate(name, shape);
  }

  private tensor(name: string, shape: readonly number[]): Part | undefined {
    const entry = this.checkpoint.tensors.get(name);
    if (!entry) return undefined;
    this.used.add(name);
    const block = this.checkpoint.blocks.get(name);
    this.checkShape(name, block?.shape ?? entry.shape, shape);
    const dtype = block?.dtype ?? DTYPES[entry.dtype];
    if (!dtype) throw this.fail(`tensor ${name} is stored as ${entry.dtype}; F32, F16, BF16 and mixtape's int8, int4 and fp8 are read`);
    return { dtype, slice: { file: entry.file, offset: entry.offset, bytes: entry.bytes } };
  }

  /** Stacked experts as one tensor each: `experts.0.gate_proj.weight`, `experts.1.…`. */
  private separate(name: string, shape: readonly number[]): readonly Part[] | string {
    const parts: Part[] = [];
    for (let e = 0; e < (shape[0] ?? 0); e++) {
      const own = partName(name, e, true);
      const part = this.tensor(own, shape.slice(1));
      if (!part) return own;
      parts.push(part);
    }
    return parts;
  }

  /**
   * Stacked experts in one tensor, as transformers 5 stores them: `experts.down_proj` [E, H, I], and
   * `experts.gate_up_proj` [E, 2I, H] with an expert's gate rows before its up rows. That layout has no biases.
   */
  private fused(name: string, shape: readonly number[]): readonly Part[] | undefined {
    const match = /^(.*\.experts)\.(gate|up|down)_proj\.weight$/.exec(name);
    if (!match) return undefined;
    const [, prefix, which] = match;
    const halves = which === "down" ? 1 : 2;
    const [experts = 0, rows = 0, columns = 0] = shape;
    const stored = `${prefix}.${which === "down" ? "down_proj" : "gate_up_proj"}`;
    const whole = this.tensor(stored, [experts, halves * rows, columns]);
    if (!whole) return undefined;
    const bytes = whole.slice.bytes / (experts * halves);
    const first = whole.slice.offset + (which === "up" ? bytes : 0);
    return Array.from({ length: experts }, (_, e) => ({
      dtype: whole.dtype,
      slice: { file: whole.slice.file, offset: first + e * halves * bytes, bytes },
    }));
  }

  private checkShape(name: string, seen: readonly number[], expected: readonly number[]): void {
    if (seen.length === expected.length && seen.every((n, i) => n === expected[i])) return;
    throw this.fail(`tensor ${name} has the shape [${seen.join(", ")}], but config.json implies [${expected.join(", ")}]`);
  }

  private fail(what: string): CheckpointError {
    return new CheckpointError(this.checkpoint.folder, what);
  }
}

/** The name in transformers 5's layout of a tensor that is not stacked in either. */
function renamed(name: string): string {
  return name.replace(CORRECTION_BIAS, ".mlp.gate.moe_statics.e_score_correction_bias");
}

function sameDtype({ name }: Parameter, parts: readonly Part[], checkpoint: Checkpoint): StoredFormat {
  const dtype = parts[0]?.dtype ?? "f32";
  const other = parts.findIndex((part) => part.dtype !== dtype);
  if (other < 0) return dtype;
  throw new CheckpointError(
    checkpoint.folder,
    `${name}: expert 0 is ${dtype}, expert ${other} is ${parts[other]?.dtype}; experts of a layer share one dtype`,
  );
}
