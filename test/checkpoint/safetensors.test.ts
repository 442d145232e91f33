import { mkdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { CheckpointError } from "../../src/checkpoint/error.ts";
import { parseHeader, readHeader, readTensor, STORED_BITS } from "../../src/checkpoint/safetensors.ts";
import { craft, GOLDENS, get, scratch } from "./craft.ts";

const folder = scratch();
let count = 0;

/** Reads the header of a file of these bytes. */
async function read(bytes: Uint8Array) {
  const path = join(folder, `${count++}.safetensors`);
  writeFileSync(path, bytes);
  return readHeader(path);
}

async function faultOf(bytes: Uint8Array): Promise<string> {
  const error: unknown = await read(bytes).then(
    () => undefined,
    (e) => e,
  );
  expect(error).toBeInstanceOf(CheckpointError);
  const { message, file } = error as CheckpointError;
  expect(message).not.toMatch(/[\r\n]/);
  expect(message.startsWith(file)).toBe(true);
  return message.slice(file.length + 2);
}

const tensor = (dtype: unknown, shape: unknown, offsets: unknown) => ({ a: { dtype, shape, data_offsets: offsets } });

describe("a valid file", () => {
  test("gives entries with absolute offsets, in the order of the bytes", async () => {
    const { metadata, tensors } = await read(
      craft(
        {
          b: { dtype: "BF16", shape: [3], data_offsets: [8, 14] },
          a: { dtype: "F32", shape: [1, 2], data_offsets: [0, 8] },
          __metadata__: { format: "pt" },
          empty: { dtype: "I64", shape: [0, 7], data_offsets: [14, 14] },
          scalar: { dtype: "U8", shape: [], data_offsets: [14, 15] },
        },
        15,
      ),
    );
    expect({ ...metadata }).toEqual({ format: "pt" });
    expect([...tensors.keys()]).toEqual(["a", "b", "empty", "scalar"]);
    const b = get(tensors, "b");
    expect(b).toMatchObject({ name: "b", dtype: "BF16", shape: [3], bytes: 6 });
    expect([...(await readTensor(b))]).toEqual([8, 9, 10, 11, 12, 13]);
  });

  test("may have padding after its header, and no tensors", async () => {
    expect((await read(craft("{}       "))).tensors.size).toBe(0);
  });

  test("may use any key, such as __proto__", async () => {
    const header = '{"__proto__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"__metadata__":{"__proto__":"x","constructor":"y"}}';
    const { metadata, tensors } = await read(craft(header, 1));
    expect(tensors.get("__proto__")?.bytes).toBe(1);
    expect(Object.entries(metadata)).toEqual([
      ["__proto__", "x"],
      ["constructor", "y"],
    ]);
    expect(({} as Record<string, unknown>)["shape"]).toBeUndefined();
  });

  test("of every dtype of the format", async () => {
    for (const [dtype, bits] of Object.entries(STORED_BITS)) {
      expect((await read(craft(tensor(dtype, [8], [0, bits]), bits))).tensors.get("a")?.dtype).toBe(dtype);
    }
  });

  test("of transformers", async () => {
    const { metadata, tensors } = await readHeader(join(GOLDENS, "moe-tiny/model.safetensors"));
    expect({ ...metadata }).toEqual({ format: "pt" });
    expect(tensors.size).toBe(116);
    const bytes = await readTensor(get(tensors, "model.norm.weight"));
    expect(new Float32Array(bytes.buffer, 0, 64).every((x) => x > 0.5 && x < 1.5)).toBe(true);
  });
});

describe("a broken file is one CheckpointError", () => {
  const whole = craft(tensor("F32", [2], [0, 8]), 8);
  const cases: [string, Uint8Array, RegExp][] = [
    ["empty", Buffer.alloc(0), /^truncated: 0 bytes/],
    ["shorter than the length", Buffer.alloc(7), /^truncated: 7 bytes/],
    ["cut in the header", whole.subarray(0, 30), /^bad header length: \d+ bytes, the file has 30/],
    ["cut in the data", whole.subarray(0, -1), /claims bytes up to 8, the file has 7 .* truncated/],
    ["longer than its tensors", Buffer.concat([whole, Buffer.alloc(3)]), /^3 bytes after the last tensor/],
    ["a length beyond the file", craft("{}", 0, 1000n), /^bad header length: 1000 bytes, the file has 10/],
    ["a length beyond the limit", craft("{}", 0, 100_000_001n), /^bad header length: 100000001 bytes, the limit/],
    ["a length of 2^64-1", craft("{}", 0, 2n ** 64n - 1n), /^bad header length: 18446744073709551615/],
    ["a length of 0", craft("", 5), /does not start with \{/],
    ["not JSON", craft("{oops\n}"), /^bad header: not UTF-8 JSON/],
    ["not UTF-8", craft(Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d])), /^bad header: not UTF-8 JSON/],
    ["an array", craft("[]"), /does not start with \{/],
    ["space before", craft(" {}"), /does not start with \{/],
    ["a key twice", craft('{"a":1,"\\u0061":2}'), /the key "a" occurs twice/],
    ["a nested key twice", craft('{"a":{"dtype":"U8","dtype":"U8"}}'), /the key "dtype" occurs twice/],
    ["metadata not an object", craft({ __metadata__: [] }), /__metadata__ is not an object/],
    ["metadata not of strings", craft({ __metadata__: { a: 1 } }), /__metadata__ "a" is not a string/],
    ["an entry not an object", craft({ a: null }), /tensor "a" is not described/],
    ["no dtype", craft(tensor(undefined, [1], [0, 4]), 4), /unknown dtype undefined/],
    ["an unknown dtype", craft(tensor("F7", [1], [0, 4]), 4), /unknown dtype "F7"/],
    ["a dtype from the prototype", craft(tensor("constructor", [1], [0, 4]), 4), /unknown dtype "constructor"/],
    ["a negative size", craft(tensor("F32", [-1, -1], [0, 4]), 4), /bad shape \[-1,-1\]/],
    ["a fractional size", craft(tensor("F32", [0.5, 2], [0, 4]), 4), /bad shape \[0.5,2\]/],
    ["a size too big", craft(tensor("F32", [1e300], [0, 4]), 4), /bad shape/],
    ["a shape that is no list", craft(tensor("F32", "1", [0, 4]), 4), /bad shape "1"/],
    ["a count that overflows", craft(tensor("F32", [2 ** 40, 2 ** 40], [0, 4]), 4), /takes no whole count/],
    ["a nibble", craft(tensor("F4", [1], [0, 1]), 1), /takes no whole count/],
    ["three offsets", craft(tensor("F32", [1], [0, 4, 8]), 8), /bad data_offsets \[0,4,8\]/],
    ["a negative offset", craft(tensor("F32", [1], [-4, 0]), 0), /bad data_offsets/],
    ["an end before the begin", craft(tensor("F32", [1], [4, 0]), 4), /ends before it begins/],
    ["offsets outside the file", craft(tensor("F32", [1000], [0, 4000]), 4), /claims bytes up to 4000/],
    ["too few bytes", craft(tensor("F32", [2], [0, 4]), 4), /has 4 bytes, F32 \[2\] takes 8/],
    ["a gap", craft({ a: { dtype: "U8", shape: [1], data_offsets: [1, 2] } }, 2), /leaves 1 bytes before it unused/],
    [
      "an overlap",
      craft({ a: { dtype: "U8", shape: [2], data_offsets: [0, 2] }, b: { dtype: "U8", shape: [2], data_offsets: [1, 3] } }, 3),
      /"b" overlaps the tensor before it/,
    ],
    ["a very long name", craft({ ["n".repeat(5000)]: 1 }), /…/],
    ["very deep JSON", craft(`{"a":${"[".repeat(200_000)}${"]".repeat(200_000)}}`), /bad header/],
  ];
  test.each(cases)("%s", async (_, bytes, fault) => {
    const text = await faultOf(bytes);
    expect(text).toMatch(fault);
    expect(text.length).toBeLessThan(300);
  });

  test("no file, a folder", async () => {
    await expect(readHeader(join(folder, "absent"))).rejects.toThrow(/absent: no such file/);
    mkdirSync(join(folder, "sub"));
    await expect(readHeader(join(folder, "sub"))).rejects.toThrow(CheckpointError);
  });

  test("a file that shrinks after its header was read", async () => {
    const path = join(folder, "shrinks");
    writeFileSync(path, whole);
    const entry = get((await readHeader(path)).tensors, "a");
    truncateSync(path, whole.length - 1);
    await expect(readTensor(entry)).rejects.toThrow(/truncated/);
  });
});

/** Whether every claim of a parsed header holds. */
function expectSound(header: ReturnType<typeof parseHeader>, start: number, size: number): void {
  let end = start;
  for (const { dtype, shape, offset, bytes } of header.tensors.values()) {
    expect(offset).toBe(end);
    expect(bytes * 8).toBe(shape.reduce((n, s) => n * s, STORED_BITS[dtype]));
    end += bytes;
  }
  expect(end).toBe(size);
}

test("10,000 mutated headers parse to something sound or are a CheckpointError", async () => {
  const bytes = readFileSync(join(GOLDENS, "dense-tiny/model.safetensors"));
  const n = Number(bytes.readBigUInt64LE());
  const full = JSON.parse(bytes.subarray(8, 8 + n).toString()) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: number[] }
  >;
  const header = Buffer.from(JSON.stringify(Object.fromEntries(Object.entries(full).slice(0, 6))));
  const size =
    8 +
    header.length +
    Math.max(
      ...Object.values(full)
        .slice(1, 6)
        .map((t) => t.data_offsets[1] ?? 0),
    );

  const at = fc.nat(header.length - 1);
  const odd = fc.constantFrom(-1, 0, 1, 0.5, 2 ** 31, 2 ** 53, 1e308, null, "1", "F32", "__proto__", [], [0], {}, [1, 2, 3], true);
  const mutated = fc.oneof(
    fc.array(fc.tuple(at, fc.nat(7)), { minLength: 1, maxLength: 4 }).map((flips) => {
      const copy = Buffer.from(header);
      for (const [i, bit] of flips) copy[i] = (copy[i] ?? 0) ^ (1 << bit);
      return copy;
    }),
    at.map((length) => header.subarray(0, length)),
    fc.tuple(at, fc.nat(40)).map(([i, k]) => Buffer.concat([header.subarray(0, i), header.subarray(i + k)])),
    fc
      .tuple(at, fc.uint8Array({ minLength: 1, maxLength: 8 }))
      .map(([i, more]) => Buffer.concat([header.subarray(0, i), more, header.subarray(i)])),
    fc.tuple(at, fc.nat(9)).map(([i, digit]) => {
      const copy = Buffer.from(header);
      const place = copy.findIndex((c, j) => j >= i && c >= 0x30 && c <= 0x39);
      if (place >= 0) copy[place] = 0x30 + digit;
      return copy;
    }),
    fc
      .tuple(fc.nat(5), fc.constantFrom("dtype", "shape", "data_offsets", "whole"), fc.oneof(odd, fc.jsonValue()))
      .map(([i, key, value]) => {
        const copy = JSON.parse(header.toString()) as Record<string, Record<string, unknown>>;
        const name = Object.keys(copy)[i] as string;
        if (key === "whole") copy[name] = value as never;
        else (copy[name] as Record<string, unknown>)[key] = value;
        return Buffer.from(JSON.stringify(copy));
      }),
    fc.tuple(fc.nat(4), fc.nat(3), odd).map(([i, j, value]) => {
      const copy = JSON.parse(header.toString()) as typeof full;
      const entry = Object.values(copy)[i + 1] as { shape: unknown[]; data_offsets: unknown[] };
      if (j < 2) entry.data_offsets[j] = value;
      else entry.shape[j - 2] = value;
      return Buffer.from(JSON.stringify(copy));
    }),
  );
  let parsed = 0;
  const attempt = (text: Buffer) => {
    try {
      const fileBytes = size - header.length + text.length; // the data stays, whatever became of the header
      expectSound(parseHeader(text, "/file", fileBytes), 8 + text.length, fileBytes);
      parsed++;
    } catch (error) {
      if (!(error instanceof CheckpointError)) throw error;
    }
  };
  attempt(header);
  expect(parsed).toBe(1);
  fc.assert(fc.property(mutated, attempt), { numRuns: 10_000 });
  expect(parsed).toBeGreaterThan(10);
  expect(parsed).toBeLessThan(5_000);
});

test("300 mutated files, their length prefix included, read to something sound or are a CheckpointError", async () => {
  const whole = craft(
    { a: { dtype: "F32", shape: [2, 2], data_offsets: [0, 16] }, b: { dtype: "U8", shape: [3], data_offsets: [16, 19] } },
    19,
  );
  const path = join(folder, "mutated");
  await fc.assert(
    fc.asyncProperty(fc.nat(whole.length - 1), fc.nat(7), fc.nat(whole.length), fc.boolean(), async (i, bit, length, cut) => {
      const copy = Buffer.from(whole);
      copy[i] = (copy[i] ?? 0) ^ (1 << bit);
      const bytes = cut ? copy.subarray(0, length) : copy;
      writeFileSync(path, bytes);
      try {
        const header = await readHeader(path);
        expectSound(header, 8 + Number(bytes.readBigUInt64LE()), bytes.length);
      } catch (error) {
        if (!(error instanceof CheckpointError)) throw error;
      }
    }),
    { numRuns: 300 },
  );
});
