"""Text in, shards of tokens out: makes the corpora that train_gpt.py reads. Needs numpy, nothing else.

    python data/prepare.py python              source of Python's standard library: the default, no download
    python data/prepare.py installed           source of all installed packages, each file once: no download
    python data/prepare.py shakespeare         Tiny Shakespeare, a download of 1 MB
    python data/prepare.py fineweb [shards]    FineWeb, 1 to 103 shards of 100M tokens: downloads of 200 MB,
                                               by the package huggingface_hub
    python data/prepare.py FILE...             your text, UTF-8, also .xz or .gz; the first names the corpus

A line <|endoftext|> in a FILE parts two documents. Held out for validation are 5% of the bytes, but 10 MB at
most: whole documents, chosen by hashes of their content. Where documents are too long for that, it is the end
of the longest, from a blank line on if there is one.

With --tokenizer=bytes, the default, a token is a byte, and 0 ends every document: vocabulary 256. With
--tokenizer=gpt2, by the package tiktoken, tokens are GPT-2's, as FineWeb's are: vocabulary 50257.

Shards, NAME_train_000000.bin (000001, ...) and NAME_val_000000.bin, have the format of llm.c: 256 int32
(20240520, version 1, number of tokens, zeros), then the tokens as uint16, all little-endian. NAME.json, the
manifest, lists the shards of a corpus with their sha256, the tokenizer, and how many bytes of text are behind
the tokens. It is written last, and is empty while shards are replaced.
"""
import argparse
import codecs
import contextlib
import glob
import gzip
import hashlib
import http.client
import itertools
import json
import lzma
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:
    fcntl = None     # Windows: two at once are not kept apart

CORPORA = ("python", "installed", "shakespeare", "fineweb")

# Tiny Shakespeare is a file of so many bytes with this sha256. FineWeb is a data set at huggingface.co.
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SIZE = 1115394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB = "kjj0/fineweb10B-gpt2"

# A shard begins with these two int32, in a header of so many bytes.
MAGIC = 20240520
VERSION = 1
HEADER = 1024

# How compressed files are opened, and the most bytes of text that a corpus may be made of.
OPENERS = {".xz": lzma.open, ".gz": gzip.open}
LIMIT = 2**33

# Of a text: the most tokens in a shard; the share of bytes held out, and the most bytes of it.
SHARD = 10**8
VAL_SHARE = 0.05
VAL_MAX = 10**7

# Of the download of Shakespeare
TRIES = 3
TIMEOUT = 15.0      # seconds without an answer that end a try
PATIENCE = 60.0     # seconds after which nothing is waited for, or tried again


# ---- 1. Shards ---------------------------------------------------------------------------------------------

