/** The deployment files: they parse, and what they name exists. */

import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { parseAllDocuments } from "yaml";
import { checkServeConfig, readServeConfig, ServeConfig } from "../../src/server/config.ts";
import { Metrics } from "../../src/server/metrics.ts";
import { temporary } from "../cli/run.ts";

const read = (path: string) => readFileSync(new URL(`../../deploy/${path}`, import.meta.url), "utf8");

test("every metric that the dashboard asks for exists", async () => {
  const text = await new Metrics({ models: () => [], admission: { running: 0, queued: 0 } }).registry.metrics();
  const known = new Set(
    [...text.matchAll(/^# TYPE (\S+) (\S+)/gm)].flatMap(([, name, type]) =>
      type === "histogram" ? ["bucket", "sum", "count"].map((part) => `${name}_${part}`) : [name],
    ),
  );
  const { panels } = JSON.parse(read("grafana/mixtape.json")) as { panels: { targets: { expr: string }[] }[] };
  const asked = panels.flatMap((p) => p.targets.flatMap(({ expr }) => [...expr.matchAll(/mixtape_\w+/g)].map(([name]) => name)));
  expect(asked.length).toBeGreaterThan(20);
  expect(asked.filter((name) => !known.has(name))).toEqual([]);
});

test("the Kubernetes manifests are YAML, and the server accepts the config in them", async () => {
  const documents = parseAllDocuments(read("kubernetes/mixtape.yaml")).map(
    (d) => d.toJS({ maxAliasCount: 0 }) as { kind: string; data?: Record<string, string> },
  );
  expect(documents.map((d) => d.kind)).toEqual([
    "ConfigMap",
    "Deployment",
    "Service",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "NetworkPolicy",
  ]);
  const { parse } = await import("yaml");
  expect(checkServeConfig(parse(documents[0].data?.["mixtape.yaml"] ?? "")).models[0].name).toBe("default");
});

test("the server accepts the example config", async () => {
  expect(checkServeConfig(await readServeConfig(fileURLToPath(new URL("../../deploy/mixtape.yaml", import.meta.url)))).maxInProgress).toBe(
    256,
  );
});

test("every setting is documented in docs/serving.md", () => {
  const text = readFileSync(new URL("../../docs/serving.md", import.meta.url), "utf8");
  expect(Object.keys(ServeConfig.shape).filter((field) => !text.includes(`| \`${field}\` |`))).toEqual([]);
});

test.skipIf(spawnSync("systemd-analyze", ["--version"]).error)("systemd accepts the unit (needs systemd-analyze)", () => {
  const folder = temporary();
  // systemd-analyze reports missing programs, so the running node replaces the unit's.
  writeFileSync(
    join(folder, "mixtape.service"),
    read("mixtape.service").replace("ExecStart=/usr/bin/node", `ExecStart=${process.execPath}`),
  );
  const { stdout, stderr } = spawnSync("systemd-analyze", ["verify", join(folder, "mixtape.service")], { encoding: "utf8" });
  expect(`${stdout}${stderr}`.split("\n").filter((line) => line.includes("mixtape.service"))).toEqual([]);
  expect(read("mixtape.service")).not.toMatch(/^MemoryDenyWriteExecute=/m);
});
