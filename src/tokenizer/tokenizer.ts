// The public tokenizer, with the names of transformers: text to ids, ids to text, conversations to prompts.
// Knows nothing of models; reads only local folders.
import { configuredTokens, namedSpecials, readConfig, roles, type Side, type TokenizerConfig } from "./config.ts";
import { continuation } from "./continuation.ts";
import type { Definition } from "./definition.ts";
import { Detokenizer, type DetokenizerOptions } from "./detokenizer.ts";
import { TokenizerError } from "./error.ts";
import { readFolder } from "./folder.ts";
import { idNumber, idNumbers, idRows, type TokenIds, type TokenRows } from "./ids.ts";
import { readJson } from "./json.ts";
import { optionFault } from "./options.ts";
import { type PieceModel, readPieces } from "./pieces.ts";
import { ChatTemplate, type Message } from "./template.ts";
import { type Role, Vocabulary } from "./vocabulary.ts";

export interface EncodeOptions {
  /** Add the tokens that the tokenizer declares for the beginning and end of a text (ERNIE declares none). Default: true. */
  readonly add_special_tokens?: boolean;
  /** Treat special tokens in the text as plain text, so that users cannot inject them. Default: tokenizer_config.json, else false. */
  readonly split_special_tokens?: boolean;
}

export interface CallOptions extends EncodeOptions {
  /** `true` or "longest": pad to the longest text; "max_length": pad to `max_length`. Default: false, rows keep their lengths. */
  readonly padding?: boolean | "longest" | "max_length" | "do_not_pad";
  /** Default: the tokenizer's `padding_side`. */
  readonly padding_side?: Side;
  /** Truncate texts to `max_length`. Default: true if `max_length` is given without padding, as in transformers, else false. */
  readonly truncation?: boolean;
  /** In tokens. Default: `model_max_length`. */
  readonly max_length?: number;
}

/** Encoded texts, one row per text. */
export interface BatchEncoding {
  readonly input_ids: number[][];
  /** 1 for tokens of the text, 0 for padding. */
  readonly attention_mask: number[][];
}

export interface DecodeOptions {
  /** Leave special tokens out. Default: false. */
  readonly skip_special_tokens?: boolean;
  /** Remove the space before punctuation. Default: tokenizer_config.json, else false. */
  readonly clean_up_tokenization_spaces?: boolean;
}

export interface ChatTemplateOptions extends CallOptions {
  /** End with the beginning of an assistant turn. Default: false. */
  readonly add_generation_prompt?: boolean;
  /** Leave the last message open, so that the model continues it. Default: false. */
  readonly continue_final_message?: boolean;
  /** Return ids instead of text. Default: true. */
  readonly tokenize?: boolean;
  /** Return `{ input_ids, attention_mask }` with one row instead of plain ids. Default: false. */
  readonly return_dict?: boolean;
  /** A template, or the name of one of the tokenizer's templates. Default: `tool_use` if it exists and tools are given, else `default`. */
  readonly chat_template?: string;
  readonly tools?: readonly unknown[];
  readonly documents?: readonly unknown[];
  /** Any other option becomes a variable of the template. */
  readonly [variable: string]: unknown;
}

const CALL_OPTIONS = [
  "add_special_tokens",
  "split_special_tokens",
  "padding",
  "padding_side",
  "truncation",
  "max_length",
] as const satisfies readonly (keyof CallOptions)[];
const DECODE_OPTIONS = ["skip_special_tokens", "clean_up_tokenization_spaces"] as const satisfies readonly (keyof DecodeOptions)[];
const LISTS = "ids are always returned as plain lists; leave it out";
/** What tokenizers of other libraries also return or take. */
const NOT_RETURNED: Readonly<Record<string, string>> = {
  return_tensors: LISTS,
  return_tensor: LISTS,
  text_pair: "pairs of texts are not supported; join the two as the model expects them, and encode the result",
  text_target: "encode the target by itself",
  return_token_type_ids: "ERNIE has no token types; leave it out",
  return_offsets_mapping: "offsets are not known; leave it out",
  return_overflowing_tokens: "what is cut off is not returned; encode without truncation instead",
  return_special_tokens_mask: "compare the ids with all_special_ids instead",
  return_length: "take the length of each row of input_ids instead",
  stride: "what is cut off is not returned; encode without truncation instead",
  is_split_into_words: "give whole texts",
  pad_to_multiple_of: "give padding: 'max_length' with a max_length that is such a multiple",
};

