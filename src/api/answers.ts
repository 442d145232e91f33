/** Runs the engine for each prompt of a call and each answer to it. Knows no text: what reads it is handed in. */
import type { Engine } from "../engine/engine.ts";
import { seedOf } from "../engine/sampling.ts";
import type { GeneratedToken, Request } from "../engine/sequence.ts";
import type { Constrain } from "./constraint.ts";
import type { GenerationOptions, ResolvedGeneration, Row } from "./generation.ts";
import { anyOf } from "./signal.ts";

/** What one request of the engine gave. */
export interface Answer {
  readonly row: Row;
  /** New tokens; the end token, if one came, is the last. */
  readonly tokens: readonly GeneratedToken[];
  /** With `top_logprobs`: the alternatives of each token. */
  readonly top: { id: number; logprob: number }[][];
  readonly finish: "stop" | "length";
}

export interface AnswerParts {
  readonly settings: ResolvedGeneration;
  readonly options: Pick<GenerationOptions, "streamer" | "top_logprobs" | "signal">;
  readonly constrain: Constrain | null;
  /** The name of a loaded adapter. Default: the base model. */
  readonly adapter?: string;
  /** Called once for each answer; the function that it returns sees each token and ends the answer by returning true. */
  readonly watch: (() => (token: GeneratedToken) => boolean) | null;
}

/**
 * Answers of all rows, in their order; answers to one row are consecutive. The first failure ends the others.
 * @param vocabSize bound of `top_logprobs`
 */
export async function answerRows(engine: Engine, vocabSize: number, rows: readonly Row[], parts: AnswerParts): Promise<Answer[]> {
  const { settings, options } = parts;
  const { top_logprobs = 0 } = options;
  if (options.streamer && rows.length * settings.answers > 1)
    throw new RangeError(`a streamer takes one answer, and ${rows.length * settings.answers} were asked for`);
  if (!Number.isInteger(top_logprobs) || top_logprobs < 0 || top_logprobs > vocabSize)
    throw new RangeError(`top_logprobs is ${top_logprobs}; it must be a whole number from 0 to the vocabulary's size`);
  options.signal?.throwIfAborted();
  const leave = new AbortController();
  const signal = anyOf(options.signal, leave.signal);
  const answers = rows.flatMap((row, r) =>
    Array.from({ length: settings.answers }, (_, i) => answerRow(engine, row, r * settings.answers + i, parts, signal)),
  );
  try {
    return await Promise.all(answers);
  } catch (error) {
    leave.abort(error);
    await Promise.allSettled(answers);
    throw error;
  }
}

/** @param index of the answer in the call: seeds count up with it */
async function answerRow(engine: Engine, row: Row, index: number, parts: AnswerParts, signal: Request["signal"]): Promise<Answer> {
  const { settings, options, constrain, watch, adapter } = parts;
  const { streamer, top_logprobs: topLogprobs = 0 } = options;
  const { sampling } = settings;
  const constraint = constrain && (await constrain(row.tokens));
  const isOver = watch?.();
  const tokens: GeneratedToken[] = [];
  const top: { id: number; logprob: number }[][] = [];
  let finish: "stop" | "length" = "length";
  const stream = engine.submit({
    tokens: row.tokens,
    sampling: index === 0 ? sampling : { ...sampling, seed: seedOf(sampling.seed, index) },
    maxNewTokens: settings.maxNewTokens(row.given.length),
    stopIds: settings.stopIds,
    topLogprobs,
    ...(constraint ? { constraint } : {}),
    ...(adapter === undefined ? {} : { adapter }),
    signal,
  });
  try {
    streamer?.put(row.given);
    for await (const token of stream) {
      tokens.push(token);
      if (token.top) top.push([...token.top]);
      streamer?.put([token.id]);
      finish = token.finish ?? finish;
      if (isOver?.(token)) {
        finish = "stop";
        break;
      }
    }
  } finally {
    streamer?.end();
  }
  return { row, tokens, top, finish };
}
