/** Turns a command's options into a folder, a tokenizer and a model. Loads the library only when called. */
import { existsSync, statSync } from "node:fs";
import { join } from "node:path";
import type { FindOptions } from "../api/find.ts";
import type { CausalLM } from "../api/model.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { inFlags, UsageError } from "./failure.ts";
import { type AdapterFlag, type HubFlags, loadOptions, type ModelFlags } from "./options.ts";
import { downloadProgress } from "./progress.ts";
import { warn } from "./terminal.ts";

/** What whoever uses the bundled model should know. */
export const DEMO = "the bundled model is a tiny demo and often wrong; for a real one: -m baidu/ERNIE-4.5-21B-A3B-PT --dtype int8";

interface FindFlags {
  readonly withWeights?: boolean;
  readonly signal?: AbortSignal;
}

/** The folder of a model, fetched with progress bars if it is on the hub. `withWeights: false` leaves out the weights. */
export async function findFolder(name: string, flags: HubFlags, options: FindFlags = {}): Promise<string> {
  const { resolveWhole } = await import("../api/find.ts");
  const { folder, adapter } = await fetching(name, flags, options, (more) => resolveWhole(name, more));
  if (adapter === null) return folder;
  throw new CheckpointError(name, "is an adapter, and this needs a model: merge it into its base (mixtape merge), or name the base");
}

/** The folder of an adapter, fetched likewise. `--revision` is the model's: an adapter's is part of its name, user/repo@revision. */
export async function findAdapter(name: string, flags: HubFlags, options: FindFlags = {}): Promise<string> {
  const { resolveAdapter } = await import("../api/find.ts");
  return fetching(name, { ...flags, revision: undefined }, options, (more) => resolveAdapter(name, more));
}

/** What `pull` prints: the folder of a model or of an adapter. */
export async function findEither(name: string, flags: HubFlags, options: FindFlags = {}): Promise<string> {
  const { resolvePretrained } = await import("../api/find.ts");
  return fetching(name, flags, options, (more) => resolvePretrained(name, more));
}

/**
 * The model and the adapters of a command, as folders: what `-m` names, or else the base that the adapters name; with `-m` naming an adapter,
 * its base and it. Throws UsageError where the adapters name different bases.
 */
export async function findModel(flags: ModelFlags, options: FindFlags = {}): Promise<{ folder: string; adapters: readonly AdapterFlag[] }> {
  const { isBundled, resolveBase, resolveWhole } = await import("../api/find.ts");
  const adapters: AdapterFlag[] = [];
  for (const each of flags.adapter ?? []) adapters.push({ ...each, folder: await findAdapter(each.folder, flags, options) });
  if (flags.modelGiven || adapters.length === 0) {
    const { folder, adapter } = await fetching(flags.model, flags, options, (more) => resolveWhole(flags.model, more));
    return { folder, adapters: adapter === null ? adapters : [{ folder: adapter, weight: 1 }, ...adapters] };
  }
  const { readBase } = await import("../checkpoint/adapter.ts");
  const names = await Promise.all(adapters.map(async ({ folder }) => (await readBase(folder)).name));
  const other = names.findIndex((name) => name !== names[0]);
  if (other > 0)
    throw new UsageError(
      `the adapters name different bases: ${adapters[0].folder} ${names[0] ?? "none"}, ${adapters[other].folder} ${names[other] ?? "none"}; say which with -m`,
    );
  if (names[0] === null || isBundled(names[0])) return { folder: await findFolder(flags.model, flags, options), adapters };
  return { folder: await fetching(names[0], flags, options, (more) => resolveBase(adapters[0].folder, more)), adapters };
}

/** Runs a search with the flags' options, and shows its downloads, retries and warnings. */
async function fetching<T>(
  name: string,
  flags: HubFlags,
  { withWeights = true, signal }: FindFlags,
  find: (options: FindOptions) => Promise<T>,
): Promise<T> {
  const bars = name === "default" || existsSync(name) ? null : await downloadProgress();
  try {
    return await find({
      revision: flags.revision,
      cache_dir: flags.cacheDir,
      local_files_only: flags.offline,
      withWeights,
      signal,
      progress_callback: (progress) => bars?.update(progress),
      onWarning: warn,
      onRetry: warn,
    });
  } catch (error) {
    throw inFlags(error, { local_files_only: "--offline" });
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

/** Loads the weights of a folder, and adapters. The caller disposes of the model. */
export async function openModel(folder: string, flags: ModelFlags, adapters: readonly AdapterFlag[] = []): Promise<CausalLM> {
  const [{ AutoModelForCausalLM }, { DEFAULT_MODEL }] = await Promise.all([import("../api/model.ts"), import("../api/find.ts")]);
  if (folder === DEFAULT_MODEL) warn(DEMO);
  const model = await AutoModelForCausalLM.from_pretrained(folder, {
    ...loadOptions(flags),
    warning_callback: warn,
  });
  try {
    await useAdapters(model, adapters);
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
