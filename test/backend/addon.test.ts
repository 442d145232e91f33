/** The native addon on its own: version checks, its location, the calls it rejects, and kernels that overwrite their input. */
import { execFile, execFileSync } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { promisify } from "node:util";
import { afterAll, describe, expect, test } from "vitest";
import { DESCRIPTION, type Description, differences, loadAddon, openAddon } from "../../src/backend/addon.ts";
import type { Numbers } from "../../src/backend/backend.ts";
import { noise } from "./builder.ts";
import { execute, type Value, type Written, written } from "./program.ts";

const root = fileURLToPath(new URL("../..", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "mixtape-addon-"));
afterAll(() => rmSync(folder, { recursive: true }));
const addon = openAddon();

describe("version checks", () => {
  test("the built addon's description is the one that this version expects", () => {
    expect(addon.describe()).toEqual(DESCRIPTION);
    expect(differences(addon.describe())).toEqual([]);
  });

  test("all differences are listed", () => {
    const { int8kv: _, ...dtypes } = DESCRIPTION.dtypes;
    const other: Description = {
      ...DESCRIPTION,
      valueWords: 12,
      arenaUnit: 128,
      blockTokens: 16,
      dtypes: { ...dtypes, bf16: 7, nf4: 9 },
      places: { arena: 0, weight: 1 },
      samplingFloats: ["topP", "temperature"],
      samplingInts: [...DESCRIPTION.samplingInts, "grammar"],
    };
    expect(differences(other)).toEqual([
      "words of a value record: 12, expected 14",
      "bytes of a workspace unit: 128, expected 64",
      "tokens of a KV block: 16, expected 32",
      "dtype 'bf16': 7, expected 2",
      "no dtype 'int8kv'",
      "an unknown dtype 'nf4'",
      "no place 'state'",
      "no place 'input'",
      "no place 'output'",
      "no place 'view'",
      "no place 'unused'",
      expect.stringMatching(/^float sampling columns are topP, temperature; expected temperature, topP, /),
      expect.stringMatching(/^integer sampling columns are topK, .*, grammar; expected topK, /),
    ]);
  });

  /** Writes an addon whose `describe` is defined by `body`. */
  function compiled(name: string, body: string): string {
    const { include_dir: headers } = createRequire(import.meta.url)("node-api-headers") as { include_dir: string };
    const path = join(folder, name);
    writeFileSync(`${path}.c`, `#include <node_api.h>\n${body}`);
    execFileSync(process.env.CC ?? "cc", ["-shared", "-fPIC", "-I", headers, "-o", path, `${path}.c`]);
    return path;
  }

  test("an addon without a description is reported as stale", () => {
    const path = compiled("stale.node", "NAPI_MODULE_INIT() { return exports; }\n");
    expect(() => loadAddon(path)).toThrow(
      `the native addon ${path} is older than this version of mixtape; rebuild it with 'npm run build'`,
    );
  });

  test("an addon with another description is rejected in one line that names the differences", () => {
    const script = JSON.stringify(`(() => ({ ...${JSON.stringify(DESCRIPTION)}, valueWords: 12, places: {} }))`);
    const path = compiled(
      "other.node",
      `NAPI_MODULE_INIT() {
         napi_value script, describe;
         napi_create_string_utf8(env, ${script}, NAPI_AUTO_LENGTH, &script);
         napi_run_script(env, script, &describe);
         napi_set_named_property(env, exports, "describe", describe);
         return exports;
       }`,
    );
    expect(() => loadAddon(path)).toThrow(
      /^the native addon \S+other\.node does not match this version of mixtape: words of a value record: 12, expected 14; no place 'arena'; .*; rebuild it with 'npm run build'$/,
    );
  });

  test("errors for a file that is not an addon, and for a missing file, say what is wrong and what to do", () => {
    const text = join(folder, "text.node");
    writeFileSync(text, "hello");
    expect(() => loadAddon(text)).toThrow(/^cannot load the native addon \(.*text\.node: .*\); build it with 'npm run build'$/);
    const missing = join(folder, "node_modules/mixtape/native/build/mixtape.node");
    expect(() => loadAddon(missing)).toThrow(
      /^cannot load the native addon \(Cannot find module .*\); build it with 'npm rebuild mixtape'$/,
    );
  });

  test.each(["with a space", "磁带", "hash#1", "100%20"])("loads from a folder called '%s'", async (name) => {
    const copy = join(folder, name);
    for (const part of ["dist/backend", "dist/graph", "dist/tensor", "native/build/mixtape.node", "package.json"]) {
      mkdirSync(dirname(join(copy, part)), { recursive: true });
      cpSync(join(root, part), join(copy, part), { recursive: true });
    }
    const script = `import { instructionSets } from ${JSON.stringify(pathToFileURL(join(copy, "dist/backend/native.js")).href)};
      console.log(instructionSets().at(-1));`;
    const { stdout } = await promisify(execFile)(process.execPath, ["--input-type=module", "-e", script]);
    expect(stdout).toBe("scalar\n");
  });
});