def write_shard(path, tokens):
    """tokens (n,) integers in [0, 2^16), 0 < n < 2^31 -> the file path, which never appears in part."""
    assert tokens.ndim == 1 and 0 < len(tokens) < 2**31
    assert 0 <= tokens.min() <= tokens.max() < 2**16
    header = np.zeros(HEADER // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)

    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as f:
        f.write(header)
        f.write(tokens.astype("<u2"))
    os.replace(part, path)


def fault_of(path):
    """What is wrong with a shard's file, in words that go on from its name; "" if nothing is."""
    size = path.stat().st_size
    if size == 0:
        return "is empty"
    if size < HEADER:
        return f"has {size} bytes, less than a header of {HEADER}"
    magic, version, n = np.fromfile(path, "<i4", 3).tolist()
    if magic != MAGIC:
        return f"is no shard: it begins with {magic}, not {MAGIC}"
    if version != VERSION:
        return f"is a shard of version {version}, not {VERSION}"
    held = (size - HEADER) / 2
    if n < 1 or n != held:
        return f"is truncated or damaged: its header says {n} tokens, the file holds {held:.12g}"
    return ""


def check_shard(path):
    """The number of tokens in a shard. ValueError, with the fault and the way out, if it is not whole."""
    # The way out is to make the corpus. Of which files one of another name was made, the user knows.
    corpus = re.sub(r"_(train|val)_\d+\.bin.*", "", path.name)
    if corpus not in CORPORA:
        corpus = "FILE..."
    run = f"run python data/prepare.py {corpus}"

    if not path.is_file():
        raise ValueError(f"{path} is missing: {run}")
    fault = fault_of(path)
    if fault:
        raise ValueError(f"{path} {fault}: delete it and {run} again")
    return (path.stat().st_size - HEADER) // 2


def entry(path):
    """What a manifest says of a shard."""
    content = np.memmap(path, np.uint8, "r")
    return dict(file=path.name, tokens=check_shard(path), sha256=hashlib.sha256(content).hexdigest())


@contextlib.contextmanager
def locked(directory):
    """Within it no other prepare.py writes to directory, where the disk knows locks."""
    # Windows has no such locks.
    if not fcntl:
        yield
        return

    # The lock is on the directory itself, and leaves no file.
    f = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another prepare.py writes to {directory}: waiting", flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError:
        pass      # this disk knows no locks
    try:
        yield
    finally:
        os.close(f)      # and with it the lock goes; the system does so for a process that is killed


@contextlib.contextmanager
def writing(directory):
    """A folder in directory for new files, till `publish` moves them. ValueError if the disk refuses."""
    with locked(directory):
        new = directory / ".new"
        try:
            # Remove what one that was killed, or somebody's link, has left there.
            if new.is_dir() and not new.is_symlink():
                shutil.rmtree(new)
            new.unlink(missing_ok=True)
            new.mkdir()
            yield new
        except OSError as e:
            raise ValueError(f"cannot write to {directory} ({e.strerror or e}): make room there, or put that "
                             "right, and run this command again") from e
        finally:
            shutil.rmtree(new, ignore_errors=True)


def publish(name, train, val, tokenizer, sizes, new):
    """Make a corpus of shards, which lie in the folder `new` or already beside it -> their entries.

    train, val: these entries, [dict, ...]; sizes: the bytes of text behind the tokens of both, ints, or None
    if unknown. Killed at any moment, it leaves the old corpus, the new one, or an empty manifest, which says
    that there is none.
    """
    # Write all there is to write: from then on files are only renamed, and a full disk does no harm.
    manifest = new.with_name(f"{name}.json")
    record = dict(train=train, val=val, tokenizer=tokenizer, bytes=dict(zip(("train", "val"), sizes)))
    text = json.dumps(record, indent=1).encode() + b"\n"
    (new / "manifest").write_bytes(text)
    (new / "empty").touch()

    old = b""
    if os.path.lexists(manifest):
        if not manifest.is_file():
            raise ValueError(f"{manifest} is no file: move it away, since the list of shards takes its place")
        old = manifest.read_bytes()
    if old and not old.startswith(b'{\n "train":'):
        raise ValueError(f"{manifest} is no list of shards: move it away, since the list takes its place")
    for shard in train + val:
        # A download that lay there already may have been damaged since.
        there = not (new / shard["file"]).exists()
        if there and shard["file"].encode() in old and shard["sha256"].encode() not in old:
            raise ValueError(f"{new.with_name(shard['file'])} is not what it was by {manifest}: delete it, "
                             "or, if it is right, the list, and run this command again")

    # The same corpus once more is whole all the time: jobs that start may be reading it.
    if old != text:
        if old:
            print(f"{manifest} listed another text: runs that began with it cannot go on any more")
        os.replace(new / "empty", manifest)
    for shard in new.glob("*.bin"):
        os.replace(shard, new.with_name(shard.name))

    # Remove what is left of a longer text. Of FineWeb, downloads are kept for a larger corpus to come.
    for part, listed in (("train", train), ("val", val)):
        pattern = f"{glob.escape(name)}_{part}_{'[0-9]' * 6}.bin"
        names = {shard["file"] for shard in listed}
        for shard in new.parent.glob(pattern):
            if shard.name not in names and name != "fineweb":
                shard.unlink()
    os.replace(new / "manifest", manifest)
    return train + val


# ---- 2. Text -----------------------------------------------------------------------------------------------

def standard_library():
    """The sources of Python's standard library, without what was installed beside it: a list of paths."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if file.is_file())
    return [file for file in files if skip.isdisjoint(file.relative_to(root).parts)]


def packages():
    """The sources of all packages that pip has installed and this Python can import: a list of paths."""
    roots = {Path(p).resolve() for p in sys.path if Path(p).name in ("site-packages", "dist-packages")}
    return [file for root in roots for file in root.rglob("*.py") if file.is_file()]


def digest(content):
    """sha256 of bytes. To sort documents by it gives an order that depends on nothing but their content."""
    return hashlib.sha256(content).digest()


def read_text(file, room):
    """The text of a file, bytes of UTF-8. ValueError for any other content, and for more than room bytes.

    It is read in pieces, since a small compressed file may hold more than the memory does.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = bytearray()
    piece = None
    try:
        # A device or a pipe may have no end.
        if not file.is_file():
            raise OSError("no regular file")
        with OPENERS.get(file.suffix.lower(), open)(file, "rb") as f:
            while piece != b"":
                piece = f.read(2**20)
                text += piece
                if len(text) > room:
                    raise ValueError(f"{file} has too much text: all files together may have {LIMIT} bytes")
                # A 0 is valid UTF-8, but marks a binary file. 255 is not valid.
                decoder.decode(piece.replace(b"\0", b"\xff"), final=not piece)
    except UnicodeDecodeError as e:
        # e.object may begin with what the decoder kept of the piece before.
        offset = len(text) - len(e.object) + e.start
        raise ValueError(f"{file} is not UTF-8 text at byte {offset}: unpack it, or convert it, "
                         f"iconv -f ITS_ENCODING -t utf-8 {shlex.quote(str(file))} > NEW_FILE") from e
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise ValueError(f"cannot read {file} ({e}): give files, or one of {', '.join(CORPORA)}") from e
    return text


def read_texts(files):
    """files, a list of paths -> their texts, one after another, LIMIT bytes at most."""
    room = LIMIT
    for file in files:
        text = read_text(file, room)
        room -= len(text)
        if not text.strip():
            print(f"{file}: skipped, there is no text in it", flush=True)
        yield text


def read_sources(files):
    """files, a list of paths -> their contents, one after another, of those that can be read."""
    for file in files:
        try:
            yield file.read_bytes()
        except OSError as e:
            print(f"{file}: skipped, it cannot be read ({e.strerror})", flush=True)


def name_of(files):
    """The name of a corpus made of files: the first one's, without suffixes. ValueError if that is none."""
    for file in files:
        if not str(file).isprintable():
            raise ValueError(f"{str(file)!r} has letters that cannot be printed: rename it")
    first = files[0]
    if first.suffix.lower() in OPENERS:
        first = first.with_suffix("")
    name = first.stem
    if not name or name.startswith("."):
        raise ValueError(f"{str(files[0])!r} has no name that the corpus could take: rename it")
    if name in CORPORA:
        raise ValueError(f"{name} is a corpus: ask for it alone, or rename {files[0]}")
    return name


def documents_in(texts):
    """texts, bytes one after another -> their documents, a list of bytes."""
    documents = []
    for text in texts:
        # Source code may hold a 0. It is to end a document, and to be nowhere else.
        documents += re.split(rb"(?m)^<\|endoftext\|>\r?(?:\n|\Z)", text.replace(b"\0", b""))
    return [d for d in documents if d.strip()]


def split(documents):
    """documents, a list of bytes -> (train, val), two such lists, neither empty; equal ones stay together.

    ValueError if there is no text to split.
    """
    # Hold out documents, in the order of their hashes, until the room is full. Pass over those that it cannot
    # hold even when it is empty.
    different = sorted(set(documents), key=digest)
    room = min(VAL_SHARE * sum(map(len, different)), VAL_MAX)
    small = [d for d in different if len(d) <= room]
    used = list(itertools.accumulate(map(len, small)))
    val = {d for d, used_with_d in zip(small, used) if used_with_d <= room}
    if sum(map(len, val)) >= room / 2 and val:
        return [d for d in documents if d not in val], [d for d in documents if d in val]

    # There are few documents, or long ones. Hold out the end of the longest.
    longest = max(different, key=len, default=b"")
    if len(longest) < 2:
        raise ValueError(f"{len(longest)} bytes in the longest document: too little text to hold some out")
    start = end_of(longest, room)
    return [d[:start] if d == longest else d for d in documents], [longest[start:]]


def end_of(document, room):
    """Where the last `room` bytes of a document begin, or up to half of them later: where text can be cut."""
    # After a blank line, or at least a line, or else a letter of UTF-8.
    first = len(document) - max(1, int(room))
    last = len(document) - max(1, int(room / 2))
    for gap in (rb"\n[ \t\r]*\n", rb"\n"):
        found = re.compile(gap).search(document, first - 1, last)
        if found:
            return found.end()
    while first < len(document) - 1 and 0x80 <= document[first] < 0xC0:
        first += 1
    return first


def gpt2_tokenizer():
    """GPT-2's, of the package tiktoken. ValueError if it cannot be had."""
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as e:      # not installed, or its vocabulary could not be downloaded
        raise ValueError("GPT-2's tokens need tiktoken (pip install tiktoken), which downloads a vocabulary: "
                         f"{type(e).__name__}, {str(e).partition(chr(10))[0]}")


def tokens_of(documents, tokenizer):
    """documents, a list of bytes -> their tokens (n,) integers, each document's with a mark at its end."""
    if tokenizer == "bytes":
        return np.frombuffer(b"".join(d + b"\0" for d in documents), np.uint8)
    gpt2 = gpt2_tokenizer()
    found = []
    for document in documents:
        # Source code may hold what is not UTF-8.
        tokens = gpt2.encode_ordinary(document.decode(errors="replace"))
        found.append(np.array(tokens + [gpt2.eot_token], np.uint16))
    return np.concatenate(found)


def bytes_behind(paths):
    """The bytes of text behind GPT-2's tokens in shards, an int; None without tiktoken."""
    try:
        gpt2 = gpt2_tokenizer()
    except ValueError as e:
        print(f"no bits per byte will be printed, but nats a token only: {e}", flush=True)
        return None
    # The end of a document counts as one byte, as in a corpus of bytes.
    length = np.array([len(gpt2.decode_single_token_bytes(token)) for token in range(gpt2.n_vocab)])
    length[gpt2.eot_token] = 1
    total = 0
    for path in paths:
        tokens = np.memmap(path, "<u2", "r", HEADER)
        total += int(np.bincount(tokens, minlength=len(length))[:len(length)] @ length)
    return total


def write_text(name, documents, directory, tokenizer):
    """documents, a list of bytes -> the manifest's entries of their shards, validation last."""
    listed = []
    sizes = []
    with writing(directory) as new:
        for part, documents in zip(("train", "val"), split(documents)):
            tokens = tokens_of(documents, tokenizer)
            # Cut into equal pieces, so that no shard is a short rest.
            pieces = np.array_split(tokens, -(-len(tokens) // SHARD))
            paths = [new / f"{name}_{part}_{i:06d}.bin" for i in range(len(pieces))]
            for path, piece in zip(paths, pieces):
                write_shard(path, piece)
            listed.append([entry(path) for path in paths])
            # The end of a document counts as one byte, whatever the tokens.
            sizes.append(sum(len(d) + 1 for d in documents))
        return publish(name, *listed, tokenizer, sizes, new)


# ---- 3. Downloads ------------------------------------------------------------------------------------------

def receive(url, size, seconds):
    """What is at url, bytes; no more than the first size + 1 of them. OSError after so many seconds."""
    received = []

    def read():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
                received.append(reply.read(size + 1))
        except (OSError, ValueError, http.client.HTTPException) as e:
            received.append(e)

    # A server may send a byte now and then, in its headers too: the time is that of all of it.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(max(seconds, 0))
    if not received:
        raise TimeoutError(f"not all of it came in {PATIENCE:g} seconds")
    if isinstance(received[0], Exception):
        raise OSError(str(received[0]) or type(received[0]).__name__)
    return received[0]


def download_shakespeare():
    """Tiny Shakespeare, bytes. ValueError if it cannot be had."""
    deadline = time.monotonic() + PATIENCE
    for tries in range(1, TRIES + 1):
        time.sleep(tries - 1)
        try:
            text = receive(SHAKESPEARE, SHAKESPEARE_SIZE, deadline - time.monotonic())
            if digest(text).hex() == SHAKESPEARE_SHA256:
                return text
            # A network that wants a log-in first sends a page of its own.
            fault = f"what came, {text[:20]!r}..., is another text"
        except OSError as e:
            fault = str(e)
        print(f"shakespeare, try {tries}: {fault}", flush=True)
        if time.monotonic() > deadline:
            break
    raise ValueError(f"{SHAKESPEARE} failed (tries: {tries}): {fault}. Try again later, or use the corpus "
                     "that needs no download: python data/prepare.py python")


def download_fineweb(directory, shards):
    """Fetch so many training shards of FineWeb, and its validation -> their paths, validation last.

    Those that are there and whole are not fetched.
    """
    if not 1 <= shards <= 103:
        raise ValueError(f"FineWeb has 1 to 103 training shards, not {shards}")
    paths = [directory / f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    paths.append(directory / "fineweb_val_000000.bin")
    missing = []
    for path in paths:
        try:
            check_shard(path)
        except ValueError:
            missing.append(path)
    if not missing:
        return paths

    names = ", ".join(path.name for path in missing)
    by_hand = (f"fetch the files by hand from https://huggingface.co/datasets/{FINEWEB} to {directory}, "
               f"and run this command again: {names}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"FineWeb needs a package: pip install huggingface_hub. Or {by_hand}")
    for path in missing:
        # What is there is damaged, and must not be taken for what was fetched before.
        path.unlink(missing_ok=True)
        try:
            hf_hub_download(repo_id=FINEWEB, repo_type="dataset", filename=path.name, local_dir=directory)
        except Exception as e:      # whatever a network leads to
            fault = " ".join(str(e).split()) or type(e).__name__
            raise ValueError(f"{path.name} failed ({fault}). Try again later, or {by_hand}")
        check_shard(path)
    return paths


# ---- 4. Corpora --------------------------------------------------------------------------------------------

def prepare(corpus, directory=Path(__file__).parent, shards=1, tokenizer="bytes"):
    """Write a corpus to directory; print and return the paths of its shards, validation last.

    corpus: one of CORPORA, or a file, or a list of files. shards: how many of FineWeb. tokenizer: bytes or
    gpt2, of text. ValueError for what cannot be had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = corpus
    if corpus == "fineweb":
        tokenizer = "gpt2"
        *train, val = download_fineweb(directory, shards)
        sizes = bytes_behind(train), bytes_behind([val])
        with writing(directory) as new:
            listed = publish(name, [entry(path) for path in train], [entry(val)], tokenizer, sizes, new)
    else:
        if corpus == "python":
            documents = documents_in(read_sources(standard_library()))
        elif corpus == "installed":
            documents = sorted(set(documents_in(read_sources(packages()))), key=digest)
        elif corpus == "shakespeare":
            documents = documents_in([download_shakespeare()])
        else:
            if isinstance(corpus, (str, Path)):
                corpus = [corpus]
            files = [Path(file) for file in corpus]
            name = name_of(files)
            documents = documents_in(read_texts(files))
        listed = write_text(name, documents, directory, tokenizer)

    paths = [directory / shard["file"] for shard in listed]
    for path, shard in zip(paths, listed):
        print(f"{path}: {shard['tokens']} tokens, sha256 {shard['sha256'][:8]}")
    if listed[-1]["tokens"] < 1000:
        print("so few tokens in validation tell little: give more text")
    knobs = [f"--corpus={name}"]
    if tokenizer == "gpt2":
        knobs.append("--vocab_size=50304")
    print(f"now: python train_gpt.py {shlex.join(knobs)}")
    return paths


def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        usage="python data/prepare.py python | installed | shakespeare | fineweb [shards] | FILE... "
              "[--tokenizer=bytes|gpt2]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", nargs="*", help="its name, or the files to make it of")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes", help="of text")
    own = parser.parse_args(argv)
    corpus = own.corpus
    if not corpus:
        raise SystemExit(parser.format_help())

    # A name may have a number of shards after it.
    shards = 1
    try:
        if len(corpus) == 2 and corpus[0] == "fineweb" and corpus[1].isdecimal():
            shards = int(corpus.pop())
        if len(corpus) == 1:
            corpus = corpus[0]
        prepare(corpus, shards=shards, tokenizer=own.tokenizer)
    except MemoryError:
        raise SystemExit("prepare.py: so much text does not fit into the memory: give less of it")
    except BrokenPipeError:
        raise      # nobody reads what is printed
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare.py: {error}")


if __name__ == "__main__":
    # A terminal may lack letters of a name. Without a terminal or a file there is no stdout.
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:
        # Whoever read the lines has gone. Python is not to try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
