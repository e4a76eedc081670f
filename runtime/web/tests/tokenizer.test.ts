/** Token ids are those of Hugging Face's tokenizers: fixtures/tokens.json, made by tests/runtime/golden_tokens.py. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { type Json, type JsonObject, openTokenizer, parseJson } from "../src/index.js";
import { plain } from "../src/strictjson.js";

const ROOT = new URL("../../../../", import.meta.url);
const fixture = parseJson(
  readFileSync(new URL("runtime/web/tests/fixtures/tokens.json", ROOT)),
  "tokens.json",
) as JsonObject;
const spec = { file: "tokenizer/tokenizer.json", max_length: Number(fixture["max_length"]) };

interface Case {
  name: string;
  pad_id: number;
  prompts: string[];
  tokens: [ids: number[], truncated: number][];
}

function load(tokenizer: Json): Json {
  if (typeof tokenizer !== "string") return tokenizer;
  return parseJson(readFileSync(new URL(tokenizer, ROOT)), tokenizer);
}

for (const one of fixture["cases"] as JsonObject[]) {
  const { name, pad_id, prompts, tokens } = plain(one) as unknown as Case;
  test(`${name}: ${prompts.length} prompts have the ids of Hugging Face's tokenizers`, () => {
    const encode = openTokenizer(load(one["tokenizer"]!), { ...spec, pad_id }, "tokenizer.json");
    for (const [i, prompt] of prompts.entries()) {
      const [ids, truncated] = tokens[i]!;
      const padded = [...ids, ...Array<number>(spec.max_length - ids.length).fill(pad_id)];
      assert.deepEqual(encode(prompt), { ids: padded, truncated }, JSON.stringify(prompt));
    }
  });
}

const emoji = openTokenizer(load("models/emoji-64/tokenizer/tokenizer.json"), { ...spec, pad_id: 0 }, "tokenizer.json");

test("a very long word does not take long", () => {
  const { truncated } = emoji("ab".repeat(50_000));
  assert.ok(truncated > 0);
});

test("half a surrogate pair is refused", () => {
  assert.throws(() => emoji("a\ud800b"), /half a surrogate pair.*; fix: remove that character/);
});
