/** Between this package's float32 and what a graph takes and gives. */

import type { NamedTensor } from "./engine.js";
import { FewstepError } from "./errors.js";

/** Numbers as a tensor of a graph's type; towards zero where it is whole, as numpy does. */
export function toTensor(dtype: string, dims: number[], values: Float32Array | number[]): NamedTensor {
  switch (dtype) {
    case "float32":
      return { dtype, dims, data: asFloats(values) };
    case "float16":
      return { dtype, dims, data: toHalf(asFloats(values)) };
    case "int32":
      return { dtype, dims, data: Int32Array.from(values) };
    case "int64":
      return { dtype, dims, data: BigInt64Array.from(values as number[], (value) => BigInt(Math.trunc(value))) };
  }
  throw new FewstepError(
    "bundle",
    `a graph that takes ${dtype}`,
    "float32, float16, int32 or int64",
    "export it again",
  );
}

const asFloats = (values: Float32Array | number[]): Float32Array =>
  values instanceof Float32Array ? values : Float32Array.from(values);

/** A tensor's values as float32. */
export function toFloats({ dtype, data }: NamedTensor): Float32Array {
  if (data instanceof Float32Array) return data;
  if (dtype === "float16" && data instanceof Uint16Array) return fromHalf(data);
  throw new FewstepError("bundle", `a graph that gives ${dtype}`, "float32 or float16", "export it again");
}

/** values * factor in float32. Loops, not callbacks: those would put every number on the heap. */
export function times(values: Float32Array, factor: number): Float32Array {
  const out = new Float32Array(values.length);
  const single = Math.fround(factor);
  for (let i = 0; i < out.length; i++) out[i] = values[i]! * single;
  return out;
}

export function allFinite(values: Float32Array): boolean {
  for (let i = 0; i < values.length; i++) if (!(Math.abs(values[i]!) < Infinity)) return false;
  return true;
}

/** Samples one after the other. */
export function concatenate(arrays: readonly Float32Array[]): Float32Array {
  if (arrays.length === 1) return arrays[0]!;
  const out = new Float32Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let at = 0;
  for (const array of arrays) {
    out.set(array, at);
    at += array.length;
  }
  return out;
}

// IEEE 754 half precision as bits: JavaScript engines only begin to have Float16Array

const word = new Uint32Array(1);
const single = new Float32Array(word.buffer);

/** float32 values rounded to the nearest half, ties to even; past 65504 infinity. */
export function toHalf(values: Float32Array): Uint16Array {
  const out = new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) {
    single[0] = values[i]!;
    const sign = (word[0]! >>> 16) & 0x8000;
    const magnitude = word[0]! & 0x7fffffff;
    let half: number;
    if (magnitude > 0x7f800000)
      half = 0x7e00; // NaN
    else if (magnitude >= 0x47800000)
      half = 0x7c00; // 65536 and above
    else if (magnitude >= 0x38800000) {
      // 2^-14 and above: a carry out of the fraction rightly raises the exponent, up to infinity
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13;
    } else {
      // subnormal: adding 0.5 leaves the fraction in units of 2^-24, rounded by the float32 addition itself
      single[0] = Math.abs(values[i]!) + 0.5;
      half = word[0]! - 0x3f000000;
    }
    out[i] = sign | half;
  }
  return out;
}

/** Halves to float32, exactly. */
export function fromHalf(halves: Uint16Array): Float32Array {
  const out = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const bits = halves[i]!;
    const exponent = (bits >>> 10) & 0x1f;
    const fraction = bits & 0x3ff;
    const sign = bits & 0x8000 ? -1 : 1;
    if (exponent === 31) out[i] = fraction ? NaN : sign * Infinity;
    else out[i] = sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
  }
  return out;
}
