/** Turns a command's options into a folder, a tokenizer and a model. Loads the library only when called. */
import { existsSync, statSync } from "node:fs";
import { join } from "node:path";
import type { CausalLM } from "../api/model.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { type AdapterFlag, type HubFlags, loadOptions, type ModelFlags } from "./options.ts";
import { downloadProgress } from "./progress.ts";
import { warn } from "./terminal.ts";

/** What whoever uses the bundled model should know. */
export const DEMO = "the bundled model is a tiny demo and often wrong; for a real one: -m baidu/ERNIE-4.5-21B-A3B-PT --dtype int8";

/** The folder of a model, fetched with progress bars if it is on the hub. `withWeights: false` leaves out the weights. */
export async function findFolder(
  name: string,
  flags: HubFlags,
  { withWeights = true, signal }: { withWeights?: boolean; signal?: AbortSignal } = {},
): Promise<string> {
  const { resolvePretrained } = await import("../api/model.ts");
  if (name === "default") return resolvePretrained(name);
  const { resolveModel } = await import("../checkpoint/hub.ts");
  const bars = existsSync(name) ? null : await downloadProgress();
  try {
    return await resolveModel(name, {
      revision: flags.revision,
      cache_dir: flags.cacheDir,
      local_files_only: flags.offline,
      withWeights,
      signal,
      onProgress: (progress) => bars?.update(progress),
      onWarning: warn,
    });
  } finally {
    bars?.stop();
  }
}

/** True if a folder or a GGUF file has a tokenizer, valid or not. */
export function hasTokenizer(folder: string): boolean {
  if (statSync(folder, { throwIfNoEntry: false })?.isFile()) return true;
  return ["tokenizer.json", "tokenizer.model"].some((name) => existsSync(join(folder, name)));
}

/** Reads the tokenizer of a folder or of a GGUF file. */
export async function openTokenizer(folder: string): Promise<Tokenizer> {
  const { openTokenizer: open } = await import("../api/tokenizer.ts");
  return open(folder);
}

/** Loads the weights of a folder, and the adapters of the flags. The caller disposes of the model. */
export async function openModel(folder: string, flags: ModelFlags): Promise<CausalLM> {
  const { AutoModelForCausalLM, isBundled } = await import("../api/model.ts");
  if (isBundled(flags.model)) warn(DEMO);
  const model = await AutoModelForCausalLM.from_pretrained(folder, {
    ...loadOptions(flags),
    warning_callback: warn,
  });
  try {
    await useAdapters(model, flags.adapter ?? []);
    return model;
  } catch (error) {
    await model.dispose();
    throw error;
  }
}

/** Makes the sum of all adapters active. */
async function useAdapters(model: CausalLM, adapters: readonly AdapterFlag[]): Promise<void> {
  if (adapters.length === 0) return;
  const names = adapters.map((_, i) => (adapters.length === 1 ? ADAPTER : `${ADAPTER}-${i + 1}`));
  for (const [i, { folder, weight }] of adapters.entries()) await model.load_adapter(folder, { adapter_name: names[i], scale: weight });
  if (adapters.length > 1) {
    await model.add_weighted_adapter(
      names,
      names.map(() => 1),
      { adapter_name: ADAPTER },
    );
  }
  model.set_adapter(ADAPTER);
}

/** What `--adapter` loads is called. */
export const ADAPTER = "adapter";
