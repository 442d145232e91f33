/** The thread that reads large bodies, so that the event loop stays free. `reader.ts` starts it. */
import { parentPort, workerData } from "node:worker_threads";
import { serverError } from "../errors.ts";
import { type Reading, read } from "./reading.ts";

export interface Job {
  readonly reading: Reading;
  readonly chunks: readonly Uint8Array[];
}

export type Outcome =
  | { readonly kind: "read"; readonly value: unknown }
  /** The client's mistake. */
  | { readonly kind: "refused"; readonly message: string; readonly param: string | null }
  | { readonly kind: "failed"; readonly message: string };

function outcomeOf({ reading, chunks }: Job): Outcome {
  try {
    return { kind: "read", value: read(reading, Buffer.concat(chunks), workerData as number) };
  } catch (error) {
    const { code, message, param } = serverError(error);
    if (code === "invalid_request") return { kind: "refused", message, param };
    return { kind: "failed", message: error instanceof Error ? (error.stack ?? error.message) : String(error) };
  }
}

parentPort?.on("message", (job: Job) => parentPort?.postMessage(outcomeOf(job)));
