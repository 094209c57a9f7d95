"""Train a GPT whose hidden linear layers multiply in NVFP4, on one GPU or a CPU. Read it from top to bottom.

    python train_gpt.py [PRESET] [--knob=value ...]     train; without a preset: cpu, or gpu if there is one
    python train_gpt.py resume RUN [--knob=value ...]   go on, the same to the bit as without the stop
    python train_gpt.py eval RUN [--recipe=bf16,rtn]    post-training quantization: validation loss by forward
    python train_gpt.py sample RUN --prompt="def "      text from a trained model, by any --recipe's forward

A comma list, --recipe=bf16,nvidia,quartet2, trains each recipe in turn on the same data, seed and steps, and
ends with a table. torchrun --nproc_per_node=N train_gpt.py ... shares a step among N GPUs (data/launch.py). A
run writes runs/NAME/: log.jsonl, checkpoint.pt, previous.pt, sample.txt.
"""
import codecs, ctypes, dataclasses, difflib, errno, glob, hashlib, itertools, json, math, os, platform
import shutil, signal, sys, time
from functools import partial
from pathlib import Path
import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F
import quartet

if os.name == "posix":  # glibc hands large freed blocks back; to keep them makes a CPU step 1.2 times as fast
    malloc = getattr(ctypes.CDLL(None), "mallopt", lambda knob, value: None)
    malloc(-3, 2**25), malloc(-1, 2**31 - 1)    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
DATA = Path(__file__).resolve().parent / "data"
sys.path.append(str(DATA))
import diagnose, files, launch, perplexity, prepare  # of data/
from files import CHECKPOINTS, UserError, save

# ---- 1. Config: one knob a line ----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run depends on; the comments are its help text. Types: str, int, float."""
    recipe: str = "quartet2"        # rows of quartet.RECIPES, by commas: how hidden linear layers multiply
    backend: str = "auto"           # auto | torch | triton: who quantizes; auto is triton with a GPU
    layers: int = 6                 # Transformer blocks
    width: int = 640                # of the residual stream
    heads: int = 5                  # attention heads
    hidden: int = 1792              # width of the SwiGLU
    vocab_size: int = 256           # 256 for bytes, 50304 for GPT-2 tokens (fineweb)
    sequence: int = 512             # tokens of context
    bf16_blocks: int = 0            # so many last blocks keep bf16 linear layers (arXiv:2509.25149: 15%)
    bf16_end: float = 0.0           # this last share of the steps trains all layers in bf16 (same source)
    corpus: str = "python"          # data/CORPUS_train_*.bin, written by data/prepare.py
    batch: int = 64                 # sequences in one forward pass
    tokens_per_step: int = 2**18    # tokens of one optimizer step: several forward passes accumulate
    steps: int = 2861               # optimizer steps; the paper's 30m, 25 tokens a parameter
    lr: float = 1.2e-3              # peak learning rate of AdamW: 10% linear warm-up, then cosine to a tenth
    weight_decay: float = 0.1       # on the weights of linear layers
    clip: float = 1.0               # largest gradient norm
    seed: int = 1                   # of initialisation, data order and rounding noise
    eval_every: int = 250           # steps between validations
    eval_tokens: int = 2**20        # tokens of a validation, at most
    log_every: int = 10             # steps between progress lines
    save_every: int = 500           # steps between checkpoints; the last step always saves
    compile: str = "auto"           # auto | on | off: torch.compile; auto is on with a GPU
    device: str = "auto"            # auto | cpu | cuda
    shard: str = "false"            # true: by FSDP2, for a model too large for one GPU; needs torchrun
    name: str = ""                  # of the run; "" makes one of preset, recipe and time
    prompt: str = "def "            # what the sample goes on from
    sample_tokens: int = 256        # tokens to sample
    temperature: float = 0.8        # of sampling; 0 takes the likeliest token
    top_k: int = 40                 # sample among the likeliest k tokens

