// Graphs in onnxruntime-web's wasm build under Node, one thread: core milliseconds of a call, and the wasm heap after it.
//
//   node benchmarks/preflight_wasm.mjs SECONDS FOLDER [FOLDER ...]
//
// Each FOLDER has spec.json (inputs, graph) and the graph. All are open at once, as the parts of a picture are. Prints JSON.
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const heaps = [];
const Memory = WebAssembly.Memory;
WebAssembly.Memory = class extends Memory {
  constructor(descriptor) {
    super(descriptor);
    heaps.push(this);
  }
};

const here = dirname(fileURLToPath(import.meta.url));
const dist = join(here, "../runtime/web/node_modules/onnxruntime-web/dist");
const ort = await import(pathToFileURL(join(dist, "ort.wasm.min.mjs")).href);
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = pathToFileURL(`${dist}/`).href;

// of this thread alone: V8 compiles hot functions again on others
const coreMs = () => Number(readFileSync(`/proc/self/task/${process.pid}/schedstat`, "utf8").split(" ")[0]) / 1e6;
const WARM_MS = 1000; // until then what is hot was compiled well: calls take the same time from there on

const [seconds, ...folders] = process.argv.slice(2);
const found = {};
const kept = [];
for (const folder of folders) {
  const spec = JSON.parse(readFileSync(join(folder, "spec.json"), "utf8"));
  const data = join(folder, "model.onnx_data");
  const externalData = existsSync(data) ? [{ path: "model.onnx_data", data: readFileSync(data) }] : [];
  const session = await ort.InferenceSession.create(readFileSync(join(folder, spec.graph)), {
    executionProviders: ["wasm"],
    logSeverityLevel: 3,
    ...(externalData.length && { externalData }),
  });
  kept.push(session);
  const feeds = {};
  for (const { name, dtype, shape } of spec.feeds) {
    const count = shape.reduce((a, b) => a * b, 1);
    if (dtype === "int64") feeds[name] = new ort.Tensor("int64", new BigInt64Array(count).fill(1n), shape);
    else feeds[name] = new ort.Tensor("float32", Float32Array.from({ length: count }, () => 2 * Math.random() - 1), shape);
  }
  const warming = performance.now();
  for (let i = 0; i < 3 || performance.now() - warming < WARM_MS; i++) await session.run(feeds);
  const took = [];
  const began = performance.now();
  while (took.length < 5 || performance.now() - began < 1e3 * Number(seconds)) {
    const before = coreMs();
    await session.run(feeds);
    took.push(coreMs() - before);
  }
  took.sort((a, b) => a - b);
  found[folder] = { core_ms: took[Math.floor(took.length / 4)] };
}
const heap = Math.max(0, ...heaps.map((memory) => memory.buffer.byteLength));
console.log(JSON.stringify({ heap_bytes: heap, rss_bytes: process.memoryUsage().rss, calls: found }));
