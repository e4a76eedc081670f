/**
 * tokenizer.json is a small program: it names components, patterns and sizes. Only the components CLIP needs are let
 * through, as runtime/backends/tokenizers.py does.
 */

import { FewstepError, count, quoted } from "./errors.js";
import { type Json, type JsonObject, isObject, shown } from "./strictjson.js";

/** CLIP has 49,408; ids beyond a million would only make tables large. */
const MAX_TOKENS = 1 << 20;
/** Characters of one token; CLIP's longest has 20. */
const MAX_TOKEN = 512;
/** Added tokens: two specials and what textual inversion added. */
const MAX_ADDED = 10_000;

/** White space as the regular expressions of tokenizers have it: Unicode's White_Space. */
export const SPACE = "\\t-\\r\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const WORD = String.raw`'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+`;
const MARKS = String.raw`<\|startoftext\|>|<\|endoftext\|>|`;
/** Regular expressions that are let through, none of which can backtrack without end -> the same here. */
const PATTERNS = new Map(
  // openai/clip-vit-large-patch14/tokenizer.json, and transformers 5, CLIPTokenizer
  [String.raw`\s+`, WORD, MARKS + WORD].map((pattern) => [
    pattern,
    new RegExp(pattern === String.raw`\s+` ? `[${SPACE}]+` : pattern.replace("\\s", SPACE), "gu"),
  ]),
);

export type Component =
  | { type: "NFC" | "Lowercase" }
  | { type: "Replace"; pattern: RegExp }
  | { type: "Split"; pattern: RegExp; behavior: "Removed" | "Isolated"; invert: boolean }
  | { type: "ByteLevel"; useRegex: boolean };

export interface AddedToken {
  id: number;
  content: string;
  singleWord: boolean;
  lstrip: boolean;
  rstrip: boolean;
  normalized: boolean;
}

export interface TokenizerFile {
  normalizers: Component[];
  preTokenizers: Component[];
  added: AddedToken[];
  vocab: Map<string, number>;
  /** "left right" -> rank. */
  merges: Map<string, number>;
  endOfWord: string;
  unknown: string | undefined;
  fuseUnknown: boolean;
  byteFallback: boolean;
  ignoreMerges: boolean;
  start: number;
  end: number;
}

// component -> its other fields and what they may hold; null stands for a value checked by hand
const BOOL = [true, false];
type Fields = Record<string, readonly Json[] | null>;
const COMPONENTS: Record<string, Record<string, Fields>> = {
  normalizer: {
    Sequence: { normalizers: null },
    NFC: {},
    Lowercase: {},
    Replace: { pattern: null, content: [" "] },
  },
  pre_tokenizer: {
    Sequence: { pretokenizers: null },
    Split: { pattern: null, behavior: ["Removed", "Isolated"], invert: BOOL },
    ByteLevel: { add_prefix_space: [false], trim_offsets: BOOL, use_regex: BOOL },
  },
  post_processor: {
    RobertaProcessing: { sep: null, cls: null, trim_offsets: BOOL, add_prefix_space: BOOL },
  },
};
const MODEL: Fields = {
  dropout: [null],
  unk_token: null,
  continuing_subword_prefix: ["", null],
  end_of_word_suffix: ["</w>", "", null],
  fuse_unk: BOOL,
  byte_fallback: BOOL,
  ignore_merges: BOOL,
  vocab: null,
  merges: null,
};
const FLAGS = ["single_word", "lstrip", "rstrip", "normalized", "special"];

