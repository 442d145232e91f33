/** The native backend: its states, its shared workspace, and steps that neither wait for file operations nor delay them. */
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, describe, expect, test } from "vitest";
import type { Backend, Numbers } from "../../src/backend/backend.ts";
import { nativeBackend } from "../../src/backend/native.ts";
import { Graph } from "../../src/graph/graph.ts";
import { symbol } from "../../src/tensor/shape.ts";
import { noise } from "./builder.ts";

const folder = mkdtempSync(join(tmpdir(), "mixtape-native-"));
const backend = nativeBackend({ threads: 2 });
afterAll(() => {
  backend.dispose();
  rmSync(folder, { recursive: true });
});

/** y = x . w^T, w being a state. */
async function product(on: Backend, rows: number, n: number, w = on.state("f32", [n, n])) {
  const g = new Graph();
  g.output("y", g.linear(g.scale(g.input("x", [symbol("rows"), n], "f32"), 1), g.state("w", [n, n], "f32")));
  const program = on.prepare(g, { rows }, await on.load([]), new Map([["w", w]]));
  return { program, w };
}

describe("states", () => {
  test("are initially zero, and read back as written", async () => {
    const state = backend.state("f32", [3, 5]);
    expect(state.bytes).toBe(60);
    expect(state.read()).toEqual(new Float32Array(15));
    const values = noise(15, 1);
    state.write(values);
    values[0] = 9;
    expect(state.read()).toEqual(noise(15, 1));
    state.dispose();
    expect(() => state.read()).toThrow("the state has been disposed of");
  });

  test("a part of a larger array can be written", () => {
    const state = backend.state("f32", [4]);
    state.write(Float32Array.of(0, 1, 2, 3, 4, 5).subarray(1, 5));
    expect([...state.read()]).toEqual([1, 2, 3, 4]);
    state.dispose();
  });

  test("a wrong count of numbers is rejected, and so are formats with a private layout", () => {
    const state = backend.state("f32", [4]);
    expect(() => state.write(new Float32Array(5))).toThrow(new RangeError("5 numbers for a state of 4"));
    const cache = backend.state("int8kv", [1, 32, 1, 64]);
    expect(() => cache.read()).toThrow(/^internal: a state of int8kv has a layout private to the backend/);
    expect(() => cache.write(new Float32Array(2))).toThrow(/^internal: a state of int8kv/);
  });

  test("programs can use them like weights", async () => {
    const { program, w } = await product(backend, 2, 3);
    w.write(Float32Array.of(1, 0, 0, 0, 2, 0, 1, 1, 1));
    const y = new Float32Array(6);
    await program.run({ rows: 2 }, { x: Float32Array.of(1, 2, 3, 4, 5, 6) }, { y });
    expect([...y]).toEqual([1, 4, 6, 4, 10, 15]);
  });

  test("a stacked state works in a product grouped by expert", async () => {
    const [rows, experts, n, k] = [6, 3, 5, 7];
    const g = new Graph();
    const { order, offsets } = g.group(g.input("experts", [symbol("rows"), 1], "i32"), experts);
    g.output("y", g.groupedLinear(g.input("x", [symbol("rows"), k], "f32"), g.state("w", [experts, n, k], "f32"), order, offsets, 1));
    const w = backend.state("f32", [experts, n, k]);
    const [weights, x, chosen] = [noise(experts * n * k, 2), noise(rows * k, 3), Int32Array.of(2, 0, 1, 1, 2, 0)];
    w.write(weights);
    const program = backend.prepare(g, { rows }, await backend.load([]), new Map([["w", w]]));
    const y = new Float32Array(rows * n);
    await program.run({ rows }, { x, experts: chosen }, { y });
    for (let r = 0; r < rows; r++)
      for (let j = 0; j < n; j++) {
        let sum = 0;
        for (let i = 0; i < k; i++) sum += x[r * k + i] * weights[(chosen[r] * n + j) * k + i];
        expect(y[r * n + j]).toBeCloseTo(sum, 5);
      }
  });

  test("a missing state is named", async () => {
    const g = new Graph();
    g.output("y", g.linear(g.input("x", [1, 2], "f32"), g.state("moment", [2, 2], "f32")));
    const weights = await backend.load([]);
    expect(() => backend.prepare(g, {}, weights, new Map())).toThrow("internal: the state moment was not given");
  });
});

