// quartet.py's quantizers for the page, to the bit: the same order of operations, each rounded to float32.
//
// A sum, product or quotient of two float32 numbers, computed in JavaScript's float64 and rounded once more
// by f32, is the correctly rounded one. Numbers are in plain arrays; a tensor is a row of whole blocks of 16.

const f32 = Math.fround;
const BLOCK = 16;
const GROUP = 128;
const SR_MAX = 6 * 16 / 17;
const EDEN_MAX = SR_MAX / 0.93;
const TINY = 2 ** -120;
const PHILOX_ROUNDS = 7;
const SEARCH = [0, -1, 1, 4, 5];

const float = new Float32Array(1);
const int = new Int32Array(float.buffer);

function bitsOf(v) {
  float[0] = v;
  return int[0];
}

function fromBits(bits) {
  int[0] = bits;
  return float[0];
}

function powerOfTwoBelow(v) {
  return fromBits(bitsOf(v) & 0x7F800000);
}

// ---- Section 1: the small floats

function roundToGrid(v, u, mantissaBits, minExp, maxVal) {
  v = Math.min(Math.max(v, -maxVal), maxVal);
  const spacing = Math.max(powerOfTwoBelow(v), 2 ** minExp) * 2 ** -mantissaBits;
  if (u === null) {
    const magic = spacing * 1.5 * 2 ** 23;
    return f32(f32(v + magic) - magic);
  }
  const n = f32(v / spacing);
  const down = Math.floor(n);
  return (down + (u < f32(n - down) ? 1 : 0)) * spacing;
}

const e2m1 = (v, u = null) => roundToGrid(v, u, 1, 0, 6);
const e4m3 = (v, u = null) => roundToGrid(v, u, 3, -6, 448);
const roundScale = (v, u = null) => roundToGrid(v, u, 3, -126, Infinity);

// The byte of an E4M3 value >= 0, and the 4 bits of an E2M1 value.
function e4m3Byte(v) {
  return v < 2 ** -6 ? v * 2 ** 9 : (bitsOf(v) >> 20) - (120 << 3);
}

function e2m1Code(q) {
  const code = [0, 0.5, 1, 1.5, 2, 3, 4, 6].indexOf(Math.abs(q));
  return q < 0 ? code + 8 : code;
}

// ---- Section 3: blocks and scales

function blocks(x) {
  const found = [];
  for (let start = 0; start < x.length; start += BLOCK) {
    const b = Array.from(x.slice(start, start + BLOCK), f32);
    let amax = Math.max(...b.map(Math.abs));
    if (amax < TINY) amax = 0;
    const unit = Math.min(Math.max(0.25 * powerOfTwoBelow(amax), 0.25 * TINY), 2 ** 125);
    found.push({b, unit, amax: f32(amax / unit), inUnits: b.map((v) => f32(v / unit))});
  }
  return found;
}

const ratio = (b, s) => (s > 0 ? f32(b / s) : 0);

// Sums by halves: i and i + 8, then 4, 2, 1 apart.
function blockSum(t) {
  while (t.length > 1) {
    const half = t.length / 2;
    t = t.slice(0, half).map((v, i) => f32(v + t[i + half]));
  }
  return t[0];
}

const dot = (a, b) => blockSum(a.map((v, i) => f32(v * b[i])));

function chooseTensorScale(largest) {
  if (!(largest > 0)) return 1;
  return Math.max(powerOfTwoBelow(f32(largest * f32(16 / 15))) * 2 ** -8, 2 ** -123);
}

// q: E2M1 values, 16 a block; s: a scale of 4 significant bits a block; u: noise for sub-normal ones or null.
function assemble(q, s, u) {
  const tensorScale = chooseTensorScale(Math.max(...s));
  const scales = s.map((v, i) => e4m3(f32(v / tensorScale), u && u[i]));
  const codes = q.map(e2m1Code);
  return {q, scales, tensorScale, codes, bytes: scales.map(e4m3Byte)};
}

function decode(t) {
  return t.q.map((v, i) => f32(v * t.scales[i >> 4] * t.tensorScale));
}

// ---- Sections 4 and 5: RTN, 4/6, the search

// One block in units, b, by a scale -> values and squared error.
function tryScale(b, s) {
  const q = b.map((v) => e2m1(ratio(v, s)));
  const lost = q.map((v, i) => f32(f32(v * s) - b[i]));
  return {q, s, error: dot(lost, lost)};
}

const scaleOf = (amax, top) => roundScale(f32(amax / f32(top)));

function searchScales(amax) {
  const bits = bitsOf(scaleOf(amax, 6));
  return SEARCH.map((steps) => (bits > 0 ? fromBits(bits + steps * 2 ** 20) : 0));
}

