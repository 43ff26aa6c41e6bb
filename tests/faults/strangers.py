"""Promise 10: files of strangers run no code, take no memory that they have not, and forge no line.

Planted code makes a file, the marker. That each planted file would do so is shown first, by loading it as
pickles are loaded.
"""

import argparse
import collections
import functools
import io
import json
import os
import pickle
import pkgutil
import random
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import safetensors.torch
import torch
from faults.evaluation import ready, rewrite
from faults.files import MEGABYTE, is_clean, memory
from faults.suite import Fault, Guard, Outcome, Tally, fork, many, stage
from PIL import Image

from mff_data import packed
from mff_data.sources import open_data, subset
from mff_min.config import parse
from mff_min.errors import UserError
from mff_run import files, torchfile
from mff_run.process import run
from mff_weights.checkpoint import read_weights
from tools import convert, evaluate, features

MOST_MEMORY = 50 * MEGABYTE


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def small_state():
    """Weights of a small encoder by timm's names."""
    return torch.load(ready() / "pretrain" / "encoder.pt", weights_only=True)["model"]


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(members, compression=zipfile.ZIP_STORED):
    """A zip archive of these (name, bytes)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings(action="ignore"):
        for name, content in members:                                   # which may come twice
            archive.writestr(name, content)
    return file.getvalue()


def members(file):
    """[(name, bytes)] of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def readers(path, to):
    """{name: work for fork} of all that reads a checkpoint, and writes into a folder."""
    to.mkdir(exist_ok=True)

    def script(module, *words):
        return lambda: run(module.main, parse(module.Config, list(map(str, words))))
    return {
        "--resume": stage("pretrain", to / "a", "--resume", path),
        "--init-from": stage("pretrain", to / "b", "--init-from", path, "--steps", 1),
        "probe --checkpoint": stage("probe", to / "c", "--checkpoint", path, "--steps", 1),
        "tools.evaluate": script(evaluate, "--checkpoint", path, "--data", "shapes:60", "--device", "cpu",
                                 "--output-dir", to / "d", "--cache-dir", ready() / "cache"),
        "tools.convert": script(convert, path, to / "e.pt"),
        "tools.features": script(features, path, "shapes:20", to / "f.npy", "--cache-dir", ready() / "cache"),
    }


def refused(end, *parts):
    """What is wrong with how a process ended that was to refuse a file, in a line that has these parts."""
    absent = [part for part in parts if part not in end.last]
    whole = end.code == 2 and end.last.startswith("error: ") and is_clean(end.said) and not absent
    if whole and "weights_only" not in end.said and "Traceback" not in end.said:
        return ""
    return f"code {end.code}, {end.said[-300:]!r}"


# ---------------------------------------------------------------- planted code


def planted(marker):
    """{name of a file: (its bytes, what loads it as pickles are loaded)}, which make the marker."""
    call = Call(os.mkdir, str(marker))
    state = {"model": {"patch_embed.proj.weight": torch.zeros(4), "evil": call}, "config": call}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:                # what PyTorch wrote before 0.1.10
        for name, value in (("storages", 0), ("tensors", 0), ("pickle", call)):
            entry, body = tarfile.TarInfo(name), pickle.dumps(value, 2)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    twice = [*members(saved(small_state())), ("archive/data.pkl", pickle.dumps(call, 2))]
    array = io.BytesIO()
    np.savez(array, header=np.array([call], dtype=object))

    def load(file):
        torch.load(file, weights_only=False)

    def unpickle(file):
        pickle.loads(file.read_bytes())

    def last_member(file):
        pickle.loads(members(file.read_bytes())[-1][1])

    def in_tar(file):
        with tarfile.open(file) as tar:
            pickle.load(tar.extractfile("pickle"))

    def objects(file):
        np.load(file, allow_pickle=True)["header"]
    return {"zip.pt": (saved(state), load),
            "row.pt": (saved(state, _use_new_zipfile_serialization=False), load),
            "twice.pt": (zipped(twice), last_member), "tar.pt": (archive.getvalue(), in_tar),
            "npz.pt": (array.getvalue(), objects),
            **{f"pickle{protocol}.pt": (pickle.dumps(call, protocol), unpickle) for protocol in range(6)}}


