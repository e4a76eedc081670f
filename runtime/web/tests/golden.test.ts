/** What every port must reproduce: runtime/spec/golden/. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { cases, difference, drawStream, streams } from "./golden.js";

for (const stream of streams)
  test(`noise of seed ${stream.seed} in ${stream.draws.length} draws is the same to the bit`, () => {
    const { sha256, first } = stream;
    assert.deepEqual(drawStream(stream), { sha256, first });
  });

test("there are golden files", () => assert.ok(cases.length > 100 && streams.length > 5));
for (const one of cases)
  test(`plan ${String(one["name"])} gives its states`, async () => {
    const worst = await difference(one);
    assert.ok(worst < Number(one["tolerance"]), `${worst}`);
  });
