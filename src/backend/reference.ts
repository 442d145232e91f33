/**
 * The backend every other one is tested against: plain loops in TypeScript, one array a value, no tricks. Slow. It runs
 * the graph itself, not the flat program, so it also checks the planner.
 */
import { open } from "node:fs/promises";
import type { Call, Tensor } from "../graph/graph.ts";
import type { Plan } from "../graph/plan.ts";
import { fromF16, roundBf16, toF16 } from "../tensor/dtype.ts";
import { isBlockDtype, locateElement, roundToBlocks } from "../tensor/quantized.ts";
import { elements, type SymbolValues } from "../tensor/shape.ts";
import { isPacked, PACK, PACK_BYTES } from "../tensor/stored.ts";
import type { Backend, Numbers, Program, State, WeightSource, Weights } from "./backend.ts";
import { KERNELS, type Operand } from "./kernels.ts";

interface ReferenceWeights extends Weights {
  readonly values: ReadonlyMap<string, Float32Array>;
}
interface ReferenceState extends State {
  readonly values: Float32Array;
}

export function referenceBackend(): Backend {
  return {
    name: "reference",
    threads: 1,

    async load(sources: readonly WeightSource[]): Promise<ReferenceWeights> {
      const values = new Map<string, Float32Array>();
      for (const source of sources) values.set(source.name, await readWeight(source));
      const ownedBytes = [...values.values()].reduce((n, v) => n + v.byteLength, 0);
      return { names: [...values.keys()], mappedBytes: 0, ownedBytes, values, dispose: () => values.clear() };
    },

    state(_dtype, shape): ReferenceState {
      const count = elements(shape);
      return { bytes: count * 4, values: new Float32Array(count), dispose() {} };
    },

    prepare(plan: Plan, weights: Weights, states: ReadonlyMap<string, State>): Program {
      for (const op of plan.ops) if (!(op in KERNELS)) throw new Error(`internal: the reference backend has no kernel for the op '${op}'`);
      const bound = new Map<number, Numbers>();
      for (const t of plan.weights) bound.set(t.id, found((weights as ReferenceWeights).values.get(t.name ?? ""), t));
      for (const t of plan.states) bound.set(t.id, found((states.get(t.name ?? "") as ReferenceState | undefined)?.values, t));
      const seconds = plan.graph.calls.map(() => 0);
      return {
        async run(sizes, inputs, outputs) {
          const values = new Map(bound);
          plan.inputs.forEach((t, i) => {
            values.set(t.id, inputs[i]);
          });
          plan.outputs.forEach((t, i) => {
            values.set(t.id, outputs[i]);
          });
          plan.graph.calls.forEach((call, i) => {
            const start = performance.now();
            runCall(call, values, sizes);
            seconds[i] += (performance.now() - start) / 1000;
          });
        },
        seconds: () => seconds,
        dispose() {},
      };
    },

    dispose() {},
  };
}

function runCall(call: Call, values: Map<number, Numbers>, sizes: SymbolValues): void {
  const operand = (t: Tensor): Operand => {
    const dims = t.shape.map((d) => elements([d], sizes));
    let data = values.get(t.id);
    if (!data) {
      const n = elements(dims);
      data = t.dtype === "i32" ? new Int32Array(n) : new Float32Array(n).fill(Number.NaN); // a kernel must write all of it
      values.set(t.id, data);
    }
    return { dims, data, dtype: t.dtype };
  };
  KERNELS[call.op](call.inputs.map(operand), call.outputs.map(operand), call.params);
}

function found<T>(value: T | undefined, t: Tensor): T {
  if (value === undefined) throw new Error(`internal: the ${t.kind} ${t.name} was not loaded`);
  return value;
}

async function readWeight(source: WeightSource): Promise<Float32Array> {
  const out = new Float32Array(elements(source.shape));
  const each = out.length / source.parts.length;
  for (const [i, part] of source.parts.entries()) {
    const bytes = Buffer.alloc(part.bytes);
    const file = await open(part.file);
    try {
      const { bytesRead } = await file.read(bytes, 0, part.bytes, part.offset);
      if (bytesRead !== part.bytes) throw new Error(`${part.file}: ends within the tensor ${source.name}`);
    } finally {
      await file.close();
    }
    decode(bytes, source, out.subarray(i * each, (i + 1) * each));
  }
  if (source.dtype !== source.stored) round(out, source);
  return out;
}

/** Rounds in place to what the format that was asked for holds. */
function round(values: Float32Array, { dtype, shape }: WeightSource): void {
  const width = shape[shape.length - 1];
  if (dtype === "bf16") for (let i = 0; i < values.length; i++) values[i] = roundBf16(values[i]);
  if (dtype === "f16") for (let i = 0; i < values.length; i++) values[i] = fromF16(toF16(values[i]));
  if (isBlockDtype(dtype)) for (let i = 0; i < values.length; i += width) roundToBlocks(dtype, values.subarray(i, i + width));
}

/** Stored numbers as float32. */
export function decode(bytes: Buffer, { stored, shape }: Pick<WeightSource, "stored" | "shape">, out: Float32Array): void {
  const k = shape[shape.length - 1];
  const word = new DataView(new ArrayBuffer(4));
  for (let i = 0; i < out.length; i++) {
    if (stored === "f32") out[i] = bytes.readFloatLE(i * 4);
    else if (stored === "f16") out[i] = fromF16(bytes.readUInt16LE(i * 2));
    else if (stored === "bf16") {
      word.setUint32(0, bytes.readUInt16LE(i * 2) << 16);
      out[i] = word.getFloat32(0);
    } else if (isBlockDtype(stored)) {
      const { byte, highNibble, scale } = locateElement(stored, k, Math.floor(i / k), i % k);
      const number = stored === "int8" ? bytes[byte] - 128 : ((highNibble ? bytes[byte] >> 4 : bytes[byte]) & 15) - 8;
      out[i] = number * fromF16(bytes.readUInt16LE(scale));
    } else if (isPacked(stored)) {
      const [block, at] = [Math.floor(i / PACK) * PACK_BYTES[stored], i % PACK];
      const nibbles = bytes[block + 2 + (at % (PACK / 2))];
      const number = stored === "q8_0" ? bytes.readInt8(block + 2 + at) : (at < PACK / 2 ? nibbles & 15 : nibbles >> 4) - 8;
      out[i] = number * fromF16(bytes.readUInt16LE(block));
    } else throw new Error(`internal: weights cannot be stored as ${stored}`);
  }
}
