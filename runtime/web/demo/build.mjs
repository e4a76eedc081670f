// node demo/build.mjs   dist/site/: the web app and onnxruntime-web's files, ready for any static host
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

process.chdir(fileURLToPath(new URL("..", import.meta.url)));
const site = "dist/site";
const fresh = `${site}.new`;
rmSync(fresh, { recursive: true, force: true });
mkdirSync(`${fresh}/ort`, { recursive: true });

const options = { bundle: true, format: "esm", target: "es2022", minify: true, logLevel: "warning", outdir: fresh };
await build({ ...options, entryPoints: { app: "demo/app.ts", worker: "src/browser/worker.ts" } });
await build({ ...options, entryPoints: { app: "demo/app.css" }, target: "safari17" });
for (const name of ["index.html", "icon.svg", "app.webmanifest"]) cpSync(`demo/${name}`, `${fresh}/${name}`);

// one build of ONNX Runtime for each kind of browser; a visitor fetches one
const ort = "node_modules/onnxruntime-web/dist";
for (const kind of ["wasm", "jspi", "webgpu"]) cpSync(`${ort}/ort.${kind}.min.mjs`, `${fresh}/ort/ort.${kind}.min.mjs`);
for (const kind of ["", ".jspi", ".asyncify"])
  for (const end of ["mjs", "wasm"])
    cpSync(`${ort}/ort-wasm-simd-threaded${kind}.${end}`, `${fresh}/ort/ort-wasm-simd-threaded${kind}.${end}`);

// the service worker keeps the shell under a name that changes with any of its bytes, ONNX Runtime's included
const shell = readdirSync(fresh)
  .filter((name) => name !== "ort")
  .sort();
const runtime = readdirSync(`${fresh}/ort`)
  .sort()
  .map((name) => `ort/${name}`);
const digest = createHash("sha256");
for (const name of [...shell, ...runtime]) digest.update(name).update(readFileSync(`${fresh}/${name}`));
const define = {
  SHELL: JSON.stringify(["./", ...shell.filter((name) => name !== "index.html")]),
  VERSION: JSON.stringify(digest.digest("hex").slice(0, 12)),
};
await build({ ...options, entryPoints: { sw: "demo/sw.ts" }, define, format: "iife" });

rmSync(site, { recursive: true, force: true });
renameSync(fresh, site);
const bytes = (name) => readFileSync(`${site}/${name}`).length;
writeFileSync(1, `dist/site: app.js ${bytes("app.js")} bytes, worker.js ${bytes("worker.js")} bytes\n`);