test("an op without a kernel is named in the error", async () => {
  const g = new Graph();
  const cache = g.state("cache", [1, 32, 1, 4], "f32");
  const read = g.cacheRead(cache, g.input("segments", [1, 3], "i32"), g.input("pages", [1, 1], "i32"), symbol("context"));
  g.output("y", g.scale(read, 1));
  const weights = await backend.load([]);
  expect(() => backend.prepare(g, { context: 4 }, weights, new Map())).toThrow(
    `internal: the ${backend.name} backend has no kernel for the op 'cacheRead'`,
  );
});

describe("the workspace", () => {
  test("is shared: programs of different sizes run interleaved and concurrently, with correct results", async () => {
    const made = await Promise.all([4, 64, 1, 256, 16].map((rows) => product(backend, rows, 24)));
    for (const { w } of made) w.write(noise(24 * 24, 7));
    const alone = made[0];
    const run = async ({ program }: typeof alone, rows: number, seed: number) => {
      const y = new Float32Array(rows * 24);
      await program.run({ rows }, { x: noise(rows * 24, seed) }, { y });
      return y;
    };
    const expected = await run(made[3], 256, 5);
    const jobs = Array.from({ length: 40 }, (_, i) => run(made[i % 5], [4, 64, 1, 256, 16][i % 5], 5));
    for (const [i, y] of (await Promise.all(jobs)).entries()) expect(y).toEqual(expected.subarray(0, [4, 64, 1, 256, 16][i % 5] * 24));
    made[3].program.dispose(); // the largest: the others must stay correct
    expect(await run(made[1], 64, 5)).toEqual(expected.subarray(0, 64 * 24));
  });

  test("larger than the address space is rejected when the program is prepared, with its size", async () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 2 ** 20], "f32");
    g.output("y", g.add(g.scale(x, 2), g.scale(x, 3)));
    const weights = await backend.load([]);
    expect(() => backend.prepare(g, { rows: 2 ** 25 }, weights, new Map())).toThrow(
      /^(out of memory: cannot map \d+ MiB$|internal: .* 32 bits)/,
    );
  });
});

describe("disposal", () => {
  test("a step that runs when the backend is disposed of finishes, and no other starts", async () => {
    const other = nativeBackend({ threads: 2 });
    const { program } = await product(other, 64, 32);
    const [x, y]: Numbers[] = [new Float32Array(64 * 32), new Float32Array(64 * 32).fill(1)];
    const runs = [0, 1, 2].map(() => program.run({ rows: 64 }, { x }, { y }));
    other.dispose();
    other.dispose();
    await Promise.all(runs);
    expect(y.every((v) => v === 0)).toBe(true);
    await expect(program.run({ rows: 64 }, { x }, { y })).rejects.toThrow("the backend has been disposed of");
    await expect(product(other, 1, 2)).rejects.toThrow("the backend has been disposed of");
  });

  test("a program that is disposed of finishes its step", async () => {
    const { program } = await product(backend, 64, 32);
    const [x, y]: Numbers[] = [new Float32Array(64 * 32), new Float32Array(64 * 32).fill(1)];
    const run = program.run({ rows: 64 }, { x }, { y });
    program.dispose();
    await run;
    await expect(program.run({ rows: 64 }, { x }, { y })).rejects.toThrow("the program has been disposed of");
  });
});

describe("in a process with a single file thread", () => {
  async function ran(what: string): Promise<string> {
    const script = fileURLToPath(new URL("./native.child.ts", import.meta.url));
    const { stdout } = await promisify(execFile)(process.execPath, ["--import", "tsx", script, what, folder], {
      cwd: fileURLToPath(new URL("../..", import.meta.url)),
      env: { ...process.env, UV_THREADPOOL_SIZE: "1" },
    });
    return stdout;
  }

  test("steps run while a file blocks it", async () => {
    expect(await ran("blocked")).toBe("step,step,step,file\n");
  });

  test("files are read while steps run", async () => {
    expect(await ran("busy")).toBe("file,step,step,step\n");
  });

  test("an idle backend does not keep the process alive", async () => {
    expect(await ran("idle")).toBe("step\n");
  });

  test("a pending step does", async () => {
    expect(await ran("pending")).toBe("step\n");
  });

  test("the process may exit in the middle of a step", async () => {
    expect(await ran("exit")).toBe("exit\n");
  });

  test("so may worker threads", async () => {
    expect(await ran("workers")).toBe("ended,ended,ended,step\n");
  });
});
