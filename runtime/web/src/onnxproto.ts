/** The protobuf of an ONNX file, read strictly and without copying: only what a table of known fields allows. */

import { FewstepError, count } from "./errors.js";

/** Bytes of one name or text that is read. */
const MAX_NAME = 1 << 16;
/** Fields read in all: bounds time to seconds. UNets exported had up to 44,000. */
const MAX_FIELDS = 4_000_000;
/** Numbers of one packed list that is read: dimensions. */
export const MAX_DIMS = 32;

type Message = Map<number, { name: string; once: boolean }>;

/**
 * The known fields of a message: "7L:graph" is number 7, with a length, called graph; V varint, F fixed32, D fixed64.
 * Protobuf parsers skip a field of the wrong wire type and let the last of several win; refusing both means that what
 * is checked is what the engine will see. Field numbers are those of onnx.proto (ONNX 1.23).
 */
function message(once: string, repeated = ""): Message {
  const wires: Record<string, number> = { V: 0, D: 1, L: 2, F: 5 };
  const table: Message = new Map();
  for (const words of [once, repeated])
    for (const word of words.split(/\s+/).filter(Boolean)) {
      const [number, name] = word.split(":") as [string, string];
      table.set((parseInt(number) << 3) | wires[number.at(-1)!]!, { name, once: words === once });
    }
  return table;
}

export const MODEL = message(
  "1V:ir_version 2L:producer_name 3L:producer_version 4L:domain 5V:model_version 6L:doc_string 7L:graph",
  "8L:opset_import 14L:metadata 20L:training_info 25L:functions 26L:configuration",
);
export const OPSET = message("1L:domain 2V:version");
export const GRAPH = message(
  "2L:name 10L:doc_string",
  "1L:node 5L:initializer 15L:sparse 11L:value 12L:value 13L:value 14L:quantization 16L:metadata",
);
export const NODE = message(
  "3L:name 4L:op_type 6L:doc_string 7L:domain 8L:overload",
  "1L:input 2L:output 5L:attribute 9L:metadata",
);
export const ATTRIBUTE = message(
  "1L:name 13L:doc_string 20V:type 2F:f 3V:i 4L:s 5L:tensor 6L:graph 22L:sparse 14L:type_proto 21L:reference",
  "7F:floats 7L:floats 8V:ints 8L:ints 9L:strings 10L:tensor 11L:graph 23L:sparse 15L:type_proto",
);
export const TENSOR = message(
  "2V:data_type 8L:name 12L:doc_string 9L:raw_data 14V:data_location",
  `1V:dims 1L:dims 4F:float_data 4L:float_data 5V:int32_data 5L:int32_data 7V:int64_data 7L:int64_data
   10D:double_data 10L:double_data 11V:uint64_data 11L:uint64_data 13L:external_data 16L:metadata`,
);
export const ENTRY = message("1L:key 2L:value");
export const VALUE = message("1L:name 2L:type 3L:doc_string", "4L:metadata");
export const TYPE = message("1L:tensor 6L:denotation");
export const TENSOR_TYPE = message("1V:elem_type 2L:shape");
export const SHAPE = message("", "1L:dim");
export const DIM = message("1V:value 2L:parameter 3L:denotation");

/** [name, value, -1] for a number, [name, start, end] for anything with a length or a fixed size. */
export type Field = [name: string, start: number, end: number];

/** The bytes of a graph; `name` is what errors call it. Numbers past 2^53 come rounded: they are all refused. */
export class Wire {
  private left = MAX_FIELDS;
  private at = 0;
  private readonly utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  constructor(
    readonly name: string,
    readonly data: Uint8Array,
  ) {}

  refuse(found: string, expected = ""): never {
    const fix = "export the bundle again; do not run this graph";
    throw new FewstepError("bundle", `${this.name}: ${found}`, expected, fix);
  }

  /** The number at `this.at`, which is moved past it. */
  private varint(end: number): number {
    let value = 0;
    for (let factor = 1; this.at < end; factor *= 128) {
      if (factor > 2 ** 63) this.refuse(`a number at byte ${this.at} is longer than 64 bits`);
      const byte = this.data[this.at++]!;
      value += (byte & 0x7f) * factor;
      if (byte < 0x80) return value;
    }
    this.refuse(`it ends inside a number at byte ${this.at}: the file is cut short or is no ONNX file`);
  }

  fields(start: number, end: number, known: Message): Field[] {
    const found: Field[] = [];
    const seen = new Set<number>();
    this.at = start;
    while (this.at < end) {
      const tag = this.varint(end);
      const field = known.get(tag);
      if (!field) {
        const number = Math.floor(tag / 8);
        this.refuse(`unknown field ${number} at byte ${this.at}: the file is damaged, too new or no ONNX file`);
      }
      const { name, once } = field;
      if (--this.left < 0) this.refuse(`more than ${count(MAX_FIELDS)} fields`);
      if (once && seen.has(tag)) this.refuse(`${name} is given twice at byte ${this.at}`);
      seen.add(tag);
      const wire = tag & 7;
      if (wire === 0) {
        found.push([name, this.varint(end), -1]);
        continue;
      }
      const size = wire === 2 ? this.varint(end) : wire === 5 ? 4 : 8;
      const left = end - this.at;
      if (size > left)
        this.refuse(
          `${name} at byte ${this.at} needs ${count(size)} bytes, ${count(left)} are left: the file is cut short`,
        );
      found.push([name, this.at, this.at + size]);
      this.at += size;
    }
    return found;
  }

  text(start: number, end: number): string {
    if (end - start > MAX_NAME) this.refuse(`a name of ${count(end - start)} bytes`, `at most ${count(MAX_NAME)}`);
    try {
      return this.utf8.decode(this.data.subarray(start, end));
    } catch {
      this.refuse(`the name at byte ${start} is not UTF-8`);
    }
  }

  /** Packed numbers. */
  numbers(start: number, end: number): number[] {
    const values: number[] = [];
    for (this.at = start; this.at < end;) {
      values.push(this.varint(end));
      if (values.length > MAX_DIMS) this.refuse(`a tensor of more than ${MAX_DIMS} dimensions`);
    }
    return values;
  }

  /** How many varints there are: each ends at a byte below 0x80. */
  varints(start: number, end: number): number {
    let found = 0;
    for (let i = start; i < end; i++) if (this.data[i]! < 0x80) found++;
    return found;
  }
}
