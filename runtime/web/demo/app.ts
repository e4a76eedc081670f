/** The page: choose a model, say what to draw, watch. All that computes is in worker.js. */

import { type Model, type Opened, connect } from "../src/browser/client.js";
import { FewstepError } from "../src/errors.js";
import { type Choice, megabytes, readCatalog } from "./catalog.js";
import { openHistory, put } from "./history.js";
import { ideasFor } from "./ideas.js";
import { install, keepEngine, uses } from "./offline.js";
import { arc, complain, fact, page, say } from "./page.js";
import { type Made, save, share, shareable } from "./save.js";
import { milliseconds, showSteps } from "./steps.js";

const DEAR = 100e6; // bytes: more is loaded only when asked for
const LARGE = 1e9; // bytes: WebAssembly addresses four times this, and a graph is there twice while it is opened

const client = connect(() => new Worker("worker.js", { type: "module" }));
const base = new URL("./", location.href).href;
let choices: Choice[] = [];
let model: Model | undefined;
let drawing: AbortController | undefined;
let loading: AbortController | undefined;
let shown: Made | undefined;
let retry: () => void = () => undefined;
const pictures = openHistory(page.history, (made) => {
  if (drawing) return;
  if (made.ask.prompt !== undefined) page.prompt.value = made.ask.prompt;
  page.seed.value = `${made.ask.seed}`;
  page.dice.ariaPressed = "false"; // to draw this one again in other steps
  show(made);
});

async function start(): Promise<void> {
  void install(() => {
    page.timing.textContent = "A newer version of this app is here: reload to use it.";
    say(page.timing.textContent);
  });
  const wanted = new URLSearchParams(location.search);
  page.device.value = wanted.get("device") ?? "auto";
  choices = await readCatalog(base);
  page.model.replaceChildren(...choices.map(({ label }, index) => new Option(label, `${index}`)));
  page.model.disabled = choices.length < 2;
  const at = choices.findIndex(({ variants }) => variants.some(({ url }) => url.includes(`/${wanted.get("bundle")}/`)));
  page.model.value = `${Math.max(at, 0)}`;
  const first = choices[Math.max(at, 0)];
  if (!first) throw new FewstepError("files", "this site has no bundles", "at least one", "fewstep serve BUNDLE");
  const saving = (navigator as { connection?: { saveData?: boolean } }).connection?.saveData === true;
  if (first.bytes > DEAR || saving) offer(first);
  else await load();
}

/** Ask before much is fetched. */
function offer({ bytes }: Choice): void {
  page.loading.hidden = false;
  page.loadingText.textContent = `${megabytes(bytes)} to fetch, once`;
  page.load.hidden = false;
}

async function load(): Promise<void> {
  const choice = choices[Number(page.model.value)];
  if (!choice) return start();
  retry = () => void attempt(load);
  stop();
  loading?.abort();
  const own = (loading = new AbortController());
  model = undefined;
  page.draw.disabled = true;
  page.load.hidden = true;
  page.loading.hidden = false;
  page.frame.dataset["state"] = "empty";
  page.actions.hidden = true;
  page.loadingText.textContent = "Looking at the model";
  showSteps(page.steps, 0, []);
  page.timing.textContent = "";
  arc(0);
  say(`Loading ${choice.name}`);
  let notKept = "";
  try {
    const opened = await client.open(choice.variants, {
      device: page.device.value as "auto" | "wasm" | "webgpu",
      ort: new URL("ort/", base).href,
      signal: own.signal,
      lowMemory: choice.bytes > LARGE,
      onNotKept: (why) => (notKept = why),
      onProgress: ({ part, loadedBytes, totalBytes, keptBytes, stage }) => {
        page.loading.dataset["state"] = stage;
        const fetched = keptBytes >= loadedBytes ? "from this device" : `of ${megabytes(totalBytes)}`;
        page.loadingText.textContent =
          stage === "prepare" ? `Preparing ${part.replace("_", " ")}` : `${megabytes(loadedBytes)} ${fetched}`;
        arc(totalBytes ? loadedBytes / totalBytes : 0);
      },
    });
    if (own.signal.aborted) return;
    ready(opened, notKept);
  } catch (error) {
    if (own.signal.aborted) return;
    page.loadingText.textContent = "";
    throw error;
  }
  if (page.promptField.hidden || page.prompt.value) await draw();
}

