/** The methods of mixtape.proto. Knows no connection and no key. */
import type { UntypedServiceImplementation } from "@grpc/grpc-js";
import { classify, detokenize, embed, factsOf, route, tokenize } from "../analysis.ts";
import type { NamedModel } from "../catalog.ts";
import type { CompletionRequest } from "../completion/request.ts";
import { answer, type ServerContext, withModel } from "../context.ts";
import type { Calls, Context, StreamContext } from "./calls.ts";
import { eventMessage, routingMessage } from "./events.ts";
import {
  type Chat,
  type Classify,
  chatCompletionRequest,
  type Embed,
  fieldOf,
  type Generate,
  generateRequest,
  type Named,
  type Route,
  routeFieldOf,
} from "./requests.ts";

export function mixtapeService(calls: Calls, server: ServerContext): UntypedServiceImplementation {
  const unary = <Q extends Named>(act: (model: NamedModel, request: Q, context: Context) => Promise<object>) =>
    calls.unary<Q>((request, context) => withModel(server, context.caller, request.model, (model) => act(model, request, context)), {
      fieldOf,
    });

  const stream = <Q extends Named>(
    act: (model: NamedModel, request: Q, context: StreamContext) => Promise<void>,
    nameOf: (param: string) => string = fieldOf,
  ) =>
    calls.stream<Q>((request, context) => withModel(server, context.caller, request.model, (model) => act(model, request, context)), {
      fieldOf: nameOf,
    });
  const completion = <Q extends Named>(
    wanted: (model: NamedModel, request: Q, who: Pick<CompletionRequest, "owner" | "signal">) => CompletionRequest,
  ) =>
    stream<Q>(async (model, request, { caller, signal, send }) => {
      const wants = wanted(model, request, { owner: caller.id, signal });
      for await (const event of answer(server, model, wants, server.meter(caller, model).answerTo(0))) await send(eventMessage(event));
    });

  return {
    Generate: completion<Generate>(generateRequest),
    Chat: completion<Chat>(chatCompletionRequest),
    Tokenize: unary<Named & { text: string; add_special_tokens: boolean }>(
      async (model, { text, add_special_tokens }, { caller, signal }) => {
        const { tokens, pieces } = await tokenize(model, text, add_special_tokens, signal, caller.id);
        return { tokens, pieces };
      },
    ),
    Detokenize: unary<Named & { tokens: number[]; skip_special_tokens: boolean }>(
      async (model, { tokens, skip_special_tokens }, { caller, signal }) => ({
        text: await detokenize(model, tokens, skip_special_tokens, "tokens", signal, caller.id),
      }),
    ),
    ListModels: calls.unary<object>(
      async (_request, { caller }) => ({ models: server.catalog.list().filter(({ name }) => caller.models?.includes(name) ?? true) }),
      { computes: false },
    ),
    GetModel: unary(async (model) => modelInfo(model)),
    Embed: unary<Embed>(async (model, { prompts }, { caller, signal }) => {
      const { vectors, tokens } = await embed(server, caller, model, prompts, signal);
      return { embeddings: vectors.map((vector) => ({ values: [...vector] })), prompt_tokens: tokens };
    }),
    Classify: unary<Classify>(async (model, { prompts, terms }, { caller, signal }) => {
      const { results, usage } = await classify(server, caller, model, prompts, terms, signal);
      return { results: results.map(({ label, scores }) => ({ label, scores: [...scores] })), prompt_tokens: usage.promptTokens };
    }),
    Route: stream<Route>(async (model, { prompt }, { caller, signal, send }) => {
      const { tokens, layers, chosen } = await route(server, caller, model, prompt, signal);
      const numbers = layers.map(({ layer }) => layer);
      for (const [t, id] of tokens.entries()) {
        const [experts, weights] = [new Int32Array(layers.length * chosen), new Float32Array(layers.length * chosen)];
        for (const [l, layer] of layers.entries()) {
          experts.set(layer.experts.subarray(t * chosen, (t + 1) * chosen), l * chosen);
          weights.set(layer.weights.subarray(t * chosen, (t + 1) * chosen), l * chosen);
        }
        await send(routingMessage({ id, text: model.tokenizer.decode([id]), layers: numbers, experts, weights }));
      }
    }, routeFieldOf),
  };
}

function modelInfo(model: NamedModel): object {
  const { name, architecture, parameters, layers, hiddenSize, vocabularySize, moe, contextLength, dtype, kvCacheDtype } = factsOf(model);
  return {
    name,
    architecture,
    parameters: parameters.total,
    active_parameters: parameters.active,
    layers,
    hidden_size: hiddenSize,
    vocabulary_size: vocabularySize,
    experts: moe?.experts,
    experts_per_token: moe?.chosen,
    shared_experts: moe?.sharedExperts,
    context_length: contextLength,
    dtype,
    kv_cache_dtype: kvCacheDtype,
  };
}
