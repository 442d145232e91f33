/** Validates what the server sends: stream events, models, errors. Knows nothing of requests or the page. */

/** Which experts computed one token: per mixture layer the chosen experts and their weights, [layers][chosen]. */
export interface RoutedExperts {
  readonly text: string;
  readonly layers: readonly number[];
  readonly experts: readonly (readonly number[])[];
  readonly weights: readonly (readonly number[])[];
}

/** A delta of a tool call: the first has the name, and each has the next part of the arguments. */
export interface ToolCallPiece {
  readonly index: number;
  readonly name: string | null;
  readonly arguments: string;
}

/** Token counts of a request. */
export interface Usage {
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly completionTokens: number;
}

/** What one stream event adds to an answer. */
export interface Delta {
  readonly content: string;
  readonly reasoning: string;
  readonly toolCalls: readonly ToolCallPiece[];
  readonly routing: readonly RoutedExperts[];
  /** Why the answer ended; only in its last delta. */
  readonly finish: string | null;
  readonly usage: Usage | null;
}

/** An error in the shape of OpenAI's API. */
export interface Failure {
  readonly message: string;
  readonly code: string | null;
}

type Fields = Readonly<Record<string, unknown>>;

function isFields(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function fieldsOf(value: unknown): Fields {
  return isFields(value) ? value : {};
}

function listOf(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

function textOf(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function countOf(value: unknown): number {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : 0;
}

/** Reads a stream event; null when it is not a chat completion chunk. */
export function readDelta(value: unknown): Delta | null {
  if (!isFields(value) || !Array.isArray(value["choices"])) return null;
  const choice = fieldsOf(value["choices"][0]);
  const delta = fieldsOf(choice["delta"]);
  return {
    content: textOf(delta["content"]),
    reasoning: textOf(delta["reasoning_content"]),
    toolCalls: listOf(delta["tool_calls"]).filter(isFields).map(readToolCall),
    routing: listOf(delta["routing"]).filter(isRoutedExperts),
    finish: typeof choice["finish_reason"] === "string" ? choice["finish_reason"] : null,
    usage: isFields(value["usage"]) ? readUsage(value["usage"]) : null,
  };
}

function readToolCall(call: Fields): ToolCallPiece {
  const { name, arguments: text } = fieldsOf(call["function"]);
  return { index: countOf(call["index"]), name: typeof name === "string" ? name : null, arguments: textOf(text) };
}

function readUsage(usage: Fields): Usage {
  return {
    promptTokens: countOf(usage["prompt_tokens"]),
    cachedTokens: countOf(fieldsOf(usage["prompt_tokens_details"])["cached_tokens"]),
    completionTokens: countOf(usage["completion_tokens"]),
  };
}

/** Checks that all layers have the same number of experts, and as many weights. */
export function isRoutedExperts(value: unknown): value is RoutedExperts {
  if (!isFields(value) || typeof value["text"] !== "string") return false;
  const [layers, experts, weights] = [value["layers"], value["experts"], value["weights"]];
  if (!Array.isArray(layers) || !Array.isArray(experts) || !Array.isArray(weights)) return false;
  if (!layers.every(isIndex) || experts.length !== layers.length || weights.length !== layers.length) return false;
  const chosen = listOf(experts[0]).length;
  return (
    experts.every((row) => Array.isArray(row) && row.length === chosen && row.every(isIndex)) &&
    weights.every((row) => Array.isArray(row) && row.length === chosen && row.every((w) => typeof w === "number" && Number.isFinite(w)))
  );
}

function isIndex(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < 65_536;
}

export interface ServedModel {
  readonly id: string;
  /** The small model that is bundled with mixtape. */
  readonly demo: boolean;
}

/** The models in a reply to GET /v1/models, in order; anything malformed is left out. */
export function readModels(value: unknown): readonly ServedModel[] {
  return listOf(fieldsOf(value)["data"]).flatMap((model) => {
    const { id, demo } = fieldsOf(model);
    return typeof id === "string" && id !== "" ? [{ id, demo: demo === true }] : [];
  });
}

/** The mixture layers and number of experts of a model, from a reply to POST /v1/routing; null when it is malformed. */
export function readShape(value: unknown): { readonly layers: readonly number[]; readonly experts: number } | null {
  const rows = listOf(fieldsOf(value)["layers"]).filter(isFields);
  const layers = rows.map((row) => row["layer"]).filter(isIndex);
  const experts = listOf(rows[0]?.["load"]).length;
  return experts > 0 && layers.length === rows.length ? { layers, experts } : null;
}

/** Reads an error reply; null when the body does not have that shape. */
export function readFailure(value: unknown): Failure | null {
  const { error } = fieldsOf(value);
  if (!isFields(error) || typeof error["message"] !== "string") return null;
  return { message: error["message"], code: typeof error["code"] === "string" ? error["code"] : null };
}