PRESETS = {  # what differs from the defaults above, the 30m of arXiv:2601.22813: 512 x 512 tokens a step
    "cpu": dict(layers=2, width=384, heads=3, hidden=1024, sequence=256, batch=4, tokens_per_step=1024,
                steps=400, lr=2e-3, eval_every=100, eval_tokens=2**14, save_every=100, sample_tokens=128),
    "gpu": dict(layers=8, width=1024, heads=8, hidden=2816, batch=128, tokens_per_step=2**16, steps=1200,
                lr=9e-4),
    "30m": dict(layers=6, width=640, heads=5, hidden=1792, lr=1.2e-3, steps=2861),
    "50m": dict(layers=7, width=768, heads=6, hidden=2048, lr=1.2e-3, steps=4768),
    "100m": dict(layers=8, width=1024, heads=8, hidden=2816, lr=9e-4, steps=9536),
    "200m": dict(layers=10, width=1280, heads=10, hidden=3584, lr=7.2e-4, steps=19073),
    "124m": dict(layers=12, width=768, heads=12, hidden=2048, vocab_size=50304, sequence=1024, batch=32,
                 tokens_per_step=2**19, lr=6e-4, steps=19073, corpus="fineweb"),
    "1.9b": dict(layers=32, width=2048, heads=16, hidden=5632, vocab_size=50304, sequence=2048, batch=8,
                 tokens_per_step=2**19, lr=3e-4, steps=71680, corpus="fineweb"),
}
CHOICES = dict(backend=("auto", "torch", "triton"), compile=("auto", "on", "off"),
               device=("auto", "cpu", "cuda"), shard=("true", "false"))
CODE = ("quartet.py", "kernels.py", "train_gpt.py", "data/launch.py")
DAMPEN_EVERY = 10
FIXED = ("layers", "width", "heads", "hidden", "vocab_size", "sequence", "name")    # what no resume changes
HARMLESS = {"log_every", "save_every"}  # what one may change in a comparison

def known(word, words, problem):
    """Raise UserError, with the closest of words as a hint, unless word is one of them."""
    if word not in words:
        hint = "".join(f"did you mean {close!r}? " for close in difflib.get_close_matches(word, words, 1))
        raise UserError(f"{problem}: {hint}there are {', '.join(words) or 'none'}")

def parse(argv):
    """argv, as the docstring of this file describes it -> mode, preset or run, {knob: value}."""
    types, knobs = Config.__annotations__, {}
    words = [arg for arg in argv if not arg.startswith("--")]
    for name, equals, value in (arg[2:].partition("=") for arg in argv if arg.startswith("--")):
        known(name, types, f"unknown knob --{name}")
        if not equals: raise UserError(f"--{name} needs a value: --{name}=VALUE")
        try: knobs[name] = types[name](value)
        except ValueError:
            raise UserError(f"--{name}={value}: it takes a value of type {types[name].__name__}") from None
    mode = words.pop(0) if words and words[0] in ("resume", "eval", "sample") else "train"
    if mode == "train" and not words:
        words = ["gpu" if torch.cuda.is_available() and knobs.get("device") != "cpu" else "cpu"]
    if len(words) != 1:
        raise UserError(f"{mode} takes {'at most one preset' if mode == 'train' else 'one run'}: see --help")
    return mode, words[0], knobs

def check(c):
    """Raise UserError where a Config cannot run, before anything is written."""
    for name, choices in CHOICES.items():
        known(getattr(c, name), choices, f"--{name}={getattr(c, name)}")
    for name, value in vars(c).items():
        least = int(type(value) is int and name not in ("bf16_blocks", "seed"))
        most = dict(bf16_end=1, bf16_blocks=c.layers - 1).get(name, (10**12, 1e38)[type(value) is float])
        if type(value) is not str and not least <= value <= most:
            raise UserError(f"--{name}={value}: it must be from {least} to {most}")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: PyTorch sees no GPU here; --device=cpu runs on the CPU")
    if c.width % (2 * c.heads):
        raise UserError(f"--width={c.width} --heads={c.heads}: width must be a multiple of twice the heads")
    for recipe in c.recipe.split(","):
        known(recipe, quartet.RECIPES, f"unknown recipe {recipe!r}")
        with torch.device("meta"):  # to see whether the recipe can take its shapes
            try: GPT(c, partial(quartet.Linear, recipe=recipe, backend=c.backend))
            except ValueError as e: raise UserError(f"--width={c.width} --hidden={c.hidden}: {e}") from None

