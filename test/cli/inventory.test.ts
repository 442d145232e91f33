// `mixtape ls`, `show` and `rm`: what is bundled, in the cache and in folders; what is broken or not ours; and what may be deleted.
import { cpSync, existsSync, mkdirSync, readdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { FakeHub } from "../checkpoint/fakehub.ts";
import { GOLDENS } from "../goldens.ts";
import { run, temporary, terminal, tinyModel } from "./run.ts";

/** A cache with a model, an adapter, a repository that lacks its weights, and one of another program. */
function cache(): string {
  const folder = temporary();
  const commit = "c".repeat(40);
  const repo = (name: string, files: Readonly<Record<string, string>>) => {
    const [blobs, snapshot] = [join(folder, name, "blobs"), join(folder, name, "snapshots", commit)];
    for (const each of [blobs, snapshot, join(folder, name, "refs")]) mkdirSync(each, { recursive: true });
    writeFileSync(join(folder, name, "refs", "main"), commit);
    for (const [file, from] of Object.entries(files)) {
      const blob = `${name}-${file}`;
      cpSync(from, join(blobs, blob));
      symlinkSync(join("..", "..", "blobs", blob), join(snapshot, file));
    }
  };
  const dense = join(GOLDENS, "dense-tiny");
  const lora = join(GOLDENS, "moe-tiny/lora-final");
  repo("models--org--dense", { "config.json": join(dense, "config.json"), "model.safetensors": join(dense, "model.safetensors") });
  repo("models--user--adapter", {
    "adapter_config.json": join(lora, "adapter_config.json"),
    "adapter_model.safetensors": join(lora, "adapter_model.safetensors"),
  });
  repo("models--org--half", { "config.json": join(dense, "config.json") });
  const foreign = join(temporary(), "config.json");
  writeFileSync(foreign, JSON.stringify({ model_type: "bert", architectures: ["BertModel"] }));
  repo("models--other--bert", { "config.json": foreign });
  return folder;
}

const jsonOf = async (args: string[], cwd?: string) => {
  const { code, out, err } = await run([...args, "--json"], { cwd });
  expect(code, err).toBe(0);
  return JSON.parse(out);
};

test("ls lists the bundled model, the cache and folders, with kinds, formats, sizes and faults", async () => {
  const cache_dir = cache();
  const folders = temporary();
  cpSync(join(GOLDENS, "moe-tiny"), join(folders, "mine/moe"), { recursive: true });
  writeFileSync(join(folders, "notes.txt"), "nothing");
  mkdirSync(join(folders, "broken"));
  writeFileSync(join(folders, "broken/config.json"), JSON.stringify({ model_type: "ernie4_5", hidden_size: "wide" }));
  const items = await jsonOf(["ls", folders, "--cache-dir", cache_dir]);
  const brief = items.map(({ name, kind, format, place }: Record<string, string>) => [name.replace(folders, "HERE"), kind, format, place]);
  expect(brief).toEqual([
    ["default", "model", "int8", "bundled"],
    ["org/dense", "model", "f32", "cache"],
    ["org/half", "model", null, "cache"],
    ["user/adapter", "adapter", "f32", "cache"],
    ["HERE/broken", "model", null, "folder"],
    ["HERE/mine/moe", "model", "f32", "folder"],
    ...readdirSync(join(GOLDENS, "moe-tiny"))
      .filter((name) => name.startsWith("lora-"))
      .sort()
      .map((name) => [`HERE/mine/moe/${name}`, "adapter", "f32", "folder"]),
  ]);
  const by = (name: string) => items.find((item: { name: string }) => item.name.endsWith(name));
  expect(by("org/half").fault).toBe("model.safetensors is missing");
  expect(by("broken").fault).toContain("hidden_size");
  expect(by("org/dense").revisions).toEqual({ main: "c".repeat(40) });
  expect(by("org/dense").bytes).toBeGreaterThan(700_000);
  const { out, err } = await run(["ls", folders, "--cache-dir", cache_dir]);
  expect(out).toMatch(/^org\/half +model +- +\d+ B|^org\/half +model +- +[\d.]+ kB +cache +model\.safetensors is missing$/m);
  expect(err).toBe("1 other repository in the cache: not for mixtape\n");
  const here = await jsonOf(["ls", "--cache-dir", cache_dir], join(folders, "mine"));
  expect(here.map(({ name }: { name: string }) => name)).toContain("moe");
});

test("show tells one of them, its files and base; what is not here is named", async () => {
  const cache_dir = cache();
  const shown = await jsonOf(["show", "user/adapter", "--cache-dir", cache_dir]);
  expect(shown).toMatchObject({ name: "user/adapter", kind: "adapter", place: "cache", base: null, fault: null });
  expect(shown.files.map(({ name }: { name: string }) => name)).toEqual(["adapter_config.json", "adapter_model.safetensors"]);
  expect((await run(["show", "org/dense", "--cache-dir", cache_dir])).out).toMatch(/^org\/dense\n {2}kind +model\n {2}format +f32\n/);
  const absent = await run(["show", "org/nothing", "--cache-dir", cache_dir]);
  expect([absent.code, absent.err]).toEqual([
    1,
    "mixtape: org/nothing: no model or adapter of this name is on this machine; mixtape ls lists those that are\n",
  ]);
  for (const name of ["other/bert", "../x", "a/b/c"]) expect((await run(["show", name, "--cache-dir", cache_dir])).code).toBe(1);
});

test("rm deletes a repository or a folder with --yes, and asks without; it never deletes what is not a model's", async () => {
  const cache_dir = cache();
  const repo = join(cache_dir, "models--org--dense");
  const asked = await run(["rm", "org/dense", "--cache-dir", cache_dir]);
  expect([asked.code, asked.err]).toEqual([
    1,
    expect.stringMatching(/^mixtape: Delete org\/dense \([\d.]+ \wB, downloaded, 1 revision\)\? .*--yes/),
  ]);
  expect(existsSync(repo)).toBe(true);
  const gone = await run(["rm", "org/dense", "user/adapter", "--cache-dir", cache_dir, "--yes"]);
  expect(gone.out).toMatch(/^deleted org\/dense .*\ndeleted user\/adapter .*\n$/);
  expect(readdirSync(cache_dir).sort()).toEqual(["models--org--half", "models--other--bert"]);

  const model = tinyModel();
  const some = await run(["rm", model, "org/nothing", "--yes", "--cache-dir", cache_dir]);
  expect([some.code, existsSync(model)]).toEqual([1, true]); // all must be there before one is deleted
  writeFileSync(join(model, "thesis.tex"), "years of work");
  const kept = await run(["rm", model, "--yes"]);
  expect([kept.code, kept.err]).toEqual([1, expect.stringContaining("holds thesis.tex, which is no part of a model")]);
  const link = join(temporary(), "link");
  symlinkSync(model, link);
  expect((await run(["rm", link, "--yes"])).code).toBe(1);
  expect((await run(["rm", "default", "--yes"])).err).toContain("the bundled model belongs to the package");
  expect(existsSync(join(model, "model.safetensors"))).toBe(true);

  const other = tinyModel();
  for (const [answer, there] of [
    ["n", true],
    ["y", false],
  ] as const) {
    const child = terminal(["rm", other]);
    const ended = new Promise((resolve) => child.on("close", resolve));
    child.stdout?.on("data", (part: Buffer) => {
      if (String(part).includes("[y/N]")) child.stdin?.write(`${answer}\n`);
    });
    await ended;
    expect(existsSync(other)).toBe(there);
  }
}, 60_000);

test("what pull fetched is listed, and rm makes it be fetched again", async () => {
  const hub = new FakeHub();
  await hub.start();
  try {
    for (const name of ["config.json", "model.safetensors"])
      hub.files.set(name, (await import("node:fs")).readFileSync(join(GOLDENS, "dense-tiny", name)));
    const env = { HF_ENDPOINT: hub.endpoint, HF_HUB_CACHE: temporary(), HF_HUB_OFFLINE: "0" };
    await run(["pull", "org/model"], { env });
    expect((await run(["ls", "/nowhere"], { env })).out).toMatch(/^org\/model +model +f32/m);
    expect((await run(["rm", "org/model", "-y"], { env })).code).toBe(0);
    expect((await run(["ls", "/nowhere"], { env })).out).not.toContain("org/model");
    expect((await run(["pull", "org/model", "--offline"], { env })).code).toBe(1);
  } finally {
    await hub.stop();
  }
});
