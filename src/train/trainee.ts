/** What is trained: a model on a backend, which of its parameters are float32 states, and which of those change. Knows no optimiser. */
import type { Backend, State, Weights } from "../backend/backend.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { elements } from "../tensor/shape.ts";
import type { Objective } from "./loss.ts";

export interface Trainee {
  readonly model: Model;
  readonly backend: Backend;
  readonly weights: Weights;
  /** The format in which each parameter that is no state was loaded. */
  readonly dtypeOf: (parameter: string) => Dtype;
  /** The parameters that are float32 states, by name. */
  readonly states: ReadonlyMap<string, State>;
  /** The names of those that are trained. */
  readonly trained: ReadonlySet<string>;
  /** Stacked parameters of which only some experts are trained, with those experts. */
  readonly experts: ReadonlyMap<string, readonly number[]>;
}

/** A model that a Trainer can train. */
export interface Trainable {
  trainee(): Trainee | Promise<Trainee>;
  /** What it learns unless told otherwise, from rows of one kind, which the Trainer's data has to match. Default: to predict the next token. */
  readonly objective?: Objective<never>;
  /** What training that needs a reference compares it with. */
  reference?(): Trainee;
  /** The model as it is, for others to be compared with. */
  frozen?(): Trainee;
  /** Writes what is trained, so that it can be loaded without the trainer. */
  save_pretrained(folder: string): Promise<void>;
}

export function trainedParameters({ model, trained }: Trainee): ModelParameter[] {
  return model.parameters.filter((p) => trained.has(p.name));
}

/** Trained numbers of a parameter, counting only the experts that are trained. */
export function trainedCount({ experts }: Trainee, { name, shape }: ModelParameter): number {
  const chosen = experts.get(name);
  return chosen ? (elements(shape) / Number(shape[0])) * chosen.length : elements(shape);
}

/** A line of the table of trainable parameters. */
export interface Kind {
  /** `self_attn.q_proj`, `mlp.experts.up_proj`, ... with all layers together. */
  readonly kind: string;
  /** Layers, of how many that have such a module; 0 of 0 outside of layers. */
  readonly layers: readonly number[];
  readonly tensors: number;
  readonly trained: number;
  /** All numbers of the modules of this kind, adapters not counted. */
  readonly total: number;
}

/** The trainable parameters by kind of module, in the order of the model. Kinds without any are included with 0. */
export function trainableKinds(trainee: Trainee): Kind[] {
  const kinds = new Map<string, { kind: string; layers: number[]; tensors: number; trained: number; total: number }>();
  for (const p of trainee.model.parameters) {
    const kind = kindOf(p.name);
    const line = kinds.get(kind) ?? { kind, layers: [], tensors: 0, trained: 0, total: 0 };
    kinds.set(kind, line);
    if (p.kind !== "adapter") line.total += elements(p.shape);
    if (!trainee.trained.has(p.name)) continue;
    line.trained += trainedCount(trainee, p);
    line.tensors++;
    const layer = layerOf(p.name);
    if (layer !== null && !line.layers.includes(layer)) line.layers.push(layer);
  }
  return [...kinds.values()];
}

/** The layer of a parameter; null outside of layers. */
export function layerOf(name: string): number | null {
  const found = /^model\.layers\.(\d+)\./.exec(name)?.[1];
  return found === undefined ? null : Number(found);
}

/** The kind of module that a parameter belongs to: its name without the layer, and without what is a part of the module. */
export function kindOf(name: string): string {
  return name
    .replace(/^model\.layers\.\d+\./, "")
    .replace(/^model\./, "")
    .replace(/\.lora_.*$|\.(weight|bias)$/, "");
}

/** The table as text, and the share that is trained. */
export function trainableTable(trainee: Trainee): string {
  const kinds = trainableKinds(trainee);
  const trained = kinds.reduce((n, k) => n + k.trained, 0);
  const total = kinds.reduce((n, k) => n + k.total, 0) + adapterCount(trainee);
  const rows = kinds.map((k) => [
    k.kind,
    k.trained > 0 ? ranges(k.layers) : "frozen",
    k.trained > 0 ? k.trained.toLocaleString("en") : "",
    k.total.toLocaleString("en"),
  ]);
  const lines = [["module", "trained layers", "trained", "of the base"], ...rows];
  const widths = [0, 1, 2, 3].map((c) => Math.max(...lines.map((l) => l[c].length)));
  const table = lines.map((l) =>
    l
      .map((cell, c) => (c < 2 ? cell.padEnd(widths[c]) : cell.padStart(widths[c])))
      .join("  ")
      .trimEnd(),
  );
  return `${table.join("\n")}\n${summary(trained, total)}`;
}

/** PEFT's line. */
export function trainableLine(trainee: Trainee): string {
  const trained = trainedParameters(trainee).reduce((n, p) => n + trainedCount(trainee, p), 0);
  const base = trainee.model.parameters.filter((p) => p.kind !== "adapter").reduce((n, p) => n + elements(p.shape), 0);
  return summary(trained, base + adapterCount(trainee));
}

function adapterCount({ model }: Trainee): number {
  return model.parameters.filter((p) => p.kind === "adapter").reduce((n, p) => n + elements(p.shape), 0);
}

function summary(trained: number, total: number): string {
  return `trainable params: ${trained.toLocaleString("en")} || all params: ${total.toLocaleString("en")} || trainable%: ${((100 * trained) / total).toFixed(4)}`;
}

/** Numbers as ranges: `0-3, 7`. */
export function ranges(numbers: readonly number[]): string {
  const parts: string[] = [];
  for (let i = 0; i < numbers.length; i++) {
    const from = numbers[i];
    while (numbers[i + 1] === numbers[i] + 1) i++;
    parts.push(numbers[i] === from ? `${from}` : `${from}-${numbers[i]}`);
  }
  return parts.length > 0 ? parts.join(", ") : "-";
}
