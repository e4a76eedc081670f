/** A sampler compiled to a table of numbers, and the loop that runs it. runtime/spec/plan.md describes the table. */

import { FewstepError, checkSignal } from "./errors.js";
import { IDENTIFIER } from "./manifest.js";
import { type Policy, applyPolicies, readPolicies, shiftTime } from "./policies.js";
import { type Json, isObject, shown } from "./strictjson.js";
import { allFinite, times } from "./tensors.js";

/** Kind: "x" is a state, "d" the prediction of a call, "n" a fresh noise, "y" a given array, "z" the start noise. */
export type Term = [kind: string, index: number, coefficient: number];

/** One row: one network call, and what follows from it. */
export interface Call {
  readonly t: number;
  /** What the network is fed as its time. */
  readonly timestep: number;
  readonly input: Term[];
  /** The network itself sees scale * input. */
  readonly scale: number;
  /** x0 = x0[0] * input + x0[1] * network output + x0[2] * the observation. */
  readonly x0: readonly [number, number, number];
  /** The next state; null when another call comes first. */
  readonly next: Term[] | null;
  readonly graph: string;
  readonly guided: boolean;
  readonly policies: Policy[];
}

export interface Plan {
  readonly sampler: string;
  /** Steps as the user counts them; there may be more calls. */
  readonly steps: number;
  readonly prediction: string;
  readonly init: Term[];
  readonly calls: Call[];
  /** How many states `runPlan` yields. */
  readonly states: number;
  /** How many fresh noises it draws. */
  readonly noises: number;
  /** How many arrays the caller brings besides noise, the observation first. */
  readonly givens: number;
}

/** What a network call gives: the estimate of clean data, and the second half of the output where it has one. */
export interface Prediction {
  x0: Float32Array;
  variance?: Float32Array;
}
export type Denoise = (z: Float32Array, call: Call) => Promise<Prediction>;

/** One new state on the way from noise to data. */
export interface PlanStep {
  readonly index: number;
  readonly timestep: number;
  readonly x: Float32Array;
  /** The latest guess of the clean sample. */
  readonly x0: Float32Array;
}

/** A thousand steps of the costliest published sampler; more in a file is damage, not a plan. */
const MAX_CALLS = 4000;
const MAX_GIVEN = 16;
const MAX_STEPS = 1000;

const refuse = (found: string, expected = ""): never => {
  throw new FewstepError("plan", found, expected, "export the bundle again");
};

/** A finite number of a plan. */
export function finite(value: Json | undefined, where: string): number {
  const number = typeof value === "bigint" ? Number(value) : value;
  return typeof number === "number" && Number.isFinite(number)
    ? number
    : refuse(`${where} of a plan is ${shown(value)}`, "a finite number");
}

function exactly(value: Json | undefined, fields: string[], where: string): Record<string, Json> {
  if (isObject(value) && Object.keys(value).sort().join() === [...fields].sort().join()) return value;
  return refuse(where, `the fields ${[...fields].sort().join(", ")}`);
}

/** `known` counts the states, predictions and noises that exist when these terms are read. */
function readTerms(data: Json | undefined, known: Record<string, number>, where: string): Term[] {
  if (!Array.isArray(data) || data.length < 1 || data.length > 3 * MAX_CALLS)
    return refuse(`${where} of a plan`, "at least one [kind, index, coefficient]");
  return data.map((term): Term => {
    if (!Array.isArray(term) || term.length !== 3)
      return refuse(`${where} of a plan has a term that is none`, "[kind, index, coefficient]");
    const [kind, index, coefficient] = term;
    const exists = typeof kind === "string" && Object.hasOwn(known, kind) && typeof index === "bigint";
    if (!exists || index < 0n || index >= known[kind]!)
      return refuse(`${where} of a plan reads ${shown(kind)} ${shown(index)}, which does not exist yet`);
    return [kind, Number(index), finite(coefficient, where)];
  });
}

function readCall(data: Json, k: number, states: number): Call {
  const where = `call ${k} of a plan`;
  const names = ["t", "timestep", "input", "scale", "x0", "next", "graph", "guided", "policies"];
  const { t, timestep, input, scale, x0, next, graph, guided, policies } = exactly(data, names, where);
  if (typeof graph !== "string" || !IDENTIFIER.test(graph) || typeof guided !== "boolean")
    return refuse(where, "graph as a name and guided as true or false");
  if (!Array.isArray(x0) || x0.length !== 3) return refuse(where, "x0 as three numbers");
  const known = { x: states, d: k, n: MAX_CALLS, y: MAX_GIVEN };
  return {
    t: finite(t, `call ${k}: t`),
    timestep: finite(timestep, `call ${k}: timestep`),
    input: readTerms(input, known, `call ${k}: input`),
    scale: finite(scale, `call ${k}: scale`),
    x0: [finite(x0[0], `call ${k}: x0`), finite(x0[1], `call ${k}: x0`), finite(x0[2], `call ${k}: x0`)],
    next: next === null ? null : readTerms(next, { ...known, d: k + 1 }, `call ${k}: next`),
    graph,
    guided,
    policies: readPolicies(policies, where),
  };
}

