// The pictures of the page. Each function below fills one <figure>, by its name, with controls and an SVG.

const SVG = 'http://www.w3.org/2000/svg';
const BLUE = 'var(--blue)', RED = 'var(--red)', GREEN = 'var(--green)', GREY = 'var(--grey)';
const SHOWN = {rtn: 'amax to 6 (RTN)', four: 'amax to 4', search: 'the best of five (search)'};

// ---- Small tools

function make(parent, name, attributes = {}, text = '') {
  const html = parent.namespaceURI !== SVG && name !== 'svg';
  const made = html ? document.createElement(name) : document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

// How wide a drawing is: as wide as there is room, so that on a phone text keeps its size. A page of more room
// shows it larger.
function room(stage) {
  return Math.max(300, Math.min(720, stage.clientWidth || 720));
}

function drawing(stage, height, label) {
  const viewBox = `0 0 ${room(stage)} ${height}`;
  return make(stage, 'svg', {viewBox, role: 'group', 'aria-label': label});
}

function button(controls, text, act) {
  const made = make(controls, 'button', {type: 'button'}, text);
  made.addEventListener('click', act);
  return made;
}

function choice(controls, label, options, act) {
  const made = make(make(controls, 'label', {}, `${label} `), 'select');
  for (const [value, text] of Object.entries(options)) make(made, 'option', {value}, text);
  made.addEventListener('change', () => act(made.value));
  return made;
}

// With its value beside it.
function slider(controls, label, {min, max, step, value}, act) {
  const outer = make(controls, 'label');
  make(outer, 'span', {}, label);
  const made = make(outer, 'input', {type: 'range', min, max, step, value});
  make(outer, 'output', {}, String(value));
  made.addEventListener('input', () => {
    tell(made, made.value);
    act(Number(made.value));
  });
  return made;
}

// Let a slider stand at a value, and have another label, if given.
function tell(made, value, label) {
  made.value = value;
  made.nextSibling.textContent = value;
  if (label) made.previousSibling.textContent = label;
}

// Numbers that are the same in every visit: mulberry32, and from it N(0, 1) by Box and Muller.
function numbers(seed) {
  const next = () => {
    seed = seed + 0x6D2B79F5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
  const signs = (n) => Array.from({length: n}, () => (next() < 0.5 ? -1 : 1));
  return {next, normal, signs};
}

const short = (v) => String(Number(v.toPrecision(4)));
const hexCodes = (q) => q.map((v) => e2m1Code(v).toString(16).toUpperCase()).join('');
const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, '0');

// ---- Section 5: one block

function block(stage) {
  const presets = {
    'ten to forty': Array.from({length: 16}, (_, i) => 10 * (i % 4 + 1)),
    'N(0, 1), times 12': Array.from({length: 16}, ((n) => () => Math.round(12 * n.normal()))(numbers(4))),
    'one outlier': Array.from({length: 16}, (_, i) => (i === 5 ? 48 : [3, -2, 1, 4, -4][i % 5])),
    'two near-equal': Array.from({length: 16}, (_, i) => ({3: 40, 9: 35})[i] ?? 0),
  };
  const controls = make(stage, 'div', {class: 'controls'});
  let x;
  const names = Object.fromEntries(Object.keys(presets).map((name) => [name, name]));
  const kind = choice(controls, 'values:', {...names, own: 'your own'}, (name) => {
    x = [...presets[name]];
    show();
  });
  const edited = kind.querySelector('[value=own]');
  edited.disabled = true;
  let chosen = 3;
  const own = slider(controls, 'value 4', {min: -48, max: 48, step: 1, value: 0}, (v) => set(chosen, v));

  // Bars from -48 to 48. Where there is little room, what is said of a grid takes three lines instead of two,
  // and of the values only the chosen one is told.
  const WIDTH = room(stage), NARROW = WIDTH < 560, ROW = NARROW ? 112 : 94, HEIGHT = 190 + 3 * ROW;
  const svg = drawing(stage, HEIGHT, 'sixteen values and three grids');
  const middle = 92, unit = 1.7, pitch = (WIDTH - 40) / 16;
  make(svg, 'line', {x1: 20, x2: WIDTH - 20, y1: middle, y2: middle, class: 'axis'});
  const bars = Array.from({length: 16}, (_, i) => {
    const bar = make(svg, 'rect', {x: 20 + pitch * (i + 0.1), width: pitch * 0.7, fill: BLUE});
    const label = make(svg, 'text', {x: 20 + pitch * (i + 0.45), 'text-anchor': 'middle', class: 'soft'});
    // What a hand takes: all that is above and below a bar.
    const column = make(svg, 'rect', {x: 20 + pitch * (i - 0.05), width: pitch, y: 5, height: 180,
      fill: 'transparent', class: 'handle', role: 'slider', 'aria-orientation': 'vertical',
      'aria-label': `value ${i + 1}`, 'aria-valuemin': -48, 'aria-valuemax': 48});
    column.addEventListener('focus', () => choose(i));
    column.addEventListener('keydown', (event) => keyed(event, i));
    column.addEventListener('click', () => choose(i));
    column.addEventListener('pointerdown', (event) => dragged(event, i));
    column.addEventListener('lostpointercapture', () => { column.onpointermove = null; });
    return {bar, label, column};
  });
  const lines = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});

  // Left and right go from bar to bar; the other keys change one.
  function keyed(event, i) {
    const next = {ArrowLeft: i - 1, ArrowRight: i + 1}[event.key];
    const value = {ArrowUp: x[i] + 1, ArrowDown: x[i] - 1, PageUp: x[i] + 8, PageDown: x[i] - 8, Home: -48,
      End: 48}[event.key];
    if (next !== undefined) bars[next]?.column.focus();
    if (value !== undefined) set(i, value);
    if (next !== undefined || value !== undefined) event.preventDefault();
  }

  // A mouse takes a bar along once it has moved. A finger only chooses it, since it may mean to scroll.
  function dragged(event, i) {
    const {column} = bars[i];
    if (event.button || event.pointerType === 'touch') return;
    column.setPointerCapture(event.pointerId);
    column.focus({preventScroll: true});
    const start = event.clientY, before = x[i];
    let moved = false;
    column.onpointermove = (now) => {
      moved ||= Math.abs(now.clientY - start) > 3;
      if (moved) set(i, before - (now.clientY - start) * HEIGHT / svg.getBoundingClientRect().height / unit);
    };
  }

  function choose(i) {
    chosen = i;
    show();
  }

  function set(i, value) {
    x[i] = Math.max(-48, Math.min(48, Math.round(value)));
    presets.own = [...x];
    edited.disabled = false;
    kind.value = 'own';
    show();
  }

  function show() {
    tell(own, x[chosen], `value ${chosen + 1}`);
    bars.forEach(({bar, label, column}, i) => {
      bar.setAttribute('opacity', i === chosen ? 1 : 0.7);
      const height = Math.max(1, Math.abs(x[i]) * unit);
      bar.setAttribute('y', x[i] > 0 ? middle - height : middle);
      bar.setAttribute('height', height);
      column.setAttribute('aria-valuenow', x[i]);
      column.setAttribute('tabindex', i === chosen ? 0 : -1);
      label.setAttribute('y', x[i] > 0 ? middle + 15 : middle - 5);
      label.textContent = NARROW && i !== chosen ? '' : x[i];
    });

    const [cut] = blocks(x);
    const [six, four] = tries(cut, 'four_six').found;
    const found = {rtn: six, four, search: tries(cut, 'scale_search').best};
    lines.replaceChildren();
    const least = Math.min(six.error, four.error);
    Object.entries(found).forEach(([name, {q, s, error}], k) => {
      const kept = name !== 'search' && error === least && (name === 'rtn' || error < six.error);
      const scale = s * cut.unit;
      const title = `${SHOWN[name]}${kept ? ', which 4/6 takes' : ''}: `;
      const told = `scale ${short(scale)}, squared error ${short(error * cut.unit ** 2 / 16)} a value`;
      const fours = hexCodes(q).match(/.{4}/g).join(' ');
      const y = 140 + ROW * (k + 1);
      const texts = [...(NARROW ? [title, told] : [title + told]), `codes ${fours}`];
      texts.forEach((text, j) => {
        const kind = j === texts.length - 1 ? 'soft' : '';
        make(lines, 'text', {x: 20, y: y + 2 - 18 * (texts.length - j), class: kind}, text);
      });
      grid(y, scale, q);
    });

    const t = quantize('four_six', x);
    const bytes = t.codes.filter((_, i) => i % 2 === 0).map((code, i) => hex(code | t.codes[2 * i + 1] << 4));
    said.textContent = `4/6, packed, the first of two codes in the low half: ${bytes.join(' ')}\n` +
      `block scale ${t.scales[0]} (0x${hex(t.bytes[0])}) times tensor scale 2^${Math.log2(t.tensorScale)}: ` +
      `${short(t.scales[0] * t.tensorScale)}\ndecoded ${decode(t).map(short).join(' ')}`;
  }

  // E2M1's grid at height y, times a scale, and the values that go to it: E2M1 values q.
  function grid(y, scale, q) {
    const at = (v) => WIDTH / 2 + (WIDTH - 48) / 160 * v;
    make(lines, 'line', {x1: at(-6 * scale), x2: at(6 * scale), y1: y + 12, y2: y + 12, class: 'axis'});
    for (const point of [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) {
      const place = at(point * scale);
      make(lines, 'line', {x1: place, x2: place, y1: y + 4, y2: y + 20, stroke: GREY, 'stroke-width': 2});
      if ([-6, -4, 0, 4, 6].includes(point)) {
        make(lines, 'text', {x: place, y: y + 33, 'text-anchor': 'middle', class: 'small'}, `${point}`);
      }
    }
    x.forEach((v, i) => {
      const place = q[i] * scale;
      make(lines, 'line', {x1: at(v), x2: at(place), y1: y, y2: y + 12, 'stroke-width': 2,
        stroke: place === v ? GREEN : RED});
      make(lines, 'circle', {cx: at(v), cy: y, r: 3.5, fill: BLUE});
    });
  }

  x = [...presets['ten to forty']];
  show();
}

