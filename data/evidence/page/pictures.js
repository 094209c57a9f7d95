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

// How wide a drawing is: as wide as the page has room for when it is opened, so that on a phone text keeps its
// size. A wider page shows it larger.
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

function slider(controls, label, {min, max, step, value}, act) {
  const outer = make(controls, 'label', {}, `${label} `);
  const made = make(outer, 'input', {type: 'range', min, max, step, value});
  made.addEventListener('input', () => act(Number(made.value)));
  return made;
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
    if (name !== 'own') x = [...presets[name]];
    show();
  });
  let chosen = 3;
  const own = slider(controls, 'value 4', {min: -48, max: 48, step: 1, value: 0}, (v) => set(chosen, v));

  // Bars from -48 to 48. Where there is little room, what is said of a grid takes three lines instead of two.
  const WIDTH = room(stage), NARROW = WIDTH < 560, ROW = NARROW ? 98 : 80, HEIGHT = 204 + 3 * ROW;
  const svg = drawing(stage, HEIGHT, 'sixteen values and three grids');
  const middle = 92, unit = 1.7, pitch = (WIDTH - 40) / 16;
  make(svg, 'line', {x1: 20, x2: WIDTH - 20, y1: middle, y2: middle, class: 'axis'});
  const bars = Array.from({length: 16}, (_, i) => {
    const bar = make(svg, 'rect', {x: 20 + pitch * (i + 0.1), width: pitch * 0.7, fill: BLUE, class: 'handle',
      tabindex: 0, role: 'slider', 'aria-label': `value ${i + 1}`, 'aria-valuemin': -48, 'aria-valuemax': 48});
    bar.addEventListener('focus', () => choose(i));
    bar.addEventListener('keydown', (event) => {
      const steps = {ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 8, PageDown: -8};
      const step = steps[event.key];
      if (step) {
        set(i, x[i] + step);
        event.preventDefault();
      }
    });
    // Anywhere above or below a bar, a mouse takes it. A finger only chooses it, since it may mean to scroll.
    const column = make(svg, 'rect', {x: 20 + pitch * i, width: pitch, y: 5, height: 180,
      fill: 'transparent', class: 'handle'});
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      set(i, (middle - (event.clientY - box.top) * HEIGHT / box.height) / unit);
    };
    column.addEventListener('click', () => choose(i));
    column.addEventListener('pointerdown', (event) => {
      if (event.button || event.pointerType === 'touch') return;
      column.setPointerCapture(event.pointerId);
      bar.focus({preventScroll: true});
      follow(event);
      column.onpointermove = follow;
    });
    column.addEventListener('lostpointercapture', () => { column.onpointermove = null; });
    const label = make(svg, 'text', {x: 20 + pitch * (i + 0.45), 'text-anchor': 'middle', class: 'soft'});
    if (pitch < 30) label.style.fontSize = '10px';
    return {bar, label};
  });
  const lines = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});

  function choose(i) {
    chosen = i;
    own.parentElement.firstChild.textContent = `value ${i + 1} `;
    show();
  }

  function set(i, value) {
    x[i] = Math.max(-48, Math.min(48, Math.round(value)));
    kind.value = 'own';
    show();
  }

  function show() {
    own.value = x[chosen];
    bars.forEach(({bar, label}, i) => {
      bar.setAttribute('opacity', i === chosen ? 1 : 0.75);
      const height = Math.max(1, Math.abs(x[i]) * unit);
      bar.setAttribute('y', x[i] > 0 ? middle - height : middle);
      bar.setAttribute('height', height);
      bar.setAttribute('aria-valuenow', x[i]);
      label.setAttribute('y', x[i] > 0 ? middle + 15 : middle - 5);
      label.textContent = x[i];
    });

    const [cut] = blocks(x);
    const [six, four] = tries(cut, 'four_six').found;
    const found = {rtn: six, four, search: tries(cut, 'scale_search').best};
    lines.replaceChildren();
    const least = Math.min(six.error, four.error);
    Object.entries(found).forEach(([name, {q, s, error}], k) => {
      const y = 154 + ROW * (k + 1);
      const mean = error * cut.unit ** 2 / 16;
      const kept = name !== 'search' && error === least && (name === 'rtn' || error < six.error);
      const title = `${SHOWN[name]}${kept ? ', which 4/6 takes' : ''}: `;
      const numbers = `scale ${short(s * cut.unit)}, squared error ${short(mean)} a value`;
      const fours = hexCodes(q).match(/.{4}/g).join(' ');
      const texts = [...(NARROW ? [title, numbers] : [title + numbers]), `codes ${fours}`];
      texts.forEach((text, j) => {
        const kind = j === texts.length - 1 ? 'soft' : '';
        make(lines, 'text', {x: 20, y: y + 4 - 18 * (texts.length - j), class: kind}, text);
      });
      const at = (v) => WIDTH / 2 + (WIDTH - 76) / 104 * v;
      make(lines, 'line', {x1: at(-52), x2: at(52), y1: y + 12, y2: y + 12, class: 'axis'});
      for (const point of [0, 0.5, 1, 1.5, 2, 3, 4, 6]) {
        for (const sign of [1, -1]) {
          const place = at(sign * point * s * cut.unit);
          if (Math.abs(place - WIDTH / 2) < WIDTH / 2 - 20) {
            make(lines, 'line', {x1: place, x2: place, y1: y + 4, y2: y + 20, stroke: GREY,
              'stroke-width': 2});
          }
        }
      }
      x.forEach((v, i) => {
        make(lines, 'line', {x1: at(v), x2: at(q[i] * s * cut.unit), y1: y, y2: y + 12, stroke: RED});
        make(lines, 'circle', {cx: at(v), cy: y, r: 3.5, fill: BLUE});
      });
    });

    const t = quantize('four_six', x);
    const bytes = t.codes.filter((_, i) => i % 2 === 0).map((code, i) => hex(code | t.codes[2 * i + 1] << 4));
    said.textContent = `four_six: packed ${bytes.join(' ')}\n` +
      `block scale ${t.scales[0]} (0x${hex(t.bytes[0])})   tensor scale 2^${Math.log2(t.tensorScale)}\n` +
      `decoded ${decode(t).map(short).join(' ')}`;
  }

  x = [...presets['ten to forty']];
  show();
}

