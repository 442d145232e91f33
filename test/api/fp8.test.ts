/** The format fp8: its conversions, models that `quantize` writes in it, how the CPU reads them, and what is refused. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { loadModel } from "../../src/api/load.ts";
import { convertStored, randomMatrix } from "../../src/backend/native.ts";
import { decode, readWeight } from "../../src/backend/reference/weights.ts";
import { openCheckpoint, totalsByDtype } from "../../src/checkpoint/checkpoint.ts";
import { AutoModelForCausalLM, AutoTokenizer, exportGguf, type PretrainedOptions, quantize, verify } from "../../src/index.ts";
import { fromE4m3, fromF16, roundBf16, roundE4m3 } from "../../src/tensor/dtype.ts";
import { blockBytes, GROUP, locateElement } from "../../src/tensor/quantized.ts";
import type { StoredFormat } from "../../src/tensor/stored.ts";
import { noise } from "../backend/builder.ts";
import { run, temporary } from "../cli/run.ts";
import { GOLDENS, openGoldens, relativeError } from "../goldens.ts";

const SMALL = fileURLToPath(new URL("../../models/small-moe", import.meta.url));

/** A file that holds these bytes. */
function file(bytes: Uint8Array) {
  const path = join(temporary(), "matrix");
  writeFileSync(path, bytes);
  return { file: path, offset: 0, bytes: bytes.byteLength };
}

async function converted(bytes: Uint8Array, from: StoredFormat, to: StoredFormat, n: number, k: number, size: number): Promise<Uint8Array> {
  const out = new Uint8Array(size).fill(0xaa);
  await convertStored(file(bytes), from, to, n, k, out);
  return out;
}
const bytesOf = (x: Float32Array) => new Uint8Array(x.buffer, x.byteOffset, x.byteLength);
const toFp8 = (x: Float32Array, n: number, k: number) => converted(bytesOf(x), "f32", "fp8", n, k, blockBytes("fp8", n, k));
async function toFloats(blocks: Uint8Array, n: number, k: number): Promise<Float32Array> {
  return new Float32Array((await converted(blocks, "fp8", "f32", n, k, n * k * 4)).buffer);
}

/** All E4M3 numbers from 0 on, by the definition of the format. */
const NUMBERS = [
  ...Array.from({ length: 8 }, (_, f) => f * 2 ** -9),
  ...Array.from({ length: 15 }, (_, e) => Array.from({ length: 8 }, (_, f) => (1 + f / 8) * 2 ** (e - 6))).flat(),
].filter((x) => x <= 448);

describe("E4M3 numbers", () => {
  test("all 256 codes", () => {
    expect(NUMBERS).toHaveLength(127);
    for (let code = 0; code < 127; code++) {
      expect(fromE4m3(code)).toBe(NUMBERS[code]);
      expect(fromE4m3(code | 128)).toBe(-NUMBERS[code]);
    }
    expect([fromE4m3(127), fromE4m3(255)]).toEqual([Number.NaN, Number.NaN]);
  });

  test("rounding: to the nearest, ties to even, saturating", () => {
    for (const [i, x] of NUMBERS.entries()) {
      expect(roundE4m3(x)).toBe(x);
      if (i === 0) continue;
      const below = NUMBERS[i - 1];
      expect(roundE4m3(-(below + (x - below) * 0.501))).toBe(-x);
      expect(roundE4m3(below + (x - below) * 0.499)).toBe(below);
      expect(roundE4m3((x + below) / 2)).toBe(i % 2 ? below : x);
    }
    for (const x of [449, 464, 1e9, Number.POSITIVE_INFINITY]) expect(roundE4m3(x)).toBe(448);
  });
});

/** Groups of numbers with their scales, as stored. */
function scaleOf(blocks: Uint8Array, k: number, r: number, c: number): number {
  const { scale } = locateElement("fp8", k, r, c);
  return fromF16(blocks[scale] | (blocks[scale + 1] << 8));
}

