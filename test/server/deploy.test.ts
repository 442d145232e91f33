/** The files that operators take as they are: they parse, and name what there is. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { parseAllDocuments } from "yaml";
import { checkServeConfig, readServeConfig } from "../../src/server/config.ts";
import { Metrics } from "../../src/server/metrics.ts";

const read = (path: string) => readFileSync(new URL(`../../deploy/${path}`, import.meta.url), "utf8");

test("every metric that the dashboard asks for exists", async () => {
  const text = await new Metrics(() => []).registry.metrics();
  const known = new Set(
    [...text.matchAll(/^# TYPE (\S+) (\S+)/gm)].flatMap(([, name, type]) => (type === "histogram" ? [`${name}_bucket`] : [name])),
  );
  const { panels } = JSON.parse(read("grafana/mixtape.json")) as { panels: { targets: { expr: string }[] }[] };
  const asked = panels.flatMap((p) => p.targets.flatMap(({ expr }) => [...expr.matchAll(/mixtape_\w+/g)].map(([name]) => name)));
  expect(asked.length).toBeGreaterThan(20);
  expect(asked.filter((name) => !known.has(name))).toEqual([]);
});

test("the Kubernetes manifests are YAML, and the config in them is one that the server takes", async () => {
  const documents = parseAllDocuments(read("kubernetes/mixtape.yaml")).map(
    (d) => d.toJS({ maxAliasCount: 0 }) as { kind: string; data?: Record<string, string> },
  );
  expect(documents.map((d) => d.kind)).toEqual(["ConfigMap", "Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy"]);
  const { parse } = await import("yaml");
  expect(checkServeConfig(parse(documents[0].data?.["mixtape.yaml"] ?? "")).models[0].name).toBe("ernie");
});

test("the example config is one that the server takes", async () => {
  expect(checkServeConfig(await readServeConfig(new URL("../../deploy/mixtape.yaml", import.meta.url).pathname)).maxInProgress).toBe(256);
});
