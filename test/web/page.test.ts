/** The page in a real browser against the real server: what people do with it, and what others may try. */
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { createServer as createHttp } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Browser, type BrowserContext, chromium, type Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { LANGUAGES } from "../../src/web/words.ts";
import { type Running, start } from "../server/start.ts";

const CHROMIUM = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find((path) => existsSync(path));
const why = CHROMIUM ? "" : " (skipped: needs Chromium, Debian's package chromium)";
const built = existsSync(new URL("../../dist/web/index.html", import.meta.url));
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

let running: Running;
let browser: Browser;
let context: BrowserContext;
const foreign: string[] = [];
const shots = process.env.SCREENSHOTS ?? mkdtempSync(join(tmpdir(), "mixtape-page-"));

async function open(options: Parameters<Browser["newContext"]>[0] = {}, url = running.url): Promise<Page> {
  context = await browser.newContext({ locale: "en-US", ...options });
  const page = await context.newPage();
  page.on("request", (r) => {
    if (!r.url().startsWith(url) && !r.url().startsWith("blob:") && !r.url().startsWith("data:")) foreign.push(r.url());
  });
  page.on("pageerror", (error) => foreign.push(`error: ${error.message}`));
  await page.goto(url);
  await page.locator("header select option").first().waitFor({ state: "attached" });
  return page;
}

async function ask(page: Page, text: string): Promise<void> {
  await page.getByLabel("Message", { exact: true }).fill(text);
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "Answer again" }).last().waitFor();
}

