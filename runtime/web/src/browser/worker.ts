/** The worker behind client.ts: loads a bundle, picks an engine, draws. Bundled on its own, as a module worker. */

import type { Env } from "onnxruntime-common";
import { type Bundle, openBundle } from "../bundle.js";
import type { Engine } from "../engine.js";
import { engineError } from "../engines/ort.js";
import type { Ort } from "../engines/ort.js";
import { requireWebGpu, webEngine } from "../engines/web.js";
import { FewstepError } from "../errors.js";
import { NAME } from "../paths.js";
import { type Pipeline, loadPipeline } from "../pipeline.js";
import { type Store, openStore, sha256 } from "./cache.js";
import type { Ask, FromWorker, Loading, Opened, ToWorker, Variant } from "./client.js";
import { hashesOf, webFiles } from "./files.js";

const MOST_THREADS = 4; // onnxruntime-web's own limit: more slow a phone's smaller cores down

let pipeline: Pipeline | undefined;
const running = new Map<number, AbortController>();
/** One at a time: opening a bundle and drawing share the engine. */
let turn: Promise<void> = Promise.resolve();

const send = (message: FromWorker, moved: Transferable[] = []): void => postMessage(message, { transfer: moved });

addEventListener("message", ({ data }: MessageEvent<ToWorker>) => {
  if (data.type === "cancel") return running.get(data.id)?.abort();
  const controller = new AbortController();
  running.set(data.id, controller);
  turn = turn.then(async () => {
    try {
      if (controller.signal.aborted) throw new FewstepError("cancelled", "cancelled before it began");
      if (data.type === "open") await open(data, controller.signal);
      else if (data.type === "draw") await draw(data.id, data.ask, controller.signal);
      else await forget(data.id, data.url);
    } catch (error) {
      const { kind, found, expected, fix } = engineError(error, "drawing in this browser failed", "cpu");
      send({ type: "failed", id: data.id, kind, found, expected, fix });
    } finally {
      running.delete(data.id);
    }
  });
});

async function forget(id: number, url: string): Promise<void> {
  await (await openStore())?.forget(url, hashesOf);
  send({ type: "done", id });
}

type Open = Extract<ToWorker, { type: "open" }>;

async function open(message: Open, signal: AbortSignal): Promise<void> {
  const start = performance.now();
  await pipeline?.close();
  pipeline = undefined;
  let told = false;
  const store = await openStore((why) => {
    if (!told) send({ type: "notKept", id: message.id, why });
    told = true;
  });
  const [variant, why] = await chooseVariant(message);
  let opened: [Pipeline, Opened];
  try {
    opened = await load(message, variant, why, store, signal);
  } catch (error) {
    const other = message.variants.find(({ device }) => device === "cpu");
    const fallsBack = error instanceof FewstepError && error.kind === "engine" && message.device === "auto";
    if (why !== "" || !fallsBack) throw error;
    opened = await load(message, other ?? variant, `WebGPU failed: ${error.found}`, store, signal);
  }
  pipeline = opened[0];
  send({ type: "opened", id: message.id, opened: { ...opened[1], openMs: performance.now() - start } });
}

/** Which variant to load, and why it does not run on WebGPU; an empty text where it does. */
async function chooseVariant({ variants, device }: Open): Promise<[Variant, string]> {
  const [forGpu, forCpu] = (["gpu", "cpu"] as const).map((kind) => variants.find((one) => one.device === kind));
  const any = forCpu ?? forGpu;
  if (!any) throw new FewstepError("input", "no bundle to open", "the address of one");
  if (device === "wasm") return [any, "WebAssembly was asked for."];
  try {
    if (!forGpu)
      throw new FewstepError("engine", "this bundle is made for the processor", "", "export it for web-webgpu");
    await requireWebGpu(await precisionOf(forGpu));
    return [forGpu, ""];
  } catch (error) {
    if (!(error instanceof FewstepError) || error.kind !== "engine" || device === "webgpu") throw error;
    return [any, sentence(error.found)];
  }
}

/** What the denoiser's graph at this address computes in, from its manifest. */
async function precisionOf({ url }: Variant): Promise<string> {
  const { manifest } = await openBundle(webFiles(url, { store: await openStore() }));
  return manifest.parts[manifest.denoiser]!.precision;
}

const sentence = (text: string): string => `${text.slice(0, 1).toUpperCase()}${text.slice(1)}.`;

