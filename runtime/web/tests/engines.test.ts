/** ONNX Runtime behind the interface of engine.ts: what it is told, what its errors become. */

import assert from "node:assert/strict";
import { after, test } from "node:test";
import * as ort from "onnxruntime-node";
import type { Env } from "onnxruntime-common";
import { nodeEngine } from "../src/engines/node.js";
import { type Ort, engineError } from "../src/engines/ort.js";
import { requireWebGpu, webEngine } from "../src/engines/web.js";
import { FewstepError } from "../src/index.js";
import { fromHalf, toFloats, toHalf, toTensor } from "../src/tensors.js";
import { GRAPH, WITH_DATA, part, tensor } from "./fake.js";

const SPEC = part("unet", [tensor("x", "float32", "n", 2)], [tensor("y", "float32", "n", 3)]);
const x = { dtype: "float32", dims: [1, 2], data: new Float32Array([1, 1]) };

test("a graph runs in onnxruntime-node, with its weights inside it or beside it", async () => {
  const inside = await nodeEngine(ort).open({ name: "model.onnx", graph: GRAPH, external: [] }, SPEC);
  // the fixture's graph: y = x [[0, 1, 2], [3, 4, 5]] + [1, 2, 3]
  assert.deepEqual((await inside.run({ x }))["y"], {
    dtype: "float32",
    dims: [1, 3],
    data: new Float32Array([4, 7, 10]),
  });
  await inside.release();
  const data = new Uint8Array(new Float32Array(27).fill(1).buffer, 8); // in the middle of a larger buffer
  const files = { name: "model.onnx", graph: WITH_DATA, external: [{ path: "model.onnx_data", data }] };
  const beside = await nodeEngine(ort, { threads: 1 }).open(files, SPEC);
  assert.deepEqual((await beside.run({ x }, ["y"]))["y"]!.data, new Float32Array([3, 4, 5]));
  await beside.release();
});

test("a graph of other inputs than the manifest says is refused", async () => {
  const other = { ...SPEC, inputs: [tensor("sample", "float32", 1)] };
  const opening = nodeEngine(ort).open({ name: "model.onnx", graph: GRAPH, external: [] }, other);
  await assert.rejects(opening, /model.onnx has the inputs x; expected sample; fix: export the bundle again/);
});

test("what cannot be loaded or run is an error of ours", async () => {
  const files = { name: "model.onnx", graph: GRAPH.slice(0, 50), external: [] };
  const engine = (error: unknown): boolean => error instanceof FewstepError && error.kind === "engine";
  await assert.rejects(nodeEngine(ort).open(files, SPEC), engine);
  const session = await nodeEngine(ort).open({ ...files, graph: GRAPH }, SPEC);
  await assert.rejects(session.run({ x: { ...x, dims: [2, 1] } }), engine);
});

for (const [error, kind, message] of [
  [
    new RangeError("Array buffer allocation failed"),
    "memory",
    /not enough memory: .*fix: close other tabs and apps, load with \{ lowMemory: true \}/,
  ],
  [new Error("std::bad_alloc"), "memory", /not enough memory/],
  [new Error("failed to allocate a buffer of size 900000000"), "memory", /not enough memory/],
  [
    new Error("ERROR_CODE: 9, NOT_IMPLEMENTED: Could not find an implementation for Foo(23)"),
    "engine",
    /Foo.*; fix: export the bundle for web-wasm/,
  ],
  [new Error("something else\nat line 5"), "engine", /^it \(something else\); fix/],
  ["a text", "engine", /a text/],
] as const)
  test(`${String(error).split("\n")[0]} is sorted as ${kind}`, () => {
    const found = engineError(error, "it", "cpu");
    assert.equal(found.kind, kind);
    assert.match(found.message, message);
  });

/** The parts of an ONNX Runtime that are only looked at. */
const fakeOrt = (): Ort & { env: Env } => ({
  ...ort,
  env: { wasm: {}, webgl: {}, webgpu: {}, versions: {} } as unknown as Env,
});

test("a browser uses one thread unless the page is isolated, the app's folder, and no proxy", () => {
  const fake = fakeOrt();
  assert.equal(webEngine(fake, { device: "wasm", threads: 4, wasmPaths: "/ort/" }).device, "cpu");
  assert.deepEqual({ ...fake.env.wasm }, { wasmPaths: "/ort/", numThreads: 1, proxy: false });
  Object.assign(globalThis, { crossOriginIsolated: true });
  assert.equal(webEngine(fake, { device: "webgpu", threads: 4 }).device, "gpu");
  assert.equal(fake.env.wasm.numThreads, 4);
  Object.assign(globalThis, { crossOriginIsolated: undefined });
  assert.throws(() => webEngine(fake, { device: "webgl" as "wasm" }), /device webgl; expected wasm or webgpu/);
});

const navigator = Object.getOwnPropertyDescriptor(globalThis, "navigator");
after(() =>
  navigator
    ? Object.defineProperty(globalThis, "navigator", navigator)
    : Reflect.deleteProperty(globalThis, "navigator"),
);

test("why there is no WebGPU is said", async () => {
  const set = (value: object): unknown => Object.defineProperty(globalThis, "navigator", { value, configurable: true });
  set({});
  await assert.rejects(requireWebGpu("float32"), /this browser has no WebGPU; .*fix: use the bundle for web-wasm/);
  set({ gpu: { requestAdapter: async () => null } });
  await assert.rejects(requireWebGpu("float32"), /WebGPU finds no graphics processor here/);
  set({ gpu: { requestAdapter: async () => ({ features: new Set() }) } });
  await requireWebGpu("float32");
  await assert.rejects(requireWebGpu("float16"), /does not compute in float16/);
});

test("every half survives a round trip, and singles go to the nearest one, ties to even", () => {
  const halves = Uint16Array.from({ length: 65536 }, (_, i) => i);
  const singles = fromHalf(halves);
  const back = toHalf(singles);
  for (let i = 0; i < 65536; i++) if (!Number.isNaN(singles[i]!)) assert.equal(back[i], i);
  assert.ok(Number.isNaN(fromHalf(toHalf(new Float32Array([NaN])))[0]));
  for (let i = 0; i < 0x7bff; i++) {
    const [low, high] = [singles[i]!, singles[i + 1]!];
    const middle = (low + high) / 2;
    const quarter = (low + middle) / 2;
    assert.deepEqual([...toHalf(new Float32Array([middle, quarter, -middle]))], [i + (i & 1), i, 0x8000 + i + (i & 1)]);
  }
  assert.deepEqual(
    [...toHalf(new Float32Array([65519, 65520, 1e9, -Infinity, 2 ** -26]))],
    [0x7bff, 0x7c00, 0x7c00, 0xfc00, 0],
  );
});

test("whole numbers are cut towards zero, as numpy does, and types no network of ours has are refused", () => {
  assert.deepEqual(toTensor("int64", [2], [999.9, -1.5]).data, new BigInt64Array([999n, -1n]));
  assert.deepEqual(toTensor("int32", [2], [999.9, -1.5]).data, new Int32Array([999, -1]));
  assert.throws(
    () => toTensor("bfloat16", [1], [1]),
    /a graph that takes bfloat16; expected float32, float16, int32 or int64/,
  );
  assert.throws(() => toFloats({ dtype: "int64", dims: [1], data: new BigInt64Array(1) }), /a graph that gives int64/);
});
