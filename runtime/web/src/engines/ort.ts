/** ONNX Runtime in any of its JavaScript forms: they share onnxruntime-common's interface. */

import type { InferenceSession, InferenceSessionFactory, OnnxValue, TensorConstructor } from "onnxruntime-common";
import type { Engine, GraphFiles, NamedTensor, Session, TypedData } from "../engine.js";
import { FewstepError } from "../errors.js";
import type { PartSpec } from "../manifest.js";

/** What is used of `import * as ort`. */
export interface Ort {
  InferenceSession: InferenceSessionFactory;
  Tensor: TensorConstructor;
}

/** An engine that opens every graph with these options. `name` is what errors call it. */
export function ortEngine(
  ort: Ort,
  name: string,
  device: "cpu" | "gpu",
  options: InferenceSession.SessionOptions,
): Engine {
  const open = async (files: GraphFiles, spec: PartSpec): Promise<Session> => {
    // React Native's takes all of the buffer, wherever in it the data begins
    const externalData = files.external.map(({ path, data }) => ({
      path,
      data: data.length === data.buffer.byteLength ? data : data.slice(),
    }));
    let session: InferenceSession;
    try {
      session = await ort.InferenceSession.create(files.graph, {
        ...options,
        logSeverityLevel: 3, // errors only: its warnings are about graphs, not about anything a user did
        ...(externalData.length && { externalData }),
      });
    } catch (error) {
      throw engineError(error, `${name} cannot load ${files.name}`, device);
    }
    const names = (found: readonly string[]): string => [...found].sort().join(", ");
    for (const which of ["inputs", "outputs"] as const) {
      const found = names(which === "inputs" ? session.inputNames : session.outputNames);
      const expected = names(spec[which].map((tensor) => tensor.name));
      if (found === expected) continue;
      await session.release();
      const fix = "export the bundle again";
      throw new FewstepError("bundle", `${files.name} has the ${which} ${found}`, expected, fix);
    }
    return {
      run: async (feeds, outputs) => {
        try {
          const tensors = Object.entries(feeds).map(([key, t]) => [
            key,
            new ort.Tensor(t.dtype as "float32", t.data as Float32Array, t.dims),
          ]);
          const found = await session.run(Object.fromEntries(tensors), outputs ?? session.outputNames);
          return Object.fromEntries(Object.entries(found).map(([key, value]) => [key, named(value)]));
        } catch (error) {
          throw engineError(error, `${name} cannot run ${files.name}`, device);
        }
      },
      release: () => session.release(),
    };
  };
  return { name, device, open };
}

function named(value: OnnxValue): NamedTensor {
  const { type, dims, data } = value as { type: string; dims: readonly number[]; data: TypedData };
  // where JavaScript has Float16Array, ONNX Runtime gives that: the same bits
  const bits = type === "float16" ? new Uint16Array(data.buffer, data.byteOffset, data.length) : data;
  return { dtype: type, dims: [...dims], data: bits };
}

/** What an engine throws, sorted by what can be done about it. */
export function engineError(error: unknown, what: string, device: "cpu" | "gpu"): FewstepError {
  if (error instanceof FewstepError) return error;
  const message = (error instanceof Error ? error.message : String(error)).split("\n")[0]!.slice(0, 300);
  const found = `${what} (${message})`;
  const full =
    /bad_alloc|out of memory|OOM|allocat|memory access out of bounds|could not be cloned|device (was |is )?lost/i;
  if (error instanceof RangeError || full.test(message)) {
    const fix =
      "close other tabs and apps, load with { lowMemory: true }, or export a smaller bundle (--quantize w8a8)";
    return new FewstepError("memory", `not enough memory: ${found}`, "", fix);
  }
  if (
    /not implemented|NOT_IMPLEMENTED|not a registered|cannot resolve operator|No Op registered|not supported/i.test(
      message,
    )
  ) {
    const target = device === "gpu" ? "web-webgpu, or use the CPU" : "web-wasm, or update onnxruntime";
    return new FewstepError("engine", found, "operators this engine has", `export the bundle for ${target}`);
  }
  return new FewstepError("engine", found, "", "export the bundle again, or update onnxruntime");
}
