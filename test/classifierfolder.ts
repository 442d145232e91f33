/** Classifiers made of the fixtures' models: the same layers, with a head of repeatable noise. */
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { readHeader, readTensor } from "../src/checkpoint/safetensors.ts";
import { type TensorData, writeSafetensors } from "../src/checkpoint/writer.ts";
import { noise } from "./backend/builder.ts";
import { temporary } from "./cli/run.ts";

export function bytesOf(values: Float32Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

/** The head: weight [classes, hidden] and, where wanted, bias [classes]. */
export function headTensors(classes: number, hidden: number, bias: boolean, prefix = ""): (TensorData & { values: Float32Array })[] {
  const weight = noise(classes * hidden, 4711);
  const shift = noise(classes, 4712);
  return [
    { name: `${prefix}score.weight`, dtype: "F32", shape: [classes, hidden], data: bytesOf(weight), values: weight },
    ...(bias ? [{ name: `${prefix}score.bias`, dtype: "F32" as const, shape: [classes], data: bytesOf(shift), values: shift }] : []),
  ];
}

/** A folder of a classifier. @param base folder of a model @param config changes to its config.json @param options `score`: the head's weight */
export async function classifierFolder(
  base: string,
  classes: number,
  config: object = {},
  { bias = false, score }: { readonly bias?: boolean; readonly score?: Float32Array } = {},
): Promise<string> {
  const folder = join(temporary(), "classifier");
  mkdirSync(folder);
  const raw = JSON.parse(readFileSync(join(base, "config.json"), "utf8"));
  const architectures = [raw.architectures[0].replace("ForCausalLM", "ForSequenceClassification")];
  const id2label = Object.fromEntries(Array.from({ length: classes }, (_, i) => [i, `class ${i}`]));
  writeFileSync(join(folder, "config.json"), JSON.stringify({ ...raw, architectures, id2label, ...config }));
  for (const name of ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
    try {
      cpSync(join(base, name), join(folder, name));
    } catch {} // fixtures have no tokenizer
  const { tensors, metadata } = await readHeader(join(base, "model.safetensors"));
  const kept = [...tensors.values()].filter(({ name }) => !name.startsWith("lm_head."));
  const all: TensorData[] = kept.map((entry) => ({
    name: entry.name,
    dtype: entry.dtype,
    shape: entry.shape,
    data: () => readTensor(entry),
  }));
  const blocks = Object.fromEntries(Object.entries(metadata).filter(([key]) => key !== "format"));
  const head = headTensors(classes, raw.hidden_size, bias).map((t) => (score && t.shape.length === 2 ? { ...t, data: bytesOf(score) } : t));
  await writeSafetensors(join(folder, "model.safetensors"), [...all, ...head], {
    metadata: { format: "pt", ...blocks },
  });
  return folder;
}
