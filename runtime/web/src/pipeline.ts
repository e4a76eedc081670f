/** From a bundle and a prompt to an image: the loop an app embeds. */

import type { Bundle, BundleOptions, LoadProgress } from "./bundle.js";
import { type Conditioning, type Conditions, conditionNames, denoiser } from "./denoiser.js";
import type { Engine, NamedTensor, Session } from "./engine.js";
import { FewstepError, check, checkSignal, count, quoted, unknown } from "./errors.js";
import { type Image, toImage } from "./image.js";
import { type Manifest, graphsOf } from "./manifest.js";
import { noise } from "./noise.js";
import { type Denoise, type Plan, readPlan, runPlan } from "./plan.js";
import { type Request, checkSubjects, guidanceOf, sampleShape } from "./request.js";
import { type Json, parseJson } from "./strictjson.js";
import { allFinite, toFloats, toTensor } from "./tensors.js";
import { type Tokenizer, openTokenizer } from "./tokenizer.js";

export type { Image };

export interface Step {
  /** From 0 to count - 1. */
  readonly index: number;
  readonly count: number;
  readonly timestep: number;
  /** What this step took. */
  readonly ms: number;
  /** The network's guess of the clean sample, decoded. */
  preview(): Promise<Image>;
}

export interface Timings {
  textMs: number;
  stepMs: number[];
  decodeMs: number;
  totalMs: number;
  /** The share of totalMs inside the engine. */
  engineMs: number;
}

export interface Output {
  image: Image;
  /** The clean sample before decoding, [channels, height / factor, width / factor]. */
  latents: Float32Array;
  timings: Timings;
  seed: number | bigint;
  plan: Plan;
}

export interface Pipeline {
  readonly bundle: Bundle;
  readonly manifest: Manifest;
  readonly engine: Engine;
  /** A plan of the bundle by name. Throws FewstepError of kind "plan" for an unknown one. */
  plan(name?: string): Plan;
  /** Draw step by step; the generator returns the Output. Leave the loop to stop. */
  generate(request: Request): AsyncGenerator<Step, Output>;
  /** The same in one call. */
  draw(request: Request, onStep?: (step: Step) => void | Promise<void>): Promise<Output>;
  /** The clean sample alone. */
  drawLatents(request: Request): Promise<Float32Array>;
  /** Free every loaded part. The pipeline can be used again: it reopens what it needs. */
  close(): Promise<void>;
}

export interface PipelineOptions {
  onProgress?: ((progress: LoadProgress) => void) | undefined;
  signal?: AbortSignal | undefined;
  /** Open each part when its stage begins and free it when that is over: the largest bounds memory, not their sum. */
  lowMemory?: boolean | undefined;
}

