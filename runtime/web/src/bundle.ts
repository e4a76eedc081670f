/** A bundle: manifest.json and the files it lists, wherever the bytes come from. Format: runtime/spec/bundle.md. */

import type { GraphFiles } from "./engine.js";
import { FewstepError, checkSignal, count, quoted } from "./errors.js";
import { checkGraph } from "./graphfile.js";
import { type Manifest, readManifest } from "./manifest.js";
import { NAME } from "./paths.js";
import { parseJson } from "./strictjson.js";

/** Where the bytes come from: a folder, HTTP, a cache, a file picker. */
export interface Files {
  /** Names of all files; where it is there, one that is missing or not listed is refused at once. */
  list?(): Promise<string[]>;
  /** The whole file. `progress` is told the bytes read so far. Throws FewstepError of kind "files". */
  read(path: string, progress?: (bytes: number) => void, signal?: AbortSignal): Promise<Uint8Array>;
  /** SHA-256 as hexadecimal digits, where this can do more than WebCrypto, which takes less than 2 GiB. */
  sha256?(data: Uint8Array): Promise<string>;
}

export interface LoadProgress {
  /** The part that is being loaded: unet, vae_decoder, text_encoder, tokenizer. */
  part: string;
  loadedBytes: number;
  totalBytes: number;
}

export interface BundleOptions {
  /** "hash" compares every byte; "size" trusts files of the right size, which this device has checked before. */
  check?: "hash" | "size";
  onProgress?: (progress: LoadProgress) => void;
  signal?: AbortSignal;
}

export interface Bundle {
  readonly manifest: Manifest;
  /** One listed file, read and compared. */
  file(path: string, options?: BundleOptions & { part?: string }): Promise<Uint8Array>;
  /** The graph of one part and the data file it uses, read, compared and passed through the gate of graphfile.ts. */
  graph(part: string, options?: BundleOptions): Promise<GraphFiles>;
}

/** Bytes that WebCrypto does not take any more, nor Chromium's ArrayBuffer. */
const TOO_LARGE = 2 ** 31;
const AGAIN = "download or export the bundle again";

/**
 * Read and check the manifest. Files are read when a part is opened, each once and whole.
 * Throws FewstepError naming the file at fault; so do the bundle's own functions.
 */
export async function openBundle(files: Files, options: BundleOptions = {}): Promise<Bundle> {
  checkSignal(options.signal, "while opening the bundle");
  const manifest = readManifest(parseJson(await files.read(NAME, undefined, options.signal), NAME));
  if (files.list) checkNames(manifest, await files.list());

  const read = async (path: string, told: BundleOptions, progress: (bytes: number) => void): Promise<Uint8Array> => {
    const spec = manifest.files[path];
    if (!spec) throw new FewstepError("bundle", `${quoted(path)} is not listed in ${NAME}`, "", AGAIN);
    if (spec.bytes >= TOO_LARGE && !files.sha256)
      throw new FewstepError(
        "memory",
        `${path} has ${count(spec.bytes)} bytes`,
        `less than ${count(TOO_LARGE)}, which is what a browser holds in one piece`,
        "export the bundle for web-wasm or web-webgpu, or quantize it (--quantize w8a8)",
      );
    checkSignal(told.signal, `while loading ${path}`);
    const data = await files.read(path, progress, told.signal);
    checkSignal(told.signal, `while loading ${path}`);
    if (data.length !== spec.bytes)
      throw new FewstepError("bundle", `${path} has ${count(data.length)} bytes`, count(spec.bytes), AGAIN);
    const hash = told.check === "size" ? spec.sha256 : await (files.sha256 ?? sha256)(data);
    if (hash !== spec.sha256)
      throw new FewstepError(
        "bundle",
        `${path} has been changed or damaged: its sha256 is ${hash}`,
        spec.sha256,
        AGAIN,
      );
    progress(data.length);
    return data;
  };

  return {
    manifest,
    file: async (path, own = {}) => {
      const told = { ...options, ...own };
      const totalBytes = manifest.files[path]?.bytes ?? 0;
      const report = (loadedBytes: number): void =>
        told.onProgress?.({ part: own.part ?? path, loadedBytes, totalBytes });
      return read(path, told, report);
    },
    graph: async (part, own = {}) => {
      const told = { ...options, ...own };
      const spec = manifest.parts[part];
      if (!spec) throw new FewstepError("bundle", `this bundle has no ${part}`, Object.keys(manifest.parts).join(", "));
      if (spec.engine !== "onnxruntime" || !spec.graph.endsWith(".onnx"))
        throw new FewstepError(
          "bundle",
          `${part} of this bundle is for the engine ${spec.engine} (${spec.graph})`,
          "onnxruntime and an .onnx graph",
          "export the model for web-wasm or web-webgpu",
        );
      const folder = spec.graph.slice(0, spec.graph.lastIndexOf("/") + 1);
      const inside = (path: string): boolean => path.startsWith(folder) && !path.slice(folder.length).includes("/");
      const beside = new Map(
        Object.keys(manifest.files)
          .filter((path) => inside(path) && path !== spec.graph)
          .map((path) => [path.slice(folder.length), manifest.files[path]!.bytes]),
      );
      const sizes = [manifest.files[spec.graph]!.bytes, ...beside.values()];
      const totalBytes = sizes.reduce((sum, bytes) => sum + bytes, 0);
      const report = (loadedBytes: number): void => told.onProgress?.({ part, loadedBytes, totalBytes });
      const graph = await read(spec.graph, told, report);
      const name = spec.graph.slice(folder.length);
      const data = checkGraph(name, graph, beside);
      if (data === undefined) return { name, graph, external: [] };
      const weights = await read(folder + data, told, (bytes) => report(graph.length + bytes));
      return { name, graph, external: [{ path: data, data: weights }] };
    },
  };
}

function checkNames(manifest: Manifest, found: string[]): void {
  const names = new Set(found);
  const missing = Object.keys(manifest.files)
    .sort()
    .find((name) => !names.has(name));
  if (missing !== undefined) throw new FewstepError("bundle", `${missing} is missing`, "", AGAIN);
  const extra = found.sort().find((name) => name !== NAME && !(name in manifest.files));
  if (extra !== undefined)
    throw new FewstepError("bundle", `${quoted(extra)} is not listed in ${NAME}`, "", `delete it, or ${AGAIN}`);
}

/** SHA-256 as 64 lower-case hex digits. Throws FewstepError on a page that is neither https nor localhost. */
export async function sha256(data: Uint8Array, fix = "serve it over https"): Promise<string> {
  // browsers offer it to pages of https and localhost alone
  if (!globalThis.crypto?.subtle)
    throw new FewstepError(
      "files",
      "this page cannot compute SHA-256",
      "a page served over https, or from localhost",
      fix,
    );
  const digest = await crypto.subtle.digest("SHA-256", data as Uint8Array<ArrayBuffer>);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
