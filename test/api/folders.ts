/** Model folders for these tests: the fixtures, and modified copies of them in temporary folders. */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { type TensorData, writeSafetensors } from "../../src/checkpoint/writer.ts";
import { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { GOLDENS } from "../goldens.ts";
import { folder } from "../tokenizer/folders.ts";

export interface StoredTensor extends TensorData {
  readonly data: Uint8Array;
}

/** A model folder in memory; `change` and `write` make variants of it. */
export interface ModelFolder {
  readonly config: Record<string, unknown>;
  readonly generation: Record<string, unknown> | null;
  readonly tensors: readonly StoredTensor[];
}

/** A fixture of test/fixtures/goldens. */
export async function readModel(variant: string): Promise<ModelFolder> {
  const json = (name: string) => JSON.parse(readFileSync(join(GOLDENS, variant, name), "utf8")) as Record<string, unknown>;
  const tensors: StoredTensor[] = [];
  for (const entry of (await readHeader(join(GOLDENS, variant, "model.safetensors"))).tensors.values())
    tensors.push({ name: entry.name, dtype: entry.dtype, shape: entry.shape, data: await readTensor(entry) });
  return { config: json("config.json"), generation: json("generation_config.json"), tensors };
}

/** Writes a model under `parent`; in several shards with an index where `shards` is more than one. */
export async function writeModel(parent: string, name: string, model: ModelFolder, shards = 1): Promise<string> {
  const path = join(parent, name);
  mkdirSync(path);
  writeFileSync(join(path, "config.json"), JSON.stringify(model.config));
  if (model.generation) writeFileSync(join(path, "generation_config.json"), JSON.stringify(model.generation));
  if (shards === 1) {
    await writeSafetensors(join(path, "model.safetensors"), model.tensors, { metadata: { format: "pt" } });
    return path;
  }
  const weight_map: Record<string, string> = {};
  for (let s = 0; s < shards; s++) {
    const file = `model-${s + 1}-of-${shards}.safetensors`;
    const part = model.tensors.filter((_, i) => i % shards === s);
    for (const t of part) weight_map[t.name] = file;
    await writeSafetensors(join(path, file), part, { metadata: { format: "pt" } });
  }
  writeFileSync(join(path, "model.safetensors.index.json"), JSON.stringify({ metadata: {}, weight_map }));
  return path;
}

/** A tokenizer of 512 words: id 285 is `w285.`, so that texts of the tiny models can be read; ids 0 to 2 are special. */
export function words(): Promise<Tokenizer> {
  const tokens = ["<pad>", "<s>", "</s>", ...Array.from({ length: 509 }, (_, i) => `w${i + 3}.`)];
  return Tokenizer.open(
    folder({
      "tokenizer.json": {
        added_tokens: tokens.slice(0, 3).map((content, id) => ({ id, content, special: true, normalized: false })),
        normalizer: null,
        pre_tokenizer: null,
        post_processor: null,
        decoder: { type: "Fuse" },
        model: {
          type: "BPE",
          unk_token: null,
          byte_fallback: false,
          vocab: Object.fromEntries(tokens.map((t, id) => [t, id])),
          merges: [],
        },
      },
    }),
  );
}
