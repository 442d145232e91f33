/** What the handlers of every protocol share: models, limits, metrics and accounting. `server.ts` provides it. Knows no protocol. */

import type { Caller } from "./access/gate.ts";
import type { Catalog, NamedModel } from "./catalog.ts";
import { complete } from "./completion/complete.ts";
import type { CompletionEvent, CompletionRequest, Progress } from "./completion/request.ts";
import { ServerError } from "./errors.ts";
import type { Meter, TokenKind } from "./meter.ts";

/** Records what happens, for metrics. */
export interface Observer {
  /** An answer's first token, and each following token. */
  firstToken(model: string, seconds: number): void;
  nextToken(model: string, seconds: number): void;
  /** Tokens used. */
  used(model: string, kind: TokenKind, tokens: number): void;
}

export interface ServerContext {
  readonly catalog: Catalog;
  readonly observer: Observer;
  /** The most tokens of an answer, whatever the request says; null: no limit. */
  readonly maxTokens: number | null;
  /** The longest prompt in tokens; null: as long as the model allows. */
  readonly maxPromptTokens: number | null;
  /** Counts what a request uses, and charges it to the caller's budget as it is computed. */
  meter(caller: Caller, model: NamedModel): Meter;
}

/** Runs `use` with a model that stays loaded meanwhile. Throws ServerError when the caller may not use it, or it does not exist. */
export async function withModel<T>(
  context: ServerContext,
  caller: Caller,
  name: string,
  use: (model: NamedModel) => Promise<T>,
): Promise<T> {
  if (caller.models && !caller.models.includes(name))
    throw new ServerError("model_not_allowed", `this key may not use the model '${name}'; it may use ${caller.models.join(", ")}`, {
      param: "model",
    });
  const { model, release } = await context.catalog.use(name);
  try {
    return await use(model);
  } finally {
    release();
  }
}

/** Generates an answer within the server's limits, and records metrics. @param progress of the request's meter */
export async function* answer(
  context: ServerContext,
  model: NamedModel,
  request: CompletionRequest,
  progress: Progress,
): AsyncGenerator<CompletionEvent, void, undefined> {
  const { observer, maxTokens, maxPromptTokens } = context;
  const limited: CompletionRequest = {
    ...request,
    ...(maxPromptTokens === null ? {} : { maxPromptTokens }),
    ...(maxTokens === null ? {} : { maxTokens: Math.min(request.maxTokens ?? maxTokens, maxTokens) }),
  };
  let last = performance.now();
  let first = true;
  for await (const event of complete(model, limited, progress)) {
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
