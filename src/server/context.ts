/** What routes of every protocol stand on: models, callers, limits, accounts. Implemented by `server.ts` and its parts. */
import { complete } from "./completion/complete.ts";
import type { Caller, Catalog, CompletionEvent, CompletionRequest, ServedModel, Usage } from "./completion/request.ts";
import { ServerError } from "./errors.ts";

/** Told what happens, for metrics. */
export interface Observer {
  /** An answer's first token, its following ones, and its end. */
  firstToken(model: string, seconds: number): void;
  nextToken(model: string, seconds: number): void;
  answered(model: string, usage: Usage): void;
}

export interface Services {
  readonly catalog: Catalog;
  readonly observer: Observer;
  /** Answers with so many tokens at most, whatever was asked for; null: no limit. */
  readonly maxTokens: number | null;
  /** Refuses longer prompts; null: those that the model can't take. */
  readonly maxPromptTokens: number | null;
  /** Takes what was used off the caller's budget. */
  account(caller: Caller, usage: Usage): void;
}

/** Lends a model to `use` while it runs. Throws ServerError when the caller may not use it, or there is none of this name. */
export async function withModel<T>(services: Services, caller: Caller, name: string, use: (model: ServedModel) => Promise<T>): Promise<T> {
  if (caller.models && !caller.models.includes(name))
    throw new ServerError("model_not_allowed", `this key may not use the model '${name}'; it may use ${caller.models.join(", ")}`, {
      param: "model",
    });
  const { model, release } = await services.catalog.use(name);
  try {
    return await use(model);
  } finally {
    release();
  }
}

/** Generates an answer, and lets metrics and the caller's account know. */
export async function* answer(
  services: Services,
  caller: Caller,
  model: ServedModel,
  request: CompletionRequest,
): AsyncGenerator<CompletionEvent, void, undefined> {
  const { observer, maxTokens, maxPromptTokens } = services;
  const limited: CompletionRequest = {
    ...request,
    ...(maxPromptTokens === null ? {} : { maxPromptTokens }),
    ...(maxTokens === null ? {} : { maxTokens: Math.min(request.maxTokens ?? maxTokens, maxTokens) }),
  };
  let last = performance.now();
  let first = true;
  const settle = (usage: Usage) => {
    services.account(caller, usage);
    observer.answered(model.name, usage);
  };
  for await (const event of complete(model, limited, settle)) {
    if (event.kind === "text" || event.kind === "toolCall") {
      const now = performance.now();
      if (first) observer.firstToken(model.name, (now - last) / 1000);
      else observer.nextToken(model.name, (now - last) / 1000);
      first = false;
      last = now;
    }
    yield event;
  }
}
