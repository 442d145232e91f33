/** Tells a listener's connections which HTTP requests are open on them. Knows no route. */
import type { IncomingMessage, Server, ServerResponse } from "node:http";
import type { Connections } from "../connections.ts";

/** To be called before the server listens. */
export function followRequests(server: Server, connections: Connections): void {
  connections.watch(server);
  server.prependListener("request", (request: IncomingMessage, response: ServerResponse) => {
    const exchange = {
      get complete() {
        return request.complete;
      },
      claims: true,
    };
    response.once("close", connections.begin(request.socket, exchange));
  });
}
