/** `pipeline("text-classification")`: texts in, labels with scores out, as transformers gives them. */
import { optionFault } from "../tokenizer/options.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import {
  type ActivationName,
  AutoModelForSequenceClassification,
  activated,
  activationOf,
  type ClassifierOptions,
  type SequenceClassifier,
} from "./classifier.ts";
import { AutoTokenizer } from "./tokenizer.ts";

export interface TextClassificationOptions {
  /** How many labels to give for each text, best first; null: all. Without it a text gives the best one alone, not in a list. */
  readonly top_k?: number | null;
  /** How logits become scores. Default: none for regression, sigmoid for multi-label problems and single outputs, else softmax. */
  readonly function_to_apply?: ActivationName | "default";
  /** Cut longer texts to `max_length` tokens, at their end. Default false: they are an error. */
  readonly truncation?: boolean;
  /** Default: the model's longest position. */
  readonly max_length?: number;
  /** The name of a loaded adapter; null: the base model. Default: the active one. */
  readonly adapter?: string | null;
  readonly signal?: AbortSignal;
}

export interface Classification {
  readonly label: string;
  readonly score: number;
}

export interface TextClassificationPipeline {
  /** One text: its best label, in a list of one. */
  (text: string, options?: Omit<TextClassificationOptions, "top_k">): Promise<Classification[]>;
  /** Several texts: the best label of each. */
  (texts: readonly string[], options?: Omit<TextClassificationOptions, "top_k">): Promise<Classification[]>;
  /** With `top_k`, a list for each text. */
  (text: string, options: TextClassificationOptions & { readonly top_k: number | null }): Promise<Classification[]>;
  (texts: readonly string[], options: TextClassificationOptions & { readonly top_k: number | null }): Promise<Classification[][]>;
  readonly model: SequenceClassifier;
  readonly tokenizer: Tokenizer;
  dispose(): Promise<void>;
}

const KNOWN = [
  "top_k",
  "function_to_apply",
  "truncation",
  "max_length",
  "adapter",
  "signal",
] as const satisfies readonly (keyof TextClassificationOptions)[];
const REMEDIES = { return_all_scores: "give top_k: null", padding: "texts need none; leave it out" };
const FUNCTIONS = ["default", "softmax", "sigmoid", "none"];
/** Texts that are computed at the same time, so that a long list does not fill memory. */
const AT_ONCE = 256;

export async function textClassification(idOrFolder: string, options: ClassifierOptions): Promise<TextClassificationPipeline> {
  const model = await AutoModelForSequenceClassification.from_pretrained(idOrFolder, options);
  try {
    // An adapter's folder may lack a tokenizer; its base, where the weights are, has one.
    const tokenizer = await AutoTokenizer.from_pretrained(model.folder, {});
    const call = (texts: string | readonly string[], given: TextClassificationOptions = {}) => classify(model, tokenizer, texts, given);
    return Object.assign(call as TextClassificationPipeline, { model, tokenizer, dispose: () => model.dispose() });
  } catch (error) {
    await model.dispose();
    throw error;
  }
}

async function classify(
  model: SequenceClassifier,
  tokenizer: Tokenizer,
  given: string | readonly string[],
  options: TextClassificationOptions,
): Promise<Classification[] | Classification[][]> {
  const fault = optionFault("text-classification", options, KNOWN, REMEDIES);
  if (fault !== null) throw new RangeError(fault);
  const {
    top_k: most,
    function_to_apply: asked = "default",
    truncation = false,
    max_length: longest = model.config.maxPositions,
  } = options;
  if (!FUNCTIONS.includes(asked)) throw new RangeError(`function_to_apply is '${asked}'; it must be ${FUNCTIONS.join(", ")}`);
  if (most != null && (!Number.isInteger(most) || most < 1))
    throw new RangeError(`top_k is ${most}; it must be a whole number of at least 1, or null for all`);
  if (!Number.isInteger(longest) || longest < 1) throw new RangeError(`max_length is ${longest}; it must be a whole number of at least 1`);
  const texts = typeof given === "string" ? [given] : given;
  if (!Array.isArray(texts) || !texts.every((text) => typeof text === "string"))
    throw new RangeError(
      "text-classification takes a text or a list of texts; pairs of texts are joined by whoever knows how the model was trained",
    );
  const { classifier } = model;
  const name = asked === "default" ? activationOf(classifier) : asked;
  const results: Classification[][] = [];
  for (let from = 0; from < texts.length; from += AT_ONCE) {
    const rows = texts.slice(from, from + AT_ONCE).map((text) => {
      const tokens = tokenizer.encode(text);
      return truncation ? tokens.slice(0, longest) : tokens;
    });
    for (const logits of await model.classify(rows, options)) {
      const scores = activated(logits, name);
      const sorted = [...scores].map((score, i) => ({ label: classifier.labels[i], score })).sort((a, b) => b.score - a.score);
      results.push(most == null ? sorted : sorted.slice(0, most));
    }
  }
  if (most === undefined) return results.map(([best]) => best);
  return typeof given === "string" ? results[0] : results;
}
