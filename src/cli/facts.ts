/** Gathers what `mixtape info` shows about a model. A folder without weights or a tokenizer is described as far as possible. */
import { existsSync, realpathSync } from "node:fs";
import { join } from "node:path";
import { hostMemory } from "../backend/memory.ts";
import { reasonToStay } from "../backend/residence.ts";
import { type Checkpoint, CONFIG, missingFile, openCheckpoint, readJson, totalsByDtype } from "../checkpoint/checkpoint.ts";
import { moeLayers, readConfig } from "../model/config.ts";
import { configFor } from "../model/fit.ts";
import { measure } from "../model/size.ts";
import { UsageError } from "./failure.ts";
import { findFolder, openTokenizer } from "./models.ts";
import type { HubFlags } from "./options.ts";

export type Facts = Awaited<ReturnType<typeof gather>>;

/** Throws if the folder, its config, the headers of its weights or its tokenizer are broken. */
export async function gather(name: string, flags: HubFlags) {
  const folder = await findFolder(name, flags, { withWeights: false });
  const missing = existsSync(join(folder, CONFIG)) ? await missingFile(folder) : undefined;
  const checkpoint = missing === undefined ? await openCheckpoint(folder) : null;
  const config = checkpoint ? configFor(checkpoint) : readConfig(await readObject(join(folder, CONFIG)));
  const generation = join(folder, "generation_config.json");
  return {
    model: name,
    folder,
    config: { ...config, moe_layers: moeLayers(config) },
    ...measure(config),
    stored: checkpoint && Object.fromEntries(totalsByDtype(checkpoint)),
    weights: checkpoint && expectedPlace(checkpoint),
    /** The first missing file that the model needs to run. */
    missing: missing ?? null,
    tokenizer: await describeTokenizer(folder),
    generation: checkpoint ? (checkpoint.generationConfig ?? {}) : existsSync(generation) ? await readObject(generation) : {},
  };
}

/** Where `auto` would keep the weights on this machine now, in the format they are stored in, and why not on huge pages of their own. */
function expectedPlace(checkpoint: Checkpoint): { readonly place: "resident" | "mapped"; readonly why: string | null } {
  const bytes = [...totalsByDtype(checkpoint).values()].reduce((sum, t) => sum + t.bytes, 0);
  const files = [...new Set([...checkpoint.tensors.values()].map((t) => t.file))].map((file) => realpathSync(file));
  const why = reasonToStay(bytes, files, hostMemory());
  return { place: why === null ? "resident" : "mapped", why };
}

async function describeTokenizer(folder: string) {
  const file = ["tokenizer.json", "tokenizer.model"].find((each) => existsSync(join(folder, each)));
  if (!file) return null;
  const tokenizer = await openTokenizer(folder);
  return {
    file,
    vocabulary: tokenizer.vocab_size,
    with_added: tokenizer.size,
    special_tokens: tokenizer.special_tokens_map,
    special_ids: tokenizer.all_special_ids.length,
    longest_input: Number.isFinite(tokenizer.model_max_length) ? tokenizer.model_max_length : null,
    chat_template: tokenizer.chat_template !== null,
  };
}

async function readObject(file: string): Promise<Record<string, unknown>> {
  const value = await readJson(file);
  if (value === null) throw new UsageError(`${file}: no such file`);
  return value;
}
