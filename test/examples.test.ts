/** Every example runs as it stands, on the build; recipes a few steps of it. */
import { execFile } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { expect, test } from "vitest";
import { run, temporary } from "./cli/run.ts";

const folder = fileURLToPath(new URL("../examples/", import.meta.url));
const expected: Record<string, RegExp> = {
  "generate.mjs": /^To save a document \S[\s\S]*\n\S*专家\S*\nlayer 1[\s\S]*layer 7: experts \d+ \(0\.\d\d\)/,
  "pipeline.mjs": /[\u4e00-\u9fff]{4}/,
  "concurrent.mjs": /^together \d+ ms, one after another \d+ ms\n你好\n {2}你好[\s\S]*Tokyo[\s\S]*7 \+ 5 = 12\n/,
  "grpc.mjs":
    /Tokyo\.\n\d+ tokens, FINISH_REASON_\w+\nthe last token used experts [\d, ]+ of layer 1\nINVALID_ARGUMENT of options.sampling.top_p\n$/,
};

const all = readdirSync(folder);
const recipes = all.filter((name) => existsSync(join(folder, name, "recipe.yaml")));

// compare.mjs needs an adapter: recipes run it
test.each(all.filter((name) => name.endsWith(".mjs") && name !== "compare.mjs"))("%s", async (name) => {
  const { stdout } = await promisify(execFile)(process.execPath, [folder + name]);
  expect(stdout).toMatch(expected[name]);
});

test("there is a recipe for each kind of work", () => expect(recipes).toEqual(["intents", "reviews", "style", "translation"]));

test.each(recipes)(
  "the recipe %s learns, and its adapter answers beside the base",
  async (name) => {
    const cwd = join(folder, name);
    const dry = await run(["train", "recipe.yaml", "--dry-run", "--threads", "1"], { cwd });
    expect(dry.code, dry.err).toBe(0);
    expect(dry.out).toMatch(/mlp\.experts\.gate_proj +1-7/);
    expect(dry.out).toMatch(/first batch .*\nrow 0, \d+ tokens: "\[.*User: .*\\nAssistant: \].+<\|end_of_sentence\|>"/s);
    expect(existsSync(join(cwd, "run"))).toBe(false);

    const out = join(temporary(), "run");
    const few = ["--max_steps", "6", "--warmup_ratio", "0", "--logging_steps", "1", "--threads", "1", "--eval_strategy", "no"];
    const ends = ["--save_strategy", "no", "--load_best_model_at_end", "false", "--output_dir", out];
    const done = await run(["train", "recipe.yaml", ...few, ...ends], { cwd });
    expect(done.code, done.err).toBe(0);
    const losses = [...done.err.matchAll(/^step \d of 6 {2}loss (\S+)/gm)].map(([, loss]) => Number(loss));
    expect(losses).toHaveLength(6);
    expect(Math.min(losses[4], losses[5])).toBeLessThan(0.9 * losses[0]);

    const { stdout } = await promisify(execFile)(process.execPath, [join(folder, "compare.mjs"), cwd, join(out, "final")]);
    const [, base, rows, tuned] = /\nas wanted: base (\d+) of (\d+), tuned (\d+)\n$/.exec(stdout) ?? [];
    expect(stdout.match(/^ {2}wanted: .+\n {2}base: {3}.*\n {2}tuned: {2}.*$/gm)).toHaveLength(Number(rows));
    expect(Math.max(Number(base), Number(tuned))).toBeLessThanOrEqual(Number(rows));
    const pairs = [...stdout.matchAll(/^ {2}base: {3}(.*)\n {2}tuned: {2}(.*)$/gm)];
    expect(pairs.some(([, one, other]) => one !== other)).toBe(true); // the adapter has an effect
  },
  240_000,
);
