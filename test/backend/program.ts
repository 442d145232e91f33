/** Hand-written programs, record by record, such as no planner would produce. */
import { type Handle, type NativePlan, openAddon } from "../../src/backend/addon.ts";
import type { Numbers } from "../../src/backend/backend.ts";
import { DTYPE_CODES, PLACES, VALUE_WORDS } from "../../src/graph/plan.ts";

export interface Value {
  readonly place: keyof typeof PLACES;
  readonly index?: number;
  readonly offset?: number;
  readonly output?: number;
  readonly dtype?: keyof typeof DTYPE_CODES;
  readonly shape: readonly number[];
}

/** An op, the ids of its inputs and outputs, and its parameters. */
export type Written = readonly [op: string, inputs: readonly number[], outputs: readonly number[], params?: readonly number[]];

export function written(values: readonly Value[], calls: readonly Written[], arenaBytes: number): NativePlan {
  const words = new Int32Array(values.length * VALUE_WORDS);
  values.forEach(({ place, index = 0, offset = 0, output = -1, dtype = "f32", shape }, i) => {
    const dims = shape.flatMap((size) => [size, -1]);
    words.set([PLACES[place], index, offset, output, DTYPE_CODES[dtype], shape.length, ...dims], i * VALUE_WORDS);
  });
  const ops = [...new Set(calls.map(([op]) => op))];
  const params: number[] = [];
  const program = calls.flatMap(([op, inputs, outputs, given = []]) => {
    const first = params.length;
    params.push(...given);
    return [ops.indexOf(op), inputs.length, outputs.length, first, ...inputs, ...outputs];
  });
  return { ops, weights: [], values: words, calls: Int32Array.from(program), params: Float64Array.from(params), capacity: [], arenaBytes };
}

/** Runs all calls of a plan without weights or states. */
export async function execute(
  device: Handle,
  plan: NativePlan,
  count: number,
  inputs: readonly (Numbers | null)[],
  outputs: readonly (Numbers | null)[],
): Promise<void> {
  const addon = openAddon();
  const weights = await addon.load([]);
  const program = addon.prepare(device, plan, weights, []);
  await addon.run(
    device,
    program,
    [],
    inputs,
    outputs,
    Int32Array.from({ length: count }, (_, i) => i),
  );
  addon.disposeProgram(program);
}
