/**
 * A gate for ONNX files: what a stranger's graph must be before a native parser sees a byte of it. Only the structure
 * is read. The rules, and what each stands against, are in runtime/spec/bundle.md.
 */

import { FewstepError, count, quoted } from "./errors.js";
import {
  ATTRIBUTE,
  DIM,
  ENTRY,
  type Field,
  GRAPH,
  MAX_DIMS,
  MODEL,
  NODE,
  OPSET,
  SHAPE,
  TENSOR,
  TENSOR_TYPE,
  TYPE,
  VALUE,
  Wire,
} from "./onnxproto.js";

/** From initializers that are no inputs (4) to the newest that ONNX Runtime 1.31 loads (13). */
const IR_VERSIONS = [4, 13] as const;
/** Operator domains and their versions: what ONNX Runtime 1.31 supports. */
const OPSETS = new Map<string, readonly [number, number]>([
  ["", [7, 26]],
  ["ai.onnx", [7, 26]],
  ["com.microsoft", [1, 1]],
]);
/** Control flow (a Loop of 2^62 turns hangs at loading), and nodes that open another file. */
const FORBIDDEN_OPS = ["If", "Loop", "Scan", "SequenceMap", "EPContext"];
/** Protobuf cannot hold more. */
const MAX_FILE = 2 ** 31 - 1;
/** TensorProto.DataType -> bits of an element; strings, complex numbers and 6-bit floats have no place here. */
const BITS: Record<number, number> = {
  1: 32,
  2: 8,
  3: 8,
  4: 16,
  5: 16,
  6: 32,
  7: 64,
  9: 8,
  10: 16,
  11: 64,
  12: 32,
  13: 64,
};
Object.assign(BITS, { 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2 });
/** The typed list that may hold a type, when the values are not raw bytes; int32_data for the rest. */
const TYPED: Record<number, string> = {
  1: "float_data",
  11: "double_data",
  7: "int64_data",
  12: "uint64_data",
  13: "uint64_data",
};
const FIXED: Record<string, number> = { float_data: 4, double_data: 8 };

interface Checked {
  wire: Wire;
  /** Files that may hold external data -> their size. */
  beside: ReadonlyMap<string, number>;
  /** The one that does. */
  external: string | undefined;
  /** [start, end, tensor] in it. */
  ranges: [number, number, string][];
}

/**
 * Refuse an ONNX file that is damaged, or would make an engine read, compute or allocate what it must not.
 * beside: the other files of its folder that may hold its external data, with their sizes.
 * Returns the name of the one that does. Throws FewstepError naming the node or tensor.
 */
export function checkGraph(name: string, data: Uint8Array, beside: ReadonlyMap<string, number>): string | undefined {
  const wire = new Wire(name, data);
  if (data.length < 1 || data.length > MAX_FILE) wire.refuse(`${count(data.length)} bytes`, `1 to ${count(MAX_FILE)}`);
  const begin = new TextDecoder("latin1").decode(data.subarray(0, 23));
  if (begin === "version https://git-lfs")
    throw new FewstepError("bundle", `${name} is a Git LFS pointer, not the file itself`, "", "git lfs pull");
  if (begin.startsWith("<"))
    throw new FewstepError("bundle", `${name} is a web page, not a graph`, "", "download it again");
  const file: Checked = { wire, beside, external: undefined, ranges: [] };
  checkModel(file);
  checkOverlaps(file);
  return file.external;
}

function checkModel(f: Checked): void {
  let irVersion = 0;
  let graph: Field | undefined;
  const opsets = new Map<string, number>();
  for (const field of f.wire.fields(0, f.wire.data.length, MODEL)) {
    const [name, a, b] = field;
    if (name === "ir_version") irVersion = a;
    else if (name === "graph") graph = field;
    else if (name === "opset_import") {
      let domain = "";
      let version = 0;
      for (const [key, start, end] of f.wire.fields(a, b, OPSET))
        if (key === "domain") domain = f.wire.text(start, end);
        else version = start;
      if (opsets.has(domain)) f.wire.refuse(`operator set ${quoted(domain)} is imported twice`);
      opsets.set(domain, version);
    } else if (["functions", "training_info", "configuration"].includes(name))
      f.wire.refuse(`the model holds ${name}`, "one graph of operators");
  }
  const [oldest, newest] = IR_VERSIONS;
  if (irVersion < oldest || irVersion > newest) f.wire.refuse(`IR version ${irVersion}`, `${oldest} to ${newest}`);
  for (const [domain, version] of opsets) {
    const known = OPSETS.get(domain);
    if (known && (version < known[0] || version > known[1]))
      f.wire.refuse(`operator set ${domain || "ai.onnx"} ${version}`, `${known[0]} to ${known[1]}`);
  }
  if (!graph) f.wire.refuse("it has no graph");
  const names = new Set<string>();
  for (const [name, a, b] of f.wire.fields(graph[1], graph[2], GRAPH)) {
    if (name === "node") checkNode(f, a, b, opsets);
    else if (name === "initializer") {
      const tensor = checkTensor(f, a, b, "");
      if (names.has(tensor)) f.wire.refuse(`tensor ${quoted(tensor)} is given twice`);
      names.add(tensor);
    } else if (name === "value") checkValue(f, a, b);
    else if (name === "sparse") f.wire.refuse("a sparse tensor", "dense tensors");
  }
}

