"""A page that shows quartet.py: its prose beside its code, what it prints, pictures that answer to the hand.

    python data/evidence/walkthrough.py [OUT.html]                  default: walkthrough.html
    python data/evidence/walkthrough.py OUT.html --show=FILE.png    and its first picture, taken by Chromium

The page loads nothing, and opens from a disk. It is made of quartet.py as it stands: sections are what lies
between lines such as `# ---- 1. Title ---`, prose is comments that stand alone, and a comment that begins
with `Printed:` is what `python quartet.py` prints. Beside this file, in page/: nvfp4.js, the quantizers once
more in JavaScript, to the bit; pictures.js, a function for each picture; page.css.
"""
import argparse
import ast
import html
import io
import json
import keyword
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import quartet

PAGE = Path(__file__).resolve().parent / "page"
SOURCE = Path(quartet.__file__)

# Section: the picture in it, a function of pictures.js, and what to do with it.
PICTURES = {
    "5": ("block",
          "One block of 16 values. A mouse drags a bar. A finger chooses one; the slider moves it. On a "
          "keyboard left and right choose, up and down move. Below is the grid of E2M1 by three scales: the "
          "largest value comes to 6, or to 4, as nearly as a scale of 4 significant bits can bring it, or "
          "the scale is the best of five. Each blue value goes along its line to the grid, red if it moves."),
    "6": ("stochastic",
          "A value between two grid points is rounded up or down at random, again and again. The blue line "
          "is the mean of the draws so far: it comes to the value. If 6.2, the largest of its block, mapped "
          "to 6, the scale s would be rounded down to 1, and values above 6 would clip: try 6.2."),
    "7": ("rotation",
          "A group of 128 values, and what one, two and three rounds of signs and sums make of it, each row "
          "drawn to its own largest bar. Bars of one length all go to the same grid point, in every draw, so "
          "that no averaging takes their error away (section 8): many after one round of an outlier; half, "
          "near zero, after one round of two near-equal values."),
    "8": ("eden",
          "How far the mean of B draws is from the true values, relative to their norm, after one, two and "
          "three rounds of rotation. Without a bias it falls along the grey line, a half for four times the "
          "draws. A bias is where it levels off."),
    "10": ("gemms", "What each recipe does with the six operands, and what for. Choose one to read more."),
    "12": ("rest",
           "A weight whose best value lies between two grid points, over 400 steps, and the border where "
           "its rounding changes. With a pull that is strong enough it settles on one of the two, the nearer "
           "more often."),
}


# ---- 1. quartet.py in parts --------------------------------------------------------------------------------

def parts_of(lines):
    """Lines of a section -> [(kind, number of the first line, lines), ...]: kind prose, printed or code."""
    # Runs of lines, which blank lines part
    runs = []
    for number, line in enumerate(lines):
        if not line:
            continue
        if number and lines[number - 1]:
            runs[-1][1].append(line)
        else:
            runs.append((number, [line]))

    found = []
    for number, run in runs:
        kind = "code"
        if all(line.startswith("#") for line in run):
            kind = "printed" if run[0] == "# Printed:" else "prose"
        if found and found[-1][0] == kind == "code":
            # Code goes on over blank lines.
            first = found[-1][1]
            found[-1] = kind, first, lines[first:number + len(run)]
        else:
            found.append((kind, number, run))
    return found


def sections_of(text):
    """quartet.py -> its constants before section 1, (number of the first line, lines), and its sections,
    [(number, title, line of the title, lines after it), ...].
    """
    lines = text.split("\n")
    begin = next(i for i, line in enumerate(lines) if line.startswith("BLOCK = "))
    end = next(i for i, line in enumerate(lines) if line.startswith("# ===="))
    titles = []
    for i, line in enumerate(lines[:end]):
        title = re.fullmatch(r"# ---- (\d+)\. (.*?) -+", line)
        if title:
            titles.append((i, *title.groups()))
    ends = [i for i, *_ in titles[1:]] + [end]
    sections = [(number, title, i, lines[i + 1:last]) for (i, number, title), last in zip(titles, ends)]
    return (begin, lines[begin:titles[0][0] - 2]), sections


# ---- 2. Text and code as HTML ------------------------------------------------------------------------------

