/** What the log and the errors of broken files say: what failed and where, and nothing of a private file or a request. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { parse as parseYaml } from "yaml";
import { z } from "zod";
import { checkServeConfig, readServeConfig } from "../../src/server/config.ts";
import { createLogger } from "../../src/server/logs.ts";
import { Certificate } from "../../src/server/tls.ts";
import { temporary } from "../cli/run.ts";
import { keptLines } from "./harness.ts";

const SECRET = "XYZZY-secret";

function thrown(act: () => unknown): Error {
  try {
    act();
  } catch (error) {
    return error as Error;
  }
  throw new Error("it did not fail");
}

const parse = thrown(() => JSON.parse(`{"a": ${SECRET}}`));

test.each<[string, Error]>([
  ["JSON", parse],
  ["YAML", thrown(() => parseYaml(`a: [1, ${SECRET}: {`))],
  ["a schema", thrown(() => z.strictObject({}).parse({ [SECRET]: 1 }))],
  ["a cause", new Error("can't be read", { cause: parse })],
  ["a cause of a cause", new Error("a", { cause: new Error("b", { cause: parse }) })],
  ["fields of an error", Object.assign(new Error("a"), { input: SECRET, rawPacket: Buffer.from(SECRET), issues: [SECRET] })],
  ["errors of an error", new AggregateError([parse], "several")],
])("an error with %s is logged without what it quotes", (_name, err) => {
  const { sink, lines } = keptLines();
  createLogger("trace", sink).error({ err }, "failed");
  expect(lines()).not.toContain(SECRET.slice(0, 5));
  expect(JSON.parse(lines())).toMatchObject({ err: { type: err.name, stack: expect.stringMatching(/^ {4}at /) }, msg: "failed" });
});

test("an error that causes itself is logged", () => {
  const { sink, lines } = keptLines();
  const error = new Error("round");
  error.cause = error;
  createLogger("info", sink).error({ err: error });
  expect(lines().split("round").length).toBeLessThan(20);
});

test("an error of our own keeps its message, its code and its causes", () => {
  const { sink, lines } = keptLines();
  const cause = Object.assign(new Error("EACCES: permission denied"), { code: "EACCES" });
  createLogger("info", sink).error({ err: new Error("a.json: can't be read", { cause }) });
  expect(JSON.parse(lines())).toMatchObject({
    err: { message: "a.json: can't be read", cause: { message: cause.message, code: "EACCES" } },
  });
});

test.each([
  ["serve.json", `{"port": 1, "metricsToken": ${SECRET}}`, /serve\.json: broken JSON/],
  ["serve.yaml", `port: 1\nmetricsToken: "${SECRET}\n  x: [`, /serve\.yaml: broken YAML, at line \d+, column \d+$/],
  ["serve.yml", `? [${SECRET}\n: {`, /serve\.yml: broken YAML/],
])("a broken config file %s is not quoted", async (name, text, message) => {
  const file = join(temporary(), name);
  writeFileSync(file, text);
  const error = (await readServeConfig(file).catch((e: unknown) => e)) as Error;
  expect(error.message).toMatch(message);
  expect(`${error.message}${error.stack}`).not.toContain(SECRET.slice(0, 5));
  expect(error.cause).toBe(undefined);
});

test("neither are values of settings and TLS files", () => {
  const bad = { port: SECRET, metricsToken: SECRET.slice(0, 8), tls: SECRET, corsOrigins: [SECRET], logLevel: SECRET };
  expect(thrown(() => checkServeConfig(bad)).message).not.toContain(SECRET.slice(0, 5));
  const file = join(temporary(), "tls.pem");
  writeFileSync(file, `-----BEGIN PRIVATE KEY-----\n${SECRET}\n-----END PRIVATE KEY-----\n`);
  const { sink } = keptLines();
  expect(thrown(() => new Certificate({ cert: file, key: file }, createLogger("info", sink))).message).not.toContain(SECRET.slice(0, 5));
});