# ---- 2. The model: Llama's. linear(in, out) makes its hidden layers; the others are never quantized --------
plain = partial(nn.Linear, bias=False)
class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)). x (B, T, width); linear makes the four layers."""
    def __init__(self, c, linear):
        super().__init__()
        self.heads = c.heads
        self.norm1, self.norm2 = nn.RMSNorm(c.width, eps=1e-5), nn.RMSNorm(c.width, eps=1e-5)
        self.qkv, self.out = linear(c.width, 3 * c.width), linear(c.width, c.width)
        self.up, self.down = linear(c.width, 2 * c.hidden), linear(c.hidden, c.width)

    def forward(self, x, rope):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotary(q, rope), rotary(k, rope), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

def rotary(x, rope):
    """Turn neighbouring pairs of x (B, heads, T, D) by angles proportional to T: RoPE, arXiv:2104.09864."""
    cos, sin = rope[:, :x.shape[2]]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)
class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size); with targets (B, T), mean cross-entropy in nats."""
    def __init__(self, c, linear=plain):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        self.nvfp4 = max(0, c.layers - c.bf16_blocks)  # so many blocks take `linear`
        self.blocks = nn.ModuleList(Block(c, linear if i < self.nvfp4 else plain) for i in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=1e-5)
        self.head = plain(c.width, c.vocab_size)
        D = c.width // c.heads
        angle = torch.outer(torch.arange(c.sequence), 1e4 ** (-torch.arange(0, D, 2) / D))
        self.register_buffer("rope", torch.stack([angle.cos(), angle.sin()]), persistent=False)  # (2, T, D/2)
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                shrink = math.sqrt(2 * c.layers) if name.endswith(("out", "down")) else 1
                nn.init.normal_(m.weight, 0, 0.02 / shrink)

    def forward(self, tokens, targets=None):
        # bf16 on a GPU for what is not quantized; float32 on a CPU, where bf16 is slow nearly everywhere
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            x = self.embedding(tokens)
            for block in self.blocks: x = block(x, self.rope)
            return self.predict(x, targets)

    def predict(self, x, targets):
        """x (B, T, width), after the blocks -> what forward returns."""
        y = self.head(self.norm(x))
        return y if targets is None else F.cross_entropy(y.float().flatten(0, 1), targets.flatten())

@torch.no_grad()
def sample(model, tokens, c, device):
    """Continue tokens [int, ...]: yield c.sample_tokens ints. Slow: it caches no keys and values."""
    generator = torch.Generator(device).manual_seed(c.seed)
    for _ in range(c.sample_tokens):
        with torch.compiler.set_stance("force_eager"):  # else every length compiles anew
            logits = model(torch.tensor([tokens[-c.sequence:]], device=device))[0, -1].float()
        if not logits.isfinite().all(): return print("(its logits are not finite: no sample)")
        best, index = logits.topk(min(c.top_k, c.vocab_size) if c.temperature else 1)
        chances = ((best - best[0]) / max(c.temperature, 1e-9)).softmax(-1)
        tokens = tokens + [index[torch.multinomial(chances, 1, generator=generator)].item()]
        yield tokens[-1]

# ---- 3. Data: windows of shards, a function of (seed, step) ------------------------------------------------
class Shards:
    """The tokens of a split, data/CORPUS_SPLIT_*.bin, each file 256 int32 of header, then uint16 tokens."""
    def __init__(self, c, split):
        corpus = DATA / c.corpus
        pattern = f"{glob.escape(corpus.name)}_{split}_{'[0-9]' * 6}.bin"
        if c.corpus == "python" and not any(DATA.glob(pattern)): prepare.prepare("python", DATA)
        paths = sorted(corpus.parent.glob(pattern))
        if not paths:
            raise UserError(f"no {corpus}_{split}_*.bin: run python data/prepare.py {c.corpus} "
                            "(python, shakespeare, fineweb, or text files)")
        self.length, self.shards = c.sequence, []
        for path in paths:
            n = prepare.check_shard(path)
            self.shards.append(np.memmap(path, np.uint16, "r", offset=1024, shape=(n,)))
            if n <= c.sequence:
                raise UserError(f"{path} holds {n} tokens, too few for --sequence={c.sequence}: shorten it")
            if (top := self.shards[-1].max()) >= c.vocab_size:
                raise UserError(f"{path} holds token {top}, beyond --vocab_size={c.vocab_size}: "
                                "bytes need 256, GPT-2's tokens (fineweb) 50304")
        self.ends = np.cumsum([len(s) - c.sequence for s in self.shards])  # places where a window can start

    def at(self, places, device):
        """Windows that start at places [int, ...] -> inputs, targets, both (len(places), sequence) int64."""
        shard = np.searchsorted(self.ends, places, "right")
        start = places - np.concatenate([[0], self.ends])[shard]
        windows = np.stack([self.shards[i][j:j + self.length + 1] for i, j in zip(shard, start)])
        window = torch.from_numpy(windows.astype(np.int64))
        window = window.pin_memory().to(device, non_blocking=True) if device == "cuda" else window
        return window[:, :-1], window[:, 1:]

    def random(self, c, step, micro, device):
        """This process's micro-batch of a step: random places, the same for all recipes, and when resumed."""
        generator = np.random.default_rng((c.seed, step, micro * launch.WORLD + launch.RANK))
        return self.at(generator.integers(self.ends[-1], size=c.batch), device)

    def in_order(self, c, device):
        """Windows without overlap from the start of the first shard, up to eval_tokens, in whole batches."""
        places = np.arange(0, min(self.ends[0], c.eval_tokens), c.sequence)
        for i in range(0, max(len(places) - c.batch, 0) + 1, c.batch):  # another shape would compile anew
            yield self.at(places[i:i + c.batch], device)

