// The first minutes: versions, help of commands that have others, misspelt words everywhere, completions, a Node that is too old, a hub that is away.
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { FakeHub } from "../checkpoint/fakehub.ts";
import { binary, run, temporary } from "./run.ts";

const { version, engines } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8"));

test.each([["-v"], ["-V"], ["--version"], ["version"]])("%s prints the version", async (word) => {
  expect(await run([word])).toEqual({ code: 0, out: `${version}\n`, err: "" });
});

test("keys alone prints its help", async () => {
  const { code, out, err } = await run(["keys"]);
  expect([code, err]).toEqual([0, ""]);
  for (const name of ["create", "list", "revoke"]) expect(out).toMatch(new RegExp(`^  ${name} `, "m"));
});

test.each([
  [["keys", "creat", "f"], "unknown command 'keys creat' (Did you mean create?)"],
  [["keys", "foo"], "unknown command 'keys foo': it must be create, list or revoke"],
  [["keys", "create", "f", "--nam", "x"], "unknown option '--nam' (Did you mean --name?)"],
  [["quantize", "a", "b", "--dtyp=int8"], "unknown option '--dtyp' (Did you mean --dtype?)"],
  [["quantize", "a", "b"], "required option '--dtype <format>' not specified"],
  [["--verson"], "unknown option '--verson' (Did you mean --version?)"],
  [["serve", "--prt", "3"], "unknown option '--prt' (Did you mean --port?)"],
  [["completion", "tcsh"], "command-argument value 'tcsh' is invalid for argument 'shell'. It must be bash, zsh, fish."],
])("%j: one line, exit code 1", async (args, message) => {
  expect(await run(args)).toEqual({ code: 1, out: "", err: `mixtape: ${message}\n` });
});

test("options of train that are no fields are suggested, too", async () => {
  const config = join(temporary(), "recipe.yaml");
  writeFileSync(config, "dataset: rows.jsonl\n");
  expect((await run(["train", config, "--dry-rnu"])).err).toBe("mixtape: there is no option --dry-rnu; did you mean 'dry-run'?\n");
});

test("a Node without what the server needs is refused in one line that says which one is needed", () => {
  const old = spawnSync(process.execPath, ["--no-experimental-require-module", binary, "--version"], { encoding: "utf8" });
  const [, older, least] = /^\^(\d+\.\d+) \|\| >=(\d+\.\d+)$/.exec(engines.node) ?? [];
  expect([old.status, old.stdout]).toEqual([1, ""]);
  expect(old.stderr).toBe(
    `mixtape: Node ${process.versions.node} is too old: ${least} or later is needed (${older} or later of version 20 works, too)\n`,
  );
});

test("a bare name that is no folder says so first, and a hub that is away ends it at once", async () => {
  const hub = new FakeHub();
  await hub.start();
  const { endpoint } = hub;
  await hub.stop();
  const env = { HF_ENDPOINT: endpoint, HF_HUB_CACHE: temporary(), HF_HUB_OFFLINE: "0" };
  const { code, err } = await run(["info", "my-model"], { env });
  expect(code).toBe(1);
  expect(err).toMatch(
    /^mixtape: my-model: no local folder has this name; can't reach http:\S+ \(connect ECONNREFUSED \S+\), and the cache/,
  );
  expect(err).not.toContain("trying again");
});

test("retries of a hub that fails are shown", async () => {
  const hub = new FakeHub();
  await hub.start();
  try {
    let left = 1;
    hub.fault = (_request, response) => {
      if (left-- > 0) response.writeHead(503).end();
      else response.writeHead(404, { "x-error-code": "RepoNotFound" }).end();
      return true;
    };
    const env = { HF_ENDPOINT: hub.endpoint, HF_HUB_CACHE: temporary(), HF_HUB_OFFLINE: "0" };
    const { err } = await run(["info", "my-model"], { env });
    expect(err).toMatch(/^mixtape: my-model: http:\S+ answers 503; trying again in 1 s \(attempt 2 of 5\)\n/);
    expect(err).toMatch(/not found: no repository/);
  } finally {
    await hub.stop();
  }
});

