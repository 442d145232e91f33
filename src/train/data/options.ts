/** The options of a data set, as users write them in a configuration, and their defaults. Knows no files. */
import { z } from "zod";
import { LEARNT, OVERFLOWS } from "./encode.ts";
import { DataError } from "./fault.ts";
import { FORMATS } from "./files.ts";
import { PROBLEMS } from "./labels.ts";
import { FIELD_NAMES, LAYOUTS } from "./layout.ts";

export const TASKS = ["causal-lm", "classification", "preference"] as const;
export type Task = (typeof TASKS)[number];

const whole = (least: number, most = Number.MAX_SAFE_INTEGER) => z.int().min(least).max(most);

/** Each option's meaning and default, for configurations and their help. Unknown options are refused. */
export const dataOptions = z.strictObject({
  format: z.enum(FORMATS).optional().describe("format of all files; default: by their endings"),
  layout: z.enum(LAYOUTS).optional().describe("what the rows are; default: by the names of their columns"),
  columns: z
    .partialRecord(z.enum(FIELD_NAMES), z.string().min(1))
    .default({})
    .describe("the column of each field, such as {text: review, label: category}"),
  header: z.array(z.string().min(1)).min(1).optional().describe("names of the columns of CSV and TSV files without a header"),
  delimiter: z.string().length(1).optional().describe("between the columns of CSV and TSV files; default: comma, tab"),
  max_length: whole(2).optional().describe("tokens of an example; default: 2048, or less where the tokenizer says so"),
  overflow: z.enum(OVERFLOWS).optional().describe("what becomes of longer ones; default: split for texts, error for others"),
  learn: z.enum(LEARNT).default("answers").describe("what is learnt of a conversation: answers, the last one, or all that is written"),
  template_variables: z.record(z.string(), z.unknown()).default({}).describe("extra variables for the chat template"),
  packing: z.boolean().default(false).describe("put several examples into one sequence of max_length"),
  packing_window: whole(1, 1_000_000).default(1000).describe("examples among which packing looks for the best fit"),
  shuffle: z.boolean().default(true).describe("a new random order in every epoch"),
  seed: whole(0).default(0).describe("of the order and of splits"),
  labels: z
    .array(z.union([z.string().min(1), z.number().transform(String)]))
    .min(1)
    .optional()
    .describe("names of the classes in the order of their ids; default: those of the data"),
  problem_type: z.enum(PROBLEMS).optional().describe("of a classifier; default: several classes where labels are lists, else one"),
  label_separator: z.string().min(1).optional().describe("between the classes of a label that is a text"),
  max_bad_rows: whole(0).default(0).describe("rows that may be skipped because they cannot be used"),
  max_row_bytes: whole(1, 2 ** 30)
    .default(16 * 1024 ** 2)
    .describe("bytes of a row"),
});

export type DataOptions = z.input<typeof dataOptions>;
export type ReadOptions = z.output<typeof dataOptions>;

/** Checks options and fills in defaults. Throws DataError that names each option that is wrong. */
export function readOptions(options: DataOptions): ReadOptions {
  const read = dataOptions.safeParse(options);
  if (read.success) return read.data;
  const faults = read.error.issues.map(({ path, message }) => (path.length === 0 ? message : `${path.join(".")}: ${message}`));
  throw new DataError(`options of the data: ${faults.join("; ")}`);
}
