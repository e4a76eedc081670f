/** From what a network outputs to an estimate of clean data: conditioning, guidance and conversion. */

import type { NamedTensor, Session } from "./engine.js";
import { FewstepError, count } from "./errors.js";
import type { PartSpec } from "./manifest.js";
import type { Denoise } from "./plan.js";
import { concatenate, times, toFloats, toTensor } from "./tensors.js";

/** One sample's value of an input besides sample and timestep: its sizes without the batch. */
export interface Condition {
  dims: number[];
  values: Float32Array | number[];
}
export type Conditions = Record<string, Condition>;

export interface Conditioning {
  condition: Conditions;
  /** The same for nothing in particular, where guidance needs it. */
  unconditional: Conditions | undefined;
  /** Classifier-free guidance: out = uncond + scale (cond - uncond). Ho and Salimans 2022 <arXiv:2207.12598>. */
  scale: number;
  /** What a conditional process is given, of the sample's shape. */
  observation: Float32Array | undefined;
}

/** The inputs that condition a network, by name. */
export const conditionNames = (spec: PartSpec): string[] =>
  spec.inputs.map((tensor) => tensor.name).filter((name) => name !== "sample" && name !== "timestep");

/**
 * (x_t, t) -> estimate of x_0 for `runPlan`: one graph with everything it is conditioned on, on one sample of
 * shape [channels, height, width]. With guidance, `unconditional` goes first in a batch of two, diffusers' order;
 * a graph of fixed sizes is called twice.
 */
export function denoiser(session: Session, name: string, spec: PartSpec, shape: number[], how: Conditioning): Denoise {
  const size = shape.reduce((n, s) => n * s, 1);
  const one = spec.inputs.find((tensor) => tensor.name === "sample")?.shape[0] === 1;
  const output = spec.outputs[0]!.name;
  const constant = new Map<Conditions[], Record<string, NamedTensor>>();

  /** What does not change from call to call is converted once. */
  const conditionFeeds = (conditions: Conditions[]): Record<string, NamedTensor> => {
    const known = constant.get(conditions);
    if (known) return known;
    const feeds: Record<string, NamedTensor> = {};
    for (const input of conditionNames(spec)) {
      const each = conditions.map((condition) => condition[input]!);
      if (!each[0])
        throw new FewstepError("bundle", `${name} takes ${input}, which nothing gives`, "", "export the bundle again");
      const dtype = spec.inputs.find((tensor) => tensor.name === input)!.dtype;
      const values = each.flatMap(({ values: v }) => (v instanceof Float32Array ? [] : v));
      const floats = each.flatMap(({ values: v }) => (v instanceof Float32Array ? [v] : []));
      const dims = [each.length, ...each[0].dims];
      feeds[input] = toTensor(dtype, dims, floats.length ? concatenate(floats) : values);
    }
    constant.set(conditions, feeds);
    return feeds;
  };

  /** One output of 1 or 2 times `size` values for each of the samples. */
  const network = async (
    samples: Float32Array[],
    timestep: number,
    conditions: Conditions[],
  ): Promise<Float32Array[]> => {
    const n = samples.length;
    const feeds = { ...conditionFeeds(conditions) };
    for (const { name: input, dtype, shape: sizes } of spec.inputs)
      if (input === "sample") feeds[input] = toTensor(dtype, [n, ...shape], concatenate(samples));
      else if (input === "timestep") {
        const dims = sizes.map((s) => (typeof s === "string" ? n : s));
        feeds[input] = toTensor(dtype, dims, Array<number>(dims.reduce((a, b) => a * b, 1)).fill(timestep));
      }
    const out = toFloats((await session.run(feeds, [output]))[output]!);
    if (out.length !== n * size && out.length !== 2 * n * size)
      throw new FewstepError("bundle", `${name} gave ${count(out.length)} values`, count(n * size), "export it again");
    return samples.map((_, i) => out.subarray((i * out.length) / n, ((i + 1) * out.length) / n));
  };

  const alone = [how.condition];
  const nothing = how.unconditional && [how.unconditional];
  const both = how.unconditional && [how.unconditional, how.condition];
  return async (z, call) => {
    const sample = call.scale === 1 ? z : times(z, call.scale);
    let out: Float32Array;
    if (call.guided && nothing && both && how.scale !== 1) {
      const [uncond, cond] = one
        ? [...(await network([sample], call.timestep, nothing)), ...(await network([sample], call.timestep, alone))]
        : await network([sample, sample], call.timestep, both);
      const guidance = Math.fround(how.scale);
      out = cond!.slice(); // a learned variance, the second half, is not guided
      for (let i = 0; i < size; i++) {
        const u = uncond![i]!;
        out[i] = u + Math.fround(guidance * Math.fround(out[i]! - u));
      }
    } else [out] = (await network([sample], call.timestep, alone)) as [Float32Array];
    const [a, b, c] = call.x0.map(Math.fround) as [number, number, number];
    const x0 = times(out.subarray(0, size), b);
    if (a !== 0) for (let i = 0; i < size; i++) x0[i]! += Math.fround(z[i]! * a);
    if (c !== 0) for (let i = 0; i < size; i++) x0[i]! += Math.fround(how.observation![i]! * c);
    return out.length === size ? { x0 } : { x0, variance: out.subarray(size) };
  };
}