/** What bash offers for these words, the last one being completed. */
function bash(script: string, ...words: string[]): string[] {
  const set = `COMP_WORDS=(${words.map((word) => `'${word}'`).join(" ")}); COMP_CWORD=${words.length - 1}; _mixtape; printf '%s\\n' "\${COMPREPLY[@]}"`;
  const { stdout, stderr } = spawnSync("bash", ["-c", `${script}\n${set}`], { encoding: "utf8" });
  expect(stderr).toBe("");
  return stdout.split("\n").filter(Boolean);
}

test("completions are made of the commands, their options and values", async () => {
  const scripts = Object.fromEntries(
    await Promise.all(["bash", "zsh", "fish"].map(async (shell) => [shell, (await run(["completion", shell])).out])),
  );
  const help = (await run(["--help"])).out;
  const commands = [...help.matchAll(/^ {2}([a-z]+)(?: |$)/gm)]
    .map(([, name]) => name)
    .filter((name) => name !== "mixtape" && name !== "help");
  expect(commands.length).toBeGreaterThan(10);
  for (const script of Object.values(scripts)) for (const name of commands) expect(script).toContain(name);
  expect(bash(scripts.bash, "mixtape", "ge")).toEqual(["generate"]);
  expect(bash(scripts.bash, "mixtape", "generate", "--gre")).toEqual(["--greedy"]);
  expect(bash(scripts.bash, "mixtape", "generate", "some text", "--dtype", "in")).toEqual(["int8", "int4"]);
  expect(bash(scripts.bash, "mixtape", "keys", "c")).toEqual(["create"]);
  expect(bash(scripts.bash, "mixtape", "keys", "create", "keys.json", "--na")).toEqual(["--name"]);
  expect(bash(scripts.bash, "mixtape", "generate", "zzz")).toEqual([]); // left to files
  if (existsSync("/usr/bin/fish")) {
    const ask = (line: string) =>
      spawnSync("fish", ["-c", `${scripts.fish}\ncomplete -C '${line}'`], { encoding: "utf8", env: { ...process.env, HOME: temporary() } });
    const offered = (line: string) =>
      ask(line)
        .stdout.split("\n")
        .map((each) => each.split("\t")[0]);
    expect(offered("mixtape ge")).toContain("generate");
    expect(offered("mixtape generate --gre")).toContain("--greedy");
    expect(offered("mixtape generate --dtype in")).toEqual(expect.arrayContaining(["int8", "int4"]));
    expect(offered("mixtape keys create x --na")).toContain("--name");
  }
  if (existsSync("/usr/bin/zsh")) {
    // compadd and _describe only work within completion: stand-ins say what would be offered.
    const stubs = `compdef() {}; compadd() { print -l -- $@[2,-1] }; _describe() { print -l -- \${(P)2} }; _files() { print files }`;
    const ask = (words: string, current: number, prefix: string) =>
      spawnSync(
        "zsh",
        ["-f", "-c", `${stubs}\n${scripts.zsh}\nwords=(${words}); CURRENT=${current}; PREFIX='${prefix}'; _mixtape; print -- $PATH`],
        {
          encoding: "utf8",
        },
      ).stdout;
    expect(ask("mixtape ge", 2, "ge")).toContain("generate:");
    expect(ask("mixtape generate --gre", 3, "--gre")).toContain("--greedy:");
    expect(ask("mixtape generate --dtype in", 4, "in")).toMatch(/^auto\nfp32\n[\s\S]*int8\n/);
    expect(ask("mixtape keys create x --na", 5, "--na")).toContain("--name:");
    expect(ask("mixtape generate zzz", 3, "zzz")).toMatch(/^files\n/);
  }
});
