"""The blocks of docs/targets.md do what the page says, in the places that it names."""

import re
import sys
import types

import pytest
import torch
from sources import ROOT, SCRIPTS

from mff_min.config import parse
from mff_min.mim import random_masking
from mff_run.log import read_log
from mff_tasks import features

PAGE = (ROOT / "docs" / "targets.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
SMALL = ("--model vit_test --img-size 64 --patch-size 16 --decoder-embed-dim 16 --decoder-depth 1 "
         "--decoder-num-heads 2 --data shapes:100 --global-batch 16 --batch-size 16 --log-every 1 "
         "--picture-every 99 --picture-images 1 --lr 3e-3 --steps 20 --device cpu").split()


def block_with(name):
    """The code of the block that defines `name`, of ten lines at most, and what it defines."""
    code, = (block for block in BLOCKS if f" {name}(" in block)
    lines = re.sub(r'^.*""".*""".*$|^import.*$|^from.*$', "", code, flags=re.M).split("\n")
    assert len([line for line in lines if line.strip()]) <= 10
    defined = {}
    exec(code, defined)
    return code, defined[name]


@pytest.fixture
def pretrain(tmp_path, cache):
    """pretrain(code, old, new) runs a stage that begins with code and has new in the place of old."""
    def call(code, old, new):
        text, count = re.subn(old, new, SCRIPTS["train_pretrain"], flags=re.S)
        assert count == 1, old
        module = types.ModuleType("own_pretrain")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "own_pretrain", module)
            exec(f"{code}\n{text}", module.__dict__)
            flags = [*SMALL, "--output-dir", str(tmp_path / "a"), "--cache-dir", str(cache)]
            module.main(parse(module.Config, flags))
    return call


def test_every_block_is_of_these_three():
    assert len(BLOCKS) == 3
    assert all(place in PAGE for place in ("`build_model`", "`to_device`", "`DECODERS`"))


@pytest.fixture
def losses(tmp_path):
    """losses() are those of the run's log."""
    return lambda: [line["loss"] for line in read_log(tmp_path / "a" / "log.jsonl") if "lr" in line]


def test_a_target_in_ten_lines_trains(pretrain, losses):
    code, edges = block_with("Edges")
    images = torch.zeros(1, 3, 16, 32)
    images[:, :, :, 24:] = 1                                            # an edge in the second patch
    want = torch.tensor([[[0.0, 0.0], [15 / 256, 0.0]]])
    assert edges().loss(want, torch.tensor([[0, 1]]), images, None) < 1e-12
    pretrain(code, r"target = PixelTarget\(.*?\)\n", "target = Edges()\n")
    assert losses()[-1] < 0.5 * losses()[0]


def test_a_masking_in_ten_lines_keeps_the_centre_and_trains(pretrain, losses):
    code, centre_noise = block_with("centre_noise")
    _, mask = random_masking(centre_noise(torch.rand(1000, 25), (5, 5)), 6)
    kept = (1 - mask).mean(dim=0).view(5, 5)
    assert kept[2, 2] > 2 * kept[0, 0] and kept.sum() == pytest.approx(6)
    place = r"(noise = batch\[.noise.\][^\n]*\n)"
    pretrain(code, place, r"\1        noise = centre_noise(noise, model.encoder.grid)\n")
    assert losses()[-1] < losses()[0]


def test_a_decoder_in_ten_lines_trains(pretrain, losses, monkeypatch):
    code, pooled = block_with("PooledAutoencoder")
    monkeypatch.setitem(features.DECODERS, "pooled", pooled)
    pretrain(code, "decoder_depth: int", "decoder: str = opt('pooled', 'its kind')\n    decoder_depth: int")
    assert losses()[-1] < losses()[0]
