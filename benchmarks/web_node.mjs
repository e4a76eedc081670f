// What web_node.py asks of the TypeScript runtime: node benchmarks/web_node.mjs BUNDLE OUT REPEATS REQUEST...
// Prints JSON: the golden files, minified sizes, and where there is a bundle its pictures' timings. Needs make web and
// `node build.mjs --tests` in runtime/web.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { brotliCompressSync } from "node:zlib";

const WEB = new URL("../runtime/web/", import.meta.url);
const require = createRequire(new URL("package.json", WEB));
const { cases, difference, drawStream, streams } = await import(new URL("dist/tests/golden.js", WEB));
const { loadPipeline, openBundle } = await import(new URL("dist/index.js", WEB));
const { folderFiles, nodeEngine } = await import(new URL("dist/node.js", WEB));
const ort = require("onnxruntime-node");

const [bundle, out, repeats, ...requests] = process.argv.slice(2);

/** ONNX Runtime with a clock around its own work alone: what this package adds is all the rest. */
let inside = { ms: 0, cpuMs: 0 };
const cpuMs = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};
const timedOrt = {
  Tensor: ort.Tensor,
  InferenceSession: {
    create: async (...given) => {
      const session = await ort.InferenceSession.create(...given);
      const run = session.run.bind(session);
      session.run = async (...feeds) => {
        const [start, cpuStart] = [performance.now(), cpuMs()];
        const result = await run(...feeds);
        inside.ms += performance.now() - start;
        inside.cpuMs += cpuMs() - cpuStart;
        return result;
      };
      return session;
    },
  },
};

async function draw() {
  const start = performance.now();
  const pipeline = await loadPipeline(await openBundle(folderFiles(bundle)), nodeEngine(timedOrt, { threads: 1 }));
  const loadMs = performance.now() - start;
  const runs = [];
  for (const [i, text] of requests.entries()) {
    const { image, latents } = await pipeline.draw(JSON.parse(text));
    writeFileSync(`${out}/${i}.rgba`, image.data);
    writeFileSync(`${out}/${i}.latents`, new Uint8Array(latents.buffer));
  }
  for (let i = 0; i < Number(repeats); i++) {
    inside = { ms: 0, cpuMs: 0 };
    const cpuStart = cpuMs();
    const { timings } = await pipeline.draw(JSON.parse(requests[i % requests.length]));
    const cpu = cpuMs() - cpuStart;
    runs.push({ totalMs: timings.totalMs, engineMs: inside.ms, cpuMs: cpu, engineCpuMs: inside.cpuMs });
  }
  await pipeline.close();
  return { loadMs, runs };
}

async function golden() {
  const equal = streams.filter((stream) => drawStream(stream).sha256 === stream.sha256).length;
  const errors = [];
  for (const one of cases)
    errors.push({ name: one.name, error: await difference(one), tolerance: Number(one.tolerance) });
  const passed = errors.filter(({ error, tolerance }) => error < tolerance).length;
  const worst = {}; // by what is allowed: a leapfrog amplifies rounding
  for (const one of errors) if (!(worst[one.tolerance]?.error > one.error)) worst[one.tolerance] = one;
  return {
    noise: { streams: streams.length, equal },
    plans: { cases: cases.length, passed, worst: Object.values(worst) },
  };
}

async function sizes() {
  const esbuild = require("esbuild");
  const options = { bundle: true, minify: true, format: "esm", write: false, packages: "external" };
  const found = {};
  for (const [name, path] of [
    ["core", "src/index.ts"],
    ["core_and_web_engine", "src/browser/worker.ts"],
  ]) {
    const entryPoints = [new URL(path, WEB).pathname];
    const { contents } = (await esbuild.build({ ...options, entryPoints })).outputFiles[0];
    found[name] = { minified_bytes: contents.length, brotli_bytes: brotliCompressSync(contents).length };
  }
  return found;
}

const version = JSON.parse(readFileSync(new URL("node_modules/onnxruntime-node/package.json", WEB))).version;
const answer = bundle
  ? await draw()
  : { node: process.version, onnxruntime_node: version, ...(await golden()), sizes: await sizes() };
console.log(JSON.stringify(answer));
