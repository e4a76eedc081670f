/** What a bundle says about itself, under the names that manifest.json has. The format is runtime/spec/bundle.md. */

import { FewstepError, quoted } from "./errors.js";
import { NAME, checkPaths } from "./paths.js";
import {
  type Json,
  type Read,
  anything,
  flag,
  isObject,
  list,
  mapping,
  optional,
  raw,
  real,
  record,
  shown,
  size,
  text,
  whole,
} from "./strictjson.js";

export const SCHEMA_VERSION = 1;
const VERSION_KEY = "fewstep_bundle";

const tensor = record({ name: text, dtype: text, shape: list(size) });
const part = record({
  engine: text,
  graph: text,
  inputs: list(tensor),
  outputs: list(tensor),
  precision: text,
  device: text,
  executed: text,
  quantization: mapping(anything),
  margin: optional(whole),
});
const sample = record({
  height: whole,
  width: whole,
  channels: whole,
  factor: whole,
  multiple: whole,
  fixed: flag,
  scaling_factor: real,
  shift_factor: real,
});
const dynamic = record({ kind: text, base_shift: real, max_shift: real, base_tokens: whole, max_tokens: whole });
const grid = record({
  spacing: text,
  steps_offset: whole,
  final: text,
  shift: real,
  dynamic: optional(dynamic),
  terminal: optional(real),
  sigma_min: optional(real),
  sigma_max: optional(real),
  ends: text,
  rho: real,
});
const tokenizer = record({ file: text, max_length: whole, pad_id: whole });
const file = record({ sha256: text, bytes: whole });
const manifest = record({
  name: text,
  task: text,
  process: mapping(anything),
  prediction: text,
  denoiser: text,
  parts: mapping(part),
  sample,
  plans: mapping(mapping(raw)),
  sampler: text,
  grid,
  guidance: record({ kind: text, scale: real }),
  tokenizer: optional(tokenizer),
  classes: optional(whole),
  target: mapping(anything),
  history: list(mapping(anything)),
  quality: mapping(anything),
  speed: mapping(anything),
  license: text,
  versions: mapping(text),
  files: mapping(file),
});

export type TensorSpec = Read<typeof tensor>;
export type PartSpec = Read<typeof part>;
export type SampleSpec = Read<typeof sample>;
export type TokenizerSpec = Read<typeof tokenizer>;
export type FileSpec = Read<typeof file>;
export type Manifest = Read<typeof manifest>;

const TASKS = ["text-to-image", "class-conditional", "unconditional"];
const PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow", "score", "residual", "resnoise"];
const ENDS = ["trailing", "leading", "leading_open", "linspace", "linspace_levels", "linspace_open"];
const SPACINGS = `auto ${ENDS.join(" ")} sgm_uniform quadratic shifted karras exponential beta logsnr lu arctan
  linear_quadratic ays_sd15 ays_sdxl ays_svd lcm tcd pcm turbo lightning hyper dmd2`.split(/\s+/);
const DTYPES = "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split(" ");
export const IDENTIFIER = /^[A-Za-z_][A-Za-z0-9_]{0,63}$/;

/**
 * Read manifest.json as `parseJson` gives it. Every field must be there and no other, of its type and in its range;
 * every path must be safe; every file a part or the tokenizer names must be listed. Throws FewstepError naming it.
 */
export function readManifest(data: Json): Manifest {
  if (!isObject(data) || !(VERSION_KEY in data))
    throw new FewstepError(
      "bundle",
      `${NAME} has no '${VERSION_KEY}'`,
      "",
      "this is not a fewstep bundle: run fewstep export",
    );
  const { [VERSION_KEY]: version, ...fields } = data;
  if (version !== BigInt(SCHEMA_VERSION))
    throw new FewstepError(
      "bundle",
      `${NAME}: schema version ${shown(version)}`,
      `${SCHEMA_VERSION}`,
      "update fewstep, or export the bundle again",
    );
  const found = manifest(Object.assign(Object.create(null), fields), NAME);
  checkManifest(found);
  return found;
}

