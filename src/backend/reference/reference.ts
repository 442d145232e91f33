/**
 * The backend that all others are tested against: plain loops in TypeScript, one array per value, no tricks. Slow. It runs
 * graphs as they are, before or after any pass, so it tests the passes too.
 */
import type { Call, Tensor } from "../../graph/call.ts";
import type { Graph } from "../../graph/graph.ts";
import { needed } from "../../graph/needed.ts";
import { elements, type SymbolValues } from "../../tensor/shape.ts";
import { checkRange, fitting } from "../arrays.ts";
import type { Backend, Numbers, Program, State, WeightSource, Weights } from "../backend.ts";
import { CPU_DEFAULTS } from "../cpu.ts";
import { hostMemory } from "../memory.ts";
import { KERNELS } from "./kernels.ts";
import type { Kernel, Operand } from "./operand.ts";
import { readWeight } from "./weights.ts";

interface ReferenceWeights extends Weights {
  readonly values: ReadonlyMap<string, Float32Array>;
}
interface ReferenceState extends State {
  readonly values: Float32Array;
}

/** @param kernels those of another lowering than the CPU's, by op */
export function referenceBackend(kernels: Readonly<Record<string, Kernel>> = KERNELS): Backend {
  return {
    name: "reference",
    device: "reference, 1 thread",
    threads: 1,
    trains: true,
    defaults: { ...CPU_DEFAULTS, matrixDtype: (stored) => stored },
    memory: hostMemory,

    async load(sources: readonly WeightSource[]): Promise<ReferenceWeights> {
      const values = new Map<string, Float32Array>();
      for (const source of sources) values.set(source.name, await readWeight(source));
      const ownedBytes = [...values.values()].reduce((n, v) => n + v.byteLength, 0);
      return {
        names: [...values.keys()],
        mappedBytes: 0,
        ownedBytes,
        values,
        placement: () => ({ state: "resident", movedBytes: 0, mappedBytes: 0, why: "" }),
        settled: Promise.resolve(),
        pages: async () => ({ huge: 0, small: 0 }),
        lost: () => false,
        dispose: () => values.clear(),
      };
    },

    state(_dtype, shape): ReferenceState {
      const values = new Float32Array(elements(shape));
      return {
        bytes: values.byteLength,
        values,
        read(at = 0, count = values.length - at) {
          checkRange(values.length, at, count);
          return values.slice(at, at + count);
        },
        write(numbers, at) {
          checkRange(values.length, at, numbers.length);
          values.set(numbers, at ?? 0);
        },
        dispose() {},
      };
    },

    prepare(graph: Graph, _capacity: SymbolValues, weights: Weights, states: ReadonlyMap<string, State>): Program {
      const bodies = new Map(graph.calls.map((call) => [call, kernelOf(kernels, call.op)]));
      const bound = new Map<Tensor, Numbers>();
      for (const t of graph.values) {
        if (t.kind === "weight") bound.set(t, found((weights as ReferenceWeights).values.get(t.name ?? ""), t));
        if (t.kind === "state") bound.set(t, found((states.get(t.name ?? "") as ReferenceState | undefined)?.values, t));
      }
      const seconds = new Map(graph.calls.map((call) => [call, 0]));
      return {
        calls: graph.calls,
        async run(sizes, inputs, outputs) {
          const values = new Map(bound);
          const give = (t: Tensor, label: string, data: Numbers) => {
            values.set(t, fitting(t, label, data, sizes).subarray(0, elements(t.shape, sizes)));
          };
          for (const t of graph.values) {
            const data = t.kind === "input" ? inputs[t.name as string] : undefined;
            if (data) give(t, `input '${t.name}'`, data);
          }
          for (const [name, data] of Object.entries(outputs)) {
            const t = graph.outputs.get(name);
            if (t) give(t, `output '${name}'`, data);
          }
          for (const call of needed(graph, Object.keys(outputs))) {
            const start = performance.now();
            runCall(call, bodies.get(call) as Kernel, values, sizes);
            seconds.set(call, (seconds.get(call) ?? 0) + (performance.now() - start) / 1000);
          }
        },
        seconds: () => graph.calls.map((call) => seconds.get(call) ?? 0),
        dispose() {},
      };
    },

    dispose() {},
  };
}

function kernelOf(kernels: Readonly<Record<string, Kernel>>, op: string): Kernel {
  if (!Object.hasOwn(kernels, op)) throw new Error(`internal: the reference backend has no kernel for the op '${op}'`);
  return kernels[op];
}

function runCall(call: Call, kernel: Kernel, values: Map<Tensor, Numbers>, sizes: SymbolValues): void {
  const operand = (t: Tensor): Operand => {
    const dims = t.shape.map((d) => elements([d], sizes));
    let data = values.get(t);
    if (!data) {
      if (t.kind === "input") throw new Error(`internal: ${call.op} reads the input '${t.name}', which was not given`);
      const n = elements(dims);
      data = t.dtype === "i32" ? new Int32Array(n) : new Float32Array(n).fill(Number.NaN); // exposes elements that a kernel fails to write
      values.set(t, data);
    }
    return { dims, data, dtype: t.dtype };
  };
  kernel(call.inputs.map(operand), call.outputs.map(operand), call.params);
}

function found<T>(value: T | undefined, t: Tensor): T {
  if (value === undefined) throw new Error(`internal: the ${t.kind} ${t.name} was not loaded`);
  return value;
}
