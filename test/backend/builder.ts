/** Builds the test cases of kernels: a graph with its inputs, weights and states, and what to compare. */
import type { Numbers } from "../../src/backend/backend.ts";
import type { OpTable } from "../../src/graph/call.ts";
import { Graph, type Tensor } from "../../src/graph/graph.ts";
import type { KvDtype } from "../../src/tensor/dtype.ts";
import { type SymbolValues, symbol } from "../../src/tensor/shape.ts";

export type MatrixDtype = "f32" | "f16" | "bf16" | "int8" | "int4" | "fp8";

export interface Case {
  readonly name: string;
  /** As traced; backends fuse and lower it. */
  readonly graph: Graph;
  /** Values to compare; the graph's outputs are named `0`, `1`, ... after their positions here. */
  readonly outputs: readonly Tensor[];
  readonly sizes: SymbolValues;
  readonly inputs: ReadonlyMap<string, Numbers>;
  readonly weights: ReadonlyMap<string, { readonly dtype: MatrixDtype; readonly shape: readonly number[]; readonly values: Float32Array }>;
  readonly states: ReadonlyMap<string, { readonly dtype: KvDtype | "i32"; readonly shape: readonly number[] }>;
  /** Largest difference allowed, relative to the largest value. */
  readonly tolerance: number;
}

export const RAGGED = [1, 7, 31, 33, 257];
/** Those that all backends have kernels for. */
export const MATRIX_DTYPES: readonly MatrixDtype[] = ["f32", "f16", "bf16", "int8", "int4"];

/** Repeatable numbers between -1 and 1. */
export function noise(n: number, seed: number): Float32Array {
  let state = seed * 2654435761 + 1;
  return Float32Array.from({ length: n }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  });
}

export class Builder {
  readonly g: Graph;
  readonly inputs = new Map<string, Numbers>();
  readonly weights = new Map<string, { dtype: MatrixDtype; shape: readonly number[]; values: Float32Array }>();
  readonly states = new Map<string, { dtype: KvDtype | "i32"; shape: readonly number[] }>();
  #seed = 1;

  /** @param table rows of the ops that may occur; default: those that models are traced with */
  constructor(table?: OpTable) {
    this.g = new Graph(table);
  }

  /** Activations [rows, n] of noise, or `values` if given. */
  input(name: string, shape: (number | ReturnType<typeof symbol>)[], values: Numbers): Tensor {
    this.inputs.set(name, values);
    return this.g.input(name, shape, values instanceof Int32Array ? "i32" : "f32");
  }

  rows(name: string, rows: number, n: number): Tensor {
    return this.input(name, [symbol("rows"), n], noise(rows * n, this.#seed++));
  }

  weight(name: string, shape: number[], dtype: MatrixDtype = "f32"): Tensor {
    this.weights.set(name, {
      dtype,
      shape,
      values: noise(
        shape.reduce((a, b) => a * b),
        this.#seed++,
      ),
    });
    return this.g.weight(name, shape, dtype);
  }

  state(name: string, shape: number[], dtype: KvDtype | "i32"): Tensor {
    this.states.set(name, { dtype, shape });
    return this.g.state(name, shape, dtype);
  }

  done(name: string, outputs: readonly Tensor[], sizes: SymbolValues, tolerance = 2e-6): Case {
    outputs.forEach((t, i) => {
      this.g.output(`${i}`, t);
    });
    return { name, graph: this.g, outputs, sizes, inputs: this.inputs, weights: this.weights, states: this.states, tolerance };
  }
}
