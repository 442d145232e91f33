/**
 * Augments a data set: keeps its rows, and adds changed copies of a share of them. Two passes: the first counts and finds duplicates, the second
 * chooses and writes. Every choice depends on the seed and the row's number alone, so that a run again gives the same bytes.
 */
import { BadRows, DataError } from "../data/fault.ts";
import { Ledger } from "../data/ledger.ts";
import { type DataOptions, readOptions } from "../data/options.ts";
import { Source, type SourceRow } from "../data/source.ts";
import type { Fields } from "../data/table.ts";
import { Random } from "../random.ts";
import { Copier, type CopyOptions, type Made, METHODS, type Method } from "./copies.ts";
import { Duplicates } from "./duplicates.ts";
import { type Target, textsOf, USUAL } from "./fields.ts";
import type { AugmentReport, MethodReport, Sample } from "./report.ts";
import { Reservoir } from "./reservoir.ts";
import { RowWriter } from "./writer.ts";

export interface AugmentOptions
  extends Pick<DataOptions, "format" | "layout" | "columns" | "header" | "delimiter" | "max_bad_rows" | "max_row_bytes">,
    Omit<CopyOptions, "copies" | "alpha" | "seed"> {
  /** The copies of a row take turns in these. None: only duplicates are removed. */
  readonly methods: readonly Method[];
  /** Share of the rows that get copies, of those with a text to change. Default 0.1. */
  readonly fraction?: number;
  /** Copies of each (EDA's n_aug). Default 1. */
  readonly copies?: number;
  /** Share of a text's words that an edit changes (EDA's alpha). Default 0.1. */
  readonly alpha?: number;
  readonly seed?: number;
  /** What is changed. Default: what a user writes. */
  readonly targets?: readonly Target[];
  /** Leave out rows at least as similar as this to an earlier one, by the Jaccard similarity of their texts. Default: none. */
  readonly dedupe?: number;
  /** Write the new rows alone. */
  readonly only_new?: boolean;
  /** A column that says how a new row was made; empty in others. */
  readonly mark?: string;
  /** Samples of the report. Default 20. */
  readonly samples?: number;
  readonly onProgress?: (progress: { readonly done: number; readonly total: number; readonly what: string }) => void;
}

/** Rows that are worked on ahead of the one being written. */
const AHEAD = 64;

/** Writes the augmented rows to `output`. Throws DataError for data that cannot be read, and options that do not fit. */
export async function augment(source: string | readonly string[], output: string, options: AugmentOptions): Promise<AugmentReport> {
  const run = new Augmentation(source, output, options);
  return run.run();
}

class Augmentation {
  readonly #input: string | readonly string[];
  readonly #output: string;
  readonly #options: AugmentOptions & Required<Pick<AugmentOptions, "fraction" | "copies" | "alpha" | "seed" | "samples">>;
  readonly #read: ReturnType<typeof readOptions>;
  readonly #methods = new Map<Method, { made: number; readonly rejected: Map<string, number> }>();
  readonly #labels = { before: new Map<string, number>(), after: new Map<string, number>() };
  #written = 0;

