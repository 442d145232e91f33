/** A classifier's head that has learnt nothing yet. */
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
