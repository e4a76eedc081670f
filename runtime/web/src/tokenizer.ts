/** CLIP's tokenizer: text to the ids that Hugging Face's tokenizers gives for the same tokenizer.json. */

import { FewstepError, check, count } from "./errors.js";
import type { TokenizerSpec } from "./manifest.js";
import { type Json, LONE_SURROGATE } from "./strictjson.js";
import { type AddedToken, type Component, SPACE, type TokenizerFile, readTokenizerFile } from "./tokenizerfile.js";

export interface TokenIds {
  /** [max_length]: start, the prompt, end, padding. */
  ids: number[];
  /** Tokens of the prompt that did not fit and were cut off its end. */
  truncated: number;
}
export type Tokenizer = (text: string) => TokenIds;

/** GPT-2's pattern, which ByteLevel applies (Radford et al. 2019, encoder.py). */
const GPT2 = new RegExp(
  `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`,
  "gu",
);

/** GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py, bytes_to_unicode). */
const BYTES = ((): string[] => {
  const printable = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let others = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : others++));
})();

/** Throws FewstepError for a tokenizer.json that is not CLIP's kind. `where` names it. */
export function openTokenizer(data: Json, spec: TokenizerSpec, where: string): Tokenizer {
  const file = readTokenizerFile(data, where);
  if (spec.pad_id >= file.vocab.size)
    throw new FewstepError(
      "bundle",
      `${where} has ${count(file.vocab.size)} tokens, the manifest pads with ${spec.pad_id}`,
      "",
      "export it again",
    );
  const split = addedTokens(file);
  return (text) => {
    check(
      !LONE_SURROGATE.test(text),
      "the prompt holds half a surrogate pair",
      "valid Unicode",
      "remove that character",
    );
    const ids = split(text);
    const room = spec.max_length - 2;
    const kept = [file.start, ...ids.slice(0, room), file.end];
    const padding = Array<number>(spec.max_length - kept.length).fill(spec.pad_id);
    return { ids: [...kept, ...padding], truncated: Math.max(0, ids.length - room) };
  };
}

/**
 * Text to ids. Added tokens are found first: in the text itself those that are not normalized, then in what lies
 * between, normalized, the others.
 */
function addedTokens(file: TokenizerFile): (text: string) => number[] {
  const cache = new Map<string, number[]>();
  const word = (piece: string): number[] => {
    let ids = cache.get(piece);
    if (!ids) cache.set(piece, (ids = bytePairs(file, piece)));
    return ids;
  };
  const normal = (text: string): string => file.normalizers.reduce(normalize, text);
  const words = (text: string): number[] =>
    file.preTokenizers
      .reduce((pieces, component) => pieces.flatMap((p) => preTokenize(p, component)), [text])
      .flatMap(word);
  const inNormalized = finder(
    file.added.filter((token) => token.normalized),
    normal,
  );
  const inText = finder(
    file.added.filter((token) => !token.normalized),
    (content) => content,
  );
  return (text) => {
    cache.clear();
    return inText(text, (between) => inNormalized(normal(between), words));
  };
}

/** Replaces the tokens found in a text, the leftmost and longest, by their ids, and what is between by `rest`. */
function finder(
  tokens: AddedToken[],
  content: (text: string) => string,
): (text: string, rest: (between: string) => number[]) => number[] {
  const byContent = new Map(tokens.map((token) => [content(token.content), token]));
  byContent.delete("");
  const longest = [...byContent.keys()].sort((a, b) => b.length - a.length);
  const escaped = longest.map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  const pattern = new RegExp(escaped.join("|") || "(?!)", "gu");
  return (text, rest) => {
    const ids: number[] = [];
    let at = 0;
    for (const match of text.matchAll(pattern)) {
      const token = byContent.get(match[0])!;
      let [start, end] = [match.index, match.index + match[0].length];
      if (token.singleWord && (WORD_END.test(text.slice(0, start)) || WORD_START.test(text.slice(end)))) continue;
      if (token.lstrip) start = Math.max(at, text.slice(0, start).replace(SPACES_END, "").length);
      if (token.rstrip) end = text.length - text.slice(end).replace(SPACES_START, "").length;
      if (start > at) ids.push(...rest(text.slice(at, start)));
      ids.push(token.id);
      at = end;
    }
    if (at < text.length) ids.push(...rest(text.slice(at)));
    return ids;
  };
}

const WORD_END = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/u;
const WORD_START = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
const SPACES_END = new RegExp(`[${SPACE}]+$`, "u");
const SPACES_START = new RegExp(`^[${SPACE}]+`, "u");

function normalize(text: string, component: Component): string {
  if (component.type === "NFC") return text.normalize("NFC");
  if (component.type === "Replace") return text.replace(component.pattern, " ");
  // one character at a time: a sigma at the end of a word stays an ordinary one
  return Array.from(text, (character) => character.toLowerCase()).join("");
}

function preTokenize(piece: string, component: Component): string[] {
  if (component.type === "ByteLevel") {
    const parts = component.useRegex ? (piece.match(GPT2) ?? []) : [piece];
    return parts.map((part) => Array.from(new TextEncoder().encode(part), (byte) => BYTES[byte]!).join(""));
  }
  if (component.type !== "Split") return [piece];
  const found: string[] = [];
  let at = 0;
  const keep = (text: string, matched: boolean): void => {
    if (text && (component.behavior === "Isolated" || matched === component.invert)) found.push(text);
  };
  for (const match of piece.matchAll(component.pattern)) {
    keep(piece.slice(at, match.index), false);
    keep(match[0], true);
    at = match.index + match[0].length;
  }
  keep(piece.slice(at), false);
  return found;
}

/** Byte pair encoding, Sennrich et al. 2016 <arXiv:1508.07909>: the merge of the lowest rank first, the leftmost. */
function bytePairs(file: TokenizerFile, piece: string): number[] {
  const { vocab, merges } = file;
  if (file.ignoreMerges && vocab.has(piece)) return [vocab.get(piece)!];
  const characters = [...piece];
  let symbols: string[] = [];
  for (const [i, character] of characters.entries()) {
    const symbol = i === characters.length - 1 ? character + file.endOfWord : character;
    const bytes = Array.from(
      new TextEncoder().encode(symbol),
      (b) => `<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`,
    );
    if (vocab.has(symbol)) symbols.push(symbol);
    else if (file.byteFallback && bytes.every((byte) => vocab.has(byte))) symbols.push(...bytes);
    else if (file.unknown !== undefined && !(file.fuseUnknown && symbols.at(-1) === file.unknown))
      symbols.push(file.unknown);
  }
  const rank = (left: string | undefined, right: string | undefined): number =>
    merges.get(`${left}\0${right}`) ?? Infinity;
  for (;;) {
    let best = Infinity;
    for (let i = 0; i + 1 < symbols.length; i++) best = Math.min(best, rank(symbols[i], symbols[i + 1]));
    if (best === Infinity) break;
    // all of this rank in one pass, unless a merge makes one of a lower rank possible, which then goes first
    const merged: string[] = [];
    let lower = false;
    for (let i = 0; i < symbols.length; i++) {
      if (!lower && rank(symbols[i], symbols[i + 1]) === best) {
        const joined = symbols[i]! + symbols[i + 1]!;
        i++;
        lower = rank(merged.at(-1), joined) < best || rank(joined, symbols[i + 1]) < best;
        merged.push(joined);
      } else merged.push(symbols[i]!);
    }
    symbols = merged;
  }
  return symbols.map((symbol) => vocab.get(symbol)!);
}