/** What the types do not say. */
function checkManifest(m: Manifest): void {
  const need = (ok: boolean, what: string, value: unknown, expected: string): void => {
    if (ok) return;
    const shown = typeof value === "number" ? String(value) : quoted(String(value));
    throw new FewstepError("bundle", `${NAME}: ${what} is ${shown}`, expected, "export the bundle again");
  };
  const oneOf = (what: string, value: string, known: string[]): void =>
    need(known.includes(value), what, value, `one of ${known.join(", ")}`);

  oneOf("task", m.task, TASKS);
  oneOf("prediction", m.prediction, PREDICTIONS);
  oneOf("grid.spacing", m.grid.spacing, SPACINGS);
  oneOf("grid.final", m.grid.final, ["clean", "first", "sigma_min"]);
  oneOf("grid.ends", m.grid.ends, ["", ...ENDS]);
  const { shift, terminal, rho, dynamic: d } = m.grid;
  need(shift > 0 && shift <= 1e3, "grid.shift", shift, "above 0, at most 1000");
  need(terminal === null || (terminal > 0 && terminal < 1), "grid.terminal", terminal, "between 0 and 1");
  need(rho > 0 && rho <= 1e3, "grid.rho", rho, "above 0, at most 1000");
  for (const name of ["sigma_min", "sigma_max"] as const)
    need(m.grid[name] === null || m.grid[name] > 0, `grid.${name}`, m.grid[name], "above 0");
  if (d) {
    oneOf("grid.dynamic.kind", d.kind, ["exponential", "linear"]);
    const ordered = d.base_tokens > 0 && d.base_tokens < d.max_tokens;
    need(ordered, "grid.dynamic.base_tokens", d.base_tokens, "above 0 and below max_tokens");
  }
  oneOf("guidance.kind", m.guidance.kind, ["none", "cfg"]);
  need(m.denoiser in m.parts, "denoiser", m.denoiser, `one of the parts: ${Object.keys(m.parts).sort().join(", ")}`);
  need(m.classes === null || (m.classes > 0 && m.classes < 2 ** 31), "classes", m.classes, "at least 1");
  for (const name of ["height", "width", "channels", "factor", "multiple"] as const)
    need(m.sample[name] > 0 && m.sample[name] <= 2 ** 16, `sample.${name}`, m.sample[name], "1 to 65536");
  need(m.sample.scaling_factor !== 0, "sample.scaling_factor", 0, "not 0: it divides");

  checkPaths(Object.keys(m.files));
  for (const [path, { sha256, bytes }] of Object.entries(m.files)) {
    need(/^[0-9a-f]{64}$/.test(sha256), `sha256 of ${path}`, sha256, "64 hex digits");
    need(bytes >= 0 && bytes < 2 ** 63, `size of ${path}`, bytes, "0 or more bytes");
  }
  for (const [name, p] of Object.entries(m.parts)) {
    need(IDENTIFIER.test(name), "name of a part", name, "letters, digits and _");
    need(IDENTIFIER.test(p.engine), `engine of ${name}`, p.engine, "the name of an engine");
    oneOf(`device of ${name}`, p.device, ["cpu", "gpu", "npu"]);
    oneOf(`precision of ${name}`, p.precision, ["float32", "bfloat16", "float16"]);
    oneOf(`executed of ${name}`, p.executed, ["device", "emulated", "converted"]);
    const { margin } = p;
    need(margin === null || (margin >= 0 && margin < 2 ** 16), `margin of ${name}`, margin, "0 to 65535, or null");
    need(p.graph in m.files, `graph of ${name}`, p.graph, "a file of the list in files");
    for (const which of ["inputs", "outputs"] as const) {
      const names = p[which].map((t) => t.name);
      need(new Set(names).size === names.length, `${which} of ${name}`, names.join(", "), "different names");
      for (const t of p[which]) {
        oneOf(`dtype of ${name} ${t.name}`, t.dtype, DTYPES);
        const ok = t.shape.every((n) => (typeof n === "string" ? n !== "" : n > 0 && n < 2 ** 31));
        need(ok, `shape of ${name} ${t.name}`, t.shape, "axis names and sizes of at least 1");
      }
    }
  }
  if (m.tokenizer) {
    const { file: path, max_length: length, pad_id: pad } = m.tokenizer;
    need(path in m.files, "tokenizer.file", path, "a file of the list in files");
    need(length > 2 && length <= 2 ** 16, "tokenizer.max_length", length, "3 to 65536");
    need(pad >= 0 && pad < 2 ** 31, "tokenizer.pad_id", pad, "a token id");
  }
}

/** What a plan's rows may call -> its part: "denoiser", and by name every part with the denoiser's inputs. */
export function graphsOf(m: Manifest): Map<string, string> {
  const inputs = (name: string): string => m.parts[name]!.inputs.map((t) => t.name).join("\0");
  const alike = Object.keys(m.parts).filter((name) => name !== m.denoiser && inputs(name) === inputs(m.denoiser));
  return new Map([...alike.map((name): [string, string] => [name, name]), ["denoiser", m.denoiser]]);
}
