"""Train a GPT whose hidden linear layers multiply in NVFP4, on one GPU or a CPU. Read it from top to bottom.

    python train_gpt.py [PRESET] [--knob=value ...]     train; without a preset: cpu, or gpu if there is one
    python train_gpt.py resume RUN                      go on, the same to the bit as without the stop
    python train_gpt.py [PRESET] --init_from=RUN ...    a new run from the weights of another, by any recipe;
                                                        a RUN may be one of its files, RUN/stable.pt
    python train_gpt.py eval RUN [--recipe=bf16,rtn]    post-training quantization: validation loss by the
                                                        forward pass of each recipe
    python train_gpt.py sample RUN --prompt="def "      text from a trained model, by any --recipe's forward

A comma list, --recipe=bf16,nvidia,quartet2, trains each recipe in turn on the same data, seed and steps, and
ends with a table. torchrun --nproc_per_node=N train_gpt.py ... shares each step among N GPUs. A run writes
runs/NAME/: log.jsonl, checkpoint.pt, previous.pt (the checkpoint before), result.json, sample.txt; with
--schedule=wsd stable.pt, the checkpoint before the learning rate falls.
"""
import atexit
import codecs
import contextlib
import ctypes
import dataclasses
import errno
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quartet

try:
    import fcntl
except ImportError:
    fcntl = None     # Windows: run directories are not locked

DATA = Path(__file__).resolve().parent / "data"


def in_environment(name, default):
    """A number in an environment variable; the default if none is there, or none that makes sense."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() and len(value) < 10 else default


# Who this process is among those that torchrun starts. Alone: rank 0 of 1.
RANK = in_environment("RANK", 0)
WORLD = in_environment("WORLD_SIZE", 1)


class UserError(Exception):
    """What the user can put right: shown as one line. Any other exception keeps its traceback."""


class Diverged(UserError):
    """Losses or gradients of a run are not finite."""


# ---- 1. Config: one knob a line ----------------------------------------------------------------------------
#
# One Config says all that a run depends on. On the command line a knob is set as --name=value; the comments
# here are its help text. A preset says what differs from the defaults, which are the 30m of arXiv:2601.22813:
# 512 x 512 tokens a step. 30m to 200m are the sizes of that paper.

@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run depends on. Types: str, int, float."""
    # how to multiply
    recipe: str = "quartet2"        # rows of quartet.RECIPES, by commas: how hidden linear layers multiply
    backend: str = "auto"           # auto | torch | triton: who quantizes; auto: triton on a GPU, else torch
    gemm: str = "plain"             # plain | blackwell: emulation adds in float32 or, slower, as FP4 cores do
    # the model
    layers: int = 6                 # Transformer blocks
    width: int = 640                # of the residual stream
    heads: int = 5                  # attention heads
    kv_heads: int = 0               # heads of keys and values, which queries share; 0: as many as heads
    qk_norm: str = "false"          # true: queries and keys are normalised after their rotation
    mlp: str = "swiglu"             # swiglu | relu2: the nonlinearity of the MLP
    hidden: int = 1792              # width of the MLP, between its two layers
    vocab_size: int = 256           # 256 for bytes, 50304 for GPT-2 tokens (fineweb)
    sequence: int = 512             # tokens of context
    # what is left in bf16
    bf16_first: int = 0             # so many first blocks keep bf16 linear layers
    bf16_last: int = 0              # so many last blocks, too (arXiv:2509.25149: 15% of them)
    bf16_end: float = 0.0           # this last share of the steps trains all layers in bf16 (same source)
    bf16_forward_end: float = 0.0   # in this last share of the steps the forward pass alone is in bf16
    two_terms_end: float = 0.0      # in this last share of the steps inputs come in two terms of 4 bits
    # data, optimizer, schedule
    corpus: str = "python"          # data/CORPUS_train_*.bin, written by data/prepare.py
    tokenizer: str = "auto"         # auto | bytes | gpt2: how tokens are text; auto: as prepare.py made them
    batch: int = 64                 # sequences in one forward pass of one process
    tokens_per_step: int = 2**18    # tokens of one optimizer step: several forward passes accumulate
    steps: int = 2861               # optimizer steps; the paper's 30m, 25 tokens a parameter
    optimizer: str = "adamw"        # adamw | muon: Muon for the matrices of blocks, AdamW for the rest
    lr: float = 1.2e-3              # peak learning rate; by muon that of matrices in blocks: try 0.02
    embedding_lr: float = 0.0       # of the embedding; 0: lr
    head_lr: float = 0.0            # of head and norms; 0: lr
    schedule: str = "cosine"        # cosine | wsd: after the warm-up down a cosine; or stay, then down a line
    warmup: float = 0.1             # this first share of the steps lr rises along a line
    decay: float = 0.2              # of wsd: this last share of the steps lr falls along a line
    final_lr: float = 0.1           # lr at the end, as a share of the peak
    weight_decay: float = 0.1       # on the weights of linear layers
    clip: float = 1.0               # largest gradient norm; 0: any
    seed: int = 1                   # of initialisation, data order and rounding noise
    init_from: str = ""             # a run to take weights from; take another --seed, or its batches repeat
    # reports
    eval_every: int = 250           # steps between validations
    eval_tokens: int = 2**20        # tokens of a validation, at most
    log_every: int = 10             # steps between progress lines
    save_every: int = 500           # steps between checkpoints; the last step always saves
    # the machine
    compile: str = "auto"           # auto | on | off: torch.compile; auto is on with a GPU
    device: str = "auto"            # auto | cpu | cuda
    shard: str = "false"            # true: by FSDP2, for a model too large for one GPU; needs torchrun
    # the run and its sample
    name: str = ""                  # of the run; "" makes one of preset, recipe and time
    prompt: str = "def "            # what the sample goes on from
    sample_tokens: int = 256        # tokens to sample
    temperature: float = 0.8        # of sampling; 0 takes the likeliest token
    top_k: int = 40                 # sample among the likeliest k tokens


PRESETS = {
    # to try it out: minutes on two cores
    "cpu": dict(layers=2, width=256, heads=2, hidden=384, sequence=128, batch=12, tokens_per_step=1536,
                steps=220, lr=3e-3, eval_every=110, eval_tokens=2**14, save_every=110),
    # the sizes of arXiv:2601.22813
    "30m": {},
    "50m": dict(layers=7, width=768, heads=6, hidden=2048, steps=4768),
    "100m": dict(layers=8, width=1024, heads=8, hidden=2816, lr=9e-4, steps=9536),
    "200m": dict(layers=10, width=1280, heads=10, hidden=3584, lr=7.2e-4, steps=19073),
    # GPT-2's shape (its head is not tied here: 162 million parameters), and a large model; of GPT-2's tokens
    "124m": dict(layers=12, width=768, heads=12, hidden=2048, vocab_size=50304, sequence=1024, batch=32,
                 tokens_per_step=2**19, lr=6e-4, steps=19073, corpus="fineweb"),
    "1.9b": dict(layers=32, width=2048, heads=16, hidden=5632, vocab_size=50304, sequence=2048, batch=8,
                 tokens_per_step=2**19, lr=3e-4, steps=71680, corpus="fineweb"),
}

# to try it out: minutes on one GPU
PRESETS["gpu"] = PRESETS["100m"] | dict(batch=128, tokens_per_step=2**16, steps=1200)


def nanochat(depth, tokens_per_step, steps, weight_decay):
    """A preset of karpathy/nanochat by its one dial, as its scripts/base_train.py (92d63d4) computes it.

    Left out: value embeddings, windows of attention, mixing of the residual stream, the cap of logits, zeros
    in output layers; of its Muon, matrices of their own for q, k and v, equal rows, variance reduction, and
    schedules of momentum and decay.
    """
    width = 64 * depth
    # Learning rates grow with the root of the batch; those of AdamW shrink with the root of the width.
    scale = math.sqrt(tokens_per_step / 2**19)
    return dict(layers=depth, width=width, heads=width // 128, qk_norm="true", mlp="relu2", hidden=4 * width,
                vocab_size=50304, sequence=2048, batch=32, tokens_per_step=tokens_per_step, steps=steps,
                corpus="fineweb", optimizer="muon", lr=0.02 * scale, weight_decay=weight_decay,
                embedding_lr=0.3 * scale * math.sqrt(768 / width),
                head_lr=0.008 * scale * math.sqrt(768 / width),
                schedule="wsd", warmup=40 / steps, decay=0.65, final_lr=0.05)


# 12 tokens for each parameter of blocks and head
PRESETS["d12"] = nanochat(12, 2**19, steps=2828, weight_decay=0.28)
PRESETS["d20"] = nanochat(20, 2**20, steps=5236, weight_decay=0.107)


# ---- 2. The model ------------------------------------------------------------------------------------------
#
# It is Llama's: RMSNorm, rotary positions, SwiGLU, no biases. Knobs make it nanochat's: queries and keys are
# normalised, and the square of ReLU takes the place of SwiGLU. The four linear layers of a block are
# quartet.Linear, each of which multiplies by a recipe; embedding, head, norms and attention are never
# quantized. To keep a layer in bf16 for good, make it an nn.Linear: `quantized_linears` says which layers
# recipes are about, and training, evaluation, sampling, export and the printed header all ask there.

