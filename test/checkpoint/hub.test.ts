import { existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import * as fs from "node:fs/promises";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { CheckpointError } from "../../src/checkpoint/error.ts";
import { type DownloadProgress, type ResolveOptions, resolveModel } from "../../src/checkpoint/hub.ts";
import { GOLDENS, scratch } from "./craft.ts";
import { COMMIT, FakeHub, gitOid, refuse, sendBytes, sha256 } from "./fakehub.ts";

vi.mock("node:fs/promises", async (original) => ({ ...(await original<typeof fs>()) }));

const hub = new FakeHub();
beforeAll(() => hub.start());
afterAll(() => hub.stop());

const root = scratch();
const WEIGHTS = readFileSync(join(GOLDENS, "dense-tiny/model.safetensors"));
const CONFIG = readFileSync(join(GOLDENS, "dense-tiny/config.json"));
let home: string;
let repo: string;
let count = 0;

beforeEach(() => {
  home = join(root, String(count++));
  repo = join(home, "hub/models--org--model");
  for (const name of ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"])
    vi.stubEnv(name, undefined);
  vi.stubEnv("HF_HOME", home);
  vi.stubEnv("HF_ENDPOINT", hub.endpoint);
  hub.reset();
  hub.files.set("config.json", CONFIG);
  hub.files.set("tokenizer.json", Buffer.from('{"model":{}}'));
  hub.files.set("chat_template.jinja", Buffer.from("{{ messages }}"));
  hub.files.set("README.md", Buffer.from("# model"));
  hub.files.set("pytorch_model.bin", Buffer.from("pickle"));
  hub.files.set("model.safetensors", WEIGHTS);
});
afterEach(() => {
  vi.unstubAllEnvs();
  vi.restoreAllMocks();
});

const resolve = (options: ResolveOptions = {}, id = "org/model") => resolveModel(id, { retryDelayMs: 1, ...options });

async function faultOf(options: ResolveOptions = {}, id = "org/model"): Promise<string> {
  const error: unknown = await resolve(options, id).catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect((error as Error).message).not.toMatch(/[\r\n]/);
  return (error as Error).message.replaceAll(hub.endpoint, "HUB").replaceAll(home, "HOME");
}

const blob = (name: string) => join(repo, "blobs", sha256(hub.files.get(name) as Buffer));
const incomplete = () => `${blob("model.safetensors")}.incomplete`;
const ranges = () => hub.log.filter((r) => r.server === "cdn").map((r) => r.range);

describe("resolveModel", () => {
  test("returns a folder as it is, without any request", async () => {
    expect(await resolve({}, join(GOLDENS, "moe-tiny"))).toBe(join(GOLDENS, "moe-tiny"));
    expect(await faultOf({}, join(GOLDENS, "moe-tiny/config.json"))).toMatch(/: a file that is not GGUF; give the folder/);
    expect(hub.log).toEqual([]);
  });

  test("downloads what a model needs, in the layout of the cache", async () => {
    const folder = await resolve();
    expect(folder).toBe(join(repo, "snapshots", COMMIT));
    expect(readdirSync(folder).sort()).toEqual(["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]);
    expect(readFileSync(join(repo, "refs/main"), "utf8")).toBe(COMMIT);
    expect(readlinkSync(join(folder, "model.safetensors"))).toBe(`../../blobs/${sha256(WEIGHTS)}`);
    expect(readlinkSync(join(folder, "config.json"))).toBe(`../../blobs/${gitOid(CONFIG)}`);
    expect(lstatSync(blob("model.safetensors")).isFile()).toBe(true);
    expect(readdirSync(join(repo, "blobs")).some((name) => name.endsWith(".incomplete"))).toBe(false);
    expect((await openCheckpoint(folder)).tensors.size).toBe(29);
  });

  test("needs no network the second time", async () => {
    const folder = await resolve();
    hub.log.length = 0;
    expect(await resolve()).toBe(folder); // asks which commit, fetches nothing
    expect(hub.log.every((r) => r.path.startsWith("/api/"))).toBe(true);
    hub.log.length = 0;
    vi.stubEnv("HF_HUB_OFFLINE", "1");
    expect(await resolve()).toBe(folder);
    expect(await resolve({ revision: COMMIT })).toBe(folder);
    vi.stubEnv("HF_HUB_OFFLINE", "0");
    expect(await resolve({ local_files_only: true })).toBe(folder);
    expect(hub.log).toEqual([]);
  });

  test("downloads the shards that the index lists", async () => {
    hub.files.delete("model.safetensors");
    hub.files.set("model-1.safetensors", Buffer.from("one"));
    hub.files.set("model-2.safetensors", Buffer.from("two"));
    hub.files.set("consolidated.safetensors", Buffer.from("all"));
    hub.files.set("model.safetensors.index.json", Buffer.from('{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}'));
    const seen: DownloadProgress[] = [];
    const folder = await resolve({ onProgress: (p) => seen.push(p) });
    expect(readdirSync(folder).filter((name) => name.endsWith(".safetensors"))).toEqual(["model-1.safetensors", "model-2.safetensors"]);
    expect(seen.at(-1)).toEqual({ file: "model-2.safetensors", loadedBytes: 3, totalBytes: 3, files: { done: 6, total: 6 } });
    hub.files.delete("model-2.safetensors");
    rmSync(join(folder, "model-2.safetensors"));
    expect(await faultOf()).toMatch(/^org\/model: the repository has no model-2.safetensors \(it has .*\)$/);
  });

  test("omits the weights on request, and does not require them offline", async () => {
    const folder = await resolve({ withWeights: false });
    expect(readdirSync(folder).sort()).toEqual(["chat_template.jinja", "config.json", "tokenizer.json"]);
    expect(await resolve({ withWeights: false, local_files_only: true })).toBe(folder);
    expect(await faultOf({ local_files_only: true })).toMatch(
      /the cache lacks model.safetensors in HOME\/hub\/models--org--model\/snapshots/,
    );
  });

  test("reports the progress of every file", async () => {
    const seen: DownloadProgress[] = [];
    await resolve({ onProgress: (p) => seen.push(p) });
    expect(seen[0]).toEqual({ file: "config.json", loadedBytes: 0, totalBytes: CONFIG.length, files: { done: 0, total: 4 } });
    expect(seen.at(-1)).toEqual({
      file: "model.safetensors",
      loadedBytes: WEIGHTS.length,
      totalBytes: WEIGHTS.length,
      files: { done: 4, total: 4 },
    });
    expect(new Set(seen.map((p) => p.file)).size).toBe(4);
  });

  test("puts the cache where the environment says", async () => {
    vi.stubEnv("HUGGINGFACE_HUB_CACHE", join(home, "older"));
    expect(await resolve({ withWeights: false })).toBe(join(home, "older/models--org--model/snapshots", COMMIT));
    vi.stubEnv("HF_HUB_CACHE", join(home, "newer"));
    expect(await resolve({ withWeights: false })).toBe(join(home, "newer/models--org--model/snapshots", COMMIT));
    expect(await resolve({ withWeights: false, cache_dir: join(home, "given") })).toBe(
      join(home, "given/models--org--model/snapshots", COMMIT),
    );
  });

  test("sends the token to the hub alone: the option, HF_TOKEN, or the token file", async () => {
    mkdirSync(home, { recursive: true });
    writeFileSync(join(home, "token"), "hf_file\n");
    const sent = async (options: ResolveOptions) => {
      hub.log.length = 0;
      rmSync(repo, { recursive: true, force: true });
      await resolve(options);
      expect(hub.log.filter((r) => r.server === "cdn").map((r) => r.token)).toEqual([undefined]);
      return new Set(hub.log.filter((r) => r.server === "hub").map((r) => r.token));
    };
    expect(await sent({})).toEqual(new Set(["Bearer hf_file"]));
    vi.stubEnv("HF_TOKEN", "of-a-mirror");
    expect(await sent({})).toEqual(new Set(["Bearer of-a-mirror"]));
    expect(await sent({ token: "hf_option" })).toEqual(new Set(["Bearer hf_option"]));
  });

  test("uses the cached copy, with a warning, when the hub is down", async () => {
    const folder = await resolve();
    vi.stubEnv("HF_ENDPOINT", "http://127.0.0.1:1");
    const warnings: string[] = [];
    expect(await resolve({ onWarning: (text) => warnings.push(text) })).toBe(folder);
    expect(warnings).toHaveLength(1);
    expect(warnings[0]).toMatch(/^org\/model: can't reach http:\/\/127.0.0.1:1 \(.*\); using the cached/);
  });
});

describe("a download", () => {
  test("resumes a partial file with a range", async () => {
    mkdirSync(join(repo, "blobs"), { recursive: true });
    writeFileSync(incomplete(), WEIGHTS.subarray(0, 300_000));
    const seen: DownloadProgress[] = [];
    const folder = await resolve({ onProgress: (p) => seen.push(p) });
    expect(ranges()).toEqual(["bytes=300000-"]);
    expect(seen.find((p) => p.file === "model.safetensors")?.loadedBytes).toBe(300_000);
    expect(readFileSync(join(folder, "model.safetensors")).equals(WEIGHTS)).toBe(true);
  });

  test("finishes a complete file that was not renamed yet", async () => {
    mkdirSync(join(repo, "blobs"), { recursive: true });
    writeFileSync(incomplete(), WEIGHTS);
    await resolve();
    expect(ranges()).toEqual([]);
    expect(existsSync(blob("model.safetensors"))).toBe(true);
  });

  test.each([
    ["is another file's", Buffer.alloc(1000, 1), ["bytes=1000-", undefined]],
    ["is too long", Buffer.alloc(WEIGHTS.length + 1), [undefined]],
  ])("starts again where the partial file %s", async (_, bytes, expected) => {
    mkdirSync(join(repo, "blobs"), { recursive: true });
    writeFileSync(incomplete(), bytes);
    const folder = await resolve();
    expect(ranges()).toEqual(expected);
    expect(readFileSync(join(folder, "model.safetensors")).equals(WEIGHTS)).toBe(true);
  });

  test("starts over if the server does not support ranges", async () => {
    mkdirSync(join(repo, "blobs"), { recursive: true });
    writeFileSync(incomplete(), WEIGHTS.subarray(0, 1000));
    hub.fault = (_request, response, body) => {
      if (body) response.writeHead(200, { "content-length": body.length }).end(body);
      return body !== undefined;
    };
    const folder = await resolve();
    expect(readFileSync(join(folder, "model.safetensors")).equals(WEIGHTS)).toBe(true);
  });

  test("resumes by itself when the connection breaks midway", async () => {
    let cuts = 0;
    hub.fault = (request, response, body) => {
      if (!body || cuts === 2) return false;
      cuts++;
      sendBytes(request, response, body, "x", 300_000);
      return true;
    };
    const folder = await resolve();
    expect(readFileSync(join(folder, "model.safetensors")).equals(WEIGHTS)).toBe(true);
    expect(ranges()).toEqual([undefined, "bytes=300000-", "bytes=600000-"]);
  });

  test("reports a connection that keeps breaking, keeps the part received, and resumes in the next run", async () => {
    hub.fault = (request, response, body) => {
      if (body) sendBytes(request, response, body, "x", request.headers.range ? 0 : 500_000);
      return body !== undefined;
    };
    expect(await faultOf()).toMatch(
      /^org\/model: model.safetensors stopped at byte 500000 of 799416: the connection was cut.*, 5 times in a row; the part received is kept in HOME\/hub\/.*\.incomplete, run again to resume$/,
    );
    expect(existsSync(join(repo, "refs/main"))).toBe(false);
    hub.fault = () => false;
    hub.log.length = 0;
    await resolve();
    expect(ranges()).toEqual(["bytes=500000-"]);
  });

  test("rejects bytes that differ from the listing, and leaves none of them", async () => {
    hub.claims.set("model.safetensors", "0".repeat(64));
    expect(await faultOf()).toMatch(
      /model.safetensors is damaged: its hash differs from the 0{64} of the hub's listing; it was removed, run again/,
    );
    expect(readdirSync(join(repo, "blobs")).some((name) => name.startsWith("0000"))).toBe(false);
    hub.claims.clear();
    const honest = hub.files.get("tokenizer.json") as Buffer;
    hub.fault = (request, response) => {
      const hit = request.url?.endsWith("/tokenizer.json") === true;
      if (hit) sendBytes(request, response, Buffer.alloc(honest.length), "x");
      return hit;
    };
    rmSync(repo, { recursive: true });
    expect(await faultOf()).toMatch(/tokenizer.json is damaged/);
  });

  test("rejects more bytes than listed", async () => {
    hub.fault = (request, response, body) => {
      if (body) sendBytes(request, response, Buffer.concat([body, body]), "x");
      return body !== undefined;
    };
    expect(await faultOf()).toMatch(/model.safetensors is longer than the 799416 bytes/);
    expect(existsSync(incomplete())).toBe(false);
  });

  test("rejects a range that was not requested", async () => {
    mkdirSync(join(repo, "blobs"), { recursive: true });
    writeFileSync(incomplete(), WEIGHTS.subarray(0, 1000));
    hub.fault = (_request, response, body) => {
      if (body) response.writeHead(206, { "content-range": `bytes 0-${body.length - 1}/${body.length}` }).end(body);
      return body !== undefined;
    };
    expect(await faultOf()).toMatch(/asked for bytes from 1000 of 799416, got "bytes 0-799415\/799416"/);
  });

  test("reports a full disk, and keeps the part received", async () => {
    const { open } = fs;
    vi.spyOn(fs, "open").mockImplementation(async (...args) => {
      const handle = await open(...args);
      const { write } = handle;
      let left = 200_000;
      handle.write = ((bytes: Uint8Array, ...rest: []) => {
        left -= bytes.byteLength;
        if (left < 0) return Promise.reject(Object.assign(new Error("ENOSPC: no space left on device, write"), { code: "ENOSPC" }));
        return Reflect.apply(write, handle, [bytes, ...rest]);
      }) as never;
      return handle;
    });
    expect(await faultOf()).toMatch(
      /stopped at byte \d+ of 799416: the disk is full, \d+ more bytes are needed; the part received is kept in .*, run again to resume/,
    );
    expect(existsSync(incomplete())).toBe(true);
  });

  test("stops when aborted, and keeps the part received", async () => {
    const controller = new AbortController();
    hub.fault = (_request, response, body) => {
      if (body) response.writeHead(200, { "content-length": body.length }).write(body.subarray(0, 100_000));
      return body !== undefined;
    };
    const onProgress = (p: DownloadProgress) => {
      if (p.file === "model.safetensors") setTimeout(() => controller.abort(), 150);
    };
    await expect(resolve({ signal: controller.signal, onProgress })).rejects.toMatchObject({ name: "AbortError" });
    expect(readFileSync(incomplete()).length).toBe(100_000);
    await expect(resolve({ signal: controller.signal })).rejects.toMatchObject({ name: "AbortError" });
  });
});

describe("one clear error for", () => {
  const everywhere = (status: number, code?: string) => {
    hub.fault = (_request, response) => {
      refuse(response, status, code);
      return true;
    };
  };

  test("401 and 403", async () => {
    everywhere(401);
    expect(await faultOf()).toBe(
      "org/model: HUB answers 401: private, gated or nonexistent, and no local folder has this name; set HF_TOKEN to a token that may read it",
    );
    everywhere(403, "GatedRepo");
    expect(await faultOf({ token: "hf_mine" })).toMatch(
      /answers 403: .*; the token that was sent may not read it: ask for access, or set another HF_TOKEN/,
    );
    expect(hub.log).toHaveLength(2);
  });

  test("404 of the repository, the revision, and a file", async () => {
    expect(await faultOf({}, "org/other")).toBe(
      "org/other: not found: no repository (or revision main) at HUB (404), and no local folder has this name",
    );
    expect(await faultOf({ revision: "v9" })).toBe("org/model: no revision v9 at HUB (404); check the branch, tag or commit");
    hub.fault = (request, response) => {
      const hit = request.url?.endsWith("/tokenizer.json") === true;
      if (hit) refuse(response, 404, "EntryNotFound");
      return hit;
    };
    expect(await faultOf()).toMatch(/org\/model: no file \/org\/model\/resolve\/a+\/tokenizer.json at HUB \(404\)/);
  });

  test("500, after a few attempts", async () => {
    everywhere(500);
    expect(await faultOf()).toMatch(
      /^org\/model: no local folder has this name; HUB answers 500, 5 times in a row, and the cache has no revision main in HOME.*; check the name and the network$/,
    );
    expect(hub.log).toHaveLength(5);
  });

  test("each wait for another attempt is told, with its reason", async () => {
    everywhere(503);
    const told: string[] = [];
    await faultOf({ onRetry: (message) => told.push(message.replaceAll(hub.endpoint, "HUB")) });
    expect(told).toEqual([2, 3, 4, 5].map((attempt) => `org/model: HUB answers 503; trying again in 0 s (attempt ${attempt} of 5)`));
  });

  test("500 of a file, unless a retry succeeds", async () => {
    let left = 7;
    hub.fault = (_request, response, body) => {
      if (!body || left-- <= 0) return false;
      refuse(response, 500);
      return true;
    };
    expect(await faultOf()).toMatch(/model.safetensors stopped at byte 0 of 799416: HUB answers 500, 5 times in a row; run again later/);
    expect(await resolve()).toBe(join(repo, "snapshots", COMMIT));
  });

  test("a truncated or invalid listing", async () => {
    let cuts = 1;
    hub.fault = (request, response) => {
      if (!request.url?.includes("/tree/") || cuts-- <= 0) return false;
      response.writeHead(200, { "content-type": "application/json", "content-length": 1000 }).write("[{");
      setTimeout(() => response.destroy(), 20);
      return true;
    };
    expect(await resolve({ withWeights: false })).toBe(join(repo, "snapshots", COMMIT));
    hub.fault = (_request, response) => Boolean(response.writeHead(200, { "content-type": "text/html" }).end("<html>"));
    expect(await faultOf({ cache_dir: join(home, "none") })).toMatch(/HUB sent an incomplete response/);
  });

  test("an unreachable hub is not tried again; an invalid URL", async () => {
    const gone = new FakeHub();
    await gone.start();
    const { endpoint } = gone;
    await gone.stop();
    vi.stubEnv("HF_ENDPOINT", endpoint);
    const told: string[] = [];
    expect(await faultOf({ onRetry: (message) => told.push(message) })).toMatch(
      /^org\/model: no local folder has this name; can't reach http:\/\/127.0.0.1:\d+ \(connect ECONNREFUSED .*\), and the cache has no revision main/,
    );
    expect(told).toEqual([]);
    vi.stubEnv("HF_ENDPOINT", "nonsense");
    expect(await faultOf()).toBe("org/model: HF_ENDPOINT is nonsense: not a URL");
  });

  test("offline and not in the cache", async () => {
    vi.stubEnv("HF_HUB_OFFLINE", "yes");
    expect(await faultOf()).toBe(
      "org/model: no local folder has this name, and the cache has no revision main in HOME/hub/models--org--model; run once online (offline now: HF_HUB_OFFLINE or local_files_only)",
    );
    expect(hub.log).toEqual([]);
  });

  test("a cache that can't be written", async () => {
    mkdirSync(repo, { recursive: true });
    writeFileSync(join(repo, "snapshots"), "");
    expect(await faultOf()).toMatch(/^HOME\/hub\/models--org--model: the cache can't be written .*; set HF_HUB_CACHE to another folder/);
  });

  test("a repository without config or weights", async () => {
    hub.files.delete("model.safetensors");
    expect(await faultOf()).toBe("org/model: the repository has no model.safetensors (it has pytorch_model.bin)");
    hub.files.delete("config.json");
    expect(await faultOf()).toMatch(/the repository has no config.json/);
  });

  test.each([
    "",
    "./models/none",
    "/none",
    "a/b/c",
    "../org/model",
    "org/mo..del",
    "C:\\models",
    "org/a--b",
    "https://huggingface.co/org/model",
  ])("the name %j, without any request", async (id) => {
    expect(await faultOf({}, id)).toMatch(/no such folder, and not a hub id either/);
    expect(hub.log).toEqual([]);
  });

  test("a revision that is a path", async () => {
    expect(await faultOf({ revision: "../../x" })).toMatch(/"..\/..\/x" is not a revision/);
  });
});
