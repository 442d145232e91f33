// The vocabulary of a tokenizer: tokens and ids, special tokens by role, and encoding. Knows nothing of batches, chat or files.
import { type AddedToken, AddedTokens } from "./added.ts";
import { tokenBytes } from "./bytes.ts";
import { type DecoderConfig, decoderStep, type Step } from "./decoder.ts";
import type { Definition } from "./definition.ts";
import { TokenizerError } from "./error.ts";

/** The roles of special tokens in transformers. */
export const roleNames = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] as const;
export type Role = (typeof roleNames)[number];

export interface VocabularyOptions {
  /** Tokens to add to the definition's. A token that exists already with the same id and text only changes how it is matched. */
  readonly added: readonly AddedToken[];
  readonly roles: Readonly<Partial<Record<Role, string>>>;
  /** Put the bos token before every sequence, in place of the definition's prefix; `addEos` likewise for eos and suffix. */
  readonly addBos: boolean;
  readonly addEos: boolean;
}

export class Vocabulary {
  readonly roles: Readonly<Partial<Record<Role, string>>>;
  /** Size of the model's own vocabulary. */
  readonly size: number;
  /** Size with added tokens. */
  readonly fullSize: number;
  readonly prefix: readonly number[];
  readonly suffix: readonly number[];
  readonly decoder: Step;
  private readonly definition: Definition;
  private readonly tokens: string[] = [];
  private readonly ids: Map<string, number>;
  private readonly toBytes: (token: string) => Uint8Array;
  private readonly addedIds: ReadonlySet<number>;
  private readonly specials: ReadonlyMap<number, string>;
  private readonly raw: AddedTokens;
  private readonly normalized: AddedTokens;

  constructor(definition: Definition, options: VocabularyOptions, decoder: DecoderConfig | null = definition.decoder) {
    this.definition = definition;
    this.roles = options.roles;
    this.size = definition.vocab.size;
    this.ids = new Map(definition.vocab);
    this.ids.forEach((id, token) => {
      const other = this.tokens[id];
      if (other !== undefined)
        throw new TokenizerError(
          `the tokens ${JSON.stringify(other)} and ${JSON.stringify(token)} have the same id ${id} in the vocabulary`,
        );
      this.tokens[id] = token;
    });
    const added = new Map<string, AddedToken>();
    for (const token of [...definition.added, ...options.added]) {
      if (token.content === "") continue;
      const other = this.tokens[token.id];
      const known = this.ids.get(token.content);
      if ((other !== undefined && other !== token.content) || (known !== undefined && known !== token.id))
        throw new TokenizerError(
          `added token ${JSON.stringify(token.content)} has the id ${token.id}, but the vocabulary has ` +
            (known !== undefined && known !== token.id ? `it as ${known}` : `${JSON.stringify(other)} there`),
        );
      added.set(token.content, token);
      this.ids.set(token.content, token.id);
      this.tokens[token.id] = token.content;
    }
    this.fullSize = this.ids.size;
    const all = [...added.values()];
    this.specials = new Map(all.flatMap(({ id, content, special }) => (special ? [[id, content] as const] : [])));
    this.raw = new AddedTokens(all.filter((token) => !token.normalized));
    this.normalized = new AddedTokens(
      all.filter((token) => token.normalized),
      definition.normalize,
    );
    const bos = options.addBos ? [options.roles.bos_token ?? ""] : definition.prefix;
    const eos = options.addEos ? [options.roles.eos_token ?? ""] : definition.suffix;
    this.prefix = bos.map((token) => this.known(token));
    this.suffix = eos.map((token) => this.known(token));
    this.decoder = decoderStep(decoder);
    this.toBytes = tokenBytes(decoder);
    this.addedIds = new Set(all.map(({ id }) => id));
  }

  /** The id of a token, or undefined if there is none. */
  id(token: string): number | undefined {
    return this.ids.get(token);
  }

  /** The token of an id. Throws `TokenizerError` if there is none. */
  token(id: number): string {
    const token = Number.isInteger(id) ? this.tokens[id] : undefined;
    if (token === undefined)
      throw new TokenizerError(
        Number.isInteger(id)
          ? `token id ${id} is not in the vocabulary of ${this.fullSize} tokens`
          : `a token id must be an integer, not ${JSON.stringify(id)} (the vocabulary has ${this.fullSize} tokens)`,
      );
    return token;
  }

  /** Whether there is a token with this id. */
  has(id: number): boolean {
    return this.tokens[id] !== undefined;
  }

  /** The bytes that a token adds to a text; they may end inside a character. Throws `TokenizerError` if there is no such id. */
  bytes(id: number): Uint8Array {
    const token = this.token(id);
    return this.addedIds.has(id) ? new TextEncoder().encode(token) : this.toBytes(token);
  }

  isSpecial(id: number): boolean {
    return this.specials.has(id);
  }

  get specialIds(): number[] {
    return [...this.specials.keys()];
  }

  get specialTokens(): string[] {
    return [...this.specials.values()];
  }

  /** Encodes a text, without beginning and end tokens. Occurrences of `hidden`, which break up special tokens, are removed after matching. */
  encode(text: string, splitSpecial: boolean, hidden: string | null = null): number[] {
    const { normalize, cut } = this.definition;
    const out: number[] = [];
    // a lone surrogate is not a character and cannot be encoded in UTF-8
    const sections = this.raw.split(text.replace(/\p{Surrogate}/gu, "\ufffd"), splitSpecial);
    for (const [i, section] of sections.entries()) {
      if ("id" in section) {
        out.push(section.id);
        continue;
      }
      const plain = hidden === null ? section.text : section.text.replaceAll(hidden, "");
      for (const [k, part] of this.normalized.split(normalize(plain), splitSpecial).entries()) {
        if ("id" in part) out.push(part.id);
        else cut(part.text, i === 0 && k === 0, out);
      }
    }
    return out;
  }

  private known(token: string): number {
    const id = this.ids.get(token);
    if (id === undefined)
      throw new TokenizerError(`token ${JSON.stringify(token)}, which is added to every text, is not in the vocabulary`);
    return id;
  }
}
