// What a visitor of the web app waits for and downloads, in Chromium on this machine.
//
//     chrt -r 1 node benchmarks/web_browser.mjs BUNDLE... > benchmarks/results/web_browser.json
//
// after `make web`. The bundles of the published figures: `fewstep export models/emoji-64 --target web-wasm`, the same of
// `models/emoji-64-fast`, and `models/emoji-64 --target laptop-cpu`, which is float32, to compare a step with. Each is
// served by `fewstep serve`. chrt gives the browser a core of its own where other jobs run (it needs root).
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { cpus, loadavg, release, totalmem } from "node:os";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { brotliCompressSync, constants } from "node:zlib";

const root = fileURLToPath(new URL("..", import.meta.url));
const web = `${root}runtime/web/`;
const require = createRequire(`${web}package.json`);
const { chromium } = require("playwright-core");
const { buildSync } = require("esbuild");

const VISITS = 5; // first visits, each with an empty profile
const PICTURES = 9; // of which the first two warm up
const QUALITY = 9; // brotli: what servers reach while they are asked; 11 is 2 % smaller and many times slower
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

const sorted = (values) => [...values].sort((a, b) => a - b);
const spread = (values) => {
  const all = sorted(values);
  return { least: round(all[0]), median: round(all[all.length >> 1]), of: all.length };
};
const round = (value) => Number(value.toPrecision(4));
const brotli = (data) =>
  brotliCompressSync(data, {
    params: { [constants.BROTLI_PARAM_QUALITY]: QUALITY, [constants.BROTLI_PARAM_SIZE_HINT]: data.length },
  }).length;
const sizes = (files) => {
  const data = files.map((file) => readFileSync(file));
  return {
    files: files.length,
    bytes: data.reduce((sum, one) => sum + one.length, 0),
    brotli: data.reduce((sum, one) => sum + brotli(one), 0),
  };
};

const site = `${web}dist/site`;
const shell = readdirSync(site)
  .filter((name) => name !== "ort")
  .map((name) => join(site, name));
const engine = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"].map((name) =>
  join(site, "ort", name),
);
const harness = buildSync({
  entryPoints: [`${web}e2e/harness.ts`],
  bundle: true,
  format: "esm",
  target: "es2022",
  write: false,
}).outputFiles[0].text;

const results = [];
for (const bundle of process.argv.slice(2)) {
  const server = spawn(process.env.FEWSTEP ?? `${root}.venv/bin/fewstep`, ["serve", bundle, "--port", "0"], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  const [said] = await once(server.stderr, "data");
  const address = /http:\S+/.exec(said)[0];
  try {
    results.push(await measure(bundle, address));
  } finally {
    server.kill("SIGINT");
  }
}

const { model } = cpus()[0];
const host = {
  cpu: model.trim(),
  cores: cpus().length,
  memory_gib: Math.round(totalmem() / 2 ** 30),
  kernel: release(),
  load: loadavg().map(round),
  scheduling: execFileSync("chrt", ["-p", `${process.pid}`], { encoding: "utf8" })
    .split("\n")[0]
    .split(": ")
    .at(-1),
};
console.log(
  JSON.stringify(
    {
      host,
      visits: VISITS,
      brotli_quality: QUALITY,
      runtime: { app: sizes(shell), onnxruntime_web: sizes(engine) },
      bundles: results,
    },
    null,
    2,
  ),
);

async function measure(bundle, address) {
  const manifest = JSON.parse(readFileSync(join(bundle, "manifest.json")));
  const graphs = Object.values(manifest.parts).map(({ graph }) => graph);
  const fetched = Object.keys(manifest.files).filter(
    (path) => graphs.includes(path) || path.endsWith(".onnx_data") || path === manifest.tokenizer?.file,
  );
  const download = sizes(["manifest.json", ...fetched].map((path) => join(bundle, path)));
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS });
  const version = browser.version();
  const system = await browser.newBrowserCDPSession();
  /** Seconds of processor time of the pages so far, all their threads together: what contention does not change much. */
  const spent = async () => {
    const { processInfo } = await system.send("SystemInfo.getProcessInfo");
    return processInfo.filter(({ type }) => type === "renderer").reduce((sum, { cpuTime }) => sum + cpuTime, 0);
  };
  const first = [];
  const second = [];
  const work = [];
  for (let visit = 0; visit < VISITS; visit++) {
    const context = await browser.newContext({ viewport: { width: 412, height: 839 } });
    const page = await context.newPage();
    await page.addInitScript(() => {
      const watch = new MutationObserver(() => {
        if (document.querySelector(".frame")?.dataset.state !== "done") return;
        globalThis.firstPicture ??= performance.now(); // since the address was asked for
      });
      watch.observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-state"] });
    });
    const shown = async () => {
      await page.waitForFunction(() => globalThis.firstPicture !== undefined, undefined, { timeout: 120_000 });
      return page.evaluate(() => globalThis.firstPicture);
    };
    const before = await spent();
    await page.goto(address);
    first.push(await shown());
    work.push((await spent()) - before);
    await page.waitForSelector("body[data-offline=ready]", { timeout: 120_000 });
    await page.reload();
    second.push(await shown());
    await context.close();
  }
  const context = await browser.newContext({ bypassCSP: true });
  const page = await context.newPage();
  await page.goto(`${address}icon.svg`); // of this site, and without the app
  await page.goto(`${address}app.webmanifest`);
  await page.setContent("<!doctype html>");
  await page.addScriptTag({ content: harness, type: "module" });
  await page.waitForFunction(() => "harness" in globalThis);
  const subject = manifest.tokenizer
    ? { prompt: "a rooster on a blue background" }
    : manifest.classes
      ? { classLabel: 0 }
      : {};
  const asks = Array.from({ length: PICTURES }, (_, seed) => ({ ...subject, seed }));
  const { opened, pictures } = await page.evaluate(
    ([url, all]) => globalThis.harness.draw([{ url, device: "cpu" }], all, { device: "wasm", threads: 1 }),
    [`/bundles/${basename(bundle).toLowerCase()}/`, asks],
  );
  await browser.close();
  const timings = pictures.slice(2).map((one) => one.timings);
  const steps = timings.flatMap(({ stepMs }) => stepMs);
  return {
    name: manifest.name,
    target: manifest.target.id,
    quantized: opened.quantized,
    steps: opened.plans.default.steps,
    calls_guided: manifest.guidance.scale !== 1,
    chromium: version,
    threads: opened.threads,
    download,
    first_visit_to_picture_ms: spread(first),
    first_visit_to_picture_cpu_s: spread(work),
    later_visit_to_picture_ms: spread(second),
    open_ms: round(opened.openMs),
    picture_ms: spread(timings.map(({ totalMs }) => totalMs)),
    step_ms: spread(steps),
    text_ms: spread(timings.map(({ textMs }) => textMs)),
    decode_ms: spread(timings.map(({ decodeMs }) => decodeMs)),
    // everything outside the engine's calls, over them
    overhead: spread(timings.map(({ totalMs, engineMs }) => (totalMs - engineMs) / engineMs)),
  };
}
