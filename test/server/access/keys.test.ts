/** API keys: created, stored as hashes in a file that is always complete, looked up, revoked, and managed from the command line. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, test } from "vitest";
import { createKey, KeyRing, readKeys, refusal, revokeKey } from "../../../src/server/access/keys.ts";
import { binary, run, temporary } from "../../cli/run.ts";
import { FREE, keyFile } from "../harness.ts";

test("a key has 256 random bits, and the file contains only its hash", async () => {
  const { file, secret, key } = await keyFile();
  expect(Buffer.from(secret.slice("mxt_".length), "base64url")).toHaveLength(32);
  expect(statSync(file).mode & 0o777).toBe(0o600);
  expect(readFileSync(file, "utf8")).not.toContain(secret.slice(4, 20));
  const ring = new KeyRing(await readKeys(file));
  expect(ring.find(secret)).toEqual(key);
  expect(ring.find(`${secret}x`)).toBeNull();
  expect(ring.find("")).toBeNull();
  expect(ring.find(key.hash)).toBeNull(); // who steals the file has no key
});

test("a key stops working when it expires or is revoked", async () => {
  const { key } = await keyFile({ expires: "2026-01-01T00:00:00.000Z" });
  const newYear = Date.parse("2026-01-01T00:00:00Z");
  expect([refusal(key, newYear - 1), refusal(key, newYear)]).toEqual([null, "expired"]);
  expect(refusal({ ...key, revoked: key.created }, newYear - 1)).toBe("revoked");
});

test("concurrent writers lose no key", async () => {
  const file = join(temporary(), "keys.json");
  await Promise.all(Array.from({ length: 20 }, (_, i) => createKey(file, { ...FREE, name: `${i}` })));
  const names = (await readKeys(file)).map(({ name }) => Number(name));
  expect(names.sort((a, b) => a - b)).toEqual(Array.from({ length: 20 }, (_, i) => i));
  expect(existsSync(`${file}.new`)).toBe(false);
});

test("a failed change leaves the file unchanged and no other behind; a killed writer's file is removed", async () => {
  const { file } = await keyFile();
  const before = readFileSync(file, "utf8");
  await expect(revokeKey(file, "nobody")).rejects.toThrow("there is no valid key 'nobody'");
  expect([readFileSync(file, "utf8"), existsSync(`${file}.new`)]).toEqual([before, false]);
  writeFileSync(`${file}.new`, "half");
  utimesSync(`${file}.new`, 1, 1);
  await createKey(file, { ...FREE, name: "bob" });
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

test("the command creates, lists and revokes keys", async () => {
  const file = join(temporary(), "keys.json");
  const made = await run(["keys", "create", file, "--name", "alice", "--requests-per-minute", "60", "--model", "small", "--model", "big"]);
  expect(made.code).toBe(0);
  const secret = made.out.trim();
  expect(secret).toMatch(/^mxt_[\w-]{43}$/);
  const listed = await run(["keys", "list", file]);
  expect(listed.out).toMatch(/^id +name .*\nkey_\w+ +alice +valid +never +small,big +60\/min +no limit\n$/);
  expect(listed.out).not.toContain(secret);
  expect((await run(["keys", "revoke", file, "alice"])).code).toBe(0);
  expect((await run(["keys", "list", file])).out).toContain(" revoked ");
  expect(await run(["keys", "revoke", file, "alice"])).toMatchObject({
    code: 1,
    err: `mixtape: ${file}: there is no valid key 'alice'\n`,
  });
  expect((await run(["keys", "create", file, "--name", "x", "--expires", "soon"])).err).toContain("It must be a date like 2027-01-31");
  expect((await run(["keys", "list", `${file}x`])).err).toContain("no such key file");
});

test("a writer killed while writing leaves a complete file", async () => {
  const { file } = await keyFile();
  for (let kill = 0; kill < 3; kill++) {
    const child = spawn(process.execPath, [binary, "keys", "create", file, "--name", "x"], { stdio: "ignore" });
    const closed = once(child, "close"); // it may be done before it is killed
    while (child.exitCode === null && !existsSync(`${file}.new`)) await sleep(1); // it has begun to write
    child.kill("SIGKILL");
    await closed;
    expect((await readKeys(file)).length).toBeGreaterThanOrEqual(1);
    rmSync(`${file}.new`, { force: true });
  }
});
