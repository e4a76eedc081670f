/** JSON read as data from a stranger: everything JSON.parse lets through by kindness is refused here. */

import { FewstepError, count, quoted } from "./errors.js";

/** Whole numbers are bigint and others number, because 4 and 4.0 are different things in a manifest. */
export type Json = null | boolean | string | number | bigint | Json[] | JsonObject;
/** Without a prototype: a key may be "__proto__". */
export type JsonObject = { [key: string]: Json };

/** A manifest is tens of kilobytes, the largest CLIP tokenizer 4 MB. */
export const MAX_BYTES = 16 * 1024 * 1024;
/** A manifest nests 6 deep; this leaves room for reports and keeps every recursion short. */
const MAX_DEPTH = 32;
const MAX_INT = 2n ** 64n - 1n;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const ESCAPES: Record<string, string> = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
export const LONE_SURROGATE = /\p{Surrogate}/u;

/**
 * Parse UTF-8 JSON; `where` names it in errors. Throws FewstepError for more than 16 MB, bytes that are not UTF-8, a
 * syntax error, a key given twice, numbers beyond 64 bits or the range of a double, nesting deeper than 32 and lone
 * surrogates.
 */
export function parseJson(bytes: Uint8Array, where: string): Json {
  const refuse = (found: string, expected = ""): never => {
    throw new FewstepError("bundle", `${where}: ${found}`, expected, "export it again, or download it again");
  };
  if (bytes.length > MAX_BYTES) refuse(`${count(bytes.length)} bytes of JSON`, `at most ${count(MAX_BYTES)}`);
  let text = "";
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    refuse("it is not JSON (not UTF-8)");
  }
  let at = 0;
  const broken = (what: string): never => refuse(`it is not JSON (${what} at character ${at})`);

  const space = (): void => {
    while (at < text.length && " \t\n\r".includes(text[at]!)) at++;
  };
  const take = (pattern: RegExp): RegExpExecArray | null => {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match) at = pattern.lastIndex;
    return match;
  };
  const string = (): string => {
    let value = "";
    for (at++; ;) {
      value += take(PLAIN)![0];
      const next = text[at++];
      if (next === '"') break;
      if (next !== "\\") broken("a text without end");
      const code = text[at++] ?? "";
      if (code === "u") {
        const hex = text.slice(at, at + 4);
        if (!/^[0-9a-fA-F]{4}$/.test(hex)) broken("an escape that is none");
        value += String.fromCharCode(parseInt(hex, 16));
        at += 4;
      } else value += ESCAPES[code] ?? broken("an escape that is none");
    }
    if (LONE_SURROGATE.test(value)) refuse(`lone surrogate in ${quoted(value, 40)}`, "valid Unicode");
    return value;
  };
  const number = (): number | bigint => {
    const match = take(NUMBER);
    if (!match) return refuse(constant() ?? broken("something that is no value"), "finite numbers only");
    const [digits, fraction, exponent] = match;
    if (fraction !== undefined || exponent !== undefined) {
      const value = Number(digits);
      return Number.isFinite(value) ? value : refuse(`the number ${digits.slice(0, 40)}`, "finite numbers only");
    }
    const value = digits.length > 20 ? MAX_INT + 1n : BigInt(digits);
    const fits = -MAX_INT <= value && value <= MAX_INT;
    return fits ? value : refuse(`the number ${digits.slice(0, 40)}`, "at most 64 bits");
  };
  const constant = (): string | undefined => {
    const found = /^(NaN|-?Infinity)/.exec(text.slice(at, at + 9));
    return found ? `the number ${found[0]}` : undefined;
  };
  const word = (name: string, value: Json): Json => {
    if (!text.startsWith(name, at)) broken("something that is no value");
    at += name.length;
    return value;
  };
  const list = (depth: number): Json[] => {
    const items: Json[] = [];
    for (at++, space(); text[at] !== "]";) {
      items.push(value(depth));
      if (text[at] === "]") break;
      if (text[at++] !== ",") broken("a list without end");
      space();
      if (text[at] === "]") broken("a comma too many");
    }
    at++;
    return items;
  };
  const object = (depth: number): JsonObject => {
    const items = Object.create(null) as JsonObject;
    for (at++, space(); text[at] !== "}";) {
      if (text[at] !== '"') broken("an object without end");
      const key = string();
      if (key in items) refuse(`key ${quoted(key)} appears twice in one object`);
      space();
      if (text[at++] !== ":") broken("a key without value");
      items[key] = value(depth);
      if (text[at] === "}") break;
      if (text[at++] !== ",") broken("an object without end");
      space();
      if (text[at] === "}") broken("a comma too many");
    }
    at++;
    return items;
  };
  /** One value with the space around it. */
  const value = (depth: number): Json => {
    if (depth >= MAX_DEPTH + 1) refuse("its JSON is nested too deeply", `at most ${MAX_DEPTH} levels`);
    space();
    const first = text[at];
    let found: Json;
    if (first === "{") found = object(depth + 1);
    else if (first === "[") found = list(depth + 1);
    else if (first === '"') found = string();
    else if (first === "t") found = word("true", true);
    else if (first === "f") found = word("false", false);
    else if (first === "n") found = word("null", null);
    else found = number();
    space();
    return found;
  };

  space();
  if (at === text.length) refuse("the file is empty", "JSON");
  const found = value(1);
  if (at < text.length) broken("something after the end");
  return found;
}

