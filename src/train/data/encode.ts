/**
 * From rows to ids. A prompt is encoded exactly as it is when the model is asked, and the answer apart from it, as the model will write it:
 * joined, the tokenizer would merge the prompt's end with the answer's beginning into tokens that never follow each other when the model answers.
 */
import { type Conversation, encodePrompt, encodeTurn, PromptError } from "../../chat/prompt.ts";
import type { Message } from "../../tokenizer/message.ts";
import type { Tokenizer } from "../../tokenizer/tokenizer.ts";
import { type CausalExample, type ClassExample, IGNORED, type PreferenceExample } from "./example.ts";
import { RowError } from "./fault.ts";
import type { ChatRow, CompletionRow, LabelRow, PreferenceRow, TextRow } from "./row.ts";

/** What becomes of an example that is longer than the limit: `split` is for texts only. */
export const OVERFLOWS = ["error", "truncate", "skip", "split"] as const;
export type Overflow = (typeof OVERFLOWS)[number];

/** What is learnt of a conversation: every answer, the last one, or everything that is written. */
export const LEARNT = ["answers", "last", "all"] as const;
export type Learnt = (typeof LEARNT)[number];

export interface EncodeOptions {
  readonly tokenizer: Tokenizer;
  readonly maxLength: number;
  readonly overflow: Overflow;
  readonly learnt: Learnt;
  /** Extra variables for the chat template. */
  readonly templateVariables: Readonly<Record<string, unknown>>;
}

/** The examples of one row; those that were cut, and those that were left out, because of their length. */
export interface Encoded<E> {
  readonly examples: readonly E[];
  readonly truncated: number;
  readonly skipped: number;
}

/** Encodes a row for next-token prediction. Throws RowError. */
export function encodeCausal(row: ChatRow | CompletionRow | TextRow, options: EncodeOptions): Encoded<CausalExample> {
  switch (row.kind) {
    case "chat":
      return encodeChat(row, options);
    case "completion": {
      const prompt = encodeText(options.tokenizer, row.prompt);
      const ids = [...prompt, ...withEnd(options.tokenizer, options.tokenizer.encode_continuation(row.completion))];
      const labels = options.learnt === "all" ? [...ids] : ids.map((id, i) => (i < prompt.length ? IGNORED : id));
      return fitAll([{ ids, labels }], options);
    }
    case "text":
      return encodeDocument(row, options);
    default:
      return row satisfies never;
  }
}

/**
 * One example for each answer that is learnt. Where the ids of a turn's prompt begin with those of the turn before, answer included, both share one
 * example; else (the tokenizer merges across the answer's edge) each has its own, so that every prompt is what the model will be given.
 */
function encodeChat({ messages, tools, trained }: ChatRow, options: EncodeOptions): Encoded<CausalExample> {
  const { tokenizer, maxLength, overflow, learnt } = options;
  const firstUser = messages.findIndex(({ role }) => role !== "system" && role !== "assistant");
  let turns = [...messages.keys()].filter((i) => trained[i] && firstUser >= 0 && i > firstUser);
  if (turns.length === 0) throw new RowError("there is no answer of the assistant to learn");
  if (learnt === "last") turns = turns.slice(-1);
  const sequences: { readonly ids: number[]; readonly labels: number[] }[] = [];
  let beyond = 0;
  for (const [t, i] of turns.entries()) {
    const { prompt, answer } = turn(tokenizer, conversation(messages.slice(0, i + 1), tools, options));
    const room = maxLength - prompt.length;
    if (overflow !== "error" && (room <= 0 || (overflow === "skip" && answer.length > room))) {
      beyond = turns.length - t; // the turns that follow are longer still
      break;
    }
    const last = sequences.at(-1);
    const labels = [...answer];
    if (last && startsWith(prompt, last.ids)) {
      const between = prompt.slice(last.ids.length);
      last.labels.push(...between.map(() => IGNORED), ...labels);
      last.ids.push(...between, ...answer);
    } else sequences.push({ ids: [...prompt, ...answer], labels: [...prompt.map(() => IGNORED), ...labels] });
    if (overflow === "error") fits(sequences.at(-1)?.ids.length ?? 0, maxLength);
  }
  const all = learnt === "all";
  const encoded = fitAll(
    sequences.map(({ ids, labels }) => ({ ids, labels: all ? [...ids] : labels })),
    options,
  );
  return { ...encoded, skipped: encoded.skipped + beyond };
}

