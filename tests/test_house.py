"""What keeps the house in order: directions of imports, flags that are read, commands that run, no leftovers.

Each checker is a function from text to a list of complaints, and is shown something bad that it must catch.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import generated
import pytest
from sources import FILES, ROOT, SCRIPTS, comments, complaints

from mff_min.config import check_batches, parse
from mff_min.mim import parse_out_indices
from mff_min.vit import MODELS

# ---------------------------------------------------------------- imports

PEERS = {"timm", "torchvision", "transformers", "einops", "matplotlib", "scipy", "sklearn", "safetensors",
         "lightly"}


def imported(text):
    """The top-level names of all modules that a file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def is_triton_kernel(path):
    """Whether a file is imported only for the Triton column."""
    plain = ("kernels/ops.py", "kernels/reference.py", "kernels/checks.py")
    return path.startswith("kernels/") and path not in plain


# What a package of an extra may be imported by: one function, so that all else works without it.
EXTRAS = {("safetensors", "mff_weights/checkpoint.py"), ("matplotlib", "tools/figures.py")}


def wrong_imports(path, text):
    """tools -> scripts -> mff_min -> kernels -> torch, exceptions by name; only what measures knows peers.

    kernels is the name of a package of Hugging Face: the folder is imported as mff_min.kernels.
    """
    in_kernels, is_kernel = path.startswith("kernels/"), is_triton_kernel(path)
    benches = path.startswith(("tools/bench/", "tools/gpu/"))
    for name in imported(text):
        if (name in {*SCRIPTS, "tools"} and not path.startswith("tools/")
                or name == "kernels" or name == "mff_min" and in_kernels
                or name == "argparse" and path != "mff_min/config.py" and not benches     # has subcommands
                or name in PEERS and not benches and (name, path) not in EXTRAS
                or name == "triton" and not is_kernel):
            yield f"{path} imports {name}"


def test_imports_go_one_way():
    assert complaints(wrong_imports) == []


@pytest.mark.parametrize("path, text", [
    ("train_probe.py", "from train_pretrain import main"), ("mff_min/vit.py", "import train_pretrain as x"),
    ("kernels/layer_sum.py", "from mff_min.vit import Block"), ("mff_min/vit.py", "import argparse"),
    ("train_probe.py", "def f():\n    import torchvision.ops"), ("mff_min/vit.py", "import triton"),
    ("train_probe.py", "from tools.probe_layers import parse_layers"),
    ("mff_data/views.py", "from tools.bench import peers"), ("train_probe.py", "import lightly"),
    ("mff_weights/families.py", "import safetensors.torch"), ("mff_weights/checkpoint.py", "import timm"),
    ("kernels/ops.py", "from kernels import reference"), ("mff_min/vit.py", "import kernels.reference"),
    ("kernels/ops.py", "from triton import jit"), ("kernels/reference.py", "import triton.language"),
])
def test_a_wrong_import_is_caught(path, text):
    assert list(wrong_imports(path, text))


# What each room may import beside itself; kernels is the folder that mff_min.kernels is.
ROOMS = {"kernels": set(), "mff_min": set(), "mff_data": {"mff_min"}, "mff_run": {"mff_min"},
         "mff_weights": {"mff_min", "mff_data", "mff_run"},
         "mff_tasks": {"mff_min", "mff_data", "mff_run", "mff_weights"},
         "stages": {"mff_min", "mff_data", "mff_run", "mff_weights", "mff_tasks"},
         "tools": {"mff_min", "mff_data", "mff_run", "mff_weights", "mff_tasks", "stages"}}


def room_of(name):
    """The room of a path's or a module's first part: "stages" for train_pretrain."""
    return "stages" if name.startswith("train_") else name


def wrong_directions(path, text):
    """Imports of a room that this one may not know."""
    room = room_of(path.split("/")[0])
    for name in {room_of(name) for name in imported(text)} & ROOMS.keys() - ROOMS[room] - {room}:
        yield f"{path} imports {name}"
    if room == "stages" and any(room_of(name) == room for name in imported(text)):
        yield f"{path} imports a stage"


def test_rooms_know_only_the_rooms_below_them():
    assert complaints(wrong_directions) == []
    assert {room_of(path.split("/")[0]) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path, text", [
    ("mff_min/vit.py", "from mff_run.run import Run"), ("mff_run/log.py", "import mff_data.views"),
    ("mff_data/views.py", "from mff_run import files"), ("mff_weights/checkpoint.py", "import train_probe"),
    ("train_probe.py", "from tools import study"), ("train_probe.py", "import train_pretrain"),
    ("kernels/ops.py", "from mff_min.vit import Block"), ("mff_tasks/upernet.py", "import train_pretrain"),
    ("mff_weights/pretrained.py", "from mff_tasks.upernet import Segmenter"),
])
def test_a_wrong_direction_is_caught(path, text):
    assert list(wrong_directions(path, text))