// ---- Section 6: stochastic rounding

function stochastic(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const AMAX = 6.2;      // of the block that the value is in
  let value = 2.6, seed = 1, count = 0, means = [], sum = 0, top = SR_MAX;
  slider(controls, 'value', {min: 0, max: AMAX, step: 0.05, value}, (v) => { value = v; restart(200); });
  choice(controls, 'amax of 6.2 maps to:', {safe: '16/17 of 6', six: '6'}, (name) => {
    top = name === 'safe' ? SR_MAX : 6;
    restart(200);
  });
  button(controls, 'draw 1 more', () => draw(1));
  button(controls, 'draw 200 more', () => draw(200));
  button(controls, 'other draws', () => {
    seed += 1;
    restart(1);
  });
  const svg = drawing(stage, 290, 'the mean of draws'), right = room(stage) - 110;
  const graph = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});

  function scale() {
    const [own] = blocks([AMAX, ...Array(15).fill(0)]);
    return scaleOf(own.amax, top) * own.unit;
  }

  function draw(times) {
    const s = scale();
    for (const u of uniform(seed, count + times).slice(count)) {
      sum += e2m1(ratio(value, s), u) * s;
      count += 1;
      means.push(sum / count);
    }
    show();
  }

  function restart(times) {
    count = 0;
    means = [];
    sum = 0;
    draw(times);
  }

  function show() {
    const s = scale();
    const n = f32(value / s);
    const y = (v) => 262 - 250 * v / 6.75;
    graph.replaceChildren();
    for (const point of [0, 0.5, 1, 1.5, 2, 3, 4, 6]) {
      make(graph, 'line', {x1: 20, x2: right, y1: y(point * s), y2: y(point * s), class: 'axis'});
      make(graph, 'text', {x: right + 8, y: y(point * s) + 4, class: 'small'}, `${point} s`);
    }
    const height = y(value);
    make(graph, 'line', {x1: 20, x2: right + 42, y1: height, y2: height, stroke: GREEN, 'stroke-width': 2});
    make(graph, 'text', {x: right + 48, y: height + 4}, 'the value');
    const x = (i) => 20 + (right - 20) * Math.log(i + 1) / Math.log(Math.max(10, means.length));
    const points = means.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`);
    make(graph, 'polyline', {points: points.join(' '), fill: 'none', stroke: BLUE, 'stroke-width': 2});
    const [cx, cy] = points.at(-1).split(',');
    make(graph, 'circle', {cx, cy, r: 4, fill: BLUE});
    make(graph, 'text', {x: 20, y: 284, class: 'small'}, 'draws, on a logarithmic axis');
    const clips = n > 6 ? `\nit clips: value / s is ${short(n)}, and no draw gives more than 6 s` : '';
    said.textContent = `scale s ${short(s)}   draws ${means.length}   their mean ${short(means.at(-1))}` +
      `   value ${short(value)}${clips}`;
  }

  restart(200);
}

// ---- Section 7: a rotation

function rotation(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const state = {kind: 'outlier', second: 0.88, signs: 1};
  const kinds = {outlier: 'one 100 in N(0, 1)', equals: '1 and a second value', normal: 'N(0, 1)'};
  choice(controls, 'group:', kinds, (kind) => { state.kind = kind; show(); });
  const second = slider(controls, 'second value', {min: 0, max: 1, step: 0.01, value: 0.88},
    (v) => { state.second = v; show(); });
  button(controls, 'other signs', () => { state.signs += 1; show(); });
  const svg = drawing(stage, 400, 'a group of 128 values, and rotated by one, two and three rounds');
  const right = room(stage) - 20, pitch = (right - 20) / GROUP;
  const graph = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});

  function group() {
    const {normal} = numbers(7);
    const x = Array.from({length: GROUP}, () => f32(state.kind === 'equals' ? 0 : normal()));
    if (state.kind === 'equals') [x[40], x[41]] = [1, f32(state.second)];
    if (state.kind === 'outlier') x[40] = 100;
    return x;
  }

  function show() {
    second.disabled = state.kind !== 'equals';
    const x = group();
    const random = numbers(state.signs);
    const signs = Array.from({length: 3}, () => random.signs(GROUP));
    graph.replaceChildren();
    const peaks = [];
    for (let rounds = 0; rounds <= 3; rounds++) {
      const v = rotate(x, signs.slice(0, rounds)).map((value) => value / Math.sqrt(GROUP ** rounds));
      const root = Math.sqrt(v.reduce((sum, value) => sum + value * value, 0) / GROUP) || 1;
      const top = Math.max(...v.map(Math.abs));
      const middle = 58 + 98 * rounds;
      const title = rounds ? `${rounds} round${rounds > 1 ? 's' : ''}` : 'before';
      peaks.push(`${title} ${short(top / root)}`);
      make(graph, 'text', {x: 20, y: middle - 40}, title);
      make(graph, 'line', {x1: 20, x2: right, y1: middle, y2: middle, class: 'axis'});
      v.forEach((value, i) => {
        const height = Math.abs(value) / (top || 1) * 32;
        make(graph, 'rect', {x: 20 + pitch * i, width: 0.75 * pitch, height: Math.max(0.5, height),
          y: value > 0 ? middle - height : middle, fill: rounds ? BLUE : GREEN});
      });
    }
    said.textContent = `largest over root mean square: ${peaks.join(', ')}`;
  }

  show();
}

// ---- Section 8: the mean of draws of MS-EDEN

function eden(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const state = {kind: 'outlier', fourSix: false};
  const options = {outlier: 'one 100 in N(0, 1)', equals: '1, 0.88, 126 zeros', normal: 'N(0, 1)'};
  choice(controls, 'groups:', options, (kind) => { state.kind = kind; start(); });
  const mode = button(controls, 'with 4/6', () => {
    state.fourSix = !state.fourSix;
    start();
  });
  const svg = drawing(stage, 315, 'the error of the mean of B draws, against B'), right = room(stage) - 76;
  const graph = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said'});
  const GROUPS = 6, DRAWS = 256;
  let run = 0;

  function groups() {
    const {normal} = numbers(3);
    return Array.from({length: GROUPS}, (_, k) => {
      const x = Array.from({length: GROUP}, () => f32(state.kind === 'equals' ? 0 : normal()));
      if (state.kind === 'outlier') x[9 * k + 2] = 100;
      if (state.kind === 'equals') [x[9 * k + 2], x[9 * k + 3]] = [1, f32(0.88)];
      return x;
    }).flat();
  }

  // For 12 ms of every frame, so that the page answers meanwhile. What is said is spoken at the end.
  function start() {
    mode.setAttribute('aria-pressed', state.fourSix);
    const own = ++run;
    const x = groups();
    const norm = x.reduce((sum, v) => sum + v * v, 0);
    const random = numbers(11);
    const kinds = [1, 2, 3].map((rounds) => ({rounds, sum: new Float64Array(x.length), errors: []}));
    let draws = 0, singles = 0;      // squared errors of single draws of three rounds, over the squared norm

    function step() {
      if (own !== run) return;
      const end = performance.now() + 12;
      while (draws < DRAWS && performance.now() < end) {
        draws += 1;
        for (const kind of kinds) {
          const signs = Array.from({length: kind.rounds}, () => random.signs(GROUP));
          const quantizer = state.fourSix ? 'ms_eden_46' : 'ms_eden';
          const t = quantize(quantizer, rotate(x, signs), draws * 8 + kind.rounds);
          const back = rotateBack(decode(t), signs);
          let error = 0;
          for (let i = 0; i < x.length; i++) {
            const lost = back[i] / GROUP ** kind.rounds - x[i];
            kind.sum[i] += lost;
            error += (kind.sum[i] / draws) ** 2;
            if (kind.rounds === 3) singles += lost ** 2 / norm;
          }
          kind.errors.push(Math.sqrt(error / norm));
        }
      }
      said.setAttribute('aria-live', draws < DRAWS ? 'off' : 'polite');
      show(kinds, draws, Math.sqrt(singles / draws));
      if (draws < DRAWS) requestAnimationFrame(step);
    }

    step();
  }

  // single: the error of one draw, in the root mean square.
  function show(kinds, draws, single) {
    graph.replaceChildren();
    const x = (B) => 60 + (right - 60) * Math.log2(B) / Math.log2(DRAWS);
    const y = (error) => 20 + 60 * Math.log2(0.15 / Math.max(error, 1e-3)) / 2 * 1.15;
    for (const B of [1, 4, 16, 64, 256]) {
      make(graph, 'line', {x1: x(B), x2: x(B), y1: 20, y2: 268, class: 'axis'});
      make(graph, 'text', {x: x(B), y: 288, 'text-anchor': 'middle', class: 'soft'}, String(B));
    }
    make(graph, 'text', {x: (60 + right) / 2, y: 306, 'text-anchor': 'middle', class: 'small'}, 'B, draws');
    for (const error of [0.1, 0.03, 0.01, 0.003]) {
      make(graph, 'line', {x1: 60, x2: right, y1: y(error), y2: y(error), class: 'axis'});
      make(graph, 'text', {x: 12, y: y(error) + 4, class: 'soft'}, `${short(100 * error)}%`);
    }
    make(graph, 'line', {x1: x(1), y1: y(single), x2: x(DRAWS), y2: y(single / 16), stroke: GREY,
      'stroke-width': 6, opacity: 0.4});
    // Numbers at the ends of the lines, from top to bottom, apart from each other.
    const ends = kinds.map(({errors}) => y(errors.at(-1)) + 4);
    const [first, second, third] = [0, 1, 2].sort((a, b) => ends[a] - ends[b]);
    ends[second] = Math.max(ends[second], ends[first] + 15);
    ends[third] = Math.max(ends[third], ends[second] + 15);
    kinds.forEach(({rounds, errors}, k) => {
      const colour = [RED, BLUE, GREEN][k];
      const points = errors.map((error, i) => `${x(i + 1).toFixed(1)},${y(error).toFixed(1)}`);
      make(graph, 'polyline', {points: points.join(' '), fill: 'none', stroke: colour, 'stroke-width': 2});
      make(graph, 'text', {x: x(errors.length) + 6, y: ends[k], style: `fill: ${colour}`},
        `${rounds} round${rounds > 1 ? 's' : ''}`);
    });
    said.textContent = `B ${draws}   error of the mean, of the norm: ` + kinds.map(({rounds, errors}) =>
      `${rounds} round${rounds > 1 ? 's' : ''} ${short(100 * errors.at(-1))}%`).join('   ');
  }

  // It computes for seconds: only once it is looked at.
  new IntersectionObserver(([seen], observer) => {
    if (seen.isIntersecting) {
      observer.disconnect();
      start();
    }
  }).observe(stage);
}

// ---- Section 10: the three GEMMs

const QUANTIZED_BY = {
  bf16: 'left in bf16',
  rtn: 'RTN: amax to 6, to nearest',
  rtn_16x16: 'RTN, a scale for 16 x 16 values: the transpose has the same codes',
  four_six: '4/6: amax to 6 or to 4, whichever errs less',
  four_six_16x16: '4/6, a scale for 16 x 16 values',
  scale_search: 'the best of five scales',
  scale_search_16x16: 'the best of five scales, each for 16 x 16 values',
  sr: 'SR: each value up or down at random',
  ms_eden: 'MS-EDEN: values to nearest, scales times the EDEN factor, up or down at random',
  ms_eden_46: 'MS-EDEN, whose amax maps to 6 or to 4',
};
const TURNED_BY = {
  rht16: 'one round of rotation in groups of 16', rht32: 'one round of rotation in groups of 32',
  rht128: 'one round of rotation in groups of 128', rht128x2: 'two rounds of rotation in groups of 128',
  rht128x3: 'three rounds of rotation in groups of 128',
};

// What a quantizer is for.
function aimOf(quantizer) {
  if (quantizer === 'bf16') return 'exact';
  return quantizer === 'sr' || quantizer.startsWith('ms_eden') ? 'the mean of draws is right' : 'a small error';
}

function gemms(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const names = Object.keys(RECIPES);
  choice(controls, 'recipe:', Object.fromEntries(names.map((name) => [name, name])), show).value = 'quartet2';
  const place = make(stage, 'div', {class: 'operands'});
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});
  const bytes = make(stage, 'p', {class: 'bytes'});

  const PLAIN = {dy: 'bf16', other: 'bf16', rotation: null};

  // The operands of a recipe: [GEMM, its two operands as [name, quantizer, rotation, where it comes from]].
  function operands(row) {
    if (!row) row = {x: 'bf16', w: 'bf16', dx: PLAIN, dw: PLAIN, original: true};
    const again = row.original ? 'from its bf16 values' : 'from what the forward pass stored';
    const w = row.dx.other === null ? ['w', row.w, null, 'as the forward pass stored it, transposed'] :
      ['w', row.dx.other, row.dx.rotation, again];
    return [
      ['y = x wᵀ, summed over inputs', ['x', row.x], ['w', row.w]],
      ['dx = dy w, summed over outputs', ['dy', row.dx.dy, row.dx.rotation], w],
      ['dw = dyᵀ x, summed over tokens', ['dy', row.dw.dy, row.dw.rotation],
        ['x', row.dw.other, row.dw.rotation, again]],
    ];
  }

  // Bytes a value of x and of w that wait for the backward pass: 4 bits and a 16th of a byte, or bf16.
  function kept(row) {
    if (!row) return 'x 2, w 2';
    const size = (bf16) => (bf16 ? '2' : '0.5625');
    return `x ${size(row.original)}, w ${size(row.original && row.dx.other !== null)}`;
  }

  function show(name) {
    const row = RECIPES[name];
    place.replaceChildren();
    for (const [title, ...pair] of operands(row)) {
      const column = make(place, 'div');
      make(column, 'h3', {}, title);
      for (const [operand, quantizer, turned, source] of pair) {
        const made = make(column, 'button', {type: 'button'});
        make(made, 'strong', {}, operand);
        make(made, 'span', {}, quantizer + (turned ? `, after ${turned}` : ''));
        make(made, 'small', {}, aimOf(quantizer));
        const point = () => {
          place.querySelector('[aria-pressed=true]')?.setAttribute('aria-pressed', false);
          made.setAttribute('aria-pressed', true);
          said.textContent = `${operand} in ${title}: ${QUANTIZED_BY[quantizer]}` +
            (turned ? `; after ${TURNED_BY[turned]}` : '') + (source ? `; ${source}` : '') + '.';
        };
        for (const event of ['focus', 'pointerenter', 'click']) made.addEventListener(event, point);
      }
    }
    place.querySelector('button').click();
    const pull = row && row.dampen ? ` Weights are pulled to the grid, by ${row.dampen} lr (t/T)^4.` : '';
    bytes.textContent = `Kept for the backward pass, bytes a value: ${kept(row)}.${pull}`;
  }

  show('quartet2');
}

// ---- Section 12: weights that come to rest

function rest(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const state = {best: 1.2, strength: 10, seed: 2};
  slider(controls, 'best value', {min: 1.1, max: 1.4, step: 0.01, value: 1.2},
    (v) => { state.best = v; show(); });
  slider(controls, 'strength of the pull (quintet: 10)', {min: 0, max: 40, step: 1, value: 10},
    (v) => { state.strength = v; show(); });
  button(controls, 'other noise', () => { state.seed += 1; show(); });
  const svg = drawing(stage, 345, 'the path of a weight, without and with the pull'), right = room(stage) - 66;
  const graph = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});
  const STEPS = 400, LR = 0.1;

  // The gradient is taken at Q(w), a point of E2M1's grid, and is noisy. The rate falls along a cosine.
  function path(strength, seed) {
    const {normal} = numbers(seed);
    let w = 1.1, flips = 0, before = e2m1(w);
    const found = [];
    for (let t = 1; t <= STEPS; t++) {
      const lr = LR * (0.55 + 0.45 * Math.cos(Math.PI * t / STEPS));
      w -= lr * (e2m1(w) - state.best + 0.3 * normal());
      w += Math.min(1, strength * lr * (t / STEPS) ** 4) * (e2m1(w) - w);
      const now = e2m1(w);
      if (t > STEPS - 80 && now !== before) flips += 1;
      before = now;
      found.push([w, now]);
    }
    return {found, flips};
  }

  function show() {
    graph.replaceChildren();
    const flips = [0, state.strength].map((strength, k) => {
      const {found, flips} = path(strength, state.seed);
      const y = (v) => 150 + 165 * k - 200 * (v - 0.95) * 0.9;
      const x = (t) => 20 + (right - 20) * t / STEPS;
      for (const point of [1, 1.5]) {
        make(graph, 'line', {x1: 20, x2: right, y1: y(point), y2: y(point), stroke: GREY, 'stroke-width': 2});
        make(graph, 'text', {x: right + 6, y: y(point) + 4}, short(point));
      }
      make(graph, 'line', {x1: 20, x2: right, y1: y(1.25), y2: y(1.25), class: 'axis'});
      make(graph, 'text', {x: right + 6, y: y(state.best > 1.25 ? 1.21 : 1.29) + 4, class: 'small'}, 'border');
      make(graph, 'line', {x1: 20, x2: right, y1: y(state.best), y2: y(state.best), stroke: GREEN,
        'stroke-dasharray': '6 4'});
      make(graph, 'text', {x: right + 6, y: y(state.best) + 4, style: `fill: ${GREEN}`}, 'best');
      make(graph, 'text', {x: 20, y: y(1.5) - 22, class: 'soft'}, k ? 'with the pull' : 'without the pull');
      make(graph, 'polyline', {fill: 'none', stroke: RED, opacity: 0.55, 'stroke-width': 2,
        points: found.map(([, q], t) => `${x(t).toFixed(1)},${y(q).toFixed(1)}`).join(' ')});
      make(graph, 'polyline', {fill: 'none', stroke: BLUE, 'stroke-width': 1.5,
        points: found.map(([w], t) => `${x(t).toFixed(1)},${y(w).toFixed(1)}`).join(' ')});
      return flips;
    });
    // Where it ends is chance: of 60 noises.
    const ends = Array.from({length: 60}, (_, seed) => path(state.strength, seed + 1).found.at(-1)[1]);
    said.textContent = 'blue: the weight w; red: Q(w), its value on the grid\n' +
      `of the last 80 steps, Q(w) flips in ${flips[0]} without the pull, in ${flips[1]} with it\n` +
      `with the pull, by 60 noises: Q(w) ends at 1 in ${ends.filter((q) => q === 1).length}, else at 1.5`;
  }

  show();
}

const DRAWN = {block, stochastic, rotation, eden, gemms, rest};
for (const [name, draw] of Object.entries(DRAWN)) {
  const stage = document.getElementById(`picture-${name}`)?.querySelector('.stage');
  if (!stage) continue;
  let drawn = room(stage);
  draw(stage);
  // Drawn anew if the page gets another width, as on a phone that is turned.
  new ResizeObserver(() => {
    if (Math.abs(room(stage) - drawn) < 40) return;
    drawn = room(stage);
    stage.replaceChildren();
    draw(stage);
  }).observe(stage);
}
