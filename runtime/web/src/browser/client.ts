/** Draw from a page: everything heavy happens in a worker (worker.ts), and this talks to it. */

import { FewstepError, type Kind } from "../errors.js";
import type { Image, Timings } from "../pipeline.js";

/** One bundle in the form that one kind of device runs, and where it lies. */
export interface Variant {
  /** The folder's address, ending in a slash. */
  url: string;
  /** gpu: made for WebGPU; cpu: for WebAssembly. */
  device: "cpu" | "gpu";
}

export interface OpenOptions {
  /** auto: WebGPU where there is a variant for it and the browser has it, else WebAssembly. */
  device?: "auto" | "wasm" | "webgpu";
  /** The folder of this site with onnxruntime-web's files, ending in a slash. */
  ort: string;
  /** Cores to use on a page isolated by COOP and COEP; elsewhere it is always one. */
  threads?: number;
  /** Free each network before the next is opened: the largest bounds memory, not their sum; slower. */
  lowMemory?: boolean;
  onProgress?: (progress: Loading) => void;
  /** Told once where the browser gives no room to keep files: they are fetched again on the next visit. */
  onNotKept?: (why: string) => void;
  signal?: AbortSignal;
}

export interface Loading {
  part: string;
  loadedBytes: number;
  totalBytes: number;
  /** How much of loadedBytes was kept from an earlier visit. */
  keptBytes: number;
  /** What is done now: fetching bytes, or making a network of them. */
  stage: "fetch" | "prepare";
}

/** What was opened, and on what it runs. */
export interface Opened {
  url: string;
  name: string;
  task: string;
  device: "wasm" | "webgpu";
  threads: number;
  /** Why it is not WebGPU, in one sentence; empty where it is. */
  why: string;
  /** Name of a plan -> its steps; "default" is the bundle's own. */
  plans: Record<string, { steps: number; calls: number }>;
  guidance: { kind: string; scale: number };
  size: { height: number; width: number; multiple: number; fixed: boolean };
  classes: number | null;
  license: string;
  versions: Record<string, string>;
  bytes: number;
  precision: string;
  quantized: boolean;
  /** SHA-256 of its manifest.json. */
  sha256: string;
  /** From the call of open to the model being ready. */
  openMs: number;
}

export interface Ask {
  prompt?: string;
  negativePrompt?: string;
  classLabel?: number;
  seed?: number | bigint;
  plan?: string;
  guidanceScale?: number;
  height?: number;
  width?: number;
  /** Decode a preview after each step. */
  preview?: boolean;
}

export interface Drawn {
  index: number;
  count: number;
  ms: number;
  image?: Image;
}

export interface Picture {
  image: Image;
  timings: Timings;
  latents: Float32Array;
}

export interface Model extends Opened {
  /** Draw step by step; returns the picture. Aborting `signal` ends it with a FewstepError of kind "cancelled". */
  draw(ask: Ask, signal?: AbortSignal): AsyncGenerator<Drawn, Picture>;
}

export interface Client {
  /** Load a bundle in place of the one before. Throws FewstepError. */
  open(variants: Variant[], options: OpenOptions): Promise<Model>;
  /** Forget what the browser keeps of a bundle. */
  forget(url: string): Promise<void>;
  /** End the worker and whatever it does. */
  close(): void;
}

export type ToWorker =
  | {
      type: "open";
      id: number;
      variants: Variant[];
      device: "auto" | "wasm" | "webgpu";
      ort: string;
      threads?: number;
      lowMemory: boolean;
    }
  | { type: "draw"; id: number; ask: Ask }
  | { type: "forget"; id: number; url: string }
  | { type: "cancel"; id: number };

export type FromWorker =
  | { type: "progress"; id: number; progress: Loading }
  | { type: "notKept"; id: number; why: string }
  | { type: "opened"; id: number; opened: Opened }
  | { type: "step"; id: number; step: Drawn }
  | { type: "picture"; id: number; picture: Picture }
  | { type: "done"; id: number }
  | { type: "failed"; id: number; kind: Kind; found: string; expected: string; fix: string };

