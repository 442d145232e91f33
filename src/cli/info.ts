/** `mixtape info`: what a model is, how large it is, and how it generates by default; or what can compute on this machine. Loads no weights. */
import type { Command } from "commander";
import type { Facts } from "./facts.ts";
import { UsageError } from "./failure.ts";
import { addHubOptions, addModelOption, examples, type ModelFlags } from "./options.ts";
import { colours, formatBytes, formatCount, padEnd } from "./terminal.ts";

interface InfoFlags extends ModelFlags {
  readonly json?: boolean;
  readonly devices?: boolean;
}

export function addInfo(program: Command): void {
  const command = program
    .command("info")
    .description("Show a model's sizes, parameters, memory, tokenizer and defaults. Downloads no weights.")
    .argument("[model]", "as -m")
    .optionsGroup("Options:")
    .option("--devices", "show the processor and the GPUs of this machine instead, and why a GPU cannot be used")
    .option("--json", "print JSON");
  addHubOptions(addModelOption(command))
    .addHelpText(
      "after",
      examples(
        ["mixtape info", "the bundled model"],
        ["mixtape info baidu/ERNIE-4.5-21B-A3B-PT", "a model on the hub, before downloading its 44 GB"],
        ["mixtape info ./my-model --json | jq .parameters", "for scripts"],
        ["mixtape info --devices", "what --device can name here"],
      ),
    )
    .action(async (argument: string | undefined, flags: InfoFlags) => {
      if (flags.devices) {
        if (argument !== undefined) throw new UsageError(`--devices describes this machine, not a model: leave out '${argument}'`);
        const { describeDevices, devices } = await import("./devices.ts");
        const found = devices();
        process.stdout.write(flags.json ? `${JSON.stringify(found, null, 2)}\n` : describeDevices(found));
        return;
      }
      const { gather } = await import("./facts.ts");
      const facts = await gather(argument ?? flags.model, flags);
      process.stdout.write(flags.json ? `${JSON.stringify(facts, null, 2)}\n` : render(facts));
    });
}

function render(facts: Facts): string {
  const { bold, dim } = colours(process.stdout);
  const rows = (entries: readonly (readonly [string, string | null])[]) =>
    entries.flatMap(([name, value]) => (value === null ? [] : [`  ${padEnd(name, 22)}${value}`]));
  const section = (title: string, entries: readonly (readonly [string, string | null])[]) => ["", bold(title), ...rows(entries)];
  const { config: c, parameters: p, memory: m, stored, tokenizer: t } = facts;
  const share = ((100 * p.active) / p.total).toFixed(0);
  return `${[
    `${bold(facts.model)}  ${dim(facts.folder)}`,
    ...section("Architecture", [
      ["class", c.architecture],
      ["layers", c.moe ? `${c.layers}, ${c.moe_layers.length} of them mixtures of experts` : String(c.layers)],
      ["hidden size", String(c.hiddenSize)],
      ["attention", `${c.heads} heads, ${c.kvHeads} of keys and values, ${c.headDim} wide`],
      ["experts", c.moe && `${c.moe.experts} a layer, ${c.moe.chosen} chosen a token, ${c.moe.width} wide`],
      ["shared experts", c.moe && String(c.moe.sharedExperts)],
      ["dense width", String(c.intermediateSize)],
      ["vocabulary", `${c.vocabSize}${c.tied ? ", embedding and head are one" : ""}`],
      ["longest position", String(c.maxPositions)],
      ["RoPE base", String(c.ropeTheta)],
      ["biases", c.useBias ? "yes" : null],
    ]),
    ...section("Parameters", [
      ["total", `${formatCount(p.total)}  ${dim(String(p.total))}`],
      ["active a token", c.moe ? `${formatCount(p.active)}  ${dim(`${p.active}, ${share} %`)}` : "all"],
    ]),
    ...section("Weights as stored", [
      ...(stored
        ? Object.entries(stored).map(
            ([dtype, { bytes, tensors }]) =>
              [dtype.toLowerCase(), `${padEnd(formatBytes(bytes), 10)}  ${dim(`${tensors} tensors`)}`] as const,
          )
        : [["not here", notHere(facts)] as const]),
      [
        "on this machine",
        facts.weights && (facts.weights.why === null ? "move to huge pages while the model answers" : `stay mapped: ${facts.weights.why}`),
      ],
    ]),
    ...section("Memory, by format", [
      ["fp32", formatBytes(m.fp32)],
      ["bf16, fp16", formatBytes(m.bf16)],
      ["int8, fp8", formatBytes(m.int8)],
      ["int4", formatBytes(m.int4)],
      ["KV cache a token", `${formatBytes(m.kv_per_token)}  ${dim("fp16; twice that with fp32 weights")}`],
      ["at the longest", formatBytes(m.kv_longest)],
    ]),
    ...section(
      "Tokenizer",
      t === null
        ? [["none", "generate and routing take --ids; chat needs a tokenizer"]]
        : [
            ["file", t.file],
            ["tokens", t.with_added === t.vocabulary ? String(t.vocabulary) : `${t.vocabulary}, with added ones ${t.with_added}`],
            ["special tokens", String(t.special_ids)],
            ...Object.entries(t.special_tokens).map(([role, token]) => [`  ${role.replace("_token", "")}`, token] as const),
            ["longest input", t.longest_input === null ? null : String(t.longest_input)],
            ["chat template", t.chat_template ? "yes" : "no: mixtape generate continues plain text"],
          ],
    ),
    ...section("Generation defaults", generationRows(facts.generation)),
  ].join("\n")}\n`;
}

function notHere({ missing, model }: Facts): string {
  return missing?.startsWith("model")
    ? `no ${missing} in the folder; download a model from the hub with: mixtape pull ${model}`
    : `${missing} is missing`;
}

function generationRows(generation: Readonly<Record<string, unknown>>): (readonly [string, string])[] {
  const shown = Object.entries(generation).filter(([key]) => !key.startsWith("_") && key !== "transformers_version");
  return shown.length ? shown.map(([key, value]) => [key, JSON.stringify(value)] as const) : [["none", "greedy"]];
}
