// node dist/tests/draw.js ENGINE BUNDLE OUT REQUEST...   draws each request (JSON) with onnxruntime-node or -web:
// OUT/0.rgba, OUT/0.latents (float32), OUT/1.rgba, ...; prints JSON: the timings, and what verify() says
import { writeFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { folderFiles, nodeEngine } from "../src/engines/node.js";
import { webEngine } from "../src/engines/web.js";
import { type Request, type Verification, loadPipeline, openBundle, verify } from "../src/index.js";

const [name, bundle, out, ...requests] = process.argv.slice(2) as [string, string, string, ...string[]];
const engine =
  name === "onnxruntime-node"
    ? nodeEngine(ort, { threads: 1 })
    : webEngine(await import("onnxruntime-web"), { device: "wasm" }); // its WebAssembly runs in Node too
const start = performance.now();
const pipeline = await loadPipeline(await openBundle(folderFiles(bundle)), engine);
const loadMs = performance.now() - start;
const timings = [];
for (const [i, text] of requests.entries()) {
  const output = await pipeline.draw(JSON.parse(text) as Request);
  timings.push(output.timings);
  writeFileSync(`${out}/${i}.rgba`, output.image.data);
  writeFileSync(`${out}/${i}.latents`, new Uint8Array(output.latents.buffer));
}
let verification: Verification | string;
try {
  verification = await verify(pipeline);
} catch (error) {
  verification = String(error);
}
await pipeline.close();
console.log(JSON.stringify({ loadMs, timings, verification }));
