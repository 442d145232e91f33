import { appendFileSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import * as fs from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import { beforeEach, expect, test, vi } from "vitest";
import { CheckpointError } from "../../src/checkpoint/error.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { type TensorData, writeSafetensors } from "../../src/checkpoint/writer.ts";
import { get, scratch } from "./craft.ts";

vi.mock("node:fs/promises", async (original) => ({ ...(await original<typeof fs>()) }));

const folder = scratch();
let path: string;
let count = 0;
beforeEach(() => {
  path = join(folder, `${count++}.safetensors`);
});

const u8 = (name: string, bytes: number): TensorData => ({ name, dtype: "U8", shape: [bytes], data: new Uint8Array(bytes).fill(bytes) });
const leftovers = () => readdirSync(folder).filter((name) => name.endsWith(".tmp"));

test("what is written reads back, names and metadata included", async () => {
  const floats = new Float32Array([1, -2, 3.5, 4, 5, 6]);
  await writeSafetensors(
    path,
    [
      { name: "b", dtype: "F32", shape: [2, 3], data: new Uint8Array(floats.buffer) },
      { name: "层.weight", dtype: "BF16", shape: [], data: async () => Uint8Array.of(7, 8) },
      { name: "none", dtype: "F64", shape: [0, 4], data: new Uint8Array() },
      { name: "__proto__", dtype: "U8", shape: [1], data: Uint8Array.of(9) },
    ],
    { metadata: { "mixtape.format": "1" } },
  );
  const { metadata, tensors } = await readHeader(path);
  expect({ ...metadata }).toEqual({ "mixtape.format": "1" });
  expect([...tensors.keys()].sort()).toEqual(["__proto__", "b", "none", "层.weight"].sort());
  const b = get(tensors, "b");
  expect(b).toMatchObject({ dtype: "F32", shape: [2, 3], bytes: 24 });
  expect([...new Float32Array((await readTensor(b)).buffer)]).toEqual([...floats]);
  expect([...(await readTensor(get(tensors, "层.weight")))]).toEqual([7, 8]);
});

test("data starts at a multiple of 64, and so does every tensor that can be aligned", async () => {
  const sizes = [3, 64, 100, 128, 32, 1, 192, 6];
  await writeSafetensors(
    path,
    sizes.map((n) => u8(`t${n}`, n)),
  );
  const entries = [...(await readHeader(path)).tensors.values()];
  expect(entries.map((e) => e.bytes)).toEqual([64, 128, 192, 32, 100, 6, 3, 1]);
  for (const { offset, bytes } of entries) if (bytes % 64 === 0) expect(offset % 64).toBe(0);
  expect(readFileSync(path).readBigUInt64LE() % 8n).toBe(0n);
});

test("elements are aligned to their own size, whatever the mix", async () => {
  const widths = { F32: 4, F16: 2, U8: 1, F64: 8 } as const;
  await fc.assert(
    fc.asyncProperty(fc.array(fc.tuple(fc.constantFrom("F32", "F16", "U8", "F64"), fc.nat(70)), { maxLength: 12 }), async (list) => {
      const tensors = list.map(
        ([dtype, n], i): TensorData => ({ name: `t${i}`, dtype, shape: [n], data: new Uint8Array(n * widths[dtype]) }),
      );
      await writeSafetensors(path, tensors);
      const header = await readHeader(path);
      expect(header.tensors.size).toBe(tensors.length);
      for (const { dtype, offset } of header.tensors.values()) expect(offset % widths[dtype as keyof typeof widths]).toBe(0);
    }),
    { numRuns: 50 },
  );
});

test("data is requested one tensor at a time, also from an async iterable", async () => {
  let held = 0;
  async function* tensors(): AsyncGenerator<TensorData> {
    for (let i = 0; i < 5; i++) {
      const data = async () => {
        expect(++held).toBe(1);
        await new Promise((resolve) => setTimeout(resolve, 1));
        held--;
        return new Uint8Array(64).fill(i);
      };
      yield { name: `t${i}`, dtype: "U8", shape: [64], data };
    }
  }
  await writeSafetensors(path, tensors());
  const { tensors: read } = await readHeader(path);
  expect([...read.keys()]).toEqual(["t0", "t1", "t2", "t3", "t4"]);
  expect((await readTensor(get(read, "t3")))[63]).toBe(3);
});

test("a failure leaves the old file and no temporary one", async () => {
  writeFileSync(path, "old");
  const broken = { ...u8("b", 8), data: () => Promise.reject(new TypeError("no such expert")) };
  await expect(writeSafetensors(path, [u8("a", 64), broken])).rejects.toThrow(new TypeError("no such expert"));
  await expect(writeSafetensors(path, [{ ...u8("a", 8), data: new Uint8Array(7) }])).rejects.toThrow(
    /tensor a: 7 bytes given, U8 \[8\] takes 8/,
  );
  expect(readFileSync(path, "utf8")).toBe("old");
  expect(leftovers()).toEqual([]);
});

test("bad tensors are rejected before anything is written", async () => {
  await expect(writeSafetensors(path, [u8("a", 1), u8("a", 1)])).rejects.toThrow(/two tensors are named a/);
  await expect(writeSafetensors(path, [u8("__metadata__", 1)])).rejects.toThrow(CheckpointError);
  await expect(writeSafetensors(path, [{ ...u8("a", 1), shape: [1.5] }])).rejects.toThrow(/can't be stored/);
  await expect(writeSafetensors(path, [{ ...u8("a", 1), dtype: "INT4" as never }])).rejects.toThrow(/INT4 \[1\] can't be stored/);
  await expect(writeSafetensors(join(folder, "absent/x"), [])).rejects.toThrow(/no folder .*absent/);
  expect(existsSync(path)).toBe(false);
});

test("a resumable file continues where it stopped, and discards a part with other tensors", async () => {
  const sizes = [64, 128, 192, 256];
  const made: string[] = [];
  const tensors = (stop: number): TensorData[] =>
    sizes.map((n, i) => ({
      ...u8(`t${i}`, n),
      data: async () => {
        if (i === stop) throw new Error("killed");
        made.push(`t${i}`);
        return new Uint8Array(n).fill(i + 1);
      },
    }));
  await expect(writeSafetensors(path, tensors(2), { resumable: true })).rejects.toThrow("killed");
  expect(existsSync(`${path}.partial`)).toBe(true);
  appendFileSync(`${path}.partial`, "half a tensor");
  made.length = 0;
  const seen: string[] = [];
  await writeSafetensors(path, tensors(-1), {
    resumable: true,
    concurrency: 2,
    onWritten: (name, data) => seen.push(`${name} ${data[0]}`),
  });
  expect(made).toEqual(["t2", "t3"]);
  expect(seen).toEqual(["t0 1", "t1 2", "t2 3", "t3 4"]);
  const entries = (await readHeader(path)).tensors;
  for (const [i, n] of sizes.entries()) expect([...(await readTensor(get(entries, `t${i}`)))]).toEqual(new Array(n).fill(i + 1));
  expect(existsSync(`${path}.partial`)).toBe(false);

  rmSync(path);
  await expect(writeSafetensors(path, tensors(2), { resumable: true })).rejects.toThrow("killed");
  made.length = 0;
  await writeSafetensors(path, tensors(-1), { resumable: true, metadata: { another: "file" } });
  expect(made).toHaveLength(4);
});

test("a full disk is reported, and nothing is left behind", async () => {
  const { open } = fs;
  vi.spyOn(fs, "open").mockImplementationOnce(async (...args) => {
    const handle = await open(...args);
    const full = Object.assign(new Error("ENOSPC: no space left on device, write"), { code: "ENOSPC" });
    vi.spyOn(handle, "write").mockRejectedValue(full);
    return handle;
  });
  const error: unknown = await writeSafetensors(path, [u8("a", 64)]).catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect((error as Error).message).toMatch(/the disk is full: \d+ bytes are needed in .*; free some and run again/);
  expect(existsSync(path)).toBe(false);
  expect(leftovers()).toEqual([]);
});
