/** node:crypto for a page: SHA-256 at once, where browsers only promise it. FIPS 180-4, section 6.2. */

const primes = (count: number): number[] => {
  const found: number[] = [];
  for (let n = 2; found.length < count; n++) if (found.every((p) => n % p)) found.push(n);
  return found;
};
const fraction = (x: number): number => ((x - Math.floor(x)) * 2 ** 32) | 0;
const ROUND = primes(64).map((p) => fraction(Math.cbrt(p)));
const START = primes(8).map((p) => fraction(Math.sqrt(p)));
const turn = (x: number, n: number): number => (x >>> n) | (x << (32 - n));

export function createHash(name: string): { update(data: Uint8Array): void; digest(form: string): string } {
  if (name !== "sha256") throw new Error(name);
  const parts: Uint8Array[] = [];
  return {
    update: (data) => void parts.push(data.slice()),
    digest: (form) => {
      if (form !== "hex") throw new Error(form);
      const size = parts.reduce((sum, { length }) => sum + length, 0);
      const padded = new Uint8Array((Math.floor((size + 8) / 64) + 1) * 64);
      let at = 0;
      for (const part of parts) {
        padded.set(part, at);
        at += part.length;
      }
      padded[size] = 0x80;
      const view = new DataView(padded.buffer);
      view.setBigUint64(padded.length - 8, BigInt(size) * 8n);
      const state = [...START];
      const w = new Int32Array(64);
      for (let block = 0; block < padded.length; block += 64) {
        for (let i = 0; i < 16; i++) w[i] = view.getInt32(block + 4 * i);
        for (let i = 16; i < 64; i++) {
          const [x, y] = [w[i - 15]!, w[i - 2]!];
          const s0 = turn(x, 7) ^ turn(x, 18) ^ (x >>> 3);
          const s1 = turn(y, 17) ^ turn(y, 19) ^ (y >>> 10);
          w[i] = (w[i - 16]! + s0 + w[i - 7]! + s1) | 0;
        }
        let [a, b, c, d, e, f, g, h] = state as [number, number, number, number, number, number, number, number];
        for (let i = 0; i < 64; i++) {
          const s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
          const t1 = (h + s1 + ((e & f) ^ (~e & g)) + ROUND[i]! + w[i]!) | 0;
          const s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
          const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
          [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
        }
        [a, b, c, d, e, f, g, h].forEach((value, i) => (state[i] = (state[i]! + value) | 0));
      }
      return state.map((value) => (value >>> 0).toString(16).padStart(8, "0")).join("");
    },
  };
}
