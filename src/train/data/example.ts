/** What a step of training is given: ids, and what is to be learnt of them. Knows no rows and no text. */

/** The label of a token that is not learnt, as in transformers. */
export const IGNORED = -100;

/** For next-token prediction. `labels[i]` is `input_ids[i]` or -100; the token before it is what predicts it, so a document's first is always -100. */
export interface CausalExample {
  readonly input_ids: readonly number[];
  readonly labels: readonly number[];
  /** Of packed examples: start and length of each document, in order and without gaps. Attention stays within one; positions restart at 0. */
  readonly segments?: readonly (readonly [start: number, length: number])[];
}

/** For a classifier. `labels`: the class; of several classes a 0 or 1 for each; for regression, the number. */
export interface ClassExample {
  readonly input_ids: readonly number[];
  readonly labels: number | readonly number[];
}

/** For preference tuning. Each answer follows the prompt; neither is empty. */
export interface PreferenceExample {
  readonly prompt_ids: readonly number[];
  readonly chosen_ids: readonly number[];
  readonly rejected_ids: readonly number[];
}

export type Example = CausalExample | ClassExample | PreferenceExample;

/** Tokens of an example: of a preference, of the longer of its two sequences. */
export function lengthOf(example: Example): number {
  if ("input_ids" in example) return example.input_ids.length;
  return example.prompt_ids.length + Math.max(example.chosen_ids.length, example.rejected_ids.length);
}

/** Tokens of an example for next-token prediction that are learnt. */
export function learntOf({ labels }: CausalExample): number {
  return labels.reduce((sum, label) => sum + (label === IGNORED ? 0 : 1), 0);
}
