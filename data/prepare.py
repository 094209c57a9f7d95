"""Text in, shards of tokens out: makes the corpora that train_gpt.py reads. Needs numpy, nothing else.

    python data/prepare.py python              source of Python's standard library (the default, no download)
    python data/prepare.py installed           source of all installed Python packages, each file once (no download)
    python data/prepare.py shakespeare         Tiny Shakespeare, 1 MB (download)
    python data/prepare.py fineweb [shards]    FineWeb, 1 to 103 shards of 100M tokens, 200 MB each (download)
    python data/prepare.py FILE...             your text, also .xz or .gz; the first file names the corpus

A line <|endoftext|> in a FILE parts two documents; text of one document is cut at its blank lines. Whole
documents, 5% of the bytes but 10 MB at most, chosen by hashes of their content, are held out for validation.

Shards, NAME_train_000000.bin (000001, ...) and NAME_val_000000.bin, have the format of llm.c: 256 int32
(20240520, version 1, number of tokens, zeros), then the tokens as uint16, all little-endian. Text: a token is
a byte, and 0 ends every document, vocabulary 256. FineWeb: GPT-2's tokens, vocabulary 50257.
"""
import contextlib, glob, gzip, hashlib, http.client, lzma, os, re, sys, sysconfig, time, urllib.request, zlib
from pathlib import Path

import numpy as np

CORPORA = "python", "installed", "shakespeare", "fineweb"
MAGIC, VERSION, HEADER = 20240520, 1, 1024      # a shard's first two int32; the bytes of its header
SHARD, VAL_MAX, VAL_SHARE = 10**8, 10**7, 0.05  # of a text: most bytes a shard; most bytes and share held out
RETRIES, WAIT, TIMEOUT = 5, 1.0, 30.0           # seconds: WAIT before retry 1, 2 WAIT before retry 2, ...
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"

