/** The routes that OpenAI's clients know: chat and text completions, streamed or whole, models and embeddings. */
import { randomUUID } from "node:crypto";
import type { FastifyInstance, FastifyReply, FastifyRequest } from "fastify";
import type { ZodTypeProvider } from "fastify-type-provider-zod";
import type { Caller } from "../../access/gate.ts";
import { detokenize, embed } from "../../analysis.ts";
import type { CompletionEvent, CompletionRequest, FinishReason, ScoredToken, Usage } from "../../completion/request.ts";
import { answer, type ServerContext, withModel } from "../../context.ts";
import { ServerError } from "../../errors.ts";
import { errorBody } from "../error.ts";
import { EventStream } from "../sse.ts";
import { ChatBody, CompletionBody, chatRequest, completionRequests, EmbeddingBody, promptsOf, several } from "./schema.ts";

const FINISH: Readonly<Record<FinishReason, string>> = { stop: "stop", length: "length", toolCalls: "tool_calls" };

/** @param callerOf what authentication found out about a request */
export function registerOpenAi(app: FastifyInstance, context: ServerContext, callerOf: (request: FastifyRequest) => Caller): void {
  const routes = app.withTypeProvider<ZodTypeProvider>();
  const { catalog } = context;

  routes.post(
    "/v1/chat/completions",
    { schema: { body: ChatBody, tags: ["OpenAI"], summary: "Answer a conversation" } },
    (request, reply) =>
      withModel(context, callerOf(request), request.body.model, async (model) => {
        const { body } = request;
        const who = { owner: callerOf(request).id, signal: signalOf(reply) };
        const base = chatRequest(body, model.generationConfig, who);
        const requests = several(base, body.n ?? 1);
        const head = { id: `chatcmpl-${randomUUID()}`, created: now(), model: model.name };
        const answers = requests.map(() => new ChatAnswer());
        const usage = () => usageOf(answers, body.n ?? 1);
        const events = (i: number) => answer(context, callerOf(request), model, requests[i]);
        if (!body.stream) {
          await each(requests, events, (i, event) => answers[i].take(event));
          return reply.send({
            ...head,
            object: "chat.completion",
            choices: answers.map((a, index) => ({ index, ...a.choice() })),
            usage: usage(),
          });
        }
        const chunk = { ...head, object: "chat.completion.chunk" };
        return stream(reply, async (out) => {
          const begun = new Set<number>();
          await each(requests, events, async (index, event) => {
            const choice = answers[index].delta(event);
            const first = { index, delta: { role: "assistant", content: "" }, logprobs: null, finish_reason: null };
            if (!begun.has(index)) await out.send({ ...chunk, choices: [first] });
            begun.add(index);
            if (choice) await out.send({ ...chunk, choices: [{ index, ...choice }] });
          });
          if (body.stream_options?.include_usage)
            await out.send({
              ...chunk,
              choices: [],
              usage: usage(),
            });
        });
      }),
  );

  routes.post("/v1/completions", { schema: { body: CompletionBody, tags: ["OpenAI"], summary: "Continue texts" } }, (request, reply) =>
    withModel(context, callerOf(request), request.body.model, async (model) => {
      const { body } = request;
      const who = { owner: callerOf(request).id, signal: signalOf(reply) };
      const requests = completionRequests(body, model.generationConfig, who);
      const echo = async ({ prompt, signal }: CompletionRequest) =>
        detokenize(model, (await model.encoder.encode(prompt, signal)).tokens, false, "prompt");
      const echoes = body.echo ? await Promise.all(requests.map(echo)) : requests.map(() => "");
      const head = { id: `cmpl-${randomUUID()}`, object: "text_completion", created: now(), model: model.name };
      const answers = requests.map((_, i) => new TextAnswer(echoes[i]));
      const usage = () => usageOf(answers, body.n ?? 1);
      const events = (i: number) => answer(context, callerOf(request), model, requests[i]);
      if (!body.stream) {
        await each(requests, events, (i, event) => answers[i].take(event));
        return reply.send({
          ...head,
          choices: answers.map((a, index) => ({ index, ...a.choice() })),
          usage: usage(),
        });
      }
      return stream(reply, async (out) => {
        for (const [index, text] of echoes.entries())
          if (text) await out.send({ ...head, choices: [{ index, text, logprobs: null, finish_reason: null }] });
        await each(requests, events, async (index, event) => {
          const choice = answers[index].delta(event);
          if (choice) await out.send({ ...head, choices: [{ index, ...choice }] });
        });
        if (body.stream_options?.include_usage)
          await out.send({
            ...head,
            choices: [],
            usage: usage(),
          });
      });
    }),
  );

  const shown = ({ name, created }: { name: string; created: number }) => ({ id: name, object: "model", created, owned_by: "mixtape" });
  const visible = (request: FastifyRequest) => catalog.list().filter(({ name }) => callerOf(request).models?.includes(name) ?? true);

  routes.get("/v1/models", { schema: { tags: ["OpenAI"], summary: "List the models" } }, (request) => ({
    object: "list",
    data: visible(request).map(shown),
  }));

  routes.get("/v1/models/*", { schema: { tags: ["OpenAI"], summary: "One model, by its name" } }, (request) => {
    const name = (request.params as { "*": string })["*"];
    const found = visible(request).find((m) => m.name === name);
    if (!found) throw new ServerError("model_not_found", `there is no model '${name}'`, { param: "model" });
    return shown(found);
  });

  routes.post(
    "/v1/embeddings",
    { schema: { body: EmbeddingBody, tags: ["OpenAI"], summary: "Embed texts: the mean of the last hidden states, of length one" } },
    (request, reply) =>
      withModel(context, callerOf(request), request.body.model, async (model) => {
        const { input, encoding_format: format, dimensions } = request.body;
        const { hiddenSize } = model.config;
        if (dimensions != null && dimensions !== hiddenSize)
          throw new ServerError("invalid_request", `embeddings of this model have ${hiddenSize} dimensions, not ${dimensions}`, {
            param: "dimensions",
          });
        const { vectors, tokens } = await embed(context, callerOf(request), model, promptsOf(input), signalOf(reply));
        return {
          object: "list",
          model: model.name,
          data: vectors.map((v, index) => ({
            object: "embedding",
            index,
            embedding: format === "base64" ? Buffer.from(v.buffer, v.byteOffset, v.byteLength).toString("base64") : [...v],
          })),
          usage: { prompt_tokens: tokens, total_tokens: tokens },
        };
      }),
  );
}

