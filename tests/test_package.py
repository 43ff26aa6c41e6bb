"""A wheel works from another folder, the checkout hides no other package, a copied kernels/ works alone."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from sources import FILES, ROOT
from test_house import is_triton_kernel, module_of

DATA = "tools/report.html",                                             # what is installed beside modules

STAND_IN = """
class Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated):
        return decorated


def __getattr__(name):
    return Anything
"""


def python(folder, path, *arguments):
    """What Python prints, run in folder with path in front of what is installed."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds what a wheel installs; the wheel is built from a copy, offline."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in [*FILES, *DATA, "pyproject.toml", "README.md", "LICENSE"]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    shutil.copy(ROOT / "mff_min/kernels", source / "mff_min/kernels", follow_symlinks=False)
    pip = "-m", "pip", "--quiet", "--disable-pip-version-check"
    python(source, "", *pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels")
    wheel, = (source / "wheels").iterdir()
    python(source, "", *pip, "install", wheel, "--no-deps", "--no-index", "--target", site)
    return site


def test_a_wheel_holds_every_file_once(site):
    files = {path.relative_to(site).as_posix() for kind in ("py", "html") for path in site.rglob(f"*.{kind}")}
    assert files == {path.replace("kernels/", "mff_min/kernels/") for path in [*FILES, *DATA]}


def test_an_installed_package_works_from_another_folder(site, tmp_path, pretrained):
    names = [module_of(path) for path in FILES if "__main__" not in path and not is_triton_kernel(path)]
    code = f"""
import importlib, torch
for name in {names}:
    assert importlib.import_module(name).__file__.startswith({str(site)!r}), name
from mff_min.kernels.ops import load
from mff_weights.checkpoint import load_encoder
ops, encoder = load("auto", "cpu"), load_encoder({str(pretrained)!r}, say=len)
print(ops.layer_sum([torch.ones(2)], torch.zeros(1)).tolist(), type(encoder).__name__)
"""
    assert python(tmp_path, site, "-c", code) == "[1.0, 1.0] VisionTransformer\n"
    assert "usage: " in python(tmp_path, site, "-m", "tools.convert", "--help")


ON_WINDOWS = """
import contextlib, importlib.abc, io, json, runpy, sys
import torch.nn.parallel, torch.optim.swa_utils, torch.profiler, torch.utils.checkpoint
import numpy, PIL.Image

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "mff_min.kernels", "resource"):   # the link is a text file there
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
sys.modules.pop("fcntl", None)
sys.platform, known, found = "win32", set(sys.modules), {}
for name in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            found[name] = end.code, said.getvalue()
    for each in set(sys.modules) - known:
        del sys.modules[each]
print(json.dumps(found))
"""


def test_windows_is_refused_in_one_line_by_every_stage_and_tool(tmp_path):
    names = [module_of(path).removesuffix(".__main__") for path, text in FILES.items()
             if re.search(r"^ *(process\.)?run\(main, ", text, re.M) or path == "tools/bench/__main__.py"]
    assert len(names) >= 11 and "train_pretrain" in names and "tools.pack" in names and "tools.study" in names
    found = json.loads(python(tmp_path, ROOT, "-c", ON_WINDOWS, *names))
    line = "error: Windows is not supported: expected Linux, which WSL 2 or a container gives\n"
    assert found == {name: [2, line] for name in names}


@pytest.mark.parametrize("beside", [False, True])
def test_a_copied_folder_works_as_the_document_says(tmp_path, beside):
    pytest.importorskip("triton")
    shutil.copytree(ROOT / "kernels", tmp_path / "fused", ignore=shutil.ignore_patterns("__pycache__"))
    lines = (ROOT / "docs/kernels.md").read_text().split("<!-- copied -->\n```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) <= 12
    code = f"""{lines}
import sys
assert logits.grad.shape == (6,) and not any(name.startswith("mff_") for name in sys.modules)
if {beside}:
    from mff_min.kernels.ops import triton_column
    triton_column().layer_sum_norm(levels, logits, weight, bias, 1e-6).sum().backward()
from fused.ops import triton_column
triton_column().layer_sum_norm(levels, logits, weight, bias, 1e-6).sum().backward()
print(sorted({{name.split(".")[0] for name in map(str, dir(torch.ops)) if "fused" in name or "mff" in name}}))
"""
    names = ["fused", "mff_min_kernels"] if beside else ["fused"]
    assert python(tmp_path, ROOT, "-c", code) == f"{names}\n"


@pytest.fixture
def stand_in(tmp_path):
    """A folder with a package called kernels, as Hugging Face's is."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(STAND_IN)
    return tmp_path


def test_the_checkout_does_not_hide_a_package_called_kernels(stand_in):
    code = "import kernels, train_pretrain; print(kernels.__file__)"
    assert python(ROOT, stand_in, "-c", code).strip() == str(stand_in / "kernels/__init__.py")


def test_transformers_loads_in_the_checkout_beside_that_package(tmp_path, stand_in):
    pytest.importorskip("transformers")
    import transformers.utils.import_utils as requirements
    version = getattr(requirements, "KERNELS_MIN_VERSION", "0.18.2")  # another one would not be imported
    folder = tmp_path / f"kernels-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
    code = "from transformers import ViTModel; print(ViTModel.__name__)"
    assert python(ROOT, stand_in, "-c", code) == "ViTModel\n"
