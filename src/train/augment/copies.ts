/** Makes changed copies of a row, by the methods in turn, each different from the row and from the others. Knows no files. */
import type { Fields } from "../data/table.ts";
import { Random } from "../random.ts";
import { EDITS, edited } from "./edits.ts";
import { type Place, withTexts } from "./fields.ts";
import { keptSpans, keptTexts } from "./keep.ts";
import type { Thesaurus } from "./thesaurus.ts";
import type { Translator } from "./translate.ts";
import { scriptOf, tokensOf } from "./words.ts";

export const METHODS = [...EDITS, "back-translation"] as const;
export type Method = (typeof METHODS)[number];

export interface CopyOptions {
  /** The copies of a row take turns in these. */
  readonly methods: readonly Method[];
  /** Copies of each row (EDA's n_aug). */
  readonly copies: number;
  /** Share of a text's words that an edit changes (EDA's alpha). */
  readonly alpha: number;
  readonly seed: number;
  /** Words and phrases that stay as they are. */
  readonly keep?: readonly string[];
  /** For `synonyms` and `insert`. */
  readonly thesaurus?: Thesaurus;
  /** For `back-translation`, and the language that texts go through. Default: Chinese for texts in Latin letters, English for Chinese ones. */
  readonly translator?: Translator;
  readonly through?: string;
  readonly signal?: AbortSignal;
}

/** A copy of a row, or why there is none. */
export type Made = { readonly method: Method } & (
  | { readonly fields: Fields; readonly places: readonly Place[]; readonly texts: readonly string[] }
  | { readonly reason: string }
);

/** Attempts at a copy that differs from the text and from the copies before it. */
const ATTEMPTS = 5;
/** Lengths of a back-translation, as a multiple of the text's. */
const [SHORTEST, LONGEST] = [0.4, 2.5];

const NONE: Thesaurus = { synonyms: () => [] };
const NOTHING: Readonly<Record<Method, string>> = {
  synonyms: "no word has a synonym",
  insert: "no word has a synonym",
  swap: "fewer than two words may be moved",
  delete: "no word was chosen to be deleted",
  "back-translation": "there is no text",
};

export class Copier {
  readonly #options: CopyOptions;

  constructor(options: CopyOptions) {
    this.#options = options;
  }

  /** The copies of a row. @param turn of the first copy in the list of methods */
  async of(fields: Fields, number: number, turn: number, places: readonly Place[], answers: readonly string[]): Promise<Made[]> {
    const { copies, methods, signal } = this.#options;
    const made: Made[] = [];
    const seen = new Set([JSON.stringify(places.map(({ text }) => text))]);
    for (let copy = 0; copy < copies; copy++) {
      signal?.throwIfAborted();
      const method = methods[(turn + copy) % methods.length];
      const attempts = method === "back-translation" ? 1 : ATTEMPTS;
      let reason = "";
      for (let attempt = 0; attempt < attempts; attempt++) {
        const random = new Random(this.#options.seed, "row", number, copy, attempt);
        const changed = await this.#change(method, places, answers, random);
        reason = changed.reason;
        const key = JSON.stringify(changed.texts);
        if (reason !== "" || seen.has(key)) continue;
        seen.add(key);
        made.push({ method, fields: withTexts(fields, places, changed.texts), places, texts: changed.texts });
        break;
      }
      if (made.length <= copy) made.push({ method, reason: reason === "" ? "the same as the row or another copy" : reason });
    }
    return made;
  }

  /** Other texts for these places. A text that cannot be changed stays; the reason tells why none could. */
  async #change(
    method: Method,
    places: readonly Place[],
    answers: readonly string[],
    random: Random,
  ): Promise<{ texts: string[]; reason: string }> {
    const { keep: listed = [], alpha, thesaurus } = this.#options;
    const texts: string[] = [];
    let reason = "";
    let changed = 0;
    for (const { text } of places) {
      let other: string | null = null;
      if (method === "back-translation") {
        const answer = await this.#translated(text);
        if ("reason" in answer) reason ||= answer.reason;
        else other = answer.text;
      } else other = edited(method, tokensOf(text, keptSpans(text, { listed, beside: answers })), alpha, random, thesaurus ?? NONE);
      if (other !== null) changed++;
      texts.push(other ?? text);
    }
    return { texts, reason: changed > 0 ? "" : reason || NOTHING[method] };
  }

  async #translated(text: string): Promise<{ readonly text: string } | { readonly reason: string }> {
    const { translator, through, keep: listed = [] } = this.#options;
    const han = scriptOf(text) === "han";
    const answer = (await translator?.roundTrip(text, through ?? (han ? "English" : "Chinese"), han ? "Chinese" : "English")) ?? "";
    const plain = (each: string) => each.toLowerCase().replace(/[\s\p{P}]+/gu, "");
    if (plain(answer) === plain(text)) return { reason: "the translation back is the text itself" };
    if (answer.length < SHORTEST * text.length || answer.length > LONGEST * text.length)
      return { reason: "the translation back has another length" };
    if ((scriptOf(answer) === "han") !== han) return { reason: "the translation back is in another script" };
    const lower = answer.toLowerCase();
    const lost = keptTexts(text, listed).find((each) => !lower.includes(each.toLowerCase()));
    return lost === undefined ? { text: answer } : { reason: "a name, a number or something else to keep was lost" };
  }
}
