/** A golden latent: what a bundle drew when it was made. Hashes prove that the files arrived, this the engine here. */

import { FewstepError } from "./errors.js";
import { noise } from "./noise.js";
import type { Pipeline } from "./pipeline.js";
import { conditionNames } from "./denoiser.js";
import { isObject, shown } from "./strictjson.js";

export interface Verification {
  /** The largest difference, relative to the latent's largest value. */
  worst: number;
  tolerance: number;
  passed: boolean;
}

/** Draw the bundle's golden latent again and compare. Throws FewstepError where it has none that can be drawn. */
export async function verify(pipeline: Pipeline, signal?: AbortSignal): Promise<Verification> {
  const { manifest } = pipeline;
  const golden = manifest.quality["golden"];
  const refuse = (found: string, fix = "export the bundle again"): never => {
    throw new FewstepError("bundle", found, "", fix);
  };
  if (!isObject(golden)) return refuse("this bundle has no golden latent");
  const numbers = (name: string): number[] => {
    const list = golden[name];
    const good = Array.isArray(list) && list.every((v) => typeof v === "number");
    return good ? (list as number[]) : refuse(`manifest.json: quality.golden: ${name} is no list of numbers`);
  };
  const [shape, values, mean, std] = ["shape", "values", "mean", "std"].map(numbers) as [
    number[],
    number[],
    number[],
    number[],
  ];
  const { prompt, class_label: label, seed, steps, sampler, tolerance, peak } = golden;
  const fits = [seed, tolerance, peak].every((v) => typeof v === "number") && shape.length > 1;
  if (!fits) return refuse("manifest.json: quality.golden cannot be replayed");
  const { steps: own, sampler: name } = pipeline.plan();
  const plan =
    typeof golden["plan"] === "string" ? golden["plan"] : own === steps && name === sampler ? "default" : undefined;
  if (plan === undefined)
    return refuse(
      `the golden latent was drawn in ${shown(steps)} steps of ${shown(sampler)}, for which this bundle has no plan`,
      "run fewstep verify, or export with offered = [2] in the recipe",
    );
  const [channels, size] = [shape[1]!, shape.slice(1).reduce((n, s) => n * s, 1)];
  const observed =
    pipeline.plan(plan).givens > 0 || conditionNames(manifest.parts[manifest.denoiser]!).includes("observation");
  const latent = await pipeline.drawLatents({
    prompt: typeof prompt === "string" ? prompt : undefined,
    classLabel: typeof label === "number" ? label : undefined,
    seed: seed as number,
    plan,
    given: observed ? [noise(1)(16 * size).slice(0, size)] : undefined,
    signal,
  });
  if (latent.length !== size) refuse(`a latent of ${latent.length} values, and a golden one of ${shape.join("x")}`);

  // as numpy: linspace in float64, truncated; mean and population standard deviation of each channel
  const picked = values.map(
    (_, i) => latent[Math.trunc(values.length > 1 ? i * ((size - 1) / (values.length - 1)) : 0)]!,
  );
  const area = size / channels;
  const each = Array.from({ length: channels }, (_, c) => latent.subarray(c * area, (c + 1) * area));
  const means = each.map((x) => x.reduce((sum, v) => sum + v, 0) / area);
  const spreads = each.map((x, c) => Math.sqrt(x.reduce((sum, v) => sum + (v - means[c]!) ** 2, 0) / area));
  const pairs = [
    [picked, values],
    [means, mean],
    [spreads, std],
  ] as const;
  const differences = pairs.flatMap(([got, wanted]) => got.map((v, i) => Math.abs(v - (wanted[i] ?? NaN))));
  const worst = Math.max(...differences) / (peak as number);
  return { worst, tolerance: tolerance as number, passed: worst <= (tolerance as number) };
}
