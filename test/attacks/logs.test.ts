/** Logs that can't be written: a full disk, a closed pipe, a reader that stops. Lines are lost and counted; the service is not. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { openSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, onTestFinished, test } from "vitest";
import { LogOutput } from "../../src/server/output.ts";
import { binary, run } from "../cli/run.ts";

/** The command, serving; its standard error is read until `url` is known. */
async function serve(stdout: "pipe" | number): Promise<{ child: ChildProcess; url: string }> {
  const child = spawn(process.execPath, [binary, "serve", "--port", "0", "--threads", "1"], { stdio: ["ignore", stdout, "pipe"] });
  onTestFinished(() => void child.kill("SIGKILL"));
  let text = "";
  child.stderr?.setEncoding("utf8").on("data", (part: string) => (text += part));
  await expect.poll(() => text, { timeout: 20_000 }).toMatch(/ at http\S+ /);
  return { child, url: / at (http\S+) /.exec(text)?.[1] ?? "" };
}

async function ask(url: string, times: number): Promise<number> {
  let served = 0;
  for (let i = 0; i < times; i += 20)
    await Promise.all(
      Array.from({ length: 20 }, async () => {
        const response = await fetch(`${url}/v1/models`);
        await response.arrayBuffer();
        if (response.status === 200) served++;
      }),
    );
  return served;
}

async function lost(url: string): Promise<number> {
  const text = await (await fetch(`${url}/metrics`)).text();
  return Number(/^mixtape_log_lines_dropped_total (\d+)$/m.exec(text)?.[1]);
}

test.each<[string, "pipe" | number, (child: ChildProcess) => void]>([
  ["a full disk", openSync("/dev/full", "w"), () => {}],
  ["a closed pipe", "pipe", (child) => void child.stdout?.destroy()],
  ["closed pipes for log and terminal", "pipe", (child) => [child.stdout, child.stderr].map((stream) => stream?.destroy())],
])(
  "%s loses log lines, which are counted; requests are served, and SIGTERM ends the process with 0",
  async (_name, stdout, breakIt) => {
    const { child, url } = await serve(stdout);
    breakIt(child);
    expect(await ask(url, 200)).toBe(200);
    await expect.poll(() => lost(url)).toBeGreaterThanOrEqual(200);
    child.kill("SIGTERM");
    expect(await once(child, "exit")).toEqual([0, null]);
  },
  60_000,
);

test("a pipe that nobody reads delays neither requests nor the end", async () => {
  const { child, url } = await serve("pipe");
  child.stdout?.pause();
  expect(await ask(url, 400)).toBe(400);
  child.kill("SIGTERM");
  expect(await once(child, "exit")).toEqual([0, null]);
}, 60_000);

test("what waits for a stuck device is bounded; what was lost is reported once lines get through again", async () => {
  let release: (error?: Error) => void = () => {};
  const written: string[] = [];
  let stuck = true;
  const output = new LogOutput((text) =>
    stuck
      ? new Promise((resolve, reject) => (release = (error) => (error ? reject(error) : resolve())))
      : Promise.resolve(void written.push(text)),
  );
  const line = `${"x".repeat(999)}\n`;
  for (let i = 0; i < 10_000; i++) output.write(line);
  await sleep(0);
  expect(output.dropped).toBe(10_000 - Math.floor(2 ** 20 / 1000));
  stuck = false;
  release(new Error("EIO"));
  await output.close(1000);
  const all = written.join("");
  const through = all.split(line).length - 1;
  expect(through + output.dropped).toBe(10_000);
  expect(all).toMatch(new RegExp(`"lines":${output.dropped},"msg":"log lines were lost"`));
  output.write(line);
  await output.close(1000);
  expect(written.join("").split("were lost")).toHaveLength(2); // said once
});

test("commands: a closed pipe ends them silently, a full disk with a sentence", async () => {
  const full = spawn(process.execPath, [binary, "--help"], { stdio: ["ignore", openSync("/dev/full", "w"), "pipe"] });
  let text = "";
  full.stderr?.setEncoding("utf8").on("data", (part: string) => (text += part));
  expect(await once(full, "close")).toEqual([1, null]);
  expect(text).toBe("mixtape: standard output can't be written (ENOSPC)\n");
  const piped = spawn(process.execPath, [binary, "generate", "Hello", "--greedy"], { stdio: ["ignore", "pipe", "pipe"] });
  piped.stdout?.destroy();
  text = "";
  piped.stderr?.setEncoding("utf8").on("data", (part: string) => (text += part));
  expect([(await once(piped, "close"))[0], text]).toEqual([0, expect.stringMatching(/^mixtape: the bundled model is a tiny demo.*\n$/)]);
  expect((await run(["--version"])).code).toBe(0);
}, 60_000);
