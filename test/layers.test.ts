/** The linter keeps the rooms apart: imports against their order and import cycles are errors, types included. */
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const root = fileURLToPath(new URL("..", import.meta.url));

/** The rooms that each room may import. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  tensor: [],
  tokenizer: [],
  graph: ["tensor"],
  checkpoint: ["tensor"],
  backend: ["tensor", "graph", "checkpoint"],
  model: ["tensor", "graph", "checkpoint"],
  engine: ["tensor", "graph", "backend", "model"],
  grammar: ["tokenizer"],
  chat: ["tokenizer", "grammar"],
  train: ["tensor", "tokenizer", "graph", "checkpoint", "backend", "model", "engine", "chat"],
  eval: ["tensor", "tokenizer", "graph", "checkpoint", "backend", "model", "engine", "api"],
  api: ["tensor", "tokenizer", "graph", "checkpoint", "backend", "model", "engine", "grammar", "chat", "train"],
  server: ["tokenizer", "model", "engine", "grammar", "chat", "api"],
  cli: ["tensor", "tokenizer", "graph", "checkpoint", "backend", "model", "engine", "grammar", "chat", "train", "eval", "api", "server"],
  web: [],
};
const ROOMS = Object.keys(MAY_IMPORT);
/** Files of a room that others may import, where the rest of that room is closed to them. */
const SINGLE_FILES: readonly (readonly [room: string, file: string])[] = [
  ["grammar", "engine/sequence.ts"],
  ["server", "checkpoint/checkpoint.ts"],
];

/** Lints files, given as path and text, by the project's rules. Returns the paths with an error of `rule`. */
function errorsOf(rule: string, files: ReadonlyMap<string, string>): string[] {
  const folder = mkdtempSync(join(tmpdir(), "mixtape-layers-"));
  const rules = JSON.parse(readFileSync(join(root, "biome.json"), "utf8"));
  writeFileSync(join(folder, "biome.json"), JSON.stringify({ ...rules, $schema: undefined, vcs: undefined }));
  for (const [path, text] of files) {
    mkdirSync(dirname(join(folder, path)), { recursive: true });
    writeFileSync(join(folder, path), text);
  }
  const run = [join(root, "node_modules/.bin/biome"), ["lint", "--max-diagnostics=none", "src"]] as const;
  const { stdout, stderr } = spawnSync(...run, { cwd: folder, encoding: "utf8" });
  rmSync(folder, { recursive: true });
  const found = [...(stdout + stderr).matchAll(/^(src\/\S+?):\d+:\d+ lint\/\w+\/(\w+)/gm)];
  return [...new Set(found.filter(([, , name]) => name === rule).map(([, path]) => path))].sort();
}

test("every room has a rule", () => {
  const rooms = readdirSync(join(root, "src"), { withFileTypes: true }).filter((entry) => entry.isDirectory());
  expect(ROOMS).toEqual(expect.arrayContaining(rooms.map(({ name }) => name)));
});

test("imports against the order of the rooms are errors, types included; the others are not", () => {
  const files = new Map<string, string>();
  const forbidden: string[] = [];
  const add = (room: string, name: string, target: string, allowed: boolean) => {
    for (const [path, up] of [
      [`src/${room}/${name}.ts`, "../"],
      [`src/${room}/inner/${name}.ts`, "../../"],
    ]) {
      files.set(path, `import type { X } from "${up}${target}";\n\nexport type Y = X;\n`);
      if (!allowed) forbidden.push(path);
    }
  };
  for (const room of ROOMS) {
    for (const other of ROOMS) if (other !== room) add(room, other, `${other}/any.ts`, MAY_IMPORT[room].includes(other));
    for (const entry of ["index", "ai"]) add(room, entry, `${entry}.ts`, false);
  }
  for (const [room, file] of SINGLE_FILES) add(room, "single", file, true);
  expect(errorsOf("noRestrictedImports", files)).toEqual(forbidden.sort());
});

test("a value import is held to the same rules", () => {
  const text = 'import { x } from "../server/server.ts";\n\nexport const y = x;\n';
  expect(errorsOf("noRestrictedImports", new Map([["src/api/a.ts", text]]))).toEqual(["src/api/a.ts"]);
});

test("import cycles are errors, also of types alone", () => {
  const files = new Map([
    ["src/api/a.ts", 'import { b } from "./b.ts";\n\nexport const a = (): unknown => b;\n'],
    ["src/api/b.ts", 'import { a } from "./a.ts";\n\nexport const b = (): unknown => a;\n'],
    ["src/cli/c.ts", 'import type { D } from "./d.ts";\n\nexport type C = D | null;\n'],
    ["src/cli/d.ts", 'import type { C } from "./e.ts";\n\nexport interface D {\n  readonly c: C;\n}\n'],
    ["src/cli/e.ts", 'export type { C } from "./c.ts";\n'],
    ["src/cli/f.ts", 'import type { C } from "./c.ts";\n\nexport type F = C;\n'],
  ]);
  const cyclic = ["src/api/a.ts", "src/api/b.ts", "src/cli/c.ts", "src/cli/d.ts", "src/cli/e.ts"];
  expect(errorsOf("noImportCycles", files)).toEqual(cyclic);
});
