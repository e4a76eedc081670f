/** One bar a step: how many there are, how far it is, and what each took. */

const LEAST = 5; // pixels: a step that is still to come
const ROOM = 34; // pixels: the slowest step, the height of .steps in app.css

export function showSteps(place: HTMLElement, count: number, times: number[]): void {
  while (place.childElementCount > count) place.lastElementChild!.remove();
  while (place.childElementCount < count) place.append(document.createElement("i"));
  const slowest = Math.max(...times, 1e-3);
  [...place.children].forEach((bar, index) => {
    const ms = times[index];
    bar.className = ms !== undefined ? "done" : index === times.length ? "now" : "";
    (bar as HTMLElement).style.height = ms === undefined ? "" : `${LEAST + (ROOM - LEAST) * (ms / slowest)}px`;
    (bar as HTMLElement).title = ms === undefined ? "" : `step ${index + 1}: ${milliseconds(ms)}`;
  });
}

/** 41.3 as "41 ms", 1234 as "1.23 s". */
export function milliseconds(ms: number): string {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms >= 10_000 ? 1 : 2)} s`;
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}