export function isObject(value: Json | undefined): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The same with whole numbers as number too, for what is not checked further. */
export function plain(value: Json): Json {
  if (typeof value === "bigint") return Number(value);
  if (Array.isArray(value)) return value.map(plain);
  if (!isObject(value)) return value;
  const result = Object.create(null) as JsonObject;
  for (const [key, item] of Object.entries(value)) result[key] = plain(item);
  return result;
}

/** A check of one value that says what it is: `where` names it in errors. */
export type Reader<T> = (value: Json, where: string) => T;
/** What a reader returns. */
export type Read<R> = R extends Reader<infer T> ? T : never;

/** A value as an error shows it: in a few characters. */
export function shown(value: Json | undefined): string {
  const full = typeof value === "string" ? quoted(value) : (JSON.stringify(plain(value ?? null)) ?? "");
  return full.length <= 60 ? full : full.slice(0, 57) + "...";
}

export function wrong(value: Json, expected: string, where: string): never {
  throw new FewstepError("bundle", `${where} is ${shown(value)}`, expected, "export the bundle again");
}

export const raw: Reader<Json> = (v) => v;
export const anything: Reader<Json> = plain;
export const text: Reader<string> = (v, where) => (typeof v === "string" ? v : wrong(v, "text", where));
export const flag: Reader<boolean> = (v, where) => (typeof v === "boolean" ? v : wrong(v, "true or false", where));
export const whole: Reader<number> = (v, where) =>
  typeof v === "bigint" ? Number(v) : wrong(v, "a whole number", where);
export const real: Reader<number> = (v, where) =>
  typeof v === "bigint" || typeof v === "number" ? Number(v) : wrong(v, "a number", where);
export const size: Reader<number | string> = (v, where) =>
  typeof v === "string" ? v : typeof v === "bigint" ? Number(v) : wrong(v, "number or name", where);

export const optional =
  <T>(item: Reader<T>): Reader<T | null> =>
  (v, where) =>
    v === null ? null : item(v, where);

export const list =
  <T>(item: Reader<T>): Reader<T[]> =>
  (v, where) =>
    Array.isArray(v) ? v.map((one, i) => item(one, `${where}[${i}]`)) : wrong(v, "a list", where);

export const mapping =
  <T>(item: Reader<T>): Reader<Record<string, T>> =>
  (v, where) => {
    if (!isObject(v)) return wrong(v, "an object", where);
    const result = Object.create(null) as Record<string, T>;
    for (const [key, one] of Object.entries(v)) result[key] = item(one, `${where}[${quoted(key)}]`);
    return result;
  };

/** An object with all of these fields and no other. */
export const record =
  <F extends Record<string, Reader<unknown>>>(fields: F): Reader<{ [K in keyof F]: Read<F[K]> }> =>
  (v, where) => {
    if (!isObject(v)) return wrong(v, "an object", where);
    const refuse = (found: string, fix: string): never => {
      throw new FewstepError("bundle", `${where}: ${found}`, "", `update fewstep, or ${fix}`);
    };
    for (const name of Object.keys(fields).sort())
      if (!(name in v)) refuse(`no field ${quoted(name)}`, "export the bundle again");
    for (const name of Object.keys(v).sort())
      if (!Object.hasOwn(fields, name)) refuse(`unknown field ${quoted(name)}`, "remove the field");
    const made = Object.entries(fields).map(([name, reader]) => [name, reader(v[name]!, `${where}: ${name}`)]);
    return Object.fromEntries(made) as { [K in keyof F]: Read<F[K]> };
  };
