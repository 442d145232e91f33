// Files of training data in a temporary folder, and tokenizers to read them with.
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { onTestFinished } from "vitest";
import { Tokenizer } from "../../../src/tokenizer/tokenizer.ts";
import type { OpenOptions } from "../../../src/train/data/open.ts";
import { openDataset as open } from "../../../src/train/data/open.ts";

const root = fileURLToPath(new URL("../../../", import.meta.url));
export const fixtures = join(root, "test/fixtures/data");
/** The bundled model's tokenizer: its template ends a prompt with a space, which the tokenizer would merge with an answer. */
export const bundled = await Tokenizer.open(join(root, "models/small-moe"));

/** A template that knows tools and reasoning, and ends turns with a token and a line break, as many published ones do. */
export const TURNS =
  "{%- if tools -%}<tools>{{ tools | tojson }}</tools>{%- endif -%}" +
  "{%- for m in messages -%}{{ '<|begin_of_sentence|>' + m.role + '\n' }}" +
  "{%- if m.role == 'assistant' -%}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{%- endif -%}" +
  "{{ m.content }}{%- for c in m.tool_calls or [] -%}{{ '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{%- endfor -%}" +
  "{{ '<|end_of_sentence|>\n' }}{%- endfor -%}" +
  "{%- if add_generation_prompt -%}{{ '<|begin_of_sentence|>assistant\n<think>\n' }}{%- endif -%}";

/** The bundled tokenizer with another chat template. */
export async function withTemplate(template: string | null): Promise<Tokenizer> {
  const folder = temporary();
  cpSync(join(root, "models/small-moe/tokenizer.json"), join(folder, "tokenizer.json"));
  const special = { eos_token: "</s>", bos_token: "<s>", unk_token: "<unk>", pad_token: "<unk>" };
  writeFileSync(
    join(folder, "tokenizer_config.json"),
    JSON.stringify({ ...special, ...(template === null ? {} : { chat_template: template }) }),
  );
  return Tokenizer.open(folder);
}

/** A folder that is removed after the test. */
export function temporary(): string {
  const folder = mkdtempSync(join(tmpdir(), "mixtape-data-"));
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Writes files by name into a temporary folder; lists are written as JSONL. Returns the folder. */
export function folderOf(files: Readonly<Record<string, string | Uint8Array | readonly unknown[]>>): string {
  const folder = temporary();
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, name)), { recursive: true });
    const isRows = Array.isArray(content);
    writeFileSync(join(folder, name), isRows ? content.map((row) => JSON.stringify(row)).join("\n") : (content as string | Uint8Array));
  }
  return folder;
}

/** Opens a data set that is closed after the test. */
export const openDataset = (async (source: string | readonly string[], options: OpenOptions) => {
  const data = await open(source, options);
  onTestFinished(() => data.close());
  return data;
}) as typeof open;

/** Opens one file of this name and content. */
export function openFile(name: string, content: string | Uint8Array | readonly unknown[], options: Partial<OpenOptions> = {}) {
  return openDataset(join(folderOf({ [name]: content }), name), { tokenizer: bundled, ...options } as OpenOptions & { task: "causal-lm" });
}

/** All of an iterable. */
export async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const list: T[] = [];
  for await (const item of items) list.push(item);
  return list;
}

/** The texts of what an example learns: neighbouring tokens together. */
export function learnt(
  tokenizer: Tokenizer,
  { input_ids, labels }: { readonly input_ids: readonly number[]; readonly labels: readonly number[] },
): string[] {
  const runs: number[][] = [];
  for (const [i, label] of labels.entries()) {
    if (label < 0) continue;
    if (label !== input_ids[i]) throw new Error(`label ${i} is not the token`);
    if (i > 0 && labels[i - 1] >= 0) runs.at(-1)?.push(label);
    else runs.push([label]);
  }
  return runs.map((ids) => tokenizer.decode(ids));
}
