// node e2e/run.mjs   the browser tests: exports three small bundles once, bundles the tests, runs them in Chromium and Firefox
//
// FEWSTEP   the command that exports and draws for comparison (default: the checkout's own)
// CHROMIUM, FIREFOX   which browsers (default: Debian's)
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

process.chdir(fileURLToPath(new URL("..", import.meta.url)));
const root = fileURLToPath(new URL("../../..", import.meta.url));
const fewstep = process.env.FEWSTEP ?? `${root}.venv/bin/fewstep`;
const folder = "dist/e2e";
const bundles = `${folder}/bundles`;
for (const [name, path] of [
  ["CHROMIUM", "/usr/bin/chromium"],
  ["FIREFOX", "/usr/bin/firefox-esr"],
])
  if (!existsSync((process.env[name] ??= path)))
    throw new Error(`${process.env[name]} is missing: apt-get install chromium firefox-esr, or set ${name}`);
if (!existsSync("dist/site/index.html")) throw new Error("the web app is not built: run make web");
mkdirSync(bundles, { recursive: true });

const environment = { ...process.env, OMP_NUM_THREADS: "1" };
const run = async (...words) => {
  const child = spawn(fewstep, words, { stdio: ["ignore", "ignore", "inherit"], env: environment });
  const [code] = await once(child, "exit");
  if (code !== 0) throw new Error(`fewstep ${words.join(" ")} ended with ${code}`);
};
const model = `${root}models/emoji-64-fast`;
const make = (name, target, ...more) =>
  existsSync(`${bundles}/${name}`) ||
  run("export", model, "--target", target, "--no-speed", "-o", `${bundles}/${name}`, ...more);
const float = async () => {
  // 30 steps: enough to be stopped in the middle; a plan of two, which the bundle's golden latent was drawn with
  writeFileSync(`${folder}/steps.toml`, 'sampler = "ddim"\noffered = [2]\n');
  await make("f32", "laptop-cpu", "--steps", "30", "--recipe", `${folder}/steps.toml`);
  // the software adapter of the tests has no float16
  writeFileSync(`${folder}/float32.toml`, 'precision = "float32"\nweights = "float32"\noffered = [1]\n');
  await make("gpu32", "web-webgpu", "--recipe", `${folder}/float32.toml`);
  const picture = `${bundles}/f32.png`;
  if (!existsSync(picture))
    await run("run", `${bundles}/f32`, "--prompt", "a red heart on a yellow background", "--seed", "7", "-o", picture);
};
await Promise.all([make("int8", "web-wasm"), float()]); // two cores

rmSync(`${folder}/tests`, { recursive: true, force: true });
// esbuild takes the folder it was imported in, unless told
const common = { absWorkingDir: process.cwd(), bundle: true, format: "esm", target: "es2022", logLevel: "warning" };
const entryPoints = readdirSync("e2e")
  .filter((name) => name.endsWith(".test.ts"))
  .map((name) => `e2e/${name}`);
await build({
  ...common,
  entryPoints,
  outdir: `${folder}/tests`,
  platform: "node",
  packages: "external",
  sourcemap: "inline",
});
// what runs inside the browsers: a page without the app, and the golden tests as they are
await build({ ...common, entryPoints: ["e2e/harness.ts"], outdir: `${folder}/page` });
const shim = (name) => fileURLToPath(new URL(`shims/${name}.ts`, import.meta.url));
const alias = {
  "node:test": shim("test"),
  "node:assert/strict": shim("assert"),
  "node:crypto": shim("crypto"),
  "node:fs": shim("fs"),
};
await build({ ...common, entryPoints: ["tests/golden.test.ts"], outdir: `${folder}/page`, alias });

const tests = readdirSync(`${folder}/tests`)
  .filter((name) => name.endsWith(".js"))
  .map((name) => `${folder}/tests/${name}`);
const wanted = process.argv.slice(2);
const flags = ["--experimental-websocket", "--test", "--test-concurrency=1", ...wanted];
process.exit(
  spawnSync(process.execPath, [...flags, ...tests], {
    stdio: "inherit",
    env: { ...environment, NODE_NO_WARNINGS: "1" },
  }).status ?? 1,
);
