/** The web app as people use it, on a desktop and a phone. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import type { Browser, Page } from "playwright-core";
import { DESKTOP, PHONE, alert, fact, launch, picture, pixels, visit } from "./browser.js";
import { type Site, openSite } from "./site.js";

let browser: Browser;
before(async () => (browser = await launch()));
after(() => browser.close());

/** Runs a test with a site of its own: another origin, so other storage. */
const withSite = (name: string, bundles: string[], body: (site: Site) => Promise<void>): void => {
  test(name, async () => {
    const site = await openSite(bundles);
    try {
      await body(site);
    } finally {
      await site.close();
      for (const context of browser.contexts()) await context.close();
    }
  });
};

withSite("the first picture comes by itself, with its progress and times", ["int8"], async (site) => {
  const context = await browser.newContext(DESKTOP);
  const page = await context.newPage();
  await page.addInitScript(() => {
    const seen: string[] = [];
    Object.assign(globalThis, { seen });
    addEventListener("DOMContentLoaded", () => {
      const watch = (id: string): void => {
        const element = document.getElementById(id)!;
        new MutationObserver(() => seen.push(element.textContent ?? "")).observe(element, {
          childList: true,
          characterData: true,
        });
      };
      watch("loading-text");
      watch("timing");
    });
  });
  await page.goto(site.origin);
  await picture(page);
  const seen = await page.evaluate(() => (globalThis as unknown as { seen: string[] }).seen);
  assert.ok(
    seen.some((text) => /^[\d.]+ MB of [\d.]+ MB$/.test(text)),
    seen.join("; "),
  );
  assert.ok(seen.includes("Preparing unet"), seen.join("; "));
  assert.ok(
    seen.some((text) => /^Step [12] of 2$/.test(text)),
    seen.join("; "),
  );
  assert.match(
    (await page.locator("#timing").textContent())!,
    /^[\d.]+ m?s: 2 steps of [\d.]+ m?s, text [\d.]+ m?s, decoding [\d.]+ m?s$/,
  );
  assert.equal(await page.locator(".steps i.done").count(), 2);
  assert.equal(await page.locator("#picture").getAttribute("aria-label"), "a rooster on a blue background, seed 0");
  assert.match((await page.locator("#status").textContent())!, /^Picture ready: a rooster/);
  const colours = await page.evaluate(() => {
    const canvas = document.querySelector<HTMLCanvasElement>("#picture")!;
    const { data } = canvas.getContext("2d")!.getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.width, canvas.height, new Set(new Uint32Array(data.buffer)).size];
  });
  assert.deepEqual(colours.slice(0, 2), [64, 64]);
  assert.ok(colours[2]! > 100, "a picture has many colours");
});

withSite("on a phone everything is within the width, large enough and under the thumb", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin, PHONE);
  await picture(page);
  const { width, height } = page.viewportSize()!;
  assert.ok((await page.evaluate(() => document.documentElement.scrollWidth)) <= width);
  const draw = (await page.locator("#draw").boundingBox())!;
  assert.ok(draw.y > height / 2 && draw.y + draw.height <= height, "Draw is in the lower half, without scrolling");
  for (const button of await page.locator("button:visible, select:visible, .choices label:visible").all()) {
    const box = (await button.boundingBox())!;
    // WCAG 2.2, 2.5.8 asks for 24 CSS pixels, 2.5.5 for 44
    assert.ok(
      box.height >= 40 && box.width >= 34,
      `${await button.evaluate((e) => e.outerHTML.slice(0, 80))} ${box.width}x${box.height}`,
    );
  }
  await page.locator("#ideas button").nth(1).tap();
  await page.waitForFunction(() => document.querySelectorAll("#history li").length === 2);
  assert.match(
    (await page.locator("#picture").getAttribute("aria-label"))!,
    /^a red heart on a yellow background, seed \d+$/,
  );
});

