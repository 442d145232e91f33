/**
 * Structured output: what an answer must be, as a constraint on each next token. Grammars are kept for the answers that follow;
 * `grammar/` says how they are followed. Knows no request.
 */
import { createHash } from "node:crypto";
import { TAGS } from "../chat/dialect.ts";
import type { Constraint } from "../engine/sequence.ts";
import type { ToolDefinition } from "../server/completion/request.ts";
import { ServerError } from "../server/errors.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { Automaton, type Insides, type State } from "./automaton.ts";
import { choice, EMPTY, type Expression, literal, optional, repeat, sequence } from "./expression.ts";
import { COLON, COMMA, OBJECT, SPACE } from "./json.ts";
import { SchemaError } from "./keywords.ts";
import { schemaGrammar } from "./schema.ts";
import { Trie } from "./trie.ts";
import { Turns } from "./turns.ts";

/** What an answer must be. */
export type Shape =
  /** An object. */
  | { readonly kind: "json" }
  | { readonly kind: "schema"; readonly schema: Readonly<Record<string, unknown>> }
  | {
      readonly kind: "calls";
      readonly tools: readonly ToolDefinition[];
      /** As many calls as the model likes instead of one. */
      readonly several: boolean;
      /** Text may stand before, between and instead of calls. */
      readonly free: boolean;
    };

const MAX_SCHEMA_BYTES = 64 * 1024;
const MAX_CALLS = 16;
/** Grammars, and what they remember together. */
const KEPT = 64;
const MAX_REMEMBERED = 1_000_000;

/** Grammars for one model's tokens. */
export class Grammars {
  readonly #tokenizer: Tokenizer;
  readonly #vocabSize: number;
  readonly #endIds: readonly number[];
  readonly #insides: Insides = new Map();
  /** Made when first needed: it reads the whole vocabulary. */
  #trie: Promise<Trie> | null = null;
  readonly #turns: Turns;
  /** The most recently used last. */
  readonly #kept = new Map<string, Automaton>();

  /** @param vocabSize of the model, which may have more rows than the tokenizer has tokens */
  constructor(tokenizer: Tokenizer, vocabSize: number, endIds: readonly number[], turns = new Turns()) {
    this.#tokenizer = tokenizer;
    this.#vocabSize = vocabSize;
    this.#endIds = endIds;
    this.#turns = turns;
  }

  /**
   * The constraint of one answer. @param insideReasoning the answer begins after the reasoning, which is not constrained
   * @throws ServerError `invalid_request` naming `param` when the shape can't be enforced
   */
  async constraint(shape: Shape, param: string, insideReasoning = false): Promise<Constraint> {
    this.#trie ??= Trie.build(this.#tokenizer.vocabulary, this.#vocabSize);
    const trie = await this.#trie;
    const automaton = await this.#turns.take(() => this.#find(shape, param, insideReasoning, trie));
    let state: State = automaton.start;
    return {
      next: () => state.mask ?? this.#turns.take(() => automaton.mask(state)),
      accept: (id) => {
        if (this.#endIds.includes(id)) return; // nothing follows
        const next = automaton.accept(state, id);
        if (next === null) throw new Error(`internal: the grammar refuses token ${id}, which its mask allowed`);
        state = next;
      },
    };
  }

  #find(shape: Shape, param: string, insideReasoning: boolean, trie: Trie): Automaton {
    const text = JSON.stringify([shape, insideReasoning]);
    if (text.length > MAX_SCHEMA_BYTES)
      throw new ServerError("invalid_request", `the schema has ${text.length} characters; ${MAX_SCHEMA_BYTES} are allowed`, { param });
    const key = createHash("sha256").update(text).digest("base64");
    const known = this.#kept.get(key);
    this.#kept.delete(key);
    const automaton = known ?? new Automaton(this.#grammar(shape, param, insideReasoning), trie, this.#endIds, this.#insides);
    this.#kept.set(key, automaton);
    let remembered = 0;
    for (const each of this.#kept.values()) remembered += each.kept;
    for (const [oldest, { kept }] of this.#kept) {
      if ((this.#kept.size <= KEPT && remembered <= MAX_REMEMBERED) || this.#kept.size === 1) break;
      this.#kept.delete(oldest);
      remembered -= kept;
    }
    return automaton;
  }

  #grammar(shape: Shape, param: string, insideReasoning: boolean): Expression {
    const answer = this.#answer(shape, param);
    if (!insideReasoning) return answer;
    return sequence(this.#until(TAGS.think[1], false), repeat(literal("\n"), 0, 2), answer);
  }

  #answer(shape: Shape, param: string): Expression {
    switch (shape.kind) {
      case "json":
        return OBJECT;
      case "schema":
        return enforced(shape.schema, param);
      case "calls": {
        const [open, close] = TAGS.call.map((tag) => this.#mark(tag));
        const bodies = shape.tools.map((tool, i) => callOf(tool, `${param}[${i}].function.parameters`));
        const body = sequence(SPACE, choice(...bodies), SPACE, close);
        if (!shape.free) {
          const call = sequence(open, body);
          return sequence(call, repeat(sequence(optional(literal("\n")), call), 0, shape.several ? MAX_CALLS - 1 : 0));
        }
        const rest: Expression & { kind: "rule" } = { kind: "rule", to: null };
        rest.to = sequence(this.#until(TAGS.call[0], true), body, shape.several ? rest : EMPTY);
        return rest;
      }
      default:
        return shape satisfies never;
    }
  }

  /** A mark, as the one token that it is where the tokenizer has one. */
  #mark(tag: string): Expression {
    const id = this.#special(tag);
    return id === null ? literal(tag) : { kind: "token", id };
  }

  #until(tag: string, mayEnd: boolean): Expression {
    return { kind: "until", mark: new TextEncoder().encode(tag), token: this.#special(tag), mayEnd };
  }

  #special(tag: string): number | null {
    const { vocabulary } = this.#tokenizer;
    const id = vocabulary.id(tag);
    return id !== undefined && vocabulary.isSpecial(id) && id < this.#vocabSize ? id : null;
  }
}

/** One call as JSON. Where arguments need not satisfy their schema, one that can't be held asks for an object only. */
function callOf({ name, parameters, strict }: ToolDefinition, param: string): Expression {
  const values = (): Expression => {
    if (parameters === undefined) return OBJECT;
    if (strict) return enforced(parameters, param);
    try {
      return schemaGrammar(parameters);
    } catch {
      return OBJECT;
    }
  };
  const key = (text: string) => sequence(literal(JSON.stringify(text)), COLON);
  return sequence(literal("{"), key("name"), literal(JSON.stringify(name)), COMMA, key("arguments"), values(), literal("}"));
}

function enforced(schema: unknown, param: string): Expression {
  try {
    return schemaGrammar(schema);
  } catch (cause) {
    if (!(cause instanceof SchemaError)) throw cause;
    throw new ServerError("invalid_request", `the schema can't be enforced: ${cause.message}`, { param, cause });
  }
}
