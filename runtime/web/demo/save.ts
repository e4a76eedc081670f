/** A picture leaves the page: as a file, or to another app. */

import type { Ask, Opened } from "../src/browser/client.js";
import type { Image, Timings } from "../src/pipeline.js";
import { png } from "./png.js";

/** A finished picture and how it was made. */
export interface Made {
  image: Image;
  timings: Timings;
  ask: Ask;
  model: Opened;
}

/** The texts `fewstep run` puts into its files: for people and AUTOMATIC1111's readers, and everything as JSON. */
export function texts({ image, ask, model }: Made): Record<string, string> {
  const { steps } = model.plans[ask.plan ?? "default"]!;
  const guidance = ask.guidanceScale ?? model.guidance.scale;
  const version = model.versions["fewstep"] ?? "";
  const fields = [
    ["Steps", steps],
    ["CFG scale", guidance],
    ["Seed", ask.seed ?? 0],
    ["Size", `${image.width}x${image.height}`],
    ["Model hash", model.sha256.slice(0, 10)],
    ["Model", model.name],
    ["Version", `fewstep ${version}`],
  ];
  const record = {
    prompt: ask.prompt ?? null,
    class_label: ask.classLabel ?? null,
    // past 2^53 a number of JSON loses digits in most readers
    seed: typeof ask.seed === "bigint" ? `${ask.seed}` : (ask.seed ?? 0),
    steps,
    plan: ask.plan ?? "default",
    guidance,
    height: image.height,
    width: image.width,
    bundle: { name: model.name, sha256: model.sha256 },
    fewstep: version,
    device: model.device,
  };
  const line = fields.map(([name, value]) => `${name}: ${value}`).join(", ");
  return { parameters: `${ask.prompt ?? ""}\n${line}`, fewstep: JSON.stringify(record) };
}

export const fileName = ({ ask, model }: Made): string => {
  const words = (ask.prompt ?? (ask.classLabel !== undefined ? `class ${ask.classLabel}` : model.name)).normalize(
    "NFC",
  );
  const plain = words
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60);
  return `${plain || "picture"}-${ask.seed ?? 0}.png`;
};

export async function save(made: Made): Promise<void> {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await png(made.image, texts(made)));
  link.download = fileName(made);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // a slow disk still reads it
}

export const shareable = (): boolean =>
  typeof navigator.canShare === "function" &&
  navigator.canShare({ files: [new File([], "picture.png", { type: "image/png" })] });

export async function share(made: Made): Promise<void> {
  const file = new File([await png(made.image, texts(made))], fileName(made), { type: "image/png" });
  try {
    await navigator.share({ files: [file] });
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "AbortError")) throw error; // they changed their mind
  }
}
