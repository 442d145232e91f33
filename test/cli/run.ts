// Runs the command as users do: a child process from the built `dist`. And a tiny model with a tokenizer for it, in a temporary folder.
import { type ChildProcess, spawn } from "node:child_process";
import { cpSync, existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { onTestFinished } from "vitest";

const root = fileURLToPath(new URL("../../", import.meta.url));
export const binary = join(root, "bin/mixtape.js");
const goldens = join(root, "test/fixtures/goldens");

export interface Result {
  readonly code: number | null;
  readonly out: string;
  readonly err: string;
}

export interface RunOptions {
  readonly input?: string;
  readonly env?: Readonly<Record<string, string>>;
  /** Default: the folder of the tests. */
  readonly cwd?: string;
  /** The script that is run. Default: this installation's command. */
  readonly binary?: string;
}

/** Runs `mixtape` with these arguments until it exits. */
export function run(args: readonly string[], { input = "", env = {}, cwd, binary: script = binary }: RunOptions = {}): Promise<Result> {
  if (!existsSync(join(root, "dist/cli/main.js"))) throw new Error("dist is not built; run npm run build");
  const child = spawn(process.execPath, [script, ...args], { env: environment(env), cwd });
  child.stdin.on("error", () => {}); // a command that fails immediately does not read it
  child.stdin.end(input);
  return finished(child);
}

/** Runs `mixtape` under a pseudo-terminal: what is written to its standard input counts as typed. */
export function terminal(args: readonly string[]): ChildProcess {
  const relay = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)";
  return spawn("python3", ["-c", relay, process.execPath, binary, ...args], { env: environment({ TERM: "xterm", NO_COLOR: "1" }) });
}

export async function finished(child: ChildProcess): Promise<Result> {
  const text = { out: "", err: "" };
  child.stdout?.setEncoding("utf8").on("data", (part: string) => void (text.out += part));
  child.stderr?.setEncoding("utf8").on("data", (part: string) => void (text.err += part));
  const code = await new Promise<number | null>((resolve, reject) => child.on("error", reject).on("close", resolve));
  return { code, ...text };
}

function environment(more: Readonly<Record<string, string>>): NodeJS.ProcessEnv {
  const { MIXTAPE_MODEL: _model, MIXTAPE_DEBUG: _debug, FORCE_COLOR: _colour, ...rest } = process.env;
  return { ...rest, HF_HUB_OFFLINE: "1", ...more };
}

/** A folder that is removed after the test. */
export function temporary(): string {
  const path = mkdtempSync(join(tmpdir(), "mixtape-cli-"));
  onTestFinished(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

export const template =
  "{%- for message in messages -%}{{ message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor -%}" +
  "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}";

/** A checkpoint of random weights with a tokenizer of bytes, letters and made-up words. `files` replaces or adds files; null leaves one out. */
export function tinyModel(files: Readonly<Record<string, string | object | null>> = {}, golden = "moe-tiny"): string {
  const folder = temporary();
  const all: Record<string, string | object | null> = {
    "tokenizer.json": tokenizerJson(),
    "tokenizer_config.json": { chat_template: template },
    ...files,
  };
  for (const name of ["config.json", "generation_config.json", "model.safetensors"])
    if (!(name in all)) cpSync(join(goldens, golden, name), join(folder, name));
  for (const [name, value] of Object.entries(all))
    if (value !== null) writeFileSync(join(folder, name), typeof value === "string" ? value : JSON.stringify(value));
  return folder;
}

function tokenizerJson(): object {
  const special = ["<unk>", "<s>", "</s>"];
  const bytes = Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  const letters = [..."▁abcdefghijklmnopqrstuvwxyz中文"];
  const tokens = [...special, ...bytes, ...letters];
  while (tokens.length < 512) tokens.push(`▁w${tokens.length}`);
  return {
    added_tokens: special.map((content, id) => ({ id, content, special: true, normalized: false })),
    normalizer: { type: "Replace", pattern: { String: " " }, content: "▁" },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: "Sequence",
      decoders: [{ type: "Replace", pattern: { String: "▁" }, content: " " }, { type: "ByteFallback" }, { type: "Fuse" }],
    },
    model: {
      type: "BPE",
      unk_token: "<unk>",
      fuse_unk: true,
      byte_fallback: true,
      vocab: Object.fromEntries(tokens.map((t, id) => [t, id])),
      merges: [],
    },
  };
}
