"""The tests of data/prepare.py, and of how train_gpt.py reads what it makes: text in, a whole corpus out."""
import collections
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import http.server
import itertools
import json
import lzma
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import prepare
import train_gpt
from small_runs import WRITING, shards


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
    with WRITING, monkeypatch.context() as patch:
        patch.delattr(prepare.os, "replace")
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

LONG = b"A long document.\n" * 10
MARKED = LONG + b"<|endoftext|>\n \n<|endoftext|>\r\ntwo <|endoftext|>\n\n2\n<|endoftext|>"
XZ = ("my.txt.xZ", lzma.compress(MARKED))
GZ = ("novels.TXT.Gz", gzip.compress(b"short"))


@pytest.mark.parametrize("files, train, val", [
    ([("my.txt", MARKED + b"\nThree")], [LONG, b"two <|endoftext|>\n\n2\n"], [b"Three"]),
    # The first file names the corpus.
    ([GZ, XZ], [LONG, b"two <|endoftext|>\n\n2\n"], [b"short"]),
    # Equal documents stay together.
    ([GZ, XZ, GZ], [LONG, b"two <|endoftext|>\n\n2\n"], [b"short", b"short"]),
])
def test_files_are_documents_which_marks_part(tmp_path, files, train, val):
    paths = []
    for i, (name, data) in enumerate(files):
        path = tmp_path / str(i) / name
        path.parent.mkdir()
        path.write_bytes(data)
        paths.append(str(path))
    written = prepare.prepare(paths if len(paths) > 1 else paths[0], tmp_path / "new")
    corpus = files[0][0].split(".")[0]
    assert [path.name for path in written] == [f"{corpus}_train_000000.bin", f"{corpus}_val_000000.bin"]
    assert [path.read_bytes() for path in written] == [shard_of(*train), shard_of(*val)]


LINE = b"x" * 9 + b"\n"


@pytest.mark.parametrize("documents, train, val", [
    # After a blank line, or else a line, in the second half of the last 5%
    ([LINE * 97 + b"\n" + LINE * 3], [LINE * 97 + b"\n"], [LINE * 3]),
    ([LINE * 94 + b" \n\n" + LINE * 6], [LINE * 94 + b" \n\n" + LINE], [LINE * 5]),
    ([LINE * 100], [LINE * 95], [LINE * 5]),
    # After a letter: here 5% begin in the middle of one
    ([("\xfc" * 510).encode()], [("\xfc" * 485).encode()], [("\xfc" * 25).encode()]),
    # Of three documents, one would be a third.
    ([LINE * 33, LINE * 34, b"y" * 330], [LINE * 33, LINE * 29, b"y" * 330], [LINE * 5]),
    # One that fits is too little.
    ([b"short", LINE * 100], [b"short", LINE * 95], [LINE * 5]),
    # No copy of the end is left in the training text.
    ([LINE * 50, LINE * 50], [LINE * 48, LINE * 48], [LINE * 2]),
    ([b"xy"], [b"x"], [b"y"]),
])
def test_where_documents_are_long_the_end_of_the_longest_is_held_out(documents, train, val):
    assert prepare.split(documents) == (train, val)


def test_split_is_of_whole_documents_in_any_order(monkeypatch):
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


def test_python_corpus_is_the_standard_library_without_packages(tmp_path, monkeypatch):
    lib = tmp_path / "lib"
    for name in ("b.py", "a/z.py", "a.py", "site-packages/x.py", "a/__pycache__/x.py", "dist-packages/x.py"):
        path = lib / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (lib / "a.py").write_text("long " * 20)
    monkeypatch.setattr(prepare.sysconfig, "get_path", {"stdlib": str(lib)}.get)
    assert prepare.standard_library() == [lib / "a/z.py", lib / "a.py", lib / "b.py"]
    train, val = prepare.prepare("python", tmp_path)
    assert train.read_bytes() == shard_of(b"a/z.py", b"long " * 20)
    assert val.read_bytes() == shard_of(b"b.py")