/** The smallest squared error of a group among its eight scales, searched among all E4M3 numbers in float64. */
function leastError(group: Float32Array): number {
  const top = Math.max(...group.map(Math.abs));
  const scales = Array.from({ length: 37 * 8 }, (_, i) => ((8 + (i % 8)) / 8) * 2 ** (Math.floor(i / 8) - 21));
  const first = scales.findIndex((s) => s * 448 >= top);
  const errors = scales.slice(first, first + 8).map((s) => {
    let sum = 0;
    for (const w of group) {
      const x = Math.abs(w) / s;
      let [low, high] = [0, NUMBERS.length - 1]; // NUMBERS[low] <= x <= NUMBERS[high], as no number exceeds the scale's range
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (NUMBERS[middle] <= x) low = middle;
        else high = middle;
      }
      sum += (Math.min(x - NUMBERS[low], NUMBERS[high] - x) * s) ** 2;
    }
    return sum;
  });
  return Math.min(...errors);
}

describe("conversion", () => {
  const SIZES = [
    [1, 1],
    [16, 64],
    [17, 65],
    [5, 200],
    [33, 320],
  ] as const;

  test.each(SIZES)("[%i, %i] has the smallest error that its eight scales allow, at all magnitudes", async (n, k) => {
    for (const [seed, by] of [1e-9, 2e-7, 1e-5, 3e-4, 0.02, 1, 700, 9e4, 2.5e7].entries()) {
      const x = noise(n * k, seed + 1).map((v) => v ** 3 * by);
      const blocks = await toFp8(x, n, k);
      const seen = await toFloats(blocks, n, k);
      for (let r = 0; r < n; r++)
        for (let g = 0; g < k; g += GROUP) {
          const [from, to] = [r * k + g, r * k + Math.min(k, g + GROUP)];
          const error = seen.subarray(from, to).reduce((sum, v, i) => sum + (v - x[from + i]) ** 2, 0);
          const least = leastError(x.subarray(from, to));
          expect(error).toBeLessThanOrEqual(least * (1 + 1e-5));
          expect(error).toBeGreaterThanOrEqual(least * (1 - 1e-5));
        }
    }
  });

  test("scales have four bits, so that weights are bfloat16 numbers; the reference backend decodes and rounds alike", async () => {
    const [n, k] = [33, 320];
    const x = noise(n * k, 5).map((v, i) => v * 10 ** ((i % 23) - 15));
    const blocks = await toFp8(x, n, k);
    const seen = await toFloats(blocks, n, k);
    for (let r = 0; r < n; r++)
      for (let g = 0; g < k; g += GROUP) {
        const scale = scaleOf(blocks, k, r, g);
        const eighths = (scale / 2 ** Math.floor(Math.log2(scale))) * 8;
        expect(Number.isInteger(eighths)).toBe(true);
      }
    expect(seen).toEqual(seen.map(roundBf16));
    const decoded = new Float32Array(n * k);
    decode(Buffer.from(blocks), { stored: "fp8", shape: [n, k] }, decoded);
    expect(decoded).toEqual(seen);
    const source = { name: "w", stored: "f32", dtype: "fp8", shape: [n, k], parts: [file(bytesOf(x))] } as const;
    expect(await readWeight(source)).toEqual(seen);
  });

  test("bfloat16 and back, and again to fp8, changes nothing", async () => {
    const [n, k] = [17, 200];
    const blocks = await toFp8(noise(n * k, 6), n, k);
    const wide = await converted(blocks, "fp8", "bf16", n, k, n * k * 2);
    const seen = await toFloats(blocks, n, k);
    const floats = new Float32Array((await converted(wide, "bf16", "f32", n, k, n * k * 4)).buffer);
    expect(floats).toEqual(seen);
    const again = await converted(wide, "bf16", "fp8", n, k, blocks.length);
    expect(await toFloats(again, n, k)).toEqual(seen);
  });

  test("the largest group, zeros, padding, and noise", async () => {
    const most = 448 * 61440;
    const group = Float32Array.from({ length: GROUP }, (_, i) => (i === 0 ? most : i === 1 ? -most : 0));
    expect(await toFloats(await toFp8(group, 1, GROUP), 1, GROUP)).toEqual(group);
    const zeros = await toFp8(new Float32Array(70), 1, 70);
    expect(await toFloats(zeros, 1, 70)).toEqual(new Float32Array(70));
    expect(await toFloats(await toFp8(Float32Array.of(3), 1, 1), 16, 64)).toEqual(
      Float32Array.from({ length: 1024 }, (_, i) => (i ? 0 : 3)),
    );
    const random = new Uint8Array(blockBytes("fp8", 33, 64));
    await randomMatrix(3, 0.02, "fp8", 33, 64, random);
    const values = await toFloats(random, 33, 64);
    const deviation = Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);
    expect(deviation).toBeGreaterThan(0.018);
    expect(deviation).toBeLessThan(0.022);
  });

  test("numbers that are not finite or too large are named, and so is an E4M3 NaN", async () => {
    for (const [bad, fault] of [
      [Number.NaN, /holds NaN at row 1, column 6/],
      [Number.NEGATIVE_INFINITY, /holds infinity at row 1, column 6/],
      [3e7, /holds 3e\+07 at row 1, column 6; the largest number that this format can hold is 2\.75251e\+07/],
    ] as const) {
      const x = noise(2 * GROUP, 7);
      x[GROUP + 6] = bad;
      await expect(toFp8(x, 2, GROUP)).rejects.toThrow(fault);
    }
    for (const code of [0x7f, 0xff]) {
      const blocks = await toFp8(noise(2 * GROUP, 8), 2, GROUP);
      blocks[locateElement("fp8", GROUP, 1, 6).byte] = code;
      await expect(toFloats(blocks, 2, GROUP)).rejects.toThrow(/holds NaN at row 1, column 6/);
    }
  });
});

