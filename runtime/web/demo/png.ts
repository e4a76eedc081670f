/** A PNG that says how it was made, as `fewstep run` writes it. PNG specification, third edition (w3.org/TR/png-3). */

import type { Image } from "../src/pipeline.js";

const SIGNATURE_AND_HEADER = 8 + 25; // the file's signature, and the IHDR chunk of 13 bytes in its frame of 12

/** The picture as a PNG with `texts` in it, keyword -> text. */
export async function png(image: Image, texts: Record<string, string>): Promise<Blob> {
  const canvas = document.createElement("canvas");
  paint(canvas, image);
  const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("this browser cannot write a PNG");
  const data = new Uint8Array(await blob.arrayBuffer());
  const chunks = Object.entries(texts).map(([keyword, text]) => internationalText(keyword, text));
  const parts = [data.subarray(0, SIGNATURE_AND_HEADER), ...chunks, data.subarray(SIGNATURE_AND_HEADER)];
  return new Blob(parts as BlobPart[], { type: "image/png" });
}

export function paint(canvas: HTMLCanvasElement, { width, height, data }: Image): void {
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d")!.putImageData(new ImageData(data, width, height), 0, 0);
}

/** An iTXt chunk, uncompressed: keyword, 0, 0, 0, no language, 0, no translation, 0, UTF-8 text. */
function internationalText(keyword: string, text: string): Uint8Array {
  const encoder = new TextEncoder();
  const body = [...encoder.encode(`iTXt${keyword}`), 0, 0, 0, 0, 0, ...encoder.encode(text)];
  const chunk = new Uint8Array(body.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(body.length + 4, crc32(chunk.subarray(4, body.length + 4)));
  return chunk;
}

/** Annex D of the specification. */
export function crc32(data: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of data) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return (crc ^ 0xffffffff) >>> 0;
}