// ---- Section 6: stochastic rounding

function stochastic(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const AMAX = 6.2;      // of the block that the value is in
  let value = 2.6, count = 0, means = [], sum = 0, top = SR_MAX;
  slider(controls, 'value', {min: 0, max: AMAX, step: 0.05, value}, (v) => { value = v; restart(200); });
  choice(controls, 'amax of 6.2 maps to:', {safe: '16/17 of 6', six: '6'}, (name) => {
    top = name === 'safe' ? SR_MAX : 6;
    restart(200);
  });
  button(controls, 'draw 1 more', () => draw(1));
  button(controls, 'draw 200 more', () => draw(200));
  button(controls, 'begin again', () => restart(1));
  const svg = drawing(stage, 260, 'the mean of draws'), right = room(stage) - 110;
  const graph = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});

  function scale() {
    const [own] = blocks([AMAX, ...Array(15).fill(0)]);
    return scaleOf(own.amax, top) * own.unit;
  }

  function draw(times) {
    const s = scale();
    for (const u of uniform(1, count + times).slice(count)) {
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
    graph.replaceChildren();
    const n = f32(value / s);
    const down = e2m1(n, 0.999999), up = e2m1(n, 0);
    const spread = Math.max((up - down) * s, 0.3 * s);
    const y = (v) => 130 - 90 * (v - value) / spread;
    const shown = [[down * s, GREY, `${short(down)} s`, 6], [value, GREEN, 'the value', 44]];
    if (up !== down) shown.push([up * s, GREY, `${short(up)} s`, 6]);
    for (const [v, colour, text, x] of shown) {
      const place = Math.max(12, Math.min(248, y(v)));
      make(graph, 'line', {x1: 20, x2: right, y1: place, y2: place, stroke: colour, 'stroke-width': 2});
      make(graph, 'text', {x: right + x, y: place + 4}, text);
    }
    const x = (i) => 20 + (right - 20) * Math.log(i + 1) / Math.log(Math.max(10, means.length));
    const points = means.map((v, i) => `${x(i).toFixed(1)},${Math.max(5, Math.min(255, y(v))).toFixed(1)}`);
    make(graph, 'polyline', {points: points.join(' '), fill: 'none', stroke: BLUE, 'stroke-width': 2});
    const [end, height] = points.at(-1).split(',');
    make(graph, 'circle', {cx: end, cy: height, r: 4, fill: BLUE});
    const clips = n > 6 ? `   it clips: value / s is ${short(n)}, and no draw gives more than 6 s` : '';
    said.textContent = `scale s ${short(s)}   draws ${means.length}   their mean ${short(means.at(-1))}` +
      `   value ${short(value)}${clips}`;
  }

  restart(200);
}

