/**
 * Structured output: the form an answer must have, as a constraint on each next token. Compiled grammars are cached for later
 * answers; `automaton.ts` says how they are followed. Knows no conversation and no protocol.
 */
import { createHash } from "node:crypto";
import type { Constraint } from "../engine/sequence.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { Automaton, type Insides, type State } from "./automaton.ts";
import { GrammarError, SchemaError } from "./error.ts";
import { choice, EMPTY, type Expression, literal, optional, repeat, sequence } from "./expression.ts";
import { COLON, COMMA, OBJECT, SPACE } from "./json.ts";
import { deadParts } from "./productive.ts";
import { patternText } from "./regex.ts";
import { schemaSteps } from "./schema.ts";
import { Trie } from "./trie.ts";
import { Turns } from "./turns.ts";
import { run, type Steps, Work } from "./work.ts";

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

/** Of a shape's JSON text without escapes, in UTF-16 units, and the nesting of its values. */
const MAX_SHAPE_LENGTH = 64 * 1024;
const MAX_DEPTH = 250;
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
    const text = JSON.stringify([plainJson(shape, param), after]);
    const key = createHash("sha256").update(text).digest("base64");
    const automaton = this.#kept.get(key) ?? (await this.#inTurns(this.#compile((JSON.parse(text) as [Shape])[0], param, after, trie)));
    this.#keep(key, automaton);
    let state: State = automaton.start;
    return {
      next: () => state.mask ?? this.#inTurns(automaton.maskSteps(state)),
      accept: (id) => {
        if (this.#endIds.includes(id)) return; // nothing follows
        const next = automaton.accept(state, id);
        if (next === null) throw new Error(`internal: the grammar refuses token ${id}, which its mask allowed`);
        state = next;
      },
    };
  }

  /** Runs work a slice a turn. */
  async #inTurns<T>(steps: Steps<T>): Promise<T> {
    for (;;) {
      const { done, value } = await this.#turns.take(() => steps.next());
      if (done) return value;
    }
  }

  *#compile(shape: Shape, param: string, after: string | null, trie: Trie): Steps<Automaton> {
    const answer = shape.kind === "calls" ? yield* this.#calls(shape, param) : yield* plain(shape, param);
    const grammar = after === null ? answer : sequence(this.#until(after, false), repeat(literal("\n"), 0, 2), answer);
    return new Automaton(grammar, trie, this.#endIds, this.#insides, yield* deadParts(grammar));
  }

  #keep(key: string, automaton: Automaton): void {
    this.#kept.delete(key);
    this.#kept.set(key, automaton);
    let remembered = 0;
    for (const each of this.#kept.values()) remembered += each.kept;
    for (const [oldest, { kept }] of this.#kept) {
      if ((this.#kept.size <= KEPT && remembered <= MAX_REMEMBERED) || this.#kept.size === 1) break;
      this.#kept.delete(oldest);
      remembered -= kept;
    }
  }

  *#calls({ tools, tags, several, free }: Calls, param: string): Steps<Expression> {
    const [open, close] = tags.map((tag) => this.#mark(tag));
    const work = new Work();
    const bodies: Expression[] = [];
    for (const [i, tool] of tools.entries()) bodies.push(yield* callOf(tool, `${param}[${i}].function.parameters`, work));
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
  run(plain(JSON.parse(JSON.stringify(plainJson(shape, param))) as typeof shape, param));
}

/** The value, once it is known to be small enough to be written and read without overflowing the stack. */
function plainJson(value: unknown, param: string): unknown {
  const pending: { readonly value: unknown; readonly depth: number }[] = [{ value, depth: 0 }];
  let length = 0;
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    length += typeof next.value === "string" ? next.value.length : 1;
    if (next.depth > MAX_DEPTH) throw new GrammarError(param, `the schema is nested more than ${MAX_DEPTH} deep`);
    if (typeof next.value === "bigint") throw new GrammarError(param, `the schema has the bigint ${next.value}: JSON has numbers only`);
    if (Array.isArray(next.value)) length += next.value.length;
    if (length <= MAX_SHAPE_LENGTH && typeof next.value === "object" && next.value !== null)
      for (const [key, inner] of Object.entries(next.value)) {
        length += Array.isArray(next.value) ? 0 : key.length + 3;
        pending.push({ value: inner, depth: next.depth + 1 });
      }
    if (length > MAX_SHAPE_LENGTH)
      throw new GrammarError(param, `the schema has more than the ${MAX_SHAPE_LENGTH} characters that are allowed`);
  }
  return value;
}

function* plain(shape: Exclude<Shape, Calls>, param: string): Steps<Expression> {
  switch (shape.kind) {
    case "json":
      return OBJECT;
    case "schema":
      return yield* enforced(shape.schema, param);
    case "regex":
      return matching(shape.pattern, param);
    default:
      return shape satisfies never;
  }
}

/** One call as JSON. Arguments are an object, whatever the schema says; of any members where it is not strict and can't be enforced. */
function* callOf({ name, parameters, strict }: Callable, param: string, work: Work): Steps<Expression> {
  const values = parameters === undefined ? OBJECT : yield* argumentsOf(parameters, strict ?? false, param, work);
  const key = (text: string) => sequence(literal(JSON.stringify(text)), COLON);
  return sequence(literal("{"), key("name"), literal(JSON.stringify(name)), COMMA, key("arguments"), values, literal("}"));
}

function* argumentsOf(schema: unknown, strict: boolean, param: string, work: Work): Steps<Expression> {
  if (strict) return yield* enforced(schema, param, work, "object");
  try {
    return yield* schemaSteps(schema, work, "object");
  } catch (cause) {
    if (cause instanceof SchemaError) return OBJECT;
    throw cause;
  }
}

function* enforced(schema: unknown, param: string, work = new Work(), type?: "object"): Steps<Expression> {
  try {
    return yield* schemaSteps(schema, work, type);
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