/** Read tokenizer.json as `parseJson` gives it. Throws FewstepError naming what is not CLIP's kind. */
export function readTokenizerFile(data: Json, where: string): TokenizerFile {
  const refuse = (found: string, expected = "what CLIP's tokenizer needs"): never => {
    throw new FewstepError("bundle", `${where}: ${found}`, expected, "export the bundle again");
  };
  const keys = (what: string, found: Json | undefined, known: string[], needed: string[]): JsonObject => {
    if (!isObject(found)) return refuse(`${what} is no object`, "an object");
    const odd = [
      ...Object.keys(found).filter((key) => !known.includes(key)),
      ...needed.filter((key) => !(key in found)),
    ].sort()[0];
    return odd === undefined ? found : refuse(`${what}: unknown or missing field ${quoted(odd, 40)}`);
  };
  /** A component and those inside it, in order. */
  const components = (role: string, found: Json | undefined, depth = 0): Component[] => {
    const kind = isObject(found) && typeof found["type"] === "string" ? found["type"] : "";
    const known = COMPONENTS[role]!;
    if (!isObject(found) || !Object.hasOwn(known, kind) || depth > 2)
      return refuse(`${role} ${quoted(kind, 40)}`, Object.keys(known).join(", "));
    const fields = known[kind]!;
    const names = ["type", ...Object.keys(fields)];
    keys(
      `${role} ${kind}`,
      found,
      names,
      names.filter((name) => name !== "use_regex"),
    ); // not in files before 2022
    for (const [name, allowed] of Object.entries(fields))
      if (allowed && name in found && !allowed.includes(found[name]!))
        refuse(`${role} ${kind}: ${name} is ${shown(found[name])}`);
    const inner = found["normalizers"] ?? found["pretokenizers"];
    if (kind === "Sequence") {
      if (!Array.isArray(inner) || inner.length > 8) return refuse(`${role} Sequence`, "a short list");
      return inner.flatMap((part) => components(role, part, depth + 1));
    }
    if (kind === "ByteLevel") return [{ type: kind, useRegex: found["use_regex"] !== false }];
    if (kind !== "Replace" && kind !== "Split") return [{ type: kind } as Component];
    const source =
      isObject(found["pattern"]) && Object.keys(found["pattern"]).join() === "Regex" && found["pattern"]["Regex"];
    const pattern = typeof source === "string" ? PATTERNS.get(source) : undefined;
    if (!pattern) return refuse(`${role} ${kind}: pattern ${shown(source || null)}`, "one of CLIP's patterns");
    if (kind === "Replace") return [{ type: kind, pattern }];
    return [{ type: kind, pattern, behavior: found["behavior"], invert: found["invert"] } as Component];
  };

  const top = ["version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model"];
  const file = keys("the file", data, [...top, "truncation", "padding", "decoder"], top);
  if (file["version"] !== "1.0") refuse(`version ${shown(file["version"])}`, "1.0");
  const normalizers = components("normalizer", file["normalizer"]);
  const preTokenizers = components("pre_tokenizer", file["pre_tokenizer"]);
  components("post_processor", file["post_processor"]);

  const model = keys("model", file["model"], ["type", ...Object.keys(MODEL)], ["vocab", "merges"]);
  if ((model["type"] ?? "BPE") !== "BPE") refuse(`model ${shown(model["type"])}`, "BPE");
  for (const [name, options] of Object.entries(MODEL))
    if (options && name in model && !options.includes(model[name]!)) refuse(`model: ${name} is ${shown(model[name])}`);

  const vocab = model["vocab"];
  if (!isObject(vocab)) return refuse("vocab is no object");
  const ids = new Map<string, Json>(Object.entries(vocab));
  const tokens = file["added_tokens"];
  if (!Array.isArray(tokens) || tokens.length > MAX_ADDED)
    return refuse("added_tokens", `a list of at most ${count(MAX_ADDED)}`);
  const added = tokens.map((item): AddedToken => {
    const names = ["id", "content", ...FLAGS];
    const token = keys("an added token", item, names, names);
    const { id, content } = token;
    if (typeof content !== "string" || id === undefined) return refuse("an added token without text");
    if (!ids.has(content)) ids.set(content, id);
    if (ids.get(content) !== id) refuse(`added token ${quoted(content, 40)} has another id in the vocabulary`);
    if (!FLAGS.every((flag) => typeof token[flag] === "boolean"))
      refuse(`added token ${quoted(content, 40)}`, "true or false for its flags");
    const [singleWord, lstrip, rstrip, normalized] = FLAGS.map((flag) => token[flag]) as boolean[];
    return { id: Number(id), content, singleWord, lstrip, rstrip, normalized } as AddedToken;
  });
  const whole = [...ids.values()].every((id) => typeof id === "bigint");
  if (ids.size === 0 || ids.size > MAX_TOKENS || !whole)
    refuse(`${count(ids.size)} tokens, or ids that are no whole numbers`, `1 to ${count(MAX_TOKENS)}`);
  const numbers = new Map([...ids].map(([token, id]) => [token, Number(id)]));
  const different = new Set(numbers.values());
  if (different.size < ids.size || [...different].some((id) => id < 0 || id >= ids.size))
    refuse(`the ids of ${count(ids.size)} tokens`, "each id from 0 on exactly once");
  for (const token of ids.keys()) {
    const length = token.length > MAX_TOKEN ? [...token].length : token.length;
    if (length === 0 || length > MAX_TOKEN) refuse(`a token of ${count(length)} characters`, `1 to ${MAX_TOKEN}`);
  }
  const unknown = model["unk_token"] ?? null;
  if (unknown !== null && (typeof unknown !== "string" || !numbers.has(unknown)))
    refuse(`unk_token ${shown(unknown)} is not in the vocabulary`);

  const merges = model["merges"];
  if (!Array.isArray(merges) || merges.length > MAX_TOKENS) return refuse("merges", "a list");
  const ranks = new Map<string, number>();
  for (const [i, merge] of merges.entries()) {
    const pair = typeof merge === "string" ? merge.split(" ") : merge;
    if (!Array.isArray(pair) || pair.length !== 2 || !pair.every((part) => typeof part === "string"))
      return refuse(`merge ${i}`, "two tokens");
    for (const token of [...pair, pair.join("")] as string[])
      if (!numbers.has(token)) refuse(`merge ${i} needs ${quoted(token, 40)}, which is not in the vocabulary`);
    ranks.set(pair.join("\0"), i);
  }
  const [start, end] = ["cls", "sep"].map((name) => {
    const pair = (file["post_processor"] as JsonObject)[name];
    const good =
      Array.isArray(pair) && pair.length === 2 && typeof pair[0] === "string" && ids.get(pair[0]) === pair[1];
    return good ? Number(pair[1]) : refuse(`post_processor ${name}`, "a token of the vocabulary and its id");
  }) as [number, number];
  return {
    normalizers,
    preTokenizers,
    added,
    vocab: numbers,
    merges: ranks,
    endOfWord: (model["end_of_word_suffix"] as string | null | undefined) ?? "",
    unknown: (unknown as string | null) ?? undefined,
    fuseUnknown: model["fuse_unk"] === true,
    byteFallback: model["byte_fallback"] === true,
    ignoreMerges: model["ignore_merges"] === true,
    start,
    end,
  };
}
