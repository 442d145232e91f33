/** Notices clients that leave before their response is complete. Knows no route. */
import type { FastifyReply } from "fastify";

/** Aborted when the client disconnects before its response is complete. */
export function signalOf(reply: FastifyReply): AbortSignal {
  const gone = new AbortController();
  const look = () => {
    if (!reply.raw.writableFinished) gone.abort(new Error("the client has gone"));
  };
  if (reply.raw.closed || reply.raw.destroyed)
    look(); // it left while the model was loading
  else reply.raw.once("close", look);
  return gone.signal;
}