class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). x (B, T, width) -> (B, T, width)."""

    def __init__(self, c, quantized):
        super().__init__()

        # The first and last blocks of a model may keep plain layers.
        linear = partial(nn.Linear, bias=False)
        if quantized:
            linear = partial(quartet.Linear, recipe="bf16")      # until GPT.use_recipe names another

        # Attention. Queries, keys and values come from one layer.
        self.heads = c.heads
        self.kv_heads = c.kv_heads or c.heads
        self.qk_norm = c.qk_norm == "true"
        self.norm1 = nn.RMSNorm(c.width, eps=1e-5)
        self.norm2 = nn.RMSNorm(c.width, eps=1e-5)
        self.qkv = linear(c.width, c.width + 2 * self.kv_heads * c.width // c.heads)
        self.out = linear(c.width, c.width)

        # The rest. For a SwiGLU the layer `up` makes both the gate and what it lets through.
        self.swiglu = c.mlp == "swiglu"
        self.up = linear(c.width, (1 + self.swiglu) * c.hidden)
        self.down = linear(c.hidden, c.width)

    def forward(self, x, rope):
        # Attention: (B, heads, T, D) each, D = width / heads. Keys may have fewer heads, each for several.
        B, T, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q = rotary(q, rope)
        k = rotary(k, rope)
        if self.qk_norm:
            q = F.rms_norm(q, q.shape[-1:], eps=1e-5)
            k = F.rms_norm(k, k.shape[-1:], eps=1e-5)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads < self.heads)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, width))

        # SwiGLU, or the square of ReLU.
        up = self.up(self.norm2(x))
        if self.swiglu:
            gate, up = up.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.relu(up).square())


def rotary(x, rope):
    """Turn neighbouring pairs of x (B, heads, T, D) by angles proportional to their place in T.

    rope (2, sequence, D / 2): cosines and sines. Source: RoPE, arXiv:2104.09864.
    """
    cos, sin = rope[:, :x.shape[2]]
    even = x[..., ::2]
    odd = x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size); with targets (B, T), mean cross-entropy in nats."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c, c.bf16_first <= i < c.layers - c.bf16_last)
                                    for i in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=1e-5)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)

        # Cosines and sines of the angles t * 10000^(-2 i / D) by which `rotary` turns pair i at place t.
        # They are no parameters, and are not saved: the context may differ when weights are used again.
        D = c.width // c.heads
        angle = torch.outer(torch.arange(c.sequence), 1e4 ** (-torch.arange(0, D, 2) / D))
        rope = torch.stack([angle.cos(), angle.sin()])      # (2, sequence, D / 2)
        self.register_buffer("rope", rope, persistent=False)

        # What adds to the residual stream starts smaller, so that the stream does not grow with depth.
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                shrink = math.sqrt(2 * c.layers) if name.endswith(("out", "down")) else 1
                nn.init.normal_(m.weight, 0, 0.02 / shrink)

    def forward(self, tokens, targets=None):
        # bf16 on a GPU for what is not quantized; float32 on a CPU, where bf16 is slow nearly everywhere
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.rope)
            return self.predict(x, targets)

    def predict(self, x, targets):
        """x (B, T, width), after the blocks -> what forward returns."""
        y = self.head(self.norm(x))
        if targets is None:
            return y
        return F.cross_entropy(y.float().flatten(0, 1), targets.flatten())

    def quantized_linears(self):
        """The layers that recipes are about, {name: quartet.Linear}."""
        return {name: m for name, m in self.named_modules() if isinstance(m, quartet.Linear)}

    def use_recipe(self, recipe, backend):
        """Multiply by this row of quartet.RECIPES from now on. ValueError if a layer's shape does not fit."""
        for name, m in self.quantized_linears().items():
            quartet.check(recipe, backend, m.in_features, m.out_features, name)
            m.recipe = recipe
            m.backend = backend


# ---- 3. Data -----------------------------------------------------------------------------------------------
#
# A corpus is a few large files of tokens, mapped into memory. All of it is checked at the start, and then
# read where a batch needs it. A batch is windows at random places, a function of seed, step and the number of
# a window: so all recipes see the same batches, and a resumed run those that it would have seen without the
# stop.

class Corpus(NamedTuple):
    """What there is of a corpus, before any of it is read."""
    train: list                 # its shards, [(path, sha256 or None), ...]
    val: list                   # and those held out
    tokenizer: str              # bytes or gpt2
    bytes_per_token: float      # of the text behind val; NaN if unknown


def find_corpus(c):
    """The Corpus that c names; without shards if it is not there. UserError for other tokens than c says."""
    # The default can be made on the spot, from what every machine has.
    found = look_for(c)
    if c.corpus == "python" and not found.train:
        subprocess.run([sys.executable, DATA / "prepare.py", "python"])
        found = look_for(c)
    if c.tokenizer not in ("auto", found.tokenizer):
        raise UserError(f"--tokenizer={c.tokenizer}: the tokens of {c.corpus} are {found.tokenizer}; "
                        f"data/prepare.py --tokenizer={c.tokenizer} makes others")
    return found


def look_for(c):
    """The Corpus that prepare.py's manifest, CORPUS.json, lists; without shards while these are replaced.

    UserError if it is damaged.
    """
    corpus = DATA / c.corpus
    manifest = corpus.with_name(f"{corpus.name}.json")
    if not os.path.exists(manifest):
        return shards_without_manifest(c, corpus)
    if manifest.is_file() and not manifest.stat().st_size:
        return Corpus([], [], c.tokenizer, math.nan)

    # It must have the form that prepare.py writes; what is in the shards, their sha256 tells.
    way_out = "is damaged, or no list of shards: move it away, and run data/prepare.py again"
    made = read_json(manifest, MANIFEST, way_out)
    known(made["tokenizer"], CHOICES["tokenizer"][1:], f"{manifest}: tokenizer {made['tokenizer']!r}")
    splits = []
    for split in (made["train"], made["val"]):
        if not split or not all(fits(shard, SHARD) and Path(shard["file"]).name for shard in split):
            raise UserError(f"{manifest} {way_out}")
        splits.append([(corpus.with_name(Path(shard["file"]).name), shard["sha256"]) for shard in split])

    # prepare.py may not know how many bytes are behind GPT-2's tokens.
    tokens = sum(shard["tokens"] for shard in made["val"])
    size = made["bytes"]["val"] or math.nan
    return Corpus(*splits, made["tokenizer"], size / max(tokens, 1))


def shards_without_manifest(c, corpus):
    """The Corpus of shards that other tools have written: any whose name begins like the path `corpus`."""
    splits = []
    for split in ("train", "val"):
        pattern = f"{glob.escape(corpus.name)}_{split}_{'[0-9]' * 6}.bin"
        splits.append([(path, None) for path in sorted(corpus.parent.glob(pattern))])
    # What their tokens are, nothing tells but c.
    if c.tokenizer == "bytes" or c.tokenizer == "auto" and c.vocab_size == 256:
        return Corpus(*splits, "bytes", 1.0)
    return Corpus(*splits, "gpt2", math.nan)


class Shards:
    """The tokens of a split: data/CORPUS_SPLIT_000000.bin and so on, in the format of llm.c.

    A file is 256 int32, of which 20240520, 1 and the number of tokens come first, then the tokens as uint16.
    `digest` is a hash of all tokens, and of where windows can start. UserError for files that are missing,
    damaged, or do not fit c.
    """

    def __init__(self, c, corpus, split, device):
        if not getattr(corpus, split):
            source = c.corpus
            if source not in ("python", "installed", "shakespeare", "fineweb"):
                source = f"FILES, of your text, the first of them named {Path(source).name}.txt"
            raise UserError(f"no {DATA / c.corpus}_{split}_*.bin, or they are being written: run python "
                            f"data/prepare.py {source}")

        # No window crosses from one shard to the next. The places where one can start are numbered through
        # all shards, and `ends` is where the places of each shard end.
        self.c = c
        self.device = device
        self.bytes_per_token = corpus.bytes_per_token
        self.shards = [read_shard(path, c, sha256) for path, sha256 in getattr(corpus, split)]
        self.ends = np.cumsum([len(s) - c.sequence for s in self.shards])
        self.digest = digest(self.ends, *self.shards)

    def at(self, places):
        """Windows that start at places [int, ...] -> inputs, targets, both (len(places), sequence) int64."""
        # Find the shard of each place, and the place within it.
        shard = np.searchsorted(self.ends, places, "right")
        start = places - np.concatenate([[0], self.ends])[shard]

        # Cut the windows, one token longer than the inputs: each token's target is the next one.
        windows = np.stack([self.shards[i][j:j + self.c.sequence + 1] for i, j in zip(shard, start)])
        batch = torch.from_numpy(windows.astype(np.int64))
        if self.device == "cuda":
            batch = batch.pin_memory().to("cuda", non_blocking=True)
        return batch[:, :-1], batch[:, 1:]

    def random(self, step, micro):
        """This process's micro-batch of a step, as `at` returns it."""
        # A generator of its own for each micro-batch of each process
        generator = np.random.default_rng((self.c.seed, step, micro * WORLD + RANK))
        return self.at(generator.integers(self.ends[-1], size=self.c.batch))

    def in_order(self):
        """Windows without overlap from the start of the first shard, up to eval_tokens, in whole batches."""
        c = self.c
        places = np.arange(0, min(self.ends[0], c.eval_tokens), c.sequence)
        # What fills no batch is left out: another shape would compile anew. Only a single batch may be short.
        for i in range(0, max(len(places) - c.batch, 0) + 1, c.batch):
            yield self.at(places[i:i + c.batch])


def read_shard(path, c, sha256):
    """The tokens of a file, (n,) uint16, mapped into memory. UserError if it is damaged or does not fit c.

    sha256: what that of the file must be; None: anything.
    """
    # The size must be what the header says, and the content what the manifest says.
    if not path.is_file():
        raise UserError(f"{path} is missing: run data/prepare.py again")
    size = path.stat().st_size
    with reading(path):
        header = np.fromfile(path, "<i4", 3).tolist()
    if size < 1024 or header[:2] != [20240520, 1] or size != 1024 + 2 * header[2]:
        raise UserError(f"{path} is no whole shard of tokens: delete it, and run data/prepare.py again")
    content = np.memmap(path, np.uint8, "r")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is damaged, or of another corpus, by its sha256: delete it, and run "
                        "data/prepare.py again")

    # Tokens must be enough for a window, and in the vocabulary.
    tokens = content[1024:].view(np.uint16)
    if len(tokens) <= c.sequence:
        raise UserError(f"{path} holds {len(tokens)} tokens, too few for --sequence={c.sequence}: "
                        "shorten it")
    if tokens.max() >= c.vocab_size:
        raise UserError(f"{path} holds token {tokens.max()}, beyond --vocab_size={c.vocab_size}: "
                        "bytes need 256, GPT-2's tokens (fineweb) 50304")
    return tokens


