// Help, version, and error messages for wrong use of commands and options.
import { expect, test } from "vitest";
import { run } from "./run.ts";

test.each(["chat", "generate", "serve", "routing", "info", "pull", "quantize", "augment", "bench"])(
  "%s --help shows its options and examples",
  async (command) => {
    const { code, out, err } = await run([command, "--help"]);
    expect([code, err]).toEqual([0, ""]);
    expect(out).toContain(`Usage: mixtape ${command}`);
    expect(out).toContain("Examples:");
    expect(out).toContain(`  mixtape ${command}`);
  },
);

test("without a command, with --help and help, the commands are listed", async () => {
  for (const args of [[], ["--help"], ["help"]]) {
    const { code, out } = await run(args);
    expect(code).toBe(0);
    expect(out).toContain("quantize");
  }
  expect((await run(["--version"])).out).toMatch(/^\d+\.\d+\.\d+\n$/);
});

test.each([
  [["generat"], "unknown command 'generat' (Did you mean generate?)"],
  [["generate", "--tempature", "1", "x"], "unknown option '--tempature' (Did you mean --temperature?)"],
  [["pull"], "missing required argument 'id'"],
  [["pull", "a", "b"], "too many arguments for 'pull'. Expected 1 argument but got 2."],
  [["generate", "x", "--top-k", "abc"], "option '--top-k <n>' argument 'abc' is invalid. It must be a whole number from 0 to 2^53 - 1."],
  [["generate", "x", "--top-p", "1.5"], "option '--top-p <x>' argument '1.5' is invalid. It must be a number from 0 to 1."],
  [
    ["generate", "x", "--temperature", "0x1"],
    "option '--temperature <x>' argument '0x1' is invalid. It must be a number from 0 to 1000000.",
  ],
  [["generate", "x", "--threads", "0"], "option '--threads <n>' argument '0' is invalid. It must be a whole number of at least 1."],
  [["generate", "x", "--stop", ""], "option '--stop <text>' argument '' is invalid. It must not be empty."],
  [["generate", "--ids", "1,x"], "option '--ids <list>' argument '1,x' is invalid. 'x' is not a token id; it must be like 1,2,3."],
  [["generate", "x", "--greedy", "--seed", "1"], "option '--greedy' cannot be used with option '--seed <n>'"],
  [["generate", "x", "--schema", "a.json", "--regex", "b"], "option '--schema <file>' cannot be used with option '--regex <pattern>'"],
  [
    ["generate", "x", "--dtype", "int3"],
    "option '--dtype <format>' argument 'int3' is invalid. Allowed choices are auto, fp32, fp16, bf16, fp8, int8, int4.",
  ],
  [
    ["quantize", "a", "b", "--dtype", "int3"],
    "option '--dtype <format>' argument 'int3' is invalid. Allowed choices are int8, int4, fp8, bf16, fp16, fp32.",
  ],
  [
    ["generate", "x", "--device", "tpu"],
    "option '--device <name>' argument 'tpu' is invalid. Known are auto, cpu, cuda, cuda:0, cuda:1, ..., reference.",
  ],
])("%j: one line, exit code 1", async (args, message) => {
  expect(await run(args)).toEqual({ code: 1, out: "", err: `mixtape: ${message}\n` });
});
