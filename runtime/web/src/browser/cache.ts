/** Files kept by the browser under their SHA-256: bundles share what they have in common, and nothing is ever stale. */

import { sha256 as hashed } from "../bundle.js";

/** What is kept between visits. */
export interface Store {
  /** The bytes under this hash, or undefined. */
  get(sha256: string): Promise<Uint8Array | undefined>;
  /** Keep bytes. False, and `full` told once, where the browser gives no more room. */
  put(sha256: string, data: Uint8Array): Promise<boolean>;
  drop(sha256: string): Promise<void>;
  /** The manifest last seen at this address, or undefined. */
  manifest(url: string): Promise<Uint8Array | undefined>;
  /** Keep a manifest, and drop the files that no kept manifest lists any more. */
  keepManifest(url: string, manifest: Uint8Array, hashesOf: (manifest: Uint8Array) => string[]): Promise<void>;
  /** Forget a bundle and the files that no other needs. */
  forget(url: string, hashesOf: (manifest: Uint8Array) => string[]): Promise<void>;
  /** Which of these hashes are here. */
  has(hashes: string[]): Promise<Set<string>>;
}

const NAME = "fewstep-files-1";
/** Keys of a cache are addresses; these are never asked of the network. */
const FILES = "/.fewstep/sha256/";
const MANIFESTS = "/.fewstep/manifest?of=";

/**
 * The store of this site, or undefined where the browser has none: a page that is neither https nor localhost, or a
 * private window of some browsers. `full` is told why something could not be kept.
 */
export async function openStore(full: (why: string) => void = () => undefined): Promise<Store | undefined> {
  if (!globalThis.caches) return undefined;
  let cache: Cache;
  try {
    cache = await caches.open(NAME);
  } catch {
    return undefined;
  }
  const fileKey = (sha256: string): string => new URL(FILES + sha256, location.origin).href;
  const manifestKey = (url: string): string => new URL(MANIFESTS + encodeURIComponent(url), location.origin).href;
  const bytes = async (key: string): Promise<Uint8Array | undefined> => {
    const found = await cache.match(key);
    return found && new Uint8Array(await found.arrayBuffer());
  };
  /** A Response is written whole or not at all, also when the tab is closed meanwhile. */
  const keep = async (key: string, data: Uint8Array): Promise<boolean> => {
    try {
      await cache.put(
        key,
        new Response(data as Uint8Array<ArrayBuffer>, { headers: { "content-length": `${data.length}` } }),
      );
      return true;
    } catch (error) {
      full(await whyNotKept(error, data.length));
      return false;
    }
  };
  /** Drop every file that no kept manifest lists. */
  const prune = async (hashesOf: (manifest: Uint8Array) => string[]): Promise<void> => {
    const keys = (await cache.keys()).map((request) => request.url);
    const needed = new Set<string>();
    for (const key of keys.filter((url) => new URL(url).pathname === MANIFESTS.split("?")[0])) {
      try {
        for (const hash of hashesOf((await bytes(key))!)) needed.add(fileKey(hash));
      } catch {
        await cache.delete(key); // of another version of this page
      }
    }
    const files = keys.filter((url) => new URL(url).pathname.startsWith(FILES));
    await Promise.all(files.filter((url) => !needed.has(url)).map((url) => cache.delete(url)));
  };
  return {
    get: (sha256) => bytes(fileKey(sha256)),
    put: (sha256, data) => keep(fileKey(sha256), data),
    drop: async (sha256) => void (await cache.delete(fileKey(sha256))),
    manifest: (url) => bytes(manifestKey(url)),
    keepManifest: async (url, manifest, hashesOf) => {
      if (await keep(manifestKey(url), manifest)) await prune(hashesOf);
    },
    forget: async (url, hashesOf) => {
      await cache.delete(manifestKey(url));
      await prune(hashesOf);
    },
    has: async (hashes) => {
      const kept = new Set((await cache.keys()).map((request) => request.url));
      return new Set(hashes.filter((hash) => kept.has(fileKey(hash))));
    },
  };
}

async function whyNotKept(error: unknown, needed: number): Promise<string> {
  const megabytes = (count: number): string => `${Math.ceil(count / 1e6)} MB`;
  const { quota = 0, usage = 0 } = (await navigator.storage?.estimate().catch(() => undefined)) ?? {};
  const full = error instanceof DOMException && error.name === "QuotaExceededError";
  if (!full) return `the browser cannot keep files (${error instanceof Error ? error.message : String(error)})`;
  return `this browser has no room to keep ${megabytes(needed)} (${megabytes(usage)} of ${megabytes(quota)} used)`;
}

/** As the bundle's, with what helps someone who opened the app itself. */
export const sha256 = (data: Uint8Array): Promise<string> =>
  hashed(data, "serve it over https, or open it on this machine with fewstep serve");