describe("what it rejects", () => {
  const device = addon.open("", 1);
  afterAll(() => addon.disposeDevice(device));
  const values: Value[] = [
    { place: "input", shape: [3, 4] },
    { place: "arena", index: 1, shape: [3, 4] },
    { place: "view", index: 1, offset: 16, shape: [2, 4] },
    { place: "output", index: 0, output: 0, shape: [2, 4] },
    { place: "unused", shape: [1, 1, 1, 1] },
  ];
  const calls: Written[] = [
    ["scale", [0], [1], [2]],
    ["scale", [2], [3], [1]],
  ];
  const plan = written(values, calls, 128);

  test("nothing, if all is well", async () => {
    const y = new Float32Array(8);
    await execute(device, plan, 2, [Float32Array.from({ length: 12 }, (_, i) => i)], [y]);
    expect([...y]).toEqual([8, 10, 12, 14, 16, 18, 20, 22]);
  });

  const at = (value: number, word: number) => value * DESCRIPTION.valueWords + word;
  const broken: [string, (p: { values: Int32Array; calls: Int32Array; ops: string[]; arenaBytes: number }) => void, RegExp][] = [
    ["a fifth dimension", (p) => (p.values[at(0, 5)] = 5), /^internal: value 0 has rank 5, at most 4 fit a record$/],
    ["an unknown place", (p) => (p.values[at(1, 0)] = 9), /^internal: value 1 has the place 9$/],
    ["a slot beyond the workspace", (p) => (p.arenaBytes = 111), /^internal: value 1 ends beyond the workspace of 111 bytes$/],
    ["a negative offset", (p) => (p.values[at(2, 2)] = -4), /^internal: value 2 has a negative index or offset$/],
    ["an unknown symbol", (p) => (p.values[at(0, 7)] = 0), /^internal: value 0 has a size of 3 times symbol 0$/],
    ["a view of a view", (p) => (p.values[at(2, 1)] = 2), /^internal: value 2 is a view of value 2, which has no memory of its own$/],
    ["a view of nothing", (p) => (p.values[at(2, 1)] = 4), /^internal: value 2 is a view of value 4, which has no memory of its own$/],
    ["a weight without a name", (p) => (p.values[at(0, 0)] = 1), /^internal: value 0 is weight 0 of 0$/],
    ["a state that was not given", (p) => (p.values[at(0, 0)] = 2), /^internal: value 0 is state 0 of 0$/],
    ["a call of an unknown value", (p) => (p.calls[4] = 5), /^internal: call 0 \(scale\) refers to value 5, which has no place$/],
    ["a call of a value without memory", (p) => (p.calls[4] = 4), /^internal: call 0 \(scale\) refers to value 4, which has no place$/],
    ["a call that runs off the end", (p) => (p.calls[1] = 90), /^internal: call 0 of the plan is malformed$/],
    [
      "an op without a kernel",
      (p) => (p.ops[0] = "frobnicate"),
      /^internal: the instruction set \w+ has no kernel for the op 'frobnicate'$/,
    ],
    [
      "records of another size",
      (p) => (p.values = p.values.slice(1)),
      /^internal: the plan's records have 69 words, not a multiple of 14$/,
    ],
    ["more workspace than the address space", (p) => (p.arenaBytes = 2 ** 48), /^out of memory: cannot map 268435456 MiB$/],
  ];
  test.each(broken)("a plan with %s", async (_name, spoil, message) => {
    const spoilt = { ...plan, ops: [...plan.ops], values: plan.values.slice(), calls: plan.calls.slice() };
    spoil(spoilt);
    const weights = await addon.load([]);
    expect(() => addon.prepare(device, spoilt, weights, [])).toThrow(message);
  });

  test("a run with a view that ends beyond its base", async () => {
    const spoilt = { ...plan, values: plan.values.slice() };
    spoilt.values[at(2, 2)] = 20;
    const run = execute(device, spoilt, 2, [new Float32Array(12)], [new Float32Array(8)]);
    await expect(run).rejects.toThrow("internal: value 2 is a view that ends beyond what it shows");
  });

  test("a run without an input or output that its calls use, or with one that is too short", async () => {
    const [x, y] = [new Float32Array(12), new Float32Array(8)];
    await expect(execute(device, plan, 2, [null], [y])).rejects.toThrow(
      /^internal: call 0 \(scale\) needs an input or output that was not given/,
    );
    await expect(execute(device, plan, 2, [x], [null])).rejects.toThrow(
      /^internal: call 1 \(scale\) needs an input or output that was not given/,
    );
    await expect(execute(device, plan, 2, [], [y])).rejects.toThrow("internal: input 0 is missing: 0 were given");
    await expect(execute(device, plan, 2, [x], [y.subarray(1)])).rejects.toThrow("internal: output 0 has 28 bytes, 32 expected");
    await expect(execute(device, plan, 3, [x], [y])).rejects.toThrow("internal: call 2 of 2");
    await execute(device, plan, 1, [x], [null]); // the first call alone does not use it
  });

  test("bytes outside a state", () => {
    const memory = addon.memory(100);
    addon.writeMemory(memory, 97, Uint8Array.of(1, 2, 3));
    const read = new Uint8Array(4);
    addon.readMemory(memory, 96, read);
    expect([...read]).toEqual([0, 1, 2, 3]);
    for (const offset of [97, 101, -1, 2 ** 40])
      expect(() => addon.readMemory(memory, offset, read)).toThrow(
        `internal: 4 bytes from byte ${offset} on are not within a state of 100 bytes`,
      );
    expect(() => addon.writeMemory(memory, Number.NaN, read)).toThrow("internal: the offset in a state is not a whole number");
    addon.disposeMemory(memory);
    expect(() => addon.readMemory(memory, 0, read)).toThrow("the state has been disposed of");
  });
});

