/** ONNX Runtime in a browser: WebAssembly or WebGPU. */

import type { Env } from "onnxruntime-common";
import type { Engine } from "../engine.js";
import { FewstepError, check } from "../errors.js";
import { type Ort, ortEngine } from "./ort.js";

export interface WebOptions {
  device: "wasm" | "webgpu";
  /** More than one needs a page isolated by COOP and COEP; without that it is one, whatever is asked for. */
  threads?: number | undefined;
  /** The folder of this site that holds onnxruntime-web's .wasm and .mjs files, with a slash at the end. */
  wasmPaths?: string | undefined;
}

/** ort: `import * as ort from "onnxruntime-web/wasm"`, or "onnxruntime-web/webgpu". Call it once, in a worker. */
export function webEngine(ort: Ort & { env: Env }, { device, threads, wasmPaths }: WebOptions): Engine {
  check(device === "wasm" || device === "webgpu", `device ${String(device)}`, "wasm or webgpu");
  if (wasmPaths !== undefined) ort.env.wasm.wasmPaths = wasmPaths;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? (threads ?? 0) : 1; // 0: it chooses
  ort.env.wasm.proxy = false; // the proxy detaches the arrays it is given: use a worker of your own
  if (device === "wasm") return ortEngine(ort, "onnxruntime-web", "cpu", { executionProviders: ["wasm"] });
  return ortEngine(ort, "onnxruntime-web (WebGPU)", "gpu", { executionProviders: ["webgpu"] });
}

interface Gpu {
  requestAdapter(): Promise<{ features: { has(name: string): boolean } } | null>;
}

/** Throws FewstepError of kind "engine" saying why WebGPU, or float16 on it, is not to be had here. */
export async function requireWebGpu(precision: string): Promise<void> {
  const refuse = (found: string): never => {
    throw new FewstepError("engine", found, "a browser and a device with WebGPU", "use the bundle for web-wasm");
  };
  const gpu = (globalThis.navigator as { gpu?: Gpu } | undefined)?.gpu ?? refuse("this browser has no WebGPU");
  const adapter = (await gpu.requestAdapter().catch(() => null)) ?? refuse("WebGPU finds no graphics processor here");
  if (precision === "float16" && !adapter.features.has("shader-f16"))
    refuse("this graphics processor does not compute in float16");
}
