/** What the pipeline asks of an engine, gives back, and says when something is wrong. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  type Engine,
  FewstepError,
  type Kind,
  type PipelineOptions,
  type Request,
  loadPipeline,
  noise,
  openBundle,
  verify,
} from "../src/index.js";
import {
  CLASSES,
  type FakeEngine,
  PARTS,
  SAMPLE,
  STATES,
  TIMESTEP,
  bundleFiles,
  fakeEngine,
  part,
  plan,
  tensor,
} from "./fake.js";

const load = async (changes: object = {}, engine: Engine = fakeEngine(), options: PipelineOptions = {}) =>
  loadPipeline(await openBundle(bundleFiles(changes)), engine, options);
const fails = (kind: Kind, message: RegExp) => (error: unknown) => {
  assert.ok(error instanceof FewstepError, String(error));
  assert.match(error.message, message);
  assert.equal(error.kind, kind);
  return true;
};
const refuses = async (request: Request, kind: Kind, message: RegExp, changes: object = {}, engine?: FakeEngine) =>
  assert.rejects(
    load(changes, engine).then((pipeline) => pipeline.draw(request)),
    fails(kind, message),
  );
const rows = (data: unknown, n: number): number[][] => {
  const flat = Array.from(data as Float32Array, Number);
  return Array.from({ length: n }, (_, i) => flat.slice((i * flat.length) / n, ((i + 1) * flat.length) / n));
};

test("a guided call is one batch of two, the empty prompt first", async () => {
  const engine = fakeEngine();
  const pipeline = await load({}, engine);
  await pipeline.draw({ prompt: "a red apple" });
  const [prompt, nothing, first] = engine.feeds;
  assert.notDeepEqual(prompt!["input_ids"]!.data, nothing!["input_ids"]!.data);
  assert.deepEqual(first!["sample"]!.dims, [2, 4, 4, 4]);
  assert.deepEqual(first!["timestep"], { dtype: "float32", dims: [2], data: new Float32Array([900, 900]) });
  assert.deepEqual(first!["encoder_hidden_states"]!.dims, [2, 32, 8]);
  const [uncond, cond] = rows(first!["encoder_hidden_states"]!.data, 2);
  const ids = [nothing, prompt].map((feeds) => Number((feeds!["input_ids"]!.data as BigInt64Array)[1]));
  assert.deepEqual([uncond![0], cond![0]], ids);
  const [one, other] = rows(first!["sample"]!.data, 2);
  assert.deepEqual(one, other);
  assert.deepEqual(one, Array.from(noise(0)(64)));
});

test("guidance goes from the empty prompt's prediction past the prompt's", async () => {
  const engine = fakeEngine({ unet: () => [...Array(64).fill(1), ...Array(64).fill(2)] });
  const { latents } = await (await load({}, engine)).draw({ prompt: "a", guidanceScale: 4 });
  assert.deepEqual(latents, new Float32Array(64).fill(5));
});

test("a scale of 1 costs one prediction, and no empty prompt", async () => {
  const engine = fakeEngine();
  await (await load({}, engine)).draw({ prompt: "a", guidanceScale: 1 });
  assert.deepEqual(
    engine.log.filter((line) => line.startsWith("run")),
    ["run text_encoder", "run unet", "run unet", "run vae_decoder"],
  );
  assert.deepEqual(engine.feeds[1]!["sample"]!.dims, [1, 4, 4, 4]);
});

test("a row that is not guided asks for the prompt alone", async () => {
  const engine = fakeEngine();
  await (await load({ plans: { default: plan({ guided: false }) } }, engine)).draw({ prompt: "a" });
  assert.deepEqual(engine.feeds[2]!["sample"]!.dims, [1, 4, 4, 4]);
});

test("a graph of fixed sizes gets one sample a call", async () => {
  const fixed = part(
    "unet",
    [tensor("sample", "float32", 1, 4, 4, 4), tensor("timestep", "float32", 1), STATES],
    [SAMPLE],
  );
  const engine = fakeEngine({ unet: ({ encoder_hidden_states: e }) => Array<number>(64).fill(Number(e!.data[0])) });
  const pipeline = await load({ parts: { ...PARTS, unet: fixed } }, engine);
  const { latents } = await pipeline.draw({ prompt: "a", guidanceScale: 3 });
  const [nothing, prompt] = engine.feeds.slice(2, 4).map((feeds) => Number(feeds["encoder_hidden_states"]!.data[0]));
  assert.deepEqual(
    engine.feeds.slice(2, 6).map((feeds) => feeds["sample"]!.dims[0]),
    [1, 1, 1, 1],
  );
  assert.equal(latents[0], nothing! + 3 * (prompt! - nothing!));
});

test("a graph gets the types it asks for", async () => {
  const half = (name: string): typeof SAMPLE => ({ ...SAMPLE, name, dtype: "float16" });
  const inputs = [half("sample"), tensor("timestep", "int64", "batch"), { ...STATES, dtype: "float16" }];
  const unet = part("unet", inputs, [half("out")]);
  const engine = fakeEngine({
    unet: () => ({ dtype: "float16", dims: [1, 4, 4, 4], data: new Uint16Array(64).fill(0x3c00) }),
  });
  const { latents } = await (await load({ parts: { ...PARTS, unet } }, engine)).draw({ prompt: "a", guidanceScale: 1 });
  const feeds = engine.feeds[1]!;
  assert.ok(feeds["sample"]!.data instanceof Uint16Array);
  assert.ok(feeds["encoder_hidden_states"]!.data instanceof Uint16Array);
  assert.deepEqual(feeds["timestep"]!.data, new BigInt64Array([900n]));
  assert.deepEqual(latents, new Float32Array(64).fill(1));
});

test("the label after the last stands for no class, and pixels need no decoder", async () => {
  const engine = fakeEngine({ unet: ({ sample }) => (sample!.data as Float32Array).map(() => 0.25) });
  const { image } = await (await load(CLASSES, engine)).draw({ classLabel: 7 });
  assert.deepEqual(engine.feeds[0]!["class_labels"]!.data, new BigInt64Array([10n, 7n]));
  assert.deepEqual(engine.feeds[0]!["timestep"]!.data, new Int32Array([900, 900]));
  assert.deepEqual([image.width, image.height], [8, 8]);
  assert.deepEqual([...image.data.subarray(0, 4)], [159, 159, 159, 255]); // 0.625 * 255 = 159.4
});

test("pixels are limited, and half a level is rounded to the even one, as numpy does", async () => {
  const engine = fakeEngine({ unet: () => [0, 2, -2, 1, ...Array<number>(188).fill(0)] });
  const { image } = await (await load(CLASSES, engine)).draw({ classLabel: 0, guidanceScale: 1 });
  assert.deepEqual(
    [0, 1, 2, 3].map((i) => image.data[4 * i]),
    [128, 255, 0, 255],
  );
});

test("the same request gives the same picture, another seed another", async () => {
  const pipeline = await load();
  const [a, b, c] = [
    await pipeline.draw({ prompt: "a", seed: 5 }),
    await pipeline.draw({ prompt: "a", seed: 5n }),
    await pipeline.draw({ prompt: "a", seed: 6 }),
  ];
  assert.deepEqual(a.latents, b.latents);
  assert.notDeepEqual(a.latents, c.latents);
  assert.deepEqual(await pipeline.drawLatents({ prompt: "a", latents: noise(5)(64) }), a.latents);
});

test("steps come one by one, each with a preview that disturbs nothing", async () => {
  const pipeline = await load();
  const previews = [];
  const indices = [];
  const steps = pipeline.generate({ prompt: "a", seed: 1 });
  let next = await steps.next();
  for (; !next.done; next = await steps.next()) {
    indices.push([next.value.index, next.value.count, next.value.timestep]);
    previews.push(next.value.preview()); // not awaited: the engine still gets one call at a time
  }
  assert.deepEqual(indices, [
    [0, 2, 900],
    [1, 2, 500],
  ]);
  assert.equal((await Promise.all(previews)).at(-1)!.data[0], next.value.image.data[0]);
  assert.deepEqual((await pipeline.draw({ prompt: "a", seed: 1 })).image, next.value.image);
  const { textMs, stepMs, decodeMs, totalMs, engineMs } = next.value.timings;
  assert.equal(stepMs.length, 2);
  assert.ok(textMs + stepMs[0]! + stepMs[1]! + decodeMs <= totalMs && engineMs > 0);
});

test("leaving the loop stops the work", async () => {
  const engine = fakeEngine();
  for await (const step of (await load({}, engine)).generate({ prompt: "a", guidanceScale: 1 }))
    if (step.index === 0) break;
  assert.equal(engine.log.at(-1), "run unet");
});

test("an aborted signal ends the drawing before the next call", async () => {
  const engine = fakeEngine();
  const pipeline = await load({}, engine);
  const controller = new AbortController();
  const drawing = pipeline.draw({ prompt: "a", signal: controller.signal }, () => controller.abort());
  await assert.rejects(drawing, fails("cancelled", /cancelled before call 2 of 2/));
  assert.equal(engine.log.filter((line) => line === "run unet").length, 1);
  await assert.rejects(
    pipeline.draw({ prompt: "a", signal: controller.signal }),
    fails("cancelled", /before the first step/),
  );
  await pipeline.draw({ prompt: "a" }); // and it can be used again
});

test("with little memory each part is open while its stage lasts", async () => {
  const engine = fakeEngine();
  const pipeline = await load({}, engine, { lowMemory: true });
  assert.deepEqual(engine.log, []);
  await pipeline.draw({ prompt: "a", guidanceScale: 1 });
  const expected = ["open text_encoder", "run text_encoder", "release text_encoder"];
  expected.push(
    "open unet",
    "run unet",
    "run unet",
    "release unet",
    "open vae_decoder",
    "run vae_decoder",
    "release vae_decoder",
  );
  assert.deepEqual(engine.log, expected);
});

test("otherwise all parts are opened once, and closing frees them", async () => {
  const engine = fakeEngine();
  const pipeline = await load({}, engine);
  await pipeline.draw({ prompt: "a" });
  await pipeline.close();
  const opened = engine.log.filter((line) => !line.startsWith("run"));
  assert.deepEqual(opened.slice(0, 3), ["open text_encoder", "open unet", "open vae_decoder"]);
  assert.deepEqual(opened.slice(3).sort(), ["release text_encoder", "release unet", "release vae_decoder"]);
});

test("a plan of two graphs calls each by its part's name", async () => {
  const small = part("small", PARTS["unet"]!.inputs, PARTS["unet"]!.outputs);
  const calls = (plan() as { calls: object[] }).calls;
  const both = { ...plan(), calls: [{ ...calls[0], graph: "small" }, calls[1]] };
  const engine = fakeEngine({ small: ({ sample }) => (sample!.data as Float32Array).map((v) => v * 4) });
  const pipeline = await load({ parts: { ...PARTS, small }, plans: { default: both } }, engine);
  const { latents } = await pipeline.draw({ prompt: "a", guidanceScale: 1 });
  assert.deepEqual(
    engine.log.filter((line) => /run (small|unet)/.test(line)),
    ["run small", "run unet"],
  );
  assert.deepEqual(
    latents,
    noise(0)(64).map((v) => v * 2),
  );
});

test("an observation reaches the network and the prediction", async () => {
  const observed = part("unet", [SAMPLE, TIMESTEP, STATES, { ...SAMPLE, name: "observation" }], [SAMPLE]);
  const engine = fakeEngine({ unet: () => Array<number>(64).fill(1) });
  const pipeline = await load(
    { parts: { ...PARTS, unet: observed }, plans: { default: plan({ x0: [0, 1, 2] }) } },
    engine,
  );
  const { latents } = await pipeline.draw({ prompt: "a", guidanceScale: 1, given: [new Float32Array(64).fill(3)] });
  assert.deepEqual(latents, new Float32Array(64).fill(7));
  assert.deepEqual(engine.feeds[1]!["observation"]!.data, new Float32Array(64).fill(3));
  await assert.rejects(
    pipeline.draw({ prompt: "a" }),
    fails("plan", /0 given arrays for ddim; expected 1, the observation first/),
  );
});

test("the golden latent passes on the engine it was made on, and no other", async () => {
  const shape = { shape: [1, 4, 4, 4], seed: 0, prompt: "a red apple", class_label: null, steps: 2, sampler: "ddim" };
  const x = (await (await load()).drawLatents({ prompt: shape.prompt })).map((v) => v);
  const channels = rows(x, 4);
  const mean = channels.map((c) => c.reduce((a, b) => a + b) / 16);
  const std = channels.map((c, i) => Math.sqrt(c.reduce((a, b) => a + (b - mean[i]!) ** 2, 0) / 16));
  const golden = { ...shape, peak: Math.max(...x.map(Math.abs)), values: [...x], mean, std, tolerance: 1e-3 };
  const good = await verify(await load({ quality: { golden } }));
  assert.ok(good.passed && good.worst < 1e-6, String(good.worst));
  const other = fakeEngine({ unet: ({ sample }) => (sample!.data as Float32Array).map((v) => v / 1.9) });
  assert.equal((await verify(await load({ quality: { golden } }, other))).passed, false);
  await assert.rejects(
    load().then((p) => verify(p)),
    fails("bundle", /has no golden latent/),
  );
  const named = { ...golden, plan: "two", steps: null, sampler: null };
  assert.ok(
    (await verify(await load({ plans: { default: plan({ scale: 2 }), two: plan() }, quality: { golden: named } })))
      .passed,
  );
  await assert.rejects(
    load({ quality: { golden: { ...golden, steps: 3 } } }).then((p) => verify(p)),
    fails("bundle", /drawn in 3 steps of 'ddim'.*no plan/),
  );
  await assert.rejects(
    load({ quality: { golden: { ...golden, mean: "x" } } }).then((p) => verify(p)),
    fails("bundle", /mean is no list of numbers/),
  );
});

for (const [what, request, kind, message, changes] of [
  [
    "a prompt too long",
    { prompt: "apple ".repeat(90) },
    "input",
    /a prompt of \d+ tokens \('apple apple.*; expected at most 32 .*; fix: shorten it by \d+ tokens/,
    {},
  ],
  ["no prompt", {}, "input", /no prompt; expected a text/, {}],
  ["half a surrogate pair", { prompt: "a\ud800" }, "input", /half a surrogate pair/, {}],
  [
    "a class label for words",
    { prompt: "a", classLabel: 1 },
    "input",
    /a class label for a model of task text-to-image/,
    {},
  ],
  [
    "a prompt for classes",
    { prompt: "a", classLabel: 1 },
    "input",
    /a prompt for a model of task class-conditional/,
    CLASSES,
  ],
  ["no class label", {}, "input", /class label undefined; expected a whole number from 0 to 9/, CLASSES],
  ["a class too many", { classLabel: 10 }, "input", /class label 10/, CLASSES],
  ["an unknown plan", { prompt: "a", plan: "steps_9" }, "plan", /plan 'steps_9'; expected one of default/, {}],
  [
    "a plan of a missing graph",
    { prompt: "a" },
    "plan",
    /calls the graph 'small'; expected denoiser/,
    { plans: { default: plan({ graph: "small" }) } },
  ],
  [
    "a damaged plan",
    { prompt: "a" },
    "plan",
    /call 0 of a plan; expected x0 as three numbers/,
    { plans: { default: plan({ x0: [1] }) } },
  ],
  ["a wrong seed", { prompt: "a", seed: -1 }, "input", /seed -1; expected a whole number from 0/, {}],
  ["a broken seed", { prompt: "a", seed: 0.5 }, "input", /seed 0.5/, {}],
  ["guidance that is no number", { prompt: "a", guidanceScale: NaN }, "input", /guidance NaN/, {}],
  [
    "guidance for a model without",
    { prompt: "a", guidanceScale: 2 },
    "input",
    /model without guidance/,
    { guidance: { kind: "none", scale: 1 } },
  ],
  [
    "a size between",
    { prompt: "a", width: 33 },
    "input",
    /33x32 pixels; expected multiples of 8 up to 4096; fix: try 32x32/,
    {},
  ],
  [
    "another size of a fixed one",
    { classLabel: 1, width: 16 },
    "input",
    /expected 8x8, the only size of this bundle/,
    CLASSES,
  ],
  [
    "another size where times depend on it",
    { prompt: "a", width: 64 },
    "input",
    /times of this model depend on the size/,
    {
      grid: { dynamic: { kind: "linear", base_shift: 0.5, max_shift: 1, base_tokens: 1, max_tokens: 2 } },
    },
  ],
  [
    "latents of another shape",
    { prompt: "a", latents: new Float32Array(63) },
    "input",
    /an array of 63 values; expected 64 finite ones, of shape 4x4x4/,
    {},
  ],
  [
    "latents that are no numbers",
    { prompt: "a", latents: new Float32Array(64).fill(NaN) },
    "input",
    /64 finite ones/,
    {},
  ],
] as [string, Request, Kind, RegExp, object][])
  test(`${what} is refused before the network runs`, async () => {
    const engine = fakeEngine();
    await refuses(request, kind, message, changes, engine);
    assert.ok(!engine.log.includes("run unet"));
  });

test("another size is drawn where the bundle takes it", async () => {
  const { image } = await (await load()).draw({ prompt: "a", width: 64 });
  assert.deepEqual([image.width, image.height, image.data.length], [64, 32, 4 * 64 * 32]);
});

for (const [name, fix] of [
  ["unet", /call 1 of 2, denoiser at timestep 900: the network's output holds NaN/],
  ["vae_decoder", /vae_decoder: .*NaN/],
  ["text_encoder", /text_encoder: .*NaN.*export that part in float32/],
] as const)
  test(`NaN from ${name} ends the drawing`, async () => {
    const sizes = { unet: 128, vae_decoder: 3 * 64 * 16, text_encoder: 256 };
    await refuses(
      { prompt: "a" },
      "numbers",
      fix,
      {},
      fakeEngine({ [name]: () => Array<number>(sizes[name]).fill(NaN) }),
    );
  });

test("an output of another size is refused", async () => {
  await refuses(
    { prompt: "a" },
    "bundle",
    /unet gave 3 values; expected 128/,
    {},
    fakeEngine({ unet: () => [1, 2, 3] }),
  );
  await refuses(
    { prompt: "a" },
    "bundle",
    /a picture of 1.5 channels/,
    {},
    fakeEngine({ vae_decoder: () => Array<number>(1536).fill(0) }),
  );
});

test("what cannot be opened leaves nothing open, and can be tried again", async () => {
  const engine = fakeEngine();
  let broken = true;
  const sometimes: Engine = {
    ...engine,
    open: async (files, spec) => {
      if (broken && spec.graph.startsWith("vae")) throw new FewstepError("memory", "not enough memory");
      return engine.open(files, spec);
    },
  };
  const bundle = await openBundle(bundleFiles());
  await assert.rejects(loadPipeline(bundle, sometimes), fails("memory", /not enough memory/));
  assert.deepEqual(engine.log, ["open text_encoder", "open unet", "release text_encoder", "release unet"]);
  const pipeline = await loadPipeline(bundle, sometimes, { lowMemory: true });
  await assert.rejects(pipeline.draw({ prompt: "a" }), fails("memory", /not enough memory/));
  broken = false;
  await pipeline.draw({ prompt: "a" });
});