/** The methods of a tokenizer. Created by `Tokenizer.open`. */
export class PreTrainedTokenizer {
  /** From tokenizer_config.json, like `truncation_side`; both may be changed. */
  padding_side: Side;
  truncation_side: Side;
  /** Maximum input length in tokens; Infinity if the files name none. */
  readonly model_max_length: number;
  readonly clean_up_tokenization_spaces: boolean;
  /** Used by the detokenizer. */
  readonly vocabulary: Vocabulary;
  private readonly config: TokenizerConfig;
  private readonly templates = new Map<string, ChatTemplate>();

  constructor(vocabulary: Vocabulary, config: TokenizerConfig) {
    this.vocabulary = vocabulary;
    this.config = config;
    this.padding_side = config.paddingSide;
    this.truncation_side = config.truncationSide;
    this.model_max_length = config.modelMaxLength;
    this.clean_up_tokenization_spaces = config.cleanUp;
  }

  /** Encodes one text. Lone surrogates become U+FFFD. */
  encode(text: string, options: EncodeOptions = {}): number[] {
    const { add_special_tokens = true, split_special_tokens = this.config.splitSpecial } = options;
    checkOptions("encode", options, CALL_OPTIONS, NOT_RETURNED);
    if (typeof text !== "string") throw new TokenizerError(`the text must be a string, not ${describe(text)}`);
    const ids = this.vocabulary.encode(text, split_special_tokens);
    return add_special_tokens ? this.surround(ids) : ids;
  }

  /** Splits one text into tokens, by default without beginning and end tokens. */
  tokenize(text: string, options: EncodeOptions = {}): string[] {
    return this.convert_ids_to_tokens(this.encode(text, { add_special_tokens: false, ...options }));
  }

  /** Encodes one or more texts; `tokenizer(text, options)` calls this. Throws `TokenizerError` if padding is needed without a padding token. */
  call(text: string | readonly string[], options: CallOptions = {}): BatchEncoding {
    checkOptions("the tokenizer", options, CALL_OPTIONS, NOT_RETURNED);
    const texts = typeof text === "string" ? [text] : text;
    if (!Array.isArray(texts)) throw new TokenizerError(`a tokenizer takes a string or a list of strings, not ${describe(text)}`);
    const rows = texts.map((each) => this.encode(each, { ...options, add_special_tokens: false }));
    return this.batch(rows, options, options.add_special_tokens ?? true);
  }

  /** Decodes one sequence. Throws `TokenizerError` for an id that is not in the vocabulary. */
  decode(ids: TokenIds, options: DecodeOptions = {}): string {
    checkOptions("decode", options, DECODE_OPTIONS, {});
    const detokenizer = this.detokenizer({ skip_special_tokens: false, ...options });
    return detokenizer.push(ids) + detokenizer.finish();
  }

  /** Decodes several sequences. */
  batch_decode(batch: TokenRows, options: DecodeOptions = {}): string[] {
    const rows = idRows(batch);
    if (rows === null) throw new TokenizerError("the batch must be rows of token ids: a list of sequences, or a tensor of two dimensions");
    return rows.map((ids) => this.decode(ids, options));
  }

  /** Creates a streaming decoder for one sequence; by default it leaves special tokens out. */
  detokenizer(options: DetokenizerOptions = {}): Detokenizer {
    return new Detokenizer(this, options);
  }

  /** The tokens of ids. Throws `TokenizerError` for an id that is not in the vocabulary. */
  convert_ids_to_tokens(id: number | bigint): string;
  convert_ids_to_tokens(ids: TokenIds): string[];
  convert_ids_to_tokens(ids: number | bigint | TokenIds): string | string[] {
    if (typeof ids === "number" || typeof ids === "bigint") return this.vocabulary.token(idNumber(ids));
    const numbers = idNumbers(ids);
    if (numbers === null) throw new TokenizerError(`ids must be a token id or one sequence of them, not ${describe(ids)}`);
    return numbers.map((id) => this.vocabulary.token(id));
  }

  /** The ids of tokens. A token that is not in the vocabulary gets the id of the unknown token, or null if there is none. */
  convert_tokens_to_ids(token: string): number | null;
  convert_tokens_to_ids(tokens: readonly string[]): (number | null)[];
  convert_tokens_to_ids(tokens: string | readonly string[]): number | null | (number | null)[] {
    const id = (token: string) => this.vocabulary.id(token) ?? this.unk_token_id;
    return typeof tokens === "string" ? id(tokens) : tokens.map(id);
  }

