/**
 * The open connections of one listener: a limit on their number, and time limits for those that send no complete request. A
 * connection occupies a slot from accept until its socket closes, TLS handshake included. Knows no protocol.
 */
import type { Server as NetServer, Socket } from "node:net";
import { within } from "./deadline.ts";

/** A request on a connection, from its first byte that could be understood to the end of its response. */
export interface Exchange {
  /** Whether the request has arrived as a whole. */
  readonly complete: boolean;
  /** Whether it keeps its connection open when the server is full. Subscriptions that anyone may open do not. */
  readonly claims: boolean;
}

/** What tells connections of a listener apart. A TLS socket has the same ends as the socket that it wraps. */
export type Ends = Pick<Socket, "remoteAddress" | "remotePort" | "localAddress">;

export interface ConnectionLimits {
  readonly maxConnections: number;
  /** Milliseconds from accept until the first request has arrived as a whole. */
  readonly arrivalMs: number;
  /** Milliseconds that a connection may be idle between requests. */
  readonly idleMs: number;
}

interface Connection {
  readonly socket: Socket;
  readonly address: string;
  readonly open: Set<Exchange>;
  /** Whether it has sent a complete request. */
  served: boolean;
  /** When it was accepted, or when its last exchange ended. */
  since: number;
}

export class Connections {
  readonly #limits: ConnectionLimits;
  readonly #all = new Map<string, Connection>();
  readonly #timer: NodeJS.Timeout;

  constructor(limits: ConnectionLimits) {
    this.#limits = limits;
    this.#timer = setInterval(() => this.#closeOverdue(), Math.min(1000, limits.arrivalMs / 4)).unref();
  }

  get count(): number {
    return this.#all.size;
  }

  /** Limits the connections of a server that has not begun to listen. */
  watch(server: NetServer): void {
    const handlers = server.listeners("connection");
    server.removeAllListeners("connection");
    server.on("connection", (socket: Socket) => {
      if (this.accept(socket)) for (const handle of handlers) handle.call(server, socket);
    });
    // A socket remembers its other end once asked, so that it still has it after a reset.
    server.prependListener("secureConnection", (socket: Socket) => void endsOf(socket));
  }

  /**
   * Takes a new connection in. When the server is full, connections that have no complete request in progress make room: none has a
   * claim to its slot. Returns false when there is no room; the socket is destroyed then.
   */
  accept(socket: Socket): boolean {
    if (this.#all.size >= this.#limits.maxConnections) this.#makeRoom();
    if (this.#all.size >= this.#limits.maxConnections || socket.remoteAddress === undefined) {
      socket.destroy();
      return false;
    }
    const ends = endsOf(socket);
    this.#all.set(ends, { socket, address: socket.remoteAddress, open: new Set(), served: false, since: performance.now() });
    socket.once("close", () => {
      if (this.#all.get(ends)?.socket === socket) this.#all.delete(ends);
    });
    return true;
  }

  /** Begins an exchange on the connection with these ends. Returns what ends it. */
  begin(ends: Ends, exchange: Exchange): () => void {
    const connection = this.#all.get(endsOf(ends));
    if (!connection) return () => {};
    connection.open.add(exchange);
    return () => {
      connection.open.delete(exchange);
      if (exchange.complete) connection.served = true;
      if (connection.served) connection.since = performance.now();
    };
  }

  /** Waits for all connections to close, and destroys the rest after `timeoutMs`. */
  async close(timeoutMs: number): Promise<void> {
    clearInterval(this.#timer);
    const left = [...this.#all.values()].map(({ socket }) => new Promise((resolve) => socket.once("close", resolve)));
    if (left.length > 0) await within(timeoutMs, Promise.all(left));
    for (const { socket } of this.#all.values()) socket.destroy();
  }

  #closeOverdue(): void {
    const { arrivalMs, idleMs } = this.#limits;
    const now = performance.now();
    for (const [ends, connection] of this.#all) {
      if ([...connection.open].some(({ complete }) => complete)) connection.served = true;
      // The next request has as long to arrive as the first.
      else if (now - connection.since >= (connection.served ? idleMs : 0) + arrivalMs) this.#end(ends, connection);
    }
  }

  /**
   * Ends connections without a claim: first those that have sent no request at all, of these first those of the address that has
   * most of them, of these the oldest. Makes room for several at once, since a flood comes here with each connection.
   */
  #makeRoom(): void {
    const idle = [...this.#all].filter(([, { open }]) => ![...open].some(({ complete, claims }) => complete && claims));
    const counts = new Map<string, number>();
    for (const [, { address }] of idle) counts.set(address, (counts.get(address) ?? 0) + 1);
    const share = ([, { address }]: (typeof idle)[number]) => counts.get(address) ?? 0;
    idle.sort((a, b) => Number(a[1].served) - Number(b[1].served) || share(b) - share(a) || a[1].since - b[1].since);
    const room = Math.max(1, Math.floor(this.#limits.maxConnections / 64));
    for (const [ends, connection] of idle.slice(0, room)) this.#end(ends, connection);
  }

  /** Closes the socket's descriptor at once, so its slot is free at once. */
  #end(ends: string, { socket }: Connection): void {
    this.#all.delete(ends);
    socket.destroy();
  }
}

function endsOf({ remoteAddress, remotePort, localAddress }: Ends): string {
  return `${remoteAddress} ${remotePort} ${localAddress}`;
}