# ---- 4. Training -------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, data, c, device):
    """Mean cross-entropy in nats of the validation split, with the forward pass as trained: quantized."""
    with launch.once(model, c.shard == "true"):
        sums = [(model(x, y).double() * y.numel(), y.numel()) for x, y in data.in_order(c, device)]
    loss, tokens = map(sum, zip(*sums))
    return loss.item() / tokens

def learning_rate(c, step):
    """10% of the steps linear warm-up, then a cosine from lr to lr / 10."""
    warmup = max(1, c.steps // 10)
    if step < warmup: return c.lr * (step + 1) / warmup
    return c.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, c.steps - warmup)))
def recipe_of(c, step):
    """The recipe of a step, and of the forward pass after it: bf16 in the last bf16_end of the steps."""
    return "bf16" if min(step, c.steps) > c.steps - c.steps * c.bf16_end else c.recipe

def ramp(t):
    """How strongly weights are dampened when a share t of the steps is done: they are free until late."""
    return t**4

def make_optimizer(model, c):
    """AdamW; weight decay on the weights of linear layers, none on embedding and norms."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        (decay if p.dim() == 2 and name != "embedding.weight" else rest).append(p)
    groups = [dict(params=decay, weight_decay=c.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), fused=True)

def load(mode, word, knobs):
    """A preset to train, or a run (its path or name in runs/) -> Config, directory, checkpoint (or None)."""
    if mode == "train":
        known(word, PRESETS, f"unknown preset {word!r}")
        return Config(**PRESETS[word] | knobs), None, None
    path = run if (run := Path("runs") / word).exists() else Path(word) if Path(word).exists() else run
    compares = mode == "resume" and (path / "compare.json").exists()
    if mode == "resume" and compares != ("," in knobs.get("recipe", "," * compares)):
        raise UserError(f"--recipe={knobs['recipe']}: {path} goes on with {'several' if compares else 'one'}")
    if compares:
        old = json.loads((path / "compare.json").read_text())
        unchanged(knobs, old, old.keys() - HARMLESS - {"recipe"})
        return Config(**old | knobs), path, None
    if path.is_dir():  # without the last one: stopped between two renames of save
        path = next((p for p in (path / name for name in CHECKPOINTS) if p.exists()), path / CHECKPOINTS[0])
    if not path.exists():
        runs = sorted(str(p.parent.relative_to("runs")) for p in Path("runs").rglob("checkpoint.pt"))
        known(word, runs, f"no checkpoint of {word}: in runs/")
    checkpoint = files.read(path, mode)
    old = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not old or checkpoint.get("format") != "train_gpt 4" or old.keys() - Config.__annotations__.keys():
        raise UserError(f"{path} was not written by this version of train_gpt.py")
    unchanged(knobs, old, FIXED)
    if mode == "resume":
        step, steps = checkpoint["step"], (old | knobs)["steps"]
        if steps < step: raise UserError(f"--steps={steps}: {path} is at step {step} now: take more")
        compared = (path.parent.parent / "compare.json").exists()
        if compared or old["steps"] == steps == step:  # or its result would tell of others
            unchanged(knobs, old, old.keys() - HARMLESS - (set() if compared else {"shard", "device"}))
    return Config(**old | knobs), path.parent, checkpoint
def unchanged(knobs, old, names):
    """Raise UserError if knobs differ from old in one of names."""
    other = [f"--{k}={v} (saved: {old[k]})" for k, v in knobs.items() if k in names and v != old[k]]
    if other: raise UserError(f"these cannot change: {', '.join(other)}; leave them out, or train anew")

class Log:
    """log.jsonl, one line a record, and what is printed. Losses stay on the device until a line is due."""
    def __init__(self, c, directory, start, checkpoint, model, data, device, compiled):
        self.c, self.start, self.pending, self.rates, self.path = c, start, [], [], directory / "log.jsonl"
        self.skipped = self.in_a_row = 0  # steps whose gradient was not finite
        if self.path.exists() and not launch.RANK:  # resumed: drop what is done again
            lines = [line for line, r in files.records(self.path) if r.get("step", 0) <= start]
            self.skipped = sum('"grad_norm": null' in line for line in lines)
            files.write(self.path, "".join(lines))
        name, peak = launch.describe(device)
        size, vocabulary = sum(p.numel() for p in model.parameters()), c.vocab_size * c.width
        hidden, tokens = size - 2 * vocabulary, c.steps * c.tokens_per_step
        flops = 6 * (size - vocabulary + c.layers * c.width * c.sequence)  # of a token, forward and backward
        self.top = launch.WORLD * peak / flops  # tokens/s, 0 if unknown
        digest = lambda content: hashlib.sha256(content).hexdigest()[:8]
        self.now = dict(code=digest(b"".join((Path(__file__).parent / f).read_bytes() for f in CODE)),
                        corpus=digest(data.shards[0]))
        was = self.now | (checkpoint or {})
        code, corpus = (v + f", the checkpoint's: {was[k]}" * (v != was[k]) for k, v in self.now.items())
        micro = c.tokens_per_step // (c.batch * c.sequence * launch.WORLD)
        processes = f"{launch.WORLD} x " * (launch.WORLD > 1)
        header = dict(  # all that the numbers of a run depend on
            device=processes + name + ", torch.compile" * compiled,
            backend=quartet.resolve(c.backend, device, c.recipe), recipe=c.recipe,
            parameters=f"{size:,}, {hidden:,} without embedding and head",
            batch=f"{c.tokens_per_step:,} tokens a step, {processes}{micro} x {c.batch} x {c.sequence}",
            steps=f"{c.steps:,}: {tokens:,} tokens, {tokens / hidden:.1f} a parameter",
            corpus=f"{c.corpus}, {sum(map(len, data.shards)):,} tokens, sha256 {corpus}",
            versions=f"python {platform.python_version()}, torch {torch.__version__}, code {code}")
        print("\n".join(f"{what:>10}  {value}" for what, value in header.items()), flush=True)
        self.write(start=start, config=vars(c), **header)
    def write(self, **record):
        """Append one record to log.jsonl; null for what is not finite, which JSON lacks."""
        if launch.RANK: return
        known = {k: None if type(v) is float and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.path, "a") as f: f.write(json.dumps(known) + "\n")
    def step(self, *record, flush):
        """Note (step, its begin, loss, norm, lr); write and print the pending if a line is due, or flush."""
        self.pending.append(record)
        steps, begins, losses, norms, lrs = zip(*self.pending)
        if not flush and steps[-1] % self.c.log_every and steps[-1] != self.start + 1: return
        losses, norms = torch.stack(losses).tolist(), torch.stack(norms).tolist()
        seconds = (time.perf_counter() - begins[0]) / len(steps)
        rate = self.c.tokens_per_step / seconds
        if steps[0] > self.start + 1: self.rates.append(rate)  # the first step compiles, or warms up
        for step, loss, norm, lr in zip(steps, losses, norms, lrs):
            self.write(step=step, loss=loss, grad_norm=norm, lr=lr, ms=round(seconds * 1e3, 3))
            bad = not math.isfinite(norm)
            self.in_a_row = self.in_a_row + 1 if bad or self.in_a_row >= 10 else 0  # 10 end the run
            self.skipped += bad
            if bad: print(f"step {step} skipped: loss {loss}, norm {norm}; {self.skipped} so far")
        left, mfu = int((self.c.steps - step) * seconds), f"  mfu {rate / self.top:5.1%}" if self.top else ""
        print(f"step {step:{len(str(self.c.steps))}}/{self.c.steps}  loss {loss:7.4f}  norm {norm:6.3f}  "
              f"lr {lr:.2e}  {seconds * 1e3:7.1f} ms  {rate / 1e3:7.1f} ktok/s{mfu}  "
              f"{left // 60:3d}:{left % 60:02d} left", flush=True)
        self.pending.clear()

def pick_device(c):
    """-> the device that a Config means, and whether to compile for it."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    compiled = c.compile == "on" or (c.compile == "auto" and device == "cuda")
    if compiled and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        print("no C compiler found, which torch.compile and Triton need (apt install gcc): slower without")
        compiled = False
    return device, compiled

