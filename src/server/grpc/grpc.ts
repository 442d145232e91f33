/**
 * Serves proto/mixtape/v1/mixtape.proto over gRPC, with the standard health and reflection services, on the same models, keys
 * and limits as HTTP. Assembles the parts in grpc/; knows no method's content.
 */
import type { AddressInfo } from "node:net";
import { Server, type ServiceDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { ReflectionService } from "@grpc/reflection";
import { HealthImplementation, protoPath } from "grpc-health-check";
import type { Caller } from "../access/gate.ts";
import type { ServerContext } from "../context.ts";
import type { KeyPair } from "../tls.ts";
import { Calls } from "./calls.ts";
import { Entrance, strict, undecoded } from "./entrance.ts";
import { Listener } from "./listener.ts";
import { LOADING, PROTO, SERVICE } from "./messages.ts";
import type { CallReport } from "./report.ts";
import { mixtapeService } from "./service.ts";

/** Time for the last statuses to be sent. */
const FLUSH_MS = 250;

export interface GrpcLimits {
  /** Largest message from a client. */
  readonly maxMessageBytes: number;
  /** Concurrent calls per connection. */
  readonly maxConcurrentStreams: number;
  readonly maxConnections: number;
  /** Time for a complete request to arrive. */
  readonly requestTimeoutSeconds: number;
  /** How long a connection may be idle. */
  readonly idleTimeoutSeconds: number;
  /** How long a client may read nothing while a response waits. */
  readonly stallTimeoutSeconds: number;
}

export interface GrpcOptions {
  readonly host: string;
  /** 0: any free port. */
  readonly port: number;
  /** Null: plain text. */
  readonly tls: KeyPair | null;
  readonly context: ServerContext;
  /** Throws ServerError `invalid_api_key`. */
  readonly authenticate: (secret: string | null) => Caller;
  /** Waits for a compute slot. Rejects with ServerError `overloaded`, `rate_limit_exceeded` or `budget_exceeded`. */
  readonly enter: (caller: Caller, signal: AbortSignal) => Promise<{ leave(): void }>;
  /** The checked request of a method. Rejects with ServerError `invalid_request` or `overloaded`. */
  readonly read: (method: string, message: Buffer, owner: string, signal: AbortSignal) => Promise<unknown>;
  readonly limits: GrpcLimits;
  /** Called for every call of our own service, rejected ones included. */
  readonly onEnd: (report: CallReport) => void;
  readonly onFlood: () => void;
}

export interface Grpc {
  readonly address: AddressInfo;
  /** How many connections are open. */
  connections(): number;
  /** Makes the health service report SERVING, until `pause` or `close`. */
  ready(): void;
  /** Makes it report NOT_SERVING. Calls are answered all the same. */
  pause(): void;
  /** Presents this certificate on new connections. */
  renew(tls: KeyPair): void;
  /** Reports NOT_SERVING, waits for running calls, then closes. Resolves with how many calls were cut off. */
  close(drainMs: number): Promise<number>;
}

/** Rejects when the address can't be listened on. */
export async function startGrpc(options: GrpcOptions): Promise<Grpc> {
  const { context, authenticate, enter, read, limits, onEnd, onFlood } = options;
  const definition = loadSync([PROTO, protoPath], LOADING);
  const entrance = new Entrance({ guarded: `/${SERVICE}/`, authenticate, arrivalMs: limits.requestTimeoutSeconds * 1000, onEnd });
  const calls = new Calls({ entrance, enter, read, stallMs: limits.stallTimeoutSeconds * 1000, onEnd });
  const server = new Server({
    "grpc.max_receive_message_length": limits.maxMessageBytes,
    "grpc.max_concurrent_streams": limits.maxConcurrentStreams,
    "grpc.max_connection_idle_ms": limits.idleTimeoutSeconds * 1000,
    // Pings detect connections whose client has vanished.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.enable_channelz": 0,
    interceptors: [entrance.interceptor],
  });
  server.addService(undecoded(definition[SERVICE] as ServiceDefinition), mixtapeService(calls, context));
  const health = new HealthImplementation({ "": "NOT_SERVING", [SERVICE]: "NOT_SERVING" });
  const tell = (status: "SERVING" | "NOT_SERVING") => {
    for (const name of ["", SERVICE]) health.setStatus(name, status);
  };
  health.addToServer(strict(server));
  new ReflectionService(definition).addToServer(strict(server));
  const { host, port, tls } = options;
  const listener = await Listener.listen(server, {
    host,
    port,
    tls,
    limits: {
      maxConnections: limits.maxConnections,
      arrivalMs: limits.requestTimeoutSeconds * 1000,
      idleMs: limits.idleTimeoutSeconds * 1000,
    },
    claiming: `/${SERVICE}/`,
    messages: () => calls.messages,
    onFlood,
  });
  return {
    address: listener.address,
    connections: () => listener.connections.count,
    ready: () => tell("SERVING"),
    pause: () => tell("NOT_SERVING"),
    renew: (pair) => listener.renew(pair),
    async close(drainMs) {
      tell("NOT_SERVING");
      listener.refuse();
      const cut = await calls.drain(drainMs);
      await listener.connections.close(FLUSH_MS);
      server.forceShutdown();
      return cut;
    },
  };
}
