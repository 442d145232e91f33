/** What an augmentation did, as data and as Markdown. Holds no times, so that the same run gives the same bytes. */

export interface Sample {
  readonly method: string;
  /** File and line of the row. */
  readonly place: string;
  readonly before: readonly string[];
  readonly after: readonly string[];
}

export interface MethodReport {
  /** New rows. */
  readonly made: number;
  /** Rows that the method gave none for, by reason. */
  readonly rejected: Readonly<Record<string, number>>;
}

export interface AugmentReport {
  readonly input: readonly string[];
  readonly output: string;
  readonly options: Readonly<Record<string, unknown>>;
  /** Good rows of the input, and rows that could not be used. */
  readonly rows: number;
  readonly badRows: number;
  /** Rows left out because they are nearly the same as an earlier one. */
  readonly duplicates: number;
  readonly duplicateSamples: readonly { readonly place: string; readonly of: string; readonly similarity: number; readonly text: string }[];
  /** Rows with a text to change, and those that were chosen. */
  readonly eligible: number;
  readonly chosen: number;
  /** New rows, and all rows of the output. */
  readonly made: number;
  readonly written: number;
  readonly methods: Readonly<Record<string, MethodReport>>;
  /** Rows of each class, before and after; null where rows have no labels. */
  readonly labels: { readonly before: Readonly<Record<string, number>>; readonly after: Readonly<Record<string, number>> } | null;
  readonly samples: readonly Sample[];
  /** What the words depend on: other versions may cut Chinese text into other words. */
  readonly versions: { readonly node: string; readonly icu: string };
}

/** Labels that the report lists. */
const LISTED_LABELS = 30;

/** The report as a page. */
export function markdown(report: AugmentReport): string {
  const { rows, badRows, duplicates, eligible, chosen, made, written, methods, labels, samples, duplicateSamples } = report;
  const counts: [string, number][] = [
    ["rows of the input", rows],
    ["rows that could not be used", badRows],
    ["near duplicates left out", duplicates],
    ["rows with a text to change", eligible],
    ["rows chosen", chosen],
    ["new rows", made],
    ["rows of the output", written],
  ];
  const parts = [
    "# Augmentation",
    `${report.input.map(code).join(", ")} to ${code(report.output)}`,
    table(
      ["", "rows"],
      counts.map(([name, n]) => [name, String(n)]),
    ),
    "## Options",
    table(
      ["option", "value"],
      Object.entries(report.options).map(([name, value]) => [name, code(JSON.stringify(value))]),
    ),
  ];
  if (Object.keys(methods).length > 0) {
    const lines = Object.entries(methods).map(([name, { made: own, rejected }]) => [
      name,
      String(own),
      Object.entries(rejected)
        .map(([reason, n]) => `${reason}: ${n}`)
        .join("; ") || "none",
    ]);
    parts.push("## Methods", table(["method", "new rows", "rejected"], lines));
  }
  if (labels) {
    const all = Object.keys(labels.after);
    const lines = all.slice(0, LISTED_LABELS).map((name) => [name, String(labels.before[name] ?? 0), String(labels.after[name])]);
    parts.push("## Labels", table(["label", "before", "after"], lines));
    if (all.length > LISTED_LABELS) parts.push(`and ${all.length - LISTED_LABELS} more`);
  }
  if (samples.length > 0) {
    parts.push("## Samples");
    for (const { method, place, before, after } of samples)
      parts.push(`**${method}**, ${code(place)}`, before.map((text, i) => `> ${quoted(text)}\n>\n> → ${quoted(after[i])}`).join("\n\n"));
  }
  if (duplicateSamples.length > 0)
    parts.push(
      "## Near duplicates",
      table(
        ["row", "like", "similarity", "text"],
        duplicateSamples.map(({ place, of, similarity, text }) => [code(place), code(of), similarity.toFixed(3), text]),
      ),
    );
  parts.push(`Node ${report.versions.node}, ICU ${report.versions.icu}.`);
  return `${parts.join("\n\n")}\n`;
}

function table(head: readonly string[], lines: readonly (readonly string[])[]): string {
  const row = (cells: readonly string[]) => `| ${cells.map((cell) => cell.replace(/\|/g, "\\|").replace(/\s*\n\s*/g, " ")).join(" | ")} |`;
  return [row(head), row(head.map(() => "---")), ...lines.map(row)].join("\n");
}

function code(text: string): string {
  return text.includes("`") ? `\`\` ${text} \`\`` : `\`${text}\``;
}

/** A text within a quotation: markup shows as it is. */
function quoted(text: string): string {
  const cut = text.length > 600 ? `${text.slice(0, 600)}…` : text;
  return cut.replace(/[\\`*_<>[\]#|]/g, "\\$&").replace(/\r?\n/g, "\n> ");
}