/** The goldens' model in fp8. */
async function quantized(variant = "moe-tiny"): Promise<string> {
  const out = join(temporary(), "fp8");
  await quantize(`${GOLDENS}${variant}`, out, { dtype: "fp8" });
  return out;
}

async function logitsOf(folder: string, ids: readonly number[], options: PretrainedOptions = {}): Promise<Float32Array> {
  const model = await AutoModelForCausalLM.from_pretrained(folder, { threads: 1, warning_callback: () => {}, ...options });
  const { logits } = await model.forward({ input_ids: [[...ids]] });
  await model.dispose();
  return logits.data as Float32Array;
}

describe("models", () => {
  test("quantize writes one that openCheckpoint, verify and info read", async () => {
    const out = await quantized();
    expect(JSON.parse(readFileSync(join(out, "config.json"), "utf8")).dtype).toBe("float8_e4m3fn");
    expect(await verify(out)).toEqual([]);
    const checkpoint = await openCheckpoint(out);
    expect([...totalsByDtype(checkpoint).keys()].sort()).toEqual(["F32", "fp8"]);
    expect(checkpoint.blocks.get("model.embed_tokens.weight")?.dtype).toBe("fp8");
    const { code, out: text } = await run(["info", out]);
    expect(code).toBe(0);
    expect(text).toMatch(/Weights as stored\s+fp8 +[\d.]+ [kM]B/);
  });

  // With random weights, experts are chosen by small differences, and rounding weights changes some of the choices.
  test.each([
    ["dense-tiny", 0.1],
    ["moe-tiny", 0.2],
  ])("the CPU and the reference backend compute the same from it, near to what %s computes", async (variant, most) => {
    const goldens = await openGoldens(variant);
    const ids = await goldens.ids(goldens.lengths[0]);
    const out = await quantized(variant);
    const [exact, cpu, reference] = [
      await logitsOf(goldens.folder, ids),
      await logitsOf(out, ids, { kv_cache_dtype: "fp32" }),
      await logitsOf(out, ids, { kv_cache_dtype: "fp32", device: "reference", threads: undefined }),
    ];
    expect(relativeError(cpu, reference)).toBeLessThan(1e-4);
    expect(relativeError(cpu, exact)).toBeLessThan(most);
    expect(relativeError(cpu, exact)).toBeGreaterThan(1e-3);
    const wide = join(temporary(), "bf16");
    await quantize(out, wide, { dtype: "bf16" });
    expect(await logitsOf(wide, ids, { kv_cache_dtype: "fp32" })).toEqual(cpu); // bit by bit
  });

  test("the CPU converts it to bf16 with one notice; another format can be asked for", async () => {
    const out = await quantized();
    const said: string[] = [];
    const settings = { device: "cpu", threads: 1, kv_cache_tokens: 64, warning_callback: (text: string) => said.push(text) };
    const loaded = await loadModel(out, settings);
    expect(new Set(loaded.weights.map(({ dtype }) => dtype))).toEqual(new Set(["bf16", "f32"]));
    expect(loaded.engine.kvDtype).toBe("f16");
    await loaded.engine.dispose();
    expect(said).toHaveLength(1);
    expect(said[0]).toMatch(
      /fp8: the CPU has no kernels for fp8; its matrices are converted to bf16, which holds them exactly, and take \d\.\d\d GB of memory instead of \d\.\d\d GB; models that 'mixtape quantize --dtype int8' writes are used as stored$/,
    );
    const other = await loadModel(out, { ...settings, dtype: "int8" });
    expect(new Set(other.weights.map(({ dtype }) => dtype))).toEqual(new Set(["int8", "f32"]));
    await other.engine.dispose();
    expect(said).toHaveLength(1);
  });

  test("fp8 asked for on a CPU is refused; the reference backend rounds to it", async () => {
    await expect(loadModel(`${GOLDENS}moe-tiny`, { dtype: "fp8", device: "cpu" })).rejects.toThrow(
      /^dtype 'fp8': the \w+ backend has no kernels for it, GPUs have; a model stored in fp8 is read as bf16 without dtype$/,
    );
    const goldens = await openGoldens("moe-tiny");
    const ids = await goldens.ids(goldens.lengths[0]);
    const settings = { device: "reference", threads: undefined, kv_cache_dtype: "fp32" } as const;
    const [rounded, stored] = [
      await logitsOf(goldens.folder, ids, { ...settings, dtype: "fp8" }),
      await logitsOf(await quantized(), ids, settings),
    ];
    expect(rounded).toEqual(stored);
  });

  test("the bundled model in fp8 predicts its own text about as well", async () => {
    const out = join(temporary(), "fp8");
    await quantize(SMALL, out, { dtype: "fp8" });
    const tokenizer = await AutoTokenizer.from_pretrained(SMALL);
    const ids = tokenizer.encode(readFileSync(join(SMALL, "README.md"), "utf8"), { add_special_tokens: false }).slice(0, 384);
    const [own, fp8] = [await perplexity(SMALL, ids), await perplexity(out, ids)];
    expect(Math.abs(Math.log(fp8 / own))).toBeLessThan(0.05);
    expect(fp8).not.toBe(own);
  }, 60_000);

  test("export writes it as bf16 without loss, and refuses a type that GGUF lacks", async () => {
    const out = await quantized();
    const to = join(temporary(), "model.gguf");
    await expect(exportGguf(out, to, { type: "fp8" as never, withoutTokenizer: true })).rejects.toThrow(
      "type 'fp8': GGUF has no 8-bit floats; bf16 holds fp8 exactly, q8_0 is as small",
    );
    await exportGguf(out, to, { type: "bf16", withoutTokenizer: true });
    const ids = [5, 6, 7, 8];
    expect(await logitsOf(to, ids)).toEqual(await logitsOf(out, ids));
  });

  test("int4 can be calibrated from it; for fp8 itself, a calibration is refused", async () => {
    const [from, out, text] = ["fp8", "int4", "text"].map((name) => join(temporary(), name));
    await quantize(SMALL, from, { dtype: "fp8" });
    writeFileSync(text, readFileSync(new URL("../../models/calibration/text.txt", import.meta.url)).subarray(0, 20_000));
    await quantize(from, out, { dtype: "int4", calibration: text });
    expect(await verify(out)).toEqual([]);
    await expect(quantize(SMALL, join(temporary(), "out"), { dtype: "fp8", calibration: "builtin" })).rejects.toThrow(
      "a calibration chooses int4 values; dtype is fp8, which needs none",
    );
  }, 120_000);
});

async function perplexity(folder: string, ids: readonly number[]): Promise<number> {
  const logits = await logitsOf(folder, ids, { kv_cache_dtype: "fp32" });
  const vocab = logits.length / ids.length;
  let nll = 0;
  for (let t = 0; t + 1 < ids.length; t++) {
    const row = logits.subarray(t * vocab, (t + 1) * vocab);
    const top = row.reduce((a, b) => Math.max(a, b));
    nll += Math.log(row.reduce((sum, v) => sum + Math.exp(v - top), 0)) + top - row[ids[t + 1]];
  }
  return Math.exp(nll / (ids.length - 1));
}