def digest(*contents):
    """bytes or arrays, one after another -> the first 8 hexadecimal digits of their sha256."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content)
    return sha.hexdigest()[:8]


# ---- 4. Optimizer and schedule -----------------------------------------------------------------------------
#
# The optimizer is AdamW, or Muon for the matrices of the blocks. The learning rate rises, and then falls
# along a cosine, or, by wsd (warm-up, stable, decay), stays and falls late along a line. Two things happen
# late in a run. A recipe with `dampen` pulls weights towards their quantized values, as `ramp` grows
# (quartet.py, section 12). And the last steps may multiply more exactly. With --bf16_end, as in NVIDIA's
# recipe, they train all layers in bf16; with --bf16_forward_end only the forward pass is in bf16. With
# --two_terms_end all stays in 4 bits, and the forward pass multiplies x in two terms (quartet.py, section
# 10).

DAMPEN_EVERY = 10      # steps; every tenth step, ten times as strongly, is cheaper


def make_optimizers(model, c):
    """[AdamW] of all parameters, or [Muon, AdamW], Muon of the matrices of the blocks.

    Weight decay is on the weights of linear layers; by Muon not on the head. Each group has a learning rate
    of its own, which the schedule scales. Source of Muon: kellerjordan.github.io/posts/muon.
    """
    # The matrices of the blocks; and all that has no group of its own: gains of norms, and what forks add.
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    named = {*matrices, model.head.weight, model.embedding.weight}
    others = [p for p in model.parameters() if p not in named]
    muon = c.optimizer == "muon"
    groups = [
        dict(params=matrices, weight_decay=c.weight_decay),
        dict(params=[model.head.weight], lr=c.head_lr or c.lr, weight_decay=0.0 if muon else c.weight_decay),
        dict(params=[model.embedding.weight], lr=c.embedding_lr or c.lr, weight_decay=0.0),
        dict(params=others, lr=c.head_lr or c.lr, weight_decay=0.0),
    ]
    if muon:
        # AdamW's settings beside Muon are nanochat's.
        return [torch.optim.Muon(groups[:1], lr=c.lr),
                torch.optim.AdamW(groups[1:], lr=c.lr, betas=(0.8, 0.95), eps=1e-10, fused=True)]
    return [torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), fused=True)]


def learning_rate(c, step):
    """After so many steps, by the schedule."""
    # Rise along a line.
    warmup = max(1, int(c.steps * c.warmup))
    if step < warmup:
        return c.lr * (step + 1) / warmup

    # Stay, and fall along a line.
    if c.schedule == "wsd":
        left = min((c.steps - step) / max(1, c.steps * c.decay), 1.0)
        return c.lr * (c.final_lr + (1 - c.final_lr) * left)

    # Fall along half a cosine.
    progress = math.pi * (step - warmup) / (c.steps - warmup)
    return c.lr * ((1 + c.final_lr) / 2 + (1 - c.final_lr) / 2 * math.cos(progress))


def before_decay(c):
    """The last step of wsd before its decay, whose checkpoint is kept: others can start there. Or 0."""
    step = int(c.steps - c.steps * c.decay) + 1
    if c.schedule == "wsd" and c.steps * c.warmup < step < c.steps:
        return step
    return 0


def recipe_of(c, step):
    """The recipe that trains a step, and validates after it: another one in the last steps."""
    # A model may have done more steps than the --steps that it is read with.
    step = min(step, c.steps)
    if step > c.steps - c.steps * c.bf16_end:
        return "bf16"
    if step > c.steps - c.steps * c.bf16_forward_end:
        return in_bf16_forward(c.recipe)
    if step > c.steps - c.steps * c.two_terms_end:
        return in_two_terms(c.recipe)
    return c.recipe


def in_bf16_forward(recipe):
    """The name of a recipe's row of which only the backward pass multiplies in 4 bits. RECIPES gets it."""
    row = quartet.RECIPES[recipe]
    if row is None:
        return recipe
    name = f"{recipe}+bf16_forward"
    # A w that came as it was, in blocks of 16x16, is now quantized for dx alone, and needs no such blocks.
    dx = row.dx._replace(other=row.dx.other or row.w.removesuffix("_16x16"))
    # Where no weight is quantized forward, a pull has no aim.
    quartet.RECIPES[name] = row._replace(x="bf16", w="bf16", dx=dx, dampen=0.0, two_terms=False)
    return name


def in_two_terms(recipe):
    """The name of a recipe's row whose forward pass multiplies x in two terms. RECIPES gets it."""
    row = quartet.RECIPES[recipe]
    if row is None:
        return recipe
    name = f"{recipe}+two_terms"
    quartet.RECIPES[name] = row._replace(two_terms=True)
    return name


def pull(c, lr):
    """The learning rate by which weights are dampened: AdamW's for steps as long as Muon's."""
    # The root mean square of a step of Muon is lr / sqrt(width) in a square matrix; of AdamW some 0.2 lr
    # (arXiv:2502.16982).
    if c.optimizer == "muon":
        return lr / (0.2 * math.sqrt(c.width))
    return lr


def ramp(t):
    """How strongly weights are dampened when a share t of the steps is done: they are free until late."""
    return t**4


# ---- 5. The training loop ----------------------------------------------------------------------------------
#
# `train` is a run, from its first step to its sample. A step goes through its micro-batches, clips the
# gradient, lets the optimizer move the weights, and reports. `build` makes what the loop needs. What is done
# for several processes only is one line each time, and explained in appendix B; on one process these lines do
# nothing.

def train(c, data, directory, stop, checkpoint=None):
    """Train as c says on data, Shards (train, val), or on from a checkpoint. A signal fills the list stop."""
    train_data, val_data = data
    device = pick_device(c)
    compiled = pick_compile(c, device)
    model, net, optimizers = build(c, directory, checkpoint, device, compiled)
    log = Log(c, directory, checkpoint, model, data, device)
    # A step may have more tokens than a forward pass can take. Then gradients of several micro-batches add
    # up, and each weight is quantized once for them all. A single one quantizes them in its forward pass.
    accumulate = c.tokens_per_step // (c.batch * c.sequence * WORLD)
    quantized = partial(quartet.quantized_weights, model) if accumulate > 1 else contextlib.nullcontext
    total = torch.zeros((), device=device)      # the loss of a step
    recipe = None

    def micro_step(x, y):
        loss = net(x, y) / accumulate
        loss.backward()
        total.add_(loss.detach())

    for step in range(log.start + 1, c.steps + 1):
        begin = time.perf_counter()

        # Take the recipe of this step: the last ones may train in bf16. On one GPU, record a CUDA graph.
        if recipe != recipe_of(c, step):
            recipe = recipe_of(c, step)
            model.use_recipe(recipe, c.backend)
            forward_backward = micro_step
            if compiled and device == "cuda" and WORLD == 1:
                # A graph of micro-batches takes quantized weights from their place, as later steps will.
                with quantized():
                    forward_backward = as_graph(micro_step, *train_data.random(step, 0))
                model.zero_grad(set_to_none=False)      # as_graph has run micro_step before it recorded it

        # Set the learning rate of each group of parameters.
        lr = learning_rate(c, step - 1)
        set_rates(optimizers, lr)

        # Forward and backward.
        total.zero_()
        with quantized():
            for micro in range(accumulate):
                if WORLD > 1:
                    net.require_backward_grad_sync = micro == accumulate - 1      # DDP: average only once
                forward_backward(*train_data.random(step, micro))

        # Clip the gradient, and update the weights. A gradient that is not finite leaves all as it is.
        norm = nn.utils.clip_grad_norm_(model.parameters(), c.clip or math.inf)
        if c.shard == "true":
            norm = norm.full_tensor()
        update(optimizers, norm)
        if step % DAMPEN_EVERY == 0:
            share = DAMPEN_EVERY * pull(c, lr) * ramp(step / c.steps)
            quartet.dampen(model, share * norm.isfinite())
        model.zero_grad(set_to_none=forward_backward is micro_step)      # a graph's gradients stay in place

        # Report and validate; save, where it is only due not after bad steps. A signal ends the run, saved.
        last = step == c.steps
        stopping = any(gather(bool(stop))) and not last
        evaluating = last or step % c.eval_every == 0
        needed = last or stopping or step == before_decay(c)
        due = step % c.save_every == 0
        log.step(step, begin, mean(total), norm, lr, flush=evaluating or needed or due)
        if evaluating:
            log.validation(step, evaluate(model, val_data, c))
        if needed or (due and not log.bad_in_a_row):
            save(directory, c, step, log=log.state(), **identity(data), **snapshot(model, optimizers, c))
        if stopping:
            leave(directory, step, stop)

    finish(c, directory, log, model)


def build(c, directory, checkpoint, device, compiled):
    """-> the model, what to call for its loss, its optimizers: as in a checkpoint, or at the start."""
    if device == "cuda":
        # Every sum in one order, so that a resumed run is the same to the bit. No leftovers of a run before.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    # One seed: all recipes and processes start from the same weights.
    quartet.GEMM = c.gemm
    torch.manual_seed(c.seed)
    model = GPT(c).to(device)
    if c.init_from and not checkpoint:
        start = directory.parent / START
        model.load_state_dict(weights_of(start if os.path.lexists(start) else c.init_from, c))

    # Compile, then spread over processes. FSDP2 replaces parameters, so optimizers are made after that.
    if compiled:
        options = None
        if quartet.resolve(c.backend, device, c.recipe) == "torch":
            # The reference keeps its bits.
            options = quartet.AS_EAGER
        for block in model.blocks:
            # All share one program. Of a block only `forward` is compiled: FSDP2's hooks stay outside.
            block.forward = torch.compile(block.forward, fullgraph=True, options=options)
        model.predict = torch.compile(model.predict, fullgraph=True, options=options)
    net = model
    if WORLD > 1:
        net = distribute(model, c)
    optimizers = make_optimizers(model, c)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Each group keeps its share of the learning rate that the schedule says.
            group["share"] = group["lr"] / (c.lr or 1.0)

    # From here on the generator draws rounding noise only, and each process has its own.
    if RANK:
        torch.manual_seed((c.seed << 20) + RANK)
    if checkpoint:
        restore(model, optimizers, checkpoint, directory)
    return model, net, optimizers


def set_rates(optimizers, lr):
    """Give each group of parameters its share of a learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]


def update(optimizers, norm):
    """Step all optimizers, or none of them if the gradient's norm, () float32, is not finite."""
    # A fused optimizer looks at found_inf on the GPU. For any other the CPU must wait for the norm.
    fused = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers)
    if fused or norm.isfinite():
        for optimizer in optimizers:
            if fused:
                optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()


# ---- 6. Evaluation and sampling ----------------------------------------------------------------------------
#
# Validation uses the forward pass that is trained, quantized as it is. `eval` and `sample` take any recipe's:
# weights that were trained in bf16 and evaluated in 4 bits show what post-training quantization costs. Text
# is made of bytes, or of GPT-2's tokens, which take the package tiktoken: the corpus's manifest tells.

@torch.no_grad()
def evaluate(model, data, c):
    """Mean cross-entropy of the Shards data, up to c.eval_tokens of them, in nats a token."""
    # Sums stay on the device in float64; the CPU waits once, at the end.
    loss = 0.0
    tokens = 0
    with quartet.quantized_weights(model):
        for x, y in data.in_order():
            loss = loss + model(x, y).double() * y.numel()
            tokens += y.numel()
    return loss.item() / tokens


def bits_per_byte(data, loss):
    """A loss in nats a token -> ', x bits per byte' of the text of the Shards data, by which models of other
    tokens can be compared. The end of a document is a byte. Nothing if the manifest does not tell the bytes.
    """
    if math.isnan(data.bytes_per_token):
        return ""
    return f", {loss / math.log(2) / data.bytes_per_token:.4f} bits per byte"


