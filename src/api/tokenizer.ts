/** `AutoTokenizer`: a tokenizer from a folder, a hub id, or `default`. */
import { Tokenizer } from "../tokenizer/tokenizer.ts";
import { type PretrainedOptions, resolvePretrained } from "./model.ts";

/** Loads tokenizers. */
export const AutoTokenizer = {
  /** Reads tokenizer.json or tokenizer.model; from the hub only those files. Throws when the folder has neither. */
  async from_pretrained(idOrFolder: string, options: PretrainedOptions = {}): Promise<Tokenizer> {
    return Tokenizer.open(await resolvePretrained(idOrFolder, { ...options, weights: false }));
  },
};