def test_the_core_is_the_method_and_opens_no_file():
    core = {path: text for path, text in FILES.items() if path.startswith("mff_min/")}
    assert sum(len(text.splitlines()) for text in core.values()) < 1500
    for path, text in core.items():
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
        opens = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "load", "save"}
        assert not {name for name in called if name.split(".")[-1] in opens}, path


IMPORT_ALL = """
import importlib, sys, torch
state = torch.get_rng_state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), state), "an import drew from or seeded torch's generator"
loaded = {"timm", "torchvision", "triton", "safetensors"} & set(sys.modules)
assert not loaded, f"an import loads {loaded}"
"""


def module_of(path):
    """The name by which a file is imported: mff_min/kernels is a link to the folder kernels."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"mff_min.{name}" if name.startswith("kernels.") else name


def import_all(folder, names):
    """What a fresh process says, on either stream, while it imports these modules."""
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.stdout


def test_importing_any_module_says_and_changes_nothing():
    benches = ("tools/bench/", "tools/gpu/")                            # count operations: loads Triton
    paths = [path for path in FILES if not is_triton_kernel(path) and not path.startswith(benches)]
    assert import_all(ROOT, [module_of(path) for path in paths]) == ""


def test_a_noisy_import_is_caught(tmp_path):
    (tmp_path / "loud.py").write_text("import torch\nprint('hello')\ntorch.manual_seed(7)\n")
    said = import_all(tmp_path, ["loud"])
    assert "hello" in said and "seeded torch's generator" in said


# ---------------------------------------------------------------- what travels with a copy

def unlicensed(path, text):
    """Files of kernels/, which others copy, whose first line does not name the licence."""
    if path.startswith("kernels/") and text.split("\n")[0] != "# SPDX-License-Identifier: Apache-2.0":
        yield f"{path} names no licence"


def test_every_kernel_names_its_licence():
    assert complaints(unlicensed) == []
    assert list(unlicensed("kernels/ops.py", '"""The ops."""\n'))


# ---------------------------------------------------------------- what is compiled

def dynamic_graphs(path, text):
    """Calls of torch.compile that may turn a size into a symbol: a slower graph, where sizes are known."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile" \
                and "dynamic=False" not in map(ast.unparse, node.keywords):
            yield f"{path}:{node.lineno}: torch.compile without dynamic=False"


def test_every_compiled_graph_is_of_fixed_sizes():
    assert complaints(dynamic_graphs) == []
    assert sum(text.count("torch.compile(") for text in FILES.values()) >= 5


@pytest.mark.parametrize("text", ["f = torch.compile(f)", "f = torch.compile(f, dynamic=None)"])
def test_a_graph_of_symbolic_sizes_is_caught(text):
    assert list(dynamic_graphs("planted", text))


# ---------------------------------------------------------------- flags and commands

BASES = ("mff_run/run.py", "mff_data/decode.py", "mff_weights/pretrained.py",     # of the stages' Configs
         "mff_tasks/features.py")


def config_fields(text):
    """{name: annotation} of the Config of a script, with those of its bases; empty where it has none."""
    classes = {node.name: node for part in (text, *map(FILES.get, BASES)) for node in ast.parse(part).body
               if isinstance(node, ast.ClassDef)}
    found, left = {}, ["Config"]
    while left:
        if node := classes.get(left.pop(0)):
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            found = {field.target.id: ast.unparse(field.annotation) for field in fields} | found
            left += map(ast.unparse, node.bases)
    return found