/** Aborted when the client goes away before its answer is complete. */
export function signalOf(reply: FastifyReply): AbortSignal {
  const gone = new AbortController();
  const look = () => {
    if (!reply.raw.writableFinished) gone.abort(new Error("the client has gone"));
  };
  if (reply.raw.closed || reply.raw.destroyed)
    look(); // while the model was loaded
  else reply.raw.once("close", look);
  return gone.signal;
}

/** Runs all answers at once; the first that fails ends the others. */
async function each(
  requests: readonly CompletionRequest[],
  events: (index: number) => AsyncGenerator<CompletionEvent, void, undefined>,
  visit: (index: number, event: CompletionEvent) => void | Promise<void>,
): Promise<void> {
  const open = requests.map((_, i) => events(i));
  try {
    await Promise.all(
      open.map(async (stream, i) => {
        for await (const event of stream) await visit(i, event);
      }),
    );
  } finally {
    await Promise.allSettled(open.map((s) => s.return()));
  }
}

/** How long a stream waits for its first event before it begins without one: proxies end what is silent for long. */
const SILENCE_MS = 5000;

/** Streams what `write` sends. A failure before the stream begins is an ordinary error; later ones are an event. */
async function stream(reply: FastifyReply, write: (out: Pick<EventStream, "send">) => Promise<void>): Promise<FastifyReply> {
  let out: EventStream | null = null;
  const begin = () => {
    if (!out) {
      reply.hijack();
      out = new EventStream(reply.raw, reply.getHeaders() as Record<string, string>);
    }
    return out;
  };
  const silent = setTimeout(begin, SILENCE_MS);
  try {
    await write({ send: (data) => begin().send(data) });
    await begin().send("[DONE]");
  } catch (error) {
    if (!out) throw error;
    reply.log.error({ err: error }, "an answer failed midway");
    await begin().send(errorBody(error).body, "error");
  } finally {
    clearTimeout(silent);
  }
  await begin().end();
  return reply;
}

const NONE: Usage = { promptTokens: 0, cachedTokens: 0, completionTokens: 0, reasoningTokens: 0 };

/** @param n answers to each prompt, which stand together: a prompt counts once */
function usageOf(answers: readonly { readonly usage: Usage }[], n: number) {
  const all = answers.map((answer) => answer.usage);
  const sum = (key: keyof Usage, of = all) => of.reduce((total, u) => total + u[key], 0);
  const prompts = all.filter((_, i) => i % n === 0);
  const [prompt, completion] = [sum("promptTokens", prompts), sum("completionTokens")];
  return {
    prompt_tokens: prompt,
    completion_tokens: completion,
    total_tokens: prompt + completion,
    prompt_tokens_details: { cached_tokens: sum("cachedTokens", prompts) },
    completion_tokens_details: { reasoning_tokens: sum("reasoningTokens") },
  };
}

interface ToolCall {
  readonly id: string;
  readonly type: "function";
  readonly function: { name: string; arguments: string };
}

/** Collects the events of one chat answer, whole or as deltas. */
class ChatAnswer {
  usage = NONE;
  #content = "";
  #reasoning = "";
  readonly #calls: ToolCall[] = [];
  readonly #logprobs: object[] = [];
  readonly #routing: object[] = [];
  #sent = { logprobs: 0, routing: 0 };
  #finish = "length";

