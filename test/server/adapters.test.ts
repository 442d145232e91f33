/** Adapters on the server: listed and chosen by name, sharing steps, guarded by keys; folders that are broken break nothing else. */
import { rmSync, writeFileSync } from "node:fs";
import { cp } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { status } from "@grpc/grpc-js";
import OpenAI from "openai";
import { expect, test, vi } from "vitest";
import { checkServeConfig } from "../../src/server/config.ts";
import { adapterFolder } from "../adapterfolder.ts";
import { temporary } from "../cli/run.ts";
import { GOLDENS } from "../goldens.ts";
import { ask, failure, startGrpcHere, whole } from "./grpc/reflected.ts";
import { keyFile } from "./harness.ts";
import { engineOf, post, startHere } from "./start.ts";

const BASE = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const MODEL = { name: "default", path: "default", kvCacheTokens: 32768, threads: 1 };
const PROMPT = "To save a document, press the key with";
const TEMPLATE = { prompt: PROMPT, temperature: 0, max_tokens: 12 };

async function serve(adapters: Record<string, string>, config: object = {}, log?: (line: string) => void) {
  return startHere({ models: [{ ...MODEL, adapters }], ...config }, log);
}

/** What the library answers with one adapter alone. */
async function alone(folder: string | null): Promise<string> {
  const { pipeline } = await import("../../src/api/pipeline.ts");
  const continued = await pipeline("text-generation", "default", { threads: 1, kv_cache_tokens: 4096, warning_callback: () => {} });
  try {
    if (folder !== null) {
      await continued.model.load_adapter(folder);
      continued.model.set_adapter("default");
    }
    const [{ generated_text }] = await continued(PROMPT, { do_sample: false, max_new_tokens: 12, return_full_text: false });
    return generated_text;
  } finally {
    await continued.dispose();
  }
}

test("adapters are listed beside their base, and requests for all of them at once get what each gets alone", async () => {
  const [shop, verse] = [await adapterFolder(BASE, 1), await adapterFolder(BASE, 2, { r: 7, target_modules: "all-linear" })];
  const { client, server, url } = await serve({ shop, verse }, { metrics: true });
  const { data } = await client.models.list();
  expect(data.map(({ id }) => id)).toEqual(["default", "default:shop", "default:verse"]);
  expect(data.map((m) => (m as { parent?: string }).parent)).toEqual([undefined, "default", "default"]);
  expect(await client.models.retrieve("default:verse")).toMatchObject({ id: "default:verse", parent: "default" });

  const names = ["default", "default:shop", "default:verse", "default:shop", "default"];
  const expected = [await alone(null), await alone(shop), await alone(verse)];
  expect(new Set(expected).size).toBe(3);
  const answers = await Promise.all(names.map((model) => client.completions.create({ ...TEMPLATE, model })));
  expect(answers.map((a) => a.choices[0].text)).toEqual([expected[0], expected[1], expected[2], expected[1], expected[0]]);
  expect(answers.map((a) => a.model)).toEqual(names);
  const { steps, rows } = (await engineOf({ server })).stats();
  expect(rows).toBeGreaterThan(steps * 2); // they shared steps

  const vectors = await Promise.all(
    names.slice(0, 3).map((model) => client.embeddings.create({ model, input: PROMPT, encoding_format: "float" })),
  );
  expect(new Set(vectors.map((v) => v.data[0].embedding[0])).size).toBe(3);
  const routed = await Promise.all(
    names.slice(0, 3).map(async (model) => (await post(url, "/v1/routing", { model, text: PROMPT })).text()),
  );
  expect(new Set(routed.map((r) => r.slice(r.indexOf('"layers"')))).size).toBe(3);

  const metrics = await (await fetch(`${url}/metrics`)).text();
  expect(metrics).toMatch(/mixtape_tokens_total\{model="default:shop",kind="completion"\} 24/);
  expect(metrics).toMatch(/mixtape_adapters\{model="default"\} 2/);
  expect(Number(/mixtape_adapter_bytes\{model="default"\} (\d+)/.exec(metrics)?.[1])).toBeGreaterThan(1e5);
});

test("an unknown adapter is a 404 that lists what there is; keys name adapters like models", async () => {
  const shop = await adapterFolder(BASE, 1);
  const { file, secret } = await keyFile({ models: ["default:shop"] });
  const { url, server } = await serve({ shop }, { keys: file });
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: secret, maxRetries: 0 });
  expect((await client.models.list()).data.map(({ id }) => id)).toEqual(["default:shop"]);
  expect((await client.completions.create({ ...TEMPLATE, model: "default:shop" })).choices).toHaveLength(1);
  await expect(client.completions.create({ ...TEMPLATE, model: "default" })).rejects.toMatchObject({
    status: 403,
    code: "model_not_allowed",
  });
  await expect(client.completions.create({ ...TEMPLATE, model: "default:verse" })).rejects.toMatchObject({ status: 403 });

  const open = await serve({ shop });
  for (const model of ["default:verse", "default:", "default:__proto__", "default:shop:x", "shop"])
    await expect(open.client.completions.create({ ...TEMPLATE, model })).rejects.toMatchObject({
      status: 404,
      code: "model_not_found",
      param: "model",
      message: expect.stringContaining("there are default, default:shop"),
    });
  expect(server.catalog.list()).toHaveLength(2);
});

