/** Training of classifiers: the losses of transformers' `ForSequenceClassification` on each text's last token, and how well classes are told apart. */
import type { Numbers } from "../backend/backend.ts";
import type { Graph, Tensor } from "../graph/graph.ts";
import type { Forward } from "../model/model.ts";
import { symbol, times } from "../tensor/shape.ts";
import type { RowLimits } from "./check.ts";
import type { ClassExample } from "./data/example.ts";
import type { Problem } from "./data/labels.ts";
import type { Batch, Meter, Objective } from "./loss.ts";

export interface ClassificationOptions {
  readonly problem: Problem;
  /** Rows of the head: classes, or numbers of a regression. */
  readonly classes: number;
}

const LOGITS = "logits";

/**
 * Cross-entropy for one class a text, binary cross-entropy for any number of classes, squared error for regression: means over all texts of a
 * step and, but for the first, over the head's outputs.
 */
export function classification(options: ClassificationOptions): Objective<ClassExample> {
  const { problem, classes } = options;
  return {
    loss: (g, forward, chunk) => loss(g, forward, options, chunk),
    count: () => 1,
    length: (example) => example.input_ids.length,
    check: (example, index, limits) => check(example, index, limits, options),
    collate: (examples, total) => collate(examples, total, options),
    outputs: ({ sequences }) => ({ [LOGITS]: sequences * classes }),
    meter: () => (problem === "regression" ? new Errors(classes) : new Confusion(options)),
  };
}

function loss(g: Graph, { hiddenStates, head }: Forward, { problem, classes }: ClassificationOptions, chunk: number): Tensor {
  const texts = symbol("sequences");
  const pooled = g.gather(hiddenStates[hiddenStates.length - 1], g.input("last", [texts], "i32"));
  const logits = g.linear(pooled, head.weight, head.bias);
  g.output(LOGITS, logits);
  const all = times(texts, classes);
  const weights = g.input("weights", [problem === "single_label_classification" ? texts : all], "f32");
  if (problem === "single_label_classification")
    return g.dot(g.crossEntropy(pooled, head.weight, g.input("labels", [texts], "i32"), chunk, head.bias), weights);
  const flat = g.reshape(logits, [all]);
  const targets = g.input("targets", [all], "f32"); // negated
  if (problem === "regression") {
    const error = g.add(flat, targets);
    return g.dot(g.mul(error, error), weights);
  }
  return g.dot(g.add(g.softplus(flat), g.mul(flat, targets)), weights); // softplus(x) - x y
}

function collate(examples: readonly ClassExample[], total: number, { problem, classes }: ClassificationOptions): Batch {
  const rows = examples.reduce((n, e) => n + e.input_ids.length, 0);
  const texts = examples.length;
  const single = problem === "single_label_classification";
  const inputs = {
    ids: new Int32Array(rows),
    positions: new Int32Array(rows),
    segments: new Int32Array(texts * 3),
    last: new Int32Array(texts),
    weights: new Float32Array(single ? texts : texts * classes).fill(1 / (Math.max(1, total) * (single ? 1 : classes))),
  };
  let row = 0;
  examples.forEach(({ input_ids: ids }, i) => {
    inputs.ids.set(ids, row);
    for (let j = 0; j < ids.length; j++) inputs.positions[row + j] = j;
    inputs.segments.set([row, ids.length, 0], i * 3);
    row += ids.length;
    inputs.last[i] = row - 1;
  });
  const targets: Record<string, Numbers> = single
    ? { labels: Int32Array.from(examples, (e) => e.labels as number) }
    : { targets: Float32Array.from(examples.flatMap((e) => targetsOf(e).map((y) => -y))) };
  return { rows, sequences: texts, inputs: { ...inputs, ...targets } };
}

function targetsOf({ labels }: ClassExample): readonly number[] {
  return typeof labels === "number" ? [labels] : labels;
}

