/** What the tests call in a page without the app: the client as an app would use it, and the pipeline itself. */

import {
  type Ask,
  type Drawn,
  type OpenOptions,
  type Opened,
  type Picture,
  type Variant,
  connect,
} from "../src/browser/client.js";
import { webFiles } from "../src/browser/files.js";
import { type Verification, loadPipeline, openBundle, verify } from "../src/index.js";
import { webEngine } from "../src/engines/web.js";
import { FewstepError } from "../src/errors.js";
import type { Timings } from "../src/pipeline.js";

const ort = new URL("/ort/", location.href).href;
const client = connect(() => new Worker("/worker.js", { type: "module" }));

const harness = {
  /** Open a bundle and draw; `leaveAfter` steps, where it is given, it is aborted. */
  async draw(
    variants: Variant[],
    asks: (Ask & { leaveAfter?: number })[],
    options: Partial<OpenOptions> = {},
  ): Promise<{
    opened: Opened;
    pictures: ({ pixels: number[]; steps: number; timings: Timings } | { kind: string; steps: number })[];
  }> {
    const absolute = variants.map(({ url, device }) => ({ url: new URL(url, location.href).href, device }));
    const model = await client.open(absolute, { ort, ...options });
    const pictures = [];
    for (const { leaveAfter, ...ask } of asks) {
      const controller = new AbortController();
      let steps = 0;
      try {
        const going = model.draw(ask, controller.signal);
        let next: IteratorResult<Drawn, Picture>;
        while (!(next = await going.next()).done) if (++steps === leaveAfter) controller.abort();
        pictures.push({ pixels: [...next.value.image.data], steps, timings: next.value.timings });
      } catch (error) {
        if (!(error instanceof FewstepError)) throw error;
        pictures.push({ kind: error.kind, steps });
      }
    }
    const { draw: _, ...opened } = model;
    return { opened, pictures };
  },

  /** Replay the golden latent of a bundle. */
  async golden(url: string): Promise<Verification> {
    const engine = webEngine(await import(`${ort}ort.wasm.min.mjs`), { device: "wasm", wasmPaths: ort });
    const bundle = await openBundle(webFiles(new URL(url, location.href).href));
    return verify(await loadPipeline(bundle, engine));
  },

  /** The pixels of a picture on this server, RGBA. */
  async pixels(url: string): Promise<number[]> {
    const image = await createImageBitmap(await (await fetch(url)).blob());
    const canvas = new OffscreenCanvas(image.width, image.height);
    const context = canvas.getContext("2d")!;
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, image.width, image.height).data];
  },
};

export type Harness = typeof harness;
Object.assign(globalThis, { harness });
