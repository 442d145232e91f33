/** Folders of adapters in PEFT's format, of repeatable noise, for any model of this family. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { adaptersOf, writeAdapter } from "../src/checkpoint/adapter.ts";
import { ADAPTER_DEFAULTS, type AdapterConfig } from "../src/checkpoint/lora.ts";
import { readConfig } from "../src/model/config.ts";
import { ernie } from "../src/model/ernie.ts";
import { elements } from "../src/tensor/shape.ts";
import { noise } from "./backend/builder.ts";
import { temporary } from "./cli/run.ts";

/** Writes one. @param base folder of the model @param strength of the noise; at 0.1 most answers differ from the base's */
export async function adapterFolder(base: string, seed: number, given: Partial<AdapterConfig> = {}, strength = 0.1): Promise<string> {
  const config = { ...ADAPTER_DEFAULTS, r: 4, lora_alpha: 8, target_modules: ["q_proj", "v_proj", "up_proj"], ...given };
  const { parameters } = ernie(readConfig(JSON.parse(readFileSync(join(base, "config.json"), "utf8"))), adaptersOf(config));
  const own = parameters.filter((p) => p.kind === "adapter");
  const modules = parameters.flatMap(({ name, kind, experts }) => {
    const module = name.replace(/\.weight$/, "");
    return kind === "matrix" && /_proj$/.test(module) ? [{ name: module, ...(experts === undefined ? {} : { experts }) }] : [];
  });
  const values = own.map((p, i) => ({ ...p, values: noise(elements(p.shape), seed * 1000 + i).map((x) => x * strength) }));
  const folder = join(temporary(), "adapter");
  await writeAdapter(folder, config, values, modules);
  return folder;
}
