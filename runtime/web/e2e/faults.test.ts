/** What can go wrong between a server and a picture: each says what, and what to do; nothing half is kept. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, test } from "node:test";
import type { Browser, BrowserContext } from "playwright-core";
import { alert, fact, launch, picture, visit } from "./browser.js";
import { type Answer, type Site, openSite } from "./site.js";

const UNET = "/bundles/int8/unet/model.onnx";
const TEXT = "/bundles/int8/text_encoder/model.onnx";
const MANIFEST = "/bundles/int8/manifest.json";

let browser: Browser;
before(async () => (browser = await launch()));
after(() => browser.close());

const withSite = (name: string, body: (site: Site) => Promise<void>, bundles = ["int8"]): void => {
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

interface Fault {
  name: string;
  path: string;
  answer: (body: Uint8Array) => Answer;
  said: RegExp;
}

/** The manifest with something replaced in its text. */
const rewritten = (body: Uint8Array, from: string | RegExp, to: string): Answer => {
  const text = new TextDecoder().decode(body);
  assert.ok(from instanceof RegExp ? from.test(text) : text.includes(from));
  return { body: new TextEncoder().encode(text.replace(from, to)) };
};

const FAULTS: Fault[] = [
  {
    name: "a changed byte",
    path: UNET,
    answer: (body) => ({ body: body.map((byte, i) => (i === 100_000 ? byte ^ 1 : byte)) }),
    said: /^Unet\/model\.onnx has been changed or damaged: its sha256 is [0-9a-f]{64}; expected [0-9a-f]{64}\. Try again; .*upload the bundle again\.$/,
  },
  {
    name: "a missing part",
    path: UNET,
    answer: () => ({ body: new Uint8Array(), status: 404 }),
    said: /^Unet\/model\.onnx is missing: http.* answers 404\. Try again/,
  },
  {
    name: "a page in the place of a file",
    path: UNET,
    answer: () => ({ body: new TextEncoder().encode("<!doctype html>Not found"), type: "text/html; charset=utf-8" }),
    said: /^Unet\/model\.onnx is a web page: .* answers HTML; expected the file of the bundle\. Check the address/,
  },
  {
    name: "a server in trouble",
    path: UNET,
    answer: () => ({ body: new Uint8Array(), status: 503 }),
    said: /^Unet\/model\.onnx cannot be fetched: .* answers 503/,
  },
  {
    name: "a file that ends early",
    path: UNET,
    answer: (body) => ({ body: body.subarray(0, 1000) }),
    said: /^Unet\/model\.onnx ends after 1,000 bytes; expected [\d,]+ bytes/,
  },
  {
    name: "a file that does not end",
    path: UNET,
    answer: (body) => ({ body: new Uint8Array(body.length + 1) }),
    said: /^Unet\/model\.onnx is longer than it should be; expected [\d,]+ bytes/,
  },
  {
    name: "a schema version this app does not know",
    path: MANIFEST,
    answer: (body) => rewritten(body, '"fewstep_bundle": 1', '"fewstep_bundle": 9'),
    said: /^Manifest\.json: schema version 9; expected 1\. Update fewstep, or export the bundle again\.$/,
  },
  {
    name: "a manifest that is none",
    path: MANIFEST,
    answer: () => ({ body: new TextEncoder().encode('{"name": "other"}') }),
    said: /^Manifest\.json has no 'fewstep_bundle'/,
  },
  {
    name: "a bundle for another engine",
    path: MANIFEST,
    answer: (body) => rewritten(body, /"engine": "onnxruntime"/g, '"engine": "openvino"'),
    said: /is for the engine openvino .*; expected onnxruntime and an \.onnx graph/,
  },
  {
    name: "a part larger than a browser holds",
    path: MANIFEST,
    answer: (body) => rewritten(body, /("unet\/model\.onnx": \{\s*"bytes": )\d+/, "$13000000000"),
    said: /^Unet\/model\.onnx has 3,000,000,000 bytes; expected less than 2,147,483,648, .*\. Export the bundle/,
  },
];

for (const { name, path, answer, said } of FAULTS)
  withSite(`${name} is named, and trying again later draws`, async (site) => {
    site.faults.set(path, answer);
    const { page } = await visit(browser, site.origin);
    assert.match(await alert(page), said);
    site.faults.clear();
    await page.locator("#again").click();
    await picture(page);
  });

withSite("a server that has gone is said, with what to do", async (site) => {
  const { page } = await visit(browser, `${site.origin}/blank`);
  site.faults.set(UNET, (body) => ({ body, stopAfter: 0.5 }));
  await page.goto(site.origin);
  await asked(site, UNET);
  await site.close();
  assert.match(
    await alert(page),
    /cannot be fetched from .*; expected a connection\. Check the connection and try again: what was loaded is kept/,
  );
});

/** Until a path was asked for. */
async function asked(site: Site, path: string): Promise<void> {
  while (!site.asked.includes(path)) await new Promise((resolve) => setTimeout(resolve, 20));
}

withSite("a tab closed in mid-load keeps what was complete, and nothing half", async (site) => {
  site.faults.set(UNET, (body) => ({ body, stopAfter: 0.5 }));
  const { context, page } = await visit(browser, site.origin);
  await asked(site, UNET);
  await page.close({ runBeforeUnload: false });
  assert.ok(site.asked.includes(TEXT), "the text encoder came first");

  site.faults.clear();
  site.asked.length = 0;
  const next = await context.newPage();
  await next.goto(site.origin);
  await picture(next);
  assert.ok(!site.asked.includes(TEXT), "kept");
  assert.ok(site.asked.includes(UNET), "begun again");
  assert.equal(await stored(context, site), 4, "the tokenizer and three graphs");
});

/** How many files of bundles the browser keeps. */
async function stored(context: BrowserContext, { origin }: Site): Promise<number> {
  const page = await context.newPage();
  await page.goto(`${origin}/blank`);
  const count = await page.evaluate(async () => {
    const keys = await (await caches.open("fewstep-files-1")).keys();
    return keys.filter(({ url }) => url.includes("/sha256/")).length;
  });
  await page.close();
  return count;
}

withSite("a bundle that has changed on the server is fetched anew, and the old files go", async (site) => {
  const { context, page } = await visit(browser, site.origin);
  await picture(page);
  // another graph of the same meaning: one more name in the protobuf (ModelProto.producer_name, field 2)
  const longer = (body: Uint8Array): Uint8Array => new Uint8Array([...body, 0x12, 1, 0x78]);
  const graph = (await (await fetch(site.origin + TEXT)).arrayBuffer()) as ArrayBuffer;
  const changed = longer(new Uint8Array(graph));
  const hash = createHash("sha256").update(changed).digest("hex");
  site.faults.set(TEXT, () => ({ body: changed }));
  site.faults.set(MANIFEST, (body) =>
    rewritten(
      body,
      /("text_encoder\/model\.onnx": \{\s*"bytes": )\d+(,\s*"sha256": ")[0-9a-f]+/,
      `$1${changed.length}$2${hash}`,
    ),
  );
  site.asked.length = 0;
  await page.reload();
  await page.waitForSelector(".frame[data-state=done], #alert:not([hidden])");
  assert.deepEqual(
    site.asked.filter((path) => path.endsWith(".onnx")),
    [TEXT],
  );
  assert.equal(await stored(context, site), 4);
});

withSite(
  "two bundles share the files they have in common",
  async (site) => {
    const { page } = await visit(browser, site.origin);
    await picture(page);
    site.asked.length = 0;
    await page.locator("#model").selectOption({ index: 1 });
    await page.waitForFunction(() => document.querySelectorAll("#history li").length === 2);
    assert.ok(site.asked.some((path) => path === "/bundles/f32/unet/model.onnx"));
    assert.ok(!site.asked.some((path) => path.endsWith("tokenizer.json")));
  },
  ["int8", "f32"],
);

withSite("a kept file that the disk has damaged is fetched again", async (site) => {
  const { context, page } = await visit(browser, site.origin);
  await picture(page);
  const damaged = await page.evaluate(async () => {
    const cache = await caches.open("fewstep-files-1");
    const keys = (await cache.keys()).filter(({ url }) => url.includes("/sha256/"));
    for (const key of keys) {
      const { byteLength } = await (await cache.match(key))!.arrayBuffer();
      await cache.put(key, new Response(new Uint8Array(byteLength)));
    }
    return keys.length;
  });
  site.asked.length = 0;
  await page.reload();
  await picture(page);
  assert.equal(site.asked.filter((path) => /onnx$|tokenizer\.json$/.test(path)).length, damaged);
  assert.equal(await stored(context, site), damaged);
});

withSite("what the browser keeps can be removed", async (site) => {
  const { context, page } = await visit(browser, site.origin);
  await picture(page);
  assert.equal(await stored(context, site), 4);
  await page.locator("summary").click();
  await page.locator("#forget").click();
  await page.waitForFunction(() => document.getElementById("status")!.textContent === "Removed from this device.");
  assert.equal(await stored(context, site), 0);
});

withSite("a browser without room draws all the same, and says that it keeps nothing", async (site) => {
  const { context, page } = await visit(browser, `${site.origin}/blank`);
  const session = await context.newCDPSession(page);
  await session.send("Storage.overrideQuotaForOrigin", { origin: site.origin, quotaSize: 100_000 });
  await page.goto(site.origin);
  await picture(page);
  assert.match(await fact(page, "Kept"), /^No: this browser has no room to keep \d+ MB/);
});

withSite("memory that ends while a part is loaded is said, with what to do", async (site) => {
  // a browser refuses an array it has no room for by a RangeError: here, every one past a megabyte
  const refusing = `globalThis.Uint8Array = new Proxy(Uint8Array, {
    construct(real, given, called) {
      if (given[0] > 1e6) throw new RangeError("Array buffer allocation failed");
      return Reflect.construct(real, given, called);
    },
  });`;
  site.faults.set("/worker.js", (body) => ({
    body: new TextEncoder().encode(`${refusing}\n${new TextDecoder().decode(body)}`),
  }));
  const { page } = await visit(browser, site.origin);
  assert.match(
    await alert(page),
    /^Not enough memory for the [\d,]+ bytes of text_encoder\/model\.onnx\. Close other tabs and apps, or choose a smaller bundle\.$/,
  );
});

withSite("a worker that dies is said, and another takes its place", async (site) => {
  const { page } = await visit(browser, site.origin);
  await picture(page);
  // what a browser does when memory ends: the worker is gone, with an error that names it
  site.faults.set("/worker.js", () => ({ body: new TextEncoder().encode('throw new RangeError("Out of memory")') }));
  await page.evaluate(async () => {
    for (const one of await navigator.serviceWorker.getRegistrations()) await one.unregister();
    for (const name of await caches.keys()) if (name.startsWith("fewstep-app-")) await caches.delete(name);
  });
  await page.reload();
  assert.match(
    await alert(page),
    /^Not enough memory: the worker ended .*\. Close other tabs and apps, or choose a smaller bundle\.$/,
  );
  site.faults.clear();
  await page.evaluate(async () => {
    for (const name of await caches.keys()) if (name.startsWith("fewstep-app-")) await caches.delete(name);
  });
  await page.locator("#again").click();
  await picture(page);
});

test("a site without its list of bundles is said", async () => {
  const site = await openSite([]);
  try {
    site.faults.set("/bundles.json", () => ({ body: new TextEncoder().encode("{}") }));
    const { page } = await visit(browser, site.origin);
    assert.match(await alert(page), /^Bundles\.json of version undefined; expected 1\. Upload the whole site again/);
  } finally {
    await site.close();
    for (const context of browser.contexts()) await context.close();
  }
});