def train(c, data, directory, stop, checkpoint=None):
    """Train as c says on data = (train, val), or on from a checkpoint; stop: a list that a signal fills."""
    (device, compiled), start = pick_device(c), checkpoint["step"] if checkpoint else 0
    if device == "cuda":  # so that a resumed run is the same to the bit
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(c.seed)
    model = GPT(c, partial(quartet.Linear, recipe=recipe_of(c, start), backend=c.backend)).to(device)
    accumulate, shard = c.tokens_per_step // (c.batch * c.sequence * launch.WORLD), c.shard == "true"
    net, optimizer = launch.wrap(model, shard, compiled), make_optimizer(model, c)
    if launch.RANK: torch.manual_seed((c.seed << 20) + launch.RANK)  # of noise; the model is the same in all
    log = Log(c, directory, start, checkpoint, model, data[0], device, compiled)
    if checkpoint: launch.restore(model, optimizer, checkpoint, c.seed)  # nothing may draw before a step
    total, recipe = torch.zeros((), device=device), None
    def micro_step(x, y):
        loss = net(x, y) / accumulate
        loss.backward()
        total.add_(loss.detach())
    launch.peak_memory(device, reset=True)
    for step in range(start + 1, c.steps + 1):
        begin, last = time.perf_counter(), step == c.steps
        before, recipe = recipe, recipe_of(c, step)
        if recipe != before:
            quartet.quantize_model(model.blocks[:model.nvfp4], recipe, backend=c.backend)
            run = micro_step
            if compiled and device == "cuda" and launch.WORLD == 1:
                with quartet.quantized_weights(model):
                    run = launch.as_graph(micro_step, *data[0].random(c, step, 0, device))
                optimizer.zero_grad(set_to_none=False)  # its gradients stay where they are
        lr = learning_rate(c, step - 1)
        for group in optimizer.param_groups: group["lr"] = lr
        total.zero_()
        with launch.once(model, shard):  # a step quantizes weights once, for all micro-batches and gradients
            for micro in range(accumulate):
                launch.reduce_gradients(net, micro == accumulate - 1)
                run(*data[0].random(c, step, micro, device))
        norm = launch.whole(nn.utils.clip_grad_norm_(model.parameters(), c.clip))
        optimizer.found_inf = (~norm.isfinite()).float()  # then a fused AdamW skips the step, without a sync
        optimizer.step()
        if step % DAMPEN_EVERY == 0:  # for so many steps at once: cheaper. Not if this one was skipped
            quartet.dampen(model, DAMPEN_EVERY * lr * ramp(step / c.steps) * norm.isfinite())
        optimizer.zero_grad(set_to_none=run is micro_step)
        stopping, evaluating = launch.stopping(stop) and not last, last or step % c.eval_every == 0
        saving = stopping or last or step % c.save_every == 0
        log.step(step, begin, launch.mean(total.clone()), norm, lr, flush=evaluating or saving)
        if log.in_a_row >= 10:
            batches = [data[0].random(c, step, micro, device) for micro in range(accumulate)]
            first = diagnose.first_not_finite(model, batches)
            raise UserError(f"step {step}: 10 steps in a row had no finite gradient; what is not "
                            f"finite first: {first}. Lower --lr, from a checkpoint in {directory} or anew")
        if evaluating:
            loss = evaluate(model, data[1], c, device)
            log.write(step=step, val_loss=loss)
            print(f"step {step}  validation loss {loss:.4f} nats{bits_per_byte(c, loss)}", flush=True)
        if saving and (stopping or last or not log.in_a_row):  # else both kept might be of no use
            save(directory, c, step, **log.now, **launch.snapshot(model, optimizer))
        if stopping:
            whole = directory.parent if (directory.parent / "compare.json").exists() else directory
            print(f"stopped after step {step}, saved. To go on: {launch.command()} resume {whole}")
            sys.exit(130 if stop and stop[0] == signal.SIGINT else 0)
    finish(c, directory, log, loss if start < c.steps else evaluate(model, data[1], c, device), model, device)

