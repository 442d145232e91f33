/**
 * A provider for the Vercel AI SDK: `import { createMixtape } from "mixtape/ai"`. Needs the packages `ai` and
 * `@ai-sdk/openai-compatible` beside this one. Talks to a server; runs no model itself.
 */
import { createOpenAICompatible, type OpenAICompatibleProvider } from "@ai-sdk/openai-compatible";

export interface MixtapeProviderOptions {
  /** URL of the server, with `/v1`. Default: the environment's `MIXTAPE_BASE_URL`, else `http://127.0.0.1:8080/v1`. */
  readonly baseURL?: string;
  /** Default: the environment's `MIXTAPE_API_KEY`. Servers without keys need none. */
  readonly apiKey?: string;
  /** Sent with each request. */
  readonly headers?: Readonly<Record<string, string>>;
  readonly fetch?: typeof globalThis.fetch;
}

/** A server's chat, completion and embedding models, by name: `createMixtape()("default")`. Generated objects satisfy their schema. */
export function createMixtape(options: MixtapeProviderOptions = {}): OpenAICompatibleProvider {
  const { env } = process;
  return createOpenAICompatible({
    name: "mixtape",
    baseURL: options.baseURL ?? env["MIXTAPE_BASE_URL"] ?? "http://127.0.0.1:8080/v1",
    apiKey: options.apiKey ?? env["MIXTAPE_API_KEY"],
    headers: { ...options.headers },
    fetch: options.fetch,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
}
