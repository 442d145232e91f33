// `npm run test:gpu`: all tests that need a GPU. Records the kernels' cases and replays them on the card without Node, then runs the engine
// on it. MIXTAPE_TEST_DEVICE=cpu (or reference) runs the engine's tests on another device, to test the tests. Arguments choose files by name.
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("../../", import.meta.url));
const device = process.env["MIXTAPE_TEST_DEVICE"] || "cuda";
const words = process.argv.slice(2);
const named = (name) => words.length === 0 || words.some((word) => name.includes(word));

/** @returns whether it succeeded */
function run(command, args, options = {}) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: "inherit", ...options });
  if (error) console.error(`${command}: ${error.message}`);
  return status === 0;
}

/** In a process of its own, so that this one needs no loader for TypeScript. */
function missing() {
  const code = `import { cudaSystem } from ${JSON.stringify(join(root, "src/backend/cuda/cuda.ts"))}; console.log(JSON.stringify(cudaSystem()));`;
  const { stdout, status } = spawnSync(process.execPath, ["--import", "tsx", "--input-type=module", "-e", code], {
    cwd: root,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"],
  });
  if (status !== 0) return "it cannot be looked for";
  const { cards, driver, runtime, refused } = JSON.parse(stdout);
  if (!refused) console.log(`${cards.map(({ name }) => name).join(", ")}; driver ${driver}, runtime ${runtime}`);
  return refused;
}

/** The kernels' cases, recorded from the reference backend and replayed by native/cuda/replay.cu. */
function kernels() {
  const replay = join(root, "native/build/cuda/replay");
  if (!run("make", ["-s", "-j2", "-C", "native", "build/cuda/replay"]) || !existsSync(replay)) return false;
  const folder = mkdtempSync(join(tmpdir(), "mixtape-gpu-"));
  try {
    return run(process.execPath, ["--import", "tsx", "test/gpu/record.ts", folder]) && run(replay, [join(folder, "cases.replay")]);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

const failed = [];
if (device.startsWith("cuda")) {
  const why = missing();
  if (why) {
    console.error(`test:gpu needs a GPU that mixtape can use: ${why}. MIXTAPE_TEST_DEVICE=cpu runs the engine's tests on the CPU.`);
    process.exit(1);
  }
  if (named("kernels") && !kernels()) failed.push("kernels");
}
for (const file of readdirSync(join(root, "test/gpu")).filter((name) => name.endsWith(".gpu.ts") && named(name)))
  if (!run(process.execPath, ["--import", "tsx", "--test", "--test-reporter=spec", join("test/gpu", file)])) failed.push(file);
if (failed.length > 0) {
  console.error(`failed on ${device}: ${failed.join(", ")}`);
  process.exit(1);
}
