/** Debian's Chromium for the tests of the page; without it they are skipped, with the reason. */
import { existsSync } from "node:fs";
import { type Browser, type BrowserContextOptions, chromium, type Page } from "playwright-core";
import { onTestFinished } from "vitest";

const CHROMIUM = "/usr/bin/chromium";
/** A name for this machine under which a browser trusts it no more than any other. */
export const ELSEWHERE = "mixtape.test";
const FLAGS = [
  `--host-resolver-rules=MAP ${ELSEWHERE} 127.0.0.1`,
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** Why there is no browser; null where there is one. For `describe.skipIf`. */
export const missingBrowser = existsSync(CHROMIUM) ? null : `${CHROMIUM} is not there: apt-get install chromium`;

export function launch(): Promise<Browser> {
  return chromium.launch({ executablePath: CHROMIUM, headless: true, args: FLAGS });
}

export interface Visit {
  readonly page: Page;
  /** Errors of the page and of its policy so far. */
  readonly errors: readonly string[];
  /** Addresses that the page asked for and that are not the server's. */
  readonly strangers: readonly string[];
}

/** Opens the page of a server in a browser profile of its own, which ends with the test. */
export async function visit(browser: Browser, url: string, options: BrowserContextOptions = {}): Promise<Visit> {
  const context = await browser.newContext({
    locale: "en-GB",
    viewport: { width: 1280, height: 800 },
    reducedMotion: "reduce",
    ...options,
  });
  onTestFinished(() => context.close());
  context.setDefaultTimeout(10_000);
  const page = await context.newPage();
  const [errors, strangers]: [string[], string[]] = [[], []];
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => {
    // That the server refused something is seen in the page; the browser's own note of it is no error of the page's.
    if (message.type() === "error" && !/Failed to load resource/.test(message.text())) errors.push(message.text());
  });
  page.on("request", (request) => {
    const at = request.url();
    if (!at.startsWith(`${url}/`) && !/^(blob|data):/.test(at)) strangers.push(at);
  });
  await page.goto(`${url}/`);
  await page.getByRole("textbox", { name: /^(Message|消息)$/ }).waitFor();
  return { page, errors, strangers };
}
