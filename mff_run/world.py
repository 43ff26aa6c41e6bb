"""Who a process is among those of its run: rank, device, collectives; and what it runs on."""

import contextlib
import dataclasses
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy
import PIL
import torch
import torch.distributed as dist

from mff_min.errors import UserError, printable
from mff_min.kernels import ops as kernels
from mff_run.ranks import Ranks, watch_launcher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------- processes and devices

@dataclasses.dataclass
class World:
    """Who this process is among those that torchrun started; alone, it is rank 0 of 1.

    step is what messages about a lost rank name. sum, all_gather, barrier and local_main_first wait for as
    long as another rank may save, draw or evaluate; the other collectives wait for --timeout.
    """
    rank: int
    size: int
    local_rank: int
    device: torch.device
    step: int | None = None
    patient: object = None                                              # a process group, of several ranks
    held: list = dataclasses.field(default_factory=list, compare=False)     # files that are closed at the end

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, text):
        """Print a line, on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def mean(self, values):
        """The mean of each of these floats over all ranks."""
        values = torch.tensor(values, dtype=torch.float64)              # on the CPU: goes through gloo
        if self.size > 1:
            dist.all_reduce(values)
        return (values / self.size).tolist()

    def sum(self, counts):
        """The sum of each of these ints over all ranks."""
        counts = torch.tensor(counts, dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(counts, group=self.patient)
        return counts.tolist()

    def broadcast(self, tensors):
        """Give every rank the values that rank 0 has in these tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def max(self, value):
        """The highest of all ranks' ints."""
        if self.size == 1:
            return value
        value = torch.tensor(value)                                     # on the CPU: no wait for the GPU
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def min(self, tensor):
        """The lowest of all ranks' values, element by element, on their device: nothing waits for it."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def all_gather(self, value):
        """The list of all ranks' values, which may be any plain object."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def barrier(self):
        """Wait until all ranks are here."""
        self.sum([0])

    def local_main_first(self, work):
        """work() on one process of each host, then on the others, which find its files there."""
        if self.local_rank == 0:
            result = work()
        self.barrier()
        return result if self.local_rank == 0 else work()


@contextlib.contextmanager
def start_world(device, deterministic=False, timeout=600.0):
    """The World of this process. device is "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".

    On a CPU the same work gives the same bits; on a GPU it does so with deterministic. timeout is that of
    ranks.Ranks. A process of torchrun's ends when torchrun does.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watch_launcher()
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # else PyTorch refuses matrix products
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch {torch.__version__} finds no GPU here; expected auto or "
                        f"cpu")
    rank, size, local_rank = place_among_ranks()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count()
    if kind not in ("cpu", "cuda") or index and not (index.isdecimal() and len(index) < 9
                                                          and int(index) < count):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N with N below {count}")
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    world = World(rank, size, local_rank, device)
    try:
        with contextlib.nullcontext() if size == 1 else Ranks(world, timeout) as ranks:
            world.patient = ranks and ranks.patient
            yield world
    finally:
        for file in world.held:
            file.close()


def place_among_ranks(environment=os.environ):
    """(rank, size, local rank) as torchrun set them. UserError where they are not what it sets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    words = [environment.get(name, default) for name, default in zip(names, "010", strict=True)]
    if all(word.isdecimal() for word in words):
        rank, size, local_rank = map(int, words)
        if rank < size and (size == 1 or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()):
            return rank, size, local_rank
    found = " ".join(f"{name}={printable(environment[name])}" for name in
                     (*names, "MASTER_ADDR", "MASTER_PORT") if name in environment)
    raise UserError(f"the environment has {found}; expected all that torchrun sets, or none of them: unset "
                    f"them, or torchrun --nproc-per-node=N {this_command()} ...")


WITHOUT_SRUN = 2 ** 32 - 16                                             # and above: steps of no srun -n
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")


def check_launcher(environment=os.environ):
    """Raise UserError where Slurm or MPI started this command several times, and torchrun did not.

    Each would be a run of one process. The error has told=True on all of them but the first. A job of Slurm
    that was given many tasks may run this once: only a step, which srun starts, has tasks that run.
    """
    def number(name, default=0):
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else default

    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        return
    step = number("SLURM_STEP_ID", 0 if "SLURM_STEP_NUM_TASKS" in environment else WITHOUT_SRUN)
    tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS"))
    found = [("srun", tasks if step < WITHOUT_SRUN or number("SLURM_PROCID") else 0, number("SLURM_PROCID")),
             *(("mpirun", number(f"{name}_SIZE"), number(f"{name}_RANK"))
               for name in ("OMPI_COMM_WORLD", "PMI", "MV2_COMM_WORLD")),
             ("jsrun", number("JSM_NAMESPACE_SIZE"), number("JSM_NAMESPACE_RANK")),
             ("flux", number("FLUX_JOB_SIZE"), number("FLUX_TASK_RANK")),
             ("PMIx", number("PMIX_RANK") + 1, 0)]                      # which tells no size
    launcher, size, rank = max(found, key=lambda start: start[1])
    if size < 2:
        return
    each = next(filter(None, map(number, LOCAL_SIZES)), 0) if launcher == "mpirun" else 0
    hosts = max(number("SLURM_STEP_NUM_NODES", number("SLURM_NNODES", 1)), 1)
    if each:
        hosts = math.ceil(size / each)
    else:
        each = math.ceil(size / hosts)
    several = f"--nnodes={hosts} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 " if hosts > 1 else ""
    many, one = (f"{start} {this_command()} ..." for start in
                 (f"torchrun {several}--nproc-per-node={each}", "python"))
    if launcher == "srun":
        many, one = f"srun --nodes={hosts} --ntasks={hosts} {many}", f"srun --ntasks=1 {one}"
    times = f"{size} times" + " or more" * (launcher == "PMIx")
    error = UserError(f"{launcher} started this {times}, and each would be a run of its own; expected "
                      f"one torchrun on each host: {many} (docs/running.md); or one process: {one}")
    error.told = rank > 0
    raise error


def this_command():
    """This program as `python` and torchrun take it: its path as typed, or "-m tools.evaluate"."""
    spec = sys.modules["__main__"].__spec__
    return f"-m {spec.name.removesuffix('.__main__')}" if spec else shlex.quote(sys.argv[0])


def pick_dtype(name, device):
    """The autocast type that --dtype asks for: "auto" is bfloat16 on GPUs that have it, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return DTYPES[name]


def pick_ops(name, device):
    """The Ops that --ops asks for. Raises UserError where they cannot run."""
    try:
        return kernels.load(name, device)
    except ValueError as error:
        raise UserError(str(error)) from None


def autocast(device, dtype):
    """A context in which matrix products run in dtype."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------- the run folder

def describe_environment(world):
    """Versions, device and source state, as plain values: what it takes to know what ran."""
    return dict(argv=sys.argv, time=time.strftime("%Y-%m-%d %H:%M:%S"), commit=source_commit(),
                python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__,
                pillow=PIL.__version__, platform=platform.platform(),
                device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
                world_size=world.size, cpus=os.cpu_count(), threads=torch.get_num_threads())


def source_commit():
    """The git commit that this source is at, or "unknown" outside a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):                        # no git here, or it hangs
        return "unknown"
    return git.stdout.strip() or "unknown"
