/** A hub on loopback: listing, commits and files as huggingface.co serves them, large files from a second server. */
import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export const COMMIT = "a".repeat(40);

/** Answers a request in place of the hub; false: the hub answers. */
export type Fault = (request: IncomingMessage, response: ServerResponse, body?: Buffer) => boolean;

export const sha256 = (bytes: Buffer) => createHash("sha256").update(bytes).digest("hex");
export const gitOid = (bytes: Buffer) => createHash("sha1").update(`blob ${bytes.length}\0`).update(bytes).digest("hex");

export class FakeHub {
  /** Files of `org/model`. Those that end in .safetensors are large files (LFS). */
  readonly files = new Map<string, Buffer>();
  /** SHA-256 that the listing claims, if not the file's own. */
  readonly claims = new Map<string, string>();
  /** Every request: method, path, and whether it carried a token or a range. */
  readonly log: { path: string; token: string | undefined; range: string | undefined; server: "hub" | "cdn" }[] = [];
  fault: Fault = () => false;
  private readonly hub = createServer((request, response) => this.answer(request, response));
  private readonly cdn = createServer((request, response) => this.answerFile(request, response));

  async start(): Promise<void> {
    await Promise.all([this.hub, this.cdn].map((server) => new Promise<void>((done) => server.listen(0, "127.0.0.1", done))));
  }

  async stop(): Promise<void> {
    for (const server of [this.hub, this.cdn]) {
      server.closeAllConnections();
      await new Promise((done) => server.close(done));
    }
  }

  get endpoint(): string {
    return urlOf(this.hub);
  }

  reset(): void {
    this.files.clear();
    this.claims.clear();
    this.log.length = 0;
    this.fault = () => false;
  }

  private answer(request: IncomingMessage, response: ServerResponse): void {
    const { url = "", headers } = request;
    this.log.push({ path: url, token: headers.authorization, range: headers.range, server: "hub" });
    if (this.fault(request, response)) return;
    const { pathname } = new URL(url, this.endpoint);
    if (pathname === "/api/models/org/model/revision/main" || pathname === `/api/models/org/model/revision/${COMMIT}`) {
      json(response, { _id: "1", id: "org/model", sha: COMMIT, private: false, downloads: 1, likes: 1, lastModified: "2025-01-01" });
    } else if (pathname.startsWith("/api/models/org/model/revision/")) refuse(response, 404, "RevisionNotFound");
    else if (pathname === `/api/models/org/model/tree/${COMMIT}`) this.answerTree(url, response);
    else this.answerResolve(request, response, pathname);
  }

  /** Small files from here, large ones by way of the second server. */
  private answerResolve(request: IncomingMessage, response: ServerResponse, pathname: string): void {
    const name = /^\/org\/model\/resolve\/a{40}\/(.+)$/.exec(pathname)?.[1];
    const bytes = this.files.get(name ?? "");
    if (!bytes) refuse(response, 404, name === undefined ? "RepoNotFound" : "EntryNotFound");
    else if (!pathname.endsWith(".safetensors")) sendBytes(request, response, bytes, gitOid(bytes));
    else {
      const linked = { "x-linked-etag": `"${sha256(bytes)}"`, "x-linked-size": String(bytes.length) };
      response.writeHead(302, { location: `${urlOf(this.cdn)}/${name}`, ...linked }).end();
    }
  }

  /** Two entries a page, so that the listing's pages are followed too. */
  private answerTree(url: string, response: ServerResponse): void {
    const page = Number(new URL(url, this.endpoint).searchParams.get("cursor") ?? 0);
    const entries = [...this.files].map(([path, bytes]) => {
      const oid = this.claims.get(path) ?? sha256(bytes);
      const lfs = path.endsWith(".safetensors") ? { lfs: { oid, size: bytes.length, pointerSize: 130 }, xetHash: "f".repeat(64) } : {};
      return { type: "file", oid: gitOid(bytes), size: bytes.length, path, ...lfs };
    });
    entries.push({ type: "directory", oid: "b".repeat(40), size: 0, path: "figures" });
    const next: Record<string, string> =
      page + 2 < entries.length ? { link: `<${this.endpoint}${url.replace(/&cursor=\d+/, "")}&cursor=${page + 2}>; rel="next"` } : {};
    json(response, entries.slice(page, page + 2), next);
  }

  private answerFile(request: IncomingMessage, response: ServerResponse): void {
    const { url = "", headers } = request;
    this.log.push({ path: url, token: headers.authorization, range: headers.range, server: "cdn" });
    const bytes = this.files.get(url.slice(1));
    if (this.fault(request, response, bytes)) return;
    if (bytes) sendBytes(request, response, bytes, sha256(bytes));
    else refuse(response, 404, "EntryNotFound");
  }
}

/** Sends bytes, or the requested range; `length` breaks the connection after that many. */
export function sendBytes(request: IncomingMessage, response: ServerResponse, bytes: Buffer, etag: string, length?: number): void {
  const start = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
  const ranged = request.headers.range !== undefined;
  const headers = { "content-length": String(bytes.length - start), etag: `"${etag}"`, "accept-ranges": "bytes" };
  response.writeHead(
    ranged ? 206 : 200,
    ranged ? { ...headers, "content-range": `bytes ${start}-${bytes.length - 1}/${bytes.length}` } : headers,
  );
  if (length === undefined) response.end(bytes.subarray(start));
  else response.write(bytes.subarray(start, start + length), () => setTimeout(() => response.destroy(), 20));
}

export function refuse(response: ServerResponse, status: number, code?: string): void {
  response.writeHead(status, { "content-type": "application/json", ...(code && { "x-error-code": code }) });
  response.end(JSON.stringify({ error: code ?? "refused" }));
}

function json(response: ServerResponse, value: unknown, headers: Record<string, string> = {}): void {
  response.writeHead(200, { "content-type": "application/json", ...headers }).end(JSON.stringify(value));
}

function urlOf(server: Server): string {
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}
