/**
 * What backends in native code share: a planned program as the addon takes it and as the engine runs it (which calls, inputs and sizes the
 * requested outputs need), and states of plain numbers. Knows no addon function.
 */
import type { Tensor } from "../graph/call.ts";
import { needed } from "../graph/needed.ts";
import type { Plan } from "../graph/plan.ts";
import type { Dtype } from "../tensor/dtype.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { Handle, NativePlan } from "./addon.ts";
import { checkRange, fitting } from "./arrays.ts";
import type { Numbers, Program, State } from "./backend.ts";

/** A weight set or state with the addon's handle. */
export type Held<T> = T & { readonly handle: Handle };

/** The plan as the addon takes it. @throws an `internal:` error that names an op without a kernel */
export function nativePlan(planned: Plan, capacity: SymbolValues, backend: string, has: (op: string) => boolean): NativePlan {
  const missing = planned.ops.find((op) => !has(op));
  if (missing) throw new Error(`internal: the ${backend} backend has no kernel for the op '${missing}'`);
  const { ops, values, program, params, arenaBytes, weights, symbols } = planned;
  return {
    ops,
    values,
    calls: program,
    params,
    arenaBytes,
    weights: weights.map((t) => t.name as string),
    capacity: symbols.map((s) => capacity[s] ?? UNBOUNDED),
  };
}

/** The handles of a plan's states, in its order. */
export function stateHandles(planned: Plan, states: ReadonlyMap<string, State>): Handle[] {
  return planned.states.map((t) => {
    const state = states.get(t.name as string);
    if (!state) throw new Error(`internal: the state ${t.name} was not given`);
    return (state as Held<State>).handle;
  });
}

/** A state in native memory; only plain numbers can be read and written. */
export function heldState(
  handle: Handle,
  dtype: Dtype,
  bytes: number,
  memory: { read(byteOffset: number, to: Uint8Array): void; write(byteOffset: number, from: Uint8Array): void; dispose(): void },
): Held<State> {
  const check = () => {
    if (dtype !== "f32" && dtype !== "i32")
      throw new Error(`internal: a state of ${dtype} has a layout private to the backend; only float32 can be read and written`);
  };
  return {
    bytes,
    handle,
    read(at = 0, count = bytes / 4 - at) {
      check();
      checkRange(bytes / 4, at, count);
      const values = new Float32Array(count);
      memory.read(at * 4, new Uint8Array(values.buffer));
      return values;
    },
    write(values, at) {
      check();
      checkRange(bytes / 4, at, values.length);
      memory.write((at ?? 0) * 4, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
    },
    dispose: () => memory.dispose(),
  };
}

/** Capacity of symbols that no value in the workspace depends on. */
const UNBOUNDED = 2 ** 31 - 1;

/** The calls, inputs and symbols that a run needs for its requested outputs. */
interface Errand {
  /** Positions in the plan's calls. */
  readonly calls: Int32Array;
  readonly inputs: ReadonlySet<Tensor>;
  readonly symbols: ReadonlySet<string>;
}

/** What runs a planned program in native code. */
export interface Runs {
  run(
    sizes: readonly number[],
    inputs: readonly (Numbers | null)[],
    outputs: readonly (Numbers | null)[],
    calls: Int32Array,
  ): Promise<void>;
  seconds(): readonly number[];
  dispose(): void;
}

/** A program of a backend whose plans run in native code. */
export function plannedProgram(planned: Plan, native: Runs): Program {
  const errands = new Map<string, Errand>();
  const errandFor = (names: readonly string[]): Errand => {
    const key = names.join("\n");
    const known = errands.get(key) ?? errandOf(planned, names);
    errands.set(key, known);
    return known;
  };
  const returned = [...planned.graph.outputs];
  return {
    calls: planned.calls,
    async run(sizes, inputs, outputs) {
      const errand = errandFor(Object.keys(outputs));
      return native.run(
        planned.symbols.map((s) => {
          if (sizes[s] === undefined && errand.symbols.has(s)) throw new Error(`internal: the size '${s}' was not given`);
          return sizes[s] ?? 0;
        }),
        planned.inputs.map((t) => (errand.inputs.has(t) ? fitting(t, `input '${t.name}'`, inputs[t.name as string], sizes) : null)),
        returned.map(([name, t]) => (outputs[name] ? fitting(t, `output '${name}'`, outputs[name], sizes) : null)),
        errand.calls,
      );
    },
    seconds: () => native.seconds(),
    dispose: () => native.dispose(),
  };
}

function errandOf({ graph, calls }: Plan, names: readonly string[]): Errand {
  const positions = new Map(calls.map((call, i) => [call, i]));
  const wanted = needed(graph, names); // includes calls that became views, which the plan does not have
  const touched = wanted.flatMap((call) => [...call.inputs, ...call.outputs]);
  return {
    calls: Int32Array.from(wanted.flatMap((call) => positions.get(call) ?? [])),
    inputs: new Set(touched.filter((t) => t.kind === "input")),
    symbols: new Set(touched.flatMap((t) => t.shape.flatMap((d) => (typeof d === "number" ? [] : [d.symbol])))),
  };
}
