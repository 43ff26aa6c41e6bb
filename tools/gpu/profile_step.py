"""Where the time of a pre-training step of MFF_MAE goes: one mode per call, into profile_<device>.json.

    python -m tools.gpu.profile_step --batch 512 --mode eager           plain PyTorch and our kernels
    python -m tools.gpu.profile_step --batch 512 --mode compiled        the model as one graph
    python -m tools.gpu.profile_step --batch 512 --mode blocks          each block as one graph

A step is prepare, forward, backward and AdamW, on uint8 images that are on the device. Where the host takes
as long as the step, launches are the limit.

Shapes: B images, C H W, L patches.
"""

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from mff_min.vit import Block
from mff_run.files import make_folder, write_json
from mff_run.flops import datasheet_tflops, product_tflops, step_flops
from mff_run.jsonfile import read_json
from mff_run.process import run
from mff_run.world import autocast, describe_environment, pick_dtype, start_world
from tools.bench.contenders import CASES, STAGES
from tools.bench.measure import result_path

MODES = ("eager", "compiled", "blocks")
DEAREST = 30                                                            # kernels of a row


def make_step(case, batch_size, mode, device, dtype):
    """A function that takes one optimizer step of this case, and its model."""
    torch.manual_seed(0)                                                # every mode has the same loss
    contender = STAGES["pretrain"]["mff_min MFF_MAE"]
    model = contender.build(case, device)
    optimizer = contender.optimizer(model)
    if mode == "blocks":
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            block.forward = torch.compile(block.forward, dynamic=False)
    trained = torch.compile(model, dynamic=False) if mode == "compiled" else model

    side = case.img_size
    pixels = torch.randint(256, (batch_size, side, side, 3), device=device, dtype=torch.uint8)
    pixels = pixels.permute(0, 3, 1, 2)                                 # (B, C, H, W), channels last
    mean, std = torch.full((3,), 0.45, device=device), torch.full((3,), 0.22, device=device)
    noise = torch.rand(batch_size, case.num_patches, device=device)     # (B, L)

    def step():
        images = model.ops.prepare(pixels, mean, std)                   # (B, C, H, W)
        with autocast(device, dtype):
            loss = trained(images, noise, pixels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return step, model


def measure(case, batch_size, mode, device, dtype, seconds):
    """The row of one mode: times of the first step and of later ones, memory, the dearest kernels."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    step, model = make_step(case, batch_size, mode, device, dtype)
    began = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - began
    began = time.perf_counter()
    step()
    wait()
    times = max(5, int(seconds / (time.perf_counter() - began)))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    host, whole = [], []
    for _ in range(times):
        began = time.perf_counter()
        loss = step()
        host.append(time.perf_counter() - began)                        # launched, and not waited for
        wait()
        whole.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(times):                                              # as in training: the host runs ahead
        step()
    wait()
    sustained = (time.perf_counter() - began) / times
    return dict(mode=mode, batch=batch_size, dtype=str(dtype).removeprefix("torch."), first_step_s=first,
                step_ms=1e3 * sustained, step_alone_ms=1e3 * statistics.median(whole),
                host_ms=1e3 * statistics.median(host), img_per_s=batch_size / sustained, loss=loss.item(),
                peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
                flops_per_image=step_flops(model), **find_dearest(step, wait, on_gpu))


def find_dearest(step, wait, on_gpu):
    """What the profiler saw of one step: time on the device, launches, the kernels that took most of it."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as found:
        step()
        wait()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    taken = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
             for event in found.key_averages() if event.device_type == kind]
    taken.sort(reverse=True)
    dearest = [dict(ms=us / 1e3, times=count, name=name[:160]) for us, count, name in taken[:DEAREST]]
    return dict(profiled_ms=sum(us for us, *_ in taken) / 1e3, launches=sum(count for _, count, _ in taken),
                dearest=dearest)


def add_rates(row, device, dtype):
    """The row with its share of the sustained rate and of the data sheet's."""
    row["product_tflops"] = product_tflops(device, dtype)
    done = row["img_per_s"] * row["flops_per_image"] / 1e12             # TFLOP/s
    row["mfu"] = done / row["product_tflops"]
    sheet = device.type == "cuda" and datasheet_tflops(torch.cuda.get_device_name(device), dtype)
    return row | ({"mfu_datasheet": done / sheet} if sheet else {})


def lines_of(row):
    """A row as text."""
    memory = f", peak memory {row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
    sheet = f", {100 * row['mfu_datasheet']:.1f} % of the data sheet" if "mfu_datasheet" in row else ""
    yield (f"{row['mode']}, batch {row['batch']}, {row['dtype']}: {row['step_ms']:.1f} ms per step, "
           f"{row['img_per_s']:.0f} img/s, {100 * row['mfu']:.1f} % MFU of {row['product_tflops']:.3g} "
           f"TFLOP/s{sheet}{memory}")
    yield (f"first step {row['first_step_s']:.1f} s, host {row['host_ms']:.1f} ms, step alone "
           f"{row['step_alone_ms']:.1f} ms, kernels {row['profiled_ms']:.1f} ms in {row['launches']} "
           f"launches, loss {row['loss']:.4f}")
    for kernel in row["dearest"]:
        yield f"{kernel['ms']:9.3f} ms {kernel['times']:5d} x  {kernel['name']}"


def main(args):
    """Measure the mode of args, write its row in the place of an older one like it, and print it."""
    with start_world(args.device) as world:
        device, dtype = world.device, pick_dtype("auto", world.device)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        make_folder("--output-dir", args.output_dir)
        row = measure(CASES[args.case], args.batch, args.mode, device, dtype, args.seconds)
        row |= dict(case=args.case, environment=describe_environment(world))
        row = add_rates(row, device, dtype)
        path = result_path(args.output_dir, "profile", gpu)
        same = {"case": str, "batch": int, "mode": str, "dtype": str}
        rows = read_json(path, {"rows": [same]})["rows"] if path.exists() else []
        rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
        write_json(path, dict(device=gpu, rows=rows))
        world.say("\n".join(lines_of(row)) + f"\nwrote {path}")


def parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="eager", choices=MODES, help="what is compiled")
    parser.add_argument("--batch", type=int, default=512, help="images of the step")
    parser.add_argument("--case", default="vit_b", choices=list(CASES), help="size of the model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seconds", type=float, default=4.0, help="of steps that are timed, twice")
    parser.add_argument("--output-dir", default="results", help="folder of profile_<device>.json")
    return parser


if __name__ == "__main__":
    run(main, parser().parse_args())
