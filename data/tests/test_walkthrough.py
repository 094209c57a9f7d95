"""Tests of walkthrough.py: the page holds the article, rounds as quartet.py does, and its pictures answer."""
import html
import json
import re

import pytest
import torch

import quartet
import small_runs    # which finds walkthrough.py
import walkthrough

needs_browser = pytest.mark.skipif(not walkthrough.browser(), reason="needs Chromium (apt install chromium)")
QUANTIZERS = ("rtn", "four_six", "scale_search", "sr", "ms_eden", "ms_eden_46")


@pytest.fixture(scope="module")
def page():
    return walkthrough.page()


def text_of(marked):
    return html.unescape(re.sub("<[^>]*>", "", marked))


def run(page, script, tmp_path):
    """What a script, an expression of JavaScript, finds on the page."""
    tail = ("<pre id='found'></pre><script>document.getElementById('found').textContent = "
            f"JSON.stringify({script})</script></html>")
    path = tmp_path / "page.html"
    path.write_text(page.replace("</html>", tail), encoding="utf-8")
    done = walkthrough.browse(path.as_uri(), "--dump-dom")
    return json.loads(html.unescape(re.search("<pre id=.found.>(.*?)</pre>", done.stdout, re.S)[1]))


def lines_of_code(page):
    """{number of a line, as text: the line, marked}"""
    return dict(re.findall(r'<span class="line" id="L(\d+)"><a class="at"[^>]*>\d+</a>(.*?)\n</span>', page))


def test_every_line_of_the_article_is_there(page):
    lines = walkthrough.SOURCE.read_text().split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("BLOCK = "))
    last = next(i for i, line in enumerate(lines) if line.startswith("# ===="))
    words = " ".join(text_of(page).split()).replace("^", "")      # prose raises powers
    code = lines_of_code(page)
    for number, line in enumerate(lines[first:last], first + 1):
        if str(number) in code:
            assert text_of(code[str(number)]) == line
        elif not line.startswith("# ----"):
            line = line.removeprefix("#").replace("`", "").replace("^", "")
            assert " ".join(line.split()).removeprefix("Printed:") in words
    titles = re.findall(r"<h2><a href=\"#section-(\d+)\">", page)
    assert titles == [str(i) for i in range(1, 13)]
    # Links lead somewhere on the page, or to arXiv.
    for target in re.findall('href="([^"]*)"', page):
        assert target.startswith("https://arxiv.org/abs/") or f'id="{target[1:]}"' in page


def test_names_lead_to_what_they_name(page):
    lines = walkthrough.SOURCE.read_text().split("\n")
    code = lines_of_code(page)

    def marked(start):
        return next(code[str(i)] for i, line in enumerate(lines, 1) if line.strip().startswith(start))

    definition = next(i for i, line in enumerate(lines, 1) if line.startswith("def best_scale("))
    assert f'<a href="#L{definition}" tabindex="-1">best_scale</a>(b, scales)' in marked("q, s = best_scale(")
    # A parameter, a field, and an attribute are others of the same name.
    for start in "if four_six:", "rotation: str", "R, n = rotation_from(row.dx.rotation":
        assert not re.search(r">(four_six|rotation)</a>", marked(start))


