/** `mixtape routing`: which experts a prompt uses, in the terminal, as JSON, or as a picture. */
import { writeFile } from "node:fs/promises";
import type { Command } from "commander";
import type { CausalLM, RouterOutput } from "../api/model.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { LayerUse } from "./census.ts";
import { onInterrupt, UsageError } from "./failure.ts";
import { addModelOptions, examples, type ModelFlags, tokenIds, whole } from "./options.ts";
import { encodePrompt, type Prompt, type PromptFlags, readPrompt } from "./prompt.ts";
import { colours, counted, excerpt, notice, terminalWidth } from "./terminal.ts";

interface RoutingFlags extends ModelFlags, PromptFlags {
  readonly generate?: number;
  readonly json?: boolean;
  readonly tokens?: boolean;
  readonly layer?: number;
  readonly top: number;
  readonly svg?: string;
  readonly png?: string;
  readonly font?: string;
  readonly title: string;
}

/** A prompt with its answer, and how it was routed. */
interface Routed {
  readonly ids: readonly number[];
  readonly promptTokens: number;
  /** The text of each token; its id without a tokenizer. */
  readonly pieces: readonly string[];
  /** The prompt and, after an arrow, the answer. */
  readonly prompt: string;
  readonly layers: readonly RouterOutput[];
  readonly uses: readonly LayerUse[];
}

export function addRouting(program: Command): void {
  const command = program
    .command("routing")
    .description("Show which experts a prompt uses: a heat map of layers by experts.")
    .argument("[text]", "the prompt; default: standard input")
    .optionsGroup("Options:")
    .option("--ids <list>", "token ids as the prompt, like 1,2,3", tokenIds)
    .option("--chat", "send the prompt as a user message, with the model's chat template")
    .option("--generate <n>", "include up to n tokens of the model's greedy answer", whole(1))
    .option("--tokens", "show one row per token: its experts in one layer")
    .option("--layer <n>", "layer for --tokens (default: the first mixture layer)", whole(0))
    .option("--top <n>", "number of busiest experts to list", whole(0), 5)
    .option("--json", "print JSON: counts and load per layer, experts and weights per token")
    .option("--svg <file>", "write the heat map as an SVG for a slide")
    .option("--png <file>", "the same as PNG, 2560 pixels wide")
    .option("--font <file>", "font file for the PNG's text (default: this machine's fonts)")
    .option("--title <text>", "title of the picture", "Which experts a prompt uses");
  addModelOptions(command)
    .addHelpText(
      "after",
      examples(
        ['mixtape routing "混合专家"', "a heat map in the terminal"],
        ['mixtape routing "混合专家" --generate 50 --svg routing.svg', "with the answer, as a picture"],
        ['mixtape routing "The cat sat" --tokens --layer 3', "token by token"],
        ['mixtape routing "混合专家" --json | jq ".layers[0].load"', "for scripts"],
      ),
    )
    .action(routing);
}

async function routing(argument: string | undefined, flags: RoutingFlags): Promise<void> {
  if (flags.layer !== undefined && !flags.tokens) throw new UsageError("--layer goes with --tokens");
  if (flags.font !== undefined && flags.png === undefined)
    throw new UsageError("--font goes with --png; an SVG uses the fonts of its viewer");
  const prompt = await readPrompt(argument, flags);
  const { findModel, hasTokenizer, openModel, openTokenizer } = await import("./models.ts");
  const interrupt = onInterrupt();
  try {
    const { folder, adapters } = await findModel(flags, { signal: interrupt.signal });
    // With --ids, a tokenizer is optional: it only shows the tokens' texts.
    const tokenizer = flags.ids && !hasTokenizer(folder) ? null : await openTokenizer(folder);
    const ids = encodePrompt(prompt, tokenizer, flags);
    const model = await openModel(folder, flags, adapters);
    try {
      const routed = await route(model, tokenizer, prompt, ids, flags, interrupt.signal);
      if (flags.json) await printJson(routed, flags);
      else await printGrid(routed, flags);
      await writePictures(routed, model, flags);
    } finally {
      await model.dispose();
    }
  } finally {
    interrupt.release();
  }
}

