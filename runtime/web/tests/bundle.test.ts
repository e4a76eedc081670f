/** Bundles: read part by part, every byte compared; folders: plain files alone. */

import assert from "node:assert/strict";
import { cpSync, linkSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { folderFiles } from "../src/engines/node.js";
import { nativeFiles } from "../src/engines/reactnative.js";
import { type Files, FewstepError, type Kind, type LoadProgress, openBundle } from "../src/index.js";
import { GRAPH, PARTS, WITH_DATA, bundleFiles } from "./fake.js";

const fails = (kind: Kind, message: RegExp) => (error: unknown) => {
  assert.ok(error instanceof FewstepError, String(error));
  assert.match(error.message, message);
  assert.equal(error.kind, kind);
  return true;
};
/** The files with one replaced behind the manifest's back. */
const tampered = (files: Files, path: string, edit: (data: Uint8Array) => Uint8Array): Files => ({
  ...files,
  read: async (name, progress) => (name === path ? edit(await files.read(name)) : files.read(name, progress)),
});
const flipped = (data: Uint8Array): Uint8Array => data.map((byte, i) => (i === 9 ? byte ^ 1 : byte));

test("a part is read with the data file it uses, and reports how far it is", async () => {
  const data = new Uint8Array(100).fill(7);
  const told: LoadProgress[] = [];
  const files = bundleFiles(
    {},
    { "unet/model.onnx": WITH_DATA, "unet/model.onnx_data": data, "unet/config.json": GRAPH },
  );
  const bundle = await openBundle(files, { onProgress: (progress) => told.push(progress) });
  const { name, graph, external } = await bundle.graph("unet");
  assert.deepEqual([name, graph, external], ["model.onnx", WITH_DATA, [{ path: "model.onnx_data", data }]]);
  const totalBytes = WITH_DATA.length + 100 + GRAPH.length;
  assert.deepEqual(told.at(-1), { part: "unet", loadedBytes: WITH_DATA.length + 100, totalBytes });
  assert.ok(told.every(({ loadedBytes }, i) => i === 0 || loadedBytes >= told[i - 1]!.loadedBytes));
});

for (const [what, path, edit, message] of [
  [
    "changed",
    "unet/model.onnx",
    flipped,
    /unet\/model.onnx has been changed or damaged: its sha256 is [0-9a-f]{64}; expected [0-9a-f]{64}; fix: download/,
  ],
  [
    "cut short",
    "unet/model.onnx",
    (data: Uint8Array) => data.subarray(1),
    /unet\/model.onnx has \d+ bytes; expected \d+; fix: download/,
  ],
] as const)
  test(`a file that is ${what} is refused when its part is opened`, async () => {
    const bundle = await openBundle(tampered(bundleFiles(), path, edit));
    await assert.rejects(bundle.graph("unet"), fails("bundle", message));
    await bundle.graph("vae_decoder");
  });

test("size alone does not notice a changed byte, the gate of the graph still does its work", async () => {
  const bundle = await openBundle(
    tampered(bundleFiles(), "unet/model.onnx", () => GRAPH.map(() => 255)),
    { check: "size" },
  );
  await assert.rejects(bundle.graph("unet"), fails("bundle", /model.onnx: a number at byte 10 is longer/));
});

test("a missing and an extra file are refused at once where the files can be listed", async () => {
  await assert.rejects(
    openBundle(bundleFiles({}, { "unet/model.onnx": undefined })),
    fails("bundle", /unet\/model.onnx is missing; fix/),
  );
  const files = bundleFiles();
  const list = async (): Promise<string[]> => [...(await files.list!()), "unet/run.js"];
  await assert.rejects(
    openBundle({ ...files, list }),
    fails("bundle", /'unet\/run.js' is not listed in manifest.json; fix: delete it/),
  );
});

test("a file that is not listed, and a part that is not there, are refused", async () => {
  const bundle = await openBundle(bundleFiles());
  await assert.rejects(bundle.file("../secret"), fails("bundle", /'..\/secret' is not listed/));
  await assert.rejects(bundle.file("__proto__"), fails("bundle", /is not listed/));
  await assert.rejects(
    bundle.graph("vae_encoder"),
    fails("bundle", /this bundle has no vae_encoder; expected unet, vae_decoder/),
  );
});

test("another version and another engine are named", async () => {
  await assert.rejects(
    openBundle(bundleFiles({ fewstep_bundle: 2 })),
    fails("bundle", /schema version 2; expected 1; fix: update fewstep/),
  );
  const bundle = await openBundle(bundleFiles({ parts: { ...PARTS, unet: { ...PARTS["unet"], engine: "openvino" } } }));
  await assert.rejects(
    bundle.graph("unet"),
    fails("bundle", /for the engine openvino .*; fix: export the model for web-wasm/),
  );
});

test("a file too large for a browser is refused before it is read, and hashed where the platform can", async () => {
  const manifest = JSON.parse(new TextDecoder().decode(await bundleFiles().read("manifest.json"))) as {
    files: Record<string, { bytes: number }>;
  };
  manifest.files["unet/model.onnx"]!.bytes = 2 ** 31;
  const files = bundleFiles({}, { "manifest.json": new TextEncoder().encode(JSON.stringify(manifest)) });
  await assert.rejects(
    openBundle(files).then((bundle) => bundle.graph("unet")),
    fails("memory", /unet\/model.onnx has 2,147,483,648 bytes; expected less than 2,147,483,648, .*; fix: export/),
  );
  const sha256 = folderFiles("").sha256!;
  assert.equal(await sha256(new Uint8Array(0)), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  const bundle = await openBundle({ ...bundleFiles(), sha256 });
  await bundle.graph("unet");
});

test("an aborted signal ends the loading", async () => {
  const signal = AbortSignal.abort();
  await assert.rejects(openBundle(bundleFiles(), { signal }), fails("cancelled", /cancelled while opening the bundle/));
  const bundle = await openBundle(bundleFiles());
  await assert.rejects(
    bundle.graph("unet", { signal }),
    fails("cancelled", /cancelled while loading unet\/model.onnx/),
  );
});

const scratch = mkdtempSync(join(tmpdir(), "fewstep-"));
after(() => rmSync(scratch, { recursive: true }));

async function written(name: string): Promise<string> {
  const files = bundleFiles();
  const folder = join(scratch, name);
  for (const path of await files.list!()) {
    mkdirSync(join(folder, path, ".."), { recursive: true });
    writeFileSync(join(folder, path), await files.read(path));
  }
  return folder;
}

test("a folder is a bundle's files", async () => {
  const folder = await written("plain");
  const bundle = await openBundle(folderFiles(folder));
  assert.deepEqual((await bundle.graph("unet")).graph, GRAPH);
  const signal = AbortSignal.abort();
  await assert.rejects(
    folderFiles(folder).read("unet/model.onnx", undefined, signal),
    fails("cancelled", /cancelled while loading/),
  );
});

test("links in a folder are refused", async () => {
  const folder = await written("links");
  cpSync(join(folder, "unet/model.onnx"), join(scratch, "outside"));
  rmSync(join(folder, "unet/model.onnx"));
  symlinkSync(join(scratch, "outside"), join(folder, "unet/model.onnx"));
  await assert.rejects(
    openBundle(folderFiles(folder)),
    fails("bundle", /unet\/model.onnx is a symbolic link; expected a plain file/),
  );
  await assert.rejects(folderFiles(folder).read("unet/model.onnx"), fails("bundle", /is a symbolic link/));
  rmSync(join(folder, "unet/model.onnx"));
  linkSync(join(scratch, "outside"), join(folder, "unet/model.onnx"));
  const bundle = await openBundle(folderFiles(folder));
  await assert.rejects(bundle.graph("unet"), fails("bundle", /is a hard link: 2 names lead to this file/));
});

test("a folder that is none, or holds an empty one, is named", async () => {
  await assert.rejects(
    openBundle(folderFiles(join(scratch, "none"))),
    fails("files", /none has no manifest.json; expected the folder of a bundle/),
  );
  const folder = await written("empty");
  mkdirSync(join(folder, "cache"));
  await assert.rejects(openBundle(folderFiles(folder)), fails("bundle", /cache\/ is an empty folder; fix: delete it/));
});

test("React Native's base64 becomes bytes, its errors ours", async () => {
  const files = nativeFiles("/app", async (path) =>
    path === "/app/a/b" ? btoa("xyz\u00ff") : Promise.reject(new Error("ENOENT")),
  );
  assert.deepEqual(await files.read("a/b"), new Uint8Array([120, 121, 122, 255]));
  await assert.rejects(files.read("c"), fails("files", /c cannot be read .*ENOENT/));
});