describe.skipIf(!CHROMIUM)(`the page${why}`, () => {
  beforeAll(async () => {
    expect(built, "dist/web is not built; run npm run build").toBe(true);
    running = await start();
    browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS });
  }, 60_000);
  afterAll(async () => {
    await browser?.close();
    await running?.server.stop();
    if (!process.env.SCREENSHOTS) rmSync(shots, { recursive: true, force: true });
  });
  afterEach(async () => {
    await context?.close();
    expect(foreign.splice(0)).toEqual([]); // nothing from elsewhere, no script error
  });

  test("an answer streams, and a reload keeps the conversation", async () => {
    const page = await open();
    await ask(page, "Find me a hotel in London.");
    const answer = await page.getByLabel("Assistant").innerText();
    expect(answer.length).toBeGreaterThan(20);
    await page.reload();
    await expect.poll(() => page.getByLabel("Assistant").innerText()).toBe(answer);
    await page.screenshot({ path: join(shots, "light-en.png") });
  }, 30_000);

  test("stop keeps what was written, by keyboard alone", async () => {
    const page = await open();
    await page.getByRole("button", { name: "Settings" }).focus();
    await page.keyboard.press("Enter");
    await page.getByLabel("Longest answer").fill("3000");
    await page.getByLabel("Message", { exact: true }).focus();
    await page.keyboard.type("Tell me about hotels.");
    await page.keyboard.press("Enter");
    await page.getByRole("button", { name: "Stop" }).waitFor();
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "Send" }).waitFor();
    expect(await page.evaluate(() => document.activeElement?.tagName)).toBe("TEXTAREA");
  }, 30_000);

  test("answering again and editing make versions that one can go between", async () => {
    const page = await open();
    await ask(page, "Find me a hotel in London.");
    await page.getByRole("button", { name: "Answer again" }).click();
    await page.getByLabel("Version 2 of 2").waitFor();
    await page.getByRole("button", { name: "Previous version" }).click();
    await page.getByLabel("Version 1 of 2").waitFor();
    await page.getByRole("button", { name: "Edit" }).click();
    await page.getByLabel("Edit").fill("Find me a restaurant.");
    await page.getByRole("button", { name: "Send changed" }).click();
    await page.getByText("Find me a restaurant.", { exact: true }).first().waitFor();
    await expect.poll(() => page.getByLabel("Version 2 of 2").count()).toBe(1);
  }, 30_000);

  test("the experts of an answer: drawn, by token, and as a table", async () => {
    const page = await open();
    await page.getByRole("button", { name: "Experts" }).click();
    await ask(page, "Find me a hotel in London.");
    await page.locator("canvas").first().waitFor();
    const drawn = await page
      .locator("canvas")
      .first()
      .evaluate((c) => {
        const canvas = c as HTMLCanvasElement;
        const data = canvas.getContext("2d")?.getImageData(0, 0, canvas.width, canvas.height).data ?? [];
        return new Set(data).size;
      });
    expect(drawn).toBeGreaterThan(20);
    await page.getByRole("button", { name: /^Token 2: / }).click();
    await page.getByText("Experts and their weights").first().click();
    expect(await page.getByRole("row").count()).toBe(8);
    await page.screenshot({ path: join(shots, "experts.png") });
  }, 30_000);

  test("in Chinese, in the dark, on a phone: nothing overflows", async () => {
    const page = await open({ locale: "zh-CN", colorScheme: "dark", viewport: { width: 360, height: 740 } });
    await page.getByLabel("消息", { exact: true }).fill("你好");
    await page.keyboard.press("Enter");
    await page.getByText(/词元\/秒/).waitFor();
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBe(360);
    await page.screenshot({ path: join(shots, "phone-dark-zh.png") });
    await page.getByRole("button", { name: "菜单" }).click();
    await page.getByRole("button", { name: "新对话" }).waitFor();
    await page.screenshot({ path: join(shots, "phone-menu.png") });
  }, 30_000);

  test("no barriers that axe finds, in both themes and languages", async () => {
    const { default: axe } = await import("axe-core");
    for (const [locale, colorScheme] of [
      ["en-US", "light"],
      ["zh-CN", "dark"],
    ] as const) {
      const page = await open({ locale, colorScheme, bypassCSP: true });
      const words = LANGUAGES[locale === "en-US" ? "en" : "zh"];
      await page.getByLabel(words.message, { exact: true }).fill("Hello");
      await page.keyboard.press("Enter");
      await page.getByText(new RegExp(words.perSecond)).waitFor();
      for (const view of [words.chat, words.status]) {
        await page.getByRole("button", { name: view, exact: true }).click();
        await page.evaluate(axe.source);
        const { violations } = (await page.evaluate("axe.run()")) as { violations: { id: string; nodes: { html: string }[] }[] };
        expect(violations.map((v) => [v.id, v.nodes[0].html.slice(0, 120)])).toEqual([]);
        await page.screenshot({ path: join(shots, `${colorScheme}-${view === words.chat ? "chat" : "status"}.png`) });
      }
      await context.close();
    }
  }, 60_000);

  test("what a model writes runs nothing and fetches nothing", async () => {
    const attack = [
      "<script>window.pwned=1</script><img src=x onerror=window.pwned=2>",
      "![x](https://evil.example/x.png) [click](javascript:window.pwned=3)",
      "<svg onload=window.pwned=4></svg><iframe src='https://evil.example'></iframe>",
      "```html\n<script>window.pwned=5</script>\n```",
    ].join("\n\n");
    const fake = createHttp(async (request, response) => {
      if (request.url === "/v1/models") response.end(JSON.stringify({ data: [{ id: "<b onmouseover=window.pwned=6>m</b>" }] }));
      else if (request.url === "/v1/chat/completions") {
        response.writeHead(200, { "content-type": "text/event-stream" });
        for (const char of attack) response.write(`data: ${JSON.stringify({ choices: [{ delta: { content: char } }] })}\n\n`);
        response.end(`data: ${JSON.stringify({ choices: [], usage: { completion_tokens: 9 } })}\n\ndata: [DONE]\n\n`);
      } else {
        const page = await fetch(running.url + request.url);
        const headers = ["content-type", "content-security-policy"].map((name) => [name, page.headers.get(name) ?? ""]);
        response.writeHead(page.status, Object.fromEntries(headers));
        response.end(Buffer.from(await page.arrayBuffer()));
      }
    });
    await new Promise<void>((resolve) => fake.listen(0, "127.0.0.1", resolve));
    try {
      const page = await open({}, `http://127.0.0.1:${(fake.address() as { port: number }).port}`);
      await ask(page, "<img src=x onerror=window.pwned=7>");
      await page.locator(".markdown").getByText("click").waitFor();
      await page.reload();
      await page.locator(".markdown").getByText("click").waitFor();
      expect(await page.evaluate(() => (window as { pwned?: number }).pwned)).toBe(undefined);
      expect(
        await page.locator(".markdown script, .markdown img, .markdown iframe, .markdown svg, .markdown [href^=javascript]").count(),
      ).toBe(0);
    } finally {
      fake.close();
    }
  }, 30_000);
});

test("every text is there in every language", () => {
  const [en, zh] = [LANGUAGES.en, LANGUAGES.zh];
  expect(Object.keys(zh).sort()).toEqual(Object.keys(en).sort());
  for (const words of [en, zh]) for (const text of Object.values(words)) expect(text.trim()).not.toBe("");
});

test("files of the page, and nothing beside them", async () => {
  const { url, server } = await start();
  try {
    const index = await fetch(url);
    expect(index.headers.get("content-security-policy")).toContain("default-src 'self'");
    expect(await index.text()).not.toMatch(/<script(?![^>]* src=)|https?:\/\//);
    for (const path of [
      "/../package.json",
      "/%2e%2e/package.json",
      "/..%2fserver%2fkeys.js",
      "/assets/../../cli/main.js",
      "/%2e%2e%2f%2e%2e%2fpackage.json",
    ])
      expect((await server.app.inject({ url: path })).statusCode).toBeGreaterThanOrEqual(400);
  } finally {
    await server.stop();
  }
});
