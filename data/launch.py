"""How steps are launched: as one CUDA graph on one GPU; by DistributedDataParallel or FSDP2 on several.

    torchrun --nproc_per_node=N train_gpt.py ... [--shard=true]

starts a process for each of N GPUs (or, to try it out, N on a CPU). Each takes its own micro-batches of every
step, and its own rounding noise. All hold the whole model, or, sharded, an N-th of weights, gradients and
optimizer, and of the other weights a block at a time. Rank 0 prints and writes. After a SIGTERM all save and
end with 0, as one does; torchrun, which passes it on, ends with 1.
"""
import atexit, contextlib, gc, math, os, platform, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import quartet

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12,
              "A100": 312e12, "B200": 2250e12}              # dense bf16, datasheets; the first in its name
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def start(device, shard):
    """Join the other processes, if there are any, on this one's GPU; only rank 0 prints."""
    if WORLD == 1 and shard:
        raise ValueError("--shard=true needs several processes, torchrun --nproc_per_node=N train_gpt.py ... "
                         "; one takes --shard=false")
    if WORLD == 1: return
    if device == "cuda": torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    if RANK: sys.stdout = open(os.devnull, "w")
def gather(value):
    """A picklable value of each process -> all of them, a list by rank. Waits for all."""
    if WORLD == 1: return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values
def mean(t):
    """t, made the mean of that tensor over all processes."""
    if WORLD > 1: dist.all_reduce(t.div_(WORLD))
    return t
def stopping(stop):
    """Whether a signal has reached any process: all must stop at the same step."""
    if WORLD == 1: return bool(stop)
    dist.all_reduce(flag := torch.tensor(len(stop)), dist.ReduceOp.MAX)
    return bool(flag)

def command():
    """What starts train_gpt.py with as many processes."""
    return "python train_gpt.py" if WORLD == 1 else f"torchrun --nproc_per_node={WORLD} train_gpt.py"

def describe(device):
    """-> the name of a device, "cuda" or "cpu", and its peak in dense bf16 FLOP/s, 0 if unknown."""
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return name, next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), 0)
def peak_memory(device, reset=False):
    """GiB at most since the last reset: taken from the GPU, or resident in RAM (on Linux; else NaN)."""
    if device == "cuda":
        if reset: gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_reserved() / 2**30     # a CUDA graph's is not "allocated"
    try:
        Path("/proc/self/clear_refs").write_text("5") if reset else None
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError): return math.nan

def wrap(model, shard, compiled):
    """train_gpt.GPT -> what to call for a loss; compiles its blocks, and shards its parameters, in place."""
    if compiled:
        for block in model.blocks:                          # they share one graph
            if shard: block.forward = torch.compile(block.forward, fullgraph=True)      # without FSDP's hooks
            else: block.compile(fullgraph=True)
        model.predict = torch.compile(model.predict, fullgraph=True)
    if shard:
        from torch.distributed.fsdp import fully_shard      # here: it takes longer to import than torch
        mesh = dist.init_device_mesh(model.rope.device.type, (WORLD,))      # not any GPU that is there
        for block in model.blocks: fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif WORLD > 1:
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model
def reduce_gradients(net, last):
    """Let whole gradients be averaged over processes in the last backward pass of a step; shards, in each."""
    if isinstance(net, DistributedDataParallel): net.require_backward_grad_sync = last
def once(model, shard):
    """quartet.quantized_weights; but where no process has whole weights, each pass quantizes them."""
    return contextlib.nullcontext() if shard else quartet.quantized_weights(model)

def whole(t):
    """t, or the tensor that it is a shard of: then all processes take part."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
def snapshot(model, optimizer):
    """-> what a checkpoint holds of them, as one process has them, and all processes' generators, by rank."""
    def kept(t):
        t = whole(t)
        return None if RANK else t.cpu() if isinstance(t, torch.Tensor) else t
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return dict(model=tree_map(kept, model.state_dict()), optimizer=tree_map(kept, optimizer.state_dict()),
                rng=gather(dict(cpu=torch.get_rng_state(), cuda=cuda)))
def restore(model, optimizer, saved, seed):
    """The inverse of `snapshot`, which empties it; where there were other processes, noise has new seeds."""
    def part(t, p):
        if not hasattr(p, "full_tensor") or t.shape != p.shape: return t
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
    params, order = dict(model.named_parameters()), [p for g in optimizer.param_groups for p in g["params"]]
    model.load_state_dict({name: part(t, params[name]) for name, t in saved["model"].items()})
    state = {i: {k: part(t, order[i]) for k, t in s.items()} for i, s in saved["optimizer"]["state"].items()}
    optimizer.load_state_dict(saved["optimizer"] | dict(state=state))
    rng, step = saved["rng"], saved["step"]
    saved.clear()                               # each process would hold a copy of all that in RAM to the end
    if len(rng) != WORLD: return torch.manual_seed((seed << 20) + step * WORLD + RANK)
    torch.set_rng_state(rng[RANK]["cpu"])
    if model.rope.is_cuda and rng[RANK]["cuda"] is not None: torch.cuda.set_rng_state(rng[RANK]["cuda"])

def as_graph(f, *args):
    """f(*args) of CUDA tensors, recorded -> a function of such args that replays it as one launch.

    A step is hundreds of short kernels, and Python launches them more slowly than a GPU runs them. The
    default generator is left as it was, and gives to a replay what it would give to f.
    """
    state, args, side = torch.cuda.get_rng_state(), [a.detach().clone() for a in args], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2): f(*args)  # compile, and initialise libraries
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): f(*args)
    torch.cuda.set_rng_state(state)
    def replay(*new):
        for a, b in zip(args, new): a.copy_(b)
        graph.replay()
    return replay
