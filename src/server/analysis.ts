/** What models offer besides answers: their facts, and a text's tokens, embedding and experts. Knows no protocol. */
import { activated, activationOf, withoutPadding } from "../api/classifier.ts";
import { kvCacheName } from "../api/kv.ts";
import { anyOf } from "../api/signal.ts";
import type { Prompt } from "../chat/prompt.ts";
import type { RoutedLayer } from "../engine/engine.ts";
import { moeLayers } from "../model/config.ts";
import { measure } from "../model/size.ts";
import type { Caller } from "./access/gate.ts";
import type { NamedModel } from "./catalog.ts";
import { contextLength } from "./completion/complete.ts";
import type { Usage } from "./completion/request.ts";
import type { ServerContext } from "./context.ts";
import { ServerError } from "./errors.ts";

/** A model's architecture and size. */
export function factsOf(model: NamedModel) {
  const { name, config, engine, dtype } = model;
  return {
    name,
    architecture: config.architecture,
    /** `active`: parameters that one token uses. */
    parameters: measure(config).parameters,
    layers: config.layers,
    hiddenSize: config.hiddenSize,
    vocabularySize: config.vocabSize,
    /** Null for dense models. */
    moe: config.moe,
    contextLength: contextLength(model),
    dtype,
    kvCacheDtype: kvCacheName(engine.kvDtype),
  };
}

/** The longest text whose tokens are listed, in characters: the list is many times longer. */
const LONGEST_LISTED = 2 ** 19;

/**
 * The ids of a text, and the piece that each stands for. Rejects with ServerError `invalid_request` for a text that is too long.
 * @param specialTokens add the special tokens that the tokenizer declares
 */
export async function tokenize(
  { encoder, tokenizer }: NamedModel,
  text: string,
  specialTokens: boolean,
  signal?: AbortSignal,
  owner?: string,
): Promise<{ readonly tokens: readonly number[]; readonly pieces: readonly string[] }> {
  if (text.length > LONGEST_LISTED)
    throw new ServerError("invalid_request", `the text has ${text.length} characters; at most ${LONGEST_LISTED} are allowed`, {
      param: "text",
    });
  const { tokens } = await encoder.encode({ kind: "text", text, specialTokens }, signal, { owner });
  return { tokens, pieces: tokenizer.convert_ids_to_tokens(tokens) };
}

/** Rejects with ServerError `invalid_request` for ids outside the model's vocabulary. @param param the field that holds them */
export async function detokenize(
  { encoder, config }: NamedModel,
  tokens: readonly number[],
  skipSpecialTokens: boolean,
  param = "tokens",
  signal?: AbortSignal,
  owner?: string,
): Promise<string> {
  const wrong = tokens.findIndex((id) => id < 0 || id >= config.vocabSize);
  if (wrong >= 0)
    throw new ServerError("invalid_request", `token id ${tokens[wrong]} is outside the vocabulary of ${config.vocabSize}`, {
      param: `${param}[${wrong}]`,
    });
  return encoder.decode(tokens, skipSpecialTokens, signal, { owner });
}

/** One unit vector per prompt, [hidden size], and the total number of prompt tokens. */
export async function embed(
  context: ServerContext,
  caller: Caller,
  model: NamedModel,
  prompts: readonly Prompt[],
  signal?: AbortSignal,
): Promise<{ readonly vectors: readonly Float32Array[]; readonly tokens: number }> {
  const terms = { owner: caller.id, mostTokens: contextLength(model) };
  const encoded = (await Promise.all(prompts.map((prompt) => model.encoder.encode(prompt, signal, terms)))).map(({ tokens }) => tokens);
  for (const [i, tokens] of encoded.entries()) checkTokens(model, tokens, `input[${i}]`); // before any is computed
  const meter = context.meter(caller, model);
  const vectors: Float32Array[] = [];
  for (const [i, tokens] of encoded.entries()) {
    const { read } = meter.answerTo(i);
    const watch = { signal, onPrompt: (count: number) => read(count, 0), adapter: model.adapter };
    vectors.push(unitLength(await model.engine.embed(tokens, watch)));
  }
  return { vectors, tokens: meter.usage.promptTokens };
}

export interface ClassifyTerms {
  /** Use only so many tokens of each text; null: longer ones are errors. */
  readonly mostTokens: number | null;
  /** Which of a text's tokens to keep. */
  readonly keep: "first" | "last";
  /** Return logits as they are. */
  readonly raw: boolean;
}

/** The class of each text, with probabilities in the order of the classes. */
export interface Classified {
  readonly label: string;
  readonly scores: Float32Array;
}