def prose(lines):
    """Comment lines, or lines of a docstring -> paragraphs; what is indented is kept as it stands."""
    text = "\n".join(re.sub(r"^# ?", "", line) for line in lines)
    out = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.startswith("    "):
            out.append(f"<pre>{html.escape(paragraph)}</pre>")
            continue
        marked = html.escape(paragraph)
        marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", marked)
        marked = re.sub(r"(?<!README\.md, )\bsection (\d+)", r'<a href="#section-\1">section \1</a>', marked)
        marked = re.sub(r"arXiv:(\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', marked)
        # Powers, as in 2^-6, w^T, (t/T)^4
        marked = re.sub(r"\^(-?\w+)", r"<sup>\1</sup>", marked)
        out.append(f"<p>{marked}</p>")
    return "\n".join(out)


def links_of(text):
    """Where the article uses what it defines: {(line, column): the line that defines it}, lines from 1."""
    tree = ast.parse(text)
    last = next(i for i, line in enumerate(text.split("\n")) if line.startswith("# ===="))
    defined = {}
    for node in tree.body:
        if node.lineno < last:
            names = [node.name] if hasattr(node, "name") else [
                n.id for target in getattr(node, "targets", ()) for n in ast.walk(target)
                if isinstance(n, ast.Name)]
            defined |= {name: node.lineno for name in names if name not in defined}

    found = {}

    def visit(node, own):
        # A function's parameters, and what it assigns, are its own.
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            own = own | {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)}
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            own = own | {n.id for n in stored}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own:
            target = defined.get(node.id, node.lineno)
            if target != node.lineno:
                found[node.lineno, node.col_offset] = target
        for child in ast.iter_child_nodes(node):
            visit(child, own)

    visit(tree, frozenset())
    return found


def kinds_of_tokens(text):
    """Source -> {line: [(first column, last, class of CSS or a line to link to), ...]}, lines from 1."""
    links = links_of(text)
    found = {}

    def mark(token, kind):
        (first, start), (last, end) = token.start, token.end
        for line in range(first, last + 1):
            left = start if line == first else 0
            right = end if line == last else None
            found.setdefault(line, []).append((left, right, kind))

    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            mark(token, "comment")
        elif token.type == tokenize.STRING:
            mark(token, "string")
        elif token.type == tokenize.NUMBER:
            mark(token, "number")
        elif token.type == tokenize.NAME:
            if keyword.iskeyword(token.string):
                mark(token, "keyword")
            elif token.start in links:
                mark(token, links[token.start])
    return found


def code(first, lines, kinds):
    """Lines of code, the first of which has number first (from 0) -> a block with a link for every line."""
    out = []
    for number, line in enumerate(lines, first + 1):
        marked = ""
        at = 0
        for left, right, kind in kinds.get(number, []):
            right = len(line) if right is None else right
            marked += html.escape(line[at:left])
            words = html.escape(line[left:right])
            if isinstance(kind, int):
                marked += f'<a href="#L{kind}" tabindex="-1">{words}</a>'
            else:
                marked += f'<span class="{kind}">{words}</span>'
            at = right
        marked += html.escape(line[at:])
        out.append(f'<span class="line" id="L{number}"><a class="at" href="#L{number}" '
                   f'aria-hidden="true" tabindex="-1">{number}</a>{marked}\n</span>')
    return (f'<pre class="code" tabindex="0" role="region" aria-label="lines {first + 1} to '
            f'{first + len(lines)}"><code>{"".join(out)}</code></pre>')


def picture(number):
    """The place of a section's picture, which pictures.js fills; or nothing."""
    if number not in PICTURES:
        return ""
    name, caption = PICTURES[number]
    return (f'<figure class="picture" id="picture-{name}"><figcaption>{html.escape(caption)}</figcaption>'
            f'<div class="stage"></div></figure>')


