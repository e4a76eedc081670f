/** What every port must reproduce: runtime/spec/golden/. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { type Json, type JsonObject, noise, parseJson, readPlan, runPlan } from "../src/index.js";
import { plain } from "../src/strictjson.js";

const SPEC = new URL("../../../spec/golden/", import.meta.url);
const read = (name: string): JsonObject => parseJson(readFileSync(new URL(name, SPEC)), name) as JsonObject;

interface Stream {
  seed: string;
  draws: number[][];
  sha256: string;
  first: number[];
}
const streams = plain(read("noise.json")["streams"]!) as unknown as Stream[];

for (const { seed, draws, sha256, first } of streams)
  test(`noise of seed ${seed} in ${draws.length} draws is the same to the bit`, () => {
    const stream = noise(BigInt(seed));
    const hash = createHash("sha256");
    for (const [i, shape] of draws.entries()) {
      const values = stream(shape.reduce((n, s) => n * s, 1));
      if (i === 0) assert.deepEqual([...values.subarray(0, first.length)], first);
      hash.update(new Uint8Array(values.buffer));
    }
    assert.equal(hash.digest("hex"), sha256);
  });

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
async function difference(one: JsonObject): Promise<number> {
  const plan = readPlan(one["plan"]!);
  const { states } = plain({ states: one["states"]! }) as unknown as Case;
  const arrays = given.slice(0, Number(one["given"])).map(flat);
  const fresh = noises.slice(0, Number(one["noises"])).map(flat);
  assert.equal(plan.givens, arrays.length);
  assert.equal(plan.noises, fresh.length);
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
  assert.equal(count, states.length);
  return worst;
}

const cases = plans["cases"] as JsonObject[];
test("there are golden plans", () => assert.ok(cases.length > 100));
for (const one of cases)
  test(`plan ${String(one["name"])} gives its states`, async () => {
    const worst = await difference(one);
    assert.ok(worst < Number(one["tolerance"]), `${worst}`);
  });