test("folders that are missing, broken or of another base: the log says why, and the rest is served", async () => {
  const shop = await adapterFolder(BASE, 1);
  const broken = join(temporary(), "broken");
  await cp(shop, broken, { recursive: true });
  writeFileSync(join(broken, "adapter_model.safetensors"), "rubbish");
  const lines: string[] = [];
  const adapters = {
    shop,
    broken,
    absent: "/nosuch",
    foreign: join(GOLDENS, "dense-tiny/lora-final"),
    large: await adapterFolder(BASE, 2, { r: 32 }),
  };
  const { client } = await startHere({ models: [{ ...MODEL, adapters, maxLoraRank: 16 }] }, (line) => lines.push(line));
  const reasons = lines.filter((line) => line.includes("model failed")).map((line) => JSON.parse(line));
  expect(reasons.map(({ model }) => model)).toEqual(["default:broken", "default:absent", "default:foreign", "default:large"]);
  expect(reasons[0].reason).toContain("adapter_model.safetensors");
  expect(reasons[1].reason).toContain("/nosuch: no such folder, and not a hub id either");
  expect(reasons[2].reason).toMatch(/belongs to another base/);
  expect(reasons[3].reason).toContain("an adapter of rank 32, and max_lora_rank is 16");
  for (const name of ["broken", "absent", "foreign", "large"])
    await expect(client.completions.create({ ...TEMPLATE, model: `default:${name}` })).rejects.toMatchObject({
      status: 503,
      code: "not_ready",
      message: expect.stringContaining(`the adapter 'default:${name}' could not be loaded; the server's log says why`),
    });
  expect((await client.completions.create({ ...TEMPLATE, model: "default:shop" })).choices[0].text).toBe(await alone(shop));
  expect((await client.completions.create({ ...TEMPLATE, model: "default" })).choices[0].text).toBe(await alone(null));
  expect(lines.filter((line) => line.includes("model failed"))).toHaveLength(4); // not read again for each request
});

test("reloading takes new adapters from their folders, and keeps the old one where the new is broken", async () => {
  const [first, second] = [await adapterFolder(BASE, 1), await adapterFolder(BASE, 2)];
  const live = join(temporary(), "live");
  await cp(first, live, { recursive: true });
  const lines: string[] = [];
  const { client, server } = await serve({ live }, {}, (line) => lines.push(line));
  const ask = async () => (await client.completions.create({ ...TEMPLATE, model: "default:live" })).choices[0].text;
  const loaded = (count: number) =>
    vi.waitFor(() => expect(lines.filter((line) => /"default:live".*model (loaded|failed)/.test(line))).toHaveLength(count), 10_000);
  const [one, two] = [await alone(first), await alone(second)];
  expect(await ask()).toBe(one);
  await cp(second, live, { recursive: true });
  server.reload();
  await loaded(2);
  expect(await ask()).toBe(two);
  rmSync(join(live, "adapter_config.json"));
  server.reload();
  await loaded(3);
  expect(await ask()).toBe(two);
});

test("gRPC lists and chooses adapters by the same names", async () => {
  const shop = await adapterFolder(BASE, 1);
  const { client } = await startGrpcHere({ models: [{ ...MODEL, adapters: { shop } }] });
  expect(await ask(client, "ListModels", {})).toMatchObject({
    models: [{ name: "default" }, { name: "default:shop", parent: "default", loaded: true }],
  });
  const request = { model: "default:shop", text: PROMPT, options: { sampling: { temperature: 0 }, max_tokens: 12 } };
  expect((await whole(client.Generate(request))).text).toBe(await alone(shop));
  const { code, details } = await failure(whole(client.Generate({ ...request, model: "default:verse" })));
  expect([code, details]).toEqual([status.NOT_FOUND, expect.stringContaining("there are default, default:shop")]);
});

test.each<[object, string]>([
  [{ adapters: { "a:b": "x" } }, "names of adapters may contain only letters"],
  [{ adapters: { a: "" } }, "models[0].adapters.a"],
  [{ adapters: ["x"] }, "models[0].adapters"],
  [{ maxLoraRank: 0 }, "models[0].maxLoraRank"],
])("a wrong setting %j is refused by name", (fields, message) => {
  expect(() => checkServeConfig({ models: [{ ...MODEL, ...fields }] })).toThrow(message);
});

test("a model that has the name of another's adapter is refused", () => {
  const models = [
    { ...MODEL, adapters: { shop: "x" } },
    { ...MODEL, name: "default:shop" },
  ];
  expect(() => checkServeConfig({ models })).toThrow('two models are named "default:shop"');
});
