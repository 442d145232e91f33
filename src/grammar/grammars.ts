/**
 * Structured output: the form an answer must have, as a constraint on each next token. Compiled grammars are cached for later
 * answers; `automaton.ts` says how they are followed. Knows no conversation and no protocol.
 */
import { createHash } from "node:crypto";
import type { Constraint } from "../engine/sequence.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { Automaton, type Insides, type State } from "./automaton.ts";
import { GrammarError } from "./error.ts";
import { choice, EMPTY, type Expression, literal, optional, repeat, sequence } from "./expression.ts";
import { COLON, COMMA, OBJECT, SPACE } from "./json.ts";
import { SchemaError } from "./keywords.ts";
import { patternText } from "./pattern.ts";
import { schemaGrammar } from "./schema.ts";
import { Trie } from "./trie.ts";
import { Turns } from "./turns.ts";

/** A function whose call an answer may be. */
export interface Callable {
  readonly name: string;
  /** JSON schema of the arguments. */
  readonly parameters?: Readonly<Record<string, unknown>>;
  /** Whether the arguments must satisfy the schema, enforced while decoding. Default false. */
  readonly strict?: boolean;
}

/** The form an answer must have. */
export type Shape =
  /** A JSON object. */
  | { readonly kind: "json" }
  | { readonly kind: "schema"; readonly schema: Readonly<Record<string, unknown>> }
  /** A text that matches a regular expression as a whole. */
  | { readonly kind: "regex"; readonly pattern: string }
  | Calls;

/** Calls of tools, each between tags. */
export interface Calls {
  readonly kind: "calls";
  readonly tools: readonly Callable[];
  /** The tags around each call. */
  readonly tags: readonly [open: string, close: string];
  /** As many calls as the model likes, instead of one. */
  readonly several: boolean;
  /** Text may stand before, between and instead of calls. */
  readonly free: boolean;
}

export interface ConstraintOptions {
  /** The field that asks for the shape, for errors. */
  readonly param: string;
  /** The shape begins after this tag; the text before it is not constrained. Default null: it begins at once. */
  readonly after?: string | null;
}

/** Of a shape's JSON text, in UTF-16 units. */
const MAX_SHAPE_LENGTH = 64 * 1024;
const MAX_CALLS = 16;
/** Grammars kept, and the states they remember together. */
const KEPT = 64;
const MAX_REMEMBERED = 1_000_000;

/** Grammars for one model's tokens. */
export class Grammars {
  readonly #tokenizer: Tokenizer;
  readonly #vocabSize: number;
  readonly #endIds: readonly number[];
  readonly #insides: Insides = new Map();
  /** Built on first use: it reads the whole vocabulary. */
  #trie: Promise<Trie> | null = null;
  readonly #turns: Turns;
  /** Least recently used first. */
  readonly #kept = new Map<string, Automaton>();

  /** @param vocabSize of the model, which may have more rows than the tokenizer has tokens */
  constructor(tokenizer: Tokenizer, vocabSize: number, endIds: readonly number[], turns = new Turns()) {
    this.#tokenizer = tokenizer;
    this.#vocabSize = vocabSize;
    this.#endIds = endIds;
    this.#turns = turns;
  }

  /** The constraint of one answer. Rejects with GrammarError, naming `param`, when the shape can't be enforced. */
  async constraint(shape: Shape, { param, after = null }: ConstraintOptions): Promise<Constraint> {
    this.#trie ??= Trie.build(this.#tokenizer.vocabulary, this.#vocabSize);
    const trie = await this.#trie;
    const automaton = await this.#turns.take(() => this.#find(shape, param, after, trie));
    let state: State = automaton.start;
    return {
      next: () => state.mask ?? automaton.maskInTurns(state, this.#turns),
      accept: (id) => {
        if (this.#endIds.includes(id)) return; // nothing follows
        const next = automaton.accept(state, id);
        if (next === null) throw new Error(`internal: the grammar refuses token ${id}, which its mask allowed`);
        state = next;
      },
    };
  }

  #find(shape: Shape, param: string, after: string | null, trie: Trie): Automaton {
    const text = JSON.stringify([shape, after]);
    checkSize(text, param);
    const key = createHash("sha256").update(text).digest("base64");
    const known = this.#kept.get(key);
    this.#kept.delete(key);
    const automaton = known ?? new Automaton(this.#grammar(shape, param, after), trie, this.#endIds, this.#insides);
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

  #grammar(shape: Shape, param: string, after: string | null): Expression {
    const answer = this.#answer(shape, param);
    if (after === null) return answer;
    return sequence(this.#until(after, false), repeat(literal("\n"), 0, 2), answer);
  }

  #answer(shape: Shape, param: string): Expression {
    return shape.kind === "calls" ? this.#calls(shape, param) : plain(shape, param);
  }

  #calls({ tools, tags, several, free }: Calls, param: string): Expression {
    const [open, close] = tags.map((tag) => this.#mark(tag));
    const bodies = tools.map((tool, i) => callOf(tool, `${param}[${i}].function.parameters`));
    const body = sequence(SPACE, choice(...bodies), SPACE, close);
    if (!free) {
      const call = sequence(open, body);
      return sequence(call, repeat(sequence(optional(literal("\n")), call), 0, several ? MAX_CALLS - 1 : 0));
    }
    const rest: Expression & { kind: "rule" } = { kind: "rule", to: null };
    rest.to = sequence(this.#until(tags[0], true), body, several ? rest : EMPTY);
    return rest;
  }

  /** A tag, as a single token where the tokenizer has one. */
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

/** Throws GrammarError, naming `param`, for a shape that can't be enforced. Needs no tokenizer and no model. */
export function checkShape(shape: Exclude<Shape, Calls>, param: string): void {
  checkSize(JSON.stringify(shape), param);
  plain(shape, param);
}

function checkSize(text: string, param: string): void {
  if (text.length > MAX_SHAPE_LENGTH)
    throw new GrammarError(param, `the schema has ${text.length} characters; ${MAX_SHAPE_LENGTH} are allowed`);
}

function plain(shape: Exclude<Shape, Calls>, param: string): Expression {
  switch (shape.kind) {
    case "json":
      return OBJECT;
    case "schema":
      return enforced(shape.schema, param);
    case "regex":
      return matching(shape.pattern, param);
    default:
      return shape satisfies never;
  }
}

/** One call as JSON. A schema that is not strict and can't be enforced asks for an object only. */
function callOf({ name, parameters, strict }: Callable, param: string): Expression {
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
    throw new GrammarError(param, `the schema can't be enforced: ${cause.message}`, { cause });
  }
}

function matching(pattern: string, param: string): Expression {
  try {
    return patternText(pattern);
  } catch (cause) {
    throw new GrammarError(param, cause instanceof Error ? cause.message : String(cause), { cause });
  }
}