def test_the_page_loads_nothing_and_is_small(page, tmp_path, capsys):
    assert not re.search(r"\bsrc=|<link|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    with pytest.raises(SystemExit, match="ends in .html"):
        walkthrough.main([str(tmp_path / "quartet.py")])
    walkthrough.main([str(tmp_path / "out.html")])
    size = (tmp_path / "out.html").stat().st_size
    assert size < 2e6 and f"{size:,} bytes" in capsys.readouterr().out


def random_tensors():
    """Some 2,000 blocks in rows of one to four, of many kinds."""
    g = torch.Generator().manual_seed(1)
    for k in range(800):
        count = int(torch.randint(1, 5, (), generator=g))
        x = torch.randn(1, 16 * count, generator=g)
        powers = torch.randint(-40, 40, (count,), generator=g).repeat_interleave(16)
        x[0, :16] *= k % 7 > 0
        yield [x, x**5, (4 * x).round(), x * 2.0**powers, x.bfloat16().float(), 1e-30 * x][k % 6]


def by_quartet(quantizer, x, seed):
    """Codes, bytes of block scales, tensor scale: as nvfp4.js has them."""
    if quantizer == "sr":
        t = quartet.sr(x, seed)
    elif quantizer.startswith("ms_eden"):
        t = quartet.ms_eden(x, None, seed, four_six=quantizer == "ms_eden_46")
    else:
        t = getattr(quartet, quantizer)(x)
    codes = [code for byte in t.codes[0].tolist() for code in (byte & 15, byte >> 4)]
    return [codes, t.block_scale.view(torch.uint8)[0].tolist(), t.tensor_scale.item()]


@needs_browser
def test_the_page_rounds_to_the_bits_of_quartet(page, tmp_path):
    tensors = [*random_tensors()]
    assert sum(x.shape[1] // 16 for x in tensors) > 1900
    rows = json.dumps([x[0].tolist() for x in tensors])
    script = """.map((x, k) => NAMES.map((name) => {
        const t = quantize(name, x, 7 * k + 2 ** 33);
        return [t.codes, t.bytes, t.tensorScale];
    }))"""
    found = run(page, rows + script.replace("NAMES", json.dumps(QUANTIZERS)), tmp_path)
    for k, (x, results) in enumerate(zip(tensors, found)):
        for quantizer, result in zip(QUANTIZERS, results):
            assert result == by_quartet(quantizer, x, 7 * k + 2**33), (k, quantizer)


@needs_browser
def test_the_page_rotates_as_quartet_does(page, tmp_path):
    signs = torch.randint(0, 2, (3, 128), generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0
    script = (f"((signs) => [1, 2, 3].map((rounds) => [...Array(128).keys()].map((row) => rotate("
              "[...Array(128).keys()].map((i) => i === row ? 1 : 0), signs.slice(0, rounds)))))"
              f"({signs.tolist()})")
    for name, R in zip(("rht128", "rht128x2", "rht128x3"), run(page, script, tmp_path)):
        assert torch.equal(torch.tensor(R, dtype=torch.float32), quartet.rotation_from(name, signs)[0])


@needs_browser
def test_the_page_has_words_for_every_quantizer_and_rotation(page, tmp_path):
    names, turns = run(page, "[Object.keys(QUANTIZED_BY), Object.keys(TURNED_BY)]", tmp_path)
    assert {*names} == {*quartet.QUANTIZERS} and {*turns} == {*quartet.ROTATIONS}


OUTSIDE = """[...document.querySelectorAll('.picture svg')].map((svg) => {
  const {width} = svg.viewBox.baseVal;
  const shapes = [...svg.querySelectorAll('text, rect, line, circle, polyline')].map((t) => t.getBBox());
  const outside = shapes.filter((box) => box.x < 0 || box.x + box.width > width);
  return [shapes.length, outside.length, width / svg.clientWidth, svg.scrollWidth > svg.parentNode.clientWidth];
})"""


@needs_browser
@pytest.mark.parametrize("width", [375, 820, 1400])
def test_pictures_fit_into_a_phone_and_keep_the_size_of_their_text(page, tmp_path, width):
    found = run(page.replace("</style>", f"body {{ width: {width}px; }}</style>"), OUTSIDE, tmp_path)
    assert len(found) == 5      # what GEMMs take is drawn in HTML
    # That of section 8 is drawn once it is seen.
    assert [shapes > 5 for shapes, *_ in found] == [True, True, True, False, True]
    for _, outside, scale, too_wide in found:
        assert not outside and not too_wide
        # On a wide page text grows, by a fifth.
        assert 0.8 < scale <= 1.01


ACT = """(() => {
  const said = (name) => document.querySelector(`#picture-${name} .said`).textContent;
  const first = (name, what) => document.querySelector(`#picture-${name} ${what}`);
  const take = (name, value) => {
    const control = first(name, name === 'stochastic' ? 'input' : 'select');
    control.value = value;
    control.dispatchEvent(new Event(control.matches('select') ? 'change' : 'input'));
    return said(name);
  };
  const found = {};
  found.block = said('block');
  const texts = [...document.querySelectorAll('#picture-block svg text')].map((t) => t.textContent);
  found.codes = texts.filter((text) => text.startsWith('codes '));
  for (const key of ['PageUp', 'ArrowUp']) {
    first('block', '[role=slider]').dispatchEvent(new KeyboardEvent('keydown', {key}));
  }
  found.moved = said('block');
  found.own = first('block', 'select').value;

  // A mouse drags until it lets go; a finger only chooses.
  const column = document.querySelectorAll('#picture-block [role=slider]')[1];
  column.setPointerCapture = () => {};
  const point = (type, pointerType, clientY) => column.dispatchEvent(
    new PointerEvent(type, {pointerType, clientY, pointerId: 1, bubbles: true}));
  const second = () => Number(column.getAttribute('aria-valuenow'));
  const top = first('block', 'svg').getBoundingClientRect().top;
  found.drag = [];
  for (const [type, kind, y] of [['pointerdown', 'touch', 10], ['pointermove', 'touch', 20],
    ['pointerdown', 'mouse', 10], ['pointermove', 'mouse', 20], ['lostpointercapture', 'mouse', 20],
    ['pointermove', 'mouse', 90]]) {
    point(type, kind, top + y);
    found.drag.push(second());
  }

  column.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
  found.right = [first('block', '[tabindex="0"]').getAttribute('aria-label'), second()];

  take('stochastic', 6.2);
  found.safe = said('stochastic');
  const map = first('stochastic', 'select');
  map.value = 'six';
  map.dispatchEvent(new Event('change'));
  found.clips = said('stochastic');
  found.rotation = said('rotation');
  found.outlier = take('rotation', 'outlier');
  take('gemms', 'nvidia');
  found.gemms = document.querySelector('#picture-gemms .bytes').textContent;
  first('gemms', '.operands button:nth-of-type(2)').click();
  found.w = said('gemms');
  found.rest = said('rest');
  return found;
})()"""


@needs_browser
def test_pictures_answer(page, tmp_path):
    found = run(page, ACT, tmp_path)
    # 10 20 30 40 by 4/6, as section 5 prints it
    assert found["block"].endswith("decoded 10 20 30 40" + 3 * " 10 20 30 40")
    x = torch.tensor([[10.0, 20.0, 30.0, 40.0] * 4])
    for shown, quantizer in zip(found["codes"], ("rtn", "four_six", "scale_search"), strict=True):
        codes, _, _ = by_quartet(quantizer, x, None)      # 4/6 takes the second
        assert shown.replace(" ", "") == "codes" + "".join(f"{code:X}" for code in codes)
    assert "decoded 20 20 30 40" in found["moved"] and found["own"] == "own"
    touched, moved, pressed, dragged, let_go, after = found["drag"]
    assert touched == moved == pressed == 20 > dragged > 0
    assert let_go == after == dragged
    # Left and right go from bar to bar, and leave them as they are.
    assert found["right"] == ["value 3", found["drag"][-1]]
    # If amax maps to 6, the scale is 6.2 / 6 rounded, 1; else 1.125.
    assert found["safe"].startswith("scale s 1.125 ") and "it clips" not in found["safe"]
    assert found["clips"].startswith("scale s 1 ") and "it clips" in found["clips"]
    # One round makes an outlier's group flat.
    assert float(re.search(r"1 round ([\d.]+)", found["outlier"])[1]) < 1.5
    assert found["gemms"] == "Kept for the backward pass, bytes a value: x 2, w 0.5625."
    assert "w in y" in found["w"] and "16 x 16" in found["w"]
    without, with_pull = map(int, re.findall(r"in (\d+) with", found["rest"]))
    assert with_pull < without
    # The nearer grid point is 1.
    assert 30 < int(re.search(r"ends at 1 in (\d+)", found["rest"])[1]) < 60
