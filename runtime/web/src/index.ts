/** Draw with fewstep bundles wherever some ONNX Runtime runs. */

export { type Bundle, type BundleOptions, type Files, type LoadProgress, openBundle } from "./bundle.js";
export type { Engine, GraphFiles, NamedTensor, Session, TypedData } from "./engine.js";
export { FewstepError, type Kind } from "./errors.js";
export { type Verification, verify } from "./golden.js";
export { checkGraph } from "./graphfile.js";
export {
  type FileSpec,
  type Manifest,
  type PartSpec,
  type SampleSpec,
  type TensorSpec,
  readManifest,
} from "./manifest.js";
export { type Noise, noise } from "./noise.js";
export {
  type Image,
  type Output,
  type Pipeline,
  type PipelineOptions,
  type Step,
  type Timings,
  loadPipeline,
} from "./pipeline.js";
export { type Call, type Denoise, type Plan, type PlanStep, readPlan, runPlan } from "./plan.js";
export type { Request } from "./request.js";
export { type Json, type JsonObject, parseJson } from "./strictjson.js";
export { type TokenIds, type Tokenizer, openTokenizer } from "./tokenizer.js";
