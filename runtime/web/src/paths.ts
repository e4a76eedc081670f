/** File names from a manifest: what may be joined to a folder without leaving it, on any system. */

import { FewstepError, quoted } from "./errors.js";
import { LONE_SURROGATE } from "./strictjson.js";

export const NAME = "manifest.json";
/** Characters of a path: Windows takes 260 in all, and the bundle's own folder needs some. */
const MAX_PATH = 200;
const FORBIDDEN = /[\\:*?"<>|\u0000-\u001f\u007f-\u009f\u2028\u2029]/;
const DEVICE = /^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])$/i;

function fault(path: string): string {
  const length = [...path].length;
  if (length === 0 || length > MAX_PATH) return `${length} characters`;
  if (path.startsWith("/")) return "an absolute path";
  const bad = FORBIDDEN.exec(path);
  if (bad) return `the character ${JSON.stringify(bad[0])}`;
  if (LONE_SURROGATE.test(path) || path.normalize("NFC") !== path) return "not Unicode in NFC form";
  for (const part of path.split("/")) {
    if (part === "" || part === "." || part === "..") return `the step ${quoted(part)}`;
    if (/^ | $|\.$/.test(part)) return `${quoted(part)} begins with a space, or ends with a space or a dot`;
    if (DEVICE.test(part.split(".")[0]!.replace(/ +$/, ""))) return `${quoted(part)} is a device on Windows`;
  }
  return "";
}

/** Throws FewstepError unless all paths are safe and stay different files where case does not count. */
export function checkPaths(paths: readonly string[]): void {
  const seen = new Map([[NAME, NAME]]);
  const folders = new Map<string, string>();
  for (const path of paths) {
    const reason = fault(path);
    if (reason)
      throw new FewstepError(
        "bundle",
        `${NAME}: file ${quoted(path)}: ${reason}`,
        `a relative path of at most ${MAX_PATH} characters with forward slashes`,
        "do not use this bundle unless you know who made it; export it again",
      );
    // upper case first: JavaScript has no case folding, and this unites all that folding does
    const folded = path.toUpperCase().toLowerCase().normalize("NFC");
    const other = seen.get(folded);
    if (other !== undefined)
      throw new FewstepError(
        "bundle",
        `${NAME}: files ${quoted(other)} and ${quoted(path)} are one file where case does not count`,
        "",
        "rename one and export again",
      );
    seen.set(folded, path);
    for (let at = folded.lastIndexOf("/"); at > 0; at = folded.lastIndexOf("/", at - 1))
      folders.set(folded.slice(0, at), path);
  }
  for (const [folded, path] of folders) {
    const file = seen.get(folded);
    if (file !== undefined)
      throw new FewstepError(
        "bundle",
        `${NAME}: ${quoted(file)} is both a file and the folder of ${quoted(path)}`,
        "",
        "rename one",
      );
  }
}
