/** What is logged and counted of a call. Knows no method. */
import type { ErrorCode } from "../errors.ts";

/** The outcome of a call. */
export interface CallReport {
  readonly requestId: string;
  /** Like `/mixtape.v1.Mixtape/Chat`. */
  readonly path: string;
  readonly callerId: string;
  /** `cancelled`: the client left or its deadline passed. */
  readonly outcome: "ok" | ErrorCode;
  readonly seconds: number;
  /** What failed, if anything did. */
  readonly error?: unknown;
}
