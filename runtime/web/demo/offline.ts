/** Working without a network: the service worker for the app, and ONNX Runtime's files beside it. */

const PREFIX = "fewstep-app-";

/** Register the service worker; `updated` is told when a newer app has been put in place under a running page. */
export async function install(updated: () => void): Promise<void> {
  const container = navigator.serviceWorker as ServiceWorkerContainer | undefined;
  if (!container) return; // not https, not localhost, or a private window
  const first = container.controller === null;
  let seen = first;
  container.addEventListener("controllerchange", () => {
    if (seen)
      seen = false; // the first worker takes the page over: nothing has changed
    else updated();
  });
  await container.register("sw.js", { scope: "./", updateViaCache: "none" }).catch(() => undefined);
}

/**
 * Make sure the engine's files are kept: on a first visit they were fetched before the service worker stood.
 * True when the next visit needs no network.
 */
export async function keepEngine(base: string): Promise<boolean> {
  if (!navigator.serviceWorker || !globalThis.caches) return false;
  await navigator.serviceWorker.ready;
  const name = (await caches.keys()).find((one) => one.startsWith(PREFIX));
  if (!name) return false;
  const cache = await caches.open(name);
  const used = performance.getEntriesByType("resource").map((entry) => entry.name);
  const folder = new URL("ort/", base).href;
  try {
    for (const url of [...engineFiles(), ...used.filter((one) => one.startsWith(folder))].map(
      (one) => new URL(one, folder).href,
    ))
      if (!(await cache.match(url))) await cache.add(url); // from the browser's own cache
    if (!(await cache.match(new URL("bundles.json", base).href))) await cache.add(new URL("bundles.json", base).href);
    return true;
  } catch {
    return false; // no room, or the network went
  }
}

let device: "wasm" | "webgpu" = "wasm";

/** Which of ONNX Runtime's builds this browser uses; as worker.ts chooses. */
export function uses(engine: "wasm" | "webgpu"): void {
  device = engine;
}

function engineFiles(): string[] {
  const kind = device === "wasm" ? "" : "Suspending" in WebAssembly ? ".jspi" : ".asyncify";
  const script = { "": "wasm", ".jspi": "jspi", ".asyncify": "webgpu" }[kind]!;
  return [`ort.${script}.min.mjs`, `ort-wasm-simd-threaded${kind}.mjs`, `ort-wasm-simd-threaded${kind}.wasm`];
}
