/** Checks that a row can be trained on by a model. Knows no text. */
import { type CausalExample, IGNORED } from "./data/example.ts";

export interface RowLimits {
  /** The name of the data in errors: `train_dataset`. */
  readonly name: string;
  readonly vocabSize: number;
  /** The most tokens in a row. */
  readonly longest: number;
}

/** Start and length of each document of a row. */
export function segmentsOf({ input_ids, segments }: CausalExample): readonly (readonly [number, number])[] {
  return segments ?? [[0, input_ids.length]];
}

/** Throws a RangeError that names the row and says what is wrong with it. */
export function checkCausal(example: CausalExample, index: number, { name, vocabSize, longest }: RowLimits): void {
  const fail = (what: string) => new RangeError(`${name}, row ${index}: ${what}`);
  if (typeof example !== "object" || example === null || !isList(example.input_ids) || !isList(example.labels))
    throw fail("expected an object with two lists of whole numbers, input_ids and labels");
  const { input_ids: ids, labels } = example;
  if (ids.length === 0) throw fail("has no tokens");
  if (labels.length !== ids.length) throw fail(`has ${ids.length} input_ids but ${labels.length} labels; they must be as many`);
  if (ids.length > longest) throw fail(`has ${ids.length} tokens, the limit is ${longest}; shorten the row, or split it`);
  for (let i = 0; i < ids.length; i++) {
    if (!Number.isInteger(ids[i]) || ids[i] < 0 || ids[i] >= vocabSize)
      throw fail(`input_ids[${i}] is ${ids[i]}, outside the vocabulary of ${vocabSize}`);
    if (labels[i] !== IGNORED && (!Number.isInteger(labels[i]) || labels[i] < 0 || labels[i] >= vocabSize))
      throw fail(`labels[${i}] is ${labels[i]}; expected ${IGNORED} or a token of the vocabulary of ${vocabSize}`);
  }
  let end = 0;
  for (const [start, length] of example.segments ?? []) {
    if (start !== end || !Number.isInteger(length) || length < 1)
      throw fail(`segments must follow each other without gaps; [${start}, ${length}] follows token ${end}`);
    end = start + length;
  }
  if (example.segments && end !== ids.length) throw fail(`segments cover ${end} of ${ids.length} tokens`);
}

function isList(value: unknown): boolean {
  return Array.isArray(value) || (ArrayBuffer.isView(value) && "length" in value);
}
