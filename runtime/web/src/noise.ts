/**
 * Seeded noise: the same seed gives torch's noise, and the same bits in every language. The contract is that of
 * runtime/noise.py: MT19937, the low 24 bits of each draw, Box-Muller over blocks of 16 with fdlibm's polynomials in
 * float64, rounded once. runtime/spec/golden/noise.json is what it must reproduce.
 */

import { check } from "./errors.js";

/** torch draws 16 values at a time: the first 8 uniforms give radii, the last 8 angles. Below 16 it works otherwise. */
const BLOCK = 16;
const MAX_SEED = 2n ** 64n - 1n;

// fdlibm e_log.c: ln 2 in two parts, and R(z) = log((1+s)/(1-s))/s - 2 at z = s^2
const LN2_HI = 6.9314718036912381649e-1;
const LN2_LO = 1.90821492927058770002e-10;
const LOG = [
  6.66666666666673513e-1, 3.999999999940941908e-1, 2.857142874366239149e-1, 2.222219843214978396e-1,
  1.818357216161805012e-1, 1.531383769920937332e-1, 1.479819860511658591e-1,
] as const;
// fdlibm k_sin.c and k_cos.c, for |x| <= pi/4
const SIN = [
  -1.66666666666666324348e-1, 8.33333333332248946124e-3, -1.98412698298579493134e-4, 2.75573137070700676789e-6,
  -2.50507602534068634195e-8, 1.58969099521155010221e-10,
] as const;
const COS = [
  4.16666666666666019037e-2, -1.38888888888741095749e-3, 2.48015872894767294178e-5, -2.75573143513906633035e-7,
  2.0875723212981748279e-9, -1.13596475577881948265e-11,
] as const;

/** Matsumoto and Nishimura 1998, init_genrand and genrand_int32: all numbers are theirs. */
function mersenneTwister(seed: number): () => number {
  const n = 624;
  const state = new Uint32Array(n);
  state[0] = seed;
  for (let i = 1; i < n; i++) {
    const last = state[i - 1]!;
    state[i] = Math.imul(1812433253, last ^ (last >>> 30)) + i;
  }
  let at = n;
  const refill = (): void => {
    for (let i = 0; i < n; i++) {
      const y = (state[i]! & 0x80000000) | (state[(i + 1) % n]! & 0x7fffffff);
      state[i] = state[(i + 397) % n]! ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    at = 0;
  };
  return () => {
    if (at === n) refill();
    let y = state[at++]!;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** c0 + z (c1 + z (c2 + ...)), innermost first: the order is part of the contract. */
function polynomial(z: number, coefficients: readonly number[]): number {
  let value = coefficients.at(-1)!;
  for (let i = coefficients.length - 2; i >= 0; i--) value = coefficients[i]! + z * value;
  return value;
}

/** ln(k / 2^24) for k from 1 to 2^24. */
function logOf24Bits(k: number): number {
  let exponent = 32 - Math.clz32(k);
  let m = k / 2 ** exponent; // k = m 2^exponent exactly, m in [0.5, 1)
  if (m < 0.7071067811865476) {
    // sqrt(1/2): from here m in [sqrt(1/2), sqrt(2)]
    m += m;
    exponent--;
  }
  exponent -= 24;
  const f = m - 1;
  const s = f / (2 + f);
  const z = s * s;
  const half = 0.5 * f * f;
  const tail = s * (half + z * polynomial(z, LOG)) + exponent * LN2_LO;
  return exponent * LN2_HI - (half - tail - f);
}

/** [sin, cos] of 2 pi v / 2^24 for v from 0 to 2^24 - 1: folded exactly, in integers, into [0, pi/4]. */
function sinCosOf24Bits(v: number): [number, number] {
  const quadrant = v >>> 22;
  const within = v & 0x3fffff;
  const fold = within > 0x200000; // past pi/4: sin(a) = cos(pi/2 - a)
  const x = (fold ? 0x400000 - within : within) * 2 ** -22 * 1.5707963267948966; // pi / 2
  const z = x * x;
  let sine = x + z * x * polynomial(z, SIN);
  let cosine = 1 - (0.5 * z - z * z * polynomial(z, COS));
  if (fold !== ((quadrant & 1) === 1)) [sine, cosine] = [cosine, sine];
  return [quadrant >= 2 ? -sine : sine, quadrant === 1 || quadrant === 2 ? -cosine : cosine];
}

/** The next values of a stream: n standard normal ones. Throws FewstepError for fewer than 16. */
export type Noise = (n: number) => Float32Array;

/**
 * A stream of standard normal values, as one `torch.Generator("cpu").manual_seed(seed)` gives them call by call.
 * seed: 0 to 2^64 - 1; past 2^53 as bigint. Throws FewstepError for anything else.
 */
export function noise(seed: number | bigint): Noise {
  const whole = typeof seed === "bigint" || Number.isSafeInteger(seed);
  const inRange = whole && BigInt(seed) >= 0n && BigInt(seed) <= MAX_SEED;
  check(inRange, `seed ${String(seed)}`, `a whole number from 0 to ${MAX_SEED}`, "past 2^53 give it as bigint");
  const next = mersenneTwister(Number(BigInt(seed) & 0xffffffffn));
  const words = new Uint32Array(BLOCK);

  const fill = (out: Float32Array, start: number): void => {
    for (let i = 0; i < BLOCK; i++) words[i] = next() & 0xffffff;
    for (let i = 0; i < BLOCK / 2; i++) {
      const radius = Math.sqrt(-2 * logOf24Bits(0x1000000 - words[i]!));
      const [sine, cosine] = sinCosOf24Bits(words[i + BLOCK / 2]!);
      out[start + i] = radius * cosine;
      out[start + i + BLOCK / 2] = radius * sine;
    }
  };
  return (n) => {
    check(
      Number.isSafeInteger(n) && n >= BLOCK,
      `noise of ${n} values`,
      `at least ${BLOCK}`,
      "draw more and keep a part",
    );
    const out = new Float32Array(n);
    const rest = n % BLOCK;
    for (let start = 0; start < n - rest; start += BLOCK) fill(out, start);
    if (rest) {
      // torch fills all n uniforms first, then draws the last 16 values anew
      for (let i = 0; i < rest; i++) next();
      fill(out, n - BLOCK);
    }
    return out;
  };
}