  /**
   * Renders a conversation and encodes it, by default without adding special tokens (the template writes its own).
   * Throws `TokenizerError` if there is no chat template, if it fails, or if it would drop the content of a message.
   * `split_special_tokens` treats special tokens in the messages as plain text; those in the template stay special.
   */
  apply_chat_template(messages: readonly Message[], options: ChatTemplateOptions & { readonly tokenize: false }): string;
  apply_chat_template(messages: readonly Message[], options: ChatTemplateOptions & { readonly return_dict: true }): BatchEncoding;
  apply_chat_template(messages: readonly Message[], options?: ChatTemplateOptions): number[];
  apply_chat_template(messages: readonly Message[], options: ChatTemplateOptions = {}): string | number[] | BatchEncoding {
    const { add_generation_prompt = false, continue_final_message = false, tokenize = true, return_dict = false, ...rest } = options;
    const { padding, padding_side, truncation, max_length, add_special_tokens = false, ...more } = rest;
    const { split_special_tokens = this.config.splitSpecial, chat_template, tools = null, documents = null, ...variables } = more;
    const refused = Object.fromEntries(Object.entries(options).filter(([name]) => Object.hasOwn(NOT_RETURNED, name)));
    checkOptions("apply_chat_template", refused, [], NOT_RETURNED); // others are variables of the template
    if (!Array.isArray(messages)) throw new TokenizerError(`a conversation must be a list of messages, not ${describe(messages)}`);
    if (continue_final_message && add_generation_prompt)
      throw new TokenizerError("continue_final_message and add_generation_prompt cannot be combined");
    const template = this.template(chat_template, tools !== null);
    const shield = tokenize && split_special_tokens ? unusedNoncharacter(messages) : null;
    const sent = shield === null ? messages : this.shielded(messages, shield);
    const given = { ...this.special_tokens_map, ...variables, tools, documents, add_generation_prompt };
    const text = continue_final_message ? template.renderOpen(sent, given) : template.render(sent, given);
    if (!tokenize) return text;
    const ids = this.vocabulary.encode(text, false, shield);
    if (return_dict) return this.batch([ids], { padding, padding_side, truncation, max_length }, add_special_tokens);
    return add_special_tokens ? this.surround(ids) : ids;
  }

  /** Encodes a text that continues another, however that one ends: no beginning or end tokens, and no space of the tokenizer's own in front. */
  encode_continuation(text: string, options: Pick<EncodeOptions, "split_special_tokens"> = {}): number[] {
    return continuation(this.vocabulary, text, options.split_special_tokens ?? this.config.splitSpecial, null);
  }

  /**
   * Encodes the last message of a conversation as a model writes it. `prompt`: what `apply_chat_template` gives for the messages before it
   * with `add_generation_prompt`; `answer`: what the template writes after that, encoded apart, with the end of the turn.
   * Throws `TokenizerError` as `apply_chat_template` does, and where the template does not begin the message with its generation prompt.
   */
  encode_turn(messages: readonly Message[], options: ChatTemplateOptions = {}): { prompt: number[]; answer: number[] } {
    const asked = { ...options, add_generation_prompt: true, continue_final_message: false, tokenize: true, return_dict: false } as const;
    const prompt = this.apply_chat_template(messages.slice(0, -1), asked);
    const { split_special_tokens = this.config.splitSpecial, chat_template, tools = null, documents = null, ...variables } = options;
    const template = this.template(chat_template, tools !== null);
    const shield = split_special_tokens ? unusedNoncharacter(messages) : null;
    const sent = shield === null ? messages : this.shielded(messages, shield);
    const answer = template.renderAnswer(sent, { ...this.special_tokens_map, ...variables, tools, documents });
    return { prompt, answer: continuation(this.vocabulary, answer, false, shield) };
  }

  /** Size of the model's own vocabulary, without added tokens outside it. */
  get vocab_size(): number {
    return this.vocabulary.size;
  }

  /** Size of the vocabulary with added tokens; the same as `tokenizer.length`. */
  get size(): number {
    return this.vocabulary.fullSize;
  }

  get all_special_ids(): number[] {
    return this.vocabulary.specialIds;
  }

  get all_special_tokens(): string[] {
    return this.vocabulary.specialTokens;
  }

  get special_tokens_map(): Partial<Record<Role, string>> {
    return { ...this.vocabulary.roles };
  }

  /** The default chat template, or null if there is none. */
  get chat_template(): string | null {
    return this.config.chatTemplates["default"] ?? null;
  }

  get bos_token(): string | null {
    return this.role("bos_token");
  }

  get bos_token_id(): number | null {
    return this.roleId("bos_token");
  }

  get eos_token(): string | null {
    return this.role("eos_token");
  }

