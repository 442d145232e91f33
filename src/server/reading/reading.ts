/** What a server reads from its clients: bodies of HTTP routes and messages of gRPC methods, parsed and checked. Knows no thread. */
import { check } from "../check.ts";
import { readMessage } from "../grpc/messages.ts";
import { parseBody } from "../http/body.ts";
import { BODIES } from "../http/openai/schema.ts";

export type Route = keyof typeof BODIES;

export type Reading =
  | { readonly kind: "body"; readonly route: Route }
  /** A method of mixtape.proto, such as `Chat`. */
  | { readonly kind: "message"; readonly method: string };

/** The checked value of a body or message. Throws ServerError `invalid_request`, PromptError or GrammarError, naming the field. */
export function read(reading: Reading, bytes: Buffer, maxJsonDepth: number): unknown {
  switch (reading.kind) {
    case "body":
      return check(BODIES[reading.route], parseBody(bytes, maxJsonDepth));
    case "message":
      return readMessage(reading.method, bytes, maxJsonDepth);
    default:
      return reading satisfies never;
  }
}

export function isRoute(url: string | undefined): url is Route {
  return url !== undefined && Object.hasOwn(BODIES, url);
}
