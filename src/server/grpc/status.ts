/** Failures as gRPC reports them: a status, a sentence, and machine-readable details in trailing metadata. Knows no call. */
import { Metadata, status } from "@grpc/grpc-js";
import { ERRORS, type ServerError, serverError } from "../errors.ts";

export interface Failure {
  readonly code: status;
  readonly details: string;
  readonly metadata: Metadata;
}

/** Headers are limited to a few KiB in all, and messages may quote what clients sent. */
const LONGEST_DETAILS = 1000;
const LONGEST_FIELD = 200;

/**
 * The status of a failure. Errors not meant for clients become INTERNAL, without their text.
 * @param fieldOf the name in this protocol of a field of the HTTP bodies
 */
export function failureOf(error: unknown, fieldOf: (param: string) => string = (param) => param): { failure: Failure; known: ServerError } {
  const known = serverError(error);
  const metadata = new Metadata();
  metadata.set("mixtape-code", known.code);
  if (known.param !== null) metadata.set("mixtape-field", printable(fieldOf(known.param)));
  if (known.retryAfterSeconds !== null) metadata.set("retry-after", String(Math.max(1, Math.ceil(known.retryAfterSeconds))));
  return { failure: { code: status[ERRORS[known.code].grpc], details: sendable(known.message), metadata }, known };
}

/** The library percent-encodes the message, which fails for half a surrogate pair. */
function sendable(text: string): string {
  const cut = text.length > LONGEST_DETAILS ? `${text.slice(0, LONGEST_DETAILS)}…` : text;
  return Buffer.from(cut).toString();
}

/** Metadata is ASCII. */
function printable(field: string): string {
  return field.slice(0, LONGEST_FIELD).replaceAll(/[^\x20-\x7e]/g, "?");
}
