/** Python's reader and this one refuse the same: fixtures/refused.json, made by tests/runtime/golden_refused.py. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { FewstepError, checkGraph, parseJson, readManifest, readPlan } from "../src/index.js";
import { checkPaths } from "../src/paths.js";

type Verdict = string | null;
type Place = (string | number)[];
interface Refused {
  manifest: object;
  manifests: [Place, [string | null, Verdict][]][];
  plan: object;
  plans: [Place, [string | null, Verdict][]][];
  paths: [string[], Verdict][];
  texts: [string, Verdict][];
  graphs: [string, Record<string, number>, Verdict][];
}
const ROOT = new URL("../../../../", import.meta.url);
const file = readFileSync(new URL("runtime/web/tests/fixtures/refused.json", ROOT), "utf-8");
const refused = JSON.parse(file) as Refused;

/** What this reader found wrong; null where nothing was. */
function verdict(read: () => unknown): Verdict {
  try {
    read();
  } catch (error) {
    if (!(error instanceof FewstepError)) throw error;
    return error.found;
  }
  return null;
}

/** The text with a value replaced by a literal, or (null) left out. */
function edited(base: object, place: Place, literal: string | null): Uint8Array {
  const data = structuredClone(base);
  const last = place.at(-1)!;
  const inside = place.slice(0, -1).reduce<unknown>((at, key) => (at as Record<string, unknown>)[key], data);
  const target = inside as Record<string | number, unknown>;
  if (literal !== null) target[last] = "@@";
  else if (Array.isArray(inside)) inside.splice(Number(last), 1);
  else delete target[last];
  return new TextEncoder().encode(JSON.stringify(data).replace('"@@"', () => literal ?? ""));
}

/** What is wrong without the value that is shown, which each language writes its own way. */
const field = (found: Verdict): Verdict =>
  found && found.replace(/^.* steps$/, "steps").split(/ is | has | reads | with |version |policy /)[0]!;

/** Numbers past 2^53 are rounded here, and a backslash is doubled there. */
const words = (found: Verdict): Verdict =>
  found && found.replaceAll("\\\\", "\\").replace(/\d{17,}|[\d,]{23,}/g, "too many");

const decode = (base64: string): Uint8Array => new Uint8Array(Buffer.from(base64, "base64"));

for (const [name, base, edits, read] of [
  ["manifest.json", refused.manifest, refused.manifests, readManifest],
  ["plan", refused.plan, refused.plans, readPlan],
] as const)
  test(`a ${name} changed anywhere is taken or refused as Python does, naming the same field`, () => {
    for (const [place, tries] of edits)
      for (const [literal, expected] of tries) {
        const found = verdict(() => read(parseJson(edited(base, place, literal), name)));
        const where = `${place.join(".")} = ${literal}`;
        if (expected === null) assert.equal(found, null, where);
        else assert.equal(field(found), field(expected), `${where}: ${found} | ${expected}`);
      }
  });

test("the base of these changes is taken", () => {
  const bytes = (base: object): Uint8Array => new TextEncoder().encode(JSON.stringify(base));
  readPlan(parseJson(bytes(refused.plan), "plan"));
  readManifest(parseJson(bytes(refused.manifest), "manifest.json"));
});

test("lists of files are refused as Python does", () => {
  for (const [paths, expected] of refused.paths)
    assert.equal(verdict(() => checkPaths(paths)) === null, expected === null, JSON.stringify(paths));
});

test("JSON is refused as Python does", () => {
  for (const [text, expected] of refused.texts) {
    const found = verdict(() => parseJson(decode(text), "x.json"));
    assert.equal(found === null, expected === null, `${Buffer.from(text, "base64").toString("latin1")}: ${found}`);
  }
});

test("graphs are refused as Python does, in the same words", () => {
  for (const [data, beside, expected] of refused.graphs) {
    const found = verdict(() => checkGraph("model.onnx", decode(data), new Map(Object.entries(beside))));
    // of the several faults of a randomly damaged graph, another may come first
    if ("other" in beside) assert.equal(words(found), words(expected));
    else assert.equal(found === null, expected === null, `${found} | ${expected}`);
  }
});

test("a graph cut short anywhere is refused", () => {
  const whole = decode(refused.graphs[0]![0]);
  for (let size = 0; size < whole.length; size++)
    assert.notEqual(
      verdict(() => checkGraph("model.onnx", whole.subarray(0, size), new Map())),
      null,
      `${size} bytes`,
    );
});

test("more than 16 MB of JSON are refused unread", () => {
  assert.throws(
    () => parseJson(new Uint8Array(16 * 1024 * 1024 + 1), "x.json"),
    /16,777,217 bytes of JSON; expected at most/,
  );
});
