/** What a call asks for, checked against what its bundle can do before anything runs. */

import { check } from "./errors.js";
import type { Manifest } from "./manifest.js";

/** Pixels. Past this a latent model needs tens of gigabytes; a larger number is a typing error. */
const MAX_SIDE = 4096;

/** What to draw. */
export interface Request {
  prompt?: string | undefined;
  negativePrompt?: string | undefined;
  classLabel?: number | undefined;
  /** 0 to 2^64 - 1, past 2^53 as bigint; the same seed gives the same picture in every language. 0 without it. */
  seed?: number | bigint | undefined;
  /** A plan of the bundle by name; "default" without it. */
  plan?: string | undefined;
  guidanceScale?: number | undefined;
  /** Pixels; the model's own size without them. */
  height?: number | undefined;
  width?: number | undefined;
  /** In place of the noise of the seed: standard normal, [channels, height / factor, width / factor]. */
  latents?: Float32Array | undefined;
  /** What the plan is given besides noise, as clean samples of that shape, the observation first. */
  given?: Float32Array[] | undefined;
  /** Aborting it ends the drawing before the next network call, with an error of kind "cancelled". */
  signal?: AbortSignal | undefined;
}

/** [channels, h, w] of a sample for a picture of this size. Throws FewstepError for a size the bundle cannot draw. */
export function sampleShape({ sample, grid }: Manifest, height = sample.height, width = sample.width): number[] {
  const own = height === sample.height && width === sample.width;
  const size = `${width}x${height} pixels`;
  check(own || !sample.fixed, size, `${sample.width}x${sample.height}, the only size of this bundle`);
  check(
    own || !grid.dynamic,
    size,
    `${sample.width}x${sample.height}: the times of this model depend on the size, and the bundle has those of one`,
    "export the bundle for that size",
  );
  const good = [height, width].every((s) => Number.isInteger(s) && s > 0 && s % sample.multiple === 0 && s <= MAX_SIDE);
  check(good, size, `multiples of ${sample.multiple} up to ${MAX_SIDE}`, `try ${sample.width}x${sample.height}`);
  return [sample.channels, height / sample.factor, width / sample.factor];
}

/** Throws FewstepError for a prompt or class label the model does not take. */
export function checkSubjects(
  { task, tokenizer, classes }: Manifest,
  { prompt, negativePrompt, classLabel }: Request,
): void {
  if (tokenizer) check(typeof prompt === "string", "no prompt", "a text", "give { prompt: TEXT }");
  else check((prompt ?? negativePrompt) === undefined, `a prompt for a model of task ${task}`, "no prompt");
  if (classes === null) check(classLabel === undefined, `a class label for a model of task ${task}`, "no class label");
  else {
    const good = Number.isInteger(classLabel) && classLabel! >= 0 && classLabel! < classes;
    check(good, `class label ${classLabel}`, `a whole number from 0 to ${classes - 1}`, "give { classLabel: 0 }");
  }
}

/** The guidance scale of a call. */
export function guidanceOf({ guidance }: Manifest, scale: number | undefined): number {
  const fits = guidance.kind !== "none" || scale === undefined || scale === 1;
  check(fits, `guidance ${scale} for a model without guidance`, "1 or nothing");
  if (guidance.kind === "none") return 1;
  check(scale === undefined || Number.isFinite(scale), `guidance ${scale}`, "a finite number");
  return scale ?? guidance.scale;
}