@torch.no_grad()
def sample(model, tokens, c):
    """Continue tokens [int, ...]: yield c.sample_tokens ints. Slow: it caches no keys and values."""
    # A generator of its own: a sample takes nothing from the noise of training.
    device = model.rope.device
    generator = torch.Generator(device).manual_seed(c.seed)
    for _ in range(c.sample_tokens):
        # Compute the logits of the next token. In eager mode: else every length would compile anew.
        context = torch.tensor([tokens[-c.sequence:]], device=device)
        with torch.compiler.set_stance("force_eager"):
            logits = model(context)[0, -1].float()
        if not logits.isfinite().all():
            print("(its logits are not finite: no sample)")
            return

        # Draw among the likeliest. Differences to the best keep a tiny temperature from overflowing.
        best, index = logits.topk(min(c.top_k, c.vocab_size))
        chances = ((best - best[0]) / max(c.temperature, 1e-9)).softmax(-1)
        token = index[torch.multinomial(chances, 1, generator=generator)].item()
        tokens = tokens + [token]
        yield token


def codec(c):
    """-> the tokens of c.prompt, [int, ...], and what makes bytes of a token. UserError without tiktoken."""
    # A token is a byte; 0 ends a document, and is shown as a new line. Or it is GPT-2's.
    prompt = list(c.prompt.encode()) or [0]
    bytes_of = lambda token: bytes([token or 10])
    if c.tokenizer == "gpt2":
        try:
            import tiktoken
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:      # not installed, or its vocabulary could not be downloaded
            raise UserError(f"GPT-2's tokens need tiktoken, pip install tiktoken: {type(e).__name__}")
        prompt = gpt2.encode_ordinary(c.prompt) or [gpt2.eot_token]
        bytes_of = lambda token: gpt2.decode_single_token_bytes(token) if token < gpt2.n_vocab else b""
    # Leave out of the prompt what a smaller vocabulary has not got.
    return [t for t in prompt if t < c.vocab_size] or [0], bytes_of


def sample_text(model, c):
    """Yield the prompt and what the model makes of it, piece by piece, as text."""
    try:
        prompt, bytes_of = codec(c)
    except UserError as e:
        yield f"({e})"
        return

    # A token may end within a character: the decoder waits for the rest of it.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in itertools.chain(prompt, sample(model, prompt, c)):
        yield decoder.decode(bytes_of(token))


def eval_recipes(model, c, saved):
    """Print the validation loss in nats by the forward pass of each recipe of c.

    saved: the run's checkpoint, which tells the text of its own losses.
    """
    data = Shards(c, find_corpus(c), "val", model.rope.device.type)
    knobs = "corpus", "tokenizer", "sequence"
    as_trained = all(saved["config"][knob] == getattr(c, knob) for knob in knobs)
    if as_trained and not saved["corpus"].endswith(data.digest):
        print(f"the corpus {c.corpus} has changed since the run: its own losses were on another text",
              file=sys.stderr)
    losses = []
    print("forward pass     loss  difference")
    for recipe in c.recipe.split(","):
        model.use_recipe(recipe, c.backend)
        loss = evaluate(model, data, c)
        losses.append(loss)
        print(f"{recipe:12}{loss:9.4f}{loss - losses[0]:12.4f}{bits_per_byte(data, loss)}")
    if not all(map(math.isfinite, losses)):
        raise Diverged("not all of these losses are finite: the weights have diverged")


# ============================================================================================================
# Appendices. A training step of one process ends here. What follows keeps its results, speeds it up, spreads
# it over GPUs, and reads the command line.
# ============================================================================================================

# ---- A. Checkpoints and logs that survive a crash ----------------------------------------------------------
#
# A process may be killed at any moment, and a disk may be full. So a file is written under another name,
# NAME.part, and renamed when all of it is on the disk: it is whole or not there. The last two checkpoints are
# kept. A log is appended to, and a crash may tear it: so a checkpoint holds the log up to its step, and a run
# that goes on starts the file from there. A run belongs to one config, one corpus and one code: with others
# it does not go on. On as many processes as before it goes on to the same bits; on more or fewer it takes the
# same data, and other noise.

CHECKPOINTS = ("checkpoint.pt", "previous.pt")     # the last one, and the one before
STABLE = "stable.pt"                               # that of the step before the decay of wsd
START = "start.pt"                                 # of a comparison with --init_from: a copy of its source
HEAD = "head.pt"      # of a checkpoint that is a directory: what it holds but for weights and moments
BROKEN = "is not a whole checkpoint: remove it, and previous.pt beside it, if it is there, is taken instead"

# What the files of a run hold, {name: type}; for a dict in one, again {name: type}. Files come from other
# machines and other versions, too: `fits` looks at all of it before any is used.
NUMBER = int, float
NUMBER_OR_NULL = int, float, type(None)
KNOBS = {name: NUMBER if kind is float else kind for name, kind in Config.__annotations__.items()}
LOG = dict(text=str, skipped=int, val_loss=NUMBER)
SHARD = dict(file=str, tokens=int, sha256=str)
MANIFEST = dict(train=list, val=list, tokenizer=str, bytes=dict(train=NUMBER_OR_NULL, val=NUMBER_OR_NULL))
COMPARISON = dict(config=KNOBS, corpus=str, code=str, processes=int)
CHECKPOINT = COMPARISON | dict(step=int, log=LOG, model=dict, optimizer=dict, generators=list, files=dict)
RESULT = dict(recipe=str)
RESULT |= dict.fromkeys(["val_loss", "skipped", "tokens_per_s", "peak_gib"], NUMBER_OR_NULL)

SOURCES = [Path(__file__).with_name(name) for name in ("quartet.py", "kernels.py", "train_gpt.py")]
CODE = digest(*[path.read_bytes() for path in SOURCES if path.exists()])


def identity(data):
    """What, beside its Config, must not change within a run on data, Shards (train, val)."""
    return dict(corpus=data[0].digest + data[1].digest, code=CODE, processes=WORLD)


def refuse_another(saved, data, directory):
    """UserError if what a run in a directory has saved is of another corpus or code."""
    for what, now in identity(data).items():
        if saved[what] == now:
            continue
        if what != "processes":
            raise UserError(f"{directory} began with {what} {saved[what]}, and here is {now}: put it back, "
                            "or start a new run, which may take weights from one, --init_from=RUN")
        print(f"{saved[what]} processes before, {now} now: the same data, other noise")


@contextlib.contextmanager
def writing(path):
    """Turn what a disk refuses into one line."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): make room, or go to a directory that can be "
                        "written; then start again, or, if there is a checkpoint, resume the run")


@contextlib.contextmanager
def reading(path):
    """Turn a refusal to read into one line."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})")


def outline(c):
    """The model of c, of tensors that have a shape and take no memory."""
    with torch.device("meta"):
        return GPT(c)


def need_room(directory, c):
    """UserError if the disk has no room for the checkpoints of a run, or of all runs of a comparison."""
    if RANK:
        return
    # Of each run the last two, perhaps that before a decay, and one that is written; in each, of every
    # parameter, weight and two moments in float32. What is there already will be replaced.
    checkpoints = (2 + bool(before_decay(c))) * len(c.recipe.split(",")) + 1
    needed = checkpoints * 12 * sum(p.numel() for p in outline(c).parameters())
    there = sum(path.stat().st_size for path in directory.rglob("*.*") if path.is_file())
    room = shutil.disk_usage(directory).free + there
    if room < needed:
        raise UserError(f"{directory} needs {needed / 1e6:,.0f} MB for checkpoints, and the disk has room "
                        f"for {room / 1e6:,.0f}: remove old runs, or go to another directory")


@contextlib.contextmanager
def replacing(path, previous=None):
    """A new file, open for bytes, that takes the place of path once all of it is on the disk.

    What it replaces is kept as previous.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            # Remove what a crash, or somebody's link, has left there: x opens new files only.
            part.unlink(missing_ok=True)
            with open(part, "xb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())

            # Killed between these two, a run goes on from the previous checkpoint.
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write(path, text):
    """Write text, in UTF-8, whole or not at all, if this is rank 0."""
    if RANK:
        return
    with replacing(path) as f:
        f.write(text.encode())


def as_json(**record):
    """A record in one line; null for what is not finite, which JSON lacks."""
    record = json.loads(json.dumps(record), parse_constant=lambda name: None)      # NaN, Infinity, -Infinity
    return json.dumps(record) + "\n"


def read_json(path, kinds, way_out="is damaged: remove it, then resume"):
    """The record in a file, of these kinds, {name: type}. UserError if it is none."""
    # A pipe or a device has no end, and what is as large is no record.
    record = None
    if path.is_file() and path.stat().st_size < 2**24:
        with reading(path), contextlib.suppress(ValueError, RecursionError):
            record = json.loads(path.read_text())
    if not fits(record, kinds):
        raise UserError(f"{path} {way_out}")
    return record


def fits(record, kinds):
    """Whether a record is a dict of just these kinds, {name: type, or kinds of a dict in it}."""
    if isinstance(kinds, dict):
        return (isinstance(record, dict) and record.keys() == kinds.keys()
                and all(fits(record[name], kind) for name, kind in kinds.items()))
    # Python's integers have no end, and its strings may hold half a character, which UTF-8 refuses.
    too_large = isinstance(record, int) and abs(record) >= 2**63
    no_text = isinstance(record, str) and re.search("[\ud800-\udfff]", record)
    return isinstance(record, kinds) and not too_large and not no_text


def save(directory, c, step, **state):
    """Write a checkpoint; keep the one before, and for good that before a decay."""
    path, previous = [directory / name for name in CHECKPOINTS]
    record = dict(config=vars(c), step=step, files={}, **state)
    if c.shard == "true":
        save_parts(path, previous, record)
    elif not RANK:
        save_record(path, record, previous)
    if step == before_decay(c) and not RANK:
        copy(path, directory / STABLE)


def save_record(path, record, previous=None):
    """Write a dict as a file, which replaces what is there; that is kept as previous."""
    with replacing(path, previous) as f:
        try:
            torch.save(record, f)
        except RuntimeError as e:
            # torch.save hides an error of the disk behind one of its own.
            raise e.__context__ or e


def copy(path, target):
    """Copy a checkpoint, a file or a directory. If the process is killed, target is whole or not there."""
    part = target.with_name(f"{target.name}.part")
    with writing(part):
        remove(part)
        if path.is_dir():
            shutil.copytree(path, part)
        else:
            shutil.copyfile(path, part)
        remove(target)
        os.replace(part, target)


def remove(path):
    """Remove a file, a link or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def begun(directory):
    """Whether a run, or a comparison, has something to go on from: a checkpoint, or a result."""
    return any(path.name in (*CHECKPOINTS, "result.json") for path in directory.rglob("*.*"))


