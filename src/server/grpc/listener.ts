/**
 * The listening socket: hands connections to the library, disconnects clients that flood the server with pings, and gives new
 * connections the latest certificate. Knows no method.
 */
import { once } from "node:events";
import { constants, type Http2Server, type IncomingHttpHeaders, type ServerHttp2Session, type ServerHttp2Stream } from "node:http2";
import { type AddressInfo, createServer, type Server as NetServer } from "node:net";
import { type ConnectionInjector, type Server, ServerCredentials } from "@grpc/grpc-js";
import { type ConnectionLimits, Connections } from "../connections.ts";
import type { KeyPair } from "../tls.ts";

export interface ListenerOptions {
  readonly host: string;
  readonly port: number;
  /** Null: plain text. */
  readonly tls: KeyPair | null;
  readonly limits: ConnectionLimits;
  /** Path prefix of calls that keep their connection open when the server is full. */
  readonly claiming: string;
  /** Messages sent so far on all connections: clients may ping as often as they hear from the server. */
  readonly messages: () => number;
  readonly onFlood: () => void;
}

/** Pings that a connection may send per window, besides one per message. Clients send some to measure their bandwidth. */
const PINGS = 100;
const WINDOW_MS = 10_000;

export class Listener {
  readonly connections: Connections;
  readonly #server: Server;
  readonly #options: ListenerOptions;
  readonly #socket: NetServer;
  #injector: ConnectionInjector;

  private constructor(server: Server, options: ListenerOptions) {
    this.connections = new Connections(options.limits);
    this.#server = server;
    this.#options = options;
    this.#injector = this.#inject(options.tls);
    this.#socket = createServer((socket) => {
      socket.on("error", () => socket.destroy()); // clients that disconnect before HTTP/2 begins
      this.#injector.injectConnection(socket);
    });
    this.connections.watch(this.#socket);
  }

  /** Rejects when the address can't be listened on. */
  static async listen(server: Server, options: ListenerOptions): Promise<Listener> {
    const listener = new Listener(server, options);
    listener.#socket.listen(options.port, options.host);
    try {
      await once(listener.#socket, "listening");
    } catch (error) {
      await listener.connections.close(0);
      throw error;
    }
    return listener;
  }

  get address(): AddressInfo {
    return this.#socket.address() as AddressInfo;
  }

  /** Gives new connections this certificate; existing ones close after their calls. */
  renew(tls: KeyPair): void {
    const before = this.#injector;
    this.#injector = this.#inject(tls);
    before.destroy();
  }

  /** Accepts no more connections, and asks clients to disconnect after their current calls. */
  refuse(): void {
    this.#socket.close();
    this.#injector.destroy();
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
    http2.prependListener("secureConnection", ({ remoteAddress }) => void remoteAddress); // remembered, should the connection be reset
    http2.prependListener(
      "stream",
      (stream: ServerHttp2Stream, headers: IncomingHttpHeaders, _flags: number, rawHeaders: readonly string[]) => {
        // Node takes the first of two; a proxy may have checked the second. Neither counts.
        if (rawHeaders.filter((name, i) => i % 2 === 0 && name === "authorization").length > 1) delete headers["authorization"];
        const exchange = {
          get complete() {
            return stream.endAfterHeaders || stream.readableEnded || stream.state.remoteClose === 1;
          },
          claims: headers[":path"]?.startsWith(this.#options.claiming) ?? false,
        };
        const { socket } = stream.session ?? {};
        if (socket) stream.once("close", this.connections.begin(socket, exchange));
      },
    );
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
