// `mixtape info --devices`, and commands that ask for a GPU where there is none.
import { copyFileSync, cpSync, mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { cudaSystem } from "../../src/backend/cuda/cuda.ts";
import { describeDevices, devices } from "../../src/cli/devices.ts";
import { checkServeConfig } from "../../src/server/config.ts";
import { run, temporary, tinyModel } from "./run.ts";

const root = fileURLToPath(new URL("../../", import.meta.url));
/** Hides the cards of a machine that has some. */
const HIDDEN = { CUDA_VISIBLE_DEVICES: "" };

const GB = 1e9;
const card = { name: "NVIDIA H100 80GB HBM3", major: 9, minor: 0, multiprocessors: 132, total: 85 * GB, free: 80 * GB, refused: "" };
const old = { ...card, name: "Tesla T4", major: 7, minor: 5, free: 0, refused: "compute capability 7.5; 8.0 or newer is needed" };
const plain = (found: ReturnType<typeof devices>) => describeDevices(found).split("\n");

test("cards are listed with memory, compute capability and versions, and why one is not usable", () => {
  const found = devices({ cards: [card, old], driver: "13.0", runtime: "12.8", refused: "" });
  expect(found.cuda.cards).toEqual([
    {
      device: "cuda:0",
      name: "NVIDIA H100 80GB HBM3",
      compute_capability: "9.0",
      multiprocessors: 132,
      memory: { total: 85 * GB, free: 80 * GB },
      refused: null,
    },
    expect.objectContaining({ device: "cuda:1", memory: { total: 85 * GB, free: null }, refused: old.refused }),
  ]);
  const lines = plain(found);
  expect(lines).toContain("cuda:0  NVIDIA H100 80GB HBM3");
  expect(lines).toContain("  memory                80.0 GB of 85.0 GB free");
  expect(lines).toContain("  usable                yes");
  expect(lines).toContain("  usable                no: compute capability 7.5; 8.0 or newer is needed");
  expect(lines).toContain("CUDA: built with 12.8, the driver supports 13.0");
});

test("a driver that is too old is in the way of every card", () => {
  const refused = "the driver supports CUDA 12.2; 13.0 or newer is needed";
  expect(plain(devices({ cards: [card], driver: "12.2", runtime: "13.0", refused }))).toContain(`  usable                no: ${refused}`);
  expect(plain(devices({ cards: [], driver: "12.2", runtime: "13.0", refused }))).toContain(`cuda  ${refused}`);
});

test("info --devices works without a GPU: the processor, and why there is no card", async () => {
  const text = await run(["info", "--devices"], { env: HIDDEN });
  expect([text.code, text.err]).toEqual([0, ""]);
  const { code, out, err } = await run(["info", "--devices", "--json"], { env: HIDDEN });
  expect([code, err]).toEqual([0, ""]);
  const { cpu, cuda } = JSON.parse(out);
  expect(cpu).toMatchObject({ device: "cpu", trains: true });
  expect(cpu.cores).toBeGreaterThan(0);
  expect(cpu.memory.total).toBeGreaterThanOrEqual(cpu.memory.free);
  expect(cuda.cards).toEqual([]);
  expect(text.out).toContain(`  computes with         ${cpu.instruction_set}, ${cpu.cores} core`);
  expect(text.out).toContain(`cuda  ${cuda.refused}\n`);
});

test("info --devices describes no model", async () => {
  expect(await run(["info", "--devices", "default"])).toEqual({
    code: 1,
    out: "",
    err: "mixtape: --devices describes this machine, not a model: leave out 'default'\n",
  });
});

test("--device cuda without a card: one line that gives the reason, exit code 1; with auto the CPU answers", async () => {
  const { refused } = JSON.parse((await run(["info", "--devices", "--json"], { env: HIDDEN })).out).cuda;
  expect(refused).toMatch(
    /^(there is no NVIDIA driver|no NVIDIA GPU is visible \(see CUDA_VISIBLE_DEVICES\)|mixtape was built without CUDA: .*)$/,
  );
  const model = tinyModel();
  for (const device of ["cuda", "cuda:1"]) {
    const args = ["generate", "a", "-m", model, "--max-new-tokens", "1", "--device", device];
    expect(await run(args, { env: HIDDEN })).toEqual({ code: 1, out: "", err: `mixtape: device 'cuda': ${refused}\n` });
  }
  const { code, err } = await run(["generate", "a", "-m", model, "--max-new-tokens", "1"], { env: HIDDEN });
  expect([code, err]).toEqual([0, ""]);
});

test("an installation without the CUDA library says how to build it, and computes as before", async () => {
  const folder = temporary();
  mkdirSync(join(folder, "native/build"), { recursive: true });
  for (const name of ["bin", "dist", "package.json"]) cpSync(join(root, name), join(folder, name), { recursive: true });
  copyFileSync(join(root, "native/build/mixtape.node"), join(folder, "native/build/mixtape.node"));
  symlinkSync(join(root, "node_modules"), join(folder, "node_modules"));
  const binary = join(folder, "bin/mixtape.js");
  const model = tinyModel();
  const generate = ["generate", "a", "-m", model, "--max-new-tokens", "1", "--device"];
  const reason = "mixtape was built without CUDA: install nvcc 12.4 or newer and run 'npm rebuild mixtape'";
  expect((await run(["info", "--devices"], { binary })).out).toMatch(new RegExp(`\ncuda  ${reason}\n$`));
  expect(await run([...generate, "cuda"], { binary })).toEqual({ code: 1, out: "", err: `mixtape: device 'cuda': ${reason}\n` });
  expect(await run([...generate, "auto"], { binary })).toMatchObject({ code: 0, err: "" });
});

test("a library that is not one is a reason, not a crash", async () => {
  const library = join(temporary(), "mixtape_cuda.so");
  writeFileSync(library, "not a library");
  const child = `import { cudaSystem } from ${JSON.stringify(join(root, "dist/backend/cuda/cuda.js"))}; console.log(cudaSystem(${JSON.stringify(library)}).refused);`;
  const script = join(temporary(), "child.mjs");
  writeFileSync(script, child);
  const { code, out } = await run([], { binary: script });
  expect(code).toBe(0);
  expect(out).toMatch(/^the CUDA library cannot be used: .*mixtape_cuda\.so: .+\n$/);
});

test("a server's config takes a device for each model", () => {
  const models = [
    { name: "a", path: "default", device: "cuda:1" },
    { name: "b", path: "default", device: "cpu" },
    { name: "c", path: "default" },
  ];
  expect(checkServeConfig({ models }).models.map(({ device }) => device)).toEqual(["cuda:1", "cpu", "auto"]);
  expect(() => checkServeConfig({ models: [{ name: "a", path: "default", device: "gpu" }] })).toThrow(
    /known devices are auto, cpu, cuda, cuda:0, cuda:1, \.\.\., reference/,
  );
});

test.skipIf(cudaSystem().refused)("a card that is not there (needs a GPU)", async () => {
  const { cards } = cudaSystem();
  const { code, err } = await run(["generate", "a", "-m", tinyModel(), "--device", `cuda:${cards.length}`]);
  expect(code).toBe(1);
  expect(err).toMatch(/^mixtape: device 'cuda:\d+': there (is 1 GPU|are \d+ GPUs), numbered from 0\n$/);
});
