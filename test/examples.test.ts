/** Every example runs as it stands, on the build. */
import { execFile } from "node:child_process";
import { readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { expect, test } from "vitest";

const folder = fileURLToPath(new URL("../examples/", import.meta.url));
const expected: Record<string, RegExp> = {
  "generate.mjs": /^To save a document \S[\s\S]*\n\S*专家\S*\nlayer 1[\s\S]*layer 7: experts \d+ \(0\.\d\d\)/,
  "pipeline.mjs": /[\u4e00-\u9fff]{4}/,
  "concurrent.mjs": /^together \d+ ms, one after another \d+ ms\n你好\n {2}你好[\s\S]*Tokyo[\s\S]*7 \+ 5 = 12\n/,
  "grpc.mjs":
    /Tokyo\.\n\d+ tokens, FINISH_REASON_\w+\nthe last token used experts [\d, ]+ of layer 1\nINVALID_ARGUMENT of options.sampling.top_p\n$/,
};

test.each(readdirSync(folder))("%s", async (name) => {
  const { stdout } = await promisify(execFile)(process.execPath, [folder + name]);
  expect(stdout).toMatch(expected[name]);
});
