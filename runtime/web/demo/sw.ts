/** The service worker: the app's own files, and ONNX Runtime's once they were used, without a network. */

/// <reference lib="webworker" />
declare const SHELL: string[];
declare const VERSION: string;
const scope = globalThis as unknown as ServiceWorkerGlobalScope;

const NAME = `fewstep-app-${VERSION}`;
const CATALOG = "bundles.json";

scope.addEventListener("install", (event) => {
  const keep = async (): Promise<void> => {
    const cache = await caches.open(NAME);
    await cache.addAll(SHELL.map((path) => new Request(path, { cache: "reload" })));
    await scope.skipWaiting();
  };
  event.waitUntil(keep());
});

scope.addEventListener("activate", (event) => {
  const clean = async (): Promise<void> => {
    for (const name of await caches.keys())
      if (name.startsWith("fewstep-app-") && name !== NAME) await caches.delete(name);
    await scope.clients.claim();
  };
  event.waitUntil(clean());
});

scope.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || !url.href.startsWith(scope.registration.scope)) return;
  const path = url.href.slice(scope.registration.scope.length).split(/[?#]/)[0]!;
  if (path.startsWith("bundles/")) return; // the page keeps these itself, by their hash
  event.respondWith(path === CATALOG ? newest(request) : kept(request, path));
});

/** What changes: from the network, and what was seen last without one. */
async function newest(request: Request): Promise<Response> {
  const cache = await caches.open(NAME);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const found = await cache.match(request);
    if (found) return found;
    throw error;
  }
}

/** What belongs to this version of the app: as it was kept. */
async function kept(request: Request, path: string): Promise<Response> {
  const cache = await caches.open(NAME);
  const found = await cache.match(request, { ignoreSearch: true, ignoreVary: true });
  if (found) return found;
  const response = await fetch(request);
  if (response.ok && path.startsWith("ort/")) await cache.put(request, response.clone()).catch(() => undefined);
  return response;
}