function checkNode(f: Checked, start: number, end: number, opsets: ReadonlyMap<string, number>): void {
  let [label, op, domain] = ["", "", ""];
  const attributes: Field[] = [];
  for (const field of f.wire.fields(start, end, NODE)) {
    const [name, a, b] = field;
    if (name === "attribute") attributes.push(field);
    else if (name === "op_type") op = f.wire.text(a, b);
    else if (name === "domain") domain = f.wire.text(a, b);
    else if (name === "name") label = f.wire.text(a, b);
    else if (name === "input" || name === "output") f.wire.text(a, b);
    else if (name === "overload" && b > a) f.wire.refuse(`node ${quoted(label)} calls a function`);
  }
  const where = `node ${quoted(label)} (${op.slice(0, 80)})`;
  if (!OPSETS.has(domain))
    f.wire.refuse(`${where} is of the operator set ${quoted(domain)}`, "ai.onnx or com.microsoft");
  const onnx = domain !== "com.microsoft" && (opsets.has("") || opsets.has("ai.onnx"));
  if (!opsets.has(domain) && !onnx) f.wire.refuse(`${where}: its operator set ${domain || "ai.onnx"} is not imported`);
  if (FORBIDDEN_OPS.includes(op)) f.wire.refuse(where, "no control flow and no embedded engine contexts");
  for (const [, a, b] of attributes)
    for (const [name, from, to] of f.wire.fields(a, b, ATTRIBUTE)) {
      if (name === "name") f.wire.text(from, to);
      else if (name === "tensor") checkTensor(f, from, to, where);
      else if (["graph", "sparse", "type_proto", "reference"].includes(name))
        f.wire.refuse(`${where} has an attribute that holds a ${name}`, "numbers, text and dense tensors");
    }
}

/** An input, output or intermediate value: a tensor whose fixed sizes an engine could allocate. */
function checkValue(f: Checked, start: number, end: number): void {
  const { wire } = f;
  const fields = wire.fields(start, end, VALUE);
  const named = fields.find(([name]) => name === "name");
  const where = `value ${quoted(named ? wire.text(named[1], named[2]) : "")}`;
  for (const [, a, b] of fields.filter(([name]) => name === "type"))
    for (const [, c, d] of wire.fields(a, b, TYPE).filter(([name]) => name === "tensor"))
      for (const [, from, to] of wire.fields(c, d, TENSOR_TYPE).filter(([name]) => name === "shape")) {
        const sizes = wire.fields(from, to, SHAPE).flatMap(([, dim, stop]) => wire.fields(dim, stop, DIM));
        checkDims(
          f,
          sizes.filter(([name]) => name === "value").map(([, value]) => value),
          8,
          where,
        );
      }
}

/** Bytes of a tensor; refuses what no memory holds. Past 2^53 a product is rounded, and refused anyway. */
function checkDims(f: Checked, dims: number[], bits: number, where: string): number {
  if (dims.length > MAX_DIMS) f.wire.refuse(`${where} has ${count(dims.length)} dimensions`, `at most ${MAX_DIMS}`);
  if (dims.some((size) => size >= 2 ** 63)) f.wire.refuse(`${where} has a negative size`, "0 or more");
  const size = Math.ceil((elements(dims) * bits) / 8);
  if (size > 2 ** 40)
    f.wire.refuse(`${where} of shape [${dims.join(", ")}] needs ${count(size)} bytes`, `at most ${count(2 ** 40)}`);
  return size;
}

const elements = (dims: number[]): number => (dims.includes(0) ? 0 : dims.reduce((n, size) => n * size, 1));

