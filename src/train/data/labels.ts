/** The classes of a classifier: names to ids, in a fixed order. Knows no files. */
import { DataError, RowError, shown } from "./fault.ts";

export const PROBLEMS = ["single_label_classification", "multi_label_classification", "regression"] as const;
/** The problem types of transformers. */
export type Problem = (typeof PROBLEMS)[number];
type Given = string | number | readonly (string | number)[];

/** Classes that data may have. */
const MOST_CLASSES = 100_000;

export class Labels {
  /** Null until the first row tells. */
  #problem: Problem | null;
  readonly #separator: string | null;
  readonly #fixed: boolean;
  readonly #counts: Map<string, number>;
  #ids: ReadonlyMap<string, number> | null = null;

  /**
   * @param names of the classes in the order of their ids; null: those that the data has
   * @param problem null: several classes for a row whose label is a list, one for others
   * @param separator between the classes of a label that is a text
   */
  constructor(names: readonly string[] | null, problem: Problem | null, separator: string | null) {
    const twice = names?.find((name, i) => names.indexOf(name) < i);
    if (twice !== undefined) throw new DataError(`labels: ${shown(twice)} is there twice`);
    this.#problem = problem ?? (separator === null ? null : "multi_label_classification");
    this.#separator = separator;
    this.#fixed = names !== null;
    this.#counts = new Map((names ?? []).map((name) => [name, 0]));
  }

  get problem(): Problem {
    return this.#problem ?? "single_label_classification";
  }

  /** The names in the order of their ids: as given, else whole numbers by size, and names by their characters. Empty for regression. */
  get names(): readonly string[] {
    const names = [...this.#counts.keys()];
    if (this.#fixed) return names;
    if (names.every((name) => /^-?\d{1,15}$/.test(name))) return names.sort((a, b) => Number(a) - Number(b));
    return names.sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
  }

  /** Rows of each class. */
  get counts(): ReadonlyMap<string, number> {
    return new Map(this.names.map((name) => [name, this.#counts.get(name) ?? 0]));
  }

  /** Takes note of a row's label. Throws RowError for one that fits neither the classes nor the problem. */
  add(label: Given): void {
    this.#problem ??= Array.isArray(label) ? "multi_label_classification" : "single_label_classification";
    if (this.problem === "regression") {
      numberOf(label);
      return;
    }
    const names = this.#namesOf(label);
    for (const name of names)
      if (!this.#counts.has(name)) {
        if (this.#fixed) throw new RowError(`the label ${shown(name)} is none of the classes ${listed([...this.#counts.keys()])}`);
        if (this.#counts.size >= MOST_CLASSES)
          throw new RowError(`there are more than ${MOST_CLASSES} classes; for numbers give problem_type: regression`);
      }
    for (const name of names) this.#counts.set(name, (this.#counts.get(name) ?? 0) + 1);
    this.#ids = null;
  }

  /** The label as the model learns it: a class, a 0 or 1 for each, or the number. Call it after all `add`. */
  idsOf(label: Given): number | number[] {
    if (this.problem === "regression") return numberOf(label);
    this.#ids ??= new Map(this.names.map((name, id) => [name, id]));
    const ids = this.#ids;
    const own = this.#namesOf(label).map((name) => ids.get(name) ?? -1);
    return this.problem === "single_label_classification" ? own[0] : Array.from(ids.values(), (id) => (own.includes(id) ? 1 : 0));
  }

  #namesOf(label: Given): string[] {
    if (this.problem === "multi_label_classification") {
      if (typeof label === "string" && this.#separator !== null)
        return label.split(this.#separator).flatMap((name) => (name.trim() === "" ? [] : [name.trim()]));
      if (Array.isArray(label)) return label.map(String);
      throw new RowError(`label must be a list of classes, not ${shown(label)} (label_separator splits a text)`);
    }
    if (Array.isArray(label))
      throw new RowError(`label must be one class, not ${shown(label)} (problem_type: multi_label_classification takes several)`);
    return [String(label)];
  }
}

function numberOf(label: Given): number {
  const value = typeof label === "string" && label.trim() !== "" ? Number(label) : label;
  if (typeof value !== "number" || !Number.isFinite(value))
    throw new RowError(`label must be a number for regression, not ${shown(label)}`);
  return value;
}

function listed(names: readonly string[]): string {
  const some = names.slice(0, 8).map(shown).join(", ");
  return names.length > 8 ? `${some} and ${names.length - 8} more` : some;
}
