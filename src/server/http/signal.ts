/** Notices clients that leave before their response is complete. Knows no route. */
import { setMaxListeners } from "node:events";
import type { FastifyReply } from "fastify";
import { ServerError } from "../errors.ts";

/** Aborted when the client disconnects before its response is complete. */
export function signalOf(reply: FastifyReply): AbortSignal {
  const gone = new AbortController();
  setMaxListeners(0, gone.signal); // each prompt and each answer of a request listens
  const look = () => {
    if (!reply.raw.writableFinished) gone.abort(new ServerError("cancelled", "the client has disconnected"));
  };
  if (reply.raw.closed || reply.raw.destroyed)
    look(); // it left while the model was loading
  else reply.raw.once("close", look);
  return gone.signal;
}
