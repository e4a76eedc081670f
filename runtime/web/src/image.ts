/** Pictures as a canvas takes them. */

import { FewstepError } from "./errors.js";

/** Like ImageData, RGBA row by row. */
export interface Image {
  width: number;
  height: number;
  data: Uint8ClampedArray<ArrayBuffer>;
}

/** [1 or 3, height, width] in -1..1 to 8 bits, rounded as numpy does: half to even. */
export function toImage(pixels: Float32Array, height: number, width: number): Image {
  const area = height * width;
  const channels = pixels.length / area;
  if (channels !== 1 && channels !== 3)
    throw new FewstepError("bundle", `a picture of ${channels} channels`, "1 or 3", "export the bundle again");
  const data = new Uint8ClampedArray(4 * area).fill(255);
  for (let c = 0; c < 3; c++)
    for (let i = 0, from = channels === 3 ? c * area : 0; i < area; i++)
      data[4 * i + c] = Math.fround(Math.min(Math.max(Math.fround(pixels[from + i]! / 2 + 0.5), 0), 1) * 255);
  return { width, height, data };
}