  constructor(input: string | readonly string[], output: string, options: AugmentOptions) {
    this.#input = input;
    this.#output = output;
    this.#options = { fraction: 0.1, copies: 1, alpha: 0.1, seed: 0, samples: 20, ...withoutUndefined(options) };
    const { format, layout, columns, header, delimiter, max_bad_rows, max_row_bytes } = options;
    this.#read = readOptions(withoutUndefined({ format, layout, columns, header, delimiter, max_bad_rows, max_row_bytes }));
    check(this.#options);
    for (const method of options.methods) this.#methods.set(method, { made: 0, rejected: new Map() });
  }

  async run(): Promise<AugmentReport> {
    const source = await Source.open(this.#input, this.#read);
    const writer = new RowWriter(this.#output);
    try {
      const first = await this.#count(source);
      if (first.rows === 0) throw new DataError("there are no rows to augment");
      const samples = await this.#write(source, writer, first);
      await writer.end();
      return this.#report(source, first, samples);
    } catch (error) {
      await writer.abandon();
      throw error;
    } finally {
      await source.close();
    }
  }

  /** The first pass. */
  async #count(source: Source): Promise<Counted> {
    const { dedupe, signal, onProgress, samples } = this.#options;
    const bad = new BadRows(this.#read.max_bad_rows);
    const duplicates = dedupe === undefined ? null : new Duplicates(dedupe);
    const kept = new Ledger();
    const dropped = new Set<number>();
    const found: AugmentReport["duplicateSamples"][number][] = [];
    let [rows, eligible] = [0, 0];
    const earlier = async (number: number) => {
      const { file, offset, bytes: length, line } = kept.at(number);
      return this.#wholeText((await source.read(file, { offset, length, line })).fields);
    };
    const placeOf = (file: number, line: number) => placeText(source, file, line);
    await source.pass(
      async ({ file, place, fields, layout }) => {
        const { places } = textsOf(fields, this.#read.columns, this.#options.targets ?? USUAL[layout]);
        const { offset, length: bytes, line } = place;
        const text = duplicates && this.#wholeText(fields);
        const like = duplicates && text !== null ? await duplicates.add(text, earlier) : null;
        if (like !== null) {
          dropped.add(rows);
          if (found.length < samples && text !== null) {
            const other = kept.at(like.of);
            found.push({
              place: placeOf(file, line),
              of: placeOf(other.file, other.line),
              similarity: like.similarity,
              text: text.slice(0, 200),
            });
          }
        } else {
          if (duplicates) kept.push({ file, offset, bytes, line, part: 0, tokens: 0, trained: 0, input: 0 });
          if (places.length > 0) eligible++;
        }
        if (++rows % 256 === 0) onProgress?.({ done: rows, total: 0, what: "reading" });
      },
      (row) => bad.add(row),
      signal,
    );
    bad.end();
    return { rows, eligible, dropped, duplicateSamples: found, badRows: bad.count };
  }

  /** The second pass: writes rows in order, while copies of those that follow are made. */
  async #write(source: Source, writer: RowWriter, { rows, eligible, dropped }: Counted): Promise<Sampled> {
    const { signal, fraction, copies, methods, only_new, seed, onProgress } = this.#options;
    const wanted = methods.length === 0 ? 0 : Math.min(eligible, Math.max(1, Math.round(fraction * eligible)));
    const choice = new Random(seed, "choice");
    const copier = new Copier(this.#options);
    const sampled = new Reservoir<Sample>(this.#options.samples, new Random(seed, "samples"));
    let [row, seen, chosen] = [0, 0, 0];
    const queue: { readonly place: string; readonly fields: Fields; readonly made: Promise<Made[]> }[] = [];
    const flush = async (most: number) => {
      while (queue.length > most) {
        const next = queue.shift();
        if (next) await this.#finish(writer, next.place, next.fields, await next.made, sampled);
      }
    };
    try {
      await source.pass(
        async (taken) => {
          const number = row++;
          if (row % 256 === 0) onProgress?.({ done: row, total: rows, what: "augmenting" });
          if (dropped.has(number)) return;
          const { places, answers } = textsOf(taken.fields, this.#read.columns, this.#options.targets ?? USUAL[taken.layout]);
          let made: Promise<Made[]> = Promise.resolve([]);
          // Knuth's selection sampling: exactly so many, each set of them equally likely.
          if (places.length > 0 && choice.real() * (eligible - seen++) < wanted - chosen) {
            made = copier.of(taken.fields, number, chosen * copies, places, answers);
            chosen++;
          }
          made.catch(() => {}); // it is awaited in its turn
          queue.push({ place: placeText(source, taken.file, taken.place.line), fields: taken.fields, made });
          this.#countLabel(taken, only_new ? 0 : 1);
          await flush(AHEAD);
        },
        () => {}, // counted in the first pass
        signal,
      );
      await flush(0);
    } finally {
      await Promise.allSettled(queue.map(({ made }) => made));
    }
    return { chosen, samples: sampled.items };
  }

  async #finish(writer: RowWriter, place: string, fields: Fields, made: readonly Made[], sampled: Reservoir<Sample>): Promise<void> {
    const { only_new, mark } = this.#options;
    const marked = (row: Fields, how: string) => (mark === undefined ? row : { ...row, [mark]: how });
    if (!only_new) await writer.write(marked(fields, ""));
    if (!only_new) this.#written++;
    for (const copy of made) {
      const counts = this.#methods.get(copy.method);
      if ("reason" in copy) counts?.rejected.set(copy.reason, (counts.rejected.get(copy.reason) ?? 0) + 1);
      else {
        if (counts) counts.made++;
        await writer.write(marked(copy.fields, copy.method));
        this.#written++;
        this.#addLabel(this.#labels.after, copy.fields, 1);
        sampled.add({ method: copy.method, place, before: copy.places.map(({ text }) => text), after: copy.texts });
      }
    }
  }

  /** All texts of a row, for comparisons. */
  #wholeText(fields: Fields): string {
    const { places, answers } = textsOf(fields, this.#read.columns, [
      "user",
      "system",
      "assistant",
      "instruction",
      "input",
      "output",
      "prompt",
      "completion",
      "text",
    ]);
    return [...places.map(({ text }) => text), ...answers].join("\n");
  }

  #countLabel({ row, fields }: SourceRow, after: number): void {
    if (row.kind !== "label") return;
    this.#addLabel(this.#labels.before, fields, 1);
    this.#addLabel(this.#labels.after, fields, after);
  }

  #addLabel(counts: Map<string, number>, fields: Fields, n: number): void {
    const label = fields[this.#read.columns["label"] ?? "label"];
    if (label === undefined || label === null) return;
    for (const name of Array.isArray(label) ? label : [label]) counts.set(String(name), (counts.get(String(name)) ?? 0) + n);
  }

  #report(source: Source, counted: Counted, { chosen, samples }: Sampled): AugmentReport {
    const { methods, fraction, copies, alpha, seed, targets, keep, through, dedupe, only_new, mark } = this.#options;
    const reports = [...this.#methods].map(([name, { made, rejected }]): [string, MethodReport] => [
      name,
      { made, rejected: Object.fromEntries([...rejected].sort()) },
    ]);
    const sorted = (counts: Map<string, number>) => Object.fromEntries([...counts].sort(([a], [b]) => (a < b ? -1 : 1)));
    return {
      input: source.files.map(({ path }) => path),
      output: this.#output,
      options: withoutUndefined({
        methods,
        fraction,
        copies,
        alpha,
        seed,
        targets,
        keep,
        through,
        dedupe,
        only_new,
        mark,
        ...this.#given(),
      }),
      rows: counted.rows,
      badRows: counted.badRows,
      duplicates: counted.dropped.size,
      duplicateSamples: counted.duplicateSamples,
      eligible: counted.eligible,
      chosen,
      made: reports.reduce((sum, [, { made }]) => sum + made, 0),
      written: this.#written,
      methods: Object.fromEntries(reports),
      labels: this.#labels.before.size === 0 ? null : { before: sorted(this.#labels.before), after: sorted(this.#labels.after) },
      samples,
      versions: { node: process.version, icu: process.versions["icu"] ?? "none" },
    };
  }

