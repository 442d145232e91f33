/** `mixtape quantize` and `verify` after a failure midway: nothing half-written loads, and no finished work is lost. */
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, openSync, readFileSync, statSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { binary, run, temporary } from "./run.ts";

const SHAPE = ["random:0.3b", "--dtype", "bf16", "--layers", "2"]; // 265 MB
const isRoot = process.getuid?.() === 0;

/** Starts writing a model and kills the process once `bytes` are there. */
async function killedAt(out: string, bytes: number): Promise<void> {
  const child = spawn(process.execPath, [binary, "quantize", SHAPE[0], out, ...SHAPE.slice(1)], { stdio: "ignore" });
  const ended = new Promise<NodeJS.Signals | null>((resolve) => child.on("close", (_code, signal) => resolve(signal)));
  const partial = join(out, "model.safetensors.partial");
  while (!existsSync(partial) || statSync(partial).blocks * 512 < bytes) await new Promise((resolve) => setTimeout(resolve, 2));
  child.kill("SIGKILL");
  expect(await ended).toBe("SIGKILL");
}

test("killed while writing: the partial folder does not load, and the same command resumes to the same bytes", async () => {
  const folder = temporary();
  const [whole, killed] = [join(folder, "whole"), join(folder, "killed")];
  await killedAt(killed, 20e6);
  expect(existsSync(join(killed, "model.safetensors"))).toBe(false);
  expect((await run(["generate", "--ids", "1", "-m", killed])).code).toBe(1);
  const before = statSync(join(killed, "model.safetensors.partial")).mtimeMs;
  const resumed = await run(["quantize", SHAPE[0], killed, ...SHAPE.slice(1)]);
  expect(resumed, resumed.err).toMatchObject({ code: 0 });
  expect(statSync(join(killed, "model.safetensors")).mtimeMs).toBeGreaterThan(before);
  expect((await run(["quantize", SHAPE[0], whole, ...SHAPE.slice(1)])).code).toBe(0);
  const digests = [whole, killed].map((model) => readFileSync(join(model, "checksums.json"), "utf8"));
  expect(digests[1]).toBe(digests[0]);
  expect((await run(["verify", killed])).code).toBe(0);
}, 120_000);

test("a flipped bit is found, and its tensor named", async () => {
  const model = join(temporary(), "model");
  expect((await run(["quantize", "default", model, "--dtype", "int4"])).code).toBe(0);
  const file = openSync(join(model, "model.safetensors"), "r+");
  const at = statSync(join(model, "model.safetensors")).size - 1000;
  const byte = readFileSync(join(model, "model.safetensors"))[at];
  writeSync(file, Uint8Array.of(byte ^ 4), 0, 1, at);
  const { code, err } = await run(["verify", model]);
  expect(code).toBe(1);
  expect(err).toMatch(/the bytes of model\.[\w.]+ have changed; copy or quantise the model again/);
}, 60_000);

test.skipIf(!isRoot)(
  "a disk that fills up (needs root, to mount a small one): the figures, no model, and room made later is used",
  async () => {
    const disk = temporary();
    const mount = (...args: string[]) => expect(spawnSync("mount", args).status).toBe(0);
    mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", disk);
    onTestFinished(() => void spawnSync("umount", [disk]));
    const out = join(disk, "model");
    mkdirSync(out);
    writeFileSync(join(out, "notes.txt"), "mine");
    const full = await run(["quantize", "random:0.3b", out, "--dtype", "int4", "--layers", "1"]);
    expect(full.code).toBe(1);
    expect(full.err).toMatch(/the disk is full: \d+ bytes are needed in .*; free some and run again/);
    expect(existsSync(join(out, "model.safetensors"))).toBe(false);
    expect(readFileSync(join(out, "notes.txt"), "utf8")).toBe("mine");
    mount("-o", "remount,size=400m", disk);
    const again = await run(["quantize", "random:0.3b", out, "--dtype", "int4", "--layers", "1"]);
    expect(again, again.err).toMatchObject({ code: 0 });
    expect((await run(["verify", out])).code).toBe(0);
  },
  60_000,
);
