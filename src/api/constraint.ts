/** Grammars of `generate` and pipelines: which constraint an answer gets. Compiled grammars are shared by calls with one tokenizer. */
import { endsInReasoning, TAGS } from "../chat/dialect.ts";
import { shapeOf } from "../chat/format.ts";
import type { Prompt } from "../chat/prompt.ts";
import type { Constraint } from "../engine/sequence.ts";
import type { Grammars } from "../grammar/grammars.ts";
import type { ErnieConfig } from "../model/config.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { ResolvedGeneration } from "./generation.ts";

/** By tokenizer, then by vocabulary size and end tokens. */
const KEPT = new WeakMap<Tokenizer, Map<string, Promise<Grammars>>>();

/** Loaded when first needed: most processes never constrain an answer, and all want their first token soon. */
function grammarsOf(tokenizer: Tokenizer, vocabSize: number, endIds: readonly number[]): Promise<Grammars> {
  const known = KEPT.get(tokenizer) ?? new Map<string, Promise<Grammars>>();
  KEPT.set(tokenizer, known);
  const key = [vocabSize, ...endIds].join();
  const grammars = known.get(key) ?? import("../grammar/grammars.ts").then((grammar) => new grammar.Grammars(tokenizer, vocabSize, endIds));
  known.set(key, grammars);
  return grammars;
}

/** Makes the constraint of an answer, null for none. Rejects with GrammarError for a format that can't be enforced. */
export type Constrain = (promptIds: readonly number[]) => Promise<Constraint | null>;

/**
 * How answers to `prompt` are constrained: to their format, to required calls, or to the arguments of strict tools; null: not
 * at all. Where a prompt ends inside the model's reasoning, the constraint begins after it.
 * @throws RangeError when a constraint is needed, and there is no tokenizer or no token that ends an answer
 */
export function constrainBy(
  { format, stopIds }: ResolvedGeneration,
  prompt: Prompt,
  { vocabSize }: ErnieConfig,
  tokenizer: Tokenizer | undefined,
): Constrain | null {
  const wanted = shapeOf(format, prompt);
  if (wanted === null) return null;
  const { shape, param } = wanted;
  if (!tokenizer) throw new RangeError("response_format needs the option 'tokenizer' as well, to know the text of each token");
  if (stopIds.length === 0) throw new RangeError(`${param} needs a token that ends the answer, and eos_token_id names none`);
  return async (ids) => {
    const grammars = await grammarsOf(tokenizer, vocabSize, stopIds);
    return grammars.constraint(shape, { param, after: endsInReasoning(tokenizer, ids) ? TAGS.think[1] : null });
  };
}
