/** The pictures of this visit, newest first, to go back to. */

import type { Image } from "../src/pipeline.js";
import { paint } from "./png.js";
import type { Made } from "./save.js";

const KEPT = 24; // pictures: more than anybody looks through, and little memory
const COARSE = 128; // pixels: smaller pictures look better as squares than smoothed

export interface History {
  /** Put a picture in front, unless it is there. */
  add(made: Made): void;
  /** Say which one is shown. */
  mark(made: Made): void;
}

export function openHistory(list: HTMLElement, chosen: (made: Made) => void): History {
  const buttons = new Map<Made, HTMLButtonElement>();
  return {
    add: (made) => {
      if (buttons.has(made)) return;
      const [item, button, canvas] = [
        document.createElement("li"),
        document.createElement("button"),
        document.createElement("canvas"),
      ];
      button.type = "button";
      button.ariaLabel = `${made.ask.prompt ?? "picture"}, seed ${made.ask.seed}`;
      put(canvas, made.image);
      button.append(canvas);
      button.addEventListener("click", () => chosen(made));
      buttons.set(made, button);
      item.append(button);
      list.prepend(item);
      for (const old of [...buttons.keys()].slice(0, -KEPT)) {
        buttons.get(old)!.parentElement!.remove();
        buttons.delete(old);
      }
    },
    mark: (made) => {
      for (const [one, button] of buttons) button.ariaCurrent = `${one === made}`;
    },
  };
}

/** A picture on a canvas, as squares where it is small. */
export function put(canvas: HTMLCanvasElement, image: Image): void {
  paint(canvas, image);
  canvas.classList.toggle("coarse", Math.max(image.width, image.height) <= COARSE);
}