const SCALES = {
  rtn: (amax) => [scaleOf(amax, 6)],
  four_six: (amax) => [scaleOf(amax, 6), scaleOf(amax, 4)],
  scale_search: searchScales,
};

// What each scale makes of one block, {q, s, error}, in units; and which is kept.
function tries(block, quantizer) {
  const found = SCALES[quantizer](block.amax).map((s) => tryScale(block.inUnits, s));
  let best = found[0];
  for (const other of found) if (other.error < best.error) best = other;
  return {found, best};
}

// ---- Section 6: noise

function philox(seed, counter) {
  const WORD = 0xFFFFFFFFn;
  let [c0, c1, c2, c3] = [BigInt(counter) & WORD, BigInt(counter) >> 32n, 0n, 0n];
  seed = BigInt(seed);
  for (let i = 0n; i < PHILOX_ROUNDS; i++) {
    const a = c0 * 0xD2511F53n;
    const b = c2 * 0xCD9E8D57n;
    [c0, c1, c2, c3] = [
      (b >> 32n ^ c1 ^ (seed & WORD) + i * 0x9E3779B9n) & WORD, b & WORD,
      (a >> 32n ^ c3 ^ (seed >> 32n) + i * 0xBB67AE85n) & WORD, a & WORD,
    ];
  }
  return [c0, c1, c2, c3].map(Number);
}

// u of elements 0 to n - 1, float32 in [0, 1).
function uniform(seed, n) {
  const found = [];
  for (let counter = 0; found.length < n; counter++) {
    for (const word of philox(seed, counter)) found.push((word >>> 8) * 2 ** -24);
  }
  return found.slice(0, n);
}

// ---- Section 7: rotations

// x of whole groups of 128 -> x H, H Sylvester's Hadamard matrix: sums and differences of values 1, 2, 4, ...
// apart. Sums are float64 here; quartet.py's are float32, in an order that depends on the device.
function hadamard(x) {
  x = [...x];
  for (let apart = 1; apart < GROUP; apart *= 2) {
    for (let i = 0; i < x.length; i++) {
      if ((i & apart) === 0) [x[i], x[i + apart]] = [x[i] + x[i + apart], x[i] - x[i + apart]];
    }
  }
  return x;
}

// x -> x R, of rounds of 128 signs each, not normalised; and y -> y R^T. R R^T = 128^rounds I.
function rotate(x, signs) {
  for (const d of signs) x = hadamard(x.map((v, i) => v * d[i % GROUP]));
  return x;
}

function rotateBack(y, signs) {
  for (const d of [...signs].reverse()) y = hadamard(y).map((v, i) => v * d[i % GROUP]);
  return y;
}

// ---- Section 8: MS-EDEN

function largerCosine(v, q6, q4) {
  const square = (t) => f32(t * t);
  const four = f32(square(dot(v, q4)) * dot(q6, q6)) > f32(square(dot(v, q6)) * dot(q4, q4));
  return four ? q4 : q6;
}

function edenBlock(block, fourSix) {
  let s = f32(block.amax / f32(EDEN_MAX));
  const factor = f32(ratio(1, s) / block.unit);
  const v = block.b.map((value) => f32(value * factor));
  let q = v.map((value) => e2m1(value));
  if (fourSix) q = largerCosine(v, q, v.map((value) => e2m1(f32(value * f32(2 / 3)))));
  const vq = dot(v, q);
  s = f32(s * (vq > 0 ? f32(dot(v, v) / vq) : 1));
  return {q, s};
}

// ---- All of them: x, a row of whole blocks, rotated before if at all -> what `assemble` returns.

function quantize(quantizer, x, seed = 0) {
  const found = blocks(x);
  if (quantizer === 'sr') {
    const u = uniform(seed, x.length + found.length);
    const s = found.map((block) => scaleOf(block.amax, SR_MAX));
    const q = found.flatMap(
      (block, i) => block.inUnits.map((v, j) => e2m1(ratio(v, s[i]), u[BLOCK * i + j])));
    return assemble(q, s.map((v, i) => v * found[i].unit), u.slice(x.length));
  }
  if (quantizer.startsWith('ms_eden')) {
    const u = uniform(seed, 2 * found.length);
    const kept = found.map((block) => edenBlock(block, quantizer === 'ms_eden_46'));
    const s = kept.map(({s}, i) => roundScale(s, u[i]) * found[i].unit);
    return assemble(kept.flatMap(({q}) => q), s, u.slice(found.length));
  }
  const kept = found.map((block) => tries(block, quantizer).best);
  return assemble(kept.flatMap(({q}) => q), kept.map(({s}, i) => s * found[i].unit), null);
}
