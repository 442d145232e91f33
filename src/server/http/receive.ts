/** Takes in the bodies of requests, within the size limit, and has them read. Knows no route's content. */
import type { IncomingMessage } from "node:http";
import type { FastifyRequest } from "fastify";
import type { z } from "zod";
import { check } from "../check.ts";
import type { ServeConfig } from "../config.ts";
import { ServerError } from "../errors.ts";
import { type Reader, tooLarge } from "../reading/reader.ts";
import { isRoute } from "../reading/reading.ts";
import { parseBody } from "./body.ts";

/** Bodies that were read, and so checked. */
const READ = new WeakSet<object>();

export type BodyLimits = Pick<ServeConfig, "maxBodyBytes" | "maxJsonDepth">;

/** The checked body of a request. Rejects with ServerError. */
export async function receive(request: FastifyRequest, payload: IncomingMessage, reader: Reader, limits: BodyLimits): Promise<unknown> {
  const { maxBodyBytes, maxJsonDepth } = limits;
  if (Number(request.headers["content-length"]) > maxBodyBytes) throw tooLarge(maxBodyBytes); // without reading it
  if (request.is404) return undefined; // the router answers
  const { url, schema } = request.routeOptions;
  const gone = new AbortController();
  const leave = () => gone.abort(new ServerError("timeout", "the client has disconnected"));
  const arrival = reader.arrival(request.caller?.id ?? "");
  request.raw.socket.once("close", leave);
  try {
    await arrived(payload, (chunk) => arrival.add(chunk));
    // The server lists all its routes for the thread; others are read here.
    const here = (bytes: Buffer) => {
      const value = parseBody(bytes, maxJsonDepth);
      return schema?.body ? check(schema.body as z.ZodType, value) : value;
    };
    const body = await arrival.read(isRoute(url) ? { kind: "body", route: url } : here, gone.signal);
    if (typeof body === "object" && body !== null) READ.add(body);
    return body;
  } finally {
    request.raw.socket.off("close", leave);
    arrival.release();
  }
}

/** For Fastify: a route's body is one that was read, whole and checked; a request without a body has none. */
export function whole({ httpPart = "" }: { readonly httpPart?: string }) {
  if (httpPart !== "body") throw new Error(`internal: nothing checks the ${httpPart} of requests`);
  return (body: unknown): { value: unknown } | { error: ServerError } =>
    typeof body === "object" && body !== null && READ.has(body)
      ? { value: body }
      : { error: new ServerError("invalid_request", "the body is missing: send a JSON object, with content-type application/json") };
}

/** Resolves when the payload has ended. Rejects with what `take` throws; the rest is then discarded, so that the client can read why. */
function arrived(payload: IncomingMessage, take: (chunk: Buffer) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    const broken = () => end(new ServerError("invalid_request", "the body ended before it was complete"));
    const end = (error: unknown) => {
      payload.off("data", next).off("end", done).off("error", broken).off("close", broken);
      payload.on("error", () => {});
      payload.resume();
      if (error === null) resolve();
      else reject(error);
    };
    const done = () => end(null);
    const next = (chunk: Buffer) => {
      try {
        take(chunk);
      } catch (error) {
        end(error);
      }
    };
    payload.on("data", next).on("end", done).on("error", broken).on("close", broken);
  });
}
