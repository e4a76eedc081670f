// node build.mjs           dist/: index.js (the core), one file an engine, the browser's client and worker, and types
//                          and dist/site/, the web app
// node build.mjs --tests   the first of these and dist/tests/
import { execFileSync } from "node:child_process";
import { existsSync, readdirSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
const tests = process.argv.includes("--tests");
const common = { bundle: true, format: "esm", target: "es2022", logLevel: "warning", packages: "external" };

if (!tests) rmSync("dist", { recursive: true, force: true });
await build({
  ...common,
  entryPoints: {
    index: "src/index.ts",
    node: "src/engines/node.ts",
    web: "src/engines/web.ts",
    reactnative: "src/engines/reactnative.ts",
    browser: "src/browser/client.ts",
    worker: "src/browser/worker.ts",
  },
  outdir: "dist",
  minify: true,
  splitting: true, // FewstepError is one class, whichever file throws it
  chunkNames: "shared-[hash]",
  sourcemap: true,
});
if (tests) {
  rmSync("dist/tests", { recursive: true, force: true });
  const entryPoints = readdirSync("tests")
    .filter((name) => name.endsWith(".ts"))
    .map((name) => `tests/${name}`);
  await build({ ...common, entryPoints, outdir: "dist/tests", platform: "node", sourcemap: "inline" });
} else {
  const options = [
    "--noEmit",
    "false",
    "--declaration",
    "--emitDeclarationOnly",
    "--outDir",
    "dist/types",
    "--rootDir",
    "src",
  ];
  execFileSync("node_modules/.bin/tsc", ["-p", "tsconfig.types.json", ...options], { stdio: "inherit" });
  if (existsSync("demo/build.mjs")) await import("./demo/build.mjs"); // dist/site: the web app
}
