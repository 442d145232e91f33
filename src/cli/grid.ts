/** The routing heat map as lines for a terminal: layers by experts, or tokens by experts. Writes nothing itself. */
import type { Choice, LayerUse } from "./census.ts";
import { ansi256, magma } from "./scale.ts";
import { displayWidth, excerpt, hasColours, padEnd } from "./terminal.ts";

export type Shading = "truecolor" | "256" | "blocks";

/** What standard output can show; `blocks` for NO_COLOR, files and plain terminals. */
export function shadingOf(stream: NodeJS.WriteStream): Shading {
  if (!hasColours(stream)) return "blocks";
  const depth = stream.isTTY ? stream.getColorDepth() : 24;
  return depth >= 24 ? "truecolor" : depth >= 8 ? "256" : "blocks";
}

const BLOCKS = "▁▂▃▄▅▆▇█";

/** A cell `columns` wide for a value from 0 to 1; zero looks different from small values. */
function cell(value: number, columns: number, shading: Shading): string {
  if (shading === "blocks") {
    const block = value <= 0 ? "·" : BLOCKS[Math.min(BLOCKS.length - 1, Math.floor(value * BLOCKS.length))];
    return columns > 1 ? block.repeat(columns - 1) + " " : block;
  }
  const rgb = magma(value <= 0 ? 0 : 0.12 + 0.88 * value);
  const colour = shading === "truecolor" ? `2;${rgb.join(";")}` : `5;${ansi256(rgb)}`;
  return `\x1b[48;${colour}m${" ".repeat(columns)}\x1b[0m`;
}

export interface GridOptions {
  readonly width: number;
  readonly shading: Shading;
}

const LABEL = 6;

/** Statistics at the end of a layer's row: all of them, only the evenness, or none, as the width allows. */
const BALANCE = [
  { width: 27, head: "  max     CV  in use  even" },
  { width: 8, head: "   even" },
  { width: 0, head: "" },
];

/** One row per layer, ending with statistics of its load; mixtures too wide for the terminal are split into bands of experts. */
export function layerGrid(layers: readonly LayerUse[], { width, shading }: GridOptions): string[] {
  const experts = layers[0].load.length;
  const most = Math.max(...layers.map((l) => l.max_load));
  const stats = BALANCE.find((each) => width - LABEL - experts >= each.width) ?? BALANCE[2];
  const columns = Math.max(1, Math.min(4, Math.floor((width - LABEL - stats.width) / experts)));
  const fits = Math.max(8, Math.floor((width - LABEL) / columns));
  const band = experts <= fits ? experts : fits - (fits % 8);
  const lines: string[] = [];
  for (let from = 0; from < experts; from += band) {
    const to = Math.min(experts, from + band);
    const last = to === experts && stats.width > 0;
    if (from > 0) lines.push("");
    lines.push(`${"layer".padEnd(LABEL)}${axis(from, to, columns)}${last ? stats.head : ""}`.trimEnd());
    for (const l of layers) {
      const cells = l.load.slice(from, to).map((share) => cell(share / most, columns, shading));
      lines.push(`${String(l.layer).padStart(LABEL - 2)}  ${cells.join("")}${last ? balance(l, stats.width) : ""}`);
    }
  }
  return [...lines, "", ...legend(most, experts, shading, stats.width)];
}

function balance(l: LayerUse, width: number): string {
  const even = l.effective_experts.toFixed(1).padStart(7);
  if (width < 27) return even;
  const used = l.load.length - l.unused_experts;
  return `${percent(l.max_load).padStart(6)}${l.variation.toFixed(2).padStart(6)}${String(used).padStart(7)}${even}`;
}

/** Expert numbers above their columns, as many as fit. */
function axis(from: number, to: number, columns: number): string {
  let line = "";
  const every = columns >= 4 ? 2 : columns > 1 ? 4 : 8;
  for (let e = from; e < to; e += every) {
    const at = (e - from) * columns;
    if (at >= line.length) line = line.padEnd(at) + String(e);
  }
  return line.slice(0, (to - from) * columns).padEnd((to - from) * columns);
}

function legend(most: number, experts: number, shading: Shading, stats: number): string[] {
  const steps = Array.from({ length: 8 }, (_, i) => cell((i + 0.5) / 8, shading === "blocks" ? 1 : 2, shading)).join("");
  return [
    `      ${cell(0, 1, shading)} never  ${steps} up to ${percent(most)} of the slots (an even share: ${percent(1 / experts)})`,
    ...(stats >= 27 ? ["      max: the busiest expert's share   CV: standard deviation over mean"] : []),
    ...(stats > 0 ? ["      even: how many experts, used evenly, would have this entropy"] : []),
  ];
}

export interface TokenRow {
  readonly text: string;
  readonly choice: Choice;
}

/** One row per token: its text, the positions of its experts, and their numbers with weights in percent. */
export function tokenGrid(tokens: readonly TokenRow[], experts: number, { width, shading }: GridOptions): string[] {
  const label = Math.min(16, Math.max(5, ...tokens.map(({ text }) => displayWidth(show(text)))));
  const number = String(tokens.length - 1).length;
  const before = number + 2 + label + 2;
  const list = (tokens[0]?.choice.experts.length ?? 0) * 7;
  const fits = width - before - experts >= 0;
  const lists = !fits || width - before - experts - 2 >= list;
  const lines = [`${" ".repeat(number + 2)}${padEnd("token", label + 2)}${fits ? axis(0, experts, 1) : ""}${lists ? "  experts·%" : ""}`];
  tokens.forEach(({ text, choice }, i) => {
    const weights = new Map(choice.experts.map((e, j) => [e, choice.weights[j]]));
    const cells = fits ? Array.from({ length: experts }, (_, e) => cell(weights.get(e) ?? 0, 1, shading)).join("") : "";
    const named = choice.experts.map((e, j) => `${e}·${(100 * choice.weights[j]).toFixed(0)}`.padEnd(6)).join(" ");
    lines.push(
      `${String(i).padStart(number)}  ${padEnd(excerpt(show(text), label), label + 2)}${cells}${lists ? `  ${named.trimEnd()}` : ""}`,
    );
  });
  return lines;
}

/** White space made visible. */
function show(text: string): string {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(1)}%`;
}