def test_files_without_text_and_sources_that_cannot_be_read_are_named(tmp_path, monkeypatch, capsys):
    files = [tmp_path / name for name in ("a.txt", "empty.txt", "b.txt")]
    for path, content in zip(files, (b"one" * 20, b" \n\0".strip(b"\0"), b"two")):
        path.write_bytes(content)
    prepare.prepare(files, tmp_path)
    assert f"{files[1]}: skipped, there is no text in it\n" in capsys.readouterr().out

    monkeypatch.setattr(prepare, "packages", lambda: [*files, tmp_path / "gone.py"])
    train, val = prepare.prepare("installed", tmp_path)
    assert f"{tmp_path}/gone.py: skipped, it cannot be read (No such file" in capsys.readouterr().out
    assert (train.read_bytes(), val.read_bytes()) == (shard_of(b"one" * 20), shard_of(b"two"))


def test_installed_is_every_package_once_in_an_order_of_content_alone(tmp_path, monkeypatch):
    files = {
        "one/a.py": "second" * 20,
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

    # Held out is, of those that fit, the first by hash.
    order = sorted((b"first", b"second" * 20, b"third"), key=lambda d: hashlib.sha256(d).digest())
    held_out = next(d for d in order if len(d) == 5)
    order.remove(held_out)
    assert val == shard_of(held_out) and train == shard_of(*order)


def test_long_text_is_several_shards_and_a_shorter_one_replaces_them_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHARD", 10)
    text = tmp_path / "t.txt"
    for content, sizes, told in ((b"c" * 26, [9, 9, 8, 2], 0), (b"cde", [3, 2], 1), (b"cde", [3, 2], 0)):
        text.write_bytes(content)
        paths = prepare.prepare(text, tmp_path)
        assert [prepare.check_shard(path) for path in paths] == sizes
        assert capsys.readouterr().out.count("t.json listed another text: runs that began with it") == told
    assert files_in(tmp_path) == ["t.json", "t.txt", "t_train_000000.bin", "t_val_000000.bin"]


@pytest.mark.parametrize("args, message", [
    ([], "prepare.py FILE"),
    (["pyton"], "cannot read pyton .* one of python, installed, shakespeare, fineweb"),
    (["directory"], "cannot read directory .no regular file"),
    (["pipe"], "cannot read pipe .no regular file"),
    (["/dev/zero"], "cannot read /dev/zero .no regular file"),
    (["x" * 300], "cannot read x+ "),
    ([""], "no name"),
    ([".gz"], "'.gz' has no name"),
    ([".txt.gz"], "'.txt.gz' has no name"),
    (["a\nb"], r"'a\\nb' has letters that cannot be printed"),
    (["1", "\udcff.txt"], r"'\\udcff.txt' has letters that cannot be printed"),
    (["fineweb", "0"], "1 to 103"),
    (["fineweb", "104"], "1 to 103"),
    (["fineweb", "99999999999999999999"], "1 to 103"),
    (["fineweb", "9" * 5000], "9|digits"),
    (["fineweb", "x"], "fineweb is a corpus"),
    (["x.xz"], "cannot read x.xz"),
    (["x.gz"], "cannot read x.gz"),
    (["0", "0"], "^prepare.py: 0 bytes in the longest document: too little text to hold some out"),
    (["1"], "^prepare.py: 1 bytes in the longest"),
])
def test_user_errors_are_one_message(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    files = {"x.xz": b"not xz", "x.gz": gzip.compress(b"x")[:-9], "1": b"1", "0": b" \n"}
    for name, data in files.items():
        Path(name).write_bytes(data)
    Path("directory").mkdir()
    os.mkfifo("pipe")
    with pytest.raises(SystemExit, match=message) as error:
        prepare.main(args)
    if args:
        assert "\n" not in str(error.value)


# ---- Tokens ------------------------------------------------------------------------------------------------

@pytest.fixture
def gpt2(monkeypatch):
    """A stand-in for tiktoken's GPT-2: token 300 is `the `, 301 ends a document, others are a byte."""
    names = {300: b"the ", 301: b"<|endoftext|>"}
    gpt2 = types.SimpleNamespace(
        encode_ordinary=lambda text: [300 if word == b"the " else word[0]
                                      for word in re.findall(b"(?s)the |.", text.encode())],
        decode_single_token_bytes=lambda token: names.get(token) or bytes([token % 256]),
        eot_token=301,
        n_vocab=302,
    )
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding={"gpt2": gpt2}.get))
    return gpt2