describe.each(addon.isas())("kernels that overwrite their input, %s", (isa) => {
  const [ROWS, N, DIM] = [37, 132, 44];
  const matrix: readonly number[] = [ROWS, N];
  const UNIT = 64;
  const slot = Math.ceil((ROWS * N * 4) / UNIT);

  /** The inputs' contents, by name. `x`, `z` and `by` are matrices of activations. */
  const filled: Record<string, { shape: readonly number[]; data: Numbers }> = {
    x: { shape: matrix, data: noise(ROWS * N, 1) },
    z: { shape: matrix, data: noise(ROWS * N, 2) },
    weight: { shape: [N], data: noise(N, 3) },
    angles: { shape: [ROWS, DIM], data: noise(ROWS * DIM, 4) },
    by: { shape: [3, N], data: noise(3 * N, 5) },
    index: { shape: [3], data: Int32Array.of(0, ROWS - 1, 17) },
    none: { shape: [0, N], data: new Float32Array() },
    nowhere: { shape: [0], data: new Int32Array() },
  };

  /** The results of `op` on copies of its inputs in the workspace, with the first result in the slot of input `over` or in its own slot. */
  async function results(
    op: string,
    names: readonly string[],
    outputs: number,
    params: readonly number[],
    over: number | null,
    threads: number,
  ) {
    const values: Value[] = [];
    const calls: Written[] = [];
    const inputs: Numbers[] = [];
    const operands = names.map((name, i) => {
      const { shape, data } = filled[name];
      values.push({ place: "input", index: inputs.length, shape, dtype: data instanceof Int32Array ? "i32" : "f32" });
      inputs.push(data);
      if (shape !== matrix) return values.length - 1;
      values.push({ place: "arena", index: i * slot, shape });
      calls.push(["reshape", [values.length - 2], [values.length - 1]]);
      return values.length - 1;
    });
    const made = Array.from({ length: outputs }, (_, o) => {
      const index = o === 0 && over !== null ? over * slot : (names.length + o) * slot;
      return values.push({ place: "arena", index, shape: matrix }) - 1;
    });
    calls.push([op, operands, made, params]);
    const out = made.map((id, o) => {
      values.push({ place: "output", index: o, output: o, shape: matrix });
      calls.push(["reshape", [id], [values.length - 1]]);
      return new Float32Array(ROWS * N).fill(Number.NaN);
    });
    const device = addon.open(isa, threads);
    await execute(device, written(values, calls, (names.length + outputs) * slot * UNIT), calls.length, inputs, out);
    addon.disposeDevice(device);
    return out.map((v) => new Uint32Array(v.buffer));
  }

  const ops: [op: string, inputs: string[], outputs: number, params: number[], over: number[]][] = [
    ["add", ["x", "z"], 1, [], [0, 1]],
    ["siluMul", ["x", "z"], 1, [], [0, 1]],
    ["scale", ["x"], 1, [-0.37], [0]],
    ["rope", ["x", "angles"], 1, [], [0]],
    ["rmsNorm", ["x", "weight"], 1, [1e-5], [0]],
    ["addRmsNorm", ["x", "z", "weight"], 2, [1e-5], [0, 1]],
    ["replaceRows", ["x", "by", "index"], 1, [], [0]],
    ["replaceRows", ["x", "none", "nowhere"], 1, [], [0]],
  ];
  test.each(ops)("%s of %j is bit-identical to the result in separate memory", async (op, names, outputs, params, over) => {
    const apart = await results(op, names, outputs, params, null, 1);
    for (const threads of [1, 2, 3])
      for (const i of [null, ...over])
        expect(await results(op, names, outputs, params, i, threads), `${threads} threads, over ${i}`).toEqual(apart);
  });

  test("addRmsNorm is bit-identical to add followed by rmsNorm", async () => {
    const [sum, normed] = await results("addRmsNorm", ["x", "z", "weight"], 2, [1e-5], null, 2);
    const [added] = await results("add", ["x", "z"], 1, [], null, 2);
    expect(sum).toEqual(added);
    filled.sum = { shape: matrix, data: new Float32Array(added.buffer) };
    expect([normed]).toEqual(await results("rmsNorm", ["sum", "weight"], 1, [1e-5], null, 2));
  });

  test("replacing a row that does not exist is an error", async () => {
    filled.beyond = { shape: [3], data: Int32Array.of(0, ROWS, 1) };
    await expect(results("replaceRows", ["x", "by", "beyond"], 1, [], 0, 2)).rejects.toThrow(
      `internal: replaceRows: row ${ROWS} of ${ROWS}`,
    );
  });
});
