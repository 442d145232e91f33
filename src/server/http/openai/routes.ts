/** OpenAI's routes: chat and text completions, streamed or whole, models and embeddings. Knows no format of a choice. */
import { randomUUID } from "node:crypto";
import type { FastifyInstance, FastifyReply, FastifyRequest } from "fastify";
import type { ZodTypeProvider } from "fastify-type-provider-zod";
import type { Caller } from "../../access/gate.ts";
import { type Classified, classify, detokenize, embed } from "../../analysis.ts";
import { contextLength } from "../../completion/complete.ts";
import type { CompletionEvent, CompletionRequest } from "../../completion/request.ts";
import { answer, type ServerContext, withModel } from "../../context.ts";
import { ServerError } from "../../errors.ts";
import { errorBody } from "../error.ts";
import { jsonList, jsonWith } from "../lists.ts";
import { signalOf } from "../signal.ts";
import { EventStream } from "../sse.ts";
import { ChatChoice, TextChoice, usageOf } from "./choice.ts";
import { chatRequest, completionRequests, promptsOf, several } from "./request.ts";
import { ChatBody, ClassifyBody, CompletionBody, EmbeddingBody } from "./schema.ts";

/** @param callerOf who sent a request */
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
        const base = chatRequest(body, model.defaults, who);
        const requests = several(base, body.n ?? 1);
        const head = { id: `chatcmpl-${randomUUID()}`, created: now(), model: model.name };
        const answers = requests.map(() => new ChatChoice());
        const meter = context.meter(callerOf(request), model);
        const usage = () => usageOf(meter.usage);
        const events = (i: number) => answer(context, model, requests[i], meter.answerTo(0));
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
      const requests = completionRequests(body, model.defaults, who);
      const echo = async ({ prompt, signal, owner }: CompletionRequest) => {
        const { tokens } = await model.encoder.encode(prompt, signal, { owner, mostTokens: contextLength(model) });
        return detokenize(model, tokens, false, "prompt", signal, owner);
      };
      const echoes = body.echo ? await Promise.all(requests.map(echo)) : requests.map(() => "");
      const head = { id: `cmpl-${randomUUID()}`, object: "text_completion", created: now(), model: model.name };
      const answers = requests.map((_, i) => new TextChoice(echoes[i]));
      const meter = context.meter(callerOf(request), model);
      const usage = () => usageOf(meter.usage);
      const events = (i: number) => answer(context, model, requests[i], meter.answerTo(Math.floor(i / (body.n ?? 1))));
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

  for (const path of ["/v1/classify", "/classify"])
    routes.post(
      path,
      { schema: { body: ClassifyBody, tags: ["vLLM"], summary: "Classify texts, with a model that is a classifier" } },
      (request, reply) =>
        withModel(context, callerOf(request), request.body.model, async (model) => {
          const { body } = request;
          const truncate = body.truncate_prompt_tokens ?? null;
          if (truncate === 0)
            throw new ServerError("invalid_request", "truncate_prompt_tokens is 0: at least one token is needed", {
              param: "truncate_prompt_tokens",
            });
          const terms = {
            mostTokens: truncate === -1 ? contextLength(model) : truncate,
            keep: body.truncation_side === "right" ? ("first" as const) : ("last" as const),
            raw: (body.use_activation ?? body.activation ?? body.softmax) === false,
          };
          const prompts = promptsOf(body.input).map((prompt) =>
            prompt.kind === "text" ? { ...prompt, specialTokens: body.add_special_tokens ?? true } : prompt,
          );
          const { results, usage } = await classify(context, callerOf(request), model, prompts, terms, signalOf(reply));
          const fields = {
            id: `classify-${randomUUID().replaceAll("-", "")}`,
            object: "list",
            created: now(),
            model: model.name,
            usage: {
              prompt_tokens: usage.promptTokens,
              total_tokens: usage.promptTokens,
              completion_tokens: 0,
              prompt_tokens_details: usage.cachedTokens > 0 ? { cached_tokens: usage.cachedTokens } : null,
            },
          };
          const classified = ({ label, scores }: Classified, index: number) => ({
            index,
            label,
            probs: [...scores],
            num_classes: scores.length,
          });
          const data = await jsonList(results, classified, callerOf(request).id);
          return reply.type("application/json; charset=utf-8").send(jsonWith(fields, { data }));
        }),
    );

  const shown = ({ name, created, demo, parent }: ReturnType<typeof catalog.list>[number]) => ({
    id: name,
    object: "model",
    created,
    owned_by: "mixtape",
    ...(parent === undefined ? {} : { parent }), // as vLLM marks adapters
    ...(demo ? { demo } : {}), // an extension: the bundled model, of which nobody should expect much
  });
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
        const embedding = (v: Float32Array, index: number) => ({
          object: "embedding",
          index,
          embedding: format === "base64" ? Buffer.from(v.buffer, v.byteOffset, v.byteLength).toString("base64") : [...v],
        });
        const fields = { object: "list", model: model.name, usage: { prompt_tokens: tokens, total_tokens: tokens } };
        const data = await jsonList(vectors, embedding, callerOf(request).id);
        return reply.type("application/json; charset=utf-8").send(jsonWith(fields, { data }));
      }),
  );
}

/** Runs all answers at once; the first failure ends the others. */
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

/** A stream starts without its first event after this time: proxies close connections that stay silent. */
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

function now(): number {
  return Math.floor(Date.now() / 1000);
}