def section(number, title, at, lines, kinds):
    """A section of the article: rows of prose with the code that follows it, its picture, what it prints."""
    link = f'<a href="#section-{number}">{number}. {html.escape(title)}</a>'
    out = [f'<section id="section-{number}"><h2>{link}']
    if number in PICTURES:
        out.append(f'<a class="jump" href="#picture-{PICTURES[number][0]}">to its picture</a>')
    out.append("</h2>")
    printed = ""
    rows = []
    for kind, first, own in parts_of(lines):
        if kind == "printed":
            text = "\n".join(re.sub(r"^#(     | )", "", line) for line in own[1:])
            printed = (f'<div class="printed" tabindex="0" role="region" aria-label="printed">'
                       f'<h3>Printed</h3><pre>{html.escape(text)}</pre></div>')
            continue
        if kind == "prose":
            rows.append([prose(own), ""])
        elif rows:
            rows[-1][1] += code(at + 1 + first, own, kinds)
        else:
            rows.append(["", code(at + 1 + first, own, kinds)])
    for text, block in rows:
        out.append(f'<div class="row"><div class="prose">{text}</div><div class="source">{block}</div></div>')
    out += [picture(number), printed, "</section>"]
    return "\n".join(out)


# ---- 3. The page -------------------------------------------------------------------------------------------

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training in 4 bits: quartet.py, to read and to touch</title>
<style>
{css}</style>
<a class="skip" href="#section-1">to section 1</a>
<header>
<h1>Training linear layers in 4 bits</h1>
<p class="lead">quartet.py, to read and to touch: NVFP4, its quantizers, and the recipe Quartet II.</p>
<nav aria-label="sections">{contents}</nav>
</header>
<main>
<section id="introduction"><div class="prose">{introduction}</div>{before}</section>
{sections}
</main>
<footer><p>Made by <code>python data/evidence/walkthrough.py</code> from quartet.py; its appendix is left out.
The pictures round in JavaScript, and a test holds their quantizers to quartet.py's bits.</p></footer>
<script>
const RECIPES = {recipes};
{nvfp4}
{pictures}</script>
</html>
"""


def recipes():
    """quartet.RECIPES for JavaScript: {name: what each operand is, or null for bf16}."""
    found = {}
    for name, row in quartet.RECIPES.items():
        found[name] = None
        if row:
            found[name] = row._asdict() | dict(dx=row.dx._asdict(), dw=row.dw._asdict())
    return found


def page():
    """The page, HTML."""
    text = SOURCE.read_text(encoding="utf-8")
    kinds = kinds_of_tokens(text)
    before, sections = sections_of(text)
    contents = "".join(f'<a href="#section-{number}">{number}. {html.escape(title)}</a>'
                       for number, title, *_ in sections)
    return TEMPLATE.format(
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
        contents=contents,
        introduction=prose(quartet.__doc__.split("\n")[2:]),
        before=code(*before, kinds),
        sections="\n".join(section(*parts, kinds) for parts in sections),
        recipes=json.dumps(recipes()),
        nvfp4=(PAGE / "nvfp4.js").read_text(encoding="utf-8"),
        pictures=(PAGE / "pictures.js").read_text(encoding="utf-8"))


def browser():
    """Chromium, or one that is called otherwise: its path, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(address, *options):
    """Open an address in a browser without a window, for ten of its seconds -> CompletedProcess."""
    # In a container there may be little shared memory, and no sandbox.
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
               "--hide-scrollbars", "--virtual-time-budget=10000", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


ALONE = """<style>body > :not(main), main > :not(#section-5), #section-5 > :not(figure) { display: none; }
.picture { margin-top: 1rem; }</style></html>"""


def show(content, file):
    """Take a picture of a page's picture of a block, alone."""
    with tempfile.TemporaryDirectory() as directory:
        alone = Path(directory, "page.html")
        alone.write_text(content.replace("</html>", ALONE), encoding="utf-8")
        browse(alone.as_uri(), f"--screenshot={file.resolve()}", "--window-size=900,860")
    print(file)


def main(argv=None):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("walkthrough.html"))
    parser.add_argument("--show", type=Path, metavar="FILE.png", help="take a picture of section 5's picture")
    options = parser.parse_args(argv)
    out = options.out
    if out.suffix != ".html":
        sys.exit(f"walkthrough.py: {out}: the page needs a name that ends in .html")
    if options.show and not browser():
        sys.exit("walkthrough.py: --show needs Chromium (apt install chromium)")
    content = page()
    try:
        out.write_text(content, encoding="utf-8")
    except OSError as e:
        sys.exit(f"walkthrough.py: cannot write {out}: {e.strerror}")
    print(f"{out}: {len(content.encode()):,} bytes")
    if options.show:
        show(content, options.show)


if __name__ == "__main__":
    main()
