/** Random graphs for the planner's tests: any mix of row-wise ops, with values used once, several times or never. */
import fc from "fast-check";
import { Graph, type Tensor } from "../../src/graph/graph.ts";
import { symbol } from "../../src/tensor/shape.ts";

export interface RandomGraph {
  readonly graph: Graph;
  /** Values that a run can return: the graph's outputs `0`, `1`, ... */
  readonly outputs: readonly Tensor[];
  /** Shapes of the weights, all f32. */
  readonly weights: readonly Tensor[];
  readonly rows: number;
}

export const WIDTHS = [1, 5, 16, 33];

const step = fc.record({
  op: fc.constantFrom("add", "siluMul", "rmsNorm", "linear", "gather", "route", "view", "scale"),
  /** Picks among the existing values, modulo their number. */
  a: fc.nat(1000),
  b: fc.nat(1000),
  width: fc.constantFrom(...WIDTHS),
});

/** `rows` is symbolic in the graph. */
export const randomGraph: fc.Arbitrary<RandomGraph> = fc
  .record({
    rows: fc.integer({ min: 1, max: 40 }),
    steps: fc.array(step, { minLength: 1, maxLength: 25 }),
    kept: fc.array(fc.nat(1000), { minLength: 1, maxLength: 4 }),
  })
  .map(({ rows, steps, kept }) => {
    const graph = new Graph();
    const index = graph.input("index", [symbol("rows")], "i32");
    const values: Tensor[] = WIDTHS.map((w) => graph.input(`x${w}`, [symbol("rows"), w], "f32"));
    const weights: Tensor[] = [];
    const weight = (...shape: number[]) => {
      weights.push(graph.weight(`w${weights.length}`, shape, "f32"));
      return weights[weights.length - 1];
    };
    for (const { op, a, b, width } of steps) {
      const x = values[a % values.length];
      const wide = Number(x.shape[1]);
      const same = values.filter((v) => v.shape[1] === x.shape[1]);
      const y = same[b % same.length];
      if (op === "add" || op === "siluMul") values.push(graph[op](x, y));
      else if (op === "rmsNorm") values.push(graph.rmsNorm(x, weight(wide), 1e-5));
      else if (op === "linear") values.push(graph.linear(x, weight(width, wide), b % 2 ? weight(width) : undefined));
      else if (op === "scale") values.push(graph.scale(x, 0.5));
      else if (op === "view") values.push(viewed(graph, x, b));
      else if (op === "gather") values.push(graph.gather(x, index));
      else values.push(graph.route(x, weight(5, wide), weight(5), 5, 0).weights); // its other outputs are never used
    }
    const computed = values.filter((v) => v.kind === "computed");
    const outputs = [...new Set(kept.map((k) => computed[k % computed.length]))];
    outputs.forEach((t, i) => {
      graph.output(`${i}`, t);
    });
    return { graph, outputs, weights, rows };
  });

/** The same numbers in the same shape, by way of other shapes, some of which are not views. */
function viewed(g: Graph, x: Tensor, how: number): Tensor {
  const [rows, width] = [symbol("rows"), Number(x.shape[1])];
  if (how % 3 === 0) return g.reshape(g.transpose(g.reshape(x, [rows, width, 1]), 1, 2), [rows, width]);
  if (how % 3 === 1) return g.transpose(g.transpose(x, 0, 1), 0, 1);
  return g.slice(x, 0, 0, rows);
}
