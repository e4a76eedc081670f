// The browser's half of web_attention.py: runs each graph of a folder in Chromium, compares, prints JSON.
import { existsSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join } from "node:path";
import { fileURLToPath } from "node:url";

const web = fileURLToPath(new URL("../runtime/web/", import.meta.url));
const { chromium } = createRequire(`${web}package.json`)("playwright-core");
const RUNS = 12;
const TYPES = { ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };

const server = createServer((request, response) => {
  const path = decodeURIComponent(request.url);
  if (path === "/") return response.writeHead(200, { "content-type": "text/html" }).end("<!doctype html>");
  const file = path.startsWith("/ort/") ? join(web, "dist/site", path) : join(process.argv[2], path);
  if (!existsSync(file)) return response.writeHead(404).end();
  response
    .writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" })
    .end(readFileSync(file));
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const flags = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags });
const results = { chromium: browser.version(), runs: RUNS };
for (const device of ["wasm", "webgpu"]) {
  const page = await browser.newPage();
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  results[device] = await page.evaluate(
    async ([provider, runs]) => {
      const ort = await import(provider === "wasm" ? "/ort/ort.wasm.min.mjs" : "/ort/ort.jspi.min.mjs");
      ort.env.wasm.wasmPaths = `${location.origin}/ort/`;
      ort.env.wasm.numThreads = 1;
      const { graphs, feeds, wanted } = await (await fetch("/case.json")).json();
      const tensors = Object.entries(feeds).map(([name, { dims, data }]) => [
        name,
        new ort.Tensor("float32", Float32Array.from(data), dims),
      ]);
      const found = {};
      for (const [name, path] of Object.entries(graphs)) {
        const graph = new Uint8Array(await (await fetch(`/${path}`)).arrayBuffer());
        const session = await ort.InferenceSession.create(graph, {
          executionProviders: [provider],
          logSeverityLevel: 3,
        });
        const times = [];
        let outputs;
        for (let run = 0; run < (provider === "wasm" ? runs : 1); run++) {
          const start = performance.now();
          outputs = await session.run(Object.fromEntries(tensors));
          times.push(performance.now() - start);
        }
        const [[output, right]] = Object.entries(wanted);
        const { data } = outputs[output];
        const squares = (values) => values.reduce((sum, value) => sum + value * value, 0);
        const relative = Math.sqrt(squares(right.map((value, i) => data[i] - value)) / squares(right));
        const round = (value) => Number(value.toPrecision(3));
        found[name] = { relative_error: round(relative) };
        if (provider === "wasm") found[name].median_ms = round(times.sort((a, b) => a - b)[runs >> 1]);
        await session.release();
      }
      return found;
    },
    [device, RUNS],
  );
  await page.close();
}
await browser.close();
server.close();
console.log(JSON.stringify(results));
