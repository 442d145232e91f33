/** Memory use of loading and generating, and whether the event loop keeps running; each measured in a separate process. */
import { execFile } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { GOLDENS } from "../goldens.ts";

const root = fileURLToPath(new URL("../..", import.meta.url));
const SMALL = join(root, "models/small-moe");
const TINY = `${GOLDENS}moe-tiny`;
/** The default model if it is available, else a tiny one. */
const MODEL = existsSync(join(SMALL, "model.safetensors")) ? SMALL : TINY;
const MIB = 2 ** 20;

async function measure<T>(what: string, folder: string, count = 0): Promise<T> {
  const script = fileURLToPath(new URL("./memory.child.ts", import.meta.url));
  const { stdout } = await promisify(execFile)(process.execPath, ["--expose-gc", "--import", "tsx", script, what, folder, `${count}`], {
    cwd: root,
  });
  if (process.env.MIXTAPE_SHOW) console.log(what, folder, stdout);
  return JSON.parse(stdout) as T;
}

describe("memory", () => {
  test("loading maps the file and adds at most 300 MiB; dispose frees both", async () => {
    type Grown = { all: number; anonymous: number };
    const { loaded, used, disposed } = await measure<Record<"loaded" | "used" | "disposed", Grown>>("load", MODEL);
    const file = statSync(join(MODEL, "model.safetensors")).size / MIB;
    for (const { all, anonymous } of [loaded, used]) {
      expect(all).toBeLessThan(file + 300);
      expect(anonymous, "weights are mapped, not copied").toBeLessThan(300);
    }
    expect(loaded.anonymous, "loading alone copies nothing").toBeLessThan(40);
    expect(disposed.all).toBeLessThan(60);
  });

  test("does not grow over 1,000 calls of generate", async () => {
    const { grown, heapGrown } = await measure<{ grown: number; heapGrown: number }>("calls", TINY, 1000);
    expect(grown).toBeLessThan(20);
    expect(heapGrown).toBeLessThan(0.5);
  });

  test("does not grow over 50 models, one after another, which leave no threads or mappings", async () => {
    const { grown, threads, mappings } = await measure<Record<"grown" | "threads" | "mappings", number>>("reloads", MODEL, 50);
    expect(grown).toBeLessThan(20);
    expect(threads).toBe(0);
    expect(mappings).toBe(0);
  });
});

describe("the event loop", () => {
  test("keeps running during a native step", async () => {
    const { calls, during } = await measure<{ calls: number; during: number }>("loop", MODEL);
    expect(calls).toBeGreaterThan(50);
    expect(during / calls).toBeGreaterThan(0.5); // a short step may end within the turn that began it
  });
});
