// `quantize` with a calibration: nearer to the model than rounding alone on text that it did not see, the same bytes each time, clear errors.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AutoModelForCausalLM, AutoTokenizer, quantize, verify } from "../../src/index.ts";
import { run } from "../cli/run.ts";
import { readModel, writeModel } from "./folders.ts";

const SOURCE = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "mixtape-calibration-"));
afterAll(() => rmSync(folder, { recursive: true }));

const at = (name: string) => join(folder, name);
const calibrated = (out: string, calibration: string, source = SOURCE) => quantize(source, at(out), { dtype: "int4", calibration });
function file(name: string, content: string | Uint8Array): string {
  writeFileSync(at(name), content);
  return at(name);
}
/** A text of about 6,000 tokens: some of the builtin one. */
const builtin = readFileSync(new URL("../../models/calibration/text.txt", import.meta.url), "utf8");
const short = builtin.slice(0, 20_000);

describe("the bundled model", () => {
  beforeAll(async () => {
    await quantize(SOURCE, at("alone"), { dtype: "int4" });
    await calibrated("calibrated", file("short.txt", short));
  }, 120_000);

  test("is nearer to what it computes unrounded, on another text", async () => {
    const text = readFileSync(new URL("../../models/small-moe/README.md", import.meta.url), "utf8");
    const tokenizer = await AutoTokenizer.from_pretrained(SOURCE);
    const ids = tokenizer.encode(text, { add_special_tokens: false }).slice(0, 512);
    const [exact, alone, better] = await Promise.all(
      [SOURCE, at("alone"), at("calibrated")].map(async (path) => {
        const model = await AutoModelForCausalLM.from_pretrained(path, { threads: 1, kv_cache_dtype: "fp32" });
        const { logits } = await model.forward({ input_ids: [ids] });
        await model.dispose();
        return logits;
      }),
    );
    const vocab = exact.dims[2];
    const nearer = divergence(exact.data, better.data, vocab) / divergence(exact.data, alone.data, vocab);
    expect(nearer).toBeLessThan(0.85);
  }, 60_000);

  test("is a complete model, with nothing left over, and the same bytes a second time", async () => {
    expect(await verify(at("calibrated"))).toEqual([]);
    expect((await readdir(at("calibrated"))).filter((name) => name.includes("partial"))).toEqual([]);
    await calibrated("again", at("short.txt"));
    const digests = (name: string) => readFileSync(join(at(name), "checksums.json"), "utf8");
    expect(digests("again")).toBe(digests("calibrated"));
    expect(digests("again")).not.toBe(digests("alone"));
  }, 120_000);

  test("is refused once it is int4", async () => {
    await expect(calibrated("twice", "builtin", at("alone"))).rejects.toThrow(
      /model\.layers\.0\.\S+ is int4 already, .* a calibration needs the model in bf16, fp16, fp32 or int8$/,
    );
  });
});

/** Mean Kullback-Leibler divergence of the distributions over the next token. */
function divergence(exact: Float32Array, other: Float32Array, vocab: number): number {
  let total = 0;
  const logs = (row: Float32Array) => {
    const top = row.reduce((a, b) => Math.max(a, b));
    const sum = Math.log(row.reduce((s, v) => s + Math.exp(v - top), 0)) + top;
    return row.map((v) => v - sum);
  };
  for (let t = 0; t < exact.length; t += vocab) {
    const [p, q] = [logs(exact.subarray(t, t + vocab)), logs(other.subarray(t, t + vocab))];
    for (let i = 0; i < vocab; i++) total += Math.exp(p[i]) * (p[i] - q[i]);
  }
  return total / (exact.length / vocab);
}

test("a text that can't be used is an error that says why", async () => {
  await expect(calibrated("a", at("absent.txt"))).rejects.toThrow(/absent\.txt: can't be read as a calibration text \(ENOENT/);
  await expect(calibrated("a", folder)).rejects.toThrow(/can't be read as a calibration text \(EISDIR/);
  await expect(calibrated("a", file("empty.txt", ""))).rejects.toThrow(
    /empty\.txt: holds 0 tokens of text; a calibration needs at least 4096/,
  );
  await expect(calibrated("a", file("brief.txt", "A few words."))).rejects.toThrow(/brief\.txt: holds \d tokens of text/);
  await expect(calibrated("a", file("latin1.txt", Uint8Array.of(0x47, 0x72, 0xfc, 0xdf, 0x65)))).rejects.toThrow(
    /latin1\.txt: is not UTF-8 text/,
  );
  await expect(calibrated("a", file("long.txt", new Uint8Array(4 * 2 ** 20 + 1)))).rejects.toThrow(
    /long\.txt: holds 4194305 bytes; a calibration reads at most 4194304/,
  );
  expect((await readdir(at("a"))).filter((name) => name.startsWith("model"))).toEqual([]);
});

test("other formats, random weights and a model without a tokenizer are refused", async () => {
  await expect(quantize(SOURCE, at("b"), { dtype: "int8", calibration: "builtin" })).rejects.toThrow(
    "a calibration chooses int4 values; dtype is int8, which needs none",
  );
  await expect(calibrated("b", "builtin", "random:0.3b")).rejects.toThrow("random:0.3b has no tokenizer");
  const bare = await writeModel(folder, "bare", await readModel("moe-tiny"));
  await expect(calibrated("b", "builtin", bare)).rejects.toThrow(/bare: .*tokenizer/);
});

test("an aborted calibration leaves nothing that loads", async () => {
  const signal = AbortSignal.timeout(500);
  await expect(quantize(SOURCE, at("stopped"), { dtype: "int4", calibration: "builtin", signal })).rejects.toThrow();
  expect(await readdir(at("stopped"))).not.toContain("model.safetensors");
  expect(await readdir(at("stopped"))).not.toContain("calibration.partial");
});

test("the command line takes it, and says what is wrong with a text", async () => {
  const { code, err } = await run(["quantize", "default", at("c"), "--dtype", "int4", "--calibration", at("brief.txt")]);
  expect([code, err]).toEqual([1, expect.stringMatching(/brief\.txt: holds \d tokens of text; a calibration needs at least 4096/)]);
});