/** Load every part a picture needs. Throws FewstepError naming what is at fault and the remedy. */
export async function loadPipeline(bundle: Bundle, engine: Engine, options: PipelineOptions = {}): Promise<Pipeline> {
  const { manifest } = bundle;
  const graphs = graphsOf(manifest);
  const sessions = new Map<string, Promise<Session>>();
  const plans = new Map<string, Plan>();
  let tokenizer: Promise<Tokenizer> | undefined;
  const progress = options.onProgress ? { onProgress: options.onProgress } : {};
  let loading: BundleOptions = options.signal ? { ...progress, signal: options.signal } : progress;
  let engineMs = 0;
  let last: Promise<unknown> = Promise.resolve();

  /** One call at a time, as engines want it: a preview may be asked for while the next step runs. */
  const timed = (session: Session): Session => ({
    run: (feeds, outputs) => {
      const call = async (): Promise<Record<string, NamedTensor>> => {
        const start = performance.now();
        try {
          return await session.run(feeds, outputs);
        } finally {
          engineMs += performance.now() - start;
        }
      };
      const result = last.then(call);
      last = result.catch(() => undefined);
      return result;
    },
    release: () => session.release(),
  });
  /** What failed is forgotten, so that it can be tried again. */
  const remembered = (name: string, opened: Promise<Session>): Promise<Session> => {
    sessions.set(name, opened);
    opened.catch(() => sessions.delete(name));
    return opened;
  };
  const open = (name: string): Promise<Session> =>
    sessions.get(name) ??
    remembered(
      name,
      bundle.graph(name, loading).then(async (files) => timed(await engine.open(files, manifest.parts[name]!))),
    );
  const release = async (name: string): Promise<void> => {
    const session = sessions.get(name);
    sessions.delete(name);
    await (await session)?.release();
  };
  const done = async (name: string): Promise<void> => {
    if (options.lowMemory) await release(name);
  };

  const openTokens = (): Promise<Tokenizer> => {
    const spec = manifest.tokenizer!;
    tokenizer ??= bundle
      .file(spec.file, { ...loading, part: "tokenizer" })
      .then((data) => openTokenizer(parseJson(data, spec.file), spec, spec.file));
    tokenizer.catch(() => (tokenizer = undefined));
    return tokenizer;
  };

  const planOf = (name = "default"): Plan => {
    const json: Json | undefined = manifest.plans[name];
    if (json === undefined) throw unknown("plan", "plan", name, Object.keys(manifest.plans));
    const plan = plans.get(name) ?? readPlan(json);
    plans.set(name, plan);
    for (const { graph } of plan.calls)
      if (!graphs.has(graph))
        throw new FewstepError(
          "plan",
          `a plan that calls the graph ${quoted(graph)}`,
          [...graphs.keys()].join(" or "),
          "export the bundle with that denoiser too (fewstep export --stitch SMALL_MODEL)",
        );
    return plan;
  };

  /** A prompt as the network is conditioned on it. */
  const encode = async (prompt: string): Promise<Conditions[string]> => {
    const { max_length: length } = manifest.tokenizer!;
    const { ids, truncated } = (await openTokens())(prompt);
    check(
      truncated === 0,
      `a prompt of ${length + truncated} tokens (${quoted(prompt, 40)}...)`,
      `at most ${length} with begin and end marks`,
      `shorten it by ${truncated} tokens`,
    );
    const { inputs, outputs } = manifest.parts["text_encoder"]!;
    const session = await open("text_encoder");
    const feeds = { [inputs[0]!.name]: toTensor(inputs[0]!.dtype, [1, length], ids) };
    const out = (await session.run(feeds, [outputs[0]!.name]))[outputs[0]!.name]!;
    return { dims: out.dims.slice(1), values: finite("text_encoder", toFloats(out)) };
  };

  /** What the network is conditioned on; the label after the last means no class (DiT <arXiv:2212.09748>). */
  const condition = async (request: Request, scale: number, shape: number[]): Promise<Conditioning> => {
    const { prompt, negativePrompt, classLabel } = request;
    const names = conditionNames(manifest.parts[manifest.denoiser]!);
    const given: Conditions = {};
    const nothing: Conditions = {};
    if (prompt !== undefined && names.includes("encoder_hidden_states")) {
      given["encoder_hidden_states"] = await encode(prompt);
      if (scale !== 1) nothing["encoder_hidden_states"] = await encode(negativePrompt ?? "");
    }
    if (classLabel !== undefined && names.includes("class_labels")) {
      given["class_labels"] = { dims: [], values: [classLabel] };
      nothing["class_labels"] = { dims: [], values: [manifest.classes!] };
    }
    const guided = scale !== 1 && Object.keys(nothing).length > 0;
    const observation = request.given?.[0];
    if (observation && names.includes("observation"))
      for (const one of [given, nothing]) one["observation"] = { dims: shape, values: observation };
    return { condition: given, unconditional: guided ? nothing : undefined, scale, observation };
  };

  /** A clean sample of [channels, h, w] to a picture of that size in pixels. */
  const decode = async (x0: Float32Array, height: number, width: number): Promise<Image> => {
    const { scaling_factor: factor, shift_factor: shift } = manifest.sample;
    const spec = manifest.parts["vae_decoder"];
    let pixels = x0;
    if (spec) {
      const [input, output] = [spec.inputs[0]!, spec.outputs[0]!.name];
      const latent = x0.map((v) => Math.fround(v / Math.fround(factor)) + Math.fround(shift));
      const dims = [1, ...sampleShape(manifest, height, width)];
      const session = await open("vae_decoder");
      const out = await session.run({ [input.name]: toTensor(input.dtype, dims, latent) }, [output]);
      pixels = finite("vae_decoder", toFloats(out[output]!));
    }
    return toImage(pixels, height, width);
  };

  const sample = async function* (request: Request): AsyncGenerator<Step & { x: Float32Array }, Sampled> {
    const { seed = 0, signal } = request;
    const plan = planOf(request.plan);
    checkSubjects(manifest, request);
    const scale = guidanceOf(manifest, request.guidanceScale);
    const shape = sampleShape(manifest, request.height, request.width);
    const [height, width] = [request.height ?? manifest.sample.height, request.width ?? manifest.sample.width];
    const size = shape.reduce((n, s) => n * s, 1);
    const stream = noise(seed);
    const latents = request.latents ?? stream(size);
    for (const array of [latents, ...(request.given ?? [])])
      check(
        array.length === size && allFinite(array),
        `an array of ${count(array.length)} values`,
        `${count(size)} finite ones, of shape ${shape.join("x")}`,
      );
    checkSignal(signal, "before the first step");
    const start = performance.now();
    const how = await condition(request, scale, shape);
    await done("text_encoder");
    const textMs = performance.now() - start;

    const parts = [...new Set(plan.calls.map((call) => graphs.get(call.graph)!))];
    const byPart = new Map<string, Promise<Denoise>>();
    /** Each row by the denoiser of its graph. */
    const denoise: Denoise = async (z, call) => {
      const name = graphs.get(call.graph)!;
      if (!byPart.has(name)) {
        for (const other of parts) if (other !== name && byPart.delete(other)) await done(other);
        byPart.set(
          name,
          open(name).then((session) => denoiser(session, name, manifest.parts[name]!, shape, how)),
        );
      }
      return (await byPart.get(name)!)(z, call);
    };
    if (!options.lowMemory) await Promise.all(parts.map(open));
    const stepMs: number[] = [];
    let x = latents;
    let mark = performance.now();
    try {
      for await (const step of runPlan(plan, denoise, latents, () => stream(size), request.given, { signal })) {
        x = step.x;
        stepMs.push(performance.now() - mark);
        const { index, timestep, x0 } = step;
        const preview = (): Promise<Image> => decode(x0, height, width);
        yield { index, count: plan.states, timestep, ms: stepMs.at(-1)!, preview, x };
        mark = performance.now();
      }
    } finally {
      for (const name of parts) await done(name);
    }
    checkSignal(signal, "before decoding");
    return { x, height, width, plan, textMs, stepMs };
  };

  const generate = async function* (request: Request): AsyncGenerator<Step, Output> {
    const start = performance.now();
    const engineStart = engineMs;
    try {
      const { x, height, width, plan, textMs, stepMs } = yield* sample(request);
      const decodeStart = performance.now();
      const image = await decode(x, height, width);
      const end = performance.now();
      const decodeMs = end - decodeStart;
      const timings = { textMs, stepMs, decodeMs, totalMs: end - start, engineMs: engineMs - engineStart };
      return { image, latents: x, timings, seed: request.seed ?? 0, plan };
    } finally {
      await done("vae_decoder"); // open for previews too
    }
  };

  const pipeline: Pipeline = {
    bundle,
    manifest,
    engine,
    plan: planOf,
    generate,
    draw: async (request, onStep) => {
      const steps = generate(request);
      for (;;) {
        const next = await steps.next();
        if (next.done) return next.value;
        await onStep?.(next.value);
      }
    },
    drawLatents: async (request) => {
      const steps = sample(request);
      for (;;) {
        const next = await steps.next();
        if (next.done) return next.value.x;
      }
    },
    close: async () => {
      for (const name of [...sessions.keys()]) await release(name);
    },
  };

  if (manifest.tokenizer) await openTokens();
  if (!options.lowMemory)
    try {
      // one after the other: reading the next while one is opened would need memory for both
      for (const name of ["text_encoder", manifest.denoiser, "vae_decoder"])
        if (name in manifest.parts) await open(name);
    } catch (error) {
      await pipeline.close();
      throw error;
    }
  loading = progress; // the signal was for this loading, not for what is opened later
  return pipeline;
}

interface Sampled {
  x: Float32Array;
  height: number;
  width: number;
  plan: Plan;
  textMs: number;
  stepMs: number[];
}

/** The output as it is. Throws FewstepError for NaN or infinity, which a picture would hide. */
function finite(part: string, output: Float32Array): Float32Array {
  if (allFinite(output)) return output;
  const fix = "a layer overflows in this precision; export that part in float32";
  throw new FewstepError("numbers", `${part}: the network's output holds NaN or infinity`, "", fix);
}
