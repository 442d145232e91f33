/**
 * Opens files as a data set. One pass reads, checks and encodes every row, so that a bad row, an unknown label or an example that is too long
 * shows before training starts, and all lengths are known; it keeps where each row is, not what it says.
 */
import { createHash } from "node:crypto";
import { TokenizerError } from "../../tokenizer/error.ts";
import type { Tokenizer } from "../../tokenizer/tokenizer.ts";
import { hash32 } from "../random.ts";
import { Dataset, type ExampleStore } from "./dataset.ts";
import { type Encoded, type EncodeOptions, encodeCausal, encodeLabel, encodePreference } from "./encode.ts";
import { type CausalExample, type ClassExample, type Example, learntOf, lengthOf, type PreferenceExample } from "./example.ts";
import { type BadRow, BadRows, DataError, placed, RowError } from "./fault.ts";
import type { DataFile } from "./files.ts";
import { Labels, type Problem } from "./labels.ts";
import { type Entry, Ledger } from "./ledger.ts";
import { type DataOptions, type ReadOptions, readOptions, type Task } from "./options.ts";
import { inputOf, type Row } from "./row.ts";
import { Source, type SourceRow } from "./source.ts";

export interface OpenOptions extends DataOptions {
  readonly tokenizer: Tokenizer;
  /** What the examples are for. Default: causal-lm. */
  readonly task?: Task;
  readonly signal?: AbortSignal;
  /** Told now and then, and for each bad row that is skipped. */
  readonly onProgress?: (progress: { readonly doneBytes: number; readonly totalBytes: number; readonly examples: number }) => void;
  readonly onBadRow?: (row: BadRow) => void;
}

/**
 * Opens a file, a folder, a pattern or a list of these as examples for training.
 * Throws DataError: no files, options that are unknown or do not fit, more bad rows than `max_bad_rows` (the first five are listed), no examples.
 */
export function openDataset(
  source: string | readonly string[],
  options: OpenOptions & { readonly task?: "causal-lm" },
): Promise<Dataset<CausalExample>>;
export function openDataset(
  source: string | readonly string[],
  options: OpenOptions & { readonly task: "classification" },
): Promise<Dataset<ClassExample>>;
export function openDataset(
  source: string | readonly string[],
  options: OpenOptions & { readonly task: "preference" },
): Promise<Dataset<PreferenceExample>>;
export function openDataset(source: string | readonly string[], options: OpenOptions): Promise<Dataset>;
export async function openDataset(source: string | readonly string[], options: OpenOptions): Promise<Dataset> {
  const { tokenizer, task = "causal-lm", signal, onProgress, onBadRow, ...rest } = options;
  const read = readOptions(rest);
  const rows = await Source.open(source, read);
  const max_length = read.max_length ?? Math.min(2048, tokenizer.model_max_length);
  const store = new FileStore(rows, task, tokenizer, { ...read, max_length });
  try {
    await store.index({ signal, onProgress, onBadRow });
  } catch (error) {
    await store.close();
    throw error;
  }
  return new Dataset(task, store, { ...read, max_length });
}

type Watch = Pick<OpenOptions, "signal" | "onProgress" | "onBadRow">;
/** Rows whose examples are kept: those of a row often follow each other. */
const KEPT_ROWS = 16;
/** Examples between two calls of `onProgress`. */
const REPORTED = 256;

class FileStore implements ExampleStore {
  readonly #source: Source;
  readonly #task: Task;
  readonly #tokenizer: Tokenizer;
  readonly #options: ReadOptions & { readonly max_length: number };
  readonly #labels: Labels;
  readonly #ledger = new Ledger();
  readonly #bad: BadRows;
  readonly #kept = new Map<string, Promise<readonly Example[]>>();
  readonly #content = createHash("sha256");
  #groupStarts: number[] = [];
  fingerprint = "";
  truncated = 0;
  skipped = 0;

  constructor(source: Source, task: Task, tokenizer: Tokenizer, options: ReadOptions & { readonly max_length: number }) {
    this.#source = source;
    this.#task = task;
    this.#tokenizer = tokenizer;
    this.#options = options;
    this.#labels = new Labels(options.labels ?? null, options.problem_type ?? null, options.label_separator ?? null);
    this.#bad = new BadRows(options.max_bad_rows);
  }

  get length(): number {
    return this.#ledger.length;
  }

  get groups(): readonly number[] {
    return this.#groupStarts;
  }

  get badRows(): number {
    return this.#bad.count;
  }

  get problem(): Problem | null {
    return this.#task === "classification" ? this.#labels.problem : null;
  }

  get labels(): readonly string[] | null {
    return this.problem === null || this.problem === "regression" ? null : this.#labels.names;
  }

