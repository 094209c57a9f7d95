"""Files that outlive crashes: checkpoints and results, whole or not there; logs, line by line."""
import contextlib, json, os, pickle, zipfile, zlib
try: import fcntl
except ImportError: fcntl = None    # Windows: nothing is locked
import torch
import launch

CHECKPOINTS = ("checkpoint.pt", "previous.pt")  # the last one, and the one before
class UserError(Exception): """A mistake of the user's: shown as one line, without a traceback."""

@contextlib.contextmanager
def held(directory):
    """Within it no other job trains in a directory: UserError if one does, where the disk knows locks."""
    if launch.RANK or not fcntl: return (yield)
    f = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(f)
        raise UserError(f"another process trains in {directory}: wait until it ends, or stop it") from None
    except OSError: pass
    try: yield
    finally: os.close(f)            # also the system's, of a process that is killed

def write(path, text):
    """Write text whole or not at all."""
    with open(part := path.with_name(f"{path.name}.part"), "w", encoding="utf-8") as f:
        f.write(text), f.flush(), os.fsync(f.fileno())
    os.replace(part, path)

def records(log):
    """The whole lines of a log.jsonl -> [(line, its record)]: a crash may tear the last, a disk lose some."""
    found = []
    for line in log.read_text(errors="replace").splitlines(True):
        try: found += [(line, json.loads(line))] if line[0] + line[-2:] == "{}\n" else []
        except ValueError: pass
    return found

def save(directory, c, step, **state):
    """Write a checkpoint whole or not at all, if this is rank 0; the last two are kept."""
    if launch.RANK: return
    part, (new, old) = directory / "checkpoint.part", (directory / name for name in CHECKPOINTS)
    try:
        with open(part, "wb") as f:
            torch.save(dict(format="train_gpt 4", config=vars(c), step=step, **state), f)
            f.flush(), os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch.save turns the first into the second
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {part} ({e.__context__ or e}): stopped. The last good checkpoint, if"
                        f" any, stays: make room, then resume {directory}") from None
    if new.exists(): os.replace(new, old)
    os.replace(part, new)

def read(path, mode):
    """A checkpoint of `save`. UserError if any bit of it is wrong, with the one before as the way out."""
    open(path, "rb").close()            # what may not be read is not broken
    try:
        with zipfile.ZipFile(path) as z:    # has checksums; torch compresses nothing, makes no directories
            if any(i.compress_type or i.external_attr for i in z.infolist()) or z.testzip(): raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True)  # executes nothing of it
    except (RuntimeError, EOFError, LookupError, ValueError, OSError, zlib.error, pickle.UnpicklingError,
            zipfile.BadZipFile) as e:
        if "allocate" in str(e): raise  # nor is it where memory is short
        older = path.with_name(CHECKPOINTS[1])
        advice = f"take the one before, {mode} {older}" if older.exists() and older != path else "train again"
        raise UserError(f"{path} is not a whole checkpoint ({type(e).__name__}): {advice}") from None
