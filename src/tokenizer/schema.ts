// What tokenizer.json and its companions must look like: checked in full before anything is built from them, so that a broken file
// is reported by file and field. Knows nothing of what the fields mean.
import { TokenizerError } from "./error.ts";

/** Checks a value; `at` is its place for errors: `tokenizer.json: model.merges[3]`. */
type Check = (value: unknown, at: string) => void;
type Fields = Readonly<Record<string, Check>>;

/** Ids index the embedding, of which models have at most this many rows. */
export const MOST_IDS = 2 ** 22;
/** A merge's rank is part of a heap key. */
const MOST_MERGES = 2 ** 21;
/** Sequences within sequences. */
const DEEPEST = 16;

const text = kind("a string", (value) => typeof value === "string");
const flag = kind("true or false", (value) => typeof value === "boolean");
const number = kind("a number", (value) => typeof value === "number");
const count = kind(`a whole number from 0 to ${MOST_IDS}`, (value) => whole(value) && value <= MOST_IDS);
const id = kind(`a token id from 0 to ${MOST_IDS - 1}`, (value) => whole(value) && value < MOST_IDS);

const regex: Check = (value, at) => {
  text(value, at);
  try {
    new RegExp(value as string, "u");
  } catch {
    try {
      new RegExp(value as string); // the library rewrites what only other engines know
    } catch (cause) {
      throw new TokenizerError(`${at} is ${shown(value)}, not a regular expression that can be read`, { cause });
    }
  }
};
const pattern: Check = (value, at) => {
  object({ String: maybe(text), Regex: maybe(regex) })(value, at);
  const { String: fixed, Regex: expression } = value as Record<string, unknown>;
  if (fixed == null && expression == null) throw wrong(value, at, "an object with String or Regex");
};
const metaspace: Fields = { replacement: maybe(text), prepend_scheme: maybe(text), split: maybe(flag), add_prefix_space: maybe(flag) };
const byteLevel: Fields = { add_prefix_space: maybe(flag), trim_offsets: maybe(flag), use_regex: maybe(flag) };
const labelled = tuple(text, id);

/** Fields of normalizers, pre-tokenizers, post-processors and decoders by type. Types that are not here have none, or are refused later. */
const PARTS: Readonly<Record<string, Fields>> = {
  Replace: { pattern, content: text },
  Prepend: { prepend: text },
  Append: { append: text },
  Precompiled: { precompiled_charsmap: maybe(text) },
  Strip: { strip_left: maybe(flag), strip_right: maybe(flag), content: maybe(text), start: maybe(count), stop: maybe(count) },
  BertNormalizer: { clean_text: maybe(flag), handle_chinese_chars: maybe(flag), strip_accents: maybe(flag), lowercase: maybe(flag) },
  Split: { pattern, behavior: maybe(text), invert: maybe(flag) },
  Metaspace: metaspace,
  ByteLevel: byteLevel,
  Digits: { individual_digits: maybe(flag) },
  Punctuation: { behavior: maybe(text) },
  TemplateProcessing: { single: list(template), pair: maybe(list(template)), special_tokens: maybe(record(object({}))) },
  BertProcessing: { sep: labelled, cls: labelled },
  RobertaProcessing: { sep: labelled, cls: labelled, trim_offsets: maybe(flag), add_prefix_space: maybe(flag) },
};
const INNER = ["normalizers", "pretokenizers", "processors", "decoders"] as const;

const ADDED: Fields = {
  content: text,
  special: maybe(flag),
  normalized: maybe(flag),
  single_word: maybe(flag),
  lstrip: maybe(flag),
  rstrip: maybe(flag),
};

