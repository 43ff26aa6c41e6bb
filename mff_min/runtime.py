"""What every stage needs around its loop: processes, the run folder, checkpoints, log, progress line, exits.

A run is a folder: config.json, env.json, log.jsonl, last.pt and previous.pt, encoder.pt, pictures, run.lock.
How they are written, so that no fault leaves half a file, and found again is saving.py.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import PIL
import torch
import torch.distributed as dist

import kernels
from mff_min import saving
from mff_min.config import UserError, check_reachable
from mff_min.progress import amount
from mff_min.ranks import Lost, Ranks, watch_launcher
from mff_min.sharded import gathered, local

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Fault(Exception):
    """Something went wrong in a run that had started well. The stage ends with this text and exit code 3."""


class Stopped(Exception):
    """Signal n asked a run to stop, and its state is saved. The stage ends with exit code 128 + n."""

    def __init__(self, number, step, stop, folder):
        super().__init__(f"signal {number} at step {step} of {stop}, which is saved in {folder}: "
                         f"--resume auto goes on from there")
        self.number = number


# ---------------------------------------------------------------- processes and devices

@dataclasses.dataclass
class World:
    """Who this process is among those that torchrun started; alone, it is rank 0 of 1.

    step is what messages about a lost rank name. total, gather, meet and local_main_first wait for as long as
    another rank may save, draw or evaluate, the others for --timeout.
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

    def total(self, counts):
        """The sum of each of these ints over all ranks."""
        counts = torch.tensor(counts, dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(counts, group=self.patient)
        return counts.tolist()

    def share(self, tensors):
        """Give every rank the values that rank 0 has in these tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def highest(self, value):
        """The highest of all ranks' ints."""
        if self.size == 1:
            return value
        value = torch.tensor(value)                                     # on the CPU: no wait for the GPU
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def lowest(self, tensor):
        """The lowest of all ranks' values, element by element, on their device: nothing waits for it."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def gather(self, value):
        """The list of all ranks' values, which may be any plain object."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def meet(self):
        """Wait until all ranks are here."""
        self.total([0])

    def local_main_first(self, work):
        """work() on one process of each host, then on the others, which find its files there."""
        if self.local_rank == 0:
            result = work()
        self.meet()
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
    rank, size, local_rank = (int(os.environ.get(key, default)) for key, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count()
    if kind not in ("cpu", "cuda") or index and not (index.isdecimal() and int(index) < count):
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


# ---------------------------------------------------------------- checkpoints

def save_run(folder, world, model, step, hint, **state):
    """Write last.pt, all that a run needs to go on from this step, on rank 0; all ranks call this together.

    state holds RUN_STATE's other entries and what else the stage needs. What is sharded is written whole.
    Raises Fault on every rank, with the hint, where a weight is not finite.
    """
    broken = not all(local(parameter).isfinite().all() for parameter in model.parameters())
    if world.highest(int(broken)):
        raise Fault(f"weights are not finite at step {step} and are not saved; {hint}")
    state = gathered({"model": model.state_dict(), "step": step, **state}, world.is_main)
    if world.is_main:
        saving.save_checkpoint(folder, state)
    world.meet()                                                        # a save may outlast --timeout


def resumed_state(cfg, world):
    """The state that a stage goes on from, the same on all ranks, or None for a new run.

    From here on the folder, if there is one, is this run's alone. The state's "path" is where it comes from.
    Raises UserError where the folder is another's, or the run would go on with other settings.
    """
    claim(cfg.output_dir, world)
    state = None
    if cfg.resume:
        state = saving.find_checkpoint(cfg.output_dir, cfg.resume, world.say)
    elif saving.checkpoints_in(cfg.output_dir):
        raise UserError(already_a_run(cfg))
    if state:
        check_same_settings(cfg, state["config"])
    if len(set(world.gather(state["step"] if state else 0))) > 1:
        raise UserError(f"the processes would resume from different steps: --output-dir {cfg.output_dir} "
                        f"must be one folder that all hosts see")
    return state


def claim(folder, world):
    """Keep a run folder, where there is one, to this run until it ends. UserError where another has it."""
    check_reachable("--output-dir", folder)
    if world.is_main and os.path.isdir(folder):
        try:
            world.held.append(saving.lock(folder, world.say))
        except OSError as error:
            raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None


def settings_of_result(cfg):
    """The names of a configuration's settings that change the result."""
    return [field.name for field in dataclasses.fields(cfg) if field.metadata["changes_result"]]


def already_a_run(cfg):
    """What to say of a folder that holds a run already, with what differs from its settings."""
    changes = []
    with contextlib.suppress(OSError, ValueError):
        saved = json.loads((Path(cfg.output_dir) / "config.json").read_text())
        changes = saving.changed_settings(saved, dataclasses.asdict(cfg), settings_of_result(cfg))
    table = f", of other settings:\n{saving.table_of(changes)}\n" if changes else ": "
    return (f"{cfg.output_dir} already holds a run{table}add --resume auto to go on with it, or name another "
            f"--output-dir")


def check_same_settings(cfg, saved, data=()):
    """Raise UserError when a resumed run would go on with other settings than it began with, and show them.

    saved is the checkpoint's config; data is what check_same_data found. --allow-change names, separated by
    commas, those that may differ.
    """
    known = settings_of_result(cfg)
    allowed = [name.strip().replace("-", "_") for name in cfg.allow_change.split(",") if name.strip()]
    for name in allowed:
        if name not in known:
            raise UserError(f"--allow-change {name}: expected names of settings, such as {known[0]}")
    changes = [change for change in (*saving.changed_settings(saved, dataclasses.asdict(cfg), known), *data)
               if change[0] not in allowed]
    if changes:
        names = ",".join(dict.fromkeys(name for name, *_ in changes))
        raise UserError(f"the run to resume began with other settings:\n{saving.table_of(changes)}\n"
                        f"give the same flags again, or --allow-change {names}")


def check_same_data(cfg, state, seen):
    """Raise UserError when a resumed run would go on with other images; seen is their fingerprint."""
    if not state or "data" not in state or torch.equal(state["data"], seen):
        return
    saved, now = (set(images.tolist()) for images in (state["data"], seen))
    changed = ("data", f"{len(state['data'])} images",
               f"{len(seen)} images (+{len(now - saved)} -{len(saved - now)})")
    check_same_settings(cfg, state["config"], [changed])


def load_state(model, state, origin):
    """Load parameters by name. UserError names the first that differ."""
    own = model.state_dict()
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{origin} holds more than tensors: expected parameters by name")
    problems = [f"{name} has shape {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
                for name in own if name in state and state[name].shape != own[name].shape]
    problems += [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unknown here" for name in state if name not in own]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{origin} is of another model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)


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
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:                                           # no git on this machine
        return "unknown"
    return git.stdout.strip() or "unknown"


def open_folder(cfg, world, state=None):
    """Make the run folder and write config.json and env.json into it. Raises UserError where it cannot.

    state is what the run goes on from: what is newer in the folder is set aside.
    """
    folder = Path(cfg.output_dir)
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not world.held:
                claim(folder, world)
            for leftover in folder.glob("*.tmp.*"):                     # of a process killed while writing
                leftover.unlink()
            if state:
                saving.set_newer_aside(folder, state["path"], world.say)
            saving.write_json(folder / "config.json", dataclasses.asdict(cfg))
            saving.write_json(folder / "env.json", describe_environment(world))
        except OSError as error:
            raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    world.meet()                                                        # it exists now
    return folder


def warn_of_space(folder, world, model, copies):
    """Say so where the disk has no room for two checkpoints, each so many times as large as the model."""
    need = 2 * copies * sum(value.numel() * value.element_size() for value in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < need:
        world.say(f"warning: {free / 1e9:.1f} GB are free in {folder}, and two checkpoints take "
                  f"{need / 1e9:.1f} GB")


class Log:
    """log.jsonl, one JSON object a line, written by rank 0. A resumed run drops the lines after its step.

    evaluated says whether the evaluation at that step is among the others.
    """

    def __init__(self, folder, world, step):
        self.path, self.is_main = Path(folder) / "log.jsonl", world.is_main
        lines = read_log(self.path) if step > 0 else []
        # "done" marks the last line of a finished run: one that goes on writes it anew.
        kept = [line for line in lines if line["step"] <= step and "done" not in line]
        self.evaluated = any(line["step"] == step and "acc1" in line for line in kept)
        if self.is_main:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            saving.write_atomically(self.path, lambda file: file.write(text.encode()))

    def write(self, **values):
        """Append one line; values are plain numbers, lists or text and hold at least step."""
        if self.is_main:
            saving.append_line(self.path, values)


def read_log(path, say=lambda text: None):
    """The lines of a log.jsonl as dicts; a line that a crash tore is skipped, and a missing file has none.

    say(text) is told the number of a line that is skipped.
    """
    if not Path(path).exists():
        return []
    lines = []
    for number, text in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        line = None
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
        if isinstance(line, dict):
            lines.append(line)
        else:
            say(f"warning: line {number} of {path} is torn and is left out")
    return lines


class BadSamples:
    """The files that could not be read: counted, warned about, and each named once in bad_samples.jsonl.

    The file names the first MOST_NAMED of them.
    """

    MOST_NAMED = 10_000

    def __init__(self, folder, world, num_samples, max_bad):
        self.path, self.world = Path(folder) / "bad_samples.jsonl", world
        self.num_samples, self.max_bad = num_samples, max_bad
        self.seen = {line["name"] for line in read_log(self.path)}      # named before this run was resumed
        self.new = {}

    def add(self, entries):
        """Note a batch's (name, reason) pairs."""
        self.new.update((name, reason) for name, reason in entries if name not in self.seen)

    def report(self, say=print):
        """Agree among ranks on what is new, write it down and say so.

        Raises Fault when more than max_bad of the samples are bad.
        """
        new = {name: reason for found in self.world.gather(self.new) for name, reason in found.items()}
        self.new, first, left = {}, not self.seen, max(self.MOST_NAMED - len(self.seen), 0)
        self.seen.update(new)
        if not new:
            return
        if self.world.is_main:
            for name, reason in sorted(new.items())[:left]:
                saving.append_line(self.path, dict(name=name, reason=reason))
            name = min(new)
            example = f", {json.dumps(name)} for one ({new[name]}); {self.path} names them" * first
            say(f"warning: {len(self.seen)} of {self.num_samples} images cannot be read and are replaced "
                f"by others{example}")
        if len(self.seen) > self.max_bad * self.num_samples:
            raise Fault(f"{len(self.seen)} of {self.num_samples} images cannot be read, more than --max-bad "
                        f"{self.max_bad} allows; {self.path} names them")


# ---------------------------------------------------------------- the way in and out

class StopSignals:
    """Between start and release, SIGTERM, SIGINT and SIGUSR1 are only noted, for the loop to end its step.

    Before and after there is nothing to save: they end the process at once, as a second SIGINT always does.
    """

    def __init__(self):
        self.number, self.old = 0, {}                                   # the first signal received; 0 is none

    def note(self, number, frame):
        if number == signal.SIGINT and self.number:
            raise KeyboardInterrupt
        if not self.number:
            os.write(2, b"\nstopping as soon as the state is saved; Ctrl-C again stops at once\n")
        self.number = self.number or number

    def start(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.old[number] = signal.signal(number, self.note)

    def release(self):
        while self.old:
            signal.signal(*self.old.popitem())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


def run(main, cfg):
    """main(cfg) as a process: bad input ends in one line and code 2, a fault in 3, a signal n in 128 + n.

    Any other error ends in Python's traceback and code 1. However main ends, so do the processes it started.
    """
    resumable = hasattr(cfg, "resume")
    try:
        main(cfg)
    except (UserError, Fault, Lost) as error:
        leave(error, f"error: {own_words(error)}", 2 if isinstance(error, UserError) else 3)
    except Stopped as error:
        leave(error, f"stopped: {error}", 128 + error.number)
    except (RuntimeError, EOFError, OSError) as error:
        text = advice(error, cfg)
        if not text and isinstance(error, OSError):                     # a full disk, a folder that went away
            text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            text += "; what was saved before is whole" + ", and --resume auto goes on from there" * resumable
        if not text:
            raise
        leave(error, f"error: {text}", 3)
    except KeyboardInterrupt as error:
        hint = "; --resume auto goes on from the last checkpoint, if there is one" * resumable
        text = f"stopped: interrupted{hint}"
        leave(error, text, 130)
    finally:
        end_children()


def own_words(error):
    """The text of an error, without the traceback that one of a worker process comes with."""
    text = str(error).strip()
    if text.startswith("Caught "):
        return text.splitlines()[-1].partition(f"{type(error).__name__}: ")[2]
    return text


def leave(error, text, code):
    """Print why to stderr, unless another rank has done so of this error, and end the process.

    error is None where nothing was raised.
    """
    sys.stdout.flush()
    if not getattr(error, "told", False):
        print("\n" * sys.stdout.isatty() + text, file=sys.stderr, flush=True)     # below the progress line
    raise SystemExit(code)


def end_children():
    """Kill what this process has started: Python's exit waits for that, and workers ignore SIGTERM."""
    if children := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                   # PyTorch's raises at a killed worker
        for child in children:
            child.kill()


def shared_memory(needs):
    """What to say where /dev/shm, which holds the batches that workers hand over, is too small for needs."""
    space = shutil.disk_usage("/dev/shm")
    return (f"/dev/shm has {amount(space.total)}, {amount(space.free)} free, and {needs}: expected a larger "
            f"one (of a container: --shm-size or --ipc=host), fewer --workers or a smaller --batch-size")


def advice(error, cfg):
    """What to try where PyTorch ran out of memory or lost a loader's process; "" for any other error."""
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, EOFError | ConnectionError):
        reason = "DataLoader worker ended without a word"
    if reason.startswith("DataLoader"):
        text = reason.rstrip(". ")
        if "Bus error" in text and hasattr(cfg, "batch_size"):          # perhaps of memory that is not there
            return f"{text}; {shared_memory(f'a batch takes {cfg.batch_size} images')}"
        return f"{text}; fewer --workers may help, or --workers 0, which shows a loader's own error"
    on_cpu = "DefaultCPUAllocator" in reason
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
        return ""
    text, half = f"out of {'' if on_cpu else 'GPU '}memory", getattr(cfg, "batch_size", 0) // 2
    if not half or not hasattr(cfg, "global_batch"):
        return f"{text}: {reason}"
    together = half * int(os.environ.get("WORLD_SIZE", 1))
    text += (f" at --batch-size {cfg.batch_size}: try --batch-size {half} with --global-batch "
             f"{cfg.global_batch} as it is: {cfg.global_batch // together} micro-batches a step instead of "
             f"{cfg.global_batch // (2 * together)}")
    if not getattr(cfg, "grad_checkpointing", True):
        text += ", or --grad-checkpointing"
    field, = (field for field in dataclasses.fields(cfg) if field.name == "batch_size")
    return text + ("; that changes the result, so it takes --allow-change batch_size to resume"
                   if field.metadata["changes_result"] else "")
