/** API keys: made, kept as hashes in a file that is whole at any time, found again, revoked, and used by the command line. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, test } from "vitest";
import { changeKeys, createKey, KeyRing, readKeys, refusal } from "../../src/server/keys.ts";
import { binary, run, temporary } from "../cli/run.ts";

const terms = { name: "alice", expires: null, models: null, requestsPerMinute: null, tokensPerDay: null };

test("a key has 256 random bits, and the file knows only its hash", async () => {
  const file = join(temporary(), "keys.json");
  const { secret, key } = createKey(terms);
  expect(Buffer.from(secret.slice("mxt_".length), "base64url")).toHaveLength(32);
  await changeKeys(file, () => [key]);
  expect(statSync(file).mode & 0o777).toBe(0o600);
  expect(readFileSync(file, "utf8")).not.toContain(secret.slice(4, 20));
  const ring = new KeyRing(await readKeys(file));
  expect(ring.find(secret)).toEqual(key);
  expect(ring.find(`${secret}x`)).toBeNull();
  expect(ring.find("")).toBeNull();
  expect(ring.find(key.hash)).toBeNull(); // who steals the file has no key
});

test("a key ends when it expires or is revoked", () => {
  const { key } = createKey({ ...terms, expires: "2026-01-01T00:00:00.000Z" });
  const new_year = Date.parse("2026-01-01T00:00:00Z");
  expect([refusal(key, new_year - 1), refusal(key, new_year)]).toEqual([null, "expired"]);
  expect(refusal({ ...key, revoked: key.created }, new_year - 1)).toBe("revoked");
});

test("many writers at once lose no key", async () => {
  const file = join(temporary(), "keys.json");
  await Promise.all(Array.from({ length: 20 }, (_, i) => changeKeys(file, (keys) => [...keys, createKey({ ...terms, name: `${i}` }).key])));
  const names = (await readKeys(file)).map(({ name }) => Number(name));
  expect(names.sort((a, b) => a - b)).toEqual(Array.from({ length: 20 }, (_, i) => i));
  expect(existsSync(`${file}.new`)).toBe(false);
});

test("a change that fails leaves the file and no other behind; a killed writer's file is taken away", async () => {
  const file = join(temporary(), "keys.json");
  await changeKeys(file, () => [createKey(terms).key]);
  const before = readFileSync(file, "utf8");
  const fails = () => {
    throw new Error("no");
  };
  await expect(changeKeys(file, fails)).rejects.toThrow("no");
  expect([readFileSync(file, "utf8"), existsSync(`${file}.new`)]).toEqual([before, false]);
  writeFileSync(`${file}.new`, "half");
  utimesSync(`${file}.new`, 1, 1);
  await changeKeys(file, (keys) => [...keys, createKey({ ...terms, name: "bob" }).key]);
  expect(await readKeys(file)).toHaveLength(2);
});

test.each([
  ["", "broken JSON"],
  ["[]", "not a key file: the whole"],
  ['{"version":2,"keys":[]}', "not a key file: version"],
  ['{"version":1,"keys":[{"id":"key_00000000"}]}', "not a key file: keys.0.name"],
])("%j is no key file", async (text, message) => {
  const file = join(temporary(), "keys.json");
  writeFileSync(file, text);
  await expect(readKeys(file)).rejects.toThrow(message);
});

test("the command makes, lists and revokes", async () => {
  const file = join(temporary(), "keys.json");
  const made = await run(["keys", "create", "alice", "--key-file", file, "--requests-per-minute", "60", "--models", "small,big"]);
  expect(made.code).toBe(0);
  const secret = made.out.trim();
  expect(secret).toMatch(/^mxt_[\w-]{43}$/);
  const listed = await run(["keys", "list", "--key-file", file]);
  expect(listed.out).toMatch(/^id +name .*\nkey_\w+ +alice .* valid +small,big +60 +-\n$/);
  expect(listed.out).not.toContain(secret);
  expect((await run(["keys", "revoke", "alice", "--key-file", file])).code).toBe(0);
  expect((await run(["keys", "list", "--key-file", file, "--json"])).out).toContain('"revoked": "20');
  expect(await run(["keys", "revoke", "alice", "--key-file", file])).toMatchObject({ code: 1, err: "mixtape: alice is revoked already\n" });
  expect((await run(["keys", "revoke", "bob", "--key-file", file])).err).toContain("has no key with the id or name bob");
  expect((await run(["keys", "create", "x", "--expires", "soon", "--key-file", file])).err).toContain("It must be a date like 2027-01-31");
  expect((await run(["keys", "list", "--key-file", `${file}x`])).err).toContain("no such key file");
});

test("killed at any moment, a writer leaves a whole file", async () => {
  const file = join(temporary(), "keys.json");
  await changeKeys(file, () => Array.from({ length: 500 }, (_, i) => createKey({ ...terms, name: `${i}` }).key));
  for (let kill = 0; kill < 3; kill++) {
    const child = spawn(process.execPath, [binary, "keys", "create", "x", "--key-file", file], { stdio: "ignore" });
    while (child.exitCode === null && !existsSync(`${file}.new`)) await sleep(1); // it has begun to write
    child.kill("SIGKILL");
    await once(child, "close");
    expect((await readKeys(file)).length).toBeGreaterThanOrEqual(500);
    rmSync(`${file}.new`, { force: true });
  }
});
