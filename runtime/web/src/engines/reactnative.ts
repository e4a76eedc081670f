/** ONNX Runtime in iOS and Android apps: onnxruntime-react-native. Typed against its interface, never executed. */

import type { Files } from "../bundle.js";
import type { Engine } from "../engine.js";
import { FewstepError } from "../errors.js";
import { type Ort, ortEngine } from "./ort.js";

export interface ReactNativeOptions {
  /** cpu everywhere; xnnpack too; coreml on iOS, nnapi on Android take what they can of a graph. */
  providers?: ("cpu" | "xnnpack" | "coreml" | "nnapi")[];
  threads?: number;
}

/** ort: `import * as ort from "onnxruntime-react-native"`. */
export function reactNativeEngine(ort: Ort, { providers = ["cpu"], threads }: ReactNativeOptions = {}): Engine {
  const options = { executionProviders: providers, ...(threads !== undefined && { intraOpNumThreads: threads }) };
  return ortEngine(ort, "onnxruntime-react-native", "cpu", options);
}

/** The files of a bundle in the app's storage: `readBase64` is react-native-fs' or expo-file-system's reader. */
export function nativeFiles(folder: string, readBase64: (path: string) => Promise<string>): Files {
  return {
    read: async (path, progress) => {
      let text;
      try {
        text = await readBase64(`${folder}/${path}`);
      } catch (error) {
        throw new FewstepError("files", `${path} cannot be read (${String(error)})`, "", "download the bundle again");
      }
      const data = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
      progress?.(data.length);
      return data;
    },
  };
}
