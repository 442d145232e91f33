/** The 64-bit Arm kernels, cross-compiled and run in an emulator against the reference backend and two recorded models. */

import { execFile, spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { recordAll } from "./replay.ts";

const NATIVE = fileURLToPath(new URL("../../native/", import.meta.url));
const COMPILER = "aarch64-linux-gnu-g++";
const EMULATOR = "qemu-aarch64";
const missing = [COMPILER, EMULATOR].filter((tool) => spawnSync(tool, ["--version"]).error);
const why = missing.length ? ` (skipped: needs ${missing.join(" and ")}, Debian's g++-aarch64-linux-gnu and qemu-user)` : "";

const folder = mkdtempSync(join(tmpdir(), "mixtape-neon-"));
let all = { file: "", count: 0 };
/** Enough to see which instruction set computes. */
let some = all;
afterAll(() => rmSync(folder, { recursive: true }));

interface Outcome {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs the cases on an emulated processor. */
async function emulate(cpu: string, isa: string, threads: number, { file } = all): Promise<Outcome> {
  const args = ["-cpu", cpu, `${NATIVE}build-aarch64/replay`, isa, `${threads}`, file];
  try {
    return { code: 0, ...(await promisify(execFile)(EMULATOR, args)) };
  } catch (error) {
    return error as Outcome & Error; // `code` is null if a signal ended it
  }
}

describe.skipIf(missing.length > 0)(`64-bit Arm in an emulator${why}`, () => {
  beforeAll(async () => {
    const make = ["-s", "-j2", "-C", NATIVE, `CXX=${COMPILER}`, "LDFLAGS=-static", "BUILD=build-aarch64", "build-aarch64/replay"];
    const built = promisify(execFile)("make", make);
    all = await recordAll(folder);
    mkdirSync(join(folder, "some"));
    some = await recordAll(join(folder, "some"), /^(linear|embed) int[48] rows 7\b/);
    await built;
  }, 300_000);

  const passes = (isa: string, threads: number, { count } = all) => ({
    code: 0,
    stderr: "",
    stdout: `${isa}, ${threads} threads: ${count} of ${count} cases pass\n`,
  });

  // Both at a time, because an emulator runs on one core.
  test.each(["neoni8mm", "neon", "scalar"])(
    "%s, 1 and 2 threads: every case and two whole models",
    async (isa) => {
      const outcomes = await Promise.all([1, 2].map((threads) => emulate("max", isa, threads)));
      expect(outcomes).toEqual([passes(isa, 1), passes(isa, 2)]);
    },
    600_000,
  );

  // Armv8.0 has no dot products: an instruction of a later version would end the process with a signal.
  test("a processor without the dot product extension runs scalar code", async () => {
    expect(some.count).toBeGreaterThan(5);
    expect(await emulate("cortex-a53", "all", 1, some)).toEqual(passes("scalar", 1, some));
  }, 300_000);

  test("requesting neon on such a processor is an error that lists what it supports", async () => {
    const { code, stderr } = await emulate("cortex-a53", "neon", 1);
    expect([code, stderr]).toEqual([1, "MIXTAPE_ISA: this processor has no 'neon'; it has scalar\n"]);
  });
});
