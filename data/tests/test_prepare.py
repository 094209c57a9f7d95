"""The tests of data/prepare.py: documents in, shards out, downloads from a server that breaks them off."""
import collections
import contextlib
import gzip
import hashlib
import http.server
import lzma
import random
import threading
from pathlib import Path

import numpy as np
import pytest

import prepare


def shard(tokens=(1, 2, 3), magic=20240520, version=1, n=None):
    """The bytes of a shard; n: what its header says if that is not the number of tokens."""
    if n is None:
        n = len(tokens)
    header = [magic, version, n] + [0] * 253
    return np.array(header, "<i4").tobytes() + np.array(tokens, "<u2").tobytes()


def shard_of(*documents):
    return shard([*b"".join(d + b"\0" for d in documents)])


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- Shards ------------------------------------------------------------------------------------------------

def test_shard_round_trip_and_an_interrupted_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "python_val_000000.bin"
    tokens = np.array([0, 255, 256, 50256, 65535])
    with pytest.raises(ValueError, match=f"^{path} is missing: run python data/prepare.py python$"):
        prepare.check_shard(path)
    prepare.write_shard(path, tokens)
    monkeypatch.delattr(prepare.os, "replace")
    with pytest.raises(AttributeError):
        prepare.write_shard(path, np.arange(9))
    assert prepare.check_shard(path) == 5 and path.read_bytes() == shard(tokens)


@pytest.mark.parametrize("data, fault", [
    (b"", "is empty"),
    (shard()[:1023], "1023 bytes, less than a header of 1024"),
    (shard(magic=7), "begins with 7, not 20240520"),
    (shard(version=2), "version 2, not 1"),
    (shard(()), "says 0 tokens, the file holds 0"),
    (shard(n=2), "says 2 tokens, the file holds 3"),
    (shard()[:-1], "says 3 tokens, the file holds 2.5"),
    (shard()[:-4], "says 3 tokens, the file holds 1"),
], ids=range(8))
def test_bad_shard_is_named_with_its_fault_and_the_way_out(tmp_path, data, fault):
    path = tmp_path / "python_train_000000.bin"
    path.write_bytes(data)
    message = f"^{path} .*{fault}: delete it and run python data/prepare.py python again$"
    with pytest.raises(ValueError, match=message):
        prepare.check_shard(path)


# ---- Text --------------------------------------------------------------------------------------------------

XZ = ("my.txt.xz", lzma.compress(b"\nA:\nlonger one\n\n \r\n\n  B:\nspeech\n"))
GZ = ("novels.txt.gz", gzip.compress(b"second"))
MARKED = b"one\0\n<|endoftext|>\n \n<|endoftext|>\r\ntwo <|endoftext|>\n\n2\n<|endoftext|>"


@pytest.mark.parametrize("files, train, val", [
    # 0 ends documents, and is nowhere else.
    ([("my.txt", MARKED)], b"two <|endoftext|>\n\n2\n", b"one\n"),
    ([XZ], b"A:\nlonger one", b"  B:\nspeech"),
    ([XZ, XZ], b"A:\nlonger one", b"  B:\nspeech"),
    # The first file names the corpus.
    ([GZ, XZ], lzma.decompress(XZ[1]), b"second"),
])
def test_files_are_documents_and_a_single_one_is_cut_at_its_marks_or_blank_lines(tmp_path, files, train, val):
    for name, data in files:
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name, _ in files]
    written = prepare.prepare(paths if len(paths) > 1 else paths[0], tmp_path / "new")
    corpus = files[0][0].split(".")[0]
    assert [path.name for path in written] == [f"{corpus}_train_000000.bin", f"{corpus}_val_000000.bin"]
    assert [path.read_bytes() for path in written] == [shard_of(train), shard_of(val)]