async function route(
  model: CausalLM,
  tokenizer: Tokenizer | null,
  prompt: Prompt,
  given: readonly number[],
  flags: RoutingFlags,
  signal: AbortSignal,
): Promise<Routed> {
  const { moe } = model.config;
  if (!moe) throw new UsageError(`${flags.model} is a dense model (${model.config.architecture}): it has no experts to route to`);
  const max_new_tokens = flags.generate;
  const ids = max_new_tokens ? (await model.generate({ input_ids: [[...given]], do_sample: false, max_new_tokens, signal }))[0] : given;
  const { routing } = await model.engine.inspect(ids, { logits: false, routing: true }); // the logits of a long text would fill the memory
  const layers = routing.map(({ layer, ...numbers }): RouterOutput => {
    const rows = <T extends { readonly length: number }>(data: T) => ({ dims: [ids.length, data.length / ids.length], data });
    return { layer, logits: rows(numbers.logits), experts: rows(numbers.experts), weights: rows(numbers.weights) };
  });
  if (layers.length === 0) throw new UsageError(`${flags.model} has no layer with experts`);
  const { countExperts } = await import("./census.ts");
  const { tokenTexts } = await import("./prompt.ts");
  const answer = ids.slice(given.length);
  const read = (part: readonly number[]) => (tokenizer ? tokenizer.decode(part, { skip_special_tokens: true }) : part.join(" "));
  return {
    ids,
    promptTokens: given.length,
    pieces: tokenizer ? tokenTexts(tokenizer, ids) : ids.map(String),
    prompt: `${prompt.text ?? read(given)}${answer.length ? ` → ${read(answer)}` : ""}`,
    layers,
    uses: countExperts(layers, moe.experts),
  };
}

async function printGrid({ ids, pieces, layers, uses, prompt, promptTokens }: Routed, flags: RoutingFlags): Promise<void> {
  const [{ layerGrid, percent, shadingOf, tokenGrid }, { choiceOf, topExperts }] = await Promise.all([
    import("./grid.ts"),
    import("./census.ts"),
  ]);
  const { bold, dim } = colours(process.stdout);
  const grid = { width: terminalWidth(), shading: shadingOf(process.stdout) };
  const experts = uses[0].load.length;
  const out = [
    bold(excerpt(prompt, grid.width)),
    dim(`${counted(ids.length, "token")}${ids.length > promptTokens ? `, ${promptTokens} of them the prompt` : ""}`),
    "",
  ];
  if (flags.tokens) {
    const router = flags.layer === undefined ? layers[0] : layers.find(({ layer }) => layer === flags.layer);
    if (!router)
      throw new UsageError(`layer ${flags.layer} has no experts; those with experts are ${layers.map((l) => l.layer).join(", ")}`);
    out.push(
      bold(`layer ${router.layer}`),
      ...tokenGrid(
        pieces.map((text, i) => ({ text, choice: choiceOf(router, i) })),
        experts,
        grid,
      ),
    );
  } else {
    out.push(...layerGrid(uses, grid));
    if (flags.top) out.push("", bold("Busiest experts"));
    for (const { layer, expert, load } of topExperts(uses, flags.top))
      out.push(
        `  layer ${String(layer).padStart(2)}  expert ${String(expert).padStart(2)}  ${percent(load).padStart(6)}  ${dim(`${(load * experts).toFixed(1)} times an even share`)}`,
      );
  }
  process.stdout.write(`${out.join("\n")}\n`);
}

async function printJson({ ids, pieces, layers, uses, promptTokens }: Routed, flags: RoutingFlags): Promise<void> {
  const { choiceOf } = await import("./census.ts");
  const tokens = ids.map((id, i) => ({
    index: i,
    id,
    text: pieces[i],
    prompt: i < promptTokens,
    layers: layers.map((router) => ({ layer: router.layer, ...choiceOf(router, i) })),
  }));
  const about = { model: flags.model, experts: uses[0].load.length, chosen: layers[0].experts.dims[1], prompt_tokens: promptTokens };
  process.stdout.write(`${JSON.stringify({ ...about, layers: uses, tokens })}\n`);
}

async function writePictures({ ids, layers, uses, prompt }: Routed, model: CausalLM, flags: RoutingFlags): Promise<void> {
  if (flags.svg === undefined && flags.png === undefined) return;
  const { heatmapSvg } = await import("./heatmap.ts");
  const name = flags.model === "default" ? "the bundled model" : flags.model.replace(/^.*\/(?=[^/]+\/?$)/, "");
  const shown = { title: flags.title, model: `${name} (${model.config.layers} layers)`, prompt: excerpt(prompt, 110) };
  const svg = heatmapSvg(uses, { ...shown, tokens: ids.length, chosen: layers[0].experts.dims[1] });
  if (flags.svg !== undefined) {
    await writeFile(flags.svg, svg);
    notice(`wrote ${flags.svg}`);
  }
  if (flags.png === undefined) return;
  const { drawPng } = await import("./picture.ts");
  const { png, missing } = await drawPng(svg, `${shown.title}${shown.model}${shown.prompt}`, { font: flags.font });
  await writeFile(flags.png, png);
  notice(`wrote ${flags.png}`);
  if (missing.length)
    notice(
      `mixtape: no font here has ${missing.slice(0, 8).join(" ")}${missing.length > 8 ? " …" : ""}; give one with --font, or use --svg`,
    );
}