withSite("every control has a name, and text stands out from its ground in light and dark", ["int8"], async (site) => {
  for (const colorScheme of ["light", "dark"] as const) {
    const { page, context } = await visit(browser, site.origin, { ...DESKTOP, colorScheme });
    await picture(page);
    await page.locator("summary").click();
    const nameless = await page.evaluate(() =>
      [...document.querySelectorAll<HTMLElement>("button, input, select, textarea, canvas[role]")]
        .filter((one) => {
          const labels =
            "labels" in one ? [...((one as HTMLInputElement).labels ?? [])].map((label) => label.textContent) : [];
          return ![one.ariaLabel, one.textContent, ...labels].some((text) => text?.trim());
        })
        .map((one) => one.outerHTML.slice(0, 80)),
    );
    assert.deepEqual(nameless, []);
    const ratios = await page.evaluate(() => {
      const style = getComputedStyle(document.documentElement);
      const light = (name: string): number => {
        const text = style.getPropertyValue(`--${name}`).trim().slice(1);
        const [r, g, b] = [0, 2, 4].map((at) => {
          const c = parseInt(text.slice(at, at + 2), 16) / 255;
          return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
      };
      const pairs = [
        ["ink", "paper"],
        ["ink", "card"],
        ["soft", "paper"],
        ["soft", "card"],
        ["on-accent", "accent"],
        ["bad", "bad-paper"],
      ] as const;
      return pairs.map(([a, b]) => {
        const [x, y] = [light(a), light(b)];
        return [a, b, (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)] as const;
      });
    });
    for (const [a, b, ratio] of ratios) assert.ok(ratio >= 4.5, `${a} on ${b}, ${colorScheme}: ${ratio}`); // WCAG 2.2, 1.4.3
    await context.close();
  }
});

withSite("the same seed gives the same picture, another seed or number of steps another", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  const drawn = async (seed: string, steps: string): Promise<string> => {
    await page.locator("#seed").fill(seed);
    await page.locator("#choices label", { hasText: new RegExp(`^${steps}$`) }).click();
    const before = await page.locator("#history li").count();
    await page.locator("#draw").click();
    await page.waitForFunction((count) => document.querySelectorAll("#history li").length === count + 1, before);
    return pixels(page);
  };
  const [first, again, other, fewer] = [
    await drawn("5", "2"),
    await drawn("5", "2"),
    await drawn("6", "2"),
    await drawn("5", "1"),
  ];
  assert.equal(again, first);
  assert.notEqual(other, first);
  assert.notEqual(fewer, first);
  assert.equal(await page.locator("#seed").inputValue(), "5", "a seed that was typed stays");
  await page.locator("#history button").nth(1).click();
  assert.equal(await pixels(page), other, "the row below brings a picture back");
  assert.equal(await page.locator("#seed").inputValue(), "6");
});

withSite("Stop ends a drawing between two steps", ["f32"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  await page.evaluate(() => {
    const timing = document.getElementById("timing")!;
    const watch = new MutationObserver(() => {
      const step = Number(/^Step (\d+) of 30$/.exec(timing.textContent ?? "")?.[1] ?? 0);
      if (step < 2 || step > 25) return;
      watch.disconnect();
      document.getElementById("draw")!.click();
    });
    watch.observe(timing, { childList: true });
  });
  await page.locator("#draw").click();
  await page.waitForFunction(() => document.getElementById("status")!.textContent === "Stopped.");
  assert.equal(await page.locator("#history li").count(), 1);
  assert.equal(await page.locator("#draw").textContent(), "Draw");
  await page.locator("#draw").click();
  await page.waitForFunction(() => document.querySelectorAll("#history li").length === 2);
});

withSite("after the first visit it draws without a server", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  await page.waitForSelector("body[data-offline=ready]");
  await site.close();
  await page.reload();
  await picture(page);
  assert.equal(await fact(page, "Kept"), "On this device");
});

withSite("a saved PNG says how it was made", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  const [download] = await Promise.all([page.waitForEvent("download"), page.locator("#save").click()]);
  assert.equal(download.suggestedFilename(), "a-rooster-on-a-blue-background-0.png");
  const data = readFileSync(await download.path());
  assert.equal(data.subarray(1, 4).toString(), "PNG");
  const text = data.toString("utf8");
  assert.match(
    text,
    /iTXtparameters\0{5}a rooster on a blue background\nSteps: 2, CFG scale: 1, Seed: 0, Size: 64x64, Model hash: [0-9a-f]{10}, Model: emoji-64/,
  );
  assert.match(text, /iTXtfewstep\0{5}\{"prompt":"a rooster/);
  const url = `data:image/png;base64,${data.toString("base64")}`;
  const size = await page.evaluate(async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    return [image.width, image.height];
  }, url);
  assert.deepEqual(size, [64, 64], "browsers still read it");
});

withSite("a prompt that is too long names how many tokens to take out", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  await page.locator("#prompt").fill("a very ".repeat(60) + "long prompt");
  await page.locator("#draw").click();
  assert.match(await alert(page), /prompt of \d+ tokens .*expected at most 32 .*Shorten it by \d+ tokens/);
  await page.locator("#prompt").fill("a cat");
  await page.locator("#draw").click();
  await page.waitForFunction(() => document.querySelectorAll("#history li").length === 2);
  assert.equal(await page.locator("#alert").isHidden(), true);
});

withSite("a seed that is none is refused", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  await page.locator("#seed").fill("18446744073709551616");
  await page.locator("#draw").click();
  assert.match(await alert(page), /expected a whole number from 0 to 18446744073709551615/);
});

const reason = async (page: Page): Promise<string> =>
  `${await page.locator("#engine").textContent()}. ${await fact(page, "Why")}`;

withSite("without WebGPU the other bundle draws, and the page says why", ["gpu32", "f32"], async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  assert.match(
    await reason(page),
    /^Runs on WebAssembly, one core\. (WebGPU finds no graphics processor here|This browser has no WebGPU)\.$/,
  );
  assert.ok(!site.asked.includes("/bundles/gpu32/unet/model.onnx"), "the other's weights are not fetched");
});

withSite("without isolation there is no SharedArrayBuffer, and one core draws", ["int8"], async (site) => {
  const { page } = await visit(browser, site.origin);
  assert.deepEqual(await page.evaluate(() => [crossOriginIsolated, "SharedArrayBuffer" in globalThis]), [false, false]);
  await picture(page);
  assert.match(await reason(page), /^Runs on WebAssembly, one core/);
});