def finish(c, directory, log, loss, model, device):
    """Write result.json and sample.txt of a run whose last validation has this loss; print the sample."""
    result = dict(recipe=c.recipe, val_loss=loss, skipped=log.skipped, peak_gib=launch.peak_memory(device),
                  tokens_per_s=float(np.median(log.rates)) if log.rates else math.nan)
    text, path = "".join(sample_text(model, c, device)), directory / "result.json"
    if log.start == c.steps and path.exists():  # this process has trained nothing: the speed is known
        result |= {k: json.loads(path.read_text())[k] for k in ("peak_gib", "tokens_per_s")}
    if not launch.RANK:
        files.write(path, json.dumps(result) + "\n")
        files.write(directory / "sample.txt", text)
    launch.gather(None)
    print(f"sample:\n{text}\nwritten to {directory}/: log.jsonl, checkpoint.pt, result.json, sample.txt")

def bits_per_byte(c, loss):
    """', x bits per byte' where a token is a byte, else nothing."""
    return f", {loss / math.log(2):.4f} bits per byte" if c.vocab_size == 256 else ""
def sample_text(model, c, device):
    """Yield the prompt and what the model makes of it, as it comes: UTF-8 bytes, or GPT-2's tokens."""
    if c.vocab_size == 256: prompt, text_of = list(c.prompt.encode()) or [0], lambda t: bytes([t or 10])
    else:
        try:
            import tiktoken
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:  # not installed, or no download
            return (yield f"(GPT-2's tokens need tiktoken, pip install tiktoken: {type(e).__name__})")
        prompt = [t for t in gpt2.encode_ordinary(c.prompt) or [gpt2.eot_token] if t < c.vocab_size] or [0]
        text_of = lambda t: gpt2.decode_single_token_bytes(t) if t < gpt2.n_vocab else b""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    for t in itertools.chain(prompt, sample(model, prompt, c, device)): yield decoder.decode(text_of(t))
    yield decoder.decode(b"", final=True)