def find(word, names):
    """The path of the first of names that a run has, by name in runs/ or by path; None if it has none."""
    # A name in runs/ comes first; a path outside of it is second.
    for directory in (Path("runs") / word, Path(word)):
        for name in names:
            path = directory / name
            if os.path.isfile(path) or os.path.isfile(path / HEAD):
                return path
            # Not to take an older one in its place, without a word
            if name != "." and os.path.lexists(path):
                raise UserError(f"{path} is no file: remove it")
    return None


def load_checkpoint(word, names=CHECKPOINTS, whole=True):
    """The first of names that a run has -> its path, and what `save` was given, a dict.

    Of one that processes have written in parts, `model` is whole if so asked, else empty: see `restore`.
    UserError if there is none, and if any bit of it is wrong.
    """
    path = find(word, names)
    if not path and find(word, ["compare.json"]):
        raise UserError(f"{word} is a comparison: name one of its runs, {word}/RECIPE")
    if not path and find(word, ["."]):
        raise UserError(f"{word} is a file of a run: name the run, or start a new one, --init_from={word}")
    if not path:
        runs = {str(path.parent.relative_to("runs")) for path in Path("runs").rglob("*.pt")
                if path.name in CHECKPOINTS and (path.is_file() or (path / HEAD).is_file())}
        known(word, sorted(runs), f"no run {word} with a checkpoint: in runs/")
    file = path
    if path.is_dir():
        file = path / HEAD

    # The file is a zip archive, and torch.load does not look at its checksums: do it here. They do not cover
    # the archive's directory, where torch.save marks nothing as compressed, or as a directory.
    try:
        with zipfile.ZipFile(file) as z:
            strange = [entry for entry in z.infolist() if entry.compress_type or entry.external_attr]
            good = not strange and not z.testzip()
    except Exception as e:       # whatever a damaged file leads to, such as a seek to a negative place
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise UserError(f"cannot read {file} ({e.strerror})")
        good = False
    if not good:
        raise UserError(f"{path} {BROKEN}")

    # weights_only: nothing in the file is executed. What it holds must be what `save` writes: a missing part
    # would be left at some default, and an odd one end in a traceback.
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        if "allocate" in str(e):      # too little memory: the file is not to blame
            raise
        checkpoint = None
    c = config_in(path, checkpoint, CHECKPOINT)
    if not 0 <= checkpoint["step"] <= c.steps:
        raise UserError(f"{path} holds another step than its config says")
    if path.is_dir():
        checkpoint["path"] = path
        if not whole:
            return path, checkpoint
        checkpoint["model"] = load_whole(path, checkpoint, c)

    # The model is not built unless the file holds it: a config alone could ask for any memory.
    if shapes(checkpoint["model"]) != shapes(outline(c).state_dict()):
        raise UserError(f"{path} holds other weights than its config says, or than the model has now "
                        f"(code {checkpoint['code']} then, {CODE} now)")
    if not plain(checkpoint):
        raise UserError(f"{path} holds tensors that are not plain numbers in memory, one after another")
    return path, checkpoint


def plain(value):
    """Whether all tensors in value, in whatever it holds, lie in a CPU's memory, each number in its place."""
    # Look into what holds others.
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    if not isinstance(value, torch.Tensor):
        return True
    # Any other tensor may have fewer numbers than its shape says, or none.
    return (value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized
            and value.is_contiguous())


def config_in(path, record, kinds):
    """The Config in a record that was read from a file. UserError unless it could be that of a run."""
    # Knobs that its code did not have yet take their defaults.
    if fits(record, {**kinds, "config": dict}) and record["code"] != CODE:
        record["config"] = vars(Config()) | record["config"]
    # A comparison has several recipes, a checkpoint one.
    if not fits(record, kinds) or ("," in record["config"]["recipe"]) != (kinds is COMPARISON):
        raise UserError(f"{path} was not written by this version of train_gpt.py")
    # Each knob alone has the right type by now. Whether they make sense is asked as of a new run.
    c = Config(**record["config"])
    try:
        check_knobs(c)
    except UserError as e:
        raise UserError(f"{path}: {e}")
    return c


def shapes(tensors):
    """{name: tensor} -> {name: (its shape, its dtype), or False for what is no tensor}."""
    return {name: isinstance(t, torch.Tensor) and (t.shape, t.dtype) for name, t in tensors.items()}


def weights_of(run, c):
    """The weights of a run, {name: tensor}, to start one of Config c from."""
    path, checkpoint = load_checkpoint(run, (*CHECKPOINTS, "."))
    tell_other_code(path, checkpoint)
    unchanged(vars(c), checkpoint["config"], SHAPE, f"the weights of {run} have another shape")
    return checkpoint["model"]


def tell_other_code(path, saved):
    """Say so where weights are used by other code than has trained them."""
    if saved["code"] != CODE and not RANK:
        print(f"{path} was trained by code {saved['code']}, and here is {CODE}: if the model or the rounding "
              "has changed since, its losses are not those of its training", file=sys.stderr)


@contextlib.contextmanager
def held(directory):
    """Within it no other job trains in a directory: UserError if one does, where the disk knows locks."""
    # One process of a job is enough; Windows has no such locks.
    if RANK or not fcntl:
        yield
        return

    # The lock is on the directory itself, and leaves no file.
    f = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(f)
        raise UserError(f"another process trains in {directory}: wait until it ends, or stop it")
    except OSError:
        pass      # this disk knows no locks
    try:
        yield
    finally:
        os.close(f)      # and with it the lock goes; the system does so for a process that is killed


def recipes_by_step(c):
    """What recipe_of says of all steps, in words. Example: quartet2; from step 91 on bf16"""
    recipe = c.recipe
    words = [recipe]
    for share in sorted([c.two_terms_end, c.bf16_forward_end, c.bf16_end], reverse=True):
        first = int(c.steps - c.steps * share) + 1
        if recipe != recipe_of(c, first):
            recipe = recipe_of(c, first)
            words.append(f"from step {first} on {recipe}")
    return "; ".join(words)


def model_in_words(c):
    """Example: 6 blocks of width 640, 5 heads (5 of keys), swiglu of 1792; 256 tokens, context 512"""
    norm = ", normalised" if c.qk_norm == "true" else ""
    return (f"{c.layers} blocks of width {c.width}, {c.heads} heads ({c.kv_heads or c.heads} of keys){norm}, "
            f"{c.mlp} of {c.hidden}; {c.vocab_size} tokens, context {c.sequence}")


def optimizer_in_words(c):
    """Example: adamw, lr 0.0012: 10% warm-up, cosine to 10%; weight decay 0.1, clip 1"""
    fall = f"{c.decay:.0%} decay" if c.schedule == "wsd" else "cosine"
    others = "".join(f", {name} {getattr(c, name):g}" for name in ("embedding_lr", "head_lr")
                     if getattr(c, name))
    return (f"{c.optimizer}, lr {c.lr:g}{others}: {c.warmup:.0%} warm-up, {fall} to {c.final_lr:.0%}; weight "
            f"decay {c.weight_decay:g}, clip {c.clip:g}")


def layers_by_kind(model):
    """Which layers recipes are about, and which not. Example: 4 quantized, 106,496 parameters: blocks.0.qkv,
    blocks.0.out, blocks.0.up, blocks.0.down; not: embedding, head
    """
    quantized = model.quantized_linears()
    others = [name for name, m in model.named_modules()
              if isinstance(m, (nn.Linear, nn.Embedding)) and name not in quantized]
    size = sum(m.weight.numel() for m in quantized.values())
    return f"{len(quantized)} quantized, {size:,} parameters: {in_short(quantized)}; not: {in_short(others)}"


def in_short(names):
    """Names of layers, of which those in blocks one after another are one. Example: blocks.0-5.up, head"""
    # {what is before and after the number of a block: [first and last number, ...]}
    found = {}
    for name in names:
        before, number, after = re.fullmatch(r"(\D*)(\d*)(.*)", name).groups()
        spans = found.setdefault((before, after), [])
        if spans and int(number) == int(spans[-1][1]) + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(before + "-".join(dict.fromkeys(span)) + after
                     for (before, after), spans in found.items() for span in spans)