// ---- Section 7: a rotation

function rotation(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const state = {kind: 'equals', second: 0.88, signs: 1};
  const kinds = {equals: '1 and a second value', outlier: 'one 100 in N(0, 1)', normal: 'N(0, 1)'};
  choice(controls, 'group:', kinds, (kind) => { state.kind = kind; show(); });
  const second = slider(controls, 'second value', {min: 0, max: 1, step: 0.01, value: 0.88},
    (v) => { state.second = v; show(); });
  button(controls, 'other signs', () => { state.signs += 1; show(); });
  const svg = drawing(stage, 380, 'a group of 128 values, and rotated by one, two and three rounds');
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
      peaks.push(`${rounds}: ${short(top / root)}`);
      const middle = 50 + 94 * rounds;
      const title = rounds ? `${rounds} round${rounds > 1 ? 's' : ''}` : 'before';
      make(graph, 'text', {x: 20, y: middle - 36}, title);
      make(graph, 'line', {x1: 20, x2: right, y1: middle, y2: middle, class: 'axis'});
      v.forEach((value, i) => {
        const height = Math.abs(value) / (top || 1) * 32;
        make(graph, 'rect', {x: 20 + pitch * i, width: 0.75 * pitch, height: Math.max(0.5, height),
          y: value > 0 ? middle - height : middle, fill: rounds ? BLUE : GREEN});
      });
    }
    said.textContent = `largest over root mean square, by rounds - ${peaks.join('   ')}`;
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
  const svg = drawing(stage, 300, 'the error of the mean of B draws, against B'), right = room(stage) - 60;
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
    let draws = 0;

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
            kind.sum[i] += back[i] / GROUP ** kind.rounds - x[i];
            error += (kind.sum[i] / draws) ** 2;
          }
          kind.errors.push(Math.sqrt(error / norm));
        }
      }
      said.setAttribute('aria-live', draws < DRAWS ? 'off' : 'polite');
      show(kinds, draws);
      if (draws < DRAWS) requestAnimationFrame(step);
    }

    step();
  }

  function show(kinds, draws) {
    graph.replaceChildren();
    const x = (B) => 60 + (right - 60) * Math.log2(B) / Math.log2(DRAWS);
    const y = (error) => 20 + 60 * Math.log2(0.15 / Math.max(error, 1e-3)) / 2 * 1.15;
    for (const B of [1, 4, 16, 64, 256]) {
      make(graph, 'line', {x1: x(B), x2: x(B), y1: 20, y2: 268, class: 'axis'});
      make(graph, 'text', {x: x(B) - 8, y: 290, class: 'soft'}, String(B));
    }
    for (const error of [0.1, 0.03, 0.01, 0.003]) {
      make(graph, 'line', {x1: 60, x2: right, y1: y(error), y2: y(error), class: 'axis'});
      make(graph, 'text', {x: 12, y: y(error) + 4, class: 'soft'}, `${short(100 * error)}%`);
    }
    const start = kinds[2].errors[0];
    make(graph, 'line', {x1: x(1), y1: y(start), x2: x(DRAWS), y2: y(start / 16), stroke: GREY,
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
      make(graph, 'text', {x: x(errors.length) + 6, y: ends[k], style: `fill: ${colour}`}, String(rounds));
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
  ms_eden: 'MS-EDEN: values to nearest, scales corrected and at random',
  ms_eden_46: 'MS-EDEN, whose amax maps to 6 or to 4',
};
const TURNED_BY = {
  rht16: 'one round over 16', rht32: 'one round over 32', rht128: 'one round over 128',
  rht128x2: 'two rounds over 128', rht128x3: 'three rounds over 128',
};

function gemms(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const names = Object.keys(RECIPES);
  choice(controls, 'recipe:', Object.fromEntries(names.map((name) => [name, name])), show).value = 'quartet2';
  const bytes = make(stage, 'p', {class: 'bytes'});
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});
  const place = make(stage, 'div', {class: 'operands'});

  // The operands of a recipe: [GEMM, its two operands as [name, quantizer, rotation, where it comes from]].
  function operands(row) {
    if (!row) {
      return [['y = x wᵀ', ['x', 'bf16'], ['w', 'bf16']], ['dx = dy w', ['dy', 'bf16'], ['w', 'bf16']],
        ['dw = dyᵀ x', ['dy', 'bf16'], ['x', 'bf16']]];
    }
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
        const tell = () => {
          place.querySelector('[aria-pressed=true]')?.setAttribute('aria-pressed', false);
          made.setAttribute('aria-pressed', true);
          said.textContent = `${operand} in ${title}: ${QUANTIZED_BY[quantizer]}` +
            (turned ? `; rotated before, ${TURNED_BY[turned]}` : '') + (source ? `; ${source}` : '') + '.';
        };
        for (const event of ['focus', 'pointerenter', 'click']) made.addEventListener(event, tell);
      }
    }
    const pull = row && row.dampen ? ` Weights are pulled to the grid, by ${row.dampen} lr (t/T)^4.` : '';
    bytes.textContent = `Kept for the backward pass, bytes a value: ${kept(row)}.${pull}`;
    said.textContent = '';
  }

  show('quartet2');
}