def unread_flags(path, text):
    """Flags that neither the script nor a stage that it imports nor what surrounds every run reads."""
    if not (fields := config_fields(text)):
        return []
    around = "\n".join([*(text for path, text in FILES.items() if path.startswith(("mff_run/", *BASES))),
                        *(SCRIPTS[name] for name in imported(text) if name in SCRIPTS)])
    read = {node.attr for node in ast.walk(ast.parse(f"{text}\n{around}"))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cfg", "self.cfg")}
    return [f"{path}: --{name} is never read" for name in fields if name not in read]


def test_every_flag_is_read():
    assert complaints(unread_flags) == []
    assert config_fields(SCRIPTS["train_pretrain"])


def test_an_unread_flag_is_caught():
    text = "class Config:\n    lr: float = 1\n    seed: int = 0\ndef main(cfg): return cfg.lr"
    assert unread_flags("planted", text) == ["planted: --seed is never read"]


def commands(markdown):
    """The shell commands in the fenced blocks of a Markdown text, each a list of words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", re.sub(r"\\\n", " ", markdown), re.M | re.S)
    shell = [block for language, block in blocks if language in ("bash", "sh", "console", "")]
    for line in "".join(shell).splitlines():
        for command in re.split(r"&&|;|\|", re.sub(r"(^| )#.*", "", line)):
            words = re.sub(r"^\s*(\$ )?(\w+=\S* )*(srun )?", "", command).split()
            if words and Path(words[0]).name in ("python", "python3", "torchrun", "make"):
                yield words


def wrong_words(command, scripts, make_targets):
    """What of a command does not exist: the script, a flag of it, or a target of the Makefile."""
    if command[0] == "make":
        asked = [word for word in command[1:] if "=" not in word and word[0] != "-"]
        return [f"make {word} does not exist" for word in asked if word not in make_targets]
    if "-m" in command:
        at = command.index("-m") + 1
        path = command[at].replace(".", "/") + ".py"
        if not path.startswith("tools/") or f"{path[:-3]}/__main__.py" in FILES:        # its own flags
            return []
    else:
        at = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
        if at is None:
            return []
        path = command[at]
    script, files = path.removesuffix(".py"), FILES | {f"{name}.py": text for name, text in scripts.items()}
    if path not in files:
        return [f"{path} does not exist"]
    fields = config_fields(files[path])
    booleans = {f"no_{name}" for name, annotation in fields.items() if annotation == "bool"}
    flags = [word.split("=")[0] for word in command[at + 1:] if word.startswith("--")]
    return [f"{script}.py has no {flag}" for flag in flags
            if flag[2:].replace("-", "_") not in {"help", *fields, *booleans}]


MAKE_TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)


def test_documented_commands_exist():
    readme = list(commands((ROOT / "README.md").read_text()))
    others = [command for path in ROOT.glob("docs/*.md") for command in commands(path.read_text())]
    recipes = {path.name: list(commands(f"```sh\n{path.read_text()}```\n"))
               for path in ROOT.glob("recipes/*.sh")}
    assert len(readme) >= 2 and recipes and all(recipes.values())
    for command in readme + others + sum(recipes.values(), []):
        assert wrong_words(command, SCRIPTS, MAKE_TARGETS) == [], " ".join(command)


@pytest.mark.parametrize("line, complaint", [
    ("make demo", None), ("make PYTHON=python3.12 teest", "make teest does not exist"),
    ("python train_probe2.py --help", "train_probe2.py does not exist"),
    ("A=1 torchrun --nproc-per-node=8 train_pretrain.py --blr 1 \\\n  --batch_size=8 # as --published", None),
    ("cd x && python train_pretrain.py --no-norm-pix-loss --batchsize 8", "has no --batchsize"),
    ("srun torchrun train_pretrain.py --no-bits", "train_pretrain.py has no --no-bits"),
    ("python train_pretrain.py --no-seed", "train_pretrain.py has no --no-seed"),
    ("python -m tools.evaluate --checkpoint RUN", None),
    ("python -m tools.evaluat --checkpoint RUN", "tools/evaluat.py does not exist"),
    ("torchrun -m tools.evaluate --evaluate", "tools/evaluate.py has no --evaluate"),
    ("python train_pretrain.py --blr 1 \\\n  --epoch 3", "train_pretrain.py has no --epoch"),
])
def test_a_wrong_command_is_caught(line, complaint):
    markdown = f"text\n```python\npython nothing.py\n```\npython nothing.py\n```bash\n$ {line}\n```\n"
    command, = commands(markdown)
    found = wrong_words(command, SCRIPTS, ["demo", "test"])
    assert len(found) == 1 and complaint in found[0] if complaint else found == []


RECIPES = sorted({path.name for path in ROOT.glob("recipes/*.sh")} - {"slurm.sh"})    # that is of any stage


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_its_stages_what_they_accept(name, tmp_path):
    """Its commands for eight processes, with a torchrun that only writes down what it is given."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >> "$SAID"\n')
    (tmp_path / "torchrun").chmod(0o755)
    given = dict(IMAGENET="/data", ADE20K="/data", COCO="/data", DATA="/data", CHECKPOINT="runs/mff_mae",
                 LIST="1percent.txt", TEACHER="clip.pth")
    said, path = tmp_path / "said", f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", f"recipes/{name}"], cwd=ROOT, check=True,
                   env=os.environ | given | dict(PATH=path, SAID=str(said)))
    ran = [text.strip().splitlines() for text in said.read_text().split("END\n")[:-1]]
    assert ran
    for words in ran:
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "tools.evaluate")
        stage = importlib.import_module(words[at].removesuffix(".py"))
        cfg = parse(stage.Config, words[at + 1:])
        check_batches(getattr(cfg, "global_batch", 8 * cfg.batch_size), cfg.batch_size, 8)
        if hasattr(cfg, "out_indices"):
            assert parse_out_indices(cfg.out_indices, MODELS[cfg.model]["depth"])


