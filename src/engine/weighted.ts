/** Adapters made of others, as PEFT's `add_weighted_adapter` makes them. Knows no engine. */
import type { Branch, Branches } from "./adapters.ts";

/**
 * `cat`: the ranks side by side, which computes exactly the weighted sum of the branches. `linear`: the weighted sums of all A and of all B,
 * for adapters of one rank; their product has mixed terms too.
 */
export const COMBINATIONS = ["cat", "linear"] as const;
export type Combination = (typeof COMBINATIONS)[number];

export interface Weighted {
  readonly name: string;
  readonly branches: Branches;
  readonly weight: number;
}

/** Throws a RangeError for `linear` with ranks that differ or negative weights, naming the adapter. */
export function combined(parts: readonly Weighted[], combination: Combination): Branches {
  const modules = new Set(parts.flatMap(({ branches }) => [...branches.keys()]));
  return new Map(
    [...modules].map((module) => {
      const all = parts.flatMap(({ name, branches, weight }) => {
        const branch = branches.get(module);
        return branch ? [{ name, branch, factor: weight * branch.scale }] : [];
      });
      return [module, combination === "cat" ? sideBySide(all) : summed(all, module)];
    }),
  );
}

type Part = { readonly name: string; readonly branch: Branch; readonly factor: number };

/** A of all parts one below the other; B, with the factors, one beside the other. */
function sideBySide(parts: readonly Part[]): Branch {
  const rank = parts.reduce((sum, { branch }) => sum + branch.rank, 0);
  const [{ branch: first }] = parts;
  // A [experts, rank, in], B [experts, out, rank] and a table [vocab, rank] are runs of all ranks' numbers: per expert, and per row.
  const join = (half: "a" | "b", runs: number) => {
    const width = first[half].length / first.rank / runs;
    const out = new Float32Array(rank * width * runs);
    let at = 0;
    for (let i = 0; i < runs; i++)
      for (const { branch, factor } of parts) {
        const run = branch.rank * width;
        const values = branch[half].subarray(i * run, (i + 1) * run);
        out.set(half === "b" ? values.map((x) => x * factor) : values, at);
        at += run;
      }
    return out;
  };
  const runs = first.table ? first.a.length / first.rank : first.experts;
  return { ...first, rank, scale: 1, a: join("a", runs), b: join("b", first.b.length / first.rank) };
}

function summed(parts: readonly Part[], module: string): Branch {
  const [{ branch: first, name: firstName }] = parts;
  for (const { name, branch, factor } of parts) {
    if (branch.rank !== first.rank)
      throw new RangeError(
        `combination_type 'linear' needs one rank: ${module} has rank ${first.rank} in '${firstName}' and ${branch.rank} in '${name}'; use 'cat'`,
      );
    if (factor < 0) throw new RangeError(`combination_type 'linear' takes no negative weight, and that of '${name}' is one; use 'cat'`);
  }
  const sum = (half: "a" | "b") => {
    const out = new Float32Array(first[half].length);
    for (const { branch, factor } of parts) {
      const [values, root] = [branch[half], Math.sqrt(factor)];
      for (let i = 0; i < out.length; i++) out[i] += root * values[i];
    }
    return out;
  };
  return { ...first, scale: 1, a: sum("a"), b: sum("b") };
}