  take(event: CompletionEvent): void {
    switch (event.kind) {
      case "text":
        if (event.channel === "answer") this.#content += event.text;
        else this.#reasoning += event.text;
        break;
      case "logprob":
        this.#logprobs.push({ ...logprob(event.token), top_logprobs: event.top.map(logprob) });
        break;
      case "routing":
        this.#routing.push(routed(event.token));
        break;
      case "toolCall": {
        const call = this.#calls[event.index] ?? {
          id: event.id ?? "",
          type: "function",
          function: { name: event.name ?? "", arguments: "" },
        };
        call.function.arguments += event.arguments;
        this.#calls[event.index] = call;
        break;
      }
      case "end":
        this.usage = event.usage;
        this.#finish = FINISH[event.reason];
        break;
      default:
        event satisfies never;
    }
  }

  choice() {
    return {
      message: {
        role: "assistant",
        content: this.#content === "" && this.#calls.length > 0 ? null : this.#content,
        refusal: null,
        ...(this.#reasoning ? { reasoning_content: this.#reasoning } : {}),
        ...(this.#calls.length ? { tool_calls: this.#calls } : {}),
        ...(this.#routing.length ? { routing: this.#routing } : {}),
      },
      logprobs: this.#logprobs.length ? { content: this.#logprobs, refusal: null } : null,
      finish_reason: this.#finish,
    };
  }

  /** What an event adds, with the log-probabilities and routing that came before it; null where it is not sent by itself. */
  delta(event: CompletionEvent) {
    this.take(event);
    if (event.kind === "logprob" || event.kind === "routing") return null;
    const logprobs = this.#logprobs.slice(this.#sent.logprobs);
    const routing = this.#routing.slice(this.#sent.routing);
    this.#sent = { logprobs: this.#logprobs.length, routing: this.#routing.length };
    return {
      delta: { ...deltaOf(event), ...(routing.length ? { routing } : {}) },
      logprobs: logprobs.length ? { content: logprobs, refusal: null } : null,
      finish_reason: event.kind === "end" ? this.#finish : null,
    };
  }
}

function deltaOf(event: Extract<CompletionEvent, { kind: "text" | "toolCall" | "end" }>): object {
  if (event.kind === "text") return event.channel === "answer" ? { content: event.text } : { reasoning_content: event.text };
  if (event.kind === "end") return {};
  const { index, id, name, arguments: args } = event;
  const first = id === undefined ? {} : { id, type: "function" };
  return { tool_calls: [{ index, ...first, function: { ...(name === undefined ? {} : { name }), arguments: args } }] };
}

/** Collects the events of one text completion, in the older form. */
class TextAnswer {
  usage = NONE;
  #text: string;
  #offset: number;
  readonly #logprobs: { token: ScoredToken; top: readonly ScoredToken[]; offset: number }[] = [];
  readonly #routing: object[] = [];
  #sent = { logprobs: 0, routing: 0 };
  #finish = "length";

  constructor(echo: string) {
    this.#text = echo;
    this.#offset = echo.length;
  }

  take(event: CompletionEvent): void {
    if (event.kind === "text") this.#text += event.text;
    if (event.kind === "logprob") {
      this.#logprobs.push({ token: event.token, top: event.top, offset: this.#offset });
      this.#offset += textOf(event.token).length;
    }
    if (event.kind === "routing") this.#routing.push(routed(event.token));
    if (event.kind === "end") {
      this.usage = event.usage;
      this.#finish = FINISH[event.reason];
    }
  }

  choice() {
    return { text: this.#text, ...this.#rest(0, 0), finish_reason: this.#finish };
  }

  delta(event: CompletionEvent) {
    this.take(event);
    if (event.kind === "logprob" || event.kind === "routing") return null;
    const rest = this.#rest(this.#sent.logprobs, this.#sent.routing);
    this.#sent = { logprobs: this.#logprobs.length, routing: this.#routing.length };
    return { text: event.kind === "text" ? event.text : "", ...rest, finish_reason: event.kind === "end" ? this.#finish : null };
  }

  #rest(logprobsFrom: number, routingFrom: number) {
    const list = this.#logprobs.slice(logprobsFrom);
    const routing = this.#routing.slice(routingFrom);
    return {
      logprobs: list.length
        ? {
            tokens: list.map((l) => textOf(l.token)),
            token_logprobs: list.map((l) => l.token.logprob),
            top_logprobs: list.map((l) => Object.fromEntries(l.top.map((t) => [textOf(t), t.logprob]))),
            text_offset: list.map((l) => l.offset),
          }
        : null,
      ...(routing.length ? { routing } : {}),
    };
  }
}

function textOf({ bytes }: ScoredToken): string {
  return Buffer.from(bytes).toString("utf8");
}

function logprob(token: ScoredToken) {
  return { token: textOf(token), logprob: token.logprob, bytes: [...token.bytes] };
}

/** Experts and weights by layer: [layers][chosen]. */
export function routed({ id, text, layers, experts, weights }: Extract<CompletionEvent, { kind: "routing" }>["token"]) {
  const k = layers.length ? experts.length / layers.length : 0;
  const rows = (all: Int32Array | Float32Array) => layers.map((_, i) => [...all.subarray(i * k, (i + 1) * k)]);
  return {
    token: id,
    text,
    layers,
    experts: rows(experts),
    weights: rows(weights).map((row) => row.map((w) => Math.round(w * 1e4) / 1e4)),
  };
}

function now(): number {
  return Math.floor(Date.now() / 1000);
}
