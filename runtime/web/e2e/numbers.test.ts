/** The numbers in the browser: the golden files, Python's pictures, threads, WebGPU. */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Browser, Page } from "playwright-core";
import { SOFTWARE_GPU, WAIT, launch, visit } from "./browser.js";
import type { Harness } from "./harness.js";
import { type Site, openSite } from "./site.js";

const PROMPT = "a red heart on a yellow background"; // of run.mjs, which draws it with Python
const SEED = 7;

let browser: Browser;
before(async () => (browser = await launch()));
after(() => browser.close());

declare const harness: Harness;

/** A page with the harness, on a site of its own. */
async function inPage<T>(own: Browser, isolated: boolean, body: (page: Page, site: Site) => Promise<T>): Promise<T> {
  const site = await openSite([], isolated);
  const { context, page } = await visit(own, `${site.origin}/blank`);
  try {
    await page.addScriptTag({ url: "/a/b/c/harness.js", type: "module" });
    await page.waitForFunction(() => "harness" in globalThis, undefined, { timeout: WAIT });
    return await body(page, site);
  } finally {
    await context.close();
    await site.close();
  }
}

/** The largest difference of two pictures, in levels of 255. */
const furthest = (a: number[], b: number[]): number => {
  assert.equal(a.length, b.length);
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0);
};

interface Shot {
  pixels: number[];
}

const draw = (page: Page, name: string, device: "cpu" | "gpu", options: object, more: object = {}) =>
  page.evaluate(
    ([url, kind, prompt, seed, how, asked]) => harness.draw([{ url, device: kind }], [{ prompt, seed, ...asked }], how),
    [`/bundles/${name}/`, device, PROMPT, SEED, options, more] as const,
  );

test("noise and golden plans in Chromium are those of every port", async () => {
  const results = await inPage(browser, false, async (page) => {
    await page.addScriptTag({ url: "/a/b/c/golden.test.js", type: "module" });
    await page.waitForFunction(() => "runAll" in globalThis, undefined, { timeout: WAIT });
    return page.evaluate(() => (globalThis as unknown as { runAll(): Promise<[string, string][]> }).runAll());
  });
  assert.ok(results.length > 100, `${results.length} tests ran`);
  assert.deepEqual(
    results.filter(([, failed]) => failed !== ""),
    [],
  );
});

test("the golden latent of a bundle is drawn again in Chromium", async () => {
  const found = await inPage(browser, false, (page) => page.evaluate(() => harness.golden("/bundles/f32/")));
  assert.ok(found.passed, JSON.stringify(found));
});

test("no pixel of a float32 picture differs from Python's by more than one level", async () => {
  await inPage(browser, false, async (page) => {
    const python = await page.evaluate(() => harness.pixels("/bundles/f32.png"));
    const { opened, pictures } = await draw(page, "f32", "cpu", { device: "wasm" });
    assert.equal(opened.plans["default"]!.steps, 30);
    assert.ok(furthest((pictures[0] as Shot).pixels, python) <= 1);
  });
});

test("two threads on an isolated page draw what one does", async () => {
  const [one, two] = await inPage(browser, true, async (page) => {
    assert.equal(await page.evaluate(() => crossOriginIsolated), true);
    return [await draw(page, "f32", "cpu", { threads: 1 }), await draw(page, "f32", "cpu", { threads: 2 })];
  });
  assert.deepEqual([one.opened.threads, two.opened.threads], [1, 2]);
  assert.ok(furthest((one.pictures[0] as Shot).pixels, (two.pictures[0] as Shot).pixels) <= 1);
});

test("aborting ends a drawing, and the next one is whole", async () => {
  const { pictures } = await inPage(browser, false, (page) =>
    page.evaluate(
      ([prompt]) =>
        harness.draw([{ url: "/bundles/f32/", device: "cpu" }], [{ prompt, leaveAfter: 3 }, { prompt }], {
          device: "wasm",
        }),
      [PROMPT] as const,
    ),
  );
  const [stopped, whole] = pictures as [{ kind: string; steps: number }, { steps: number }];
  assert.equal(stopped.kind, "cancelled");
  assert.ok(stopped.steps < 30, `${stopped.steps} steps`);
  assert.equal(whole.steps, 30);
});

test("WebGPU draws WebAssembly's picture, in software", async () => {
  const own = await launch(SOFTWARE_GPU);
  try {
    const [gpu, cpu] = await inPage(own, false, async (page) => [
      await draw(page, "gpu32", "gpu", { device: "webgpu" }, { plan: "steps_1" }),
      await draw(page, "gpu32", "gpu", { device: "wasm" }, { plan: "steps_1" }),
    ]);
    assert.deepEqual([gpu.opened.device, gpu.opened.why], ["webgpu", ""]);
    assert.equal(cpu.opened.device, "wasm");
    assert.ok(furthest((gpu.pictures[0] as Shot).pixels, (cpu.pictures[0] as Shot).pixels) <= 1);
  } finally {
    await own.close();
  }
});

test("a float16 bundle on an adapter without shader-f16 falls back, with the reason", async () => {
  const own = await launch(SOFTWARE_GPU);
  try {
    const { opened } = await inPage(own, false, async (page, site) => {
      site.faults.set("/bundles/gpu32/manifest.json", (body) => ({
        body: new TextEncoder().encode(
          new TextDecoder().decode(body).replaceAll('"precision": "float32"', '"precision": "float16"'),
        ),
      }));
      return draw(page, "gpu32", "gpu", { device: "auto" }, { plan: "steps_1" });
    });
    assert.deepEqual([opened.device, opened.why], ["wasm", "This graphics processor does not compute in float16."]);
  } finally {
    await own.close();
  }
});