  #given(): Readonly<Record<string, unknown>> {
    const { format, layout, columns, header, delimiter } = this.#options;
    return { format, layout, columns, header, delimiter };
  }
}

interface Counted extends Pick<AugmentReport, "rows" | "eligible" | "duplicateSamples" | "badRows"> {
  /** Numbers of the rows that are duplicates. */
  readonly dropped: ReadonlySet<number>;
}

interface Sampled {
  readonly chosen: number;
  readonly samples: readonly Sample[];
}

function check({ methods, fraction, copies, alpha, thesaurus, translator, dedupe, targets }: AugmentOptions): void {
  if (methods.length === 0 && dedupe === undefined) throw new DataError(`give a method (${METHODS.join(", ")}), or dedupe`);
  for (const [name, value] of [
    ["fraction", fraction],
    ["alpha", alpha],
  ] as const)
    if (value !== undefined && !(value > 0 && value <= 1)) throw new DataError(`${name} is ${value}; it must be above 0 and at most 1`);
  if (copies !== undefined && !(Number.isInteger(copies) && copies >= 1 && copies <= 100))
    throw new DataError(`copies is ${copies}; it must be a whole number from 1 to 100`);
  if (targets?.length === 0) throw new DataError("there is nothing to change: the list of fields is empty");
  if (thesaurus === undefined && methods.some((method) => method === "synonyms" || method === "insert"))
    throw new DataError("synonyms and insert need a thesaurus");
  if (translator === undefined && methods.includes("back-translation")) throw new DataError("back-translation needs a translator");
}

function placeText(source: Source, file: number, line: number): string {
  const { file: path, unit } = source.placed(file, line, "");
  return `${path}, ${unit} ${line}`;
}

function withoutUndefined<T extends object>(options: T): T {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as T;
}
