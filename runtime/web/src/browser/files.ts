/** The files of a bundle over HTTP: fetched with progress, compared with the manifest, kept for the next visit. */

import type { Files } from "../bundle.js";
import { FewstepError, count } from "../errors.js";
import { type Manifest, readManifest } from "../manifest.js";
import { NAME } from "../paths.js";
import { parseJson } from "../strictjson.js";
import { type Store, sha256 } from "./cache.js";

const AGAIN = "try again; if that does not help, whoever runs this site has to upload the bundle again";
const MAX_MANIFEST = 16 << 20; // runtime/spec/bundle.md: a manifest has at most 16 MB

export interface WebFilesOptions {
  /** Where files are kept; nothing is without it. */
  store?: Store | undefined;
  /** Told of each file whether it was kept here already. */
  onFile?: (path: string, kept: boolean) => void;
}

/** The hashes a manifest lists. Throws what `readManifest` does. */
export function hashesOf(manifest: Uint8Array): string[] {
  return Object.values(readManifest(parseJson(manifest, NAME)).files).map((file) => file.sha256);
}

/**
 * The bundle at an address that ends in a slash, for `openBundle`.
 *
 * The manifest is asked for every time; without a network the one seen last is taken. A file is fetched when the store
 * lacks its hash, and kept only whole and compared, so whatever was complete when a tab was closed is there next time.
 * What the store holds is compared too, and fetched again where the disk has damaged it.
 */
export function webFiles(base: string, { store, onFile }: WebFilesOptions = {}): Files {
  let listed: Manifest["files"] | undefined;

  const readManifestFile = async (signal?: AbortSignal): Promise<Uint8Array> => {
    let data: Uint8Array;
    try {
      data = await download(base + NAME, NAME, { most: MAX_MANIFEST, signal });
    } catch (error) {
      const kept = offline(error) ? await store?.manifest(base) : undefined;
      if (!kept) throw error;
      listed = readManifest(parseJson(kept, NAME)).files;
      return kept;
    }
    listed = readManifest(parseJson(data, NAME)).files;
    await store?.keepManifest(base, data, hashesOf);
    return data;
  };

  const read: Files["read"] = async (path, progress, signal) => {
    if (path === NAME) return readManifestFile(signal);
    if (!listed) await readManifestFile(signal);
    const spec = listed![path];
    if (!spec) throw new FewstepError("bundle", `${path} is not listed in ${NAME}`, "", AGAIN);
    const kept = await store?.get(spec.sha256);
    if (kept && kept.length === spec.bytes && (await sha256(kept)) === spec.sha256) {
      onFile?.(path, true);
      progress?.(kept.length);
      return kept;
    }
    if (kept) await store?.drop(spec.sha256);
    onFile?.(path, false);
    const data = await download(base + path, path, { exactly: spec.bytes, progress, signal });
    const hash = await sha256(data);
    if (hash !== spec.sha256)
      throw new FewstepError(
        "bundle",
        `${path} has been changed or damaged: its sha256 is ${hash}`,
        spec.sha256,
        AGAIN,
      );
    await store?.put(spec.sha256, data);
    return data;
  };
  return { read };
}

interface Wanted {
  exactly?: number;
  most?: number;
  progress?: ((bytes: number) => void) | undefined;
  signal?: AbortSignal | undefined;
}

const offline = (error: unknown): boolean => error instanceof FewstepError && error.expected === NETWORK;
const NETWORK = "a connection";

/** One file into memory. Throws FewstepError of kind "files", "memory" or "cancelled" naming it. */
async function download(url: string, path: string, { exactly, most, progress, signal }: Wanted): Promise<Uint8Array> {
  const wrong = (found: string, expected = "", fix = AGAIN): FewstepError =>
    new FewstepError("files", found, expected, fix);
  const stopped = (error: unknown): FewstepError => {
    if (signal?.aborted) return new FewstepError("cancelled", `cancelled while loading ${path}`);
    if (error instanceof FewstepError) return error;
    return wrong(
      `${path} cannot be fetched from ${url}`,
      NETWORK,
      "check the connection and try again: what was loaded is kept",
    );
  };
  let response: Response;
  try {
    // the store is ours, and the manifest has to be the newest
    response = await fetch(url, { cache: path === NAME ? "no-cache" : "default", signal: signal ?? null });
  } catch (error) {
    throw stopped(error);
  }
  if (response.status === 404) throw wrong(`${path} is missing: ${url} answers 404`);
  if (!response.ok)
    throw wrong(`${path} cannot be fetched: ${url} answers ${response.status} ${response.statusText}`.trim());
  const type = response.headers.get("content-type") ?? "";
  if (/^text\/html\b/i.test(type))
    throw wrong(`${path} is a web page: ${url} answers HTML`, "the file of the bundle", "check the address; " + AGAIN);
  const chunks = response.body?.getReader();
  if (!chunks) throw wrong(`${path} cannot be read from ${url}`);

  let into = room(path, exactly ?? 1 << 16);
  let size = 0;
  try {
    for (;;) {
      const { done, value } = await chunks.read();
      if (done) break;
      if (size + value.length > (exactly ?? most ?? Infinity)) {
        throw wrong(`${path} is longer than it should be`, `${count(exactly ?? most ?? 0)} bytes`);
      }
      if (size + value.length > into.length) {
        const larger = room(path, 2 * (size + value.length));
        larger.set(into.subarray(0, size));
        into = larger;
      }
      into.set(value, size);
      size += value.length;
      progress?.(size);
    }
  } catch (error) {
    await chunks.cancel().catch(() => undefined);
    throw stopped(error);
  }
  if (exactly !== undefined && size !== exactly)
    throw wrong(`${path} ends after ${count(size)} bytes`, `${count(exactly)} bytes`);
  return into.subarray(0, size);
}

function room(path: string, bytes: number): Uint8Array {
  try {
    return new Uint8Array(bytes);
  } catch {
    const fix = "close other tabs and apps, or choose a smaller bundle";
    throw new FewstepError("memory", `not enough memory for the ${count(bytes)} bytes of ${path}`, "", fix);
  }
}
