/** The page in Chromium against the real server with the bundled model. */
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Running, start } from "../server/start.ts";
import { launch, missingBrowser, visit } from "./browser.ts";

let running: Running;
beforeAll(async () => {
  running = await start();
});
afterAll(() => running?.server.stop());

describe.skipIf(missingBrowser)(`the page on the real server${missingBrowser ? ` (${missingBrowser})` : ""}`, () => {
  let browser: Browser;
  beforeAll(async () => {
    browser = await launch();
  });
  afterAll(() => browser?.close());

  test("chat, experts, stop, reload, figures", async () => {
    const { page, errors, strangers } = await visit(browser, running.url);
    const say = async (text: string) => {
      await page.getByRole("textbox", { name: "Message" }).fill(text);
      await page.keyboard.press("Enter");
    };
    await page.getByText("This is a tiny demo model, often wrong.").waitFor();
    await page.getByRole("button", { name: "What is the capital of Japan?" }).waitFor();
    await page.getByRole("button", { name: "Settings" }).click();
    await page.getByLabel("Temperature").fill("0");
    await page.getByLabel("Maximum length").fill("24");
    await page.getByRole("button", { name: "Experts", exact: true }).click();
    await say("Find me a hotel in London.");
    await page.getByRole("button", { name: "Regenerate" }).waitFor();

    const ask = (max: number) =>
      running.client.chat.completions.create({
        model: "default",
        messages: [{ role: "user", content: "Find me a hotel in London." }],
        temperature: 0,
        max_completion_tokens: max,
      });
    const [wanted] = (await ask(24)).choices;
    const text = await page.locator(".prose").innerText();
    expect(text.replace(/\s+/g, " ")).toBe(wanted.message.content?.trim().replace(/\s+/g, " "));

    // Every token that it generated, with four of 32 experts in each of seven layers.
    const rows = page.getByRole("table", { name: "Experts used by this token" }).getByRole("row");
    expect(await rows.count()).toBe(1 + 7);
    await page.getByRole("img", { name: /^Heat map of 7 layers by 32 experts over \d+ tokens/ }).waitFor();
    const tokens = page.getByRole("listbox").getByRole("option");
    expect((await tokens.allInnerTexts()).join("").replace(/\s/g, "")).toContain(text.replace(/\s/g, "").slice(0, 10));
    await tokens.first().click();
    const weights = (await page.locator(".choices tbody tr").first().locator(".weight-value").allInnerTexts()).map(Number);
    expect(weights).toHaveLength(4);
    expect(weights.reduce((sum, w) => sum + w, 0)).toBeCloseTo(1, 1);

    await page.route("**/v1/chat/completions", (route, request) =>
      route.continue({ postData: JSON.stringify({ ...request.postDataJSON(), logit_bias: { "2": -100, "5": -100 } }) }),
    ); // so that it does not end by itself
    await page.getByRole("button", { name: "Settings" }).click();
    await page.getByLabel("Maximum length").fill("3000");
    await page.getByLabel("Temperature").fill("2");
    await say("Tell me everything about all hotels.");
    await page.locator(".prose").nth(1).getByText(/\w/).first().waitFor();
    await page.keyboard.press("Escape");
    await page.getByText("Stopped", { exact: true }).waitFor();
    await expect.poll(async () => metric(await (await fetch(`${running.url}/metrics`)).text(), "mixtape_sequences_running")).toBe(0);

    await page.reload();
    await page.getByText("Stopped", { exact: true }).waitFor();
    expect(await page.locator(".prose").first().innerText()).toBe(text);

    await page.getByRole("link", { name: "Status" }).click();
    await page.getByRole("status").getByText("Ready", { exact: true }).waitFor();
    // Every chart finds its metric: what the server tells by the names that the page looks for.
    const soon = { timeout: 8000 };
    const requests = page.getByRole("region", { name: "Requests" }).getByRole("definition");
    await expect.poll(() => requests.allInnerTexts(), soon).toEqual(["0", "0"]);
    await expect
      .poll(() => page.getByRole("region", { name: "KV cache in use" }).getByRole("definition").innerText())
      .toMatch(/^[\d.]+ %$/);
    await ask(8);
    for (const name of ["Time to first token", "Step time"])
      await expect.poll(() => page.getByRole("region", { name }).getByRole("definition").first().innerText(), soon).toMatch(/\d m?s$/);
    await expect
      .poll(() => page.getByRole("region", { name: "Prompt tokens from" }).getByRole("definition").innerText())
      .toMatch(/^[\d.]+ %$/);
    expect([errors, strangers]).toEqual([[], []]);
  });
});

test("the server gives the page's files and nothing beside them", async () => {
  const index = await fetch(running.url);
  expect(index.headers.get("content-security-policy")).not.toMatch(/unsafe-inline|unsafe-eval|https?:/);
  expect(index.headers.get("cache-control")).toBe("no-cache");
  const html = await index.text();
  expect(html).not.toMatch(/<script(?![^>]* src=)|<style|https?:\/\//);
  const script = await fetch(`${running.url}/${/src="\.\/([^"]+\.js)"/.exec(html)?.[1]}`);
  expect(script.status).toBe(200);
  expect(script.headers.get("cache-control")).toContain("immutable");
  for (const url of [
    "/../package.json",
    "/%2e%2e/package.json",
    "/..%2fserver%2fkeys.js",
    "/assets/../../cli/main.js",
    "/%2e%2e%2f%2e%2e%2fpackage.json",
    "/main.tsx",
  ])
    expect((await running.server.app.inject({ url })).statusCode, url).toBeGreaterThanOrEqual(400);
});

/** The sum of a metric's samples. */
function metric(text: string, name: string): number {
  const values = text.split("\n").filter((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `));
  return values.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}
