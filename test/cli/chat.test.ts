// `chat`: over a pipe, for one question, and at a terminal.
import type { ChildProcess } from "node:child_process";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { expect, test } from "vitest";
import { pipedLines, readMessage } from "../../src/cli/input.ts";
import { finished, run, temporary, terminal, tinyModel } from "./run.ts";

type Messages = { role: string; content: string }[];
const LIMIT = ["--max-new-tokens", "6", "--greedy"];

test("over a pipe: one message per line, /system, /save, /reset, /load", async () => {
  const [model, folder] = [tinyModel(), temporary()];
  const [a, b, c] = ["a.json", "b.json", "c.json"].map((name) => join(folder, name));
  const input = `/system be kind\nhello\nmore\\\nlines\n/save ${a}\n/reset\n"""\nin a\nblock\n"""\n/save ${b}\n/load ${a}\n/regenerate\n/save ${c}\n/exit\nnever read\n`;
  const { code, err } = await run(["chat", "-m", model, ...LIMIT], { input });
  expect(code, err).toBe(0);
  const read = (file: string) => JSON.parse(readFileSync(file, "utf8")) as Messages;
  expect(read(a).map((m) => m.role)).toEqual(["system", "user", "assistant", "user", "assistant"]);
  expect(read(a)[0].content).toBe("be kind");
  expect(read(a)[3].content).toBe("more\nlines");
  expect(read(b).map((m) => m.role)).toEqual(["system", "user", "assistant"]);
  expect(read(b)[1].content).toBe("in a\nblock");
  expect(read(c)).toEqual(read(a)); // greedy: the same answer again
  expect(readdirSync(folder).sort()).toEqual(["a.json", "b.json", "c.json"]); // nothing temporary left
});

test("a question gets one answer on standard output", async () => {
  const model = tinyModel();
  const once = await run(["chat", "hello", "-m", model, ...LIMIT]);
  expect(once.code).toBe(0);
  const piped = await run(["chat", "-m", model, ...LIMIT], { input: "hello" });
  expect(piped.out).toBe(once.out);
});

test("lines that begin with a slash can be messages", async () => {
  const file = join(temporary(), "a.json");
  const lines = ["//help me", "/etc/passwd is a path", "/", "// a comment", "//", "/2 of 3", "//cdn.example.com/a.js"];
  const { code, err } = await run(["chat", "-m", tinyModel(), ...LIMIT], { input: `${lines.join("\n")}\n/save ${file}\n` });
  expect(code, err).toBe(0);
  const messages = JSON.parse(readFileSync(file, "utf8")) as Messages;
  expect(messages.filter(({ role }) => role === "user").map(({ content }) => content)).toEqual(["/help me", ...lines.slice(1)]);
  const unknown = await run(["chat", "-m", tinyModel(), ...LIMIT], { input: "/halp\n" });
  expect(unknown.err).toContain("there is no command /halp; there are /system");
  expect(unknown.err).toContain("to send the line as a message, write //halp");
});

test("over a pipe, an error ends it with exit code 1", async () => {
  const model = tinyModel();
  const broken = join(temporary(), "broken.json");
  writeFileSync(broken, '[{"role": "robot", "content": "x"}]');
  for (const [input, message] of [
    ["/nonsense", "there is no command /nonsense"],
    ["/load /no/such.json", "/no/such.json: can't be read"],
    [`/load ${broken}`, "message 0 is not like"],
    ["/save /no/such/folder/a.json", "can't be written"],
    ["/regenerate", "there is no question yet"],
  ]) {
    const { code, out, err } = await run(["chat", "-m", model, ...LIMIT], { input: `${input}\nhello\n` });
    expect([code, out]).toEqual([1, ""]);
    expect(err).toMatch(/^mixtape: .+\n$/);
    expect(err).toContain(message);
  }
});

test("a conversation longer than the model's positions drops its oldest turns with a notice", async () => {
  const config = JSON.parse(readFileSync(join(tinyModel(), "config.json"), "utf8")) as object;
  const model = tinyModel({ "config.json": { ...config, max_position_embeddings: 96 } });
  const file = join(temporary(), "a.json");
  const { code, err } = await run(["chat", "-m", model, ...LIMIT], { input: `one two\nthree four\nfive six\nseven\n/save ${file}\n` });
  expect(code, err).toBe(0);
  expect(err).toMatch(/\(the oldest \d+ messages were dropped: the model's limit is 96 tokens\)/);
  const messages = JSON.parse(readFileSync(file, "utf8")) as Messages;
  expect(messages[0].role).toBe("user");
  expect(messages.at(-2)?.content).toBe("seven");
});

/** For typing `keys` once the terminal shows `wanted`, in what has arrived since the last call. */
function typist(child: ChildProcess): (wanted: RegExp, keys: string) => Promise<void> {
  let seen = "";
  child.stdout?.on("data", (part: Buffer) => void (seen += part.toString()));
  return async (wanted, keys) => {
    await expect.poll(() => seen, { timeout: 50_000 }).toMatch(wanted);
    seen = "";
    child.stdin?.write(keys);
  };
}

test("at a terminal: Ctrl-C stops the answer and keeps the session and the conversation", async () => {
  const file = join(temporary(), "a.json");
  const child = terminal(["chat", "-m", tinyModel(), "--greedy", "--max-new-tokens", "3500", "--logit-bias", "2=-inf"]);
  const done = finished(child);
  const type = typist(child);
  await type(/› /, "hello\r");
  await type(/hello[\s\S]*\n[\s\S]{20}/, "\x03"); // the answer has begun
  await type(/\(stopped\)[\s\S]*tokens\/s[\s\S]*› /, `/save ${file}\r`);
  await type(/saved 2 messages[\s\S]*› /, "\x1b[A\x1b[A\x03"); // up twice: "hello" again; then thrown away
  await type(/Ctrl-C again[\s\S]*› /, "/stats\r");
  await type(/1 answer, [\s\S]*› /, "\x04");
  expect((await done).code).toBe(0);
  expect(existsSync(file)).toBe(true);
  const messages = JSON.parse(readFileSync(file, "utf8")) as Messages;
  expect(messages.map((m) => m.role)).toEqual(["user", "assistant"]);
  expect(messages[1].content.length).toBeGreaterThan(0);
});

test("at a terminal: Ctrl-C twice leaves", async () => {
  const child = terminal(["chat", "-m", tinyModel()]);
  const done = finished(child);
  const type = typist(child);
  await type(/› /, "\x03");
  await type(/Ctrl-C again/, "\x03");
  expect((await done).code).toBe(0);
});

test("messages of several lines", async () => {
  const input = new PassThrough();
  input.end('one\ntwo \\\nthree\n"""four\n\nfive"""\n"""six"""\nlast \\');
  const lines = pipedLines(input);
  const messages: (string | null)[] = [];
  do messages.push(await readMessage(lines, "", ""));
  while (messages.at(-1) !== null);
  expect(messages).toEqual(["one", "two \nthree", "four\n\nfive", "six", "last \\", null]);
});

test("with the bundled model, one line says what it is and how to load a real one", async () => {
  const { code, out, err } = await run(["chat", "What is the capital of Japan?", "--greedy"]);
  expect([code, out]).toEqual([0, "The capital of Japan is Tokyo.\n"]);
  expect(err).toMatch(/^mixtape: the bundled model is a tiny demo.*-m baidu\/ERNIE-4\.5-21B-A3B-PT.*\n$/);
});
