/** `AutoTokenizer`: loads a tokenizer from a folder, a GGUF file, a hub id, or `default`. Knows no model. */
import { readdir } from "node:fs/promises";
import { ggufFile } from "../checkpoint/gguf/locate.ts";
import { Tokenizer } from "../tokenizer/tokenizer.ts";
import { isAdapterFolder, resolveBase, resolvePretrained } from "./find.ts";
import { checkPretrained, type PretrainedOptions } from "./model.ts";

/** The tokenizer of a local folder or a GGUF file. Tokenizer files beside a GGUF file take precedence over its contents. */
export async function openTokenizer(path: string): Promise<Tokenizer> {
  const file = await ggufFile(path);
  if (file === undefined || (await holdsTokenizer(path))) return Tokenizer.open(path);
  const { openPieces } = await import("./pieces.ts");
  return Tokenizer.fromPieces(await openPieces(path));
}

async function holdsTokenizer(path: string): Promise<boolean> {
  const names: string[] = await readdir(path).catch(() => []); // not a folder
  return names.includes("tokenizer.json") || names.includes("tokenizer.model");
}

/** Loads tokenizers. */
export const AutoTokenizer = {
  /** Reads tokenizer.json or tokenizer.model, downloading only the tokenizer's files; an adapter without one has its base's. Rejects when there is neither. */
  async from_pretrained(idOrFolder: string, options: PretrainedOptions = {}): Promise<Tokenizer> {
    checkPretrained(options);
    const light = { ...options, withWeights: false };
    const folder = await resolvePretrained(idOrFolder, light);
    const borrows = isAdapterFolder(folder) && !(await holdsTokenizer(folder));
    return openTokenizer(borrows ? await resolveBase(folder, light) : folder);
  },
};
