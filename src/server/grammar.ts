/**
 * Structured output: JSON schemas and tool calls as constraints on the next token (https://arxiv.org/abs/2411.15100). The
 * grammars are xgrammar's; this file turns them into what the engine asks for, and keeps those that were compiled.
 */
import { createHash } from "node:crypto";
import type { CompiledGrammar, GrammarCompiler } from "@mlc-ai/web-xgrammar";
import type { Constraint } from "../engine/sequence.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { ServerError } from "./errors.ts";
import type { ToolDefinition } from "./served.ts";
import { loadXGrammar, type XGrammar } from "./xgrammar.ts";

/** What an answer must be. */
export type Shape =
  | { readonly kind: "json" }
  | { readonly kind: "schema"; readonly schema: Readonly<Record<string, unknown>> }
  /** One call of these tools, or with `several` any number of them but none. */
  | { readonly kind: "calls"; readonly tools: readonly ToolDefinition[]; readonly several: boolean };

const MAX_SCHEMA_BYTES = 64 * 1024;
const KEPT = 64;

/** Grammars for one model's tokens. */
export class Grammars {
  readonly #tokenizer: Tokenizer;
  readonly #vocabSize: number;
  readonly #stopIds: number[];
  /** Made when first needed: it reads the whole vocabulary. */
  #library: Promise<{ xgrammar: XGrammar; compiler: GrammarCompiler }> | null = null;
  /** Tries schemas out: what it cannot take ends the whole instance, which must not be one that answers depend on. */
  #probe: XGrammar | null = null;
  /** The most recently used last. */
  readonly #compiled = new Map<string, Promise<CompiledGrammar>>();

  /** @param vocabSize of the model, which may have more rows than the tokenizer has tokens */
  constructor(tokenizer: Tokenizer, vocabSize: number, stopIds: readonly number[]) {
    this.#tokenizer = tokenizer;
    this.#vocabSize = vocabSize;
    this.#stopIds = [...stopIds];
  }

  /** The caller disposes of it, also where the answer did not come to its end. @throws ServerError `invalid_request` naming `param` when the schema cannot be enforced */
  async constraint(shape: Shape, param: string): Promise<Constraint & { dispose(): void }> {
    const grammar = await this.#find(shape, param);
    const { xgrammar } = await this.#open();
    const matcher = await xgrammar.GrammarMatcher.createGrammarMatcher(grammar, this.#stopIds);
    let over = false;
    const dispose = () => {
      if (!over) matcher.dispose();
      over = true;
    };
    return {
      async next() {
        return over ? null : await matcher.getNextTokenBitmask();
      },
      accept(id) {
        if (over) return;
        if (!matcher.acceptToken(id)) throw new Error(`internal: the grammar refuses token ${id}, which its mask allowed`);
        if (matcher.isTerminated()) dispose();
      },
      dispose,
    };
  }

  #open(): Promise<{ xgrammar: XGrammar; compiler: GrammarCompiler }> {
    this.#library ??= open(this.#tokenizer, this.#vocabSize, this.#stopIds);
    return this.#library;
  }

  async #find(shape: Shape, param: string): Promise<CompiledGrammar> {
    const text = JSON.stringify(shape);
    if (text.length > MAX_SCHEMA_BYTES)
      throw new ServerError("invalid_request", `the schema has ${text.length} bytes; ${MAX_SCHEMA_BYTES} are allowed`, { param });
    const key = createHash("sha256").update(text).digest("base64");
    const known = this.#compiled.get(key);
    this.#compiled.delete(key);
    const compiling = known ?? this.#compile(shape);
    this.#compiled.set(key, compiling);
    for (const [oldest, grammar] of this.#compiled) {
      if (this.#compiled.size <= KEPT) break;
      this.#compiled.delete(oldest);
      // Matchers that still use it hold what they need.
      grammar.then(
        (g) => g.dispose(),
        () => {},
      );
    }
    try {
      return await compiling;
    } catch (cause) {
      this.#compiled.delete(key);
      throw new ServerError("invalid_request", `the schema cannot be enforced: ${reason(cause)}`, { param, cause });
    }
  }

  async #tryOut(schemas: readonly object[]): Promise<void> {
    this.#probe ??= loadXGrammar();
    const { Grammar } = this.#probe;
    try {
      for (const schema of schemas) (await Grammar.fromJSONSchema(JSON.stringify(schema), false)).dispose();
    } catch (error) {
      this.#probe = null;
      throw error;
    }
  }

  async #compile(shape: Shape): Promise<CompiledGrammar> {
    if (shape.kind === "schema") await this.#tryOut([shape.schema]);
    if (shape.kind === "calls") await this.#tryOut(shape.tools.map((tool) => tool.parameters ?? {}));
    const { compiler } = await this.#open();
    switch (shape.kind) {
      case "json":
        return compiler.compileBuiltinJSONGrammar();
      case "schema":
        return compiler.compileJSONSchema(JSON.stringify(shape.schema), false);
      case "calls": {
        const tags = shape.tools.map((tool) => ({
          type: "tag" as const,
          begin: `<tool_call>\n{"name": ${JSON.stringify(tool.name)}, "arguments": `,
          content: { type: "json_schema" as const, json_schema: tool.parameters ?? { type: "object" } },
          end: "}\n</tool_call>",
        }));
        const format = {
          type: "tags_with_separator" as const,
          tags,
          separator: "\n",
          at_least_one: true,
          stop_after_first: !shape.several,
        };
        return compiler.compileStructuralTag(JSON.stringify({ type: "structural_tag", format }));
      }
      default:
        return shape satisfies never;
    }
  }
}

async function open(
  tokenizer: Tokenizer,
  vocabSize: number,
  stopIds: readonly number[],
): Promise<{ xgrammar: XGrammar; compiler: GrammarCompiler }> {
  const xgrammar = loadXGrammar();
  const special = new Set(tokenizer.all_special_ids);
  const stops = new Set(stopIds);
  const pieces = Array.from({ length: vocabSize }, (_, id) => {
    // A special token stands for no text: an empty piece is never allowed, except where it ends the answer.
    if (id >= tokenizer.size || (special.has(id) && !stops.has(id))) return "";
    return tokenizer.convert_ids_to_tokens(id) as string;
  });
  const info = await xgrammar.TokenizerInfo.createTokenizerInfo(pieces, "byte_fallback", false, vocabSize, [...stopIds]);
  return { xgrammar, compiler: await xgrammar.GrammarCompiler.createGrammarCompiler(info, false) };
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message.split("\n")[0] : "it is not a JSON schema that is supported";
}
