// Small tokenizers in temporary folders, for the tests of this folder.
import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { onTestFinished } from "vitest";

export const fixtures = fileURLToPath(new URL("../fixtures/tokenizer/", import.meta.url));

/** A folder with these files, gone after the test. Values that are no strings are written as JSON. */
export function folder(files: Readonly<Record<string, unknown>>): string {
  const path = mkdtempSync(join(tmpdir(), "mixtape-tokenizer-"));
  onTestFinished(() => rmSync(path, { recursive: true, force: true }));
  for (const [name, value] of Object.entries(files))
    writeFileSync(join(path, name), typeof value === "string" || value instanceof Uint8Array ? value : JSON.stringify(value));
  return path;
}

/** A folder with one fixture under another name, and more files. */
export function fixtureFolder(fixture: string, name: string, files: Readonly<Record<string, unknown>> = {}): string {
  const path = folder(files);
  cpSync(join(fixtures, fixture), join(path, name));
  return path;
}

/** The chat template of the published ERNIE 4.5 -PT models, which knows no role but these three. */
export const ernieTemplate =
  "{{- '<|begin_of_sentence|>' -}}{%- for message in messages -%}{%- if message['role'] == 'user' -%}" +
  "{{- 'User: ' + message['content'] + '\\n' -}}{%- elif message['role'] == 'assistant' -%}" +
  "{{- 'Assistant: ' + message['content'] + '<|end_of_sentence|>' -}}{%- elif message['role'] == 'system' -%}" +
  "{{- message['content'] + '\\n' -}}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}";

export const ernieConfig = {
  bos_token: "<s>",
  eos_token: "</s>",
  unk_token: "<unk>",
  pad_token: "<unk>",
  cls_token: "<|begin_of_sentence|>",
  sep_token: "<|end_of_sentence|>",
  mask_token: "<mask:0>",
  model_max_length: 4096,
  chat_template: ernieTemplate,
};

const bytes = Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
const tokens = [
  ...["<unk>", "<s>", "</s>", "<mask:0>", "<|begin_of_sentence|>", "<|end_of_sentence|>"],
  ...bytes,
  ...["▁", "a", "b", "中", "文", "😀", "▁a", "ab", "中文"],
];

/** A tokenizer.json of 271 tokens: six special, 256 bytes, nine of text. `change` replaces parts of it. */
export function miniJson(change: Readonly<Record<string, unknown>> = {}): Record<string, unknown> {
  return {
    added_tokens: tokens.slice(0, 6).map((content, id) => ({ id, content, special: true, normalized: false })),
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
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: [
        ["▁", "a"],
        ["a", "b"],
        ["中", "文"],
      ],
    },
    ...change,
  };
}