  get eos_token_id(): number | null {
    return this.roleId("eos_token");
  }

  get unk_token(): string | null {
    return this.role("unk_token");
  }

  get unk_token_id(): number | null {
    return this.roleId("unk_token");
  }

  get pad_token(): string | null {
    return this.role("pad_token");
  }

  get pad_token_id(): number | null {
    return this.roleId("pad_token");
  }

  get cls_token(): string | null {
    return this.role("cls_token");
  }

  get cls_token_id(): number | null {
    return this.roleId("cls_token");
  }

  get sep_token(): string | null {
    return this.role("sep_token");
  }

  get sep_token_id(): number | null {
    return this.roleId("sep_token");
  }

  get mask_token(): string | null {
    return this.role("mask_token");
  }

  get mask_token_id(): number | null {
    return this.roleId("mask_token");
  }

  private role(role: Role): string | null {
    return this.vocabulary.roles[role] ?? null;
  }

  private roleId(role: Role): number | null {
    return this.vocabulary.id(this.role(role) ?? "") ?? null;
  }

  private surround(ids: readonly number[]): number[] {
    return [...this.vocabulary.prefix, ...ids, ...this.vocabulary.suffix];
  }

  private batch(rows: readonly number[][], options: CallOptions, surround: boolean): BatchEncoding {
    const { padding = false, padding_side = this.padding_side, max_length } = options;
    if (max_length !== undefined && (!Number.isSafeInteger(max_length) || max_length < 0))
      throw new TokenizerError(`max_length must be a non-negative integer, not ${describe(max_length)}`);
    const padded = padding !== false && padding !== "do_not_pad";
    const limit = max_length ?? this.model_max_length;
    const around = surround ? this.vocabulary.prefix.length + this.vocabulary.suffix.length : 0;
    const cut = options.truncation ?? (max_length !== undefined && !padded);
    const room = cut ? Math.max(0, limit - around) : Number.POSITIVE_INFINITY;
    const input = rows.map((row) => {
      const from = this.truncation_side === "left" ? Math.max(0, row.length - room) : 0;
      const ids = row.length > room ? row.slice(from, from + room) : row;
      return surround ? this.surround(ids) : ids;
    });
    const width = !padded ? 0 : padding === "max_length" ? limit : input.reduce((longest, ids) => Math.max(longest, ids.length), 0);
    if (width === Number.POSITIVE_INFINITY)
      throw new TokenizerError('padding "max_length" needs max_length, because the tokenizer sets no maximum length');
    const pad = this.pad_token_id;
    if (pad === null && input.some((ids) => ids.length < width))
      throw new TokenizerError("padding needs a padding token, but the tokenizer has none");
    const filled = (ids: readonly number[], value: number, own: readonly number[]): number[] => {
      const fill = new Array<number>(Math.max(0, width - ids.length)).fill(value);
      return padding_side === "left" ? [...fill, ...own] : [...own, ...fill];
    };
    return {
      input_ids: input.map((ids) => filled(ids, pad ?? 0, ids)),
      attention_mask: input.map((ids) => filled(ids, 0, new Array<number>(ids.length).fill(1))),
    };
  }

  private template(wanted: string | undefined, tools: boolean): ChatTemplate {
    const { chatTemplates } = this.config;
    const names = Object.keys(chatTemplates);
    const source =
      wanted === undefined
        ? ((tools ? chatTemplates["tool_use"] : undefined) ?? chatTemplates["default"])
        : (chatTemplates[wanted] ?? wanted);
    if (source === undefined)
      throw new TokenizerError(
        names.length === 0
          ? "the tokenizer has no chat template: pass chat_template, or use plain text"
          : `the tokenizer has no default chat template: pass chat_template as one of ${names.join(", ")}`,
      );
    const known = this.templates.get(source);
    if (known !== undefined) return known;
    const template = new ChatTemplate(source);
    if (Object.values(chatTemplates).includes(source)) this.templates.set(source, template); // a template passed by the caller is not cached
    return template;
  }

  /** The messages with `shield` inserted into every special token; the encoder removes that character after matching added tokens. */
  private shielded(messages: readonly Message[], shield: string): Message[] {
    const breakable = this.all_special_tokens.map((token) => [token, String.fromCodePoint(token.codePointAt(0) ?? 0)] as const);
    const change = (value: unknown): unknown => {
      if (Array.isArray(value)) return value.map(change);
      if (typeof value === "object" && value !== null)
        return Object.fromEntries(
          Object.entries(value).map(([key, each]) => [key, key === "role" || key === "type" ? each : change(each)]),
        );
      if (typeof value !== "string") return value;
      let text = value;
      for (const [token, head] of breakable)
        if (token.length > head.length)
          while (text.includes(token)) text = text.replaceAll(token, () => head + shield + token.slice(head.length)); // repeat, since tokens may overlap
      return text;
    };
    return messages.map(change) as Message[];
  }
}