/** Fit the page to what was opened. */
function ready(opened: Model, notKept: string): void {
  model = opened;
  page.loading.hidden = true;
  page.draw.disabled = false;
  const ideas = ideasFor(opened.name);
  page.promptField.hidden = opened.task !== "text-to-image";
  page.classField.hidden = opened.classes === null;
  page.class.max = `${(opened.classes ?? 1) - 1}`;
  page.ideas.replaceChildren(...(page.promptField.hidden ? [] : ideas.map(idea)));
  if (!page.prompt.value && ideas[0] && !page.promptField.hidden) page.prompt.value = ideas[0];
  page.guidanceLine.hidden = opened.guidance.kind === "none";
  page.guidance.value = `${opened.guidance.scale}`;
  showPlans(opened);
  const cores = opened.threads === 1 ? "one core" : `${opened.threads} cores`;
  page.engine.textContent = opened.device === "webgpu" ? "Runs on WebGPU" : `Runs on WebAssembly, ${cores}`;
  const facts: [string, string][] = [
    ["Why", opened.why],
    ["Model", `${opened.name}, ${megabytes(opened.bytes)}, ${opened.quantized ? "integers" : opened.precision}`],
    ["Loaded in", milliseconds(opened.openMs)],
    ["Kept", notKept ? `No: ${notKept}` : "On this device"],
    ["Offline", "not yet"],
    ["Licence", opened.license],
  ];
  page.facts.replaceChildren(...facts.filter(([, text]) => text).flatMap(([name, text]) => fact(name, text)));
  say(`${opened.name} is ready.${notKept ? ` It could not be kept: ${notKept}` : ""}`);
  uses(opened.device);
  void keepEngine(base).then((kept) => {
    const works = kept && !notKept;
    document.body.dataset["offline"] = works ? "ready" : "no";
    for (const dd of page.facts.querySelectorAll("dd[data-name=Offline]"))
      dd.textContent = works
        ? "Works without a network from now on"
        : "Needs the network: this browser keeps nothing here";
  });
}

function idea(text: string): HTMLButtonElement {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => {
    page.prompt.value = text;
    void attempt(draw);
  });
  return button;
}

/** The plans steps_N as a row of numbers; the bundle's own among them, by its number of steps. */
function showPlans({ plans }: Opened): void {
  const own = plans["default"]!;
  const others = Object.entries(plans).filter(
    ([name, { steps }]) => name !== "default" && (!name.startsWith("steps_") || steps !== own.steps),
  );
  const sorted = [["default", own] as const, ...others].sort(([, a], [, b]) => a.steps - b.steps);
  const before = page.choices.querySelector<HTMLInputElement>("input:checked")?.value ?? "default";
  const chosen = before in plans ? before : "default";
  page.choices.replaceChildren(
    ...sorted.map(([name, { steps }]) => {
      const [label, input, text] = [
        document.createElement("label"),
        document.createElement("input"),
        document.createElement("span"),
      ];
      Object.assign(input, { type: "radio", name: "plan", value: name, checked: name === chosen });
      text.textContent = name === "default" || name.startsWith("steps_") ? `${steps}` : name;
      label.append(input, text);
      return label;
    }),
  );
  page.plans.hidden = sorted.length < 2;
}