@pytest.mark.parametrize("name", generated.NAMES)
def test_measured_figures_in_documents_are_those_of_the_results(name):
    assert generated.written(name) in generated.document(name).read_text()


def test_a_block_has_one_place_in_all_documents(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- a: x -->\n1\n<!-- end --> <!-- b: x -->\n2\n<!-- end -->")
    (tmp_path / "docs" / "more.md").write_text("<!-- b: x -->\n2\n<!-- end --> <!-- c: x -->3<!-- end -->")
    assert [generated.document(name).name for name in "ac"] == ["README.md", "more.md"]
    for name in "bd":
        with pytest.raises(AssertionError, match=f"places for {name}"):
            generated.document(name)


def prose(path):
    """A Markdown file without its code."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)


def dead_links(path):
    """The relative links of a Markdown file that lead to no file, or to no heading of one."""
    for link in re.findall(r"(?:\]\(|src=\")(?!http)([^)\"\s]+)", prose(path)):
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists():
            yield link
        elif heading:
            titles = [title.lower() for title in re.findall(r"^#+ (.*)", prose(target), re.M)]
            if heading not in [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]:
                yield link


def test_links_of_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert {path.name: links for path in documents if (links := list(dead_links(path)))} == {}


def test_a_dead_link_is_caught(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b, c\n[1](page.md) [2](#a-b-c) [3](http://x) `a[4](b)` [5](gone.md) [6](page.md#d)\n"
                    '<img src="no.svg">')
    assert list(dead_links(page)) == ["gone.md", "page.md#d", "no.svg"]


def test_every_claim_of_the_readme_names_tests_and_make_claims_runs_them():
    claims = re.findall(r"^\| .*`pytest -k (.*)` \|$", (ROOT / "README.md").read_text(), re.M)
    tests = [name for path in ROOT.glob("tests/**/test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)]
    assert len(claims) >= 8
    assert [claim for claim in claims if not any(claim in name for name in tests)] == []
    said = subprocess.run(["make", "-n", "claims"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'pytest -k "{" or ".join(claims)}"' in said.stdout


@pytest.mark.parametrize("name, most", [("lines", 180), ("words", 1500)])
def test_the_readme_is_read_in_five_minutes(name, most):
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines() if name == "lines" else text.split()) <= most


# ---------------------------------------------------------------- leftovers

def leftovers(path, text):
    """Wide nets for exceptions, notes to self, prints in the core, and code that is commented out."""
    for node in ast.walk(ast.parse(text)):
        caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
        if isinstance(node, ast.ExceptHandler) and (not caught or re.search(r"\b(Base)?Exception\b", caught)):
            yield f"{path}:{node.lineno}: except {caught}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and path.startswith("mff_"):
            yield f"{path}:{node.lineno}: print"
    for line, comment, alone in comments(text):
        if re.search(r"\b(TODO|FIXME|XXX)\b", comment):
            yield f"{path}:{line}: {comment}"
        elif alone and is_code(comment):
            yield f"{path}:{line}: commented-out code: {comment}"


def is_code(comment):
    """Whether a comment is a Python statement that does something: an assignment, a call, a block's start."""
    try:
        body = ast.parse(comment + " pass" if comment.endswith(":") else comment).body
    except SyntaxError:
        return False
    does = ast.Assign | ast.AugAssign | ast.For | ast.If | ast.With | ast.While | ast.FunctionDef
    return any(isinstance(node, does) or isinstance(getattr(node, "value", None), ast.Call) for node in body)


def test_nothing_is_left_lying_about():
    found = {re.sub(r":\d+:", ":", complaint) for complaint in complaints(leftovers)}
    prints = ("mff_min/config.py", "mff_data/views.py", "mff_run/progress.py", "mff_run/process.py",
              "mff_run/world.py")
    assert found == {"mff_run/files.py: except Exception", *(f"{path}: print" for path in prints)}
    assert FILES["mff_run/files.py"].count("except Exception") == 1     # torch.load of a damaged file


@pytest.mark.parametrize("text", [
    "try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept (OSError, Exception) as error:\n    pass",
    "print(1)", "f()  # TODO: later", "# x = x + 1", "# f(x, y)", "# for x in xs:", "# model.loss *= 2",
])
def test_a_leftover_is_caught(text):
    assert list(leftovers("mff_min/planted.py", text))


def test_prose_is_no_leftover():
    text = "# A word: f(x) is 2 here.\n# ------ shapes\nf()  # x = y + 1\n# note that x = 2 here\n"
    assert not list(leftovers("mff_min/planted.py", text))
