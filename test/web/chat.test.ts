/** The page in Chromium, against answers by script: chats, branches, failures, hostile text, barriers. */
import axe from "axe-core";
import type { Browser, Locator, Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { ELSEWHERE, launch, missingBrowser, visit } from "./browser.ts";
import { EXPERTS, type FakeServer, LAYERS, spoken, startFake } from "./fakeserver.ts";

const ANSWER = "Of **course**. A hotel near the river costs little.";

describe.skipIf(missingBrowser)(`the page${missingBrowser ? ` (${missingBrowser})` : ""}`, () => {
  let browser: Browser;
  let fake: FakeServer;
  beforeAll(async () => {
    browser = await launch();
  });
  afterAll(() => browser?.close());
  beforeEach(async () => {
    fake = await startFake();
    fake.answer = () => ({ deltas: spoken(ANSWER) });
  });
  afterEach(() => fake.close());

  async function say(page: Page, text: string): Promise<void> {
    await page.getByRole("textbox", { name: "Message" }).fill(text);
    await page.keyboard.press("Enter");
  }
  const answered = (page: Page, count = 1) =>
    page
      .getByRole("button", { name: "Regenerate" })
      .nth(count - 1)
      .waitFor();
  const shown = (page: Page) => page.getByRole("list", { name: "Conversation", exact: true });

  test("an answer streams, with its speed; a reload keeps the conversation and its branch", async () => {
    const { page, errors, strangers } = await visit(browser, fake.url);
    let goOn = () => {};
    const until = new Promise<void>((resolve) => {
      goOn = resolve;
    });
    fake.answer = () => ({ deltas: spoken(ANSWER), everyMs: 15, hold: { after: 4, until } });
    await say(page, "A cheap hotel?");
    await page.locator(".prose strong", { hasText: "course" }).waitFor(); // it is shown while it is written
    expect(await page.locator(".prose").innerText()).not.toContain("little");
    goOn();
    await answered(page);
    expect(await page.locator(".facts").innerText()).toMatch(
      /9 tokens\s+\d+\.\d tokens\/s\s+first token after \d+ ms\s+32 of 64 prompt tokens from cache/,
    );
    expect(page.url()).toMatch(/#\/c\/[0-9a-f]{32}$/);
    expect(await page.title()).toBe("A cheap hotel? · mixtape");
    await page.reload();
    await answered(page);
    expect(await shown(page).innerText()).toContain("A hotel near the river costs little.");
    expect(fake.asked).toHaveLength(1);
    expect(fake.asked[0]).toEqual({
      model: "ernie-small",
      messages: [{ role: "user", content: "A cheap hotel?" }],
      stream: true,
      stream_options: { include_usage: true },
    });
    expect([errors, strangers]).toEqual([[], []]);
  });

  test("stop keeps what is written and tells the server", async () => {
    const { page } = await visit(browser, fake.url);
    fake.answer = () => ({ deltas: spoken("word ".repeat(2000)), everyMs: 10 });
    await say(page, "Go on");
    await page.locator(".prose", { hasText: "word word" }).waitFor();
    await page.getByRole("button", { name: "Stop" }).click();
    await page.getByText("Stopped", { exact: true }).waitFor();
    expect((await page.locator(".prose").innerText()).split(" ").length).toBeLessThan(1000);
    await expect.poll(() => fake.left).toBe(1);
    await page.reload();
    await page.getByText("Stopped", { exact: true }).waitFor();
  });

  test("an edited question and a repeated answer are branches that one goes between", async () => {
    const { page } = await visit(browser, fake.url);
    fake.answer = ({ messages }, attempt) => ({ deltas: spoken(`Answer ${attempt} to: ${messages.map((m) => m.content).join(" / ")}`) });
    await say(page, "First");
    await answered(page);
    await page.getByRole("button", { name: "Regenerate" }).click();
    await shown(page).getByText("Answer 2 to: First").waitFor();
    await page.getByRole("button", { name: "Edit" }).first().click();
    await page.getByRole("textbox", { name: "Edit" }).fill("Changed");
    await page.getByRole("button", { name: "Send as a new branch" }).click();
    await shown(page).getByText("Answer 3 to: Changed").waitFor();
    await answered(page);
    await say(page, "More");
    await shown(page).getByText("Answer 4 to: Changed / Answer 3 to: Changed / More").waitFor();
    await answered(page, 2);
    await page.getByRole("button", { name: "Previous branch" }).click();
    await shown(page).getByText("Answer 2 to: First").waitFor();
    await shown(page).getByText("Branch 2 of 2").waitFor(); // of the answers to the first question
    await page.reload();
    await shown(page).getByText("Answer 2 to: First").waitFor();
    await page.getByRole("button", { name: "Next branch" }).first().click();
    await shown(page).getByText("Answer 4 to:").waitFor();
  });

  test("system prompt, sampling and model go along; a new conversation begins with them", async () => {
    const { page } = await visit(browser, fake.url);
    await page.getByRole("button", { name: "Settings" }).click();
    await page.getByLabel("System prompt").fill("Be brief.");
    await page.getByLabel("Temperature").fill("9");
    await page.getByLabel("Top k").fill("40");
    await page.getByLabel("Seed").fill("7");
    await page.getByLabel("Maximum length").fill("12");
    await page.getByLabel("Presence penalty").fill("-0.5");
    await page.getByLabel("Model").selectOption("ernie-large");
    await say(page, "Hello");
    await answered(page);
    const { messages, stream, stream_options, ...rest } = fake.asked[0];
    expect(rest).toEqual({ model: "ernie-large", temperature: 2, top_k: 40, seed: 7, max_completion_tokens: 12, presence_penalty: -0.5 });
    expect(messages[0]).toEqual({ role: "system", content: "Be brief." });
    await page.getByRole("button", { name: "New conversation" }).click();
    expect(await page.getByLabel("System prompt").inputValue()).toBe("Be brief.");
  });

  test("conversations are renamed, deleted, exported and imported", async () => {
    const { page } = await visit(browser, fake.url);
    await say(page, "One");
    await answered(page);
    const list = page.getByRole("navigation", { name: "Conversations" });
    await list.getByRole("link", { name: "One" }).hover();
    await page.getByRole("button", { name: "Rename “One”" }).click();
    await page.getByLabel("Title").fill("<b>Two</b>");
    await page.keyboard.press("Enter");
    await list.getByRole("link", { name: "<b>Two</b>" }).waitFor();
    const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Export" }).click()]);
    const path = await file.path();
    await list.getByRole("link", { name: "<b>Two</b>" }).hover();
    await page.getByRole("button", { name: "Delete “<b>Two</b>”" }).click();
    await page.getByRole("button", { name: "Delete", exact: true }).click();
    await page.getByText("What would you like to know?").waitFor();
    expect(await list.getByRole("link").count()).toBe(0);
    await page.reload();
    expect(await list.getByRole("link").count()).toBe(0);
    const picker = page.getByLabel("Import conversations from a file");
    await picker.setInputFiles({ name: "x.json", mimeType: "application/json", buffer: Buffer.from('{"format":"other"}') });
    await page.getByText('Import failed: format: "other" is not "mixtape-conversations"').waitFor();
    await picker.setInputFiles(path);
    await list.getByRole("link", { name: "<b>Two</b>" }).click();
    await shown(page).getByText("A hotel near the river").waitFor();
  });

  test("where the browser has no storage left, the page says so and goes on", async () => {
    const { page } = await visit(browser, fake.url);
    await page.evaluate(() => {
      IDBObjectStore.prototype.put = () => {
        throw new DOMException("no more room", "QuotaExceededError");
      };
    });
    await say(page, "Hello");
    await page.getByText("Browser storage is full").waitFor();
    await answered(page);
    expect(await shown(page).innerText()).toContain("A hotel near the river");
  });

  test("by plain HTTP from another machine too: conversations, copying", async () => {
    const { page, errors } = await visit(browser, fake.url.replace("127.0.0.1", ELSEWHERE));
    expect(await page.evaluate("isSecureContext")).toBe(false);
    fake.answer = () => ({ deltas: spoken("Code:\n\n```json\n[1]\n```\n") });
    await say(page, "Hello");
    await answered(page);
    await page.getByRole("button", { name: "Copy code" }).click();
    await page.getByRole("button", { name: "Copied" }).waitFor();
    await page.getByRole("textbox", { name: "Message" }).press("Control+v");
    expect(await page.getByRole("textbox", { name: "Message" }).inputValue()).toBe("[1]\n");
    await page.reload();
    await answered(page);
    expect(errors).toEqual([]);
  });

  test("a server that is busy is asked again after the time that it names; other failures have a button", async () => {
    const { page } = await visit(browser, fake.url);
    let breakOff = () => {};
    const drawn = new Promise<void>((resolve) => {
      breakOff = resolve;
    });
    fake.answer = (_, attempt) =>
      attempt === 1
        ? { refuse: { status: 429, headers: { "retry-after": "1" }, message: "too many requests" } }
        : attempt === 2
          ? { deltas: spoken("Half an answer that"), breakAfter: 2, hold: { after: 2, until: drawn } }
          : { deltas: spoken("The whole answer.") };
    await page.clock.install();
    await page.clock.pauseAt(Date.now() + 60_000); // from here on the page's time passes in steps of ours
    const passes = async (shown: Locator) => {
      while (!(await shown.isVisible())) await page.clock.runFor(20);
    };
    await say(page, "Hello");
    await passes(page.getByText("The server is busy. Retrying in 1 s."));
    await page.clock.runFor(900);
    expect(fake.asked).toHaveLength(1);
    await passes(page.getByText("Half an")); // a browser may drop what it received just before the connection broke
    breakOff();
    await passes(page.getByText("Generation failed: "));
    expect(fake.asked).toHaveLength(2);
    await page.clock.resume();
    expect(await page.locator(".prose").innerText()).toBe("Half an");
    await page.getByRole("button", { name: "Try again" }).click();
    await shown(page).getByText("The whole answer.").waitFor();
    expect(await shown(page).getByRole("listitem").count()).toBe(2); // in the place of the failed one
    expect(fake.asked).toHaveLength(3);
  });

  test("a key is asked for, kept for the tab or in the browser, and not taken for good when it is wrong", async () => {
    fake.key = "right";
    const { page } = await visit(browser, fake.url);
    await page.getByLabel("API key", { exact: true }).fill("wrong");
    await page.keyboard.press("Enter");
    await page.getByText("The server does not accept this key.").waitFor();
    await page.getByLabel("API key", { exact: true }).fill("right");
    await page.getByRole("button", { name: "Use this key" }).click();
    await page.getByLabel("API key", { exact: true }).waitFor({ state: "detached" });
    const kept = () =>
      page.evaluate(() => [JSON.stringify(sessionStorage).includes("right"), JSON.stringify(localStorage).includes("right")]);
    expect(await kept()).toEqual([true, false]);
    await say(page, "Hello");
    await answered(page);
    fake.key = "right too";
    await page.reload();
    await page.getByLabel("API key", { exact: true }).fill("right too");
    await page.getByLabel("Remember it in this browser").check();
    await page.getByRole("button", { name: "Use this key" }).click();
    await page.getByLabel("API key", { exact: true }).waitFor({ state: "detached" });
    expect(await kept()).toEqual([false, true]);
  });

  test("the experts of each token, while it is written and after a reload", async () => {
    const { page, errors } = await visit(browser, fake.url);
    fake.answer = ({ routing }) => ({ deltas: spoken(ANSWER, routing), everyMs: 50 });
    await page.getByRole("button", { name: "Experts", exact: true }).click();
    await say(page, "Hello");
    await page.getByRole("heading", { name: /^Token ([2-8]) of \1$/ }).waitFor(); // it follows what is written
    await answered(page);
    expect(fake.asked[0].routing).toBe(true);
    const picture = page.getByRole("img", { name: `Heat map of ${LAYERS.length} layers by ${EXPERTS} experts over 9 tokens` });
    const colours = () =>
      picture.evaluate((element) => {
        const canvas = element as HTMLCanvasElement;
        const data = canvas.getContext("2d")?.getImageData(0, 0, canvas.width, canvas.height).data ?? new Uint8ClampedArray();
        return new Set(new Uint32Array(data.buffer)).size;
      });
    expect(await colours()).toBeGreaterThan(4);
    await page.getByRole("option", { name: "course" }).click();
    await page.getByRole("heading", { name: "Token 2 of 9" }).waitFor();
    const row = page.getByRole("row", { name: /^5 / }).first();
    expect(await row.innerText()).toMatch(/^5\s+26\s+0\.40\s+2\s+0\.30\s+10\s+0\.20\s+18\s+0\.10$/); // as `routed` makes them
    await page.getByRole("listbox").press("ArrowRight");
    await page.getByRole("heading", { name: "Token 3 of 9" }).waitFor();
    await page.getByText("Tokens per expert so far").click();
    const cells = await page.getByRole("region", { name: "Tokens per expert" }).getByRole("cell").allInnerTexts();
    expect(cells).toHaveLength(LAYERS.length * EXPERTS);
    expect(cells.reduce((sum, text) => sum + Number(text), 0)).toBe(9 * LAYERS.length * 4);
    await page.reload();
    await page.getByRole("button", { name: "Experts", exact: true }).click();
    await page.getByRole("heading", { name: "Token 9 of 9" }).waitFor();
    expect(errors).toEqual([]);
  });

  test("by keyboard alone", async () => {
    const { page } = await visit(browser, fake.url);
    const focused = () =>
      page.evaluate(() => document.activeElement?.getAttribute("aria-label") ?? document.activeElement?.textContent?.trim());
    // The first place of the page leads past the list.
    await page.locator("a, button, input, textarea, [tabindex='0']").first().focus();
    expect(await focused()).toBe("Skip to main content");
    await page.keyboard.press("Enter");
    expect(await page.evaluate(() => document.activeElement?.id)).toBe("main");
    await page.keyboard.press("Alt+m");
    expect(await focused()).toBe("Message");
    await page.keyboard.type("First line");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("second");
    fake.answer = () => ({ deltas: spoken("word ".repeat(2000), true), everyMs: 10 });
    await page.keyboard.press("Alt+x");
    await page.keyboard.press("Enter");
    await page.getByRole("heading", { name: /^Token \d+ of/ }).waitFor();
    expect(fake.asked[0].messages[0].content).toBe("First line\nsecond");
    await page.keyboard.press("Escape"); // stops first
    await page.getByText("Stopped", { exact: true }).waitFor();
    await page.keyboard.press("Escape"); // then closes
    await page.getByRole("complementary").waitFor({ state: "detached" });
    await page.keyboard.press("Alt+h");
    await page.getByRole("dialog", { name: "Keyboard shortcuts" }).waitFor();
    await page.keyboard.press("Escape");
    await page.getByRole("dialog").waitFor({ state: "detached" });
    await page.keyboard.press("Alt+t");
    await page.getByRole("heading", { name: "Server status" }).waitFor();
    await page.keyboard.press("Alt+n");
    await page.getByText("What would you like to know?").waitFor();
    await expect.poll(focused).toBe("Message");
    // Every place that Tab reaches can be seen.
    for (let i = 0; i < 12; i++) {
      await page.keyboard.press("Tab");
      const seen = await page.evaluate(() => {
        const at = document.activeElement as HTMLElement;
        const style = getComputedStyle(at.matches("input[type=radio]") ? (at.nextElementSibling as Element) : at);
        return at === document.body || style.outlineStyle !== "none" || at.matches("textarea");
      });
      expect(seen, await focused()).toBe(true);
    }
  });

  test("sentences are told to screen readers when they are whole, not token by token", async () => {
    const { page } = await visit(browser, fake.url);
    fake.answer = () => ({ deltas: spoken("One is here. Two is not"), everyMs: 30 });
    await page.evaluate(() => {
      const heard: string[] = [];
      Object.assign(window, { heard });
      const told = (changes: MutationRecord[]) => {
        for (const { addedNodes } of changes) for (const node of addedNodes) heard.push(node.textContent ?? "");
      };
      new MutationObserver(told).observe(document.querySelector("[aria-live=polite]") as Element, { childList: true });
    });
    await say(page, "Hello");
    await answered(page);
    await expect.poll(() => page.evaluate("window.heard")).toEqual(["One is here.", "Two is not", "The answer is complete."]);
    expect(await page.locator("[aria-live=polite], [role=log]").count()).toBe(1);
  });

  test("nothing that a model, a title, a file or a model's name says is run or fetched", async () => {
    const evil = [
      "<script>window.__pwned = 1</script><img src=x onerror='window.__pwned = 2'>",
      "![x](https://evil.example/x.png) [link](javascript:window.__pwned=3) [good](https://good.example/) <https://good.example/2>",
      "[d](data:text/html,<script>window.__pwned=4</script>) [v](vbscript:x) <svg onload=window.__pwned=5></svg>",
      '```html" onmouseover="window.__pwned=6\n<script>window.__pwned = 7</script>\n```',
      "```typescript\nconst x = '</code><img src=x onerror=window.__pwned=8>';\n```",
      "| <b onclick=window.__pwned=9>a</b> |\n| --- |\n| <iframe src=https://evil.example></iframe> |",
      '<style>body{background:url(https://evil.example/s)}</style><form action="https://evil.example"><button>go</button></form>',
    ].join("\n\n");
    fake.models = ['"><img src=x onerror="window.__pwned=10">'];
    fake.answer = () => ({
      deltas: [
        { reasoning_content: evil },
        { tool_calls: [{ index: 0, function: { name: evil, arguments: JSON.stringify({ evil }) } }] },
        ...(evil.match(/[\s\S]{1,7}/g) ?? []).map((content, i) => ({
          content,
          routing: [{ ...spoken(evil, true)[0], token: i, text: evil, layers: [1], experts: [[0]], weights: [[1]] }],
        })),
      ],
    });
    const { page, errors, strangers } = await visit(browser, fake.url);
    await page.getByRole("button", { name: "Experts", exact: true }).click();
    await say(page, evil);
    await answered(page);
    const check = async () => {
      expect(await page.evaluate("window.__pwned")).toBe(undefined);
      const forbidden =
        "script, img, iframe, form, style, svg, [onclick], [onerror], [onload], [onmouseover], [style], a:not([href^='http']):not([href^='mailto'])";
      expect(await page.locator(".prose").locator(forbidden).count()).toBe(0);
      for (const link of await page.locator(".prose a[href]").all()) {
        expect(await link.getAttribute("rel")).toContain("noopener");
        expect(await link.getAttribute("href")).toMatch(/^https:\/\//);
      }
      expect(await page.locator(".prose a[href^='https://good.example']").count()).toBe(2);
    };
    await check();
    const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Export" }).click()]);
    await page.getByLabel("Import conversations from a file").setInputFiles(await file.path());
    await page.getByRole("banner").getByText("Conversations imported: 1.").waitFor();
    await page.reload();
    await answered(page);
    await check();
    expect([errors, strangers]).toEqual([[], []]);
  });

  test("on a phone nothing overflows, and the list is a drawer", async () => {
    const { page } = await visit(browser, fake.url, { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    const wide = `${"x".repeat(200)} \`${"code".repeat(60)}\`\n\n\`\`\`json\n{"${"k".repeat(120)}": 1}\n\`\`\`\n\n| ${"a | ".repeat(12)}\n| ${"--- | ".repeat(12)}\n| ${"cell | ".repeat(12)}`;
    fake.answer = ({ routing }) => ({ deltas: [{ content: wide }, ...spoken(" end", routing)] });
    const width = () =>
      page.evaluate(() =>
        Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, document.getElementById("main")?.scrollWidth ?? 0),
      );
    await page.getByRole("button", { name: "Experts", exact: true }).click();
    await say(page, `Hello ${"y".repeat(300)}`);
    await answered(page);
    expect(await width()).toBe(360);
    await page.getByRole("button", { name: "Settings", exact: true }).click();
    expect(await width()).toBe(360);
    await page.getByRole("complementary").getByRole("button", { name: "Close" }).click();
    await page.getByRole("button", { name: "Open conversation list" }).click();
    await page.getByRole("link", { name: "Status" }).click();
    await page.getByRole("heading", { name: "Step time" }).waitFor();
    expect(await width()).toBe(360);
    expect(await page.getByRole("link", { name: "Status" }).isVisible()).toBe(false); // it closed behind itself
  });

  test.for([
    ["light", "en-GB", "English"],
    ["dark", "zh-CN", "中文"],
  ] as const)("axe finds no barrier: %s, %s", async ([colorScheme, locale, own]) => {
    const { page, errors } = await visit(browser, fake.url, { colorScheme, locale });
    const zh = locale === "zh-CN";
    fake.answer = ({ routing }) => ({
      deltas: [
        { reasoning_content: "Thinking." },
        ...spoken(`${ANSWER}\n\n\`\`\`python\ndef f(): # note\n  return "text" + 1\n\`\`\`\n`, routing),
      ],
    });
    const barriers = async () => {
      await page.evaluate(axe.source);
      const { violations } = (await page.evaluate("axe.run({ resultTypes: ['violations'] })")) as axe.AxeResults;
      return violations.map(({ id, nodes }) => `${id}: ${nodes.map((n) => n.html.slice(0, 160)).join(" ; ")}`);
    };
    expect(await page.evaluate(() => document.documentElement.lang)).toBe(zh ? "zh-CN" : "en");
    expect(await page.getByRole("radio", { name: own }).isChecked()).toBe(true);
    expect(await barriers()).toEqual([]);
    await page.getByRole("button", { name: zh ? "专家" : "Experts", exact: true }).click();
    await page.getByRole("textbox", { name: zh ? "消息" : "Message" }).fill("Hello");
    await page.keyboard.press("Enter");
    await page.getByRole("button", { name: zh ? "重新回答" : "Regenerate" }).click();
    await page.getByText(zh ? "第 2 个分支，共 2 个" : "Branch 2 of 2").waitFor();
    await page.getByText(zh ? "各专家处理的词元数" : "Tokens per expert").click();
    await page
      .getByText(zh ? "思考过程" : "Reasoning")
      .first()
      .click();
    expect(await barriers()).toEqual([]);
    await page.getByRole("button", { name: zh ? "设置" : "Settings", exact: true }).click();
    expect(await barriers()).toEqual([]);
    await page.keyboard.press("Alt+t");
    await page.getByRole("heading", { name: zh ? "单步用时" : "Step time" }).waitFor();
    expect(await barriers()).toEqual([]);
    await page.keyboard.press("Alt+h");
    expect(await barriers()).toEqual([]);
    await page.keyboard.press("Escape");
    // The switches change at once what the browser's settings chose first.
    await page.getByText(zh ? "English" : "中文", { exact: true }).click();
    await page.getByRole("heading", { name: zh ? "Server status" : "服务器状态" }).waitFor();
    await page.getByRole("radio", { name: zh ? "Light" : "深色" }).check({ force: true });
    expect(await page.evaluate(() => document.documentElement.dataset["theme"])).toBe(zh ? "light" : "dark");
    expect(await barriers()).toEqual([]);
    expect(errors).toEqual([]);
  });
});
