/** A classifier's head: one that has learnt nothing yet, or that of an adapter's folder. */
import { type AdapterFolder, openAdapter } from "../checkpoint/adapter.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import type { TensorEntry } from "../checkpoint/safetensors.ts";
import { type Problem, readClassifier } from "../model/config.ts";
import { elements } from "../tensor/shape.ts";
import { normal, Random } from "../train/random.ts";
import type { Head } from "./load.ts";

export interface HeadOptions {
  /** One of the two. */
  readonly num_labels?: number;
  readonly id2label?: Readonly<Record<number, string>>;
  readonly problem_type?: Problem;
  /** Default 42. */
  readonly seed?: number;
}

/** The standard deviation of transformers' `initializer_range`. */
const DEVIATION = 0.02;

/** Numbers as transformers begins them, without a bias. Throws ConfigError for a number of classes that cannot be. */
export function newHead({ id2label, problem_type, num_labels, seed = 42 }: HeadOptions): Head {
  const { labels } = readClassifier(id2label === undefined ? { num_labels } : { id2label }, "");
  return {
    classifier: { labels, problem: problem_type ?? null, bias: false },
    sources: new Map(),
    fresh({ name, shape }) {
      if (name !== "score.weight") return null;
      const random = new Random(seed, name);
      return Float32Array.from({ length: elements(shape) }, () => DEVIATION * normal(random));
    },
  };
}

const SCORE = /^(?:.*\.)?score\.(weight|bias)$/;
/** Formats of tensors that `openAdapter` accepts. */
const STORED = { F32: "f32", F16: "f16", BF16: "bf16" } as const;

/** Whether an adapter has a head. */
export function hasHead({ tensors }: AdapterFolder): boolean {
  return [...tensors.keys()].some((name) => SCORE.test(name));
}

/** The same of a folder. */
export async function holdsHead(folder: string): Promise<boolean> {
  return hasHead(await openAdapter(folder));
}

/** The head in an adapter's folder. */
export function headOf({ folder, file, tensors }: AdapterFolder, id2label: HeadOptions["id2label"]): Head {
  const found = new Map<string, TensorEntry>();
  for (const [name, entry] of tensors) {
    const half = SCORE.exec(name)?.[1];
    if (half !== undefined) found.set(`score.${half}`, entry);
  }
  const weight = found.get("score.weight");
  if (!weight)
    throw new CheckpointError(folder, "has no head: there is no tensor score.weight, which modules_to_save ['score'] would give");
  const [classes] = weight.shape;
  if (weight.shape.length !== 2 || classes < 1)
    throw new CheckpointError(file, `tensor ${weight.name} has the shape [${weight.shape}], not [classes, hidden size]`);
  const labels = readClassifier(id2label === undefined ? { num_labels: classes } : { id2label }, "").labels;
  if (labels.length !== classes) throw new RangeError(`id2label names ${labels.length} classes, and ${weight.name} has ${classes} rows`);
  return {
    classifier: { labels, problem: null, bias: found.has("score.bias") },
    sources: new Map(
      [...found].map(([name, entry]) => [name, { stored: STORED[entry.dtype as keyof typeof STORED], parts: [entry], shape: entry.shape }]),
    ),
  };
}
