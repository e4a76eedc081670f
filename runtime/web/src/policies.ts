/** What a row of a plan may do that is not linear, by name, as runtime/policy.py has it. */

import { FewstepError } from "./errors.js";
import type { Call, Denoise, Prediction } from "./plan.js";
import { type Json, isObject } from "./strictjson.js";

/** (timestep, variance, a, b, c): the variance of a sample at that time, and its x0 = a x + b output + c y. */
type Candidate = [number, number, number, number, number];

export type Policy =
  | { readonly name: "clip"; readonly limit: number }
  | { readonly name: "threshold"; readonly ratio: number; readonly limit: number }
  | { readonly name: "time_shift"; readonly candidates: Candidate[] }
  | { readonly name: "learned_variance"; readonly log_ratio: number };

const FIELDS = new Map([
  ["clip", ["limit"]],
  ["threshold", ["ratio", "limit"]],
  ["time_shift", ["candidates"]],
  ["learned_variance", ["log_ratio"]],
]);
/** One for each trained level of the usual schedules. */
const MAX_CANDIDATES = 1000;

/** Throws FewstepError naming the row at fault. */
export function readPolicies(data: Json | undefined, where: string): Policy[] {
  const refuse = (found: string, expected = ""): never => {
    throw new FewstepError("plan", `${where}${found}`, expected, "update fewstep, or export the bundle again");
  };
  if (!Array.isArray(data) || data.length > FIELDS.size) return refuse(" has policies that are not a short list");
  return data.map((item): Policy => {
    const name = isObject(item) && typeof item["name"] === "string" ? item["name"] : "";
    const fields = FIELDS.get(name);
    if (!isObject(item) || !fields)
      return refuse(` has an unknown policy ${name.slice(0, 40)}`, `one of ${[...FIELDS.keys()].join(", ")}`);
    if (Object.keys(item).sort().join() !== ["name", ...fields].sort().join())
      return refuse(`: policy ${name}`, `the fields name, ${fields.join(", ")}`);
    if (name === "time_shift") {
      const rows = item["candidates"];
      if (!Array.isArray(rows) || rows.length < 1 || rows.length > MAX_CANDIDATES)
        return refuse(": time_shift", `1 to ${MAX_CANDIDATES} candidates`);
      const candidates = rows.map((row) => (Array.isArray(row) && row.length === 5 ? row.map(toFinite) : [NaN]));
      if (!candidates.flat().every(Number.isFinite)) return refuse(": time_shift", "candidates of five finite numbers");
      return { name, candidates: candidates as Candidate[] };
    }
    const values = Object.fromEntries(fields.map((field) => [field, toFinite(item[field])]));
    const good = Object.values(values).every((v) => v > 0) && (values["ratio"] ?? 0.5) <= 1;
    if (!good) return refuse(`: policy ${name}`, "positive numbers, ratio at most 1");
    return { name, ...values } as Policy;
  });
}

/** The value as a number; NaN for what is no finite number. */
function toFinite(value: Json | undefined): number {
  const number = typeof value === "bigint" ? Number(value) : value;
  return typeof number === "number" && Number.isFinite(number) ? number : NaN;
}

/**
 * A call whose row shifts its time, Li et al. 2023 <arXiv:2305.15583>: per sample, over all its elements, the candidate
 * nearest in variance wins, the earlier one of two at equal distance. Samples that shift to different times cost a call
 * for each time. Undefined for other rows.
 */
export async function shiftTime(
  call: Call,
  z: Float32Array,
  batch: number,
  denoise: Denoise,
): Promise<Prediction | undefined> {
  let result: Prediction | undefined;
  for (const policy of call.policies) {
    if (policy.name !== "time_shift") continue;
    const size = z.length / batch;
    const chosen = Array.from({ length: batch }, (_, b) => {
      const found = variance(z.subarray(b * size, (b + 1) * size));
      const distances = policy.candidates.map((c) => Math.abs(c[1] - found));
      return distances.indexOf(Math.min(...distances));
    });
    const x0 = new Float32Array(z.length);
    for (const i of new Set(chosen)) {
      const [timestep, , ...conversion] = policy.candidates[i]!;
      const shifted = await denoise(z, { ...call, timestep, x0: conversion });
      chosen.forEach((c, b) => {
        if (c === i) x0.set(shifted.x0.subarray(b * size, (b + 1) * size), b * size);
      });
    }
    result = { x0 };
  }
  return result;
}

function variance(x: Float32Array): number {
  const mean = x.reduce((sum, v) => sum + v, 0) / x.length;
  return x.reduce((sum, v) => sum + (v - mean) ** 2, 0) / x.length;
}

/** The prediction as the policies change it, and what the row's fresh noise is multiplied by. */
export function applyPolicies(
  policies: Policy[],
  prediction: Prediction,
  batch: number,
): { x0: Float32Array; noiseScale?: Float32Array } {
  let { x0 } = prediction;
  let noiseScale: Float32Array | undefined;
  for (const policy of policies) {
    if (policy.name === "clip") {
      const limit = Math.fround(policy.limit);
      x0 = x0.map((v) => Math.min(Math.max(v, -limit), limit));
    } else if (policy.name === "threshold") x0 = threshold(x0, batch, policy.ratio, policy.limit);
    else if (policy.name === "learned_variance") {
      if (!prediction.variance)
        throw new FewstepError(
          "plan",
          "a plan with learned variance on a network without one",
          "an output with twice the sample's channels",
        );
      // Nichol and Dhariwal 2021, equation 15 <arXiv:2102.09672>
      const factor = Math.fround(policy.log_ratio / 4);
      noiseScale = prediction.variance.map((v) => Math.exp(Math.fround(Math.fround(v + 1) * factor)));
    }
  }
  return noiseScale ? { x0, noiseScale } : { x0 };
}

/**
 * Dynamic thresholding, Saharia et al. 2022, section 2.3 <arXiv:2205.11487>: per sample, s is the ratio-quantile of
 * |x0| (linear between order statistics) held within [1, limit]; x0 is limited to [-s, s] and divided by s.
 */
function threshold(x0: Float32Array, batch: number, ratio: number, limit: number): Float32Array {
  const out = new Float32Array(x0.length);
  const size = x0.length / batch;
  for (let b = 0; b < batch; b++) {
    const sample = x0.subarray(b * size, (b + 1) * size);
    const sorted = sample.map(Math.abs).sort();
    const at = ratio * (size - 1);
    const [low, high] = [sorted[Math.floor(at)]!, sorted[Math.ceil(at)]!];
    const s = Math.fround(Math.min(Math.max(low + (high - low) * (at % 1), 1), limit));
    out.set(
      sample.map((v) => Math.min(Math.max(v, -s), s) / s),
      b * size,
    );
  }
  return out;
}
