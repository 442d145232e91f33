/**
 * The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: all cases and two whole models on every instruction set
 * of this processor. Knows nothing of what the recordings contain.
 */
import { execFile, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { instructionSets } from "../../src/backend/native.ts";
import { recordAll } from "./replay.ts";

const NATIVE = fileURLToPath(new URL("../../native/", import.meta.url));
const COMPILER = process.env.CXX ?? "g++";
const CHECKS = "address,undefined";
const THREADS = 2;

const folder = mkdtempSync(join(tmpdir(), "mixtape-sanitizers-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Why the compiler's sanitizers cannot be used here; "" if they can. */
function missing(): string {
  const program = join(folder, "probe");
  const built = spawnSync(COMPILER, ["-x", "c++", `-fsanitize=${CHECKS}`, "-o", program, "-"], {
    input: "int main() {}",
    encoding: "utf8",
  });
  if (built.error) return `needs ${COMPILER}`;
  if (built.status !== 0) return `${COMPILER} cannot build with -fsanitize=${CHECKS}: ${built.stderr.trim().split("\n").at(-1)}`;
  const ran = spawnSync(program, { encoding: "utf8" });
  return ran.status === 0 ? "" : `a program with sanitizers does not run here: ${ran.stderr.trim().split("\n")[0]}`;
}

const why = missing();

describe.skipIf(why !== "")(`the kernels under sanitizers${why && ` (skipped: ${why})`}`, () => {
  const isas = instructionSets();
  let [file, count] = ["", 0];

  beforeAll(async () => {
    const settings = [`CXX=${COMPILER}`, `SANITIZE=${CHECKS}`, `ISAS=${isas.join(" ")}`, "BUILD=build-sanitize"];
    const built = promisify(execFile)("make", ["-s", "-j2", "-C", NATIVE, ...settings, "build-sanitize/replay"]);
    ({ file, count } = await recordAll(folder));
    await built;
  }, 600_000);

  test("all cases and two whole models run on every instruction set without memory errors or overflows", async () => {
    const env = { ...process.env, UBSAN_OPTIONS: "print_stacktrace=1" };
    const run = promisify(execFile)(join(NATIVE, "build-sanitize/replay"), ["all", `${THREADS}`, file], { env, maxBuffer: 2 ** 26 });
    const { stdout, stderr } = await run.catch((error) => error as { stdout: string; stderr: string });
    const passes = isas.map((isa) => `${isa}, ${THREADS} threads: ${count} of ${count} cases pass`);
    expect({ stderr, lines: stdout.trim().split("\n").sort() }).toEqual({ stderr: "", lines: passes.sort() });
  }, 600_000);
});
