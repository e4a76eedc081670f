/** The elements of index.html by name. */

import { FewstepError } from "../src/errors.js";

function find<T extends HTMLElement>(id: string, kind: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`index.html has no ${kind.name} #${id}`);
  return element;
}

export const page = {
  model: find("model", HTMLSelectElement),
  frame: find("frame", HTMLDivElement),
  picture: find("picture", HTMLCanvasElement),
  loading: find("loading", HTMLDivElement),
  loadingText: find("loading-text", HTMLParagraphElement),
  loadingBar: find("loading-bar", HTMLProgressElement),
  load: find("load", HTMLButtonElement),
  actions: find("actions", HTMLDivElement),
  save: find("save", HTMLButtonElement),
  share: find("share", HTMLButtonElement),
  alert: find("alert", HTMLDivElement),
  alertFound: find("alert-found", HTMLParagraphElement),
  alertFix: find("alert-fix", HTMLParagraphElement),
  again: find("again", HTMLButtonElement),
  steps: find("steps", HTMLDivElement),
  timing: find("timing", HTMLParagraphElement),
  history: find("history", HTMLUListElement),
  form: find("form", HTMLFormElement),
  ideas: find("ideas", HTMLDivElement),
  promptField: find("prompt-field", HTMLDivElement),
  prompt: find("prompt", HTMLTextAreaElement),
  classField: find("class-field", HTMLDivElement),
  class: find("class", HTMLInputElement),
  plans: find("plans", HTMLFieldSetElement),
  choices: find("choices", HTMLDivElement),
  seed: find("seed", HTMLInputElement),
  dice: find("dice", HTMLButtonElement),
  draw: find("draw", HTMLButtonElement),
  engine: find("engine", HTMLSpanElement),
  device: find("device", HTMLSelectElement),
  guidanceLine: find("guidance-line", HTMLLabelElement),
  guidance: find("guidance", HTMLInputElement),
  preview: find("preview", HTMLInputElement),
  facts: find("facts", HTMLDListElement),
  forget: find("forget", HTMLButtonElement),
  status: find("status", HTMLParagraphElement),
};

/** Said to screen readers, when they have finished what they are saying. */
export function say(text: string): void {
  page.status.textContent = text;
}

/** An arc of the loading circle, 0 to 1. */
export function arc(fraction: number): void {
  document.getElementById("arc")!.style.strokeDasharray = `${100 * Math.min(1, Math.max(0, fraction))} 100`;
  page.loadingBar.value = fraction;
}

/** One line of the details: a name and what is so. */
export function fact(name: string, text: string): HTMLElement[] {
  const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
  [dt.textContent, dd.textContent] = [name, text];
  dd.dataset["name"] = name;
  return [dt, dd];
}

/** Say what is wrong, what was expected and what to do. */
export function complain(error: unknown): void {
  const upper = (text: string): string => text.slice(0, 1).toUpperCase() + text.slice(1);
  const known = error instanceof FewstepError;
  const message = error instanceof Error ? error.message : String(error);
  const found = known ? error.found : `Something is wrong in this app (${message})`;
  page.alertFound.textContent = `${upper(found)}${known && error.expected ? `; expected ${error.expected}` : ""}.`;
  page.alertFix.textContent = known ? upper(error.fix) + (error.fix && ".") : "Reload the page.";
  page.alert.dataset["kind"] = known ? error.kind : "bug";
  page.alert.hidden = false;
  page.alert.scrollIntoView({ block: "nearest" });
}