class Log:
    """log.jsonl, a record a line, and progress on the screen.

    Losses stay on the device until a line is due: to read one, the CPU must wait for the GPU.
    """
    start = 0             # the step that it goes on from
    text = ""             # of the file
    val_loss = math.nan
    skipped = 0           # steps without a finite gradient
    bad_in_a_row = 0      # the last steps in a row without one; at 10 it stays, so that the run ends

    def __init__(self, c, directory, saved, model, data, device):
        # What a run logs, and the records that are there if it goes on.
        self.c = c
        self.data = data
        self.path = directory / "log.jsonl"
        self.pending = []      # steps that are not written yet
        self.rates = []        # tokens/s
        if saved:
            self.start = saved["step"]
            vars(self).update(saved["log"])
        # Write the file anew from the checkpoint's text: later steps are done again, and a crash may have
        # torn it.
        write(self.path, self.text)

        # Print and write the header: all that the numbers of a run depend on.
        name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
        if device == "cuda":
            name = torch.cuda.get_device_name()
        size = sum(p.numel() for p in model.parameters())
        ends = 2 * c.vocab_size * c.width      # parameters of embedding and head
        header = dict(
            device=f"{WORLD} x {name}, backend {quartet.resolve(c.backend, device, c.recipe)}",
            recipe=recipes_by_step(c),
            operands=str(quartet.RECIPES[c.recipe]),
            layers=layers_by_kind(model),
            model=model_in_words(c),
            optimizer=optimizer_in_words(c),
            parameters=f"{size:,}, {size - ends:,} without embedding and head",
            steps=f"{c.steps:,} of {c.tokens_per_step:,} tokens, {c.batch} x {c.sequence} in a process at a "
                  f"time; in all {c.steps * c.tokens_per_step / (size - ends):.1f} tokens a parameter",
            corpus=f"{c.corpus}, {sum(map(len, data[0].shards)):,} tokens ({c.tokenizer}), sha256 "
                   f"{identity(data)['corpus']}",
            versions=f"python {platform.python_version()}, torch {torch.__version__}, code {CODE}")
        for what, value in header.items():
            print(f"{what:>10}  {value}")
        self.write(start=self.start, config=vars(c), **header)

    def write(self, **record):
        """Append one record to log.jsonl, if this is rank 0."""
        if not RANK:
            line = as_json(**record)
            self.text += line
            with writing(self.path), open(self.path, "a") as f:
                f.write(line)

    def step(self, step, begin, loss, norm, lr, flush):
        """Note a step that began at `begin`; write and print all noted if a line is due, or flush.

        Diverged once 10 steps in a row had no finite gradient.
        """
        # Wait until a line is due. The first step has one at once.
        first = step == self.start + 1
        if not self.pending:
            self.begin = begin
        self.pending.append((step, loss, norm, lr))
        if not (first or flush or step % self.c.log_every == 0):
            return

        # To read a number is where the CPU waits for the GPU, and only then is time measured.
        norm.item()
        seconds = (time.perf_counter() - self.begin) / len(self.pending)
        rate = self.c.tokens_per_step / seconds
        if not first:      # which compiles, or warms up
            self.rates.append(rate)

        # Write a record a step. 10 steps in a row without a finite gradient are remembered, to end the run.
        for step, loss, norm, lr in self.pending:
            self.write(step=step, loss=loss.item(), grad_norm=norm.item(), lr=lr, ms=round(seconds * 1e3, 3))
            if not norm.isfinite():
                self.skipped += 1
                self.bad_in_a_row += 1
                print(f"step {step} skipped: loss {loss}, norm {norm}; {self.skipped} so far")
            elif self.bad_in_a_row < 10:
                self.bad_in_a_row = 0
        self.pending = []

        # Print a line for the last of them.
        left = int((self.c.steps - step) * seconds)
        print(f"step {step:{len(str(self.c.steps))}}/{self.c.steps}  loss {loss:7.4f}  norm {norm:6.3f}  "
              f"lr {lr:.2e}  {seconds * 1e3:7.1f} ms  {rate / 1e3:7.1f} ktok/s  "
              f"{left // 60:3d}:{left % 60:02d} left")
        if self.bad_in_a_row >= 10:
            raise Diverged(f"step {step}: 10 steps in a row had no finite gradient. Start a new run with a "
                           f"lower --lr than {self.c.lr}")

    def state(self):
        """What a checkpoint holds of it."""
        return {name: getattr(self, name) for name in LOG}

    def validation(self, step, loss):
        """Note a validation loss."""
        self.val_loss = loss
        self.write(step=step, val_loss=loss)
        print(f"step {step}  validation loss {loss:.4f} nats{bits_per_byte(self.data[1], loss)}")


def leave(directory, step, stop):
    """End the process where a signal has stopped a run."""
    command = "python train_gpt.py"
    local = in_environment("LOCAL_WORLD_SIZE", WORLD)      # processes of this machine
    if WORLD > local:
        command = f"torchrun --nnodes={WORLD // local} --nproc_per_node={local} ... train_gpt.py"
    elif WORLD > 1:
        command = f"torchrun --nproc_per_node={WORLD} train_gpt.py"
    # A run of a comparison goes on with all of it.
    if (directory.parent / "compare.json").exists():
        directory = directory.parent
    print(f"stopped after step {step}, saved. To go on: {command} resume {shlex.quote(str(directory))}")
    sys.exit(130 if signal.SIGINT in stop else 0)


def finish(c, directory, log, model):
    """Write result.json and sample.txt of a run that has come to its last step; print the sample.

    Diverged if its validation loss is not finite.
    """
    # The speed is the median over the lines of the log, which is robust against pauses.
    rate = np.median(log.rates or [math.nan])
    result = dict(recipe=c.recipe, val_loss=log.val_loss, skipped=log.skipped, tokens_per_s=rate,
                  peak_gib=math.nan)
    if model.rope.is_cuda:
        result["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    # A run that goes on from its last step has taken none, and no recipe.
    model.use_recipe(recipe_of(c, c.steps), c.backend)
    text = "".join(sample_text(model, c))
    write(directory / "sample.txt", text)
    write(directory / "result.json", as_json(**result))
    gather(None)      # a comparison reads it in every process
    print(f"sample:\n{text}\nwritten to {directory}/: log.jsonl, checkpoint.pt, result.json, sample.txt")
    if not math.isfinite(log.val_loss):
        raise Diverged(f"{directory}: its validation loss is not finite. Start a new run with a lower --lr "
                       f"than {c.lr}")


# ---- B. Several GPUs, and a CUDA graph ---------------------------------------------------------------------
#
# torchrun --nproc_per_node=N train_gpt.py ... starts a process for each of N GPUs (or, to try it out, N on a
# CPU). Each takes its own micro-batches of every step, and its own rounding noise. All hold the whole model
# (DDP), or, with --shard=true, an N-th of weights, gradients and optimizer, and of the other weights a block
# at a time (FSDP2). Rank 0 prints and writes. On one GPU a step is recorded as a CUDA graph instead, which
# makes hundreds of launches one.

def check_processes():
    """UserError where the environment says only in part, or wrongly, who this process is."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    said = [os.environ.get(name, "") for name in names]
    # Alone it has none of the first two. Else it needs all, with three numbers that make sense.
    if any(said[:2]) and not (all(said) and "".join(said[:3]).isdecimal() and RANK < WORLD):
        found = ", ".join(map("=".join, zip(names, said)))
        raise UserError(f"the environment has {found}: torchrun sets them all; unset RANK and WORLD_SIZE to "
                        "train with one process")


def start_processes(device, shard):
    """Join the other processes, if there are any, on this one's GPU; only rank 0 prints."""
    if WORLD == 1:
        if shard:
            raise UserError("--shard=true needs several processes: torchrun --nproc_per_node=N "
                            "train_gpt.py ...")
        return

    # NCCL between GPUs; gloo for what is on the CPU, such as a signal's flag.
    backend = "gloo"
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs, and no GPU {local}: take a "
                            "smaller --nproc_per_node")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as e:
        raise UserError(f"cannot join the other processes: {str(e).splitlines()[0]}")
    atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")


def gather(value):
    """A picklable value of each process -> all of them, a list by rank. Waits for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def mean(t):
    """The mean of a tensor t over all processes."""
    t = t.clone()
    if WORLD > 1:
        dist.all_reduce(t.div_(WORLD))
    return t


def distribute(model, c):
    """The model -> what to call for a loss, whose backward pass averages gradients over all processes."""
    if c.shard != "true":
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Each block is gathered for its pass, and let go after it.
    mesh = dist.init_device_mesh(model.rope.device.type, (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def snapshot(model, optimizers, c):
    """-> what a checkpoint holds: weights and moments, and the generators of all processes, by rank.

    Weights and moments are whole, on a CPU, or, if they are sharded, each process has its part.
    """
    # Every process draws its own noise.
    generators = dict(cpu=torch.get_rng_state(), cuda=None)
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    whole = c.shard == "false"
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    weights, moments = get_state_dict(model, optimizers, options=options)
    return dict(model=weights, optimizer=moments, generators=gather(generators))


def restore(model, optimizers, saved, directory):
    """Undo `snapshot`. saved loses weights and moments, so that no process keeps a copy of them."""
    try:
        weights, moments = get_state_dict(model, optimizers)
        settings = [optimizer.param_groups for optimizer in optimizers]
        if "path" in saved:
            # Each process reads its part, however many have written it.
            load_parts(saved["path"], saved, dict(model=weights, optimizer=moments["state"]), together=True)
        else:
            # The optimizers' state must have the form that it has here. What is missing would stay as it is,
            # without a word.
            if form_of(saved["optimizer"]) != form_of(moments):
                raise ValueError("its optimizers hold another state")
            weights = saved.pop("model")
            moments = saved.pop("optimizer")
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
        # Settings are those of the code, whatever the file says.
        for optimizer, groups in zip(optimizers, settings):
            optimizer.param_groups = groups
        restore_noise(model, saved)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"the checkpoint of {directory} cannot be restored: {type(e).__name__}, "
                        f"{str(e).partition(chr(10))[0]}")


def restore_noise(model, saved):
    """Let the noise of this process go on where it was; or, among more or fewer processes, begin anew."""
    if saved["processes"] != WORLD:
        # No process may draw again what one of them has drawn.
        seeds = np.random.SeedSequence((saved["config"]["seed"], saved["step"], WORLD, RANK))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        return
    generators = saved["generators"][RANK]
    torch.set_rng_state(generators["cpu"])
    if model.rope.is_cuda and generators["cuda"] is not None:
        torch.cuda.set_rng_state(generators["cuda"])


def form_of(moments):
    """The parameters and the names of settings of each group, and the shape of each moment."""
    groups = [(group["params"], group.keys()) for group in moments["param_groups"]]
    return groups, {name: shapes(state) for name, state in moments["state"].items()}


# With --shard=true a checkpoint is a directory that PyTorch's distributed checkpointing writes: each process
# its part of weights and moments, in files that any number of processes can read. HEAD holds all else, and
# the sha256 of these files.

def save_parts(path, previous, record):
    """Write a checkpoint of all processes, as `save_record` does that of one."""
    # Like a file it is written under another name. All processes must see that directory.
    part = path.with_name(f"{path.name}.part")
    if not RANK:
        with writing(part):
            remove(part)
            part.mkdir()
    gather(None)
    tensors = dict(model=record["model"], optimizer=record["optimizer"]["state"])
    try:
        dcp.save(tensors, checkpoint_id=part)
    except dcp.api.CheckpointException as e:
        fault, _ = next(iter(e.failures.values()))
        raise UserError(f"cannot write {part} ({fault}): make room there, all processes must see it; then "
                        "resume the run")

    # Rank 0 collects the hashes, and gives the directory its name.
    mine = list(part.glob(f"__{RANK}_*.distcp"))
    if not RANK:
        mine.append(part / ".metadata")
    files = {}
    for hashes in gather({file.name: sha256_of(file) for file in mine}):
        files |= hashes
    if not RANK:
        save_record(part / HEAD, record | dict(model={}, optimizer={}, files=files))
        with writing(path):
            # Killed between these, a run goes on from the previous checkpoint.
            old = path.with_name("old.part")
            remove(old)
            for name, new_name in (previous, old), (path, previous), (part, path):
                if os.path.lexists(name):
                    os.replace(name, new_name)
            remove(old)
    gather(None)


def sha256_of(file):
    """That of a file, in hexadecimal."""
    return hashlib.sha256(np.memmap(file, np.uint8, "r")).hexdigest()


def load_parts(path, saved, tensors, together):
    """Fill tensors, {"model": {name: tensor}, "optimizer": ...}, from a checkpoint that is a directory.

    together: all processes call this at once, and each fills its part. UserError if the files are damaged.
    """
    def whole(names):
        return all((path / name).is_file() and sha256_of(path / name) == saved["files"][name]
                   for name in names)

    # Processes that load together share the work of checking.
    names = sorted(saved["files"])
    if together:
        good = all(gather(whole(names[RANK::WORLD])))
    else:
        good = whole(names)
    if not good:
        raise UserError(f"{path} {BROKEN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # that one process loads alone
            dcp.load(tensors, storage_reader=Parts(path, saved["files"]), no_dist=not together)
    except dcp.api.CheckpointException as e:
        fault, _ = next(iter(e.failures.values()))
        raise UserError(f"{path} {BROKEN}. ({type(fault).__name__}: {fault})")


def load_whole(path, saved, c):
    """The weights in a checkpoint that is a directory, {name: tensor}, on the CPU."""
    weights = {name: torch.empty_like(t, device="cpu") for name, t in outline(c).state_dict().items()}
    load_parts(path, saved, dict(model=weights), together=False)
    return weights


class Parts(dcp.FileSystemReader):
    """Reads what dcp.save has written. Its metadata is a pickle, which could name any function."""

    def __init__(self, path, files):
        super().__init__(path)
        self.files = files

    def read_metadata(self, *args, **kwargs):
        """What is in the files. UnpicklingError if it is not the metadata of tensors in these."""
        with open(self.path / ".metadata", "rb") as f:
            metadata = Metadata(f).load()
        # Other values than tensors would be unpickled, too.
        if not all(isinstance(value, dcp.metadata.TensorStorageMetadata)
                   for value in metadata.state_dict_metadata.values()):
            raise pickle.UnpicklingError("values that are no tensors")
        if not all(place.relative_path in self.files for place in metadata.storage_data.values()):
            raise pickle.UnpicklingError("values in other files")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Metadata(pickle.Unpickler):
    """Reads metadata of checkpoints, and nothing else."""
    names = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size", "float32"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module, name):
        if name not in self.names.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def as_graph(f, *args):
    """f(*args) of CUDA tensors, recorded -> a function of such args that replays it as one launch.

    A step is hundreds of short kernels, and Python launches them more slowly than a GPU runs them. The
    default generator is left as it was, and gives to a replay what it would give to f.
    """
    # Run it on a side stream first: this compiles, and initialises libraries.
    state = torch.cuda.get_rng_state()
    args = [a.clone() for a in args]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            f(*args)
    torch.cuda.current_stream().wait_stream(side)

    # Record it. The recording reads args where they are now, so a replay copies new ones there.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f(*args)
    torch.cuda.set_rng_state(state)

    def replay(*new):
        for a, b in zip(args, new):
            a.copy_(b)
        graph.replay()

    return replay


def pick_device(c):
    """The device that a Config means, "cuda" or "cpu"."""
    if c.device != "auto":
        return c.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_compile(c, device):
    """Whether a Config means to compile for a device."""
    if c.compile != "auto" or device == "cpu":
        return c.compile == "on"
    # torch.compile needs what our kernels need, such as a C compiler.
    lacks = quartet.load_kernels()
    if lacks:
        print(f"torch.compile needs {lacks}: slower without")
    return not lacks


def keep_freed_memory():
    """glibc hands large freed blocks back to the system; to keep them makes a CPU step 1.2 times as fast."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)           # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)       # M_TRIM_THRESHOLD


