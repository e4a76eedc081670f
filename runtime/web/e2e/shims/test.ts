/** node:test for a page: collects the tests of a file, which the page then runs. */

type Body = () => void | Promise<void>;
const collected: [string, Body][] = [];

export function test(name: string, body: Body): void {
  collected.push([name, body]);
}

/** Name of each test and what it failed with; empty where it passed. */
export async function runAll(): Promise<[string, string][]> {
  const results: [string, string][] = [];
  for (const [name, body] of collected) {
    try {
      await body();
      results.push([name, ""]);
    } catch (error) {
      results.push([name, String(error)]);
    }
  }
  return results;
}

Object.assign(globalThis, { runAll });
