/**
 * Loads xgrammar. Its package calls itself a module, but its one file is a script of the older kind, whose exports Node.js
 * loses when it is imported: it is run here as the script that it is.
 */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { compileFunction, constants } from "node:vm";

export type XGrammar = Pick<typeof import("@mlc-ai/web-xgrammar"), "GrammarCompiler" | "GrammarMatcher" | "TokenizerInfo">;

export function loadXGrammar(): XGrammar {
  const path = createRequire(import.meta.url).resolve("@mlc-ai/web-xgrammar");
  const exports = {};
  const script = compileFunction(readFileSync(path, "utf8"), ["exports", "require", "module", "__filename", "__dirname"], {
    filename: path,
    importModuleDynamically: constants.USE_MAIN_CONTEXT_DEFAULT_LOADER,
  });
  script(exports, createRequire(path), { exports }, path, dirname(path));
  return exports as XGrammar;
}