async function draw(): Promise<void> {
  if (!model || drawing) return;
  const opened = model;
  const own = (drawing = new AbortController());
  retry = () => void attempt(draw);
  page.alert.hidden = true;
  if (page.dice.ariaPressed === "true" && shown) page.seed.value = `${anySeed()}`; // the first picture has the seed that is there
  const text = page.promptField.hidden ? undefined : page.prompt.value.trim();
  const label = page.classField.hidden ? undefined : Number(page.class.value);
  const plan = page.choices.querySelector<HTMLInputElement>("input:checked")?.value ?? "default";
  const asked = {
    ...(text !== undefined && { prompt: text }),
    ...(label !== undefined && { classLabel: label }),
    ...(opened.guidance.kind !== "none" && page.guidance.value && { guidanceScale: Number(page.guidance.value) }),
    seed: seedOf(page.seed.value),
    plan,
  };
  page.draw.textContent = "Stop";
  page.draw.classList.add("stop");
  page.frame.dataset["state"] = "drawing";
  const { steps } = opened.plans[plan]!;
  const times: number[] = [];
  showSteps(page.steps, steps, times);
  try {
    const going = opened.draw({ ...asked, preview: page.preview.checked }, own.signal);
    for (;;) {
      const next = await going.next();
      if (next.done) {
        const { image, timings } = next.value;
        show({ image, timings, ask: { ...asked, seed: asked.seed }, model: opened });
        break;
      }
      times.push(next.value.ms);
      showSteps(page.steps, steps, times);
      page.timing.textContent = `Step ${next.value.index + 1} of ${steps}`;
      if (next.value.image) put(page.picture, next.value.image);
    }
  } catch (error) {
    if (!(error instanceof FewstepError && error.kind === "cancelled")) throw error;
    if (shown) show(shown);
    say("Stopped.");
    page.timing.textContent = `Stopped at step ${Math.min(times.length + 1, steps)} of ${steps}`;
  } finally {
    if (drawing === own) drawing = undefined;
    page.draw.textContent = "Draw";
    page.draw.classList.remove("stop");
    if (page.frame.dataset["state"] === "drawing") page.frame.dataset["state"] = shown ? "done" : "empty";
  }
}

/** A finished picture, with what it took, also from the row below. */
function show(made: Made): void {
  const { image, timings, ask } = made;
  pictures.add(made);
  shown = made;
  put(page.picture, image);
  page.frame.dataset["state"] = "done";
  page.actions.hidden = false;
  page.share.hidden = !shareable();
  const what = ask.prompt ?? (ask.classLabel !== undefined ? `class ${ask.classLabel}` : "a sample");
  page.picture.ariaLabel = `${what}, seed ${ask.seed}`;
  showSteps(page.steps, timings.stepMs.length, timings.stepMs);
  const step = timings.stepMs.reduce((sum, ms) => sum + ms, 0) / timings.stepMs.length;
  const total = timings.textMs + timings.decodeMs + step * timings.stepMs.length;
  const count = timings.stepMs.length === 1 ? "1 step" : `${timings.stepMs.length} steps of ${milliseconds(step)}`;
  page.timing.textContent = `${milliseconds(total)}: ${count}, text ${milliseconds(timings.textMs)}, decoding ${milliseconds(timings.decodeMs)}`;
  say(`Picture ready: ${what}, seed ${ask.seed}, ${milliseconds(total)}.`);
  pictures.mark(made);
}

function seedOf(text: string): number | bigint {
  const digits = text.trim() || "0";
  if (!/^\d{1,20}$/.test(digits) || BigInt(digits) >= 1n << 64n)
    throw new FewstepError("input", `seed '${digits.slice(0, 30)}'`, "a whole number from 0 to 18446744073709551615");
  return Number.isSafeInteger(Number(digits)) ? Number(digits) : BigInt(digits);
}

const SEEDS = 1e6; // short enough to read out to somebody

const anySeed = (): number => crypto.getRandomValues(new Uint32Array(1))[0]! % SEEDS;

const stop = (): void => drawing?.abort();

/** Run something a person asked for; what goes wrong is said where they look. */
async function attempt(work: () => Promise<void>): Promise<void> {
  page.alert.hidden = true;
  try {
    await work();
  } catch (error) {
    complain(error);
  }
}

page.form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (drawing) stop();
  else void attempt(draw);
});
page.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  page.form.requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
page.model.addEventListener("change", () => void attempt(load));
page.device.addEventListener("change", () => void attempt(load));
page.load.addEventListener("click", () => void attempt(load));
page.again.addEventListener("click", () => retry());
page.dice.addEventListener("click", () => {
  page.dice.ariaPressed = `${page.dice.ariaPressed !== "true"}`;
});
page.seed.addEventListener("input", () => (page.dice.ariaPressed = "false"));
page.save.addEventListener("click", () => void attempt(async () => shown && save(shown)));
page.share.addEventListener("click", () => void attempt(async () => shown && share(shown)));
page.forget.addEventListener(
  "click",
  () =>
    void attempt(async () => {
      for (const { url } of choices[Number(page.model.value)]?.variants ?? []) await client.forget(url);
      say("Removed from this device.");
      for (const dd of page.facts.querySelectorAll("dd[data-name=Kept], dd[data-name=Offline]"))
        dd.textContent = "Removed";
    }),
);
retry = () => void attempt(start);
void attempt(start);