/** Read a plan as `parseJson` gives it and check that it can run. Throws FewstepError naming the row at fault. */
export function readPlan(data: Json): Plan {
  const {
    sampler,
    steps,
    prediction,
    init,
    calls: rows,
  } = exactly(data, ["sampler", "steps", "prediction", "init", "calls"], "a plan");
  if (!Array.isArray(rows) || rows.length < 1 || rows.length > MAX_CALLS)
    return refuse("a plan whose calls are missing or too many", `1 to ${MAX_CALLS} rows`);
  if (typeof sampler !== "string" || typeof prediction !== "string")
    return refuse("a plan whose sampler or prediction is not a name");
  if (typeof steps !== "bigint" || steps < 1n || steps > MAX_STEPS)
    return refuse(`${shown(steps)} steps`, `a whole number from 1 to ${MAX_STEPS}`);
  const start = readTerms(init, { z: 1, y: MAX_GIVEN }, "init");
  const calls: Call[] = [];
  let states = 0;
  rows.forEach((row, k) => {
    calls.push(readCall(row, k, states + 1));
    if (calls[k]!.next) states++;
  });
  if (!calls.at(-1)!.next) refuse("a plan whose last call leads to no state", "a next state in the last row");

  const terms = [start, ...calls.flatMap((call) => [call.input, call.next ?? []])].flat();
  const most = (kind: string): number => terms.reduce((m, [k, i]) => (k === kind ? Math.max(m, i + 1) : m), 0);
  const observes = calls.some((call) => call.x0[2] !== 0);
  return {
    sampler,
    steps: Number(steps),
    prediction,
    init: start,
    calls,
    states,
    noises: most("n"),
    givens: Math.max(most("y"), observes ? 1 : 0),
  };
}

/** sum of coefficient * value in float32; a lone term of coefficient 1 is passed on untouched. */
function combine(terms: Term[], value: (kind: string, index: number) => Float32Array): Float32Array {
  const [kind, index, c] = terms[0]!;
  const first = value(kind, index);
  if (terms.length === 1 && c === 1) return first;
  const total = times(first, c);
  for (const [otherKind, otherIndex, otherC] of terms.slice(1)) {
    const other = value(otherKind, otherIndex);
    const factor = Math.fround(otherC);
    for (let i = 0; i < total.length; i++) total[i]! += Math.fround(other[i]! * factor);
  }
  return total;
}

/** After each call, the values no later row reads. */
function deadAfter(plan: Plan): string[][] {
  const last = new Map<string, number>();
  let index = 0;
  plan.calls.forEach((call, k) => {
    last.set(`d${k}`, k);
    for (const [kind, i] of [...call.input, ...(call.next ?? [])]) last.set(kind + i, k);
    if (call.next) last.set(`x${++index}`, k);
  });
  const dead: string[][] = plan.calls.map(() => []);
  for (const [key, k] of last) dead[k]!.push(key);
  return dead;
}

/**
 * Sample: yields each new state; the last is the clean sample.
 * start: standard normal noise, `batch` samples one after the other; noise: fresh noise of that size, drawn in order;
 * given: `plan.givens` arrays of that size. Throws FewstepError naming the call whose prediction holds NaN or infinity.
 */
export async function* runPlan(
  plan: Plan,
  denoise: Denoise,
  start: Float32Array,
  noise: () => Float32Array,
  given: readonly Float32Array[] = [],
  { batch = 1, signal }: { batch?: number; signal?: AbortSignal | undefined } = {},
): AsyncGenerator<PlanStep, void> {
  if (given.length !== plan.givens)
    throw new FewstepError(
      "plan",
      `${given.length} given arrays for ${plan.sampler}`,
      `${plan.givens}${plan.givens ? ", the observation first" : ""}`,
    );
  const values = new Map<string, Float32Array>([["z0", start]]);
  given.forEach((array, i) => values.set(`y${i}`, array));
  const dead = deadAfter(plan);
  const read = new Set(dead.flat());
  let drawn = 0;
  const value = (kind: string, i: number): Float32Array => {
    // noises are drawn in order, also past one that no row reads
    for (; kind === "n" && drawn <= i; drawn++) {
      const fresh = noise();
      if (read.has(`n${drawn}`)) values.set(`n${drawn}`, fresh);
    }
    return values.get(kind + i)!;
  };
  let x = combine(plan.init, value);
  values.delete("z0");
  values.set("x0", x);
  let index = 0;
  for (const [k, call] of plan.calls.entries()) {
    checkSignal(signal, `before call ${k + 1} of ${plan.calls.length}`);
    const z = combine(call.input, value);
    const predicted = (await shiftTime(call, z, batch, denoise)) ?? (await denoise(z, call));
    const { x0, noiseScale } = applyPolicies(call.policies, predicted, batch);
    if (!allFinite(x0))
      throw new FewstepError(
        "numbers",
        `call ${k + 1} of ${plan.calls.length}, ${call.graph} at timestep ${call.timestep}: ` +
          "the network's output holds NaN or infinity",
        "",
        "a layer overflows in this precision; export that part in float32",
      );
    values.set(`d${k}`, x0);
    if (call.next) {
      if (noiseScale)
        for (const [kind, i] of call.next)
          if (kind === "n")
            values.set(
              `n${i}`,
              value("n", i).map((v, j) => v * noiseScale[j]!),
            );
      x = combine(call.next, value);
      values.set(`x${++index}`, x);
    }
    for (const key of dead[k]!) values.delete(key);
    if (call.next) yield { index: index - 1, timestep: call.timestep, x, x0 };
  }
}
