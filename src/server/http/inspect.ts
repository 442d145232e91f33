/** mixtape's own routes: tokens of a text and back, and which experts a text uses. Knows no admission. */
import type { FastifyInstance, FastifyRequest } from "fastify";
import type { ZodTypeProvider } from "fastify-type-provider-zod";
import type { Prompt } from "../../chat/prompt.ts";
import type { Caller } from "../access/gate.ts";
import { detokenize, route, tokenize } from "../analysis.ts";
import { type ServerContext, withModel } from "../context.ts";
import { ServerError } from "../errors.ts";
import { jsonList, jsonWith } from "./lists.ts";
import { chatPrompt, messagesOf } from "./openai/request.ts";
import { DetokenizeBody, RoutingBody, TokenizeBody } from "./openai/schema.ts";
import { signalOf } from "./signal.ts";

/** The most numbers of an expert that a response lists: tokens times layers times experts of each. gRPC streams any number. */
const MOST_ROUTED = 2 ** 20;

const JSON_TYPE = "application/json; charset=utf-8";

export function registerInspection(app: FastifyInstance, context: ServerContext, callerOf: (request: FastifyRequest) => Caller): void {
  const routes = app.withTypeProvider<ZodTypeProvider>();

  routes.post("/tokenize", { schema: { body: TokenizeBody, tags: ["mixtape"], summary: "The tokens of a text" } }, (request, reply) =>
    withModel(context, callerOf(request), request.body.model, async (model) => {
      const { text, add_special_tokens } = request.body;
      const owner = callerOf(request).id;
      const { tokens, pieces } = await tokenize(model, text, add_special_tokens ?? true, signalOf(reply), owner);
      const same = <T>(each: T) => each;
      const lists = { tokens: await jsonList(tokens, same, owner), pieces: await jsonList(pieces, same, owner) };
      return reply.type(JSON_TYPE).send(jsonWith({ count: tokens.length }, lists));
    }),
  );

  routes.post("/detokenize", { schema: { body: DetokenizeBody, tags: ["mixtape"], summary: "The text of tokens" } }, (request, reply) =>
    withModel(context, callerOf(request), request.body.model, async (model) => {
      const { tokens, skip_special_tokens } = request.body;
      return { text: await detokenize(model, tokens, skip_special_tokens ?? false, "tokens", signalOf(reply), callerOf(request).id) };
    }),
  );

  routes.post(
    "/v1/routing",
    { schema: { body: RoutingBody, tags: ["mixtape"], summary: "Which experts each token of a text or conversation uses" } },
    (request, reply) =>
      withModel(context, callerOf(request), request.body.model, async (model) => {
        const { text, messages } = request.body;
        if ((text === undefined) === (messages === undefined))
          throw new ServerError("invalid_request", "give either text or messages", { param: text === undefined ? "text" : "messages" });
        const prompt: Prompt = text !== undefined ? { kind: "text", text } : chatPrompt(messagesOf(messages ?? []));
        const { tokens, layers, experts, chosen } = await route(context, callerOf(request), model, prompt, signalOf(reply), MOST_ROUTED);
        const { id: owner } = callerOf(request);
        const rows = (all: Int32Array | Float32Array) => jsonList(tokens, (_, t) => [...all.subarray(t * chosen, (t + 1) * chosen)], owner);
        const written: string[] = [];
        for (const { layer, experts: used, weights } of layers) {
          const load = new Array<number>(experts).fill(0);
          for (const e of used) load[e]++;
          written.push(jsonWith({ layer, load }, { experts: await rows(used), weights: await rows(weights) }));
        }
        const named = await jsonList(tokens, (id) => ({ id, text: model.tokenizer.decode([id]) }), owner);
        return reply.type(JSON_TYPE).send(jsonWith({ model: model.name }, { tokens: named, layers: `[${written.join()}]` }));
      }),
  );
}