/** `start` makes the worker: `() => new Worker("worker.js", { type: "module" })`. It is made anew after a crash. */
export function connect(start: () => Worker): Client {
  let worker: Worker | undefined;
  let last = 0;
  const waiting = new Map<number, (message: FromWorker) => void>();

  const crashed = (message: string): void => {
    worker?.terminate();
    worker = undefined;
    const full = /memory|allocat/i.test(message);
    const found = full ? `not enough memory: the worker ended (${message})` : `the worker ended (${message})`;
    const fix = full ? "close other tabs and apps, or choose a smaller bundle" : "reload the page";
    const kind = full ? "memory" : "engine";
    for (const [id, tell] of [...waiting]) tell({ type: "failed", id, kind, found, expected: "", fix });
  };
  const running = (): Worker => {
    if (worker) return worker;
    const made = start();
    made.onmessage = ({ data }: MessageEvent<FromWorker>) => waiting.get(data.id)?.(data);
    made.onerror = (event) => {
      event.preventDefault();
      crashed(event.message || "it could not be loaded");
    };
    made.onmessageerror = () => crashed("a message could not be read");
    return (worker = made);
  };

  /** Send a request and yield what comes back, until "opened", "picture" or "done". */
  async function* ask(send: (id: number) => ToWorker, signal?: AbortSignal): AsyncGenerator<FromWorker, void> {
    if (signal?.aborted) throw new FewstepError("cancelled", "cancelled before it began");
    const id = ++last;
    const queue: FromWorker[] = [];
    let wake: () => void = () => undefined;
    waiting.set(id, (message) => {
      queue.push(message);
      wake();
    });
    const cancel = (): void => worker?.postMessage({ type: "cancel", id } satisfies ToWorker);
    signal?.addEventListener("abort", cancel);
    let ended = false;
    try {
      running().postMessage(send(id));
      for (;;) {
        const message = queue.shift();
        if (!message) {
          await new Promise<void>((resolve) => (wake = resolve));
          continue;
        }
        if (message.type === "failed") {
          ended = true;
          throw new FewstepError(message.kind, message.found, message.expected, message.fix);
        }
        ended = ["opened", "picture", "done"].includes(message.type);
        yield message;
        if (ended) return;
      }
    } finally {
      if (!ended) cancel(); // the loop was left
      signal?.removeEventListener("abort", cancel);
      waiting.delete(id);
    }
  }

  async function* draw(request: Ask, signal?: AbortSignal): AsyncGenerator<Drawn, Picture> {
    for await (const message of ask((id) => ({ type: "draw", id, ask: request }), signal)) {
      if (message.type === "step") yield message.step;
      if (message.type === "picture") return message.picture;
    }
    throw new FewstepError("engine", "the worker answered without a picture", "", "reload the page");
  }

  return {
    open: async (variants, { device = "auto", ort, threads, lowMemory = false, onProgress, onNotKept, signal }) => {
      const request = (id: number): ToWorker => ({
        ...{ type: "open", id, variants, device, ort, lowMemory },
        ...(threads !== undefined && { threads }),
      });
      for await (const message of ask(request, signal)) {
        if (message.type === "progress") onProgress?.(message.progress);
        if (message.type === "notKept") onNotKept?.(message.why);
        if (message.type === "opened") return { ...message.opened, draw };
      }
      throw new FewstepError("engine", "the worker answered without a model", "", "reload the page");
    },
    forget: async (url) => {
      for await (const message of ask((id) => ({ type: "forget", id, url }))) void message;
    },
    close: () => {
      worker?.terminate();
      worker = undefined;
      for (const [id, tell] of [...waiting])
        tell({ type: "failed", id, kind: "cancelled", found: "the worker was closed", expected: "", fix: "" });
    },
  };
}