/** Throws a RangeError that names the row and says what is wrong with it. */
function check(example: ClassExample, index: number, limits: RowLimits, { problem, classes }: ClassificationOptions): void {
  const fail = (what: string) => new RangeError(`${limits.name}, row ${index}: ${what}`);
  const ids = example?.input_ids;
  if (!Array.isArray(ids) && !ArrayBuffer.isView(ids)) throw fail("expected an object with a list of whole numbers, input_ids, and labels");
  if (ids.length === 0) throw fail("has no tokens");
  if (ids.length > limits.longest) throw fail(`has ${ids.length} tokens, the limit is ${limits.longest}; shorten the row`);
  const bad = ids.findIndex((id) => !Number.isInteger(id) || id < 0 || id >= limits.vocabSize);
  if (bad >= 0) throw fail(`input_ids[${bad}] is ${ids[bad]}, outside the vocabulary of ${limits.vocabSize}`);
  const { labels } = example;
  if (problem === "single_label_classification") {
    if (!Number.isInteger(labels) || (labels as number) < 0 || (labels as number) >= classes)
      throw fail(`labels is ${JSON.stringify(labels)}; expected one class, from 0 to ${classes - 1}`);
    return;
  }
  const numbers = targetsOf(example);
  if (!Array.isArray(numbers) || numbers.length !== classes)
    throw fail(
      `labels is ${JSON.stringify(labels)}; expected ${classes} number${classes === 1 ? "" : "s"}, one for each of the head's outputs`,
    );
  const fits = (y: number) => (problem === "regression" ? Number.isFinite(y) : y === 0 || y === 1);
  const wrong = numbers.find((y) => typeof y !== "number" || !fits(y));
  if (wrong !== undefined)
    throw fail(`labels holds ${JSON.stringify(wrong)}; expected ${problem === "regression" ? "finite numbers" : "0 or 1 for each class"}`);
}

/**
 * Accuracy and F1 as scikit-learn has them. One class: the share of texts whose likeliest class is right; F1 of each class that occurs or is
 * predicted, and their mean (macro). Several: the share of texts of which every class is right, a logit above 0 meaning yes; F1 of all decisions
 * together (micro).
 */
class Confusion implements Meter<ClassExample> {
  readonly #single: boolean;
  readonly #right: Float64Array;
  readonly #predicted: Float64Array;
  readonly #actual: Float64Array;
  #texts = 0;
  #exact = 0;

  constructor({ problem, classes }: ClassificationOptions) {
    this.#single = problem === "single_label_classification";
    [this.#right, this.#predicted, this.#actual] = [new Float64Array(classes), new Float64Array(classes), new Float64Array(classes)];
  }

  add(examples: readonly ClassExample[], { [LOGITS]: logits }: Readonly<Record<string, Float32Array>>): void {
    const classes = this.#right.length;
    examples.forEach((example, i) => {
      const own = logits.subarray(i * classes, (i + 1) * classes);
      const best = own.indexOf(own.reduce((a, b) => Math.max(a, b)));
      let exact = true;
      own.forEach((logit, c) => {
        const said = this.#single ? c === best : logit > 0;
        const is = this.#single ? c === example.labels : (example.labels as readonly number[])[c] === 1;
        this.#predicted[c] += Number(said);
        this.#actual[c] += Number(is);
        this.#right[c] += Number(said && is);
        exact &&= said === is;
      });
      this.#texts++;
      this.#exact += Number(exact);
    });
  }

  values(): Record<string, number> {
    const sum = (numbers: Float64Array) => numbers.reduce((a, b) => a + b, 0);
    const f1 = (right: number, predicted: number, actual: number) => (2 * right) / (predicted + actual);
    const seen = [...this.#right.keys()].filter((c) => this.#predicted[c] + this.#actual[c] > 0);
    const each = seen.map((c) => f1(this.#right[c], this.#predicted[c], this.#actual[c]));
    const macro = each.reduce((a, b) => a + b, 0) / Math.max(1, each.length);
    const micro = seen.length === 0 ? 0 : f1(sum(this.#right), sum(this.#predicted), sum(this.#actual));
    return { accuracy: this.#exact / Math.max(1, this.#texts), f1: this.#single ? macro : micro };
  }
}

/** Mean squared and mean absolute error over all numbers. */
class Errors implements Meter<ClassExample> {
  readonly #classes: number;
  #squares = 0;
  #sizes = 0;
  #count = 0;

  constructor(classes: number) {
    this.#classes = classes;
  }

  add(examples: readonly ClassExample[], { [LOGITS]: logits }: Readonly<Record<string, Float32Array>>): void {
    examples.forEach((example, i) => {
      targetsOf(example).forEach((y, c) => {
        const error = logits[i * this.#classes + c] - y;
        this.#squares += error * error;
        this.#sizes += Math.abs(error);
        this.#count++;
      });
    });
  }

  values(): Record<string, number> {
    return { mse: this.#squares / Math.max(1, this.#count), mae: this.#sizes / Math.max(1, this.#count) };
  }
}
