/** Bundles in memory, and an engine that computes what a test says. */

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import type { Engine, Files, GraphFiles, NamedTensor, PartSpec, TensorSpec } from "../src/index.js";

const ROOT = new URL("../../../../", import.meta.url);
const read = (path: string): Uint8Array => new Uint8Array(readFileSync(new URL(path, ROOT)));
const refused = JSON.parse(new TextDecoder().decode(read("runtime/web/tests/fixtures/refused.json"))) as {
  manifest: { grid: object };
  graphs: [string, object, string | null][];
};
/** Small graphs that pass the gate: without a data file, and with one of 100 bytes. */
export const [GRAPH, WITH_DATA] = refused.graphs.map(([data]) => new Uint8Array(Buffer.from(data, "base64"))) as [
  Uint8Array,
  Uint8Array,
];

export const tensor = (name: string, dtype: string, ...shape: (number | string)[]): TensorSpec => ({
  name,
  dtype,
  shape,
});

export function part(name: string, inputs: TensorSpec[], outputs: TensorSpec[]): PartSpec {
  const rest = { precision: "float32", device: "cpu", executed: "device", quantization: {}, margin: null };
  return { engine: "onnxruntime", graph: `${name}/model.onnx`, inputs, outputs, ...rest };
}

const call = (timestep: number, next: unknown, more: object = {}): object => ({
  t: timestep,
  timestep,
  input: [["x", 0, 1]],
  scale: 1,
  x0: [0, 1, 0],
  next,
  graph: "denoiser",
  guided: true,
  policies: [],
  ...more,
});
/** Two steps whose states are the network's own outputs, unless `more` says otherwise of its calls. */
export const plan = (more: object = {}): object => ({
  sampler: "ddim",
  steps: 2,
  prediction: "sample",
  init: [["z", 0, 1]],
  calls: [call(900, [["d", 0, 1]], more), call(500, [["d", 1, 1]], { input: [["x", 1, 1]], ...more })],
});

export const SAMPLE = tensor("sample", "float32", "batch", 4, "height", "width");
export const TIMESTEP = tensor("timestep", "float32", "batch");
export const STATES = tensor("encoder_hidden_states", "float32", "batch", 32, 8);
const LABELS = tensor("class_labels", "int64", "batch");

/** Text to image: 32x32 pixels from latents of 4x4x4. */
export const PARTS: Record<string, PartSpec> = {
  unet: part("unet", [SAMPLE, TIMESTEP, STATES], [{ ...SAMPLE, name: "out" }]),
  vae_decoder: part("vae_decoder", [{ ...SAMPLE, name: "latent" }], [tensor("image", "float32", "batch", 3, "h", "w")]),
  text_encoder: part("text_encoder", [tensor("input_ids", "int64", "batch", 32)], [{ ...STATES, name: "states" }]),
};

/** The files of a bundle; `changes` go into its manifest, `files` replace or (undefined) remove listed ones. */
export function bundleFiles(changes: object = {}, files: Record<string, Uint8Array | undefined> = {}): Files {
  const tokenizer = read("models/emoji-64/tokenizer/tokenizer.json");
  const manifest = {
    ...refused.manifest,
    parts: PARTS,
    classes: null,
    plans: { default: plan() },
    sample: {
      height: 32,
      width: 32,
      channels: 4,
      factor: 8,
      multiple: 8,
      fixed: false,
      scaling_factor: 1,
      shift_factor: 0,
    },
    guidance: { kind: "cfg", scale: 3 },
    tokenizer: { file: "tokenizer/tokenizer.json", max_length: 32, pad_id: 2971 },
    ...changes,
  } as unknown as { parts: Record<string, PartSpec>; files: object; grid: object; tokenizer: object | null };
  manifest.grid = { ...refused.manifest.grid, dynamic: null, ...("grid" in changes ? (changes.grid as object) : {}) };
  const content = new Map<string, Uint8Array>(Object.values(manifest.parts).map(({ graph }) => [graph, GRAPH]));
  if (manifest.tokenizer) content.set("tokenizer/tokenizer.json", tokenizer);
  for (const [path, data] of Object.entries(files)) if (data && path !== "manifest.json") content.set(path, data);
  const hash = (data: Uint8Array): string => createHash("sha256").update(data).digest("hex");
  manifest.files = Object.fromEntries(
    [...content].map(([path, data]) => [path, { sha256: hash(data), bytes: data.length }]),
  );
  const text = files["manifest.json"] ?? new TextEncoder().encode(JSON.stringify(manifest));
  content.set("manifest.json", text);
  for (const [path, data] of Object.entries(files)) if (!data) content.delete(path);
  return {
    list: async () => [...content.keys()],
    read: async (path, progress) => {
      const data = content.get(path);
      if (!data) throw new Error(`${path} is not there`);
      progress?.(data.length);
      return data;
    },
  };
}

/** Class-conditional, in pixels: 8x8 of 3 channels. */
export const CLASSES = {
  task: "class-conditional",
  parts: {
    unet: part(
      "unet",
      [tensor("sample", "float32", "batch", 3, 8, 8), tensor("timestep", "int32", "batch"), LABELS],
      [tensor("out", "float32", "batch", 3, 8, 8)],
    ),
  },
  classes: 10,
  tokenizer: null,
  sample: { height: 8, width: 8, channels: 3, factor: 1, multiple: 1, fixed: true, scaling_factor: 1, shift_factor: 0 },
};

type Run = (feeds: Record<string, NamedTensor>) => number[] | Float32Array | NamedTensor;
export interface FakeEngine extends Engine {
  /** What was asked of it: "open unet", "run unet", "release unet". */
  log: string[];
  feeds: Record<string, NamedTensor>[];
  opened: GraphFiles[];
}

/** An engine whose networks are functions; the ones below unless a test brings its own. */
export function fakeEngine(networks: Record<string, Run> = {}): FakeEngine {
  const all: Record<string, Run> = {
    unet: ({ sample }) => (sample!.data as Float32Array).map((v) => v / 2),
    text_encoder: ({ input_ids }) => new Float32Array(32 * 8).fill(Number((input_ids!.data as BigInt64Array)[1])),
    vae_decoder: ({ latent }) => {
      const [, , height, width] = latent!.dims as [number, number, number, number];
      return new Float32Array(3 * 64 * height * width).fill((latent!.data as Float32Array)[0]!);
    },
    ...networks,
  };
  const engine: FakeEngine = {
    name: "fake",
    device: "cpu",
    log: [],
    feeds: [],
    opened: [],
    open: async (files, spec) => {
      const name = spec.graph.split("/")[0]!;
      engine.log.push(`open ${name}`);
      engine.opened.push(files);
      return {
        run: async (feeds) => {
          engine.log.push(`run ${name}`);
          engine.feeds.push(feeds);
          await new Promise((done) => setTimeout(done, 0));
          const out = all[name]!(feeds);
          const { name: key, shape } = spec.outputs[0]!;
          if ("dims" in out) return { [key]: out };
          const rest = shape.length === 3 ? [32, 8] : [];
          const data = Float32Array.from(out);
          return { [key]: { dtype: "float32", dims: [1, ...rest], data } };
        },
        release: async () => void engine.log.push(`release ${name}`),
      };
    },
  };
  return engine;
}