  get labelCounts(): Readonly<Record<string, number>> | null {
    return this.labels === null ? null : Object.fromEntries(this.#labels.counts);
  }

  tokens(i: number): number {
    return this.#ledger.get("tokens", i);
  }

  trained(i: number): number {
    return this.#ledger.get("trained", i);
  }

  input(i: number): number {
    return this.#ledger.get("input", i);
  }

  place(i: number): string {
    const { file, line } = this.#ledger.at(i);
    const { file: path, unit } = this.#source.placed(file, line, "");
    return `${path}, ${unit} ${line}`;
  }

  async read(i: number): Promise<Example> {
    const entry = this.#ledger.at(i);
    const key = `${entry.file} ${entry.offset}`;
    const known = this.#kept.get(key);
    this.#kept.delete(key);
    const examples = known ?? this.#reread(entry);
    this.#kept.set(key, examples);
    for (const oldest of this.#kept.keys()) if (this.#kept.size > KEPT_ROWS) this.#kept.delete(oldest);
    const example = (await examples)[entry.part];
    if (example === undefined || lengthOf(example) !== entry.tokens) throw this.#changed(entry);
    return example;
  }

  close(): Promise<void> {
    return this.#source.close();
  }

  /** The pass over all files. */
  async index({ signal, onProgress, onBadRow }: Watch): Promise<void> {
    const { files, bytes: totalBytes } = this.#source;
    let sum = 0;
    const before = files.map(({ bytes }) => (sum += bytes) - bytes);
    const groups: number[] = [];
    let seen = 0;
    await this.#source.pass(
      (row) => {
        const first = this.length;
        this.#note(row);
        if (row.startsGroup && groups.at(-1) !== first) groups.push(first);
        if (++seen % REPORTED === 0)
          onProgress?.({ doneBytes: before[row.file] + doneBytes(files[row.file], row), totalBytes, examples: this.length });
      },
      (row) => {
        this.#bad.add(row);
        onBadRow?.(row);
      },
      signal,
    );
    this.#bad.end();
    onProgress?.({ doneBytes: totalBytes, totalBytes, examples: this.length });
    if (this.length === 0) {
      const { max_length } = this.#options;
      const why =
        this.skipped > 0
          ? `all ${this.skipped} are longer than max_length (${max_length})`
          : this.badRows > 0
            ? `all ${this.badRows} rows are bad`
            : "there are no rows";
      throw new DataError(`no examples in ${listed(files)}: ${why}`);
    }
    // Where every row is read alone, or all groups fit in memory, rows of different groups may be mixed.
    this.#groupStarts = this.#source.isRandom ? [0] : groups;
    const { chat_template } = this.#tokenizer;
    this.#content.update(JSON.stringify([this.#task, this.#options, chat_template, this.#tokenizer.length, this.labels]));
    this.fingerprint = this.#content.digest("hex").slice(0, 32);
  }

  /** Takes a row into the ledger. Throws RowError. */
  #note({ file, place, row }: SourceRow): void {
    if (row.kind === "label") this.#labels.add(row.label);
    // The ids of classes are known only behind the last row; any number has the same length.
    const { examples, truncated, skipped } = this.#encode(row, () => 0);
    this.truncated += truncated;
    this.skipped += skipped;
    this.#content.update(`${JSON.stringify(row)}\n`);
    const input = hash32(inputOf(row).trim());
    const { offset, length: bytes, line } = place;
    for (const [part, example] of examples.entries())
      this.#ledger.push({ file, offset, bytes, line, part, tokens: lengthOf(example), trained: this.#trained(example), input });
  }

  /** Tokens that are learnt: those with a label, the last one of a classifier's input, both answers of a preference. */
  #trained(example: Example): number {
    if ("prompt_ids" in example) return example.chosen_ids.length + example.rejected_ids.length;
    return this.#task === "classification" ? 1 : learntOf(example as CausalExample);
  }

  async #reread(entry: Entry): Promise<readonly Example[]> {
    const { file, offset, bytes: length, line } = entry;
    try {
      const { row } = await this.#source.read(file, { offset, length, line });
      if (hash32(inputOf(row).trim()) !== entry.input) throw this.#changed(entry);
      return this.#encode(row, (label) => this.#labels.idsOf(label)).examples;
    } catch (error) {
      if (error instanceof RowError) throw this.#changed(entry, error.message);
      throw error;
    }
  }

  #encode(row: Row, idsOf: Labels["idsOf"]): Encoded<Example> {
    try {
      return this.#encoded(row, idsOf);
    } catch (error) {
      if (error instanceof TokenizerError) throw new RowError(error.message);
      throw error;
    }
  }

  #encoded(row: Row, idsOf: Labels["idsOf"]): Encoded<Example> {
    const { max_length: maxLength, learn: learnt, template_variables: templateVariables } = this.#options;
    const { overflow = row.kind === "text" ? "split" : "error" } = this.#options;
    if (overflow === "split" && row.kind !== "text")
      throw new DataError(`overflow: split is for texts; these rows are of the kind ${row.kind}: use truncate or skip`);
    const options: EncodeOptions = { tokenizer: this.#tokenizer, maxLength, overflow, learnt, templateVariables };
    switch (this.#task) {
      case "causal-lm":
        if (row.kind === "chat" || row.kind === "completion" || row.kind === "text") return encodeCausal(row, options);
        break;
      case "classification":
        if (row.kind === "label") return encodeLabel(row, idsOf(row.label), options);
        break;
      case "preference":
        if (row.kind === "preference") return encodePreference(row, options);
        break;
      default:
        this.#task satisfies never;
    }
    throw new DataError(
      `these rows are of the kind ${row.kind}, and ${this.#task} takes ${KINDS[this.#task]}: choose another task, or another layout`,
    );
  }

  #changed({ file, line }: Entry, why = ""): DataError {
    const row = this.#source.placed(file, line, "the row has changed since it was indexed");
    return new DataError(`${placed(row)}${why === "" ? "" : ` (${why})`}: do not write to the files while they are used`);
  }
}

const KINDS: Readonly<Record<Task, string>> = {
  "causal-lm": "chat, completion or text",
  classification: "label (text and label)",
  preference: "preference (chosen and rejected)",
};

function doneBytes(file: DataFile, { place }: SourceRow): number {
  return file.format === "parquet" ? file.bytes / 2 : place.offset + place.length;
}

function listed(files: readonly DataFile[]): string {
  return files.length === 1 ? files[0].path : `${files[0].path} and ${files.length - 1} more`;
}
