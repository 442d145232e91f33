/** Runs a case on a backend, with its weights loaded from a file as usual. */
import { writeFileSync } from "node:fs";
import type { Backend, Numbers, WeightSource } from "../../src/backend/backend.ts";
import { lowered } from "../../src/backend/cpu.ts";
import { convertStored } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import type { Graph } from "../../src/graph/graph.ts";
import { ELEMENT_BYTES } from "../../src/tensor/dtype.ts";
import { blockBytes, isBlockDtype } from "../../src/tensor/quantized.ts";
import { elements } from "../../src/tensor/shape.ts";
import type { Case } from "./builder.ts";

/** Writes a case's weights in their formats, stacked matrices one after another. */
export async function writeWeights(c: Pick<Case, "weights">, path: string): Promise<WeightSource[]> {
  const pieces: Uint8Array[] = [];
  const sources: WeightSource[] = [];
  let offset = 0;
  for (const [name, { dtype, shape, values }] of c.weights) {
    const count = shape.length === 3 ? shape[0] : 1;
    const k = shape[shape.length - 1];
    const n = values.length / count / k;
    const bytes = isBlockDtype(dtype) ? blockBytes(dtype, n, k) : n * k * ELEMENT_BYTES[dtype];
    const parts = [];
    for (let i = 0; i < count; i++) {
      const raw = `${path}.raw`;
      writeFileSync(raw, values.subarray(i * n * k, (i + 1) * n * k));
      const to = new Uint8Array(bytes);
      await convertStored({ file: raw, offset: 0, bytes: n * k * 4 }, "f32", dtype, n, k, to);
      pieces.push(to);
      parts.push({ file: path, offset, bytes });
      offset += bytes;
      const padding = new Uint8Array((64 - (offset % 64)) % 64);
      pieces.push(padding);
      offset += padding.length;
    }
    sources.push({ name, stored: dtype, dtype, shape, parts });
  }
  writeFileSync(path, Buffer.concat(pieces));
  return sources;
}

/** The case as the CPU's kernels run it: fused and lowered. */
export function loweredOf(c: Case): Graph {
  return lowered(c.graph, () => true);
}

/** Arrays for the case's outputs, by name, filled so that unwritten elements stand out. */
export function outputsOf(c: Case): Record<string, Numbers> {
  return Object.fromEntries(
    c.outputs.map((t, i) => {
      const count = elements(t.shape, c.sizes);
      return [`${i}`, t.dtype === "i32" ? new Int32Array(count).fill(-7) : new Float32Array(count).fill(Number.NaN)];
    }),
  );
}

/** Runs a case as traced, or `graph` instead, and returns its outputs in order. */
export async function runCase(c: Case, backend: Backend, sources: readonly WeightSource[], graph = c.graph): Promise<Numbers[]> {
  const weights = await backend.load(sources);
  const states = new Map([...c.states].map(([name, s]) => [name, backend.state(s.dtype, s.shape)]));
  const program = backend.prepare(graph, c.sizes, weights, states);
  const outputs = outputsOf(c);
  await program.run(c.sizes, Object.fromEntries(c.inputs), outputs);
  program.dispose();
  for (const s of states.values()) s.dispose();
  weights.dispose();
  return Object.values(outputs);
}

/** The expected results of the CPU's kernels: the lowered case on the reference backend, which rounds as they do. */
export function expectedOf(c: Case, sources: readonly WeightSource[]): Promise<Numbers[]> {
  return runCase(c, referenceBackend(), sources, loweredOf(c));
}
