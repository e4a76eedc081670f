/** runtime/spec/golden/, and how far this runtime is from it. */

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { type Json, type JsonObject, noise, parseJson, readPlan, runPlan } from "../src/index.js";
import { plain } from "../src/strictjson.js";

const SPEC = new URL("../../../spec/golden/", import.meta.url);
const read = (name: string): JsonObject => parseJson(readFileSync(new URL(name, SPEC)), name) as JsonObject;

export interface Stream {
  seed: string;
  draws: number[][];
  sha256: string;
  first: number[];
}
export const streams = plain(read("noise.json")["streams"]!) as unknown as Stream[];

/** The SHA-256 of all draws of one stream, and its first values. */
export function drawStream({ seed, draws, first }: Stream): { sha256: string; first: number[] } {
  const stream = noise(BigInt(seed));
  const all = draws.map((shape) => stream(shape.reduce((n, s) => n * s, 1)));
  const hash = createHash("sha256");
  for (const values of all) hash.update(new Uint8Array(values.buffer));
  return { sha256: hash.digest("hex"), first: [...all[0]!.subarray(0, first.length)] };
}

/** The network of the golden plans: `network` in plans.json. */
const network = (z: number, timestep: number, graph: string): number => {
  const out = (0.6 * z) / (1 + Math.abs(z)) + (0.1 * timestep) / (1 + Math.abs(timestep));
  return graph === "small" ? out / 2 : out;
};

interface Case {
  name: string;
  plan: Json;
  given: number;
  noises: number;
  tolerance: number;
  states: number[][];
}
const plans = read("plans.json");
const flat = (nested: Json): Float32Array => Float32Array.from((plain(nested) as number[][]).flat());
const [start, given, noises] = [flat(plans["start"]!), plans["given"] as Json[], plans["noises"] as Json[]];

/** The largest difference of all states, over the largest value. */
export async function difference(one: JsonObject): Promise<number> {
  const plan = readPlan(one["plan"]!);
  const { states } = plain({ states: one["states"]! }) as unknown as Case;
  const arrays = given.slice(0, Number(one["given"])).map(flat);
  const fresh = noises.slice(0, Number(one["noises"])).map(flat);
  if (plan.givens !== arrays.length || plan.noises !== fresh.length)
    throw new Error("another number of noises or arrays");
  const scaled = Math.max(...start.map(Math.abs)) * plan.init[0]![2];
  const peak = Math.max(scaled, ...states.flat().map(Math.abs));
  const steps = runPlan(
    plan,
    async (z, { x0: [a, b, c], scale, timestep, graph }) => {
      const variance = z.map((v) => network(Math.fround(scale * v), timestep, graph));
      return { x0: z.map((v, i) => a * v + b * variance[i]! + (c ? c * arrays[0]![i]! : 0)), variance };
    },
    start,
    () => fresh.shift()!,
    arrays,
    { batch: 2 },
  );
  let worst = 0;
  let count = 0;
  for await (const { x } of steps) {
    const expected = states[count++]!;
    for (const [i, v] of expected.entries()) worst = Math.max(worst, Math.abs(x[i]! - v) / peak);
  }
  if (count !== states.length) throw new Error(`${count} states`);
  return worst;
}

export const cases = plans["cases"] as JsonObject[];