# ---- 5. Comparing recipes, evaluating, sampling, and the command line --------------------------------------
def compare(c, data, directory, stop):
    """Train each recipe of the list, all else equal, and print a table. What has a result is not repeated."""
    if not launch.RANK: files.write(directory / "compare.json", json.dumps(vars(c)))
    results = []
    for recipe in c.recipe.split(","):
        one, run = dataclasses.replace(c, recipe=recipe), directory / recipe
        run.mkdir(exist_ok=True)
        if not (run / "result.json").exists():
            print(f"\n==== {recipe}", flush=True)
            torch._dynamo.reset()
            begun = any((run / name).exists() for name in CHECKPOINTS)
            with files.held(run):
                train(one, data, run, stop, load("resume", run, vars(one))[2] if begun else None)
        results.append(json.loads((run / "result.json").read_text()))
    base = next((r["val_loss"] for r in results if r["recipe"] == "bf16"), math.nan)
    rows = [f"{'recipe':12}{'val loss':>10}{'gap to bf16':>13}{'tokens/s':>12}{'peak GiB':>10}"]
    rows += [f"{r['recipe']:12}{r['val_loss']:10.4f}{r['val_loss'] - base:13.4f}{r['tokens_per_s']:12,.0f}"
             f"{r['peak_gib']:10.2f}" for r in results]
    if not launch.RANK: (directory / "compare.txt").write_text("\n".join(rows) + "\n")
    print("\n".join(["", *rows, f"written to {directory / 'compare.txt'}"]))

