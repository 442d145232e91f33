/**
 * The instruction set `amx` with its tile instructions emulated: the cases that use them, under AddressSanitizer and
 * UndefinedBehaviorSanitizer where the compiler has them. Processors that have the instructions run all cases in kernels.test.ts.
 */
import { execFile, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { recordAll } from "./replay.ts";

const NATIVE = fileURLToPath(new URL("../../native/", import.meta.url));
const COMPILER = process.env.CXX ?? "g++";
const run = promisify(execFile);
/** Products of bfloat16 matrices in training, attention beside them, and int8 matrices. */
const CASES = /^training: .*( narrow | in pairs )|^(linear|groupedLinear) int8 /;

const folder = mkdtempSync(join(tmpdir(), "mixtape-tiles-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Whether a program with these sanitizers can be built and run. */
function works(checks: string): boolean {
  const program = join(folder, "probe");
  const built = spawnSync(COMPILER, ["-x", "c++", `-fsanitize=${checks}`, "-o", program, "-"], { input: "int main() {}" });
  return built.status === 0 && spawnSync(program).status === 0;
}

const there = spawnSync(COMPILER, ["-dumpmachine"], { encoding: "utf8" });
const fits = there.status === 0 && there.stdout.startsWith("x86_64");

describe.skipIf(!fits)(`emulated tiles${fits ? "" : ` (skipped: needs ${COMPILER} for x86_64)`}`, () => {
  let [file, count] = ["", 0];

  beforeAll(async () => {
    const checks = works("address,undefined") ? ["SANITIZE=address,undefined"] : [];
    const settings = [`CXX=${COMPILER}`, "EMULATE_TILES=1", "ISAS=amx", ...checks, "BUILD=build-emulate"];
    const built = run("make", ["-s", "-j2", "-C", NATIVE, ...settings, "build-emulate/replay"]);
    ({ file, count } = await recordAll(folder, CASES));
    await built;
  }, 900_000);

  test.each([1, 3])(
    "every case, %i threads",
    async (threads) => {
      const env = { ...process.env, UBSAN_OPTIONS: "print_stacktrace=1" };
      const found = await run(join(NATIVE, "build-emulate/replay"), ["amx", `${threads}`, file], { env, maxBuffer: 2 ** 26 }).catch(
        (error) => error as { stdout: string; stderr: string },
      );
      expect(count).toBeGreaterThan(60);
      expect({ stderr: found.stderr, text: found.stdout.trim() }).toEqual({
        stderr: "",
        text: `amx, ${threads} threads: ${count} of ${count} cases pass`,
      });
    },
    900_000,
  );
});