def planted_code(folder, quick):
    """It does not run, whoever reads the file, and what is read is read with weights_only=True."""
    tally, marker = Tally(), folder / "marker"

    def note(what, wrong):
        if marker.exists():
            marker.rmdir()
            wrong = "the planted code ran"
        tally.note(wrong and f"{what}: {wrong}")

    for name, (content, load) in planted(marker).items():
        path = folder / name
        path.write_bytes(content)
        load(path)
        marker.rmdir()                                                  # it was made
        for reader, work in readers(path, folder / "out").items():
            if not quick or reader in ("--resume", "tools.convert"):
                note(f"{name} by {reader}", refused(fork(work), name))
    (folder / "run").mkdir()
    (folder / "run" / "last.pt").write_bytes(planted(marker)["zip.pt"][0])
    end = fork(stage("pretrain", folder / "run", "--resume", "auto"))
    note("--resume auto", refused(end, "no checkpoint in", "can be read"))
    # torch.distributed.checkpoint unpickles .metadata whatever it is told.
    (folder / "distributed").mkdir()
    (folder / "distributed" / ".metadata").write_bytes(pickle.dumps(Call(os.mkdir, str(marker))))
    end = fork(readers(folder / "distributed", folder / "out")["tools.convert"])
    note("a distributed checkpoint", refused(end, "may run code"))
    for what, wrong in planted_in_data(folder, marker):
        note(what, wrong)
    note("weights_only", how_it_is_loaded())
    return tally.outcome()


def planted_in_data(folder, marker):
    """(name, what is wrong) of each kind of data that may hold a pickle."""
    (folder / "cifar").mkdir()
    for name in ("train", "test"):
        (folder / "cifar" / name).write_bytes(pickle.dumps({b"data": Call(os.mkdir, str(marker))}, 2))
    objects = io.BytesIO()
    np.savez(objects, header=np.array([Call(os.mkdir, str(marker))], dtype=object))
    (folder / "pack").mkdir()
    (folder / "pack" / "train.pack").write_bytes(pack_of(objects.getvalue()))
    for spec, parts in ((f"cifar100:{folder / 'cifar'}", ["programs (pickles)", "cifar-100-binary.tar.gz"]),
                        (str(folder / "pack"), ["is damaged"])):
        yield spec, refused(fork(stage("probe", folder / "g", "--data", spec)), *parts)


def pack_of(index):
    """A pack without records, with these bytes as its index and the right checksum."""
    return (packed.START + index + len(index).to_bytes(8, "little") + packed.hashlib.sha256(index).digest()
            + packed.START[:8])


def how_it_is_loaded():
    """What is wrong with what torch.load is told where a sound checkpoint is read; it has no other caller."""
    told, load = [], torch.load

    def spy(*arguments, **options):
        told.append(options.get("weights_only"))
        return load(*arguments, **options)
    torch.load = spy
    try:
        for path in ("pretrain/last.pt", "finetune/classifier.pt"):
            files.read_checkpoint(ready() / path)
    finally:
        torch.load = load
    return "" if told == [True, True] else f"torch.load was told {told}"


def pickled_configurations(folder, quick):
    """Weights beside a pickled configuration are read, and nothing that it names is called."""
    tally, marker = Tally(), folder / "marker"
    code = f"__import__('os').mkdir({str(marker)!r})"
    configs = {"path": folder, "flags": argparse.Namespace(lr=1.0), "call": Call(eval, code),
               "dict": collections.defaultdict(list, a=[Call(exec, code)])}
    for name, config in configs.items():
        path = folder / f"{name}.pt"
        torch.save({"model": small_state(), "args": config}, path)
        for reader, work in readers(path, folder / f"out-{name}").items():
            if reader in ("tools.convert", "tools.features") or reader == "probe --checkpoint" and not quick:
                end = fork(work)
                whole = end.code == 0 and is_clean(end.said)
                wrong = "" if whole else f"code {end.code}, {end.said[-300:]!r}"
                if marker.exists():
                    marker.rmdir()
                    wrong = "the planted code ran"
                tally.note(wrong and f"{name} by {reader}: {wrong}")
    return tally.outcome()