def eval_recipes(model, c, device, recipes):
    """Validation loss of a model under each recipe's forward; of none: those of data/perplexity.py."""
    def losses():
        for recipe in recipes or perplexity.rows():
            quartet.quantize_model(model.blocks[:model.nvfp4], recipe, backend=c.backend)
            yield recipe, evaluate(model, val, c, device)
    val = Shards(c, "val")
    perplexity.show(losses(), lambda loss: bits_per_byte(c, loss))

def new_directory(c, preset):
    """Make runs/NAME -> its path. A default name is unique; a given one must be free."""
    name = c.name or f"{preset}-{'compare' if ',' in c.recipe else c.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        while not c.name and (Path("runs") / name).exists(): name += "+"
        (Path("runs") / name).mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"runs/{name} exists: resume it, remove it, or take another --name") from None
    except OSError as e:
        raise UserError(f"cannot write runs/{name} ({e.strerror}): go to a writable directory") from None
    return Path("runs") / name

def main(argv):
    """Do what the command line says."""
    if {"-h", "--help"} & set(argv):
        source = Path(__file__).read_text()
        print(__doc__, source[source.index("@dataclasses"):source.index("CHOICES")], sep="\n", end="")
        return print("RECIPES:", ", ".join(quartet.RECIPES))
    mode, word, knobs = parse(argv)
    c, directory, checkpoint = load(mode, word, knobs)
    check(c)
    if mode in ("eval", "sample"):
        if launch.WORLD > 1: raise UserError(f"{mode} takes one process: leave torchrun out")
        device, _ = pick_device(c)
        recipes = c.recipe.split(",") if "recipe" in knobs else ()
        if mode == "sample": known(c.recipe, quartet.RECIPES, f"--recipe={c.recipe}: one recipe samples")
        first = recipes[0] if recipes else recipe_of(c, checkpoint["step"])
        model = GPT(c, partial(quartet.Linear, recipe=first, backend=c.backend)).to(device)
        model.load_state_dict(checkpoint["model"])
        if mode == "eval": return eval_recipes(model, c, device, recipes)
        for piece in sample_text(model, c, device): print(piece, end="", flush=True)
        return print()
    if c.tokens_per_step % (micro := launch.WORLD * c.batch * c.sequence):
        raise UserError(f"--tokens_per_step={c.tokens_per_step}: must be a multiple of {micro}, processes x "
                        f"batch x sequence, {launch.WORLD} x {c.batch} x {c.sequence}: change it, or --batch")
    stop = []
    def on_signal(signum, frame):
        again = " (once more: at once)" * (signum == signal.SIGINT)  # a cluster may send SIGTERM twice
        print(f"\n{signal.Signals(signum).name}: this step, then saving{again}", flush=True)
        stop.append(signum)
        if again: signal.signal(signum, signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGTERM): signal.signal(signum, on_signal)
    launch.start(pick_device(c)[0], c.shard == "true")
    if launch.RANK: launch.gather(None)  # until rank 0 has read, or first written, the data
    data = Shards(c, "train"), Shards(c, "val")  # fails before a directory is made
    if not launch.RANK: launch.gather(None)
    directory = launch.gather(directory or launch.RANK or new_directory(c, word))[0]
    new, old = (directory / name for name in CHECKPOINTS)
    with files.held(directory):
        if not launch.RANK and mode == "resume" and Path(word).name == old.name and new.exists():
            os.replace(new, directory / "aside.pt")  # else the next save would keep it and not the good one
            print(f"{new} is {directory / 'aside.pt'} now, which nothing reads")
        compare(c, data, directory, stop) if "," in c.recipe else train(c, data, directory, stop, checkpoint)

if __name__ == "__main__":
    try: main(sys.argv[1:])
    except (UserError, ValueError, OSError) as e:
        full = isinstance(e, OSError) and e.errno == errno.ENOSPC
        sys.exit(f"train_gpt.py: {e}" + ": the disk is full, make room, then resume the run" * full)
    except (RuntimeError, MemoryError) as e:
        if launch.RANK and "by peer" in str(e): sys.exit(1)  # which has told why it ended
        if "allocate" not in str(e) and "overflow" not in str(e): raise
        sys.exit(f"train_gpt.py: out of memory, try a smaller --batch. {str(e).splitlines()[0]}")
    except KeyboardInterrupt: sys.exit(130)