/**
 * Classifies texts; they share steps. Rejects with ServerError `invalid_request` for a model that is no classifier, and for what the engine
 * cannot compute.
 */
export async function classify(
  context: ServerContext,
  caller: Caller,
  model: NamedModel,
  prompts: readonly Prompt[],
  terms: ClassifyTerms,
  signal?: AbortSignal,
): Promise<{ readonly results: readonly Classified[]; readonly usage: Usage }> {
  const { name, config, engine, encoder, adapter } = model;
  const { classifier } = config;
  if (!classifier) throw new ServerError("invalid_request", `the model '${name}' is no classifier: it predicts tokens`, { param: "model" });
  const longest = Math.min(contextLength(model), context.maxPromptTokens ?? Number.POSITIVE_INFINITY);
  const most = terms.mostTokens === null ? null : Math.min(terms.mostTokens, longest);
  const encoded = await Promise.all(
    prompts.map(async (prompt) => {
      const { tokens } = await encoder.encode(prompt, signal, { owner: caller.id, ...(most === null ? { mostTokens: longest } : {}) });
      if (most === null || tokens.length <= most) return tokens;
      return terms.keep === "first" ? tokens.slice(0, most) : tokens.slice(-most);
    }),
  );
  for (const [i, tokens] of encoded.entries()) {
    const param = `input[${i}]`;
    checkTokens(model, tokens, param); // before any is computed
    if (tokens.length > longest)
      throw new ServerError("context_length_exceeded", `the text has ${tokens.length} tokens; this server accepts at most ${longest}`, {
        param,
      });
  }
  const meter = context.meter(caller, model);
  const leave = new AbortController();
  const all = encoded.map((tokens, i) =>
    engine.classify({
      tokens: withoutPadding(tokens, config.padTokenId),
      owner: caller.id,
      signal: anyOf(signal, leave.signal),
      onPrompt: meter.answerTo(i).read,
      ...(adapter === undefined ? {} : { adapter }),
    }),
  );
  try {
    const scores = (await Promise.all(all)).map((logits) => activated(logits, terms.raw ? "none" : activationOf(classifier)));
    const results = scores.map((each) => ({
      label: classifier.labels[each.reduce((best, x, i) => (x > each[best] ? i : best), 0)],
      scores: each,
    }));
    return { results, usage: meter.usage };
  } catch (error) {
    leave.abort(error);
    await Promise.allSettled(all);
    throw error;
  }
}

/**
 * The experts of each token, layer by layer. Rejects with ServerError `invalid_request` for dense models and for prompts with more
 * than `most` uses of an expert.
 */
export async function route(
  context: ServerContext,
  caller: Caller,
  model: NamedModel,
  prompt: Prompt,
  signal?: AbortSignal,
  most = Number.POSITIVE_INFINITY,
): Promise<{
  readonly tokens: readonly number[];
  readonly layers: readonly RoutedLayer[];
  readonly experts: number;
  readonly chosen: number;
}> {
  const { name, config, encoder, engine } = model;
  if (!config.moe) throw new ServerError("invalid_request", `the model '${name}' is dense: it has no experts`, { param: "model" });
  const { tokens } = await encoder.encode(prompt, signal, { owner: caller.id, mostTokens: contextLength(model) });
  const each = moeLayers(config).length * config.moe.chosen;
  if (tokens.length * each > most)
    throw new ServerError(
      "invalid_request",
      `the prompt has ${tokens.length} tokens; at most ${Math.floor(most / each)} are listed at once: send a part, or use gRPC, which streams them`,
      { param: prompt.kind === "chat" ? "messages" : "text" },
    );
  checkTokens(model, tokens, prompt.kind === "chat" ? "messages" : "text");
  const { read } = context.meter(caller, model).answerTo(0);
  const watch = { signal, onPrompt: (count: number) => read(count, 0), adapter: model.adapter };
  const { routing } = await engine.inspect(tokens, { logits: false, routing: true }, watch);
  return { tokens, layers: routing, experts: config.moe.experts, chosen: config.moe.chosen };
}

/** Throws ServerError `context_length_exceeded` or `invalid_request` for tokens that the model cannot compute. */
function checkTokens(model: NamedModel, tokens: readonly number[], param: string): void {
  try {
    model.engine.check({ tokens });
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    const code = tokens.length > contextLength(model) ? "context_length_exceeded" : "invalid_request";
    throw new ServerError(code, cause.message, { param, cause });
  }
}

function unitLength(v: Float32Array): Float32Array {
  const length = Math.hypot(...v);
  return length > 0 ? v.map((x) => x / length) : v;
}
