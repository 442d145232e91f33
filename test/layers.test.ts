/** The linter holds the layers apart: imports against the direction of docs/architecture.md are errors. */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const root = fileURLToPath(new URL("..", import.meta.url));

function lint(file: string, imported: string): string {
  const run = spawnSync("npx", ["biome", "lint", `--stdin-file-path=${file}`], {
    cwd: root,
    input: `import { x } from "${imported}";\n\nexport const y = x;\n`,
    encoding: "utf8",
  });
  return run.stdout + run.stderr;
}

test.each([
  ["src/tensor/x.ts", "../graph/graph.ts"],
  ["src/tokenizer/x.ts", "../engine/engine.ts"],
  ["src/graph/x.ts", "../model/ernie.ts"],
  ["src/checkpoint/x.ts", "../backend/native.ts"],
  ["src/backend/x.ts", "../engine/engine.ts"],
  ["src/model/x.ts", "../backend/native.ts"],
  ["src/engine/x.ts", "../tokenizer/tokenizer.ts"],
])("%s may not import %s", (file, imported) => {
  expect(lint(file, imported)).toMatch(/noRestrictedImports/);
});

test.each([
  ["src/graph/x.ts", "../tensor/shape.ts"],
  ["src/model/x.ts", "../graph/graph.ts"],
  ["src/engine/x.ts", "../model/ernie.ts"],
])("%s may import %s", (file, imported) => {
  expect(lint(file, imported)).not.toMatch(/noRestrictedImports/);
});
