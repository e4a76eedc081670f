/** The package: small, without dependencies, one error class whatever file throws it, a README whose examples hold. */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync, mkdirSync } from "node:fs";
import { execFileSync } from "node:child_process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const WEB = fileURLToPath(new URL("../../", import.meta.url));

test("the core is at most 60 kB minified, and imports nothing", async () => {
  const entryPoints = [`${WEB}src/index.ts`];
  const { outputFiles } = await build({
    entryPoints,
    bundle: true,
    minify: true,
    format: "esm",
    write: false,
    packages: "external",
  });
  const bytes = outputFiles[0]!.contents.length;
  assert.ok(bytes > 10_000 && bytes <= 60_000, `${bytes} bytes`);
  assert.doesNotMatch(outputFiles[0]!.text, /\bimport\s*[{*"']/);
});

test("nothing is installed with it but the types of ONNX Runtime", () => {
  const made = JSON.parse(readFileSync(`${WEB}package.json`, "utf-8")) as Record<string, object | undefined>;
  assert.equal(made["dependencies"], undefined);
  assert.deepEqual(Object.keys(made["peerDependencies"]!), ["onnxruntime-common"]);
  for (const [name, version] of Object.entries(made["devDependencies"]!)) assert.match(String(version), /^\d/, name);
});

test("the files of the package share one error class", async () => {
  const core = (await import(`${WEB}dist/index.js`)) as typeof import("../src/index.js");
  const node = (await import(`${WEB}dist/node.js`)) as typeof import("../src/engines/node.js");
  const wrong = await node
    .folderFiles("/nowhere")
    .read("manifest.json")
    .catch((error: unknown) => error);
  assert.ok(wrong instanceof core.FewstepError);
});

test("the examples of the README compile", () => {
  const readme = readFileSync(`${WEB}README.md`, "utf-8");
  const examples = [...readme.matchAll(/```ts\n([^]*?)```/g)].map((match) => match[1]!);
  assert.ok(examples.length >= 4);
  const folder = `${WEB}dist/examples`;
  mkdirSync(folder, { recursive: true });
  examples.forEach((example, i) => writeFileSync(`${folder}/example${i}.ts`, `${example}\nexport {};\n`));
  writeFileSync(
    `${folder}/tsconfig.json`,
    JSON.stringify({
      extends: "../../tsconfig.json",
      compilerOptions: {
        noUnusedLocals: false,
        paths: {
          "@fewstep/runtime": ["../../src/index.ts"],
          "@fewstep/runtime/node": ["../../src/engines/node.ts"],
          "@fewstep/runtime/web": ["../../src/engines/web.ts"],
          "@fewstep/runtime/browser": ["../../src/browser/client.ts"],
          "@fewstep/runtime/react-native": ["../../src/engines/reactnative.ts"],
          "onnxruntime-react-native": ["../../node_modules/onnxruntime-common"],
          "react-native-fs": ["./react-native-fs.d.ts"],
        },
      },
      include: ["*.ts"],
    }),
  );
  writeFileSync(
    `${folder}/react-native-fs.d.ts`,
    "export function readFile(path: string, how: string): Promise<string>;\nexport const DocumentDirectoryPath: string;\n",
  );
  execFileSync(`${WEB}node_modules/.bin/tsc`, ["-p", folder], { encoding: "utf-8" });
});