/** A text with its end token. Cut into sequences of the limit with `split`. */
function encodeDocument({ text, continues }: TextRow, options: EncodeOptions): Encoded<CausalExample> {
  const { tokenizer, maxLength, overflow } = options;
  const encoded = encodeText(tokenizer, text);
  const ids = continues ? encoded : withEnd(tokenizer, encoded);
  if (overflow !== "split") return fitAll([{ ids, labels: [...ids] }], options);
  const examples: CausalExample[] = [];
  // A sequence of one token has nothing to predict.
  for (let from = 0; ids.length - from >= 2; from += maxLength) examples.push(example(ids.slice(from, from + maxLength), null));
  if (examples.length === 0) throw new RowError("the text has only one token: there is nothing to predict");
  return { examples, truncated: 0, skipped: 0 };
}

/** Encodes a text for a classifier. @param labels of the row, as ids */
export function encodeLabel({ text }: LabelRow, labels: ClassExample["labels"], options: EncodeOptions): Encoded<ClassExample> {
  const { tokenizer, maxLength, overflow } = options;
  const ids = encodeText(tokenizer, text);
  if (ids.length === 0) throw new RowError("the text has no tokens");
  if (ids.length <= maxLength) return { examples: [{ input_ids: ids, labels }], truncated: 0, skipped: 0 };
  if (overflow === "error") fits(ids.length, maxLength);
  if (overflow === "skip") return { examples: [], truncated: 0, skipped: 1 };
  // Keeps the tokens that the tokenizer adds at the ends.
  const { input_ids } = tokenizer(text, { truncation: true, max_length: maxLength });
  return { examples: [{ input_ids: input_ids[0], labels }], truncated: 1, skipped: 0 };
}

/** Encodes a pair of answers. Throws RowError. */
export function encodePreference(row: PreferenceRow, options: EncodeOptions): Encoded<PreferenceExample> {
  const { tokenizer, maxLength, overflow } = options;
  const [chosen, rejected] = [row.chosen, row.rejected].map((answer) => answerIds(row.prompt, answer, options));
  const prompt = chosen.prompt;
  if (prompt.length !== rejected.prompt.length || !startsWith(rejected.prompt, prompt))
    throw new RowError("the chat template writes the prompt differently before the two answers");
  if (chosen.answer.length === rejected.answer.length && startsWith(chosen.answer, rejected.answer))
    throw new RowError("chosen and rejected are the same");
  const longest = prompt.length + Math.max(chosen.answer.length, rejected.answer.length);
  const of = (room: number): PreferenceExample => ({
    prompt_ids: prompt,
    chosen_ids: chosen.answer.slice(0, room),
    rejected_ids: rejected.answer.slice(0, room),
  });
  if (prompt.length === 0)
    throw new RowError(`the prompt has no tokens${tokenizer.bos_token === null ? "" : ", and the tokenizer adds none"}`);
  if (longest <= maxLength) return { examples: [of(maxLength)], truncated: 0, skipped: 0 };
  if (overflow === "error") fits(longest, maxLength);
  if (overflow === "skip" || prompt.length >= maxLength) return { examples: [], truncated: 0, skipped: 1 };
  return { examples: [of(maxLength - prompt.length)], truncated: 1, skipped: 0 };
}