def test_tokens_are_gpt2s_if_asked_and_the_manifest_tells(gpt2, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_bytes(b"the long one" * 20 + b"\n<|endoftext|>\nthe end")
    train, val = prepare.prepare(text, tmp_path, tokenizer="gpt2")
    assert train.read_bytes() == shard([300, *b"long one"] * 20 + [10, 301])
    assert val.read_bytes() == shard([300, *b"end", 301])
    manifest = json.loads((tmp_path / "t.json").read_text())
    assert (manifest["tokenizer"], manifest["bytes"]) == ("gpt2", dict(train=242, val=8))
    assert capsys.readouterr().out.endswith("now: python train_gpt.py --corpus=t --vocab_size=50304\n")

    # The bytes that FineWeb's tokens stand for are counted by their names, and are the same.
    assert [prepare.bytes_behind([path]) for path in (train, val)] == [242, 8]

    # So bits per byte of text can be compared: 5 tokens stand for 8 bytes.
    c = train_gpt.Config(corpus=str(tmp_path / "t"), sequence=1, vocab_size=512)
    assert train_gpt.find_corpus(c).tokenizer == "gpt2"
    assert train_gpt.bits_per_byte(shards(c, "val"), 8 * np.log(2)) == ", 5.0000 bits per byte"
    with pytest.raises(train_gpt.UserError, match="^--tokenizer=bytes: the tokens of .*/t are gpt2"):
        train_gpt.find_corpus(dataclasses.replace(c, tokenizer="bytes"))


def test_without_tiktoken_there_are_no_gpt2_tokens_and_no_bits_per_byte(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)      # to import it is an error
    (tmp_path / "t.txt").write_bytes(b"some text")
    with pytest.raises(ValueError, match=r"need tiktoken \(pip install tiktoken\).*: ModuleNotFound"):
        prepare.prepare(tmp_path / "t.txt", tmp_path, tokenizer="gpt2")
    assert files_in(tmp_path) == ["t.txt"]

    hub.files = {name: shard([50256] * 9) for name in FINEWEB}
    prepare.prepare("fineweb", tmp_path)
    assert "no bits per byte will be printed" in capsys.readouterr().out
    c = train_gpt.Config(corpus=str(tmp_path / "fineweb"), sequence=1, vocab_size=50304)
    assert train_gpt.find_corpus(c).tokenizer == "gpt2"
    assert train_gpt.bits_per_byte(shards(c, "val"), 3.0) == ""


def test_shards_of_other_tools_are_of_bytes_if_the_vocabulary_says_so(tmp_path):
    for split in ("train", "val"):
        prepare.write_shard(tmp_path / f"t_{split}_000000.bin", np.arange(9))
    for knobs, tokenizer in (({}, "bytes"), (dict(vocab_size=512), "gpt2"), (dict(tokenizer="gpt2"), "gpt2")):
        c = train_gpt.Config(corpus=str(tmp_path / "t"), **knobs)
        corpus = train_gpt.find_corpus(c)
        assert corpus.tokenizer == tokenizer
        assert corpus.bytes_per_token == 1.0 or tokenizer == "gpt2" and np.isnan(corpus.bytes_per_token)


# ---- A corpus is whole and one, or it is not there ---------------------------------------------------------

OLD = b"<|endoftext|>\n".join(b"old %d\n" % i for i in range(30))
NEW = b"<|endoftext|>\n".join(b"new one %d\n" % i for i in range(40))


def read(corpus):
    """The tokens of a corpus, a path without _train_..., as train_gpt.py reads them: bytes (train, val)."""
    c = train_gpt.Config(corpus=str(corpus), sequence=1)
    splits = [shards(c, split).shards for split in ("train", "val")]
    return [b"".join(bytes(shard.astype(np.uint8)) for shard in split) for split in splits]


def old_and_new(tmp_path, monkeypatch):
    """A corpus t of OLD, in several shards, and the file t.txt, which now holds NEW -> what both read as."""
    text = tmp_path / "t.txt"
    monkeypatch.setattr(prepare, "SHARD", 150)
    text.write_bytes(NEW)
    prepare.prepare(text, tmp_path)
    new = read(tmp_path / "t")
    text.write_bytes(OLD)
    prepare.prepare(text, tmp_path)
    old = read(tmp_path / "t")
    text.write_bytes(NEW)
    assert sum(map(len, old)) == len(OLD.replace(b"<|endoftext|>\n", b"\0") + b"\0") and old != new
    return old, new


def test_the_manifest_lists_shards_with_their_sha256(tmp_path, monkeypatch):
    old_and_new(tmp_path, monkeypatch)
    manifest = json.loads((tmp_path / "t.json").read_text())
    assert manifest.pop("tokenizer") == "bytes"
    assert manifest.pop("bytes") == {split: sum(shard["tokens"] for shard in shards)
                                     for split, shards in manifest.items()}
    assert list(manifest) == ["train", "val"] and len(manifest["train"]) > 1
    for split, shards in manifest.items():
        for i, entry in enumerate(shards):
            content = (tmp_path / f"t_{split}_{i:06d}.bin").read_bytes()
            assert entry == {
                "file": f"t_{split}_{i:06d}.bin",
                "tokens": len(content[1024:]) // 2,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    listed = [entry["file"] for shards in manifest.values() for entry in shards]
    assert files_in(tmp_path) == sorted(["t.json", "t.txt", *listed])


def test_shards_that_are_left_of_a_longer_text_are_removed_and_no_others(tmp_path):
    left = ["t_train_000001.bin", "t_val_000003.bin"]
    others = ["t_u_train_000001.bin", "t_train_1.bin", "t_test_000001.bin", "u_val_000001.bin"]
    (tmp_path / ".new").mkdir()
    for name in left + others + [".new/v_train_000000.bin"]:
        (tmp_path / name).write_bytes(shard())
    (tmp_path / "t.txt").write_bytes(NEW)
    paths = prepare.prepare(tmp_path / "t.txt", tmp_path)
    assert files_in(tmp_path) == sorted(["t.json", "t.txt", *(path.name for path in paths), *others])


def killed_at(left, text):
    """Prepare text in a process that ends at one of the calls that change files -> whether it ended there."""
    process = os.fork()
    if process:
        status = os.waitpid(process, 0)[1]
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        return status != 0

    def deadly(call):
        def instead(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            return call(*arguments, **options)

        return instead

    for place, name in [(os, "replace"), (Path, "unlink"), (Path, "mkdir"), (np, "memmap")]:
        setattr(place, name, deadly(getattr(place, name)))
    try:
        prepare.prepare(text, text.parent)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_any_moment_it_leaves_the_old_corpus_or_an_error(tmp_path, monkeypatch):
    old, new = old_and_new(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    seen = []
    for calls in itertools.count(1):
        for path in tmp_path.glob("t*"):
            path.unlink()
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        if not killed_at(calls, tmp_path / "t.txt"):
            break
        try:
            assert read(tmp_path / "t") == old
            seen.append("old")
        except train_gpt.UserError as e:
            assert re.search("no .*being written: run python data/prepare.py", str(e))
            seen.append("error")
    assert read(tmp_path / "t") == new
    assert seen == sorted(seen, reverse=True) and {*seen} == {"old", "error"}

    # The next run removes what killed ones have left.
    assert files_in(tmp_path) == sorted(["t.json", "t.txt", *(path.name for path in tmp_path.glob("t_*"))])


def test_the_same_corpus_once_more_can_be_read_all_the_time(tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_bytes(NEW)
    train, _ = prepare.prepare(text, tmp_path)
    first = read(tmp_path / "t")
    replace = os.replace
    calls = []

    def look(*arguments):
        replace(*arguments)
        calls.append(arguments)
        assert read(tmp_path / "t") == first

    with WRITING, monkeypatch.context() as patch:
        patch.setattr(os, "replace", look)
        prepare.prepare(text, tmp_path)
    assert len(calls) > 2

    # It also repairs a shard.
    train.write_bytes(shard())
    prepare.prepare(text, tmp_path)
    assert read(tmp_path / "t") == first


def test_pipes_in_the_place_of_our_files_do_not_stop_it(tmp_path):
    text = tmp_path / "t.txt"
    text.write_bytes(NEW)
    os.mkfifo(tmp_path / ".new")
    prepare.prepare(text, tmp_path)
    (tmp_path / "t.json").unlink()
    os.mkfifo(tmp_path / "t.json")
    with pytest.raises(ValueError, match="t.json is no file: move it away"):
        prepare.prepare(text, tmp_path)


def test_a_file_of_the_users_is_not_taken_for_a_manifest(tmp_path):
    mine = tmp_path / "t.json"
    mine.write_bytes(b'{"text": "one"}\n\n{"text": "two"}')
    with pytest.raises(ValueError, match=f"^{mine} is no list of shards: move it away"):
        prepare.prepare(mine, tmp_path)
    assert files_in(tmp_path) == ["t.json"] and b"one" in mine.read_bytes()


def test_a_full_disk_is_one_line_and_leaves_the_old_corpus(tmp_path, monkeypatch):
    old, _ = old_and_new(tmp_path, monkeypatch)
    with WRITING:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 + 30, limits[1]))
        try:
            message = f"^cannot write to {tmp_path} .*too large.: make room"
            with pytest.raises(ValueError, match=message) as error:
                prepare.prepare(tmp_path / "t.txt", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert read(tmp_path / "t") == old
    assert ".new" not in files_in(tmp_path)


def test_of_two_at_once_one_waits_for_the_other(tmp_path):
    (tmp_path / "t.txt").write_bytes(NEW)
    script = shutil.copy(prepare.__file__, tmp_path / "prepare.py")
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    other = subprocess.Popen([sys.executable, script, tmp_path / "t.txt"], stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == f"another prepare.py writes to {tmp_path}: waiting\n"
        assert files_in(tmp_path) == ["prepare.py", "t.txt"]
        os.close(directory)
        assert other.stdout.read().endswith("now: python train_gpt.py --corpus=t\n")
    assert other.returncode == 0
    assert read(tmp_path / "t")


def test_two_at_once_do_not_mix(tmp_path):
    script = shutil.copy(prepare.__file__, tmp_path / "prepare.py")
    expected = []
    for i in range(3):
        text = tmp_path / f"{i}" / "t.txt"
        text.parent.mkdir()
        text.write_bytes(b"\n\n".join(b"%d" % i * (n + 1) for n in range(300)))
        prepare.prepare(text, text.parent)
        expected.append(read(text.parent / "t"))
    several = [subprocess.Popen([sys.executable, script, tmp_path / f"{i}" / "t.txt"]) for i in range(3)]
    assert [process.wait() for process in several] == [0] * 3
    assert read(tmp_path / "t") in expected


# ---- How train_gpt.py reads it -----------------------------------------------------------------------------

def test_a_byte_that_was_changed_is_found_in_any_shard(tmp_path, monkeypatch):
    old_and_new(tmp_path, monkeypatch)
    prepare.prepare(tmp_path / "t.txt", tmp_path)
    paths = sorted(tmp_path.glob("*.bin"))
    assert len(paths) > 2
    for path in paths:
        content = path.read_bytes()
        for place in (20, 1024, len(content) - 2):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
            with pytest.raises(train_gpt.UserError, match=f"^{path} .*sha256: delete it, and run data/prep"):
                read(tmp_path / "t")
        path.unlink()
        with pytest.raises(train_gpt.UserError, match=f"^{path} is missing: run data/prepare.py again"):
            read(tmp_path / "t")
        path.write_bytes(content)
    read(tmp_path / "t")


def test_shards_are_those_of_the_manifest_or_without_one_all_of_that_name(tmp_path):
    (tmp_path / "t.txt").write_bytes(NEW)
    prepare.prepare(tmp_path / "t.txt", tmp_path)
    train, val = read(tmp_path / "t")
    prepare.write_shard(tmp_path / "t_train_000001.bin", np.full(9, 65))
    assert read(tmp_path / "t") == [train, val]
    (tmp_path / "t.json").unlink()
    assert read(tmp_path / "t") == [train + b"A" * 9, val]


GOOD = {"file": "t_train_000000.bin", "tokens": 3, "sha256": hashlib.sha256(shard()).hexdigest()}


def manifest_of(train, val, **others):
    """What stands in a manifest of these entries."""
    return dict(train=train, val=val, tokenizer="bytes", bytes=dict(train=3, val=3)) | others


@pytest.mark.parametrize("manifest", [
    "{", "\xff", "0", "null", "[]", "{}", '"train"', "[" * 10**5,
    {"train": []},
    {"train": [GOOD], "val": [GOOD]},
    manifest_of({"file": "t_train_000000.bin"}, [GOOD]),
    manifest_of([GOOD, "file"], [GOOD]),
    manifest_of([{"file": GOOD["file"]}], [GOOD]),
    manifest_of([GOOD | {"sha256": None}], [GOOD]),
    manifest_of([GOOD | {"file": 3}], [GOOD]),
    manifest_of([GOOD | {"file": ""}], [GOOD]),
    manifest_of([GOOD], [GOOD], tokenizer=3),
    manifest_of([GOOD], [GOOD], bytes=3),
    manifest_of([GOOD], [GOOD], bytes=dict(train=3)),
    manifest_of([GOOD], []),
    manifest_of([], [GOOD]),
], ids=range(21))
def test_a_damaged_manifest_is_named_with_the_way_out(tmp_path, manifest):
    corpus = tmp_path / "in" / "t"
    corpus.parent.mkdir()
    for split in ("train", "val"):
        (corpus.parent / f"t_{split}_000000.bin").write_bytes(shard())
    path = corpus.parent / "t.json"
    path.write_text(json.dumps(manifest_of([GOOD], [GOOD | {"file": "t_val_000000.bin"}])))
    read(corpus)
    path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest), encoding="latin-1")
    with pytest.raises(train_gpt.UserError, match=f"^{path} is damaged, .*: move it away, and run data/prep"):
        read(corpus)


def test_a_manifest_names_no_files_elsewhere(tmp_path):
    (tmp_path / "outside.bin").write_bytes(shard())
    corpus = tmp_path / "in" / "t"
    corpus.parent.mkdir()
    for name in ("../outside.bin", "/etc/outside.bin"):
        listed = [GOOD | {"file": name}]
        (corpus.parent / "t.json").write_text(json.dumps(manifest_of(listed, listed)))
        with pytest.raises(train_gpt.UserError, match="in/outside.bin is missing: run data/prepare.py again"):
            read(corpus)


def test_an_empty_manifest_says_that_shards_are_being_written(tmp_path):
    for split in ("train", "val"):
        prepare.write_shard(tmp_path / f"my book_{split}_000000.bin", np.arange(9))
    read(tmp_path / "my book")
    (tmp_path / "my book.json").touch()
    message = f"^no {tmp_path}/my book_train_.*being written: run .*prepare.py FILES, .* named my book.txt"
    with pytest.raises(train_gpt.UserError, match=message):
        read(tmp_path / "my book")


def test_the_default_corpus_is_made_where_it_is_not_there(tmp_path, monkeypatch, capfd):
    """Also where one that made it was killed. What prepare.py says is seen if it fails."""
    script = tmp_path / "prepare.py"
    script.write_text("raise SystemExit('prepare.py: the disk is full')")
    monkeypatch.setattr(train_gpt, "DATA", tmp_path)
    with pytest.raises(train_gpt.UserError, match="run python data/prepare.py python"):
        read("python")
    assert "prepare.py: the disk is full" in capfd.readouterr().err

    script.write_text("from pathlib import Path\nimport sys\n"
                      f"sys.path.insert(0, {os.path.dirname(prepare.__file__)!r})\nimport prepare\n"
                      f"prepare.write_text('python', [b'one two three'], Path({str(tmp_path)!r}), 'bytes')")
    (tmp_path / "python.json").touch()
    assert read("python") == [b"one two thre\0", b"e\0"]
    script.unlink()
    read("python")


# ---- What is no text ---------------------------------------------------------------------------------------

BINARY = bytes(range(256)) * 9


@pytest.mark.parametrize("name, content, offset", [
    ("zero.txt", b"a\0b\n\nc", 1),
    ("latin.txt", "one\n\nf\xfcr".encode("latin-1"), 6),
    ("utf16.txt", "one\n\ntwo".encode("utf-16"), 0),
    ("utf16.txt", "one\n\ntwo".encode("utf-16-le"), 1),      # valid UTF-8, but for its 0
    ("end.txt", "one\n\ntw\xf6".encode()[:-1], 7),
    # a letter of two bytes, of which one piece has the first, and the next piece no second
    ("pieces.txt", b"x" * (2**20 - 1) + b"\xc3" + b"\n\ny", 2**20 - 1),
    ("later.txt", b"x" * 2**20 + b"\n\n\xff", 2**20 + 2),
    ("gz.gz", gzip.compress(b"one\n\n" + BINARY), 5),
    ("twice.gz.xz", lzma.compress(gzip.compress(b"one\n\ntwo")), 1),
    ("b.bz2", b"BZh91AY&SY\xff\0", 10),
    ("z.zip", b"PK\3\4\x14\0\n\n", 5),
    ("it's.txt", b"\xff", 0),
])
def test_what_is_not_utf8_is_refused_with_the_byte_and_the_way_out(tmp_path, name, content, offset):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare.prepare(path, tmp_path)
    said, way_out = str(error.value).split(": unpack it, or convert it, ")
    assert said == f"{path} is not UTF-8 text at byte {offset}"
    assert shlex.split(way_out) == ["iconv", "-f", "ITS_ENCODING", "-t", "utf-8", str(path), ">", "NEW_FILE"]
    assert files_in(tmp_path) == [name]


def test_letters_of_several_bytes_may_lie_across_the_pieces_that_are_read(tmp_path):
    text = tmp_path / "t.txt"
    content = b"x" * (2**20 - 1) + "\xfc".encode()
    text.write_bytes(content + b"\n<|endoftext|>\n\xc3\xb6" + b"y" * 2**15)
    train, val = prepare.prepare(text, tmp_path)
    assert train.read_bytes() == shard_of(content + b"\n")
    assert val.read_bytes() == shard_of(b"\xc3\xb6" + b"y" * 2**15)


def test_text_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LIMIT", 3 * 2**20)
    files = [tmp_path / "a.txt", tmp_path / "bomb.gz"]
    files[0].write_bytes(b"x\n\n" + b"y" * 2**20)
    files[1].write_bytes(gzip.compress(b"x" * 2**24))
    message = f"{files[1]} has too much text: all files together may have {3 * 2**20} bytes$"
    with pytest.raises(ValueError, match=message):
        prepare.prepare(files, tmp_path)

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(prepare, "read_text", no_memory)
    with pytest.raises(SystemExit, match="does not fit into the memory"):
        prepare.main([str(files[0])])


@pytest.mark.parametrize("name", ["my book", "it's", "gr\xf6\xdfe", "a$b", "x;y", "-q"])
def test_the_command_that_is_printed_is_one_that_a_shell_takes(tmp_path, name, capsys):
    path = tmp_path / f"{name}.txt"
    path.write_bytes(b"one\n\ntwo")
    prepare.prepare(path, tmp_path)
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("now: ")
    assert shlex.split(command) == ["python", "train_gpt.py", f"--corpus={name}"]


def test_the_output_may_be_ascii_or_closed(tmp_path):
    """The script runs on a copy of itself, since it writes where it stands."""
    script = tmp_path / "prepare.py"
    shutil.copy(prepare.__file__, script)
    text = tmp_path / "gr\xf6\xdfe.txt"
    text.write_bytes(b"one\n\ntwo")
    command = [sys.executable, script, text]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("now: python train_gpt.py '--corpus=gr??e'\n")

    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Downloads ---------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's script says: with an error, or with bytes, at a given pace."""

    def do_GET(self):
        s = self.server
        s.asked += 1
        s.was_asked.set()

        # The last entry of the script is for good.
        how = s.script[0]
        if len(s.script) > 1:
            s.script = s.script[1:]
        if isinstance(how, int):
            self.send_error(how)
            return

        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):      # the client may have gone
            for i in range(0, len(how), 5):
                self.wfile.write(how[i:i + 5])
                if s.pause:
                    s.ended.wait(s.pause)


TEXT = b"A:\nspeak.\n\nB:\nno.\n"
LOG_IN = b"<html>Log in first!</html>"


@pytest.fixture
def server(monkeypatch):
    """A local server of Shakespeare that answers each request as the next of `script` says.

    asked: how many requests it had; waits: the seconds before each new try.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.asked = 0
        s.was_asked = threading.Event()
        s.ended = threading.Event()
        s.waits = []
        s.pause = 0
        monkeypatch.setattr(prepare, "SHAKESPEARE", f"http://127.0.0.1:{s.server_port}/")
        monkeypatch.setattr(prepare, "SHAKESPEARE_SIZE", len(TEXT))
        monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
        # Only in prepare.py: other threads of this process sleep, too.
        clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=s.waits.append)
        monkeypatch.setattr(prepare, "time", clock)
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=s.serve_forever, args=[0.01], daemon=True).start()
        yield s
        s.ended.set()
        s.shutdown()


@pytest.mark.parametrize("script, asked, fault", [
    ([TEXT], 1, ""),
    ([503, TEXT[:-1], TEXT], 3, ""),
    ([LOG_IN, TEXT], 2, ""),
    ([404], 3, "404"),
    ([TEXT[:9]], 3, "is another text"),
    ([LOG_IN], 3, "<html>.* is another text"),
    ([TEXT + b"!"], 3, "is another text"),
])
def test_shakespeare_is_that_text_or_an_error_and_leaves_only_shards(server, tmp_path, script, asked, fault):
    server.script = script
    if fault:
        message = f"^http://127.*{fault}.*data/prepare.py python$"
        with pytest.raises(ValueError, match=message):
            prepare.prepare("shakespeare", tmp_path)
        assert files_in(tmp_path) == []
    else:
        train, val = prepare.prepare("shakespeare", tmp_path)
        assert train.read_bytes() == shard_of(TEXT[:-1])
        assert val.read_bytes() == shard_of(TEXT[-1:])
        assert files_in(tmp_path) == ["shakespeare.json", train.name, val.name]
    assert server.asked == asked
    assert server.waits == [0, 1, 2][:asked]


def test_a_download_that_drips_ends_after_a_while(server, tmp_path, monkeypatch):
    server.script = [TEXT]
    server.pause = 10      # less than TIMEOUT; all of it would take four times as long
    monkeypatch.setattr(prepare, "PATIENCE", 0.3)
    with pytest.raises(ValueError, match=r"not all of it came in 0.3 seconds"):
        prepare.prepare("shakespeare", tmp_path)
    assert server.was_asked.wait(60)      # the request of a slow machine may still be on its way
    assert server.asked == 1


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package huggingface_hub. files: what it has; asked: what it was asked for."""
    hub = types.SimpleNamespace(files={}, asked=[])

    def hf_hub_download(repo_id, repo_type, filename, local_dir):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        hub.asked.append(filename)
        if filename not in hub.files:
            raise RuntimeError("no\nsuch file")
        (Path(local_dir) / filename).write_bytes(hub.files[filename])

    hub.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


FINEWEB = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]


def test_fineweb_is_fetched_where_it_is_missing_or_damaged(hub, tmp_path):
    good, bad, val = [tmp_path / name for name in FINEWEB]
    good.write_bytes(shard([50256]))
    bad.write_bytes(shard()[:-1])
    hub.files = {name: shard([i]) for i, name in enumerate(FINEWEB)}
    assert prepare.prepare("fineweb", tmp_path, 2) == [good, bad, val]
    assert hub.asked == FINEWEB[1:]
    assert [path.read_bytes() for path in (good, bad, val)] == [shard([50256]), shard([1]), shard([2])]
    manifest = json.loads((tmp_path / "fineweb.json").read_text())
    assert [entry["file"] for entry in manifest["train"]] == FINEWEB[:2]

    # With fewer shards nothing is fetched, and no download is thrown away.
    assert prepare.prepare("fineweb", tmp_path, 1) == [good, val]
    assert hub.asked == FINEWEB[1:]
    assert files_in(tmp_path) == ["fineweb.json", *FINEWEB]

    # A byte that has changed since is not listed as right.
    good.write_bytes(shard([50255]))
    with pytest.raises(ValueError, match=f"^{good} is not what it was by {tmp_path}/fineweb.json: delete it"):
        prepare.prepare("fineweb", tmp_path, 1)
    good.unlink()
    hub.files[good.name] = shard([50256])
    assert prepare.prepare("fineweb", tmp_path, 2) == [good, bad, val]


@pytest.mark.parametrize("content, fault", [
    (None, r"fineweb_train_000002.bin failed \(no such file\).*by hand from https://huggingface.co/dat"),
    (shard()[:-1], "fineweb_train_000002.bin is truncated.*delete it and run python data/prepare.py fineweb"),
])
def test_fineweb_that_cannot_be_fetched_is_one_line(hub, tmp_path, content, fault):
    hub.files = {FINEWEB[0]: shard()}
    if content:
        hub.files[FINEWEB[1]] = content
    with pytest.raises(ValueError, match=fault) as error:
        prepare.prepare("fineweb", tmp_path, 2)
    assert "\n" not in str(error.value)


def test_without_its_package_fineweb_may_be_fetched_by_hand(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)      # to import it is an error
    train = tmp_path / FINEWEB[0]
    val = tmp_path / FINEWEB[2]
    train.write_bytes(shard())
    message = f"pip install huggingface_hub. Or fetch .* to {tmp_path}, .*: fineweb_val_000000.bin$"
    with pytest.raises(ValueError, match=message):
        prepare.prepare("fineweb", tmp_path)
    val.write_bytes(shard())
    assert prepare.prepare("fineweb", tmp_path) == [train, val]
