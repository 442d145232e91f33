/** The linter holds the layers apart: imports against the direction of docs/architecture.md are errors. */
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const FORBIDDEN = [
  ["tensor", "../graph/graph.ts"],
  ["tokenizer", "../engine/engine.ts"],
  ["graph", "../model/ernie.ts"],
  ["checkpoint", "../backend/native.ts"],
  ["backend", "../engine/engine.ts"],
  ["model", "../backend/native.ts"],
  ["engine", "../tokenizer/tokenizer.ts"],
  ["server", "../cli/serve.ts"],
  ["web", "../server/served.ts"],
];
const ALLOWED = [
  ["graph", "../tensor/shape.ts"],
  ["model", "../graph/graph.ts"],
  ["engine", "../model/ernie.ts"],
  ["server", "../engine/engine.ts"],
];

test("imports against the layers are errors, the others are not", () => {
  const root = fileURLToPath(new URL("..", import.meta.url));
  const folder = mkdtempSync(join(tmpdir(), "mixtape-layers-"));
  const rules = JSON.parse(readFileSync(join(root, "biome.json"), "utf8"));
  writeFileSync(join(folder, "biome.json"), JSON.stringify({ ...rules, $schema: undefined, vcs: undefined }));
  for (const [name, pairs] of [
    ["forbidden", FORBIDDEN],
    ["allowed", ALLOWED],
  ] as const)
    for (const [layer, imported] of pairs) {
      mkdirSync(join(folder, "src", layer), { recursive: true });
      writeFileSync(join(folder, "src", layer, `${name}.ts`), `import { x } from "${imported}";\n\nexport const y = x;\n`);
    }
  const { stdout, stderr } = spawnSync(join(root, "node_modules/.bin/biome"), ["lint", "src"], { cwd: folder, encoding: "utf8" });
  rmSync(folder, { recursive: true });
  const found = [...(stdout + stderr).matchAll(/^src\/(\S+?):\d+:\d+ lint\/style\/noRestrictedImports/gm)].map((m) => m[1]);
  expect(found.sort()).toEqual(FORBIDDEN.map(([layer]) => `${layer}/forbidden.ts`).sort());
});