def test_split_is_of_whole_documents_in_any_order_and_holds_out_the_shortest_where_none_fits(monkeypatch):
    rng = random.Random(0)
    documents = [rng.randbytes(rng.randrange(1, 2000)) for _ in range(300)]
    documents += documents[:100]      # duplicates
    train, val = prepare.split(documents)
    assert collections.Counter(train + val) == collections.Counter(documents)
    assert not set(train) & set(val)
    share = sum(map(len, set(val))) / sum(map(len, set(documents)))
    assert 0.04 < share <= 0.05      # less than 5% by a document

    assert set(prepare.split(documents[::-1])[1]) == set(val)
    monkeypatch.setattr(prepare, "VAL_MAX", 3000)
    assert sum(map(len, set(prepare.split(documents)[1]))) <= 3000
    short = [b"x" * 9, b"y" * 5, b"y" * 5, b"z" * 7]
    assert prepare.split(short) == ([b"x" * 9, b"z" * 7], [b"y" * 5, b"y" * 5])


def test_python_corpus_is_the_standard_library_without_packages(tmp_path, monkeypatch):
    lib = tmp_path / "lib"
    for name in ("b.py", "a/z.py", "a.py", "site-packages/x.py", "a/__pycache__/x.py", "dist-packages/x.py"):
        path = lib / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(prepare.sysconfig, "get_path", {"stdlib": str(lib)}.get)
    assert prepare.standard_library() == [lib / "a/z.py", lib / "a.py", lib / "b.py"]
    train, val = prepare.prepare("python", tmp_path)
    assert train.read_bytes() == shard_of(b"a/z.py", b"a.py")
    assert val.read_bytes() == shard_of(b"b.py")


def test_installed_is_every_package_once_in_an_order_of_content_alone(tmp_path, monkeypatch):
    files = {
        "one/a.py": "second",
        "one/b.py": "first",
        "one/same.py": "first",
        "two/c.py": "third",
        "two/d.txt": "no",
    }

    def corpus(*order):
        """The shards' bytes with two places for packages, in this order."""
        place = tmp_path / "".join(order)
        for name, text in files.items():
            path = place / name.replace("/", "/site-packages/package/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        roots = [str(place / name / "site-packages") for name in order]
        monkeypatch.setattr(prepare.sys, "path", [*roots, str(tmp_path)])
        return [path.read_bytes() for path in prepare.prepare("installed", tmp_path)]

    train, val = corpus("one", "two")
    assert corpus("two", "one") == [train, val]

    # Held out is, of the shortest, the first by hash.
    order = sorted((b"first", b"second", b"third"), key=lambda d: hashlib.sha256(d).digest())
    held_out = next(d for d in order if len(d) == 5)
    order.remove(held_out)
    assert val == shard_of(held_out) and train == shard_of(*order)


def test_long_text_is_several_shards_and_a_shorter_one_replaces_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 10)
    text = tmp_path / "t.txt"
    for content, sizes in ((b"ab\n\n" + b"c" * 24, [9, 8, 8, 3]), (b"ab\n\ncde", [4, 3])):
        text.write_bytes(content)
        paths = prepare.prepare(text, tmp_path)
        assert [prepare.check_shard(path) for path in paths] == sizes
    assert files_in(tmp_path) == ["t.txt", "t_train_000000.bin", "t_val_000000.bin"]


@pytest.mark.parametrize("args, message", [
    ([], "prepare.py FILE"),
    (["pyton"], "cannot read pyton .* one of python, installed, shakespeare, fineweb"),
    (["fineweb", "104"], "1 to 103"),
    (["fineweb", "x"], "fineweb is a corpus"),
    (["x.xz"], "cannot read x.xz"),
    (["x.gz"], "cannot read x.gz"),
    (["1", "1"], "no two different documents"),
    (["0"], "no two different"),
])
def test_user_errors_are_one_message(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    files = {"x.xz": b"not xz", "x.gz": gzip.compress(b"x")[:-9], "1": b"one", "0": b" \n"}
    for name, data in files.items():
        Path(name).write_bytes(data)
    with pytest.raises(SystemExit, match=message):
        prepare.main(args)


# ---- Downloads ---------------------------------------------------------------------------------------------

BODY = shard(np.random.default_rng(0).integers(0, 50257, 10**5))
HALF = len(BODY) // 2
VAL = "fineweb_val_000000.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's script says: with an error, "whole", "drop" (half of it), or as Range asks."""

    def do_GET(self):
        s = self.server
        begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        s.asked.append((self.path[1:], begin))

        # The last entry of the script is for good.
        how = s.script[0]
        if len(s.script) > 1:
            s.script = s.script[1:]
        if how == "resume" and begin >= len(s.body):
            how = 416
        if isinstance(how, int):
            self.send_error(how)
            return

        if how != "resume":
            begin = 0
        if begin:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(s.body) - 1}/{len(s.body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(s.body) - begin))
        self.end_headers()
        self.wfile.write(s.body[begin:HALF if how == "drop" else None])


