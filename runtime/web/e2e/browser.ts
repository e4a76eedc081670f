/** Chromium as the tests start it: Debian's, without a window, a graphics processor or a network. */

import {
  type Browser,
  type BrowserContext,
  type BrowserContextOptions,
  type Page,
  chromium,
  devices,
} from "playwright-core";

export const WAIT = 60_000; // ms a busy machine may take for any one thing; never what a test is about
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const QUIET = ["--disable-component-update", "--disable-sync"];
export const SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

export const launch = (flags: string[] = []): Promise<Browser> =>
  chromium.launch({ executablePath: process.env["CHROMIUM"]!, args: [...FLAGS, ...QUIET, ...flags] });

export const PHONE: BrowserContextOptions = { ...devices["Pixel 7"]! };
export const DESKTOP: BrowserContextOptions = { viewport: { width: 1280, height: 860 } };

/** A context of its own: its storage starts empty. What the page logs as an error is remembered. */
export async function visit(
  browser: Browser,
  url: string,
  options: BrowserContextOptions = DESKTOP,
): Promise<{ context: BrowserContext; page: Page }> {
  const context = await browser.newContext({ ...options, acceptDownloads: true });
  context.setDefaultTimeout(WAIT);
  const page = await context.newPage();
  await page.goto(url);
  return { context, page };
}

/** Until a picture is there; an alert meanwhile is an error with its text. */
export async function picture(page: Page): Promise<void> {
  await page.waitForFunction(
    () => document.querySelector(".frame[data-state=done], #alert:not([hidden])") !== null,
    undefined,
    { timeout: WAIT },
  );
  const said = await alerted(page);
  if (said !== "") throw new Error(`the app says: ${said}`);
}

/** The text of the alert; empty where there is none. */
export const alerted = (page: Page): Promise<string> =>
  page.evaluate(() => {
    const alert = document.querySelector<HTMLElement>("#alert")!;
    return alert.hidden ? "" : [...alert.querySelectorAll("p")].map((p) => p.textContent).join(" ");
  });

/** Until the page says what is wrong. */
export async function alert(page: Page): Promise<string> {
  await page.waitForSelector("#alert:not([hidden])", { timeout: WAIT });
  return alerted(page);
}

/** What stands beside a name in the details. */
export const fact = (page: Page, name: string): Promise<string> =>
  page
    .locator(`dd[data-name=${name}]`)
    .textContent()
    .then((text) => text ?? "");

/** The pixels on the canvas, as one text. */
export const pixels = (page: Page): Promise<string> =>
  page.evaluate(() => document.querySelector<HTMLCanvasElement>("#picture")!.toDataURL());