def write_shard(path, tokens):
    """tokens (n,) integers in [0, 2^16), n > 0 -> the file path, which never appears in part."""
    assert tokens.ndim == 1 and 0 < len(tokens) < 2**31 and 0 <= tokens.min() <= tokens.max() < 2**16
    header = np.array([MAGIC, VERSION, len(tokens)] + [0] * (HEADER // 4 - 3), "<i4")
    part = Path(f"{path}.{os.getpid()}.part")   # a name of its own: two processes may prepare one corpus
    np.concatenate([header.view("<u2"), tokens.astype("<u2")]).tofile(part)
    os.replace(part, path)

def check_shard(path):
    """The number of tokens in a shard. Raises ValueError with the file, its fault and the way out."""
    path, size = Path(path), os.path.getsize(path) if os.path.isfile(path) else -1
    magic, version, n = np.fromfile(path, "<i4", 3).tolist() if size >= HEADER else (None, None, None)
    fault = ("is missing" if size < 0 else "is empty" if size == 0 else
             f"has {size} bytes, less than a header of {HEADER}" if size < HEADER else
             f"is no shard: it begins with {magic}, not {MAGIC}" if magic != MAGIC else
             f"is a shard of version {version}, not {VERSION}" if version != VERSION else
             f"is truncated or damaged: its header says {n} tokens, the file holds {(size - HEADER) / 2:.12g}"
             if n < 1 or size != HEADER + 2 * n else "")
    name = re.sub(r"_(train|val)_\d+\.bin.*", "", path.name)
    run = f"run python data/prepare.py {name if name in CORPORA else 'FILE...'}"
    if fault: raise ValueError(f"{path} {fault}: {run if size < 0 else f'delete it and {run} again'}")
    return n

def standard_library():
    """The sources of Python's standard library, without what was installed beside it: a list of paths."""
    root, skip = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if file.is_file())
    return [file for file in files if skip.isdisjoint(file.relative_to(root).parts)]

def packages():
    """The sources of all Python packages that this Python can import and that pip has installed: paths."""
    roots = {Path(p).resolve() for p in sys.path if Path(p).name in ("site-packages", "dist-packages")}
    return [file for root in roots for file in root.rglob("*.py") if file.is_file()]

def digest(document):
    """Of bytes: sorts documents in an order that depends on nothing but their content."""
    return hashlib.sha256(document).digest()

def read_documents(files):
    """files, a list of paths -> their documents, a list of bytes without NUL, which is to end a document."""
    documents = []
    for file in files:
        try:
            with {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)(file, "rb") as f: text = f.read()
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
            raise ValueError(f"cannot read {file} ({e}): give files, or one of {', '.join(CORPORA)}") from e
        documents += re.split(rb"(?m)^<\|endoftext\|>\r?(?:\n|\Z)", text.replace(b"\0", b""))
    documents = [d for d in documents if d.strip()]
    return documents if len(set(documents)) != 1 else re.split(rb"\n\s*\n", documents[0].strip())

def split(documents):
    """documents, a list of bytes -> (train, val), two such lists, neither empty; equal ones stay together."""
    different = sorted(set(documents), key=digest)      # not in the order of files
    if len(different) < 2: raise ValueError("no two different documents: part by blank or <|endoftext|> line")
    room = max(min(VAL_SHARE * sum(map(len, different)), VAL_MAX), min(map(len, different)))
    small = [d for d in different if len(d) <= room]
    val = {d for d, used in zip(small, np.cumsum([*map(len, small)])) if used <= room}
    return [d for d in documents if d not in val], [d for d in documents if d in val]

def write_text(name, documents, directory):
    """documents, a list of bytes -> the paths of its shards, validation last. Removes surplus shards of that name."""
    paths = []
    for part, documents in zip(("train", "val"), split(documents)):
        tokens = np.frombuffer(b"".join(d + b"\0" for d in documents), np.uint8)
        for i, piece in enumerate(np.array_split(tokens, -(-len(tokens) // SHARD))):    # equal: no short rest
            paths.append(directory / f"{name}_{part}_{i:06d}.bin")
            write_shard(paths[-1], piece)
    for old in set(directory.glob(f"{glob.escape(name)}_train_{'[0-9]' * 6}.bin")) - set(paths): old.unlink()
    return paths

def receive(url, part):
    """Append to the file part what it lacks of url. Raises OSError or HTTPException if it lacks some yet."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "prepare.py", "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply, open(part, "ab") as f:
        rest, length = reply.headers["Content-Range"], reply.headers["Content-Length"]
        done = have = int(re.match(r"bytes (\d+)-", rest)[1]) if rest else 0    # 0: the server ignored Range
        end, start = have + int(length) if length else None, time.monotonic()
        f.truncate(have)
        while chunk := reply.read(2**16):
            done += f.write(chunk)
            if end and 10 * done // end > 10 * (done - len(chunk)) // end:      # a line every 10%
                speed = (done - have) / 1e6 / (time.monotonic() - start)
                print(f"{part.stem}: {100 * done // end}% at {speed:.1f} MB/s", flush=True)
    if end and done != end: raise ConnectionError(f"the connection closed after {done} of {end} bytes")

def download(url, path, check):
    """Fetch url to path, unless it is there and good: check(file) raises ValueError for one that is not."""
    with contextlib.suppress(ValueError): return check(path)
    part = Path(f"{path}.part")                                 # where the next try, or run, goes on from
    for tries in range(1, RETRIES + 2):
        time.sleep(WAIT * (tries - 1))
        try:
            receive(url, part)
            check(part)
            return os.replace(part, path)
        except (OSError, http.client.HTTPException, ValueError) as e:
            error, code = e, 400 if isinstance(e, ValueError) else getattr(e, "code", 500)
        print(f"{part.stem}, try {tries}: {error}", flush=True)
        if code in (400, 416): part.unlink(missing_ok=True)     # bad; 416: no shorter than the file itself
        if code < 500 and code not in (408, 416, 429): break    # the next try would end the same way
    raise ValueError(f"{url} failed (tries: {tries}): {error}. Fetch it by hand to {path}, or use the corpus "
                     "that needs no download: python data/prepare.py python")

def prepare(corpus, directory=Path(__file__).parent, shards=1):
    """Write a corpus, by name or from files, to directory; print and return its shards, validation last."""
    (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
    if corpus == "fineweb":
        if not 1 <= shards <= 103: raise ValueError(f"FineWeb has 1 to 103 training shards, not {shards}")
        paths = [directory / f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
        paths.append(directory / "fineweb_val_000000.bin")
        for path in paths: download(FINEWEB + path.name, path, check_shard)
    elif corpus == "python": paths = write_text(corpus, read_documents(standard_library()), directory)
    elif corpus == "installed":
        paths = write_text(corpus, sorted(set(read_documents(packages())), key=digest), directory)
    elif corpus == "shakespeare":
        download(SHAKESPEARE, text := directory / "shakespeare.txt", lambda f: split(read_documents([f])))
        paths = write_text(corpus, read_documents([text]), directory)
    else:
        files = [Path(file) for file in ([corpus] if isinstance(corpus, (str, Path)) else corpus)]
        name = Path(files[0].name.removesuffix(".xz").removesuffix(".gz")).stem
        if name in CORPORA: raise ValueError(f"{name} is a corpus: ask for it alone, or rename {files[0]}")
        paths = write_text(name, read_documents(files), directory)
    for p in paths:
        print(f"{p}: {check_shard(p)} tokens, sha256 {hashlib.sha256(p.read_bytes()).hexdigest()[:8]}")
    print(f"now: python train_gpt.py --corpus={paths[0].name.rsplit('_train_', 1)[0]}")
    return paths

def main(args):
    if not args or args[0].startswith("-"): raise SystemExit(print(__doc__) if "-h" in str(args) else __doc__)
    shards = int(args.pop()) if args[0] == "fineweb" and len(args) == 2 and args[1].isdecimal() else 1
    try: prepare(args[0] if len(args) == 1 else args, shards=shards)
    except (ValueError, OSError) as error: raise SystemExit(f"prepare.py: {error}")

if __name__ == "__main__": main(sys.argv[1:])