async function load(
  message: Open,
  { url }: Variant,
  why: string,
  store: Store | undefined,
  signal: AbortSignal,
): Promise<[Pipeline, Opened]> {
  const kept = new Set<string>();
  const files = webFiles(url, { store, onFile: (path, here) => here && kept.add(path) });
  let digest = "";
  const bundle = await openBundle({
    read: async (path, progress, stop) => {
      const data = await files.read(path, progress, stop);
      if (path === NAME) digest = await sha256(data);
      return data;
    },
  });
  const { manifest } = bundle;
  const device = why === "" ? "webgpu" : "wasm";
  const threads = device === "webgpu" || !crossOriginIsolated ? 1 : (message.threads ?? coresToUse());
  const report = progressOf(bundle, kept, (progress) => send({ type: "progress", id: message.id, progress }));
  const engine = await openEngine(message.ort, device, threads);
  const announcing: Engine = {
    ...engine,
    open: (graph, spec) => {
      report.prepare(spec.graph);
      return engine.open(graph, spec);
    },
  };
  const made = await loadPipeline(bundle, announcing, {
    onProgress: report.fetch,
    signal,
    lowMemory: message.lowMemory,
  });
  const { height, width, multiple, fixed } = manifest.sample;
  const denoiser = manifest.parts[manifest.denoiser]!;
  const opened: Opened = {
    url,
    name: manifest.name,
    task: manifest.task,
    device,
    threads,
    why,
    plans: Object.fromEntries(Object.keys(manifest.plans).map((name) => [name, sizeOf(made, name)])),
    guidance: manifest.guidance,
    size: { height, width, multiple, fixed },
    classes: manifest.classes,
    license: manifest.license,
    versions: manifest.versions,
    bytes: Object.values(manifest.files).reduce((sum, file) => sum + file.bytes, 0),
    precision: denoiser.precision,
    quantized: Object.keys(denoiser.quantization).length > 0,
    sha256: digest,
    openMs: 0,
  };
  return [made, opened];
}

function sizeOf(made: Pipeline, name: string): { steps: number; calls: number } {
  const plan = made.plan(name);
  return { steps: plan.states, calls: plan.calls.length };
}

/** Half of the cores, as onnxruntime-web takes by itself: the other half are often slower, or the same ones twice. */
const coresToUse = (): number =>
  Math.max(1, Math.min(MOST_THREADS, Math.ceil((navigator.hardwareConcurrency || 1) / 2)));

/** onnxruntime-web from this site, in the smallest build that does it. */
async function openEngine(folder: string, device: "wasm" | "webgpu", threads: number): Promise<Engine> {
  // JSPI is a third smaller than asyncify, where the browser has it
  const jspi = "Suspending" in WebAssembly;
  const file = device === "wasm" ? "ort.wasm.min.mjs" : jspi ? "ort.jspi.min.mjs" : "ort.webgpu.min.mjs";
  let ort: Ort & { env: Env };
  try {
    ort = (await import(new URL(file, folder).href)) as Ort & { env: Env };
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    const fix = "check the connection and reload; if that does not help, upload the site again";
    throw new FewstepError("files", `${file} of ONNX Runtime Web cannot be loaded (${message})`, "", fix);
  }
  return webEngine(ort, { device, threads, wasmPaths: folder });
}

const channel = new MessageChannel();

/** Let a "cancel" through. A timer would do, but nested ones take 4 ms each (html.spec.whatwg.org, timers). */
function breathe(): Promise<void> {
  return new Promise((resolve) => {
    channel.port1.onmessage = () => resolve();
    channel.port2.postMessage(0);
  });
}

interface Report {
  fetch(progress: { part: string; loadedBytes: number; totalBytes: number }): void;
  prepare(graph: string): void;
}

/** Progress of single parts as progress of the whole bundle. */
function progressOf({ manifest }: Bundle, kept: Set<string>, tell: (progress: Loading) => void): Report {
  const needed = Object.entries(manifest.files).filter(([path]) => {
    const folder = path.slice(0, path.lastIndexOf("/") + 1);
    const ofPart = Object.values(manifest.parts).some(
      ({ graph }) => graph.slice(0, graph.lastIndexOf("/") + 1) === folder,
    );
    return (ofPart && /\.onnx(_data)?$/.test(path)) || path === manifest.tokenizer?.file;
  });
  const totalBytes = needed.reduce((sum, [, file]) => sum + file.bytes, 0);
  const loaded = new Map<string, number>();
  let part = "";
  const say = (stage: Loading["stage"]): void => {
    const loadedBytes = [...loaded.values()].reduce((sum, bytes) => sum + bytes, 0);
    const keptBytes = [...kept].reduce((sum, path) => sum + (manifest.files[path]?.bytes ?? 0), 0);
    tell({ part, loadedBytes, totalBytes, keptBytes: Math.min(keptBytes, loadedBytes), stage });
  };
  return {
    fetch: (progress) => {
      part = progress.part;
      loaded.set(part, progress.loadedBytes);
      say("fetch");
    },
    prepare: (graph) => {
      part = Object.entries(manifest.parts).find(([, spec]) => spec.graph === graph)?.[0] ?? graph;
      say("prepare");
    },
  };
}

async function draw(id: number, { preview = false, ...ask }: Ask, signal: AbortSignal): Promise<void> {
  if (!pipeline) throw new FewstepError("input", "no bundle is open", "one", "open a bundle first");
  const steps = pipeline.generate({ ...ask, signal });
  for (;;) {
    const next = await steps.next();
    if (next.done) {
      const { image, timings, latents } = next.value;
      send({ type: "picture", id, picture: { image, timings, latents } }, [image.data.buffer, latents.buffer]);
      return;
    }
    const { index, count, ms } = next.value;
    if (preview && index + 1 < count) {
      const image = await next.value.preview();
      send({ type: "step", id, step: { index, count, ms, image } }, [image.data.buffer]);
    } else send({ type: "step", id, step: { index, count, ms } });
    await breathe();
  }
}