const vocab: Check = (value, at) => {
  if (Array.isArray(value)) {
    if (value.length > MOST_IDS) throw new TokenizerError(`${at} has ${value.length} tokens; at most ${MOST_IDS} are read`);
    for (let i = 0; i < value.length; i++) {
      const entry: unknown = value[i];
      if (!Array.isArray(entry) || typeof entry[0] !== "string" || typeof entry[1] !== "number")
        throw wrong(entry, `${at}[${i}]`, "a token and its score");
    }
    return;
  }
  if (!isObject(value)) throw wrong(value, at, "an object of tokens and their ids, or a list of tokens and scores");
  for (const token of Object.keys(value)) if (!whole(value[token]) || value[token] >= MOST_IDS) id(value[token], `${at}[${shown(token)}]`);
};

const merges: Check = (value, at) => {
  if (!Array.isArray(value)) throw wrong(value, at, "a list");
  if (value.length > MOST_MERGES) throw new TokenizerError(`${at} has ${value.length} merges; at most ${MOST_MERGES} are read`);
  for (let i = 0; i < value.length; i++) {
    const merge: unknown = value[i];
    if (typeof merge === "string") continue;
    if (!Array.isArray(merge) || merge.length !== 2 || typeof merge[0] !== "string" || typeof merge[1] !== "string")
      throw wrong(merge, `${at}[${i}]`, "a merge: two tokens in a list, or in a string with a space between them");
  }
};

const model: Check = (value, at) => {
  object({
    type: maybe(text),
    vocab,
    merges: maybe(merges),
    unk_token: maybe(text),
    unk_id: maybe(id),
    fuse_unk: maybe(flag),
    byte_fallback: maybe(flag),
    ignore_merges: maybe(flag),
    continuing_subword_prefix: maybe(text),
    end_of_word_suffix: maybe(text),
    max_input_chars_per_word: maybe(count),
  })(value, at);
  const { type, vocab: tokens, unk_token: unknown } = value as Readonly<Record<string, unknown>>;
  if (typeof type === "string" && type !== "Unigram" && Array.isArray(tokens))
    throw wrong(tokens, join(at, "vocab"), `an object of tokens and their ids, as a model of the type ${shown(type)} has`);
  const whole = type === "WordPiece" || type === "WordLevel"; // they have no token for every part of an unknown word
  if (whole && (typeof unknown !== "string" || !Object.hasOwn(tokens as object, unknown)))
    throw wrong(unknown, join(at, "unk_token"), `a token of its vocabulary, as a model of the type ${shown(type)} needs`);
};

const tokenizer = object({
  added_tokens: maybe(list(object({ id, ...ADDED }))),
  normalizer: maybe(part(0)),
  pre_tokenizer: maybe(part(0)),
  post_processor: maybe(part(0)),
  decoder: maybe(part(0)),
  model,
});

