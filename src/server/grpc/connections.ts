/**
 * The listening socket and its connections: limits their number, disconnects clients that flood the server with pings, and gives
 * new connections the latest certificate. Knows no call.
 */
import { once } from "node:events";
import { constants, type Http2Server, type ServerHttp2Session } from "node:http2";
import { type AddressInfo, createServer, type Server as NetServer, type Socket } from "node:net";
import { type ConnectionInjector, type Server, ServerCredentials } from "@grpc/grpc-js";
import { within } from "../deadline.ts";
import type { KeyPair } from "../tls.ts";

export interface ConnectionsOptions {
  readonly host: string;
  readonly port: number;
  /** Null: plain text. */
  readonly tls: KeyPair | null;
  readonly maxConnections: number;
  /** Messages sent so far on all connections: clients may ping as often as they hear from the server. */
  readonly messages: () => number;
  readonly onFlood: () => void;
}

/** Pings that a connection may send per window, besides one per message. Clients send some to measure their bandwidth. */
const PINGS = 100;
const WINDOW_MS = 10_000;

export class Connections {
  readonly #server: Server;
  readonly #options: ConnectionsOptions;
  readonly #listener: NetServer;
  readonly #sockets = new Set<Socket>();
  #injector: ConnectionInjector;

  private constructor(server: Server, options: ConnectionsOptions) {
    this.#server = server;
    this.#options = options;
    this.#injector = this.#inject(options.tls);
    this.#listener = createServer((socket) => {
      this.#sockets.add(socket);
      socket.once("close", () => this.#sockets.delete(socket));
      socket.on("error", () => socket.destroy()); // clients that disconnect before HTTP/2 begins
      this.#injector.injectConnection(socket);
    });
    this.#listener.maxConnections = options.maxConnections;
  }

  /** Rejects when the address can't be listened on. */
  static async listen(server: Server, options: ConnectionsOptions): Promise<Connections> {
    const connections = new Connections(server, options);
    connections.#listener.listen(options.port, options.host);
    await once(connections.#listener, "listening");
    return connections;
  }

  get address(): AddressInfo {
    return this.#listener.address() as AddressInfo;
  }

  /** Gives new connections this certificate; existing ones close after their calls. */
  renew(tls: KeyPair): void {
    const before = this.#injector;
    this.#injector = this.#inject(tls);
    before.destroy();
  }

  /** Accepts no more connections, and asks clients to disconnect after their current calls. */
  refuse(): void {
    this.#listener.close();
    this.#injector.destroy();
  }

  /** Waits for all connections to close, and destroys the rest after `timeoutMs`. */
  async close(timeoutMs: number): Promise<void> {
    const left = [...this.#sockets].map((socket) => new Promise((resolve) => socket.once("close", resolve)));
    await within(timeoutMs, Promise.all(left));
    for (const socket of this.#sockets) socket.destroy();
  }

  #inject(tls: KeyPair | null): ConnectionInjector {
    const credentials = tls
      ? ServerCredentials.createSsl(null, [{ cert_chain: tls.cert, private_key: tls.key }])
      : ServerCredentials.createInsecure();
    const injector = this.#server.createConnectionInjector(credentials);
    // The library does not count pings, and offers no other way to its sessions.
    const { http2Servers } = this.#server as unknown as { readonly http2Servers?: ReadonlyMap<Http2Server, unknown> };
    const http2 = [...(http2Servers?.keys() ?? [])].at(-1);
    if (!http2) throw new Error("internal: this version of @grpc/grpc-js keeps its HTTP/2 servers elsewhere");
    http2.on("session", (session) => this.#countPings(session));
    return injector;
  }

  #countPings(session: ServerHttp2Session): void {
    const { messages, onFlood } = this.#options;
    let since = performance.now();
    let sentBefore = messages();
    let pings = 0;
    session.on("ping", () => {
      const now = performance.now();
      if (now - since > WINDOW_MS) {
        since = now;
        sentBefore = messages();
        pings = 0;
      }
      pings++;
      if (pings <= PINGS + messages() - sentBefore || session.destroyed) return;
      onFlood();
      session.goaway(constants.NGHTTP2_ENHANCE_YOUR_CALM, 0, Buffer.from("too_many_pings"));
      setImmediate(() => session.destroy());
    });
  }
}