/** One tensor with its values, inline or in the data file. Returns its name. */
function checkTensor(f: Checked, start: number, end: number, owner: string): string {
  let [label, kind, location] = ["", 0, 0];
  let raw: number | undefined;
  const dims: number[] = [];
  const typed = new Map<string, number>();
  const external = new Map<string, string>();
  for (const [name, a, b] of f.wire.fields(start, end, TENSOR)) {
    if (name === "dims") dims.push(...(b >= 0 ? f.wire.numbers(a, b) : [a]));
    else if (name === "data_type") kind = a;
    else if (name === "name") label = f.wire.text(a, b);
    else if (name === "data_location") location = a;
    else if (name === "raw_data") raw = b - a;
    else if (name === "external_data") {
      const entry = new Map(f.wire.fields(a, b, ENTRY).map(([key, s, e]) => [key, f.wire.text(s, e)]));
      const key = entry.get("key") ?? "";
      if (external.has(key)) f.wire.refuse(`tensor ${quoted(label)}: external data key ${quoted(key)} is given twice`);
      external.set(key, entry.get("value") ?? "");
    } else if (name.endsWith("_data")) typed.set(name, (typed.get(name) ?? 0) + countValues(f, name, a, b));
  }
  const where = `tensor ${quoted(label)}` + (owner && ` of ${owner}`);
  const bits = BITS[kind] ?? f.wire.refuse(`${where} has element type ${kind}`, "a number type of ONNX");
  const size = checkDims(f, dims, bits, where);
  const shape = `${where} of shape [${dims.join(", ")}]`;
  if (location !== 0 && location !== 1)
    f.wire.refuse(`${where} has data location ${location}`, "0 (here) or 1 (in the data file)");
  if (location === 1) {
    if (raw !== undefined || typed.size) f.wire.refuse(`${where} has its values here and in a data file`, "one place");
    checkExternal(f, external, size, where);
  } else if (external.size) f.wire.refuse(`${where} names a data file without using it`);
  else if (raw !== undefined) {
    if (typed.size || raw !== size) f.wire.refuse(`${shape} holds ${count(raw)} bytes`, count(size));
  } else {
    // int32_data holds one element an entry, or as many 4- and 2-bit ones as fill a byte
    const entries = bits < 8 ? size : elements(dims);
    const list = TYPED[kind] ?? "int32_data";
    const others = [...typed].some(([name, n]) => n > 0 && name !== list);
    if (others || (typed.get(list) ?? 0) !== entries) {
      const found = [...typed].map(([name, n]) => `${count(n)} in ${name}`).join(", ") || "no values";
      f.wire.refuse(`${shape} holds ${found}`, `${count(entries)} values`);
    }
  }
  return label;
}

/** Values of a typed list. */
function countValues(f: Checked, name: string, a: number, b: number): number {
  if (b < 0) return 1;
  const width = FIXED[name];
  if (width === undefined) return f.wire.varints(a, b);
  if ((b - a) % width) f.wire.refuse(`${name} at byte ${a} ends inside a value`);
  return (b - a) / width;
}

/** The values lie in the one data file beside the graph, inside it, and are as long as the shape says. */
function checkExternal(f: Checked, external: ReadonlyMap<string, string>, size: number, where: string): void {
  const name = external.get("location") ?? "";
  const bytes = f.beside.get(name);
  if (bytes === undefined || !/^[^/\\*:]+$/.test(name) || name === "." || name === "..") {
    const known = [...f.beside.keys()].sort().join(", ");
    f.wire.refuse(`${where} lies in ${quoted(name)}`, `a data file of the bundle beside the graph: ${known}`);
  }
  for (const key of external.keys())
    if (!["location", "offset", "length", "checksum"].includes(key))
      f.wire.refuse(`${where}: unknown external data key ${quoted(key)}`);
  f.external ??= name;
  if (f.external !== name) f.wire.refuse(`${where} lies in ${quoted(name)}`, `one data file for all: ${f.external}`);
  const [offset, length] = [external.get("offset") ?? "0", external.get("length") ?? ""];
  if (![offset, length].every((number) => /^[0-9]{1,19}$/.test(number)))
    f.wire.refuse(`${where}: offset ${quoted(offset, 40)}, length ${quoted(length, 40)}`, "whole numbers");
  if (Number(length) !== size)
    f.wire.refuse(`${where}: ${count(Number(length))} bytes of external data`, `${count(size)} for its shape`);
  const begin = Number(offset);
  if (begin + size > bytes)
    f.wire.refuse(`${where} ends at byte ${count(begin + size)} of ${name}`, `at most ${count(bytes)}, its size`);
  if (size) f.ranges.push([begin, begin + size, where]);
}

/** Two tensors may share their bytes entirely (tied weights) but not in part. */
function checkOverlaps(f: Checked): void {
  f.ranges.sort(([a, b], [c, d]) => a - c || b - d);
  for (const [i, [start, stop, other]] of f.ranges.entries()) {
    const before = f.ranges[i - 1];
    if (before && start < before[1] && (start !== before[0] || stop !== before[1]))
      f.wire.refuse(`${before[2]} and ${other} overlap in the data file`, "separate or identical ranges");
  }
}
