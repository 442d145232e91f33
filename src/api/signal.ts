/** Abort signals of requests. Knows no engine. */
import type { Request } from "../engine/sequence.ts";

/**
 * Aborted when any of `signals` is, with its reason. The engine polls it between steps: `AbortSignal.any` or a listener would
 * stay attached to a signal that many requests share.
 */
export function anyOf(...signals: readonly (AbortSignal | undefined)[]): NonNullable<Request["signal"]> {
  return {
    get aborted() {
      return signals.some((signal) => signal?.aborted);
    },
    get reason() {
      return signals.find((signal) => signal?.aborted)?.reason;
    },
  };
}