@pytest.fixture
def server(monkeypatch):
    """A local server of `body` that answers each request as the next of `script` says.

    asked: the names and first bytes that it was asked for; waits: the seconds before each try.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.asked = []
        s.waits = []
        s.body = BODY
        for name in ("FINEWEB", "SHAKESPEARE"):
            monkeypatch.setattr(prepare, name, f"http://127.0.0.1:{s.server_port}/")
        monkeypatch.setattr(prepare.time, "sleep", s.waits.append)
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=s.serve_forever, args=[0.01], daemon=True).start()
        yield s
        s.shutdown()


@pytest.mark.parametrize("left, script, body, asked, fault", [
    (b"", ["drop", "resume"], BODY, [0, HALF], ""),
    (b"", ["drop", 503, "resume"], BODY, [0, HALF, HALF], ""),
    (b"", ["drop", "whole"], BODY, [0, HALF], ""),      # Range ignored
    (BODY[:HALF], ["resume"], BODY, [HALF], ""),
    (BODY + b"old", ["resume"], BODY, [len(BODY) + 3, 0], ""),
    (b"", [503], BODY, [0] * 6, "503"),
    (b"", [429], BODY, [0] * 6, "429"),
    (b"", [404], BODY, [0], "404"),
    (b"", ["whole"], shard(magic=7), [0], " 7"),
    (b"", ["whole"], BODY[:-2], [0], "truncated"),
    (b"", ["drop"], BODY, [0] + [HALF] * 5, f"closed after {HALF} of {len(BODY)} bytes"),
], ids=range(11))
def test_download_is_bitwise_right_or_says_what_to_do(server, tmp_path, left, script, body, asked, fault):
    path = tmp_path / VAL
    part = tmp_path / (VAL + ".part")
    if left:
        part.write_bytes(left)      # by an earlier run
    server.script = script
    server.body = body
    expectation = pytest.raises(ValueError, match=fault) if fault else contextlib.nullcontext()
    with expectation as error:
        prepare.download(prepare.FINEWEB + VAL, path, prepare.check_shard)
    assert server.asked == [(VAL, begin) for begin in asked]
    assert server.waits == [*range(len(asked))]
    if not fault:
        assert files_in(tmp_path) == [VAL] and path.read_bytes() == BODY
        return

    # What another try, or run, can go on from is kept.
    assert files_in(tmp_path) == ([part.name] if script == ["drop"] else [])
    for said in (prepare.FINEWEB, f"tries: {len(asked)}", f"by hand to {tmp_path}", "data/prepare.py python"):
        assert said in str(error.value)


def test_corpora_download_only_what_is_missing_or_bad(server, tmp_path):
    server.script = ["whole"]
    good = "fineweb_train_000001.bin"
    bad = "fineweb_train_000002.bin"
    (tmp_path / good).write_bytes(BODY)
    (tmp_path / bad).write_bytes(BODY[:-1])
    paths = prepare.prepare("fineweb", tmp_path, 2)
    assert paths == [tmp_path / name for name in (good, bad, VAL)]
    assert [name for name, _ in server.asked] == [bad, VAL]
    assert files_in(tmp_path) == [good, bad, VAL]

    # Shakespeare is cut into speeches.
    server.body = b"A:\nspeak.\n\nB:\nno.\n"
    train, val = prepare.prepare("shakespeare", tmp_path)
    assert train.read_bytes() == shard_of(b"A:\nspeak.")
    assert val.read_bytes() == shard_of(b"B:\nno.")
