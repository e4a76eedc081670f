/** node:assert/strict for a page: what the golden tests use of it. */

function ok(value: unknown, message = "not true"): void {
  if (!value) throw new Error(message);
}
function equal(found: unknown, expected: unknown): void {
  ok(Object.is(found, expected), `${String(found)} is not ${String(expected)}`);
}
function deepEqual(found: unknown, expected: unknown): void {
  equal(JSON.stringify(found), JSON.stringify(expected));
}
export default { ok, equal, deepEqual };
