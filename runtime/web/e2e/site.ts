/** The site under test: the built app and some bundles on a port of its own, with faults on demand. */

import { readFileSync, statSync } from "node:fs";
import { type IncomingMessage, type ServerResponse, createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join } from "node:path";

export const BUNDLES = "dist/e2e/bundles";
const PLACES: [string, string][] = [
  ["/bundles/", `${BUNDLES}/`],
  ["/a/b/c/", "dist/e2e/page/"], // three folders deep, as the golden tests expect to lie from spec/
  ["/spec/", "../spec/"],
  ["/", "dist/site/"],
];
const TYPES: Record<string, string> = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".svg": "image/svg+xml",
  ".json": "application/json",
  ".wasm": "application/wasm",
};

/** What is answered in the place of a file: the bytes, with another status or type, or in pieces. */
export interface Answer {
  body: Uint8Array;
  status?: number;
  type?: string;
  /** Send this share of the body, then nothing more until the other side leaves. */
  stopAfter?: number;
}

export interface Site {
  origin: string;
  /** Path of every request so far. */
  asked: string[];
  /** Path -> what to do with its file. */
  faults: Map<string, (body: Uint8Array) => Answer>;
  close(): Promise<void>;
}

/** bundles: names below BUNDLES. isolated: with COOP and COEP. */
export async function openSite(bundles: string[], isolated = false): Promise<Site> {
  const asked: string[] = [];
  const faults: Site["faults"] = new Map();
  const catalog = JSON.stringify({ fewstep_site: 1, bundles: bundles.map(entry) });
  const answer = (request: IncomingMessage, response: ServerResponse): void => {
    const path = new URL(request.url!, "http://localhost").pathname;
    asked.push(path);
    const found =
      path === "/bundles.json" ? Buffer.from(catalog) : path === "/blank" ? Buffer.from("<!doctype html>") : file(path);
    const fault = found && faults.get(path);
    const { body, status, type, stopAfter } = fault
      ? fault(found)
      : { body: found ?? new Uint8Array(), status: found ? 200 : 404 };
    response.writeHead(status ?? 200, {
      "content-type":
        type ??
        (path === "/blank"
          ? "text/html"
          : (TYPES[extname(path)] ?? (path.endsWith("/") ? "text/html" : "application/octet-stream"))),
      "cache-control": "no-cache",
      "content-length": body.length,
      ...(isolated && { "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp" }),
    });
    if (stopAfter === undefined) response.end(body);
    else response.write(body.subarray(0, Math.floor(stopAfter * body.length)));
  };
  const server = createServer(answer);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const close = (): Promise<void> => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(() => resolve()));
  };
  return { origin: `http://127.0.0.1:${port}`, asked, faults, close };
}

function file(path: string): Uint8Array | undefined {
  const [prefix, folder] = PLACES.find(([start]) => path.startsWith(start))!;
  const name = join(folder, path.slice(prefix.length) || "index.html");
  try {
    return statSync(name).isFile() ? readFileSync(name) : undefined;
  } catch {
    return undefined;
  }
}

interface Manifest {
  name: string;
  parts: Record<string, { device: string; precision: string }>;
  denoiser: string;
  files: Record<string, { bytes: number }>;
}

function entry(name: string): object {
  const manifest = JSON.parse(readFileSync(`${BUNDLES}/${name}/manifest.json`, "utf8")) as Manifest;
  const { device, precision } = manifest.parts[manifest.denoiser]!;
  const bytes = Object.values(manifest.files).reduce((sum, one) => sum + one.bytes, 0);
  return { path: `bundles/${name}/`, name: manifest.name, target: "", device, precision, quantized: false, bytes };
}