# ---- C. Comparing recipes ----------------------------------------------------------------------------------
#
# --recipe=bf16,rtn,quartet2 makes a directory with a run for each recipe, all of one seed and one order of
# data. It can be stopped and resumed as a run can, under the same conditions; what has a result is not
# repeated. compare.json keeps what it began with, start.pt the weights that --init_from named. compare.txt is
# the table.

def compare(c, data, directory, stop, saved):
    """Train each recipe of c, all else equal, and print a table. saved: what compare.json has, or None."""
    if not saved:
        if c.init_from:
            # All recipes start from the same weights, also if their source goes on training.
            path, _ = load_checkpoint(c.init_from, (*CHECKPOINTS, "."), whole=False)
            if not RANK:
                copy(path, directory / START)
            gather(None)      # rank 0 copies it, all read it
        write(directory / "compare.json", as_json(config=vars(c), **identity(data)))
    results = []
    for recipe in c.recipe.split(","):
        # Its directory stands in that of the comparison, and nowhere else.
        run = directory / recipe
        if run.is_symlink():
            raise UserError(f"{run} is a link: remove it")
        with writing(run):
            run.mkdir(exist_ok=True)
        if not os.path.lexists(run / "result.json"):
            # Train it, or go on where it stopped.
            print(f"\n==== {recipe}")
            own = dataclasses.replace(c, recipe=recipe)
            torch._dynamo.reset()
            checkpoint = None
            if find(run, CHECKPOINTS):
                # What it has saved must be of the same knobs, text and code as all the others.
                _, checkpoint = load_checkpoint(run, whole=False)
                unchanged(vars(own), checkpoint["config"], FIXED, f"{run} is no run of this comparison")
                refuse_another(checkpoint, data, run)
            try:
                with held(run):
                    train(own, data, run, stop, checkpoint)
            except Diverged as e:
                # It does not end the others. It may have a result, without a loss.
                print(e)
                if not (run / "result.json").exists():
                    write(run / "result.json", as_json(**dict.fromkeys(RESULT) | dict(recipe=recipe)))
                gather(None)      # rank 0 writes it, all read it

        # Its result may be from before.
        result = read_json(run / "result.json", RESULT)
        if result["recipe"] != recipe:
            raise UserError(f"{run / 'result.json'} is of {result['recipe']}: remove it, then resume")
        # null is what was not finite.
        results.append({key: math.nan if value is None else value for key, value in result.items()})

    # Make the table.
    base = next((r["val_loss"] for r in results if r["recipe"] == "bf16"), math.nan)
    table = "recipe        val loss  gap to bf16    tokens/s  peak GiB\n"
    for r in results:
        r["gap"] = r["val_loss"] - base
        table += "{recipe:12}{val_loss:10.4f}{gap:13.4f}{tokens_per_s:12,.0f}{peak_gib:10.2f}\n".format(**r)
    write(directory / "compare.txt", table)
    print(f"\n{table}(one seed: what differs by little may be chance; data/evidence/experiments.py pairs "
          f"seeds)\nwritten to {directory / 'compare.txt'}")

    # A table of nothing is no success.
    diverged = [r["recipe"] for r in results if math.isnan(r["val_loss"])]
    if diverged:
        raise Diverged(f"{directory}: {', '.join(diverged)} has no finite validation loss")


# ---- D. The command line -----------------------------------------------------------------------------------
#
# A mistake is refused before anything is trained, in one line that names the value and the way out. From argv
# the way goes through parse, load and check to run_training, or, to evaluate and sample, to read_out.

# What a knob can be
CHOICES = dict(backend=("auto", "torch", "triton"), compile=("auto", "on", "off"),
               device=("auto", "cpu", "cuda"), shard=("true", "false"), qk_norm=("true", "false"),
               mlp=("swiglu", "relu2"), schedule=("cosine", "wsd"), optimizer=("adamw", "muon"),
               tokenizer=("auto", "bytes", "gpt2"), gemm=("plain", "blackwell"))
BOUNDS = {int: (1, 10**12), float: (0, 1e38)}                     # of a knob that has no others
LIMITS = dict(layers=(1, 1000), seed=(0, 10**12))
LIMITS |= dict.fromkeys(["width", "hidden", "vocab_size", "sequence"], (1, 2**20))
SHARES = "bf16_end", "bf16_forward_end", "two_terms_end", "warmup", "decay", "final_lr"
LIMITS |= dict.fromkeys(SHARES, (0, 1))
# What weights are made for
SHAPE = {"layers", "width", "heads", "kv_heads", "qk_norm", "mlp", "hidden", "vocab_size", "tokenizer"}
# What a resumed run may change. (Another device changes the last bits, and it is for you to say.)
HARMLESS = {"log_every", "save_every", "device", "prompt", "sample_tokens", "temperature", "top_k"}
FIXED = Config.__annotations__.keys() - HARMLESS


def known(word, words, problem):
    """UserError, which lists words, unless word is one of them."""
    if word not in words:
        raise UserError(f"{problem}: there are {', '.join(words) or 'none'}")


def unchanged(knobs, saved, names, problem):
    """UserError if knobs differ from saved ones in one of names. It lists them."""
    others = [f"--{name}={value} (saved: {saved[name]})" for name, value in knobs.items()
              if name in names and value != saved[name]]
    if others:
        raise UserError(f"{problem}: {', '.join(others)}")


def parse(argv):
    """argv, as the docstring of this file describes it -> mode, preset or run, {knob: value}."""
    # What begins with -- is a knob, all else a word.
    types = Config.__annotations__
    words = []
    knobs = {}
    for arg in argv:
        if not arg.startswith("--"):
            words.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        known(name, types, f"unknown knob --{name}")
        if not equals:
            raise UserError(f"--{name}: write --{name}=VALUE, without a space")
        try:
            knobs[name] = types[name](value)
        except ValueError:
            raise UserError(f"--{name}={value}: it takes a value of type {types[name].__name__}")

    # The first word may be a mode. The other is a preset or a run.
    mode = "train"
    if words and words[0] in ("resume", "eval", "sample"):
        mode = words.pop(0)
    if mode == "train" and not words:
        words = ["cpu"]
        if torch.cuda.is_available() and knobs.get("device") != "cpu":
            words = ["gpu"]
    if len(words) != 1:
        what = "preset" if mode == "train" else "name of a run"
        raise UserError(f"{mode} takes one {what}, not {shlex.join(words) or 'none'}: see --help")
    return mode, words[0], knobs


def check_knobs(c):
    """UserError where a Config could not be a run's on any machine."""
    # Each knob alone
    for name, choices in CHOICES.items():
        known(getattr(c, name), choices, f"--{name}={getattr(c, name)}")
    bounds = LIMITS | dict(kv_heads=(0, c.heads), bf16_first=(0, c.layers), bf16_last=(0, c.layers))
    for name, kind in Config.__annotations__.items():
        if kind is not str:
            least, most = bounds.get(name, BOUNDS[kind])
            if not least <= getattr(c, name) <= most:
                raise UserError(f"--{name}={getattr(c, name)}: it must be from {least} to {most}")

    # Knobs together
    if not Path(c.corpus).name:
        raise UserError(f"--corpus={c.corpus}: it takes a name, such as python")
    if not c.lr and (c.embedding_lr or c.head_lr):
        raise UserError(f"--lr=0 --embedding_lr={c.embedding_lr} --head_lr={c.head_lr}: the schedule scales "
                        "these as it scales lr, which must not be 0")
    if c.width % (2 * c.heads):
        raise UserError(f"--width={c.width} --heads={c.heads}: width must be a multiple of twice the heads")
    if c.kv_heads and c.heads % c.kv_heads:
        raise UserError(f"--kv_heads={c.kv_heads} --heads={c.heads}: heads must be a multiple of kv_heads")
    if c.bf16_first + c.bf16_last >= c.layers:
        raise UserError(f"--bf16_first={c.bf16_first} --bf16_last={c.bf16_last}: no block of {c.layers} is "
                        "left for the recipe; --recipe=bf16 trains all in bf16")
    if c.schedule == "wsd" and c.warmup + c.decay > 1:
        raise UserError(f"--schedule=wsd --warmup={c.warmup} --decay={c.decay}: together more than all steps")
    if c.batch * c.sequence > 2**24:
        raise UserError(f"--batch={c.batch} --sequence={c.sequence}: more than 2^24 tokens at a time")


