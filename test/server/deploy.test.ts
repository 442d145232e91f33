/** The deployment files: they parse, and what they name exists. */

import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
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

test("the Kubernetes manifests for a GPU ask for one, and the server accepts the config in them", async () => {
  const [config, deployment, ...others] = parseAllDocuments(read("kubernetes/mixtape-gpu.yaml")).map((d) => {
    expect(d.errors).toEqual([]);
    return d.toJS({ maxAliasCount: 0 });
  });
  expect(others.map(({ kind }) => kind)).toEqual(["Service", "PodDisruptionBudget", "NetworkPolicy"]);
  const { parse } = await import("yaml");
  const [model] = checkServeConfig(parse(config.data["mixtape.yaml"])).models;
  expect(model.device).toBe("cuda");
  const { containers, volumes } = deployment.spec.template.spec;
  const [container] = containers;
  expect(container.resources.limits["nvidia.com/gpu"]).toBe(1);
  expect(container.resources.requests).not.toHaveProperty("nvidia.com/gpu"); // Kubernetes wants it in the limits
  expect(container.volumeMounts.map(({ name }: { name: string }) => name).sort()).toEqual(
    volumes.map(({ name }: { name: string }) => name).sort(),
  );
  expect(container.volumeMounts.some(({ mountPath }: { mountPath: string }) => model.path.startsWith(`${mountPath}/`))).toBe(true);
});

/** A Dockerfile's instructions, comments left out and continued lines joined. */
function instructions(file: string): string[] {
  return read(file)
    .replace(/^#.*\n/gm, "")
    .replace(/\\\n/g, " ")
    .split("\n")
    .filter((line) => line.trim() !== "");
}

test.each(["Dockerfile", "Dockerfile.cuda"])("%s: what it copies exists, and the process has no rights", (file) => {
  const lines = instructions(file);
  const stages = new Set<string>();
  for (const line of lines) {
    const stage = /^FROM \S+ AS (\w+)$/.exec(line);
    if (stage) stages.add(stage[1]);
    const [, from, sources] = /^COPY (?:--from=(\w+) )?(.+) \S+$/.exec(line) ?? [];
    if (from !== undefined) expect(stages).toContain(from);
    const built = /^\/src\/(dist|node_modules|native\/build)/;
    for (const source of sources?.split(" ") ?? [])
      if (from === undefined || (source.startsWith("/src/") && !built.test(source)))
        expect(existsSync(new URL(`../../${source.replace("/src/", "")}`, import.meta.url)), source).toBe(true);
  }
  expect(lines.filter((line) => line.startsWith("USER "))).toEqual(["USER 10001:10001"]);
  const last = lines.slice(lines.findLastIndex((line) => line.startsWith("FROM ")));
  expect(last.join("\n")).not.toMatch(/apt-get|npm /); // no compilers, no package manager's leftovers
  expect(read(`${file}.dockerignore`)).toBe(read("Dockerfile.dockerignore"));
});

test("the image for GPUs is built and run on official CUDA images of one version that nvcc and the driver check know", () => {
  const lines = instructions("Dockerfile.cuda");
  const images = lines.flatMap((line) => /^FROM (nvidia\/cuda\S+)/.exec(line)?.[1] ?? []);
  expect(images).toEqual(["devel", "base"].map((flavour) => `nvidia/cuda:\${CUDA_VERSION}-${flavour}-ubuntu24.04`));
  const [, major, minor] = /^ARG CUDA_VERSION=(\d+)\.(\d+)\.\d+$/.exec(lines[0]) ?? [];
  expect(Number(major) * 100 + Number(minor)).toBeGreaterThanOrEqual(1204);
  expect(lines.join("\n")).toContain("test -f native/build/mixtape_cuda.so");
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
