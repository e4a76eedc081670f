/** One picture in Firefox, driven by WebDriver BiDi (w3.org/TR/webdriver-bidi): no library of our own needs it. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { WAIT } from "./browser.js";
import { openSite } from "./site.js";

interface Firefox {
  /** Load a page and run an async function body there; its result as JSON. */
  run(url: string, body: string): Promise<unknown>;
  close(): Promise<void>;
}

async function openFirefox(): Promise<Firefox> {
  const profile = mkdtempSync(join(tmpdir(), "fewstep-firefox-"));
  const child = spawn(
    process.env["FIREFOX"]!,
    ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"],
    {
      stdio: ["ignore", "ignore", "pipe"],
      env: { ...process.env, HOME: profile, MOZ_HEADLESS: "1" },
    },
  );
  const close = async (): Promise<void> => {
    const gone = new Promise((resolve) => child.once("exit", resolve));
    child.kill("SIGTERM");
    await gone;
    rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  };
  try {
    const address = await new Promise<string>((resolve, reject) => {
      let said = "";
      child.stderr.on("data", (data: Buffer) => {
        said += data.toString();
        const found = /WebDriver BiDi listening on (ws:\S+)/.exec(said);
        if (found) resolve(`${found[1]}/session`);
      });
      child.once("exit", (code) => reject(new Error(`Firefox ended (${code}): ${said.slice(-500)}`)));
      setTimeout(() => reject(new Error(`Firefox did not start: ${said.slice(-500)}`)), WAIT).unref();
    });
    const socket = new WebSocket(address);
    await new Promise((resolve, reject) => {
      socket.onopen = resolve;
      socket.onerror = () => reject(new Error(`cannot connect to ${address}`));
    });
    const waiting = new Map<number, (answer: Answered) => void>();
    socket.onmessage = ({ data }) => {
      const answer = JSON.parse(String(data)) as Answered;
      waiting.get(answer.id)?.(answer);
    };
    let last = 0;
    const ask = async (method: string, params: object): Promise<Record<string, unknown>> => {
      const id = ++last;
      const answered = new Promise<Answered>((resolve) => waiting.set(id, resolve));
      socket.send(JSON.stringify({ id, method, params }));
      const { type, result, error, message } = await answered;
      if (type === "error") throw new Error(`${method}: ${error}: ${message}`);
      return result;
    };
    await ask("session.new", { capabilities: {} });
    const { context } = await ask("browsingContext.create", { type: "tab" });
    return {
      run: async (url, body) => {
        await ask("browsingContext.navigate", { context, url, wait: "complete" });
        const expression = `(async () => JSON.stringify(await (async () => { ${body} })()))()`;
        const answer = await ask("script.evaluate", { expression, target: { context }, awaitPromise: true });
        if (answer["type"] !== "success") throw new Error(JSON.stringify(answer["exceptionDetails"]));
        return JSON.parse((answer["result"] as { value: string }).value) as unknown;
      },
      close: async () => {
        socket.close();
        await close();
      },
    };
  } catch (error) {
    await close();
    throw error;
  }
}

interface Answered {
  id: number;
  type: "success" | "error";
  result: Record<string, unknown>;
  error: string;
  message: string;
}

test("Firefox draws Python's picture with WebAssembly", async () => {
  const site = await openSite([]);
  const firefox = await openFirefox();
  try {
    const found = (await firefox.run(
      `${site.origin}/blank`,
      `await import("/a/b/c/harness.js");
       const python = await harness.pixels("/bundles/f32.png");
       const drawn = await harness.draw([{ url: "/bundles/f32/", device: "cpu" }],
         [{ prompt: "a red heart on a yellow background", seed: 7 }], { device: "wasm" });
       return { agent: navigator.userAgent, device: drawn.opened.device, python, pixels: drawn.pictures[0].pixels };`,
    )) as { agent: string; device: string; python: number[]; pixels: number[] };
    assert.match(found.agent, /Firefox\//);
    assert.equal(found.device, "wasm");
    const worst = Math.max(...found.pixels.map((value, i) => Math.abs(value - found.python[i]!)));
    assert.ok(worst <= 1, `${worst} levels`);
  } finally {
    await firefox.close();
    await site.close();
  }
});