/** A tokenizer. It can be called like a function, and has the methods of `PreTrainedTokenizer`. */
export interface Tokenizer extends PreTrainedTokenizer {
  /** Encodes one or more texts: ids and attention mask, one row per text, also for a single text. */
  (text: string | readonly string[], options?: CallOptions): BatchEncoding;
  /** Size of the vocabulary with added tokens. */
  readonly length: number;
}

export const Tokenizer = {
  /**
   * Reads a tokenizer from a local folder: tokenizer.json, else tokenizer.model, with tokenizer_config.json, special_tokens_map.json,
   * added_tokens.json, chat_template.jinja and chat_template.json if present. Throws `TokenizerError` that names what is missing or malformed.
   */
  async open(folder: string): Promise<Tokenizer> {
    const files = await readFolder(folder);
    try {
      const definition = files.model === null ? readJson(files.json) : await readModel(files.model, namedSpecials(files));
      const config = readConfig(files);
      const vocabulary = new Vocabulary(definition, {
        added: configuredTokens(files, definition),
        roles: roles(files, definition),
        addBos: config.addBos && definition.prefix.length === 0,
        addEos: config.addEos && definition.suffix.length === 0,
      });
      return callable(new PreTrainedTokenizer(vocabulary, config));
    } catch (cause) {
      if (cause instanceof TokenizerError) throw new TokenizerError(`${folder}: ${cause.message}`, { cause });
      throw cause;
    }
  },

  /** Creates a tokenizer from pieces with scores. Throws `TokenizerError` for invalid pieces. */
  fromPieces(model: PieceModel): Tokenizer {
    const definition = readPieces(model);
    const config: TokenizerConfig = {
      chatTemplates: model.chatTemplates,
      modelMaxLength: model.maxLength,
      paddingSide: "left",
      truncationSide: "right",
      cleanUp: false,
      splitSpecial: false,
      addBos: model.addBos,
      addEos: model.addEos,
    };
    const { addBos, addEos } = model;
    const vocabulary = new Vocabulary(definition, { added: [], roles: definition.roles, addBos, addEos });
    return callable(new PreTrainedTokenizer(vocabulary, config));
  },
};

/** Reads the tokenizer of a local folder as pieces, for formats that store only those. Throws `TokenizerError` if pieces cannot express it. */
export async function readPieceModel(folder: string): Promise<PieceModel> {
  const [files, { toPieces }] = await Promise.all([readFolder(folder), import("./portable.ts")]);
  return toPieces(files);
}

/** Loads protobuf on demand: loading it takes longer than reading a small tokenizer.json. */
async function readModel(bytes: Uint8Array, special: ReadonlySet<string>): Promise<Definition> {
  const { readSentencePiece } = await import("./sentencepiece.ts");
  return readSentencePiece(bytes, special);
}

/** A function with the tokenizer as its prototype, so that `tokenizer(text)` and `tokenizer.decode(ids)` work on the same object. */
function callable(tokenizer: PreTrainedTokenizer): Tokenizer {
  const call = (text: string | readonly string[], options?: CallOptions): BatchEncoding => self.call(text, options);
  Object.defineProperty(call, "length", { value: tokenizer.size });
  const self: Tokenizer = Object.setPrototypeOf(call, tokenizer);
  return self;
}

/** A noncharacter, one of the 32 that Unicode reserves for internal use, that does not occur in the messages. */
function unusedNoncharacter(messages: readonly Message[]): string {
  const text = JSON.stringify(messages) ?? "";
  for (let code = 0xfdd0; code <= 0xfdef; code++) {
    const character = String.fromCharCode(code);
    if (!text.includes(character)) return character;
  }
  throw new TokenizerError(
    "the messages contain every noncharacter from U+FDD0 to U+FDEF, so their special tokens cannot be escaped: remove one of them",
  );
}

function checkOptions(what: string, options: object, known: readonly string[], remedies: Readonly<Record<string, string>>): void {
  const fault = optionFault(what, options, known, remedies);
  if (fault !== null) throw new TokenizerError(fault);
}

function describe(value: unknown): string {
  return Array.isArray(value) ? "a list" : value === null ? "null" : typeof value === "number" ? String(value) : typeof value;
}
