/** The engine is injected: this package runs wherever some ONNX Runtime does. */

import type { PartSpec } from "./manifest.js";

/** Uint16Array holds the bits of float16. */
export type TypedData = Float32Array | Uint16Array | BigInt64Array | Int32Array | Uint8Array | Int8Array;

export interface NamedTensor {
  /** numpy's name: float32, float16, int64, ... */
  dtype: string;
  dims: number[];
  data: TypedData;
}

/** One loaded graph: named tensors in, named tensors out. */
export interface Session {
  /** Run the graph once. `outputs` picks some of the outputs; all without it. */
  run(feeds: Record<string, NamedTensor>, outputs?: string[]): Promise<Record<string, NamedTensor>>;
  /** Free the weights. The session cannot run afterwards. */
  release(): Promise<void>;
}

/** A graph and the data files beside it, all hashed and checked. */
export interface GraphFiles {
  name: string;
  graph: Uint8Array;
  external: { path: string; data: Uint8Array }[];
}

export interface Engine {
  readonly name: string;
  readonly device: "cpu" | "gpu";
  /** Throws FewstepError of kind "engine" or "memory" where the graph cannot be loaded. */
  open(files: GraphFiles, spec: PartSpec): Promise<Session>;
}
