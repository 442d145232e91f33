/** Planned programs as the engine runs them: which calls, inputs and sizes the requested outputs need. Knows no native code. */
import type { Tensor } from "../graph/call.ts";
import { needed } from "../graph/needed.ts";
import type { Plan } from "../graph/plan.ts";
import { fitting } from "./arrays.ts";
import type { Numbers, Program } from "./backend.ts";

/** Capacity of symbols that no value in the workspace depends on. */
export const UNBOUNDED = 2 ** 31 - 1;

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
