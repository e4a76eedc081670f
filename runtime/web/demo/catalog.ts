/** bundles.json: what this site offers. `fewstep serve` and `fewstep export --target web` write it. */

import type { Variant } from "../src/browser/client.js";
import { FewstepError } from "../src/errors.js";

export const CATALOG = "bundles.json";
const VERSION = 1;

interface Entry {
  path: string;
  name: string;
  target: string;
  device: "cpu" | "gpu" | "npu";
  precision: string;
  quantized: boolean;
  bytes: number;
}

/** A model to choose: one bundle, or two that are the same model for two kinds of device. */
export interface Choice {
  label: string;
  name: string;
  variants: Variant[];
  bytes: number;
}

/** Read the catalog beside the page. Throws FewstepError where there is none, or none this app knows. */
export async function readCatalog(base: string): Promise<Choice[]> {
  const upload = "upload the whole site again (fewstep export --target web), or run fewstep serve";
  let data: unknown;
  try {
    const response = await fetch(base + CATALOG, { cache: "no-cache" });
    if (!response.ok) throw new Error(`it answers ${response.status}`);
    data = await response.json();
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new FewstepError("files", `${CATALOG} cannot be read (${why})`, "the list of this site's bundles", upload);
  }
  const found = data as { fewstep_site?: number; bundles?: Entry[] };
  if (found.fewstep_site !== VERSION || !Array.isArray(found.bundles))
    throw new FewstepError(
      "files",
      `${CATALOG} of version ${String(found.fewstep_site).slice(0, 20)}`,
      `${VERSION}`,
      upload,
    );
  return choices(base, found.bundles);
}

/** Pair each bundle for WebGPU with one of the same name for WebAssembly. */
export function choices(base: string, entries: Entry[]): Choice[] {
  const pages = location.href;
  const url = ({ path }: Entry): string => new URL(path, new URL(base, pages)).href;
  const forGpu = entries.filter(({ device }) => device === "gpu");
  const found: Choice[] = [];
  for (const entry of entries.filter(({ device }) => device !== "gpu")) {
    const at = forGpu.findIndex(({ name }) => name === entry.name);
    const other = at < 0 ? [] : forGpu.splice(at, 1);
    const variants = [
      ...other.map((one): Variant => ({ url: url(one), device: "gpu" })),
      { url: url(entry), device: "cpu" } as const,
    ];
    found.push({ label: "", name: entry.name, variants, bytes: entry.bytes });
  }
  for (const entry of forGpu)
    found.push({ label: "", name: entry.name, variants: [{ url: url(entry), device: "gpu" }], bytes: entry.bytes });
  const twins = (name: string): boolean => found.filter((one) => one.name === name).length > 1;
  for (const choice of found) {
    const own = entries.find((entry) => url(entry) === choice.variants.at(-1)!.url)!;
    const kind = twins(choice.name) ? ` (${own.path.split("/").at(-2)})` : "";
    choice.label = `${choice.name}${kind}, ${megabytes(choice.bytes)}`;
  }
  return found;
}

/** 12812345 as "13 MB". */
export function megabytes(bytes: number): string {
  const mega = bytes / 1e6;
  return mega >= 1000
    ? `${(mega / 1000).toFixed(1)} GB`
    : mega >= 10
      ? `${Math.round(mega)} MB`
      : `${mega.toFixed(1)} MB`;
}