def check(c):
    """UserError where a Config cannot run here."""
    check_knobs(c)
    if c.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: PyTorch sees no GPU here; --device=cpu runs on the CPU")

    # A prompt from a terminal of another encoding would fail at the end of training.
    try:
        c.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: it takes text in UTF-8")

    # Every recipe must fit the shapes of the layers, which a model without memory tells.
    model = outline(c)

    # Its weights, in float32, must fit into this machine, whether training or only evaluating.
    weights = 4 * sum(p.numel() for p in model.parameters())
    if weights > memory():
        raise UserError(f"--layers={c.layers} --width={c.width} --hidden={c.hidden}: the weights take "
                        f"{weights / 1e9:,.0f} GB, and this machine has {memory() / 1e9:,.0f}")

    # Each layer must suit each recipe.
    recipes = c.recipe.split(",")
    if len({*recipes}) < len(recipes):
        raise UserError(f"--recipe={c.recipe}: each recipe once")
    for recipe in recipes:
        known(recipe, quartet.RECIPES, f"unknown recipe {recipe!r}")
        try:
            model.use_recipe(recipe, c.backend)
        except ValueError as e:
            raise UserError(f"--recipe={recipe} --backend={c.backend} --width={c.width} "
                            f"--hidden={c.hidden}: {e}")


def memory():
    """The bytes that this machine has; on Windows, which does not tell, any number."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load(mode, word, knobs):
    """What a command line means -> Config, the run's directory, what it has saved (of a new run None, None).

    RUN is a name in runs/ or a path; to resume, also that of a comparison.
    """
    if mode == "train":
        known(word, PRESETS, f"unknown preset {word!r}")
        return Config(**PRESETS[word] | knobs), None, None

    # To evaluate and sample, all but the shape of weights may change; a file will do for a run.
    fixed = SHAPE
    names = (*CHECKPOINTS, ".")
    path = None

    # To resume, hardly anything may change. A comparison has compare.json.
    if mode == "resume":
        fixed = FIXED
        names = CHECKPOINTS
        path = find(word, ["compare.json"])
    if path:
        saved = read_json(path, COMPARISON | dict(config=dict), "is damaged: the comparison cannot go on, "
                          f"but each of its runs can, resume {word}/RECIPE")
        config_in(path, saved, COMPARISON)
    else:
        path, saved = load_checkpoint(word, names, whole=mode != "resume")
        if mode != "resume":
            tell_other_code(path, saved)
    unchanged(knobs, saved["config"], fixed, "a run keeps what it began with (a new one may start from its "
              "weights, --init_from)")
    return Config(**saved["config"] | knobs), path.parent, saved


def new_directory(c, preset):
    """Make runs/NAME -> its path. A default name is unique; a given one must be free."""
    # Without a name, one is made that is new.
    name = c.name
    if not name:
        # The time, and four digits for what starts in the same second
        name = f"{preset}-{c.recipe.replace(',', '+')}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    if not re.fullmatch(r"\w[\w.+-]{,99}", name):
        raise UserError(f"--name={name!r}: it takes up to 100 letters, digits and . _ + -")

    # Make the directory.
    path = Path("runs") / name
    if os.path.lexists(path):
        state = "it has no checkpoint"
        if begun(path):
            state = "resume it"
        raise UserError(f"{path} exists: {state}, remove it, or take another --name")
    with writing(path):
        # Of two processes that come here at once, one fails.
        path.mkdir(parents=True)
    return path


def load_model(run, **knobs):
    """A run's model, for notebooks: on its device, with the forward pass of its last step -> model, Config.

    run: a name in runs/, or a path. knobs: any that `eval` takes, such as recipe=, device="cpu". UserError.
    Example: model, c = load_model("mine"); logits = model(torch.tensor([[*b"def "]]).to(model.rope.device))
    """
    model, c, _ = restored(run, knobs)
    return model, c


def restored(run, knobs):
    """-> what `load_model` returns, and the run's checkpoint."""
    c, _, saved = load("eval", run, knobs)
    # The last steps may have had another recipe than the others.
    if "recipe" not in knobs:
        c = dataclasses.replace(c, recipe=recipe_of(c, saved["step"]))
    check(c)
    # Make it, and fill it.
    quartet.GEMM = c.gemm
    model = GPT(c).to(pick_device(c))
    model.load_state_dict(saved["model"])
    # Of several recipes the first, until the caller names another.
    model.use_recipe(c.recipe.split(",")[0], c.backend)
    return model.eval(), c, saved


def fitting(model, backend):
    """The recipes that suit all layers of a model, by commas."""
    found = []
    for recipe in quartet.RECIPES:
        with contextlib.suppress(ValueError):
            model.use_recipe(recipe, backend)
            found.append(recipe)
    return ",".join(found)


def read_out(mode, run, knobs):
    """Evaluate a run by all recipes that fit, or sample by that of its last step, unless knobs name some."""
    if mode == "eval":
        # By bf16, which fits any model, to see which others do.
        model, c, saved = restored(run, dict(recipe="bf16") | knobs)
        if "recipe" not in knobs:
            c = dataclasses.replace(c, recipe=fitting(model, c.backend))
        eval_recipes(model, c, saved)
        return

    # A sample is by one recipe, and is printed as it comes.
    model, c = load_model(run, **knobs)
    known(c.recipe, quartet.RECIPES, f"--recipe={c.recipe}: one recipe samples")
    codec(c)      # an error here, where there is no tokenizer
    for piece in sample_text(model, c):
        print(piece, end="", flush=True)
    print()


def listen(stop):
    """Let SIGINT and SIGTERM append to stop, which the loop looks at; a second SIGINT ends at once."""
    def on_signal(signum, frame):
        stop.append(signum)
        # Not print, in which the signal may have come.
        os.write(2, b"\nstopping: this step, then saving\n")
        # A cluster may send SIGTERM twice, and means the same.
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def run_training(c, preset, directory, saved):
    """Train a run or a comparison, from its start or from what it has saved."""
    # A step is a whole number of micro-batches in each process.
    check(c)
    micro = WORLD * c.batch * c.sequence
    if c.tokens_per_step % micro:
        way_out = "change it, or --batch"
        batch = math.gcd(c.tokens_per_step // (WORLD * c.sequence), c.batch)
        if c.tokens_per_step % (WORLD * c.sequence) == 0:
            way_out += f"; --batch={batch} fits"
        raise UserError(f"--tokens_per_step={c.tokens_per_step}: must be a multiple of {micro}, processes x "
                        f"batch x sequence, {WORLD} x {c.batch} x {c.sequence}: {way_out}")

    # Signals from here on end the run after a step. Join the other processes.
    stop = []
    listen(stop)
    device = pick_device(c)
    start_processes(device, c.shard == "true")

    # Rank 0 reads the corpus first, since it may have to be made. The others wait: two calls of gather meet.
    if RANK:
        gather(None)
    corpus = find_corpus(c)
    data = [Shards(c, corpus, split, device) for split in ("train", "val")]
    c = dataclasses.replace(c, tokenizer=corpus.tokenizer)
    if not RANK:
        gather(None)
    try:
        codec(c)
    except UserError as e:
        print(f"without a sample: {e}")

    # Machines may have files of their own.
    mine = identity(data)
    if gather(mine) != [mine] * WORLD:
        raise UserError(f"not all processes have the same corpus {c.corpus}, or the same code: give all "
                        "machines the same")

    # Take the run's directory, or make one.
    if saved:
        refuse_another(saved, data, directory)
    fresh = directory is None
    if fresh and not RANK:
        directory = new_directory(c, preset)
    directory = gather(directory)[0]

    # Train.
    try:
        need_room(directory, c)
        with held(directory):
            if "," in c.recipe:
                compare(c, data, directory, stop, saved)
            elif saved and saved["step"] == c.steps and (directory / "result.json").exists():
                print(f"{directory} has ended: see its result.json and sample.txt")
                if read_json(directory / "result.json", RESULT)["val_loss"] is None:
                    raise Diverged(f"{directory}: its validation loss is not finite")
            else:
                train(c, data, directory, stop, saved)
    except BaseException as e:
        # If there is nothing to go on from, the name is free again. But what has diverged can be looked at.
        if fresh and not RANK and not isinstance(e, Diverged) and not begun(directory):
            shutil.rmtree(directory)
        # No bug: the user can put it right.
        if isinstance(e, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(e):
            raise UserError(f"too little memory, try a smaller --batch. {str(e).splitlines()[0]}")
        raise


def main(argv):
    """Do what the command line says."""
    # The help is this file's docstring, and the source of Config and PRESETS.
    if {"-h", "--help"} & set(argv):
        source = Path(__file__).read_text()
        print(__doc__, source[source.index("@dataclasses"):source.index("# ---- 2.")], sep="\n", end="")
        return
    # All else is a mode, a preset or a run, and knobs.
    check_processes()
    keep_freed_memory()
    mode, word, knobs = parse(argv)
    if mode in ("eval", "sample"):
        read_out(mode, word, knobs)
    else:
        c, directory, saved = load(mode, word, knobs)
        try:
            run_training(c, word, directory, saved)
        except RuntimeError as e:
            # Where a process dies, the others' connections to it break.
            if WORLD > 1 and re.search("gloo|nccl|connection", str(e), re.IGNORECASE):
                raise UserError("another process of this run has ended, see what it says; then resume")
            raise


if __name__ == "__main__":
    # A line is shown at once, also in a file. A terminal may lack letters of the sample.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
        if WORLD > 1:
            # All is written, and every process knows. As PyTorch's threads end they can abort one, and then
            # torchrun waits for it on other machines: seen once, with gloo of torch 2.14. So they do not end.
            sys.stdout.flush()
            os._exit(0)
    except UserError as e:
        sys.exit(f"train_gpt.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the lines has gone. Python is not to try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