// ---- Section 12: weights that come to rest

function rest(stage) {
  const controls = make(stage, 'div', {class: 'controls'});
  const state = {best: 1.2, strength: 10, seed: 1};
  slider(controls, 'best value', {min: 1.1, max: 1.4, step: 0.01, value: 1.2},
    (v) => { state.best = v; show(); });
  slider(controls, 'strength of the pull', {min: 0, max: 40, step: 1, value: 10},
    (v) => { state.strength = v; show(); });
  button(controls, 'other noise', () => { state.seed += 1; show(); });
  const svg = drawing(stage, 330, 'the path of a weight, without and with the pull'), right = room(stage) - 60;
  const graph = make(svg, 'g');
  const said = make(stage, 'p', {class: 'said', 'aria-live': 'polite'});
  const STEPS = 400, LR = 0.1;

  // The gradient is taken at Q(w), a point of E2M1's grid, and is noisy. The rate falls along a cosine.
  function path(strength) {
    const {normal} = numbers(state.seed);
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
      const {found, flips} = path(strength);
      const y = (v) => 140 + 165 * k - 200 * (v - 0.95) * 0.9;
      const x = (t) => 20 + (right - 20) * t / STEPS;
      for (const point of [1, 1.5]) {
        make(graph, 'line', {x1: 20, x2: right, y1: y(point), y2: y(point), stroke: GREY, 'stroke-width': 2});
        make(graph, 'text', {x: right + 6, y: y(point) + 4}, short(point));
      }
      make(graph, 'line', {x1: 20, x2: right, y1: y(state.best), y2: y(state.best), stroke: GREEN,
        'stroke-dasharray': '6 4'});
      make(graph, 'text', {x: 20, y: y(1.5) - 22, class: 'soft'}, k ? 'with the pull' : 'without the pull');
      make(graph, 'polyline', {fill: 'none', stroke: RED, opacity: 0.55, 'stroke-width': 2,
        points: found.map(([, q], t) => `${x(t).toFixed(1)},${y(q).toFixed(1)}`).join(' ')});
      make(graph, 'polyline', {fill: 'none', stroke: BLUE, 'stroke-width': 1.5,
        points: found.map(([w], t) => `${x(t).toFixed(1)},${y(w).toFixed(1)}`).join(' ')});
      return flips;
    });
    said.textContent = 'blue: the weight w; red: Q(w), its value on the grid; green: the best value\n' +
      `of the last 80 steps, Q(w) flips in ${flips[0]} without the pull, in ${flips[1]} with it`;
  }

  show();
}

const DRAWN = {block, stochastic, rotation, eden, gemms, rest};
for (const [name, draw] of Object.entries(DRAWN)) {
  const figure = document.getElementById(`picture-${name}`);
  if (figure) draw(figure.querySelector('.stage'));
}
