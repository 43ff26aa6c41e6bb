"""One step of each stage, ours beside its peers': images per second, MFU, peak memory; and waiting for data.

A step is forward, backward and the optimizer's, on images that are normalised and on the device already. MFU
is the work that the method needs, counted on our model, whose encoder sees visible tokens alone, over the
time that it took and the sustained rate of a plain matrix product of the same type, which is measured before
and after the group: a peer that computes more has a lower MFU. mfu_datasheet is the same over the data-sheet
rate of a GPU whose name is known, for comparison with papers.
"""

import contextlib
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

from mff_min.errors import UserError
from mff_run.flops import datasheet_tflops, product_tflops
from mff_run.world import DTYPES, autocast, start_world
from tools.bench import data
from tools.bench.contenders import BASELINES, CASES, STAGES, check_equal, fingerprint, make_inputs, step_flops
from tools.bench.measure import (
    FAILURES,
    Budget,
    NotRun,
    Record,
    in_rounds,
    need,
    reason_of,
    show_group,
    stopwatch,
    timed_row,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- a group: one stage at one size

class Stepper:
    """A contender's step, in a type: forward, backward, update."""

    def __init__(self, module, compiled, optimizer, inputs, device, dtype):
        self.module, self.optimizer, self.inputs = module, optimizer, inputs
        self.forward = torch.compile(module, dynamic=False) if compiled else module
        self.device, self.dtype = device, DTYPES[dtype]

    def __call__(self):
        try:
            with autocast(self.device, self.dtype):
                loss = self.forward(*self.inputs)
            loss.backward()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()                                  # others need the memory

    def peak_bytes(self):
        """GPU memory that this contender alone needs for a step; the optimizer's state exists."""
        state = [x for values in self.optimizer.state.values() for x in values.values()
                 if isinstance(x, torch.Tensor)]
        own = [*self.module.parameters(), *self.module.buffers(), *state]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + sum(x.nbytes for x in own)


def keys_of(stage, options):
    """The keys of a group, (name, dtype, mode), in their order: what has to be compiled is last."""
    modes = ["eager"] + ["compiled"] * options.compile
    return [(who, dtype, mode)
            for mode, dtype, who in itertools.product(modes, options.dtypes, STAGES[stage])]


def enter(stage, case, inputs, options, budget, device):
    """({key: Stepper}, {key: reason} of those who do not take part, {name: fingerprint}) of one group.

    The first contender is ours, and the others have to do its work.
    """
    slow, (ours, *_) = slow_dtypes(options.dtypes, device), STAGES[stage]
    steppers, reasons, modules, prints = {}, {}, {}, {}
    for who, contender in STAGES[stage].items():
        keys = [key for key in keys_of(stage, options) if key[0] == who]
        reasons |= {key: slow[key[1]] for key in keys if key[1] in slow}
        try:
            need(contender.package)
            budget.check()
            if contender.adapt and ours not in prints:
                raise NotRun(f"{ours} was not run: nothing to compare with")
            torch.manual_seed(0)
            modules[who] = contender.build(case, device)
            if contender.adapt:
                contender.adapt(modules[who], modules[ours])
            prints[who] = fingerprint(modules[who], stage, inputs)
            if contender.adapt:
                check_equal(prints[who], prints[ours])
        except FAILURES as problem:
            reasons = dict.fromkeys(keys, reason_of(problem)) | reasons
            continue
        optimizer = contender.optimizer(modules[who])
        for key in keys:
            if key not in reasons:
                steppers[key] = Stepper(modules[who], key[2] == "compiled", optimizer, inputs, device, key[1])
    return {key: steppers[key] for key in keys_of(stage, options) if key in steppers}, reasons, prints


def start_afresh(compiles):
    """Forget what was compiled, and free the memory of those before."""
    if compiles:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()                                            # nothing, without a GPU


def bench_group(stage, name, options, budget, world):
    """The group of a stage and a case: its rows, and what they share."""
    case, device = CASES[name], world.device
    batch = options.batch or case.batch(device)
    start_afresh(options.compile)
    inputs = make_inputs(stage, case, batch, device)
    steppers, reasons, prints = enter(stage, case, inputs, options, budget, device)
    samples = {key: stopwatch(stepper, device) for key, stepper in steppers.items()}
    title = f"{stage} {name}, {case.img_size} px, batch {batch}"
    text = f"{title}: {len(steppers)} contenders"
    compiled = [key for key in steppers if key[2] == "compiled" or device.type == "cuda"]   # by Triton
    multiplied = [dtype for dtype in options.dtypes if any(key[1] == dtype for key in steppers)]
    before = product_rates(multiplied, device)
    seconds, left_out = in_rounds(samples, options.rounds, budget, world, text, compiled)
    after = product_rates(multiplied if seconds else [], device)

    ours, *_ = STAGES[stage]
    flops = {who: step_flops(stage, case, contender) for who, contender in STAGES[stage].items()
             if seconds and not contender.adapt}
    rates = {dtype: mean((before[dtype], after[dtype])) for dtype in before.keys() & after.keys()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    sheets = {dtype: datasheet_tflops(gpu, DTYPES[dtype]) for dtype in options.dtypes}
    baseline = next((key for key in ((who, options.dtypes[0], "eager") for who in (BASELINES[stage], ours))
                     if key in seconds), None)
    rows = []
    for key in keys_of(stage, options):
        who, dtype, mode = key
        row = {"name": who, "dtype": dtype, "mode": mode}
        if key in seconds:
            row |= timed_row(seconds[key], batch, seconds.get(baseline), seconds.get((ours, dtype, mode)))
            row |= {"loss": prints[who][0], "trained_values": prints[who][1]}
            peaks = {"mfu": rates.get(dtype), "mfu_datasheet": sheets[dtype] and 1e12 * sheets[dtype]}
            row |= {share: row["img_per_s"] * flops.get(who, flops[ours]) / peak
                    for share, peak in peaks.items() if peak}
            if device.type == "cuda":
                row |= peak_on_gpu(steppers[key])
        else:
            row["not_run"] = reasons.get(key) or left_out[key]
        rows.append(row)
    return {"name": title, "stage": stage, "case": name, "model": case.model, "img_size": case.img_size,
            "patch_size": case.patch_size, "decoder": case.decoder, "batch": batch,
            "rounds": max(map(len, seconds.values()), default=0), "baseline": " ".join(baseline or ()),
            "flops_per_image": flops, "product_flops_per_s": rates, "rows": rows}


def product_rates(dtypes, device):
    """{dtype: FLOP/s of a plain product}; none after a contender has broken CUDA, which then fails always."""
    try:
        return {dtype: 1e12 * product_tflops(device, DTYPES[dtype]) for dtype in dtypes}
    except FAILURES:
        return {}


def peak_on_gpu(stepper):
    """{"peak_bytes"} of a Stepper's step, or why there is none."""
    try:
        return {"peak_bytes": stepper.peak_bytes()}
    except FAILURES as problem:
        return {"peak_not_run": reason_of(problem)}


def slow_dtypes(dtypes, device):
    """{dtype: reason} of the types that a CPU has no instructions for: their steps would take minutes."""
    if device.type != "cpu":
        return {}
    rates = {dtype: 1e3 * product_tflops(device, DTYPES[dtype], side=256, seconds=0.02)
             for dtype in dict.fromkeys(("float32", *dtypes))}
    return {dtype: f"this CPU multiplies no {dtype}: {rate:.1f} GFLOP/s, {rates['float32']:.1f} in float32"
            for dtype, rate in rates.items() if rate < rates["float32"] / 4}


# ---- peak memory on a CPU: a process for each contender

def peak(args):
    """Do two steps of one contender and print the peak of this process's memory, as JSON."""
    torch.set_num_threads(args.threads)
    case, device = CASES[args.case], torch.device("cpu")
    contender = STAGES[args.stage][args.name]
    module = contender.build(case, device)
    before = resident()
    inputs = make_inputs(args.stage, case, args.batch, device)
    step = Stepper(module, False, contender.optimizer(module), inputs, device, args.dtype)
    for _ in range(2):                                                  # the second has the optimizer's state
        step()
    print(json.dumps({"peak_bytes": resident(), "before_bytes": before}))


def resident():
    """Peak resident bytes of this process."""
    try:
        # Not getrusage, if there is a choice: it begins with what the parent had when it started this.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def add_peaks(group, budget, threads):
    """Fill in peak_bytes of a group's rows, each from a process of its own, or why there is none."""
    for row in group["rows"]:
        if "not_run" in row:
            continue
        command = [sys.executable, "-m", "tools.bench", "peak", "--stage", group["stage"], "--case",
                   group["case"], "--name", row["name"], "--dtype", row["dtype"], "--batch",
                   str(group["batch"]), "--threads", str(threads)]
        try:
            budget.check()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=budget.left)
            if done.returncode:
                raise NotRun(f"its process ended with code {done.returncode}: "
                             f"{(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
            row |= json.loads(done.stdout.splitlines()[-1])
        except (NotRun, subprocess.TimeoutExpired) as problem:
            row["peak_not_run"] = str(problem) if isinstance(problem, NotRun) else "its time was over"


# ---- waiting for data

def bench_waiting(name, options, budget, world):
    """The share of a pre-training loop's time that it waits for images, for each way to load them.

    Each loader runs alone, since it would fill its buffer while another is timed; the first half of the time
    only empties it. The step is compiled wherever compiling is measured.
    """
    case, device, dtype = CASES[name], world.device, options.dtypes[0]
    batch, mode = options.batch or case.batch(device), "compiled" if options.compile else "eager"
    slow = slow_dtypes([dtype], device)
    title = f"waiting for data, pretrain {name}, batch {batch}, {options.workers} workers"
    start_afresh(options.compile)
    rows, steps = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data.draw_jpegs(Path(folder), options.images)
        for who, load in data.LOADERS.items():
            row = {"name": who, "dtype": dtype, "mode": mode}
            model = BASELINES["pretrain"] if who == "torchvision" else "mff_min MFF_MAE"
            try:
                need(STAGES["pretrain"][model].package)
                budget.check()
                if slow:
                    raise NotRun(slow[dtype])
                if model not in steps:                                  # compiled once for all its loaders
                    steps[model] = pretraining_step(model, case, mode, device, dtype)
                with contextlib.closing(load(Path(folder), case, batch, options.workers, device)) as batches:
                    row |= waiting(steps[model], batches, budget, len(data.LOADERS) - len(rows), batch)
            except FAILURES as problem:
                row["not_run"] = reason_of(problem)
            rows.append(row)
    return {"name": title, "stage": "waiting", "case": name, "batch": batch, "workers": options.workers,
            "rows": rows}


def pretraining_step(name, case, mode, device, dtype):
    """A contender's Stepper in pre-training, without inputs."""
    contender = STAGES["pretrain"][name]
    module = contender.build(case, device)
    return Stepper(module, mode == "compiled", contender.optimizer(module), None, device, dtype)


LOOP_SECONDS = 20.0                                                     # of a loop, at most


def waiting(step, batches, budget, parts, batch):
    """{"data_wait", "img_per_s", ...} of the second half of a loop's time, after a step that warms up.

    Its time is one of so many parts of what the warming up leaves of the budget. As in training, a GPU is
    asked for a step while it does the one before: what is waited for while it has work left is not lost.
    """
    queued = torch.cuda.Event() if step.device.type == "cuda" else None
    wait = torch.cuda.synchronize if queued else lambda: None
    step.inputs = next(batches)
    step()                                                              # compiles
    wait()
    limit = Budget(min(LOOP_SECONDS, budget.share(parts).seconds))
    waited, count, began = 0.0, 0, None
    while not count or limit.left > 0:
        if began is None and limit.left <= limit.seconds / 2:
            wait()
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        if queued:
            queued.record()
        step.inputs = next(batches)
        if not queued or queued.query():
            waited += time.perf_counter() - asked
        step()
        count += began is not None
    wait()
    total = time.perf_counter() - began
    return {"median": total / count, "img_per_s": count * batch / total, "data_wait": waited / total,
            "steps": count}


# ---- the subject

def plan(options, device):
    """The groups, (stage or "waiting", case), in their order; fills in flags that depend on the device.

    What matters most comes first: small sizes on a CPU, whose steps take seconds, and on a GPU the size that
    the figures are quoted for, in bfloat16, and whether its loaders keep up.
    """
    on_gpu = device.type == "cuda"
    options.compile = options.compile or on_gpu
    options.dtypes = options.dtypes or (["bfloat16", "float32"] if on_gpu else ["float32", "bfloat16"])
    options.cases = options.cases or (["vit_b", "vit_s", "small"] if on_gpu else ["small", "vit_s", "vit_b"])
    for kind, names, known in (("--cases", options.cases, CASES), ("--stages", options.stages, STAGES),
                               ("--dtypes", options.dtypes, DTYPES)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{kind} {unknown[0]}: expected some of {','.join(known)}")
    groups = [(stage, name) for name in options.cases for stage in options.stages]
    if options.waiting:
        groups.insert(1 if on_gpu else len(groups), ("waiting", options.cases[0 if on_gpu else -1]))
    return groups


def bench_step(args):
    """Every stage at every size that was asked for, into step_<device>.json."""
    with start_world(args.device) as world:
        on_gpu = world.device.type == "cuda"
        threads = args.threads or os.cpu_count()
        torch.set_num_threads(threads)
        groups = plan(args, world.device)
        record = Record("step", args.output_dir, world, rounds=args.rounds, minutes=args.minutes)
        budget = Budget(60 * args.minutes)
        for i, (stage, name) in enumerate(groups):
            # Compiling takes most of a group's time on a GPU: a fair share would not compile a group's half.
            share = budget.share(min(len(groups) - i, 1.5 if on_gpu else len(groups)))
            if stage == "waiting":
                group = bench_waiting(name, args, share, world)
            else:
                for_memory = args.peaks and not on_gpu
                timing = Budget(0.7 * share.seconds) if for_memory else share
                group = bench_group(stage, name, args, timing, world)
                if for_memory:
                    add_peaks(group, share, threads)
            record.add(group)
            world.say("\n".join(show_group(group)))
        world.say(f"\nwrote {record.path}")
