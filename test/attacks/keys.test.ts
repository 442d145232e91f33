/** Revoked keys stop working, whatever happens to the key file; writers of the file lose nothing, and nobody learns what it holds. */
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import {
  chmodSync,
  chownSync,
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { Client, credentials } from "@grpc/grpc-js";
import { expect, onTestFinished, test } from "vitest";
import { Gate } from "../../src/server/access/gate.ts";
import { createKey, readKeys, revokeKey } from "../../src/server/access/keys.ts";
import { withLock } from "../../src/server/access/lock.ts";
import type { ServerError } from "../../src/server/errors.ts";
import { createLogger } from "../../src/server/logs.ts";
import { binary, run, temporary } from "../cli/run.ts";
import { FREE, keptLines, keyFile } from "../server/harness.ts";
import { startHere } from "../server/start.ts";

const root = process.geteuid?.() === 0;
const canMount = root && spawnSync("unshare", ["-m", "true"]).status === 0;
const built = fileURLToPath(new URL("../../dist/server/access/", import.meta.url));

/** A process of its own that runs this code with `keys` and `lock`, the built modules. */
function apart(code: string) {
  const imports = `const keys = await import(${JSON.stringify(join(built, "keys.js"))}), lock = await import(${JSON.stringify(join(built, "lock.js"))});`;
  const child = spawn(process.execPath, ["--input-type=module", "-e", imports + code], { stdio: ["ignore", "ignore", "pipe"] });
  let text = "";
  child.stderr.setEncoding("utf8").on("data", (part: string) => (text += part));
  return { child, ended: once(child, "close").then(([code]) => ({ code: code as number | null, text })) };
}

test("60 simultaneous writers in 12 processes, and others that are killed: each key that was confirmed is there", async () => {
  const { file } = await keyFile();
  const make = (name: string, times: number) =>
    apart(`await Promise.all(Array.from({ length: ${times} }, (_, i) =>
      keys.createKey(${JSON.stringify(file)}, { ...${JSON.stringify(FREE)}, name: ${JSON.stringify(name)} + i })));`);
  const killed = Array.from({ length: 4 }, (_, i) => make(`killed${i}-`, 200));
  const writers = Array.from({ length: 12 }, (_, i) => make(`${i}-`, 5));
  for (const [i, { child }] of killed.entries()) {
    await sleep(100 + 150 * i);
    await expect.poll(() => readdirSync(dirname(file)), { interval: 1 }).toContain("keys.json.lock");
    child.kill("SIGKILL");
  }
  expect(await Promise.all(writers.map(({ ended }) => ended))).toEqual(writers.map(() => ({ code: 0, text: "" })));
  const names = new Set((await readKeys(file)).map(({ name }) => name));
  for (let i = 0; i < 12; i++) for (let k = 0; k < 5; k++) expect(names).toContain(`${i}-${k}`);
  expect(readdirSync(dirname(file)).filter((name) => /\.lock|\.new/.test(name))).toEqual([]);
}, 60_000);

test("a lock whose holder died is taken over by one at a time; one whose holder may live is not", async () => {
  const folder = temporary();
  const lock = join(folder, "lock");
  for (let round = 0; round < 5; round++) {
    const { ended } = apart(`await lock.withLock(${JSON.stringify(lock)}, async () => process.kill(process.pid, "SIGKILL"));`);
    expect((await ended).code).toBe(null);
    let inside = 0;
    let most = 0;
    await Promise.all(
      Array.from({ length: 30 }, () =>
        withLock(lock, async () => {
          most = Math.max(most, ++inside);
          await sleep(1);
          inside--;
        }),
      ),
    );
    expect([most, readdirSync(folder)]).toEqual([1, []]);
  }
  symlinkSync("elsewhere:1:1:abc", lock);
  await expect(withLock(lock, async () => {}, 100)).rejects.toThrow(
    `${lock} is held by process 1; if that no longer runs, delete this file`,
  );
  rmSync(lock);
  writeFileSync(lock, "");
  await expect(withLock(lock, async () => {}, 100)).rejects.toThrow("if that no longer runs, delete this file");
}, 60_000);

test.skipIf(!root)("a change keeps owner, group and mode, and a link stays a link", async () => {
  const { file, key } = await keyFile();
  const link = join(temporary(), "keys.json");
  symlinkSync(file, link);
  chownSync(file, 10_001, 10_002);
  chmodSync(file, 0o640);
  await revokeKey(link, key.id);
  await createKey(link, { ...FREE, name: "another" });
  const { uid, gid, mode } = statSync(file);
  expect([uid, gid, mode & 0o7777, (await readKeys(file)).length]).toEqual([10_001, 10_002, 0o640, 2]);
  expect(readdirSync(dirname(link))).toEqual([basename(link)]);
});

test.skipIf(!root)("who can't keep the owner does not write", async () => {
  const { file, key } = await keyFile();
  chmodSync(dirname(file), 0o777);
  chmodSync(file, 0o644);
  process.seteuid?.(10_003);
  try {
    await expect(revokeKey(file, key.id)).rejects.toThrow(
      "belongs to user 0 and group 0, and must stay so; run this as that user or as root",
    );
  } finally {
    process.seteuid?.(0);
  }
  expect((await readKeys(file))[0].revoked).toBe(null);
  expect(readdirSync(dirname(file))).toEqual([basename(file)]);
});

test.skipIf(!canMount)(
  "a file that is mounted by itself: writing says what to do, and a stale one is refused (needs root)",
  async () => {
    const { file, key } = await keyFile();
    const inside = join(temporary(), "keys.json");
    writeFileSync(inside, "");
    const script = `mount --bind ${file} ${inside}
    ${process.execPath} ${binary} keys revoke ${inside} ${key.id}; echo "code $?"
    ${process.execPath} ${binary} keys revoke ${file} ${key.id} > /dev/null 2>&1; echo "code $?"
    ${process.execPath} ${binary} keys list ${inside}; echo "code $?"`;
    const { stdout, stderr } = spawnSync("unshare", ["-m", "sh", "-c", script], { encoding: "utf8" });
    expect(stdout.split("\n").filter(Boolean)).toEqual(["code 1", "code 0", "code 1"]);
    expect(stderr).toContain(
      "mounted as a single file, which can't be replaced; change it where it is mounted from; mount its directory instead",
    );
    expect(stderr).toContain("replaced where it is mounted from; mount its directory instead of the file");
  },
  30_000,
);

const SECRET = "hunter2-XYZZY";

const SPOILT: readonly (readonly [string, (file: string) => void, RegExp])[] = [
  ["gone", (file) => rmSync(file), /no such key file/],
  ["broken", (file) => writeFileSync(file, `{"version": 1, ${SECRET}`), /broken JSON/],
  ["empty", (file) => writeFileSync(file, ""), /broken JSON/],
  ["a field too many", (file) => writeFileSync(file, `{"version": 1, "keys": [], "${SECRET}": 1}`), /fields that no key has/],
  ["another file", (file) => writeFileSync(file, `["${SECRET}"]`), /not a key file/],
  ["a folder", (file) => [rmSync(file), mkdirSync(file)], /not a file/],
  ["a pipe", (file) => [rmSync(file), spawnSync("mkfifo", [file])], /not a file/],
  ["a link to nowhere", (file) => [rmSync(file), symlinkSync(`/nowhere/${SECRET}`, file)], /no such key file/],
];

test("a key file that can't be read: old keys work for the grace, then none does, until it is back; the log quotes nothing", async () => {
  const limits = { running: 1, queued: 1, perOwner: null, queueSeconds: 1 };
  const outcome = (gate: Gate, secret: string) => {
    try {
      return gate.authenticate(secret).id && "ok";
    } catch (error) {
      return (error as ServerError).code;
    }
  };
  const spoilOne = async ([name, spoil, reason]: (typeof SPOILT)[number]) => {
    const { file, secret } = await keyFile();
    const good = readFileSync(file);
    const { sink, lines } = keptLines();
    const gate = await Gate.open({ keyFile: file, graceSeconds: 3, usageFile: null, limits, log: createLogger("trace", sink) });
    onTestFinished(() => gate.close());
    spoil(file);
    await expect.poll(() => gate.keysFault?.reason, { interval: 20, message: name }).toMatch(reason);
    expect([gate.keysFault?.refusing, outcome(gate, secret)], name).toEqual([false, "ok"]);
    await expect.poll(() => outcome(gate, secret), { message: name }).toBe("not_ready");
    await expect.poll(() => lines(), { message: name }).toContain("all keys are refused");
    expect(lines() + gate.keysFault?.reason, name).not.toContain(SECRET);
    expect(lines().split('"level":"error"'), name).toHaveLength(3); // for the file, and for the end of the grace
    rmSync(file, { recursive: true, force: true });
    writeFileSync(file, good);
    await expect.poll(() => outcome(gate, secret), { message: name }).toBe("ok");
    expect(gate.keysFault, name).toBe(null);
  };
  await Promise.all(SPOILT.map(spoilOne));
}, 30_000);

test("/ready and the metrics tell of a key file that can't be read, and requests are refused after the grace", async () => {
  const { file, secret } = await keyFile();
  const { url, grpcPort } = await startHere({ keys: file, keysGraceSeconds: 0, metricsToken: "0123456789abcdef", grpcPort: 0 });
  const client = new Client(`127.0.0.1:${grpcPort}`, credentials.createInsecure());
  onTestFinished(() => client.close());
  const [write, read] = [(value: Uint8Array) => Buffer.from(value), (value: Buffer) => value[1]];
  const health = () =>
    new Promise<number | undefined>((resolve, reject) =>
      client.makeUnaryRequest("/grpc.health.v1.Health/Check", write, read, new Uint8Array(), (error, status) =>
        error ? reject(error) : resolve(status),
      ),
    );
  expect(await health()).toBe(1); // SERVING
  const ask = () => fetch(`${url}/v1/models`, { headers: { authorization: `Bearer ${secret}` } });
  expect([(await ask()).status, (await fetch(`${url}/ready`)).status]).toEqual([200, 200]);
  rmSync(file);
  await expect.poll(async () => (await ask()).status).toBe(503);
  const { error } = (await (await ask()).json()) as { error: object };
  expect(error).toMatchObject({ code: "not_ready", message: expect.stringContaining("can't read its key file") });
  const ready = await fetch(`${url}/ready`);
  expect([ready.status, await ready.json()]).toEqual([503, { status: "refusing keys", reason: "no such key file" }]);
  const metrics = await (await fetch(`${url}/metrics`, { headers: { authorization: "Bearer 0123456789abcdef" } })).text();
  expect(await health()).toBe(2); // NOT_SERVING
  expect(metrics).toMatch(/^mixtape_keys_unreadable_seconds [\d.]*[1-9]/m);
});

test("a mounted file that was replaced where it comes from counts as unreadable: its revoked keys do not live on", async () => {
  const { file, secret, key } = await keyFile();
  const descriptor = openSync(file, "r"); // leads to the old file after a rename, as a mount does
  onTestFinished(() => closeSync(descriptor));
  const { url } = await startHere({ keys: `/proc/self/fd/${descriptor}`, usageFile: join(temporary(), "usage"), keysGraceSeconds: 1 });
  const ask = async () => (await fetch(`${url}/v1/models`, { headers: { authorization: `Bearer ${secret}` } })).status;
  expect(await ask()).toBe(200);
  await revokeKey(file, key.id);
  await expect.poll(ask).toBe(503);
  expect(await (await fetch(`${url}/ready`)).text()).toContain("replaced where it is mounted from");
});

test("a change that keeps size and dates is seen", async () => {
  const { file, secret, key } = await keyFile();
  const { url } = await startHere({ keys: file });
  const ask = async () => (await fetch(`${url}/v1/models`, { headers: { authorization: `Bearer ${secret}` } })).status;
  expect(await ask()).toBe(200);
  const other = file.replace("keys.json", "other.json");
  writeFileSync(other, readFileSync(file, "utf8").replace(key.hash, "0".repeat(64)));
  spawnSync("touch", ["-r", file, other]);
  renameSync(other, file);
  await expect.poll(ask).toBe(401);
});

test("'keys revoke' says what it knows", async () => {
  const { file } = await keyFile();
  const { out, err } = await run(["keys", "revoke", file, "test"]);
  expect(out).toMatch(/^revoked key_\w+ of test\n$/);
  expect(err).toMatch(
    /is written; a server that reads this very file rejects the key within seconds\. If it can't read the file, its \/ready says so\n$/,
  );
});
