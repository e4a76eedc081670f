/** ONNX Runtime's native library in Node and Electron, and bundles in folders. */

import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { lstat, open, readdir } from "node:fs/promises";
import { join } from "node:path";
import type { Files } from "../bundle.js";
import type { Engine } from "../engine.js";
import { FewstepError, checkSignal } from "../errors.js";
import { type Ort, ortEngine } from "./ort.js";

export interface NodeOptions {
  /** Cores for one network call; all without it. */
  threads?: number;
}

/** ort: `import * as ort from "onnxruntime-node"`. */
export function nodeEngine(ort: Ort, { threads }: NodeOptions = {}): Engine {
  const options = { executionProviders: ["cpu"], ...(threads !== undefined && { intraOpNumThreads: threads }) };
  return ortEngine(ort, "onnxruntime-node", "cpu", options);
}

/** A bundle has tens of files; beyond this a folder is not walked further. */
const MAX_FILES = 10_000;
const BLOCK = 1 << 24;
const AGAIN = "download or export the bundle again";

/** The files of a bundle's folder: plain files of their own, and nothing that leads elsewhere. */
export function folderFiles(folder: string): Files {
  const bad = (found: string, expected = "", fix = AGAIN): never => {
    throw new FewstepError("bundle", found, expected, fix);
  };
  const walk = async (prefix: string, depth: number): Promise<string[]> => {
    const entries = await readdir(join(folder, prefix), { withFileTypes: true });
    if (entries.length > MAX_FILES || depth > 16) bad(`${folder} holds too many files or folders`, "a bundle");
    if (prefix && entries.length === 0) bad(`${prefix} is an empty folder`, "", "delete it");
    const names: string[] = [];
    for (const entry of entries) {
      const name = prefix + entry.name;
      if (entry.isSymbolicLink()) bad(`${name} is a symbolic link`, "a plain file", "put the file itself there");
      if (entry.isDirectory()) names.push(...(await walk(`${name}/`, depth + 1)));
      else names.push(name);
    }
    return names;
  };
  return {
    list: () => walk("", 0),
    sha256: async (data) => {
      const hash = createHash("sha256");
      for (let at = 0; at < data.length; at += BLOCK) hash.update(data.subarray(at, at + BLOCK));
      return hash.digest("hex");
    },
    read: async (path, progress, signal) => {
      const full = join(folder, path);
      const flags = constants.O_RDONLY | (constants.O_NOFOLLOW ?? 0) | (constants.O_NONBLOCK ?? 0);
      let file;
      try {
        if ((await lstat(full)).isSymbolicLink())
          bad(`${path} is a symbolic link`, "a plain file", "put the file itself there");
        file = await open(full, flags);
      } catch (error) {
        if (error instanceof FewstepError) throw error;
        const { code } = error as { code?: string };
        if (code === "ENOENT" && path === "manifest.json")
          throw new FewstepError("files", `${folder} has no manifest.json`, "the folder of a bundle", "check the path");
        const reason = code === "ENOENT" ? "is missing" : `cannot be opened (${code})`;
        throw new FewstepError("files", `${full} ${reason}`, "", code === "ENOENT" ? AGAIN : "check its permissions");
      }
      try {
        const info = await file.stat();
        if (!info.isFile()) bad(`${path} is a folder or a device`, "a plain file");
        if (info.nlink > 1)
          bad(
            `${path} is a hard link: ${info.nlink} names lead to this file`,
            "a file of its own",
            "copy the bundle (cp -r) and open the copy",
          );
        const data = new Uint8Array(info.size);
        for (let at = 0; at < data.length; progress?.(at)) {
          const { bytesRead } = await file.read(data, at, Math.min(data.length - at, BLOCK));
          if (bytesRead === 0) bad(`${path} ends early: something changes it`, "a bundle nobody writes to");
          at += bytesRead;
          checkSignal(signal, `while loading ${path}`);
        }
        return data;
      } finally {
        await file.close();
      }
    },
  };
}
