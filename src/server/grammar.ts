/**
 * Structured output: JSON schemas and tool calls as constraints on the next token (https://arxiv.org/abs/2411.15100). The
 * grammars are xgrammar's; this file turns them into what the engine asks for, and keeps those that were compiled.
 */
import { createHash } from "node:crypto";
import { type CompiledGrammar, GrammarCompiler, GrammarMatcher, TokenizerInfo } from "@mlc-ai/web-xgrammar";
import type { Constraint } from "../engine/sequence.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { ServerError } from "./errors.ts";
import type { ToolDefinition } from "./served.ts";

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
  readonly #compiler: Promise<GrammarCompiler>;
  readonly #stopIds: number[];
  /** The most recently used last. */
  readonly #compiled = new Map<string, Promise<CompiledGrammar>>();

  /** @param vocabSize of the model, which may have more rows than the tokenizer has tokens */
  constructor(tokenizer: Tokenizer, vocabSize: number, stopIds: readonly number[]) {
    this.#stopIds = [...stopIds];
    this.#compiler = createCompiler(tokenizer, vocabSize, this.#stopIds);
    this.#compiler.catch(() => {}); // whoever asks for a grammar hears of it
  }

  /** @throws ServerError `invalid_request` naming `param` when the schema cannot be enforced */
  async constraint(shape: Shape, param: string): Promise<Constraint> {
    const grammar = await this.#find(shape, param);
    const matcher = await GrammarMatcher.createGrammarMatcher(grammar, this.#stopIds);
    return {
      async next() {
        return matcher.isTerminated() ? null : await matcher.getNextTokenBitmask();
      },
      accept(id) {
        if (!matcher.isTerminated() && !matcher.acceptToken(id))
          throw new Error(`internal: the grammar refuses token ${id}, which its mask allowed`);
        if (matcher.isTerminated()) matcher.dispose();
      },
    };
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
    for (const [oldest] of this.#compiled) {
      if (this.#compiled.size <= KEPT) break;
      this.#compiled.delete(oldest);
    }
    try {
      return await compiling;
    } catch (cause) {
      this.#compiled.delete(key);
      throw new ServerError("invalid_request", `the schema cannot be enforced: ${reason(cause)}`, { param, cause });
    }
  }

  async #compile(shape: Shape): Promise<CompiledGrammar> {
    const compiler = await this.#compiler;
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

async function createCompiler(tokenizer: Tokenizer, vocabSize: number, stopIds: readonly number[]): Promise<GrammarCompiler> {
  const special = new Set(tokenizer.all_special_ids);
  const stops = new Set(stopIds);
  const pieces = Array.from({ length: vocabSize }, (_, id) => {
    // A special token stands for no text: an empty piece is never allowed, except where it ends the answer.
    if (id >= tokenizer.size || (special.has(id) && !stops.has(id))) return "";
    return tokenizer.convert_ids_to_tokens(id) as string;
  });
  const info = await TokenizerInfo.createTokenizerInfo(pieces, "byte_fallback", false, vocabSize, [...stopIds]);
  return GrammarCompiler.createGrammarCompiler(info, false);
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message.split("\n")[0] : "it is not a JSON schema that is supported";
}
