/** A bundle: manifest.json and the files it lists, wherever the bytes come from. runtime/spec/bundle.md is the format. */

import type { GraphFiles } from "./engine.js";
import { FewstepError } from "./errors.js";
import type { Manifest } from "./manifest.js";

/** Where the bytes come from: a folder, HTTP, a cache, a file picker. */
export interface Files {
  /** Names of all files; where it is there, one that is missing or not listed is refused at once. */
  list?(): Promise<string[]>;
  /** The whole file. `progress` is told the bytes read so far. Throws FewstepError of kind "files". */
  read(path: string, progress?: (bytes: number) => void, signal?: AbortSignal): Promise<Uint8Array>;
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
  file(path: string, options?: BundleOptions): Promise<Uint8Array>;
  /** The graph of one part and the data file it uses, read, compared and passed through the gate of graphfile.ts. */
  graph(part: string, options?: BundleOptions): Promise<GraphFiles>;
}

/** Read and check the manifest; files are read when a part is opened. Throws FewstepError naming the file at fault. */
export async function openBundle(files: Files, options: BundleOptions = {}): Promise<Bundle> {
  void files, options;
  throw new FewstepError("bundle", "reading bundles is not there yet");
}