/** The prompt of a preference, and one answer to it. Of an answer of several messages, those before the last become part of it. */
function answerIds(
  prompt: PreferenceRow["prompt"],
  answer: string | readonly Message[],
  options: EncodeOptions,
): { prompt: number[]; answer: number[] } {
  const { tokenizer } = options;
  if (typeof prompt === "string") {
    if (typeof answer !== "string") throw new RowError("the prompt is a text, so chosen and rejected must be texts too");
    return { prompt: encodeText(tokenizer, prompt), answer: withEnd(tokenizer, tokenizer.encode_continuation(answer)) };
  }
  const said = typeof answer === "string" ? [{ role: "assistant", content: answer }] : answer;
  const first = said.findIndex(({ role }) => role === "assistant");
  const before = [...prompt.messages, ...said.slice(0, first)];
  const base = turn(tokenizer, conversation([...before, said[first]], prompt.tools, options));
  if (said.length === first + 1) return base;
  const whole = turn(tokenizer, conversation([...before, ...said.slice(first)], prompt.tools, options));
  const ids = [...whole.prompt, ...whole.answer];
  if (!startsWith(ids, base.prompt)) throw new RowError("the chat template rewrites the prompt once there are more messages behind it");
  return { prompt: base.prompt, answer: ids.slice(base.prompt.length) };
}

function conversation(messages: readonly Message[], tools: ChatRow["tools"], { templateVariables }: EncodeOptions): Conversation {
  return { kind: "chat", messages, tools, toolChoice: tools.length > 0 ? "auto" : "none", oneToolCall: false, templateVariables };
}

/** The last message as the model has to write it, with the token that ends its turn. */
function turn(tokenizer: Tokenizer, of: Conversation): { prompt: number[]; answer: number[] } {
  try {
    const { prompt, answer } = encodeTurn(tokenizer, of);
    return { prompt, answer: withEnd(tokenizer, answer) };
  } catch (error) {
    if (error instanceof PromptError) throw new RowError(error.message);
    throw error;
  }
}

function encodeText(tokenizer: Tokenizer, text: string): number[] {
  return [...encodePrompt(tokenizer, { kind: "text", text }).tokens];
}

/** Ends with the special token that the template or the tokenizer wrote, without white space behind it; where there is none, with `eos_token`. */
function withEnd(tokenizer: Tokenizer, ids: readonly number[]): number[] {
  const { vocabulary, eos_token_id } = tokenizer;
  const last = ids.findLastIndex((id) => vocabulary.isSpecial(id));
  if (last >= 0 && tokenizer.decode(ids.slice(last + 1)).trim() === "") return ids.slice(0, last + 1);
  return eos_token_id === null ? [...ids] : [...ids, eos_token_id];
}

/** Applies the limit to each sequence. */
function fitAll(
  sequences: readonly { readonly ids: number[]; readonly labels: number[] }[],
  options: EncodeOptions,
): Encoded<CausalExample> {
  const { maxLength, overflow } = options;
  const examples: CausalExample[] = [];
  let [truncated, skipped] = [0, 0];
  for (const { ids, labels } of sequences) {
    let fitted: { readonly ids: number[]; readonly labels: number[] } | null = { ids, labels };
    if (ids.length > maxLength) {
      if (overflow === "error") fits(ids.length, maxLength);
      fitted = overflow === "truncate" ? { ids: ids.slice(0, maxLength), labels: labels.slice(0, maxLength) } : null;
      if (fitted && learntCount(fitted.labels) === 0) fitted = null;
      if (fitted) truncated++;
      else skipped++;
    } else if (learntCount(labels) === 0) throw new RowError("there is nothing to learn: it has only one token");
    if (fitted) examples.push(example(fitted.ids, fitted.labels));
  }
  return { examples, truncated, skipped };
}

/** @param labels null: all ids */
function example(ids: number[], labels: number[] | null): CausalExample {
  return { input_ids: ids, labels: (labels ?? ids).with(0, IGNORED) };
}

/** Labels that something predicts: the first has no token before it. */
function learntCount(labels: readonly number[]): number {
  let count = 0;
  for (let i = 1; i < labels.length; i++) if (labels[i] !== IGNORED) count++;
  return count;
}

function fits(length: number, most: number): void {
  if (length > most)
    throw new RowError(`it has ${length} tokens; max_length is ${most} (overflow: truncate or skip keeps the rest of the data)`);
}

function startsWith(ids: readonly number[], beginning: readonly number[]): boolean {
  return ids.length >= beginning.length && beginning.every((id, i) => ids[i] === id);
}
