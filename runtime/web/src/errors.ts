/**
 * What went wrong, as an app would sort it:
 *   input      something the caller gave is wrong           bundle     the bundle is damaged, foreign or tampered with
 *   plan       a plan that cannot be found or read          files      a file could not be read or fetched
 *   engine     the engine cannot load or run a graph        memory     there is not enough of it
 *   numbers    a network gave NaN or infinity               cancelled  the caller asked to stop
 */
export type Kind = "input" | "bundle" | "plan" | "files" | "engine" | "memory" | "numbers" | "cancelled";

/** The one error of this package: what was found, what was expected and what to do. */
export class FewstepError extends Error {
  override readonly name = "FewstepError";

  constructor(
    readonly kind: Kind,
    readonly found: string,
    readonly expected = "",
    readonly fix = "",
  ) {
    super(found + (expected && `; expected ${expected}`) + (fix && `; fix: ${fix}`));
  }
}

/** Throws FewstepError of kind "input" unless `good`. */
export function check(good: boolean, found: string, expected: string, fix = ""): asserts good {
  if (!good) throw new FewstepError("input", found, expected, fix);
}

/** Throws FewstepError of kind "cancelled" once the signal was aborted. */
export function checkSignal(signal: AbortSignal | undefined, where: string): void {
  if (signal?.aborted) throw new FewstepError("cancelled", `cancelled ${where}`);
}

/** Text as an error shows it: quoted, and cut where it is long. */
export function quoted(text: string, most = 80): string {
  return `'${text.slice(0, most)}'`;
}

/** An unknown name, with the known ones. */
export function unknown(kind: Kind, what: string, name: string, known: Iterable<string>): FewstepError {
  return new FewstepError(kind, `${what} ${quoted(name)}`, `one of ${[...known].join(", ")}`);
}

/** 1234567 as "1,234,567". */
export const count = (value: number): string => String(value).replace(/\B(?=(\d{3})+$)/g, ",");
