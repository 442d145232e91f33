/**
 * Loads xgrammar. Its package calls itself a module, but its one file is a script of the older kind, whose exports Node.js
 * loses when it is imported: it is run here as the script that it is.
 */
import { readFileSync } from "node:fs";
import Module, { createRequire } from "node:module";

export type XGrammar = Pick<typeof import("@mlc-ai/web-xgrammar"), "Grammar" | "GrammarCompiler" | "GrammarMatcher" | "TokenizerInfo">;

/** An instance of its own, with its own memory. */
export function loadXGrammar(): XGrammar {
  const path = createRequire(import.meta.url).resolve("@mlc-ai/web-xgrammar");
  const script = new Module(path) as Module & { _compile(text: string, path: string): void };
  script._compile(readFileSync(path, "utf8"), path);
  return script.exports as XGrammar;
}