# ---------------------------------------------------------------- files that would grow


def growing(folder):
    """{name of a checkpoint: bytes} of small files that would take much memory, and {name: pack}."""
    zeros = saved({"model": {"patch_embed.proj.weight": torch.zeros(2 ** 25)}})         # 128 MiB
    small = saved({"model": {"patch_embed.proj.weight": torch.arange(4.0)}})
    claimed = bytearray(small)
    at = claimed.index(b"PK\1\2", claimed.index(b"PK\1\2") + 1)         # an entry of the directory at the end
    claimed[at + 20:at + 28] = struct.pack("<II", 2 ** 30, 2 ** 30)     # its sizes
    directory = b"".join(b"PK\1\2" + bytes(24) + struct.pack("<HHHHHII", 8, 0, 0, 0, 0, 0, 0) + b"data.pkl"
                         for _ in range(torchfile.MOST_MEMBERS + 1))
    many = (b"PK\3\4" + bytes(26) + directory
            + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 30, 0))
    row = saved({"model": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    number = b"J" + struct.pack("<i", 2 ** 31 - 1)
    expanded = torch.zeros(1).expand(2 ** 27)
    copied = Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, expanded, torch.float64, "cpu", False)
    header = json.dumps({"w": dict(dtype="F32", shape=[2 ** 40], data_offsets=[0, 2 ** 42])}).encode()
    huge = io.BytesIO()
    np.savez(huge, header=np.zeros(3, np.uint8))
    long_header = dict(members(huge.getvalue()))["header.npy"].replace(b"(3,), }", b"(%d,), }" % 10 ** 11)
    packs = {"deflated.pack": zipped([("header.npy", bytes(2 ** 28))], zipfile.ZIP_DEFLATED),
             "claimed.pack": zipped([("header.npy", long_header)])}
    return {"deflated.pt": zipped(members(zeros), zipfile.ZIP_DEFLATED), "claimed.pt": bytes(claimed),
            "many.pt": many, "bytearray.pt": saved({"model": Call(bytearray, 2 ** 28)}),
            "copied.pt": saved({"model": {"patch_embed.proj.weight": copied}}),
            "row.pt": row.replace(b"K\x04Nt", number + b"Nt").replace(b"K\x04\x85", number + b"\x85"),
            "numbers.pt": zipped([(name, body.replace(b"K\x04t", number + b"t"))
                                  for name, body in members(small)]),
            "header.safetensors": struct.pack("<Q", len(header)) + header + bytes(64),
            "length.safetensors": struct.pack("<Q", 2 ** 40) + header}, {
            name: pack_of(index) for name, index in packs.items()}


def files_that_grow(folder, quick):
    """They are refused before memory is taken for what they claim."""
    tally, most = Tally(), 0
    checkpoints, packs = growing(folder)

    def measured(read):
        resident = memory("VmRSS")
        try:
            read()
            said = "it was read"
        except UserError as error:
            said = f"refused: {error}"
        print(json.dumps([memory("VmHWM") - resident, said]))

    for name, content in (checkpoints | packs).items():
        (folder / name).write_bytes(content)
        read = read_weights if name in checkpoints else functools.partial(packed.Packed, split="train")
        end = fork(lambda read=read, name=name: measured(lambda: read(folder / name)))
        if end.code:
            tally.note(f"{name}: {end.last}")
            continue
        peak, said = json.loads(end.last)
        most = max(most, peak)
        whole = said.startswith("refused: ") and said.isprintable() and peak < MOST_MEMORY + len(content)
        tally.note("" if whole else f"{name}: {peak // MEGABYTE} MiB, {said[:200]}")
    return tally.outcome(most_memory_mib=most // MEGABYTE)


# ---------------------------------------------------------------- files that are something else


def something_else(folder, quick):
    """A file that is no checkpoint is named for what it is, and nobody is told to trust it."""
    tally, picture, whole = Tally(), io.BytesIO(), saved({"model": small_state()})
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    weights = safetensors.torch.save(small_state())
    program = zipped([*members(whole), ("archive/constants.pkl", b"\x80\2.")])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 400\n"
    page = b"\n<!DOCTYPE html><html></html>"
    cases = {"empty": (b"", "is empty"), "page": (page, "is an HTML page of 29 bytes"),
             "pointer": (pointer, "git lfs pull gets"), "text": (b"not found\n", "is a text of 10 bytes"),
             "picture": (picture.getvalue(), "cannot be read"), "torn": (whole[:5000], "cut short"),
             "weights": (weights, "ends in .safetensors"), "program": (program, "is a program"),
             "zip": (zipped([("a.txt", b"a")]), "a zip archive that PyTorch did not write"),
             "model": (saved(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
             "list": (saved([1]), "holds a list"), "escape": (pickle.dumps({"a": 1}, 0), "is a text"),
             "name": (b"\x80\2cx\x1b[31m\ny\n.", r"it asks for x\x1b[31m.y")}
    for name, (content, message) in cases.items():
        path = folder / f"{name}.pt"
        path.write_bytes(content)
        for reader, work in readers(path, folder / "out").items():
            if reader in ("--resume", "tools.convert"):
                wrong = refused(fork(work), path.name, message)
                tally.note(wrong and f"{name} by {reader}: {wrong}")
    return tally.outcome()


# ---------------------------------------------------------------- names


ESCAPE = "a\x1b[2J\nerror: all is well"


def names_that_forge(folder, quick):
    """Control characters in the names of tensors, classes, settings, files and lists reach no terminal."""
    tally, state = Tally(), small_state()
    run_of = torch.load(ready() / "pretrain" / "last.pt", weights_only=True)
    forged = {
        "a tensor": {"model": state | {f"blocks.{ESCAPE}.weight": torch.zeros(2)}},
        "a tensor twice": {"model": state | {f"module.{ESCAPE}": torch.zeros(1), ESCAPE: torch.zeros(1)}},
        "no tensors": {ESCAPE: 1}, "a tensor that is no plain one": {ESCAPE: torch.zeros(1).to_sparse()},
        "settings": {"model": state, "config": {"model": ESCAPE, "img_size": ESCAPE, "mean": ESCAPE,
                                                "out_indices": ESCAPE, ESCAPE: ESCAPE}},
        "classes": {"model": state | {"head.weight": torch.zeros(2, 32), "head.bias": torch.zeros(2)},
                    "classes": [ESCAPE, ESCAPE + "b"]},
        "a run": run_of | {"model": {ESCAPE: torch.zeros(1)}},
        "a run's settings": run_of | {"config": run_of["config"] | {"data": ESCAPE, ESCAPE: 1}},
        "a run without a model": run_of | {"model": ESCAPE},
    }
    for number, (name, content) in enumerate(forged.items()):
        path = folder / f"{number}.pt"
        torch.save(content, path)
        for reader, work in readers(path, folder / f"out{number}").items():
            if not quick or reader in ("--resume", "tools.convert", "tools.evaluate"):
                end = fork(work)
                wrong = "" if end.code == 0 and is_clean(end.said) else refused(end)
                forges = "\nerror: all is well" in end.said
                tally.note(f"{name} by {reader}: {wrong or 'a forged line'}" if wrong or forges else "")
    (folder / "data" / "train" / ESCAPE).mkdir(parents=True)
    for name in (f"{ESCAPE}/0.png", f"{ESCAPE}/{ESCAPE}.png"):
        Image.new("RGB", (20, 20)).save(folder / "data" / "train" / name)
    for name, flags in (("pretrain", ["--steps", 1]), ("probe", [])):
        end = fork(stage(name, folder / name, "--data", folder / "data", *flags))
        whole = is_clean(end.said) and "Traceback" not in end.said
        tally.note("" if whole else f"{name}: {end.said[-300:]!r}")
    return tally.outcome()


def paths_that_leave(folder, quick):
    """Paths in lists that lead out of the data's folder are refused, and what they name is not opened."""
    tally, cars = Tally(), folder / "cars"
    cars.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "outside.png")
    Image.new("RGB", (20, 20)).save(cars / "0.png")
    outside = str(folder / "outside.png")
    for path in ("../outside.png", outside, f"x/../../{folder.name}/outside.png", "..", "/etc/passwd",
                 "0.png/../../outside.png", f"../{ESCAPE[:4]}"):
        for name in ("train.txt", "val.txt"):
            (cars / name).write_text(f"0.png 1\n{path} 2\n" if name == "train.txt" else "0.png 1\n")
        (folder / "subset").write_text(f"0.png\n{path}\n")

        def listed():
            open_data(f"cars:{cars}", "train", folder, print)

        def in_subset():
            (cars / "train.txt").unlink()
            subset(open_data(str(cars), "train", folder, print), folder / "subset")
        for read in (listed, in_subset):
            try:
                read()
                tally.note(f"{path} by {read.__name__}: taken")
            except UserError as error:
                tally.note("" if str(error).isprintable() else f"{path} by {read.__name__}: {str(error)!r}")
    return tally.outcome()


# ---------------------------------------------------------------- mutants


def mutated_checkpoints(folder, quick):
    """A checkpoint with some bytes altered is read or refused in one line; the process lives."""
    count = many(200, 2_000, quick)
    state = {name: value[:2].clone() for name, value in small_state().items()
             if not name.startswith("blocks") or name.startswith("blocks.1.")}
    text = safetensors.torch.save(state, {"format": "pt"})
    row = saved({"model": state}, _use_new_zipfile_serialization=False)
    kinds = [("a.pt", saved({"model": state})), ("b.safetensors", text), ("c.pt", row)]

    def read(first, last):
        resident, done = memory("VmRSS"), 0
        for i in range(first, last):
            draws, (name, whole) = random.Random(i), kinds[i % len(kinds)]
            file = bytearray(whole)
            for _ in range(draws.randint(1, 3)):                        # where names and numbers stand
                at = draws.randrange(min(len(file), 4_000)) * draws.choice([1, -1])
                file[at] = draws.choice([*b"0129[]{}.tuRQKJX", draws.randrange(256)])
            if draws.random() < 0.2:
                del file[draws.randrange(len(file)):]
            (folder / name).write_bytes(file)
            try:
                read_weights(folder / name)
                done += 1
            except UserError as error:
                done += str(error).isprintable() and len(str(error)) < 5_000
        print(json.dumps([done, memory("VmHWM") - resident]))

    tried, survived, problems, step, most = 0, 0, [], 100, 0
    for first in range(0, count, step):
        end = fork(lambda first=first: read(first, first + step))
        done, peak = json.loads(end.last) if end.code == 0 else (0, 0)
        tried, most = tried + step, max(most, peak)
        survived += done if peak < MOST_MEMORY else 0
        if done < step or peak >= MOST_MEMORY:
            problems.append(f"{first} to {first + step}: code {end.code}, {peak // MEGABYTE} MiB, "
                            f"{end.said[-300:]}")
    return Outcome(tried, survived, 0, dict(most_memory_mib=most // MEGABYTE), problems[:10])


FAULTS = [
    Fault("planted code", 10, planted_code),
    Fault("pickled configurations", 10, pickled_configurations),
    Fault("files that would grow", 10, files_that_grow),
    Fault("files that are something else", 10, something_else),
    Fault("names with control characters", 10, names_that_forge),
    Fault("paths that leave the data's folder", 10, paths_that_leave),
    Fault("mutated checkpoints of strangers", 10, mutated_checkpoints),
]


# ---------------------------------------------------------------- the guards


def load_what_is_there():
    """torch.load as it was for years."""
    rewrite(files, "read_checkpoint", ("look_through(path)", "set()"),
            ("weights_only=True", "weights_only=False"))


def make_what_is_named():
    """Foreign classes and functions as they are, in the place of stand-ins."""
    files.stand_ins = lambda names: [(pkgutil.resolve_name(name), name) for name in names]


def believe_sizes():
    rewrite(torchfile, "check_archive", ("packs or unpacked > size", "False"))


def believe_names():
    torchfile.check_names = lambda path, file: set()


GUARDS = [
    Guard("weights-alone", "planted code", load_what_is_there),
    Guard("stand-ins", "pickled configurations", make_what_is_named),
    Guard("sizes-of-an-archive", "files that would grow", believe_sizes),
    Guard("names-in-a-pickle", "files that would grow", believe_names),
]