/** Special tokens are written as text or as an object with `content`; older files have `false` for "none". */
const special: Check = (value, at) => {
  if (value === null || value === false || typeof value === "string") return;
  if (!isObject(value) || typeof value["content"] !== "string") throw wrong(value, at, "a token: a string, or an object with content");
};
const specials: Check = (value, at) => {
  if (Array.isArray(value)) list(special)(value, at);
  else record(special)(value, at);
};
const templates: Check = (value, at) => {
  if (typeof value === "string") return;
  if (!Array.isArray(value)) throw wrong(value, at, "a template: a string, or a list of objects with name and template");
  list(object({ name: text, template: text }))(value, at);
};
const NAMED: Fields = Object.fromEntries([
  ...["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map((role) => [`${role}_token`, maybe(special)]),
  ["additional_special_tokens", maybe(specials)],
  ["extra_special_tokens", maybe(specials)],
]);
const settings = object({
  ...NAMED,
  chat_template: maybe(templates),
  model_max_length: maybe(number),
  clean_up_tokenization_spaces: maybe(flag),
  split_special_tokens: maybe(flag),
  add_bos_token: maybe(flag),
  add_eos_token: maybe(flag),
  added_tokens_decoder: maybe((value, at) => {
    record(object(ADDED))(value, at);
    for (const key of Object.keys(value as object))
      if (!/^\d{1,7}$/.test(key) || Number(key) >= MOST_IDS) throw wrong(key, `${at}: a key`, "a token id");
  }),
});

/** The fields of each file. */
const FILES = {
  "tokenizer.json": tokenizer,
  "tokenizer_config.json": settings,
  "special_tokens_map.json": object(NAMED),
  "added_tokens.json": record(id),
  "chat_template.json": object({ chat_template: maybe(templates) }),
} satisfies Readonly<Record<string, Check>>;

/** Throws `TokenizerError`, naming file and field, for the first value that is not as it must be. Unknown fields are allowed. */
export function checkFile(name: keyof typeof FILES, value: unknown): void {
  FILES[name](value, name);
}

function part(depth: number): Check {
  return (value, at) => {
    object({ type: text })(value, at);
    const fields = value as Readonly<Record<string, unknown>>;
    const type = fields["type"] as string;
    if (type !== "Sequence") {
      if (Object.hasOwn(PARTS, type)) object(PARTS[type])(value, at);
      return;
    }
    if (depth >= DEEPEST) throw new TokenizerError(`${at}: more than ${DEEPEST} sequences within each other`);
    const inner = INNER.filter((key) => fields[key] !== undefined);
    if (inner.length !== 1) throw new TokenizerError(`${at}: a Sequence needs its steps, as one of ${INNER.join(", ")}`);
    list(part(depth + 1))(fields[inner[0]], join(at, inner[0]));
  };
}

function template(value: unknown, at: string): void {
  const piece = object({ id: text });
  object({ SpecialToken: maybe(piece), Sequence: maybe(piece) })(value, at);
}

function kind(wanted: string, test: (value: unknown) => boolean): Check {
  return (value, at) => {
    if (!test(value)) throw wrong(value, at, wanted);
  };
}

/** Files write null and absence alike. */
function maybe(check: Check): Check {
  return (value, at) => {
    if (value !== undefined && value !== null) check(value, at);
  };
}

function object(fields: Fields): Check {
  return (value, at) => {
    if (!isObject(value)) throw wrong(value, at, "an object");
    for (const [name, check] of Object.entries(fields)) check(Object.hasOwn(value, name) ? value[name] : undefined, join(at, name));
  };
}

function record(check: Check): Check {
  return (value, at) => {
    if (!isObject(value)) throw wrong(value, at, "an object");
    for (const [name, each] of Object.entries(value)) check(each, join(at, name));
  };
}

function list(check: Check): Check {
  return (value, at) => {
    if (!Array.isArray(value)) throw wrong(value, at, "a list");
    value.forEach((each, i) => {
      check(each, `${at}[${i}]`);
    });
  };
}

function tuple(...checks: Check[]): Check {
  return (value, at) => {
    if (!Array.isArray(value) || value.length !== checks.length) throw wrong(value, at, `a list of ${checks.length}`);
    checks.forEach((check, i) => {
      check(value[i], `${at}[${i}]`);
    });
  };
}

/** `tokenizer.json: model`, then `tokenizer.json: model.vocab`. */
function join(at: string, name: string): string {
  return at.endsWith(".json") ? `${at}: ${name}` : `${at}.${name}`;
}

function whole(value: unknown): value is number {
  return typeof value === "number" && Number.isInteger(value) && value >= 0;
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function wrong(value: unknown, at: string, wanted: string): TokenizerError {
  return new TokenizerError(`${at} is ${value === undefined ? "missing" : shown(value)}, not ${wanted}`);
}

/** A value for a one-line error: JSON, cut at 80 characters; objects by their size, which may be large. */
function shown(value: unknown): string {
  if (Array.isArray(value) && value.length > 4) return `a list of ${value.length}`;
  if (isObject(value)) return "an object";
  const written = JSON.stringify(value);
  return written.length > 80 ? `${written.slice(0, 80)}…` : written;
}
