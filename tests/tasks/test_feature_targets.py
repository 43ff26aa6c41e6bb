"""EVA and MILAN: target, masking, decoder and teacher, alone and in runs of pre-training; also test_run."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_folders import assert_same_run, state_of
from sources import ROOT
from teachers import openai_state, random_tower
from torch.utils.flop_counter import FlopCounterMode

import train_pretrain
from mff_data.shapes import render
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.mim import random_masking
from mff_min.vit import MODELS, VisionTransformer
from mff_run.log import read_log
from mff_run.process import run
from mff_run.world import World
from mff_tasks.clip import ClipTower
from mff_tasks.features import (
    CosineTarget,
    PromptingAutoencoder,
    Teacher,
    feature_sheet,
    flops_with_teacher,
    importance_noise,
    open_teacher,
)
from mff_weights.pretrained import build_encoder, read_pretrained
from tools import convert

# ---------------------------------------------------------------- target


@pytest.mark.parametrize("with_class_token", [False, True])
def test_the_loss_is_0_for_equal_and_4_for_opposite_features(with_class_token):
    tokens, ids = torch.randn(3, 17, 24), torch.stack([torch.randperm(16)[:12] for _ in range(3)])
    equal = tokens[:, 1:].gather(1, ids[..., None].expand(-1, -1, 24))
    if with_class_token:
        equal = torch.cat([tokens[:, :1], equal], dim=1)
    loss = CosineTarget(24).loss
    assert loss(3 * equal, ids, None, tokens).item() == pytest.approx(0, abs=1e-6)
    assert loss(-0.1 * equal, ids, None, tokens).item() == pytest.approx(4, abs=1e-6)
    other = torch.randn_like(equal)
    want = (F.normalize(other, dim=-1) - F.normalize(equal, dim=-1)).pow(2).sum(dim=-1).mean()
    assert loss(other, ids, None, tokens).item() == pytest.approx(want.item(), rel=1e-6)
    changed = tokens.clone()
    changed.scatter_(1, ids[:, :1, None].expand(-1, -1, 24) + 1, 9.0)   # one that is predicted
    assert loss(other, ids, None, changed) != loss(other, ids, None, tokens)


# ---------------------------------------------------------------- masking


def test_importance_masking_keeps_patches_as_sequential_sampling_without_replacement_does():
    importance, count, num_visible = torch.tensor([0.5, 0.1, 0.3, 0.02]), 40_000, 2
    total = importance.sum()
    exact = {}                                                          # of sets: the order does not matter
    for first, second in itertools.permutations(range(4), 2):
        share = importance[first] / total * importance[second] / (total - importance[first])
        kept = tuple(sorted((first, second)))
        exact[kept] = exact.get(kept, 0) + share.item()
    noise = importance_noise(torch.rand(count, 4), importance.expand(count, 4))
    ids_shuffle, mask = random_masking(noise, num_visible)
    assert torch.equal(ids_shuffle.sort(dim=1).values, torch.arange(4).expand(count, 4))    # each once
    kept, times = ids_shuffle[:, :num_visible].sort(dim=1).values.unique(dim=0, return_counts=True)
    found = dict(zip(map(tuple, kept.tolist()), times.tolist(), strict=True))
    for patches, share in exact.items():
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(found.get(patches, 0) - count * share) < 5 * deviation, patches
    shares = (1 - mask).mean(dim=0)
    assert shares[0] > shares[2] > shares[1] > shares[3]


@pytest.mark.parametrize("constant", [1.0, 1 / 197, 0.0])
def test_constant_importance_is_random_masking_bit_for_bit(constant):
    noise = torch.rand(64, 196)
    noise[0, :3] = torch.tensor([0.0, 1 - 2 ** -24, 2 ** -24])          # the ends of its range
    changed = importance_noise(noise, torch.full_like(noise, constant))
    for a, b in zip(random_masking(changed, 49), random_masking(noise, 49), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_patches_without_importance_are_kept_last_and_in_random_order():
    noise, importance = torch.rand(100, 16), torch.ones(100, 16)
    importance[:, ::2] = 0
    ids_shuffle, _ = random_masking(importance_noise(noise, importance), 8)
    assert (ids_shuffle[:, :8] % 2 == 1).all() and (ids_shuffle[:, 8:] % 2 == 0).all()
    assert len(ids_shuffle[:, 8:].unique(dim=0)) > 50


# ---------------------------------------------------------------- decoder


def milan(decoder_depth=3, img_size=16, out_indices=(1,)):
    """A small model with MILAN's decoder."""
    encoder = VisionTransformer(img_size, 4, 32, 2, 2)
    return PromptingAutoencoder(encoder, out_indices, CosineTarget(24), 0.75, False, 16, decoder_depth, 2)


def test_visible_tokens_leave_the_prompting_decoder_unchanged_and_masked_ones_do_not():
    model, seen = milan(), {}
    model.decoder_blocks[0].register_forward_pre_hook(lambda module, given: seen.update(before=given[0]))
    model.decoder_norm.register_forward_pre_hook(lambda module, given: seen.update(after=given[0]))
    pred, ids, mask = model.predict(torch.randn(2, 3, 16, 16), torch.rand(2, 16))
    assert pred.shape == (2, 17, 24) and ids.shape == (2, 16) and mask.sum() == 24
    T = model.num_visible + 1
    assert torch.equal(seen["before"][:, :T], seen["after"][:, :T])
    assert (seen["before"][:, T:] != seen["after"][:, T:]).any(dim=-1).all()


def test_the_prompting_decoder_is_milans_formula():
    """Queries are the masked tokens after norm1; keys and values also the visible ones, without a norm."""
    model = milan()
    latent, ids_shuffle = torch.randn(2, 5, 32), torch.rand(2, 16).argsort(dim=1)
    got = model.decode(latent, ids_shuffle)
    positions = model.decoder_pos_embed[0]
    masked = torch.stack([model.mask_token[0] + positions[1:][ids] for ids in ids_shuffle[:, 4:]])
    visible = model.decoder_embed(latent)
    visible = visible + torch.stack([torch.cat([positions[:1], positions[1:][ids]])
                                     for ids in ids_shuffle[:, :4]])
    for block in model.decoder_blocks:
        q = F.linear(block.norm1(masked), block.attn.qkv.weight[:16], block.attn.qkv.bias[:16])
        memory = torch.cat([visible, block.norm1(masked)], dim=1)
        k, v = F.linear(memory, block.attn.qkv.weight[16:], block.attn.qkv.bias[16:]).chunk(2, dim=-1)
        heads = [(q[..., at] @ k[..., at].mT / 8 ** 0.5).softmax(dim=-1) @ v[..., at]
                 for at in (slice(8), slice(8, 16))]
        masked = masked + block.attn.proj(torch.cat(heads, dim=-1))
        masked = masked + block.mlp(block.norm2(masked))
    want = model.decoder_pred(model.decoder_norm(torch.cat([visible, masked], dim=1)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


PAPERS = "--model vit_b --target clip --teacher x --out-indices last"
MILAN = "--masking importance --decoder prompting"


@pytest.mark.parametrize("flags", ["", MILAN])
def test_the_models_have_the_number_of_parameters_that_is_known(flags):
    cfg = parse(train_pretrain.Config, f"{PAPERS} {flags}".split())
    with torch.device("meta"):
        model = train_pretrain.build_model(cfg, "meta", SimpleNamespace(dim=512))
    count = sum(parameter.numel() for parameter in model.parameters()) - model.proj_weights.numel()
    assert count == 111_776_512                                         # 111.78M; ours also weighs its level


@pytest.mark.parametrize("flags", ["", MILAN, "--decoder-depth 1 " + MILAN, "--out-indices spread " + MILAN])
def test_the_formula_counts_every_product_that_runs_of_student_and_teacher(flags):
    cfg = parse(train_pretrain.Config, f"{PAPERS} {flags}".split())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = train_pretrain.build_model(cfg, "meta", SimpleNamespace(dim=512))
        tower = ClipTower(224, 16, 768, 3, 12, 4.0, 3, 512)
        images, noise = torch.empty(2, 3, 224, 224), torch.empty(2, 196)
        model(images, noise, tower(images)[0]).backward()
    of_teacher = SimpleNamespace(flops=Teacher.flops.fget(SimpleNamespace(encoder=tower)))
    assert counter.get_total_flops() == 2 * flops_with_teacher(model, of_teacher)


# ---------------------------------------------------------------- runs


SMALL = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 2 --decoder-num-heads 2 "
         "--data shapes:100 --global-batch 16 --batch-size 16 --log-every 1 --picture-every 99 "
         "--picture-images 2 --device cpu").split()
ROWS = {"EVA": "--target clip --out-indices last", "MFF_EVA": "--target clip",
        "MILAN": f"--target clip --out-indices last {MILAN}", "MFF_MILAN": f"--target clip {MILAN}"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, pretrained):
    """Files of teachers: CLIP's layout, another of other weights, and the run of a MAE."""
    folder = tmp_path_factory.mktemp("teachers")
    for i in (0, 1):
        torch.save(openai_state(random_tower(seed=i)), folder / f"clip{i}.pth")
    return dict(clip=folder / "clip0.pth", other=folder / "clip1.pth", encoder=pretrained)


@pytest.fixture
def pretrain(tmp_path, cache, teachers):
    """pretrain(flags, to="a", teacher="clip") runs the stage in this process; returns its metrics."""
    def call(flags, to="a", teacher="clip"):
        flags = [*SMALL, "--teacher", str(teachers[teacher]), "--output-dir", str(tmp_path / to),
                 "--cache-dir", str(cache), *flags.split()]
        return train_pretrain.main(parse(train_pretrain.Config, flags))
    return call


def explained(encoder, tower, images):
    """The share of the variance of the teacher's patch tokens that a linear probe of the encoder explains.

    It is fitted on the first half of the images and measured on the second.
    """
    with torch.no_grad():
        x, y = encoder.forward_features(images)[:, 1:], tower(images)[0][:, 1:]
    (x, held_x), (y, held_y) = (t.double().chunk(2) for t in (x, y))
    x, held_x = ((F.pad(t, (0, 1), value=1.0)).flatten(0, 1) for t in (x, held_x))
    y, held_y = y.flatten(0, 1), held_y.flatten(0, 1)
    weights = torch.linalg.solve(x.mT @ x + 1e-3 * len(x) * torch.eye(x.shape[1]), x.mT @ y)
    rest = (held_y - held_x @ weights).pow(2).sum() / (held_y - held_y.mean(dim=0)).pow(2).sum()
    return 1 - rest.item()


@pytest.mark.parametrize("row", ROWS)
def test_each_row_learns_its_teachers_features_and_a_probe_of_the_student_tells_more_of_them(
        pretrain, tmp_path, row):
    metrics = pretrain(f"{ROWS[row]} --lr 3e-3 --seed 1 --steps 60")
    assert metrics["val_loss"] < 0.8 * read_log(tmp_path / "a" / "log.jsonl")[0]["loss"]
    torch.manual_seed(1)
    start, end = VisionTransformer(16, **MODELS["vit_test"]), build_encoder(read_pretrained(tmp_path / "a"))
    pixels = torch.from_numpy(render("val", range(128))["images"]).permute(0, 3, 1, 2)
    images = F.interpolate(pixels / 255, 16, mode="area") * 4 - 2
    shares = [explained(encoder, random_tower(), images) for encoder in (start, end)]
    assert shares[1] > shares[0] + 0.01


TARGETS = {"clip": "--target clip", "milan": f"--target clip {MILAN}",
           "encoder": "--target encoder --masking importance"}


@pytest.mark.parametrize("target", TARGETS)
def test_mff_with_one_level_equals_plain_bit_for_bit_with_every_target(pretrain, tmp_path, target):
    for to, levels in (("mff", "11"), ("plain", "last")):
        flags = f"--steps 3 --lr 1e-3 --out-indices {levels} {TARGETS[target]}"
        pretrain(flags, to, "encoder" if target == "encoder" else "clip")
    assert_same_run(tmp_path / "mff", tmp_path / "plain")


def test_a_teacher_gets_no_gradient_does_not_move_and_is_in_no_file(pretrain, tmp_path, monkeypatch):
    opened = []

    def watched(*given):
        opened.append(open_teacher(*given)[0])
        return opened[0], open_teacher(*given)[1]
    monkeypatch.setattr(train_pretrain, "open_teacher", watched)
    pretrain(f"--steps 3 --lr 1e-3 {TARGETS['milan']}")
    teacher, tower = opened[0].encoder, random_tower()
    for (name, value), want in zip(teacher.named_parameters(), tower.parameters(), strict=True):
        assert value.grad is None and not value.requires_grad and torch.equal(value, want), name
    state = state_of(tmp_path / "a")
    cfg = parse(train_pretrain.Config, [*SMALL, *f"--teacher x {TARGETS['milan']}".split()])
    student = train_pretrain.build_model(cfg, "cpu", opened[0])
    assert state["model"].keys() == student.state_dict().keys()
    assert len(state["optimizer"]["state"]) == sum(p.requires_grad for p in student.parameters())
    shapes = {value.shape for value in tower.state_dict().values() if value.dim() > 2}      # no student's
    found = [*state["model"].values(), *torch.load(tmp_path / "a" / "encoder.pt")["model"].values()]
    assert not shapes & {value.shape for value in found}


def test_a_run_keeps_its_teacher_wherever_the_file_is(pretrain, tmp_path, teachers):
    flags = f"--steps 4 --lr 1e-3 {TARGETS['milan']}"
    pretrain(flags, "whole")
    pretrain(f"{flags} --epochs 0.64 --steps 2 --allow-change steps", "parts")
    moved = tmp_path / "moved.pth"
    torch.save({"state_dict": openai_state(random_tower())}, moved)
    with pytest.raises(UserError, match=r"other settings:\n.*\n  teacher_sha256  \w{60}  \w{60}\ngive the"):
        pretrain(f"{flags} --epochs 0.64 --resume auto --allow-change steps", "parts", "other")
    pretrain(f"{flags} --epochs 0.64 --resume auto --allow-change steps --teacher {moved}", "parts")
    for a, b in zip(*(state_of(tmp_path / to)["model"].values() for to in ("whole", "parts")), strict=True):
        assert torch.equal(a, b)
    digest = state_of(tmp_path / "whole")["config"]["teacher_sha256"]
    with pytest.raises(UserError, match=f"expected --teacher-sha256 {digest}; another teacher needs another"):
        pretrain(f"{flags} --teacher-sha256 {digest}", "b", "other")


def test_weights_of_another_target_start_a_run_without_the_last_layer_of_their_decoder(
        pretrain, tmp_path, teachers, capsys):
    freeze = "--steps 1 --lr 1e-30 --weight-decay 0 --decoder-depth 1"
    pretrain(f"{freeze} --target clip --init-from {teachers['encoder']}")       # a MAE's
    assert "is for another target: the decoder's last layer starts from random" in capsys.readouterr().out
    want, got = state_of(teachers["encoder"])["model"], state_of(tmp_path / "a")["model"]
    assert torch.equal(want["decoder_embed.weight"], got["decoder_embed.weight"])
    assert got["decoder_pred.weight"].shape == (24, 16)
    pretrain(f"{freeze} --target clip --init-from {tmp_path / 'a'}", "same")
    assert "another target" not in capsys.readouterr().out
    same = state_of(tmp_path / "same")["model"]
    assert torch.equal(same["decoder_pred.weight"], got["decoder_pred.weight"])
    pretrain(f"{freeze} --target clip --init-from {tmp_path / 'a'}", "other", "other")
    assert "another target" in capsys.readouterr().out


def test_a_decoder_of_features_becomes_none_of_pixels(pretrain, tmp_path):
    pretrain("--steps 1 --target clip --out-indices last")
    command = [str(tmp_path / "a"), str(tmp_path / "b.pth"), "--to"]
    with pytest.raises(UserError, match="predicts features .--target clip., and mae's decoder pixels: expec"):
        convert.main(parse(convert.Config, [*command, "mae"]))
    convert.main(parse(convert.Config, [*command, "mae", "--part", "encoder"]))
    convert.main(parse(convert.Config, [str(tmp_path / "a"), str(tmp_path / "c.pth")]))
    again = torch.load(tmp_path / "c.pth")["model"]
    assert torch.equal(again["decoder_pred.weight"], state_of(tmp_path / "a")["model"]["decoder_pred.weight"])


# ---------------------------------------------------------------- teachers of other sizes


def look(flags, teacher, **options):
    """The Teacher that these flags open, in this process."""
    cfg = parse(train_pretrain.Config, [*SMALL, "--teacher", str(teacher), *flags.split()])
    return open_teacher(cfg, World(0, 1, 0, torch.device("cpu")), torch.float32)[0]


@pytest.mark.parametrize("img_size, patch_size, sees", [("16", 4, (16, 16)), ("32x16", 4, (32, 16)),
                                                        ("16", 8, (8, 8)), ("20x40", 10, (8, 16))])
def test_a_teacher_sees_images_in_which_it_has_the_students_patches(teachers, img_size, patch_size, sees):
    teacher = look(f"--target clip --img-size {img_size} --patch-size {patch_size}", teachers["clip"])
    sides = [int(side) for side in (img_size.split("x") * 2)[:2]]
    patches = math.prod(side // patch_size for side in sides)
    tokens, importance = teacher(torch.rand(2, 3, *sides))
    assert teacher.sides == sees and tokens.shape == (2, 1 + patches, 24) and importance.shape == (2, patches)


def test_a_teacher_makes_of_a_batch_what_the_model_takes(teachers):
    images, noise, pixels = torch.randn(2, 3, 16, 16), torch.rand(2, 16), object()
    tokens, importance = random_tower()(images)
    for flags, masked, target in (("--target clip", noise, tokens), ("--masking importance", None, pixels),
                                  (TARGETS["milan"], None, tokens)):
        got = look(flags, teachers["clip"]).guide(images, noise, pixels)
        want = images, importance_noise(noise, importance) if masked is None else masked, target
        assert all(a is b or torch.equal(a, b) for a, b in zip(got, want, strict=True)), flags


def test_a_teachers_images_may_be_normalised_otherwise(teachers, tmp_path):
    images = torch.randn(2, 3, 16, 16)
    plain = look("--target clip", teachers["clip"])
    torch.testing.assert_close(plain(images)[0], random_tower()(images)[0])     # as MILAN: the student's
    other = look("--target clip --teacher-mean 0.5,0.4,0.3 --teacher-std 0.5,0.6,0.7", teachers["clip"])
    mean, std, own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in (
        (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    want = random_tower()((images * own_std + own_mean - mean) / std)[0]
    torch.testing.assert_close(other(images)[0], want, rtol=1e-4, atol=1e-4)
    saved = torch.load(teachers["encoder"] / "encoder.pt")
    saved["config"] |= dict(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    torch.save(saved, tmp_path / "encoder.pt")
    for broken in (dict(mean=(0.5, 0.4)), dict(std=(1.0,)), dict(std=(1.0, 0.0, 1.0))):
        torch.save(saved | dict(config=saved["config"] | broken), tmp_path / "broken.pt")
        with pytest.raises(UserError, match="tells mean .* and std .*: expected 3 numbers each, std above 0"):
            look("--target encoder", tmp_path / "broken.pt")
    assert look("--target encoder", teachers["encoder"]).change is None
    torch.testing.assert_close(look("--target encoder", tmp_path / "encoder.pt").change, other.change)


def test_of_a_file_with_several_encoders_one_teaches(tmp_path):
    states = {name: VisionTransformer(16, **MODELS["vit_test"]).state_dict() for name in ("one", "teacher")}
    torch.save(states, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="holds 2 encoders: one, teacher; --teacher-key NAME takes one of"):
        look("--target encoder", tmp_path / "dino.pth")
    found = look("--target encoder --teacher-key teacher", tmp_path / "dino.pth").encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in states["teacher"].items())


def test_ranks_that_read_different_teachers_are_refused(teachers, monkeypatch):
    monkeypatch.setattr(World, "all_gather", lambda world, value: [value, "of another host"])
    with pytest.raises(UserError, match="the processes read different teachers from .* expected the same"):
        look("--target clip", teachers["clip"])


def test_importance_masks_pixels_too_with_a_teacher_of_either_kind(pretrain, tmp_path):
    for teacher in ("clip", "encoder"):
        pretrain("--masking importance --steps 1", teacher, teacher)
        assert (tmp_path / teacher / "reconstruction.png").exists()


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("row, columns", [("MFF_EVA", 4), ("MFF_MILAN", 5)])
def test_a_run_draws_features_in_place_of_pixels(pretrain, tmp_path, capsys, row, columns):
    pretrain(f"{ROWS[row]} --steps 1")
    assert f"{tmp_path}/a/features.png " in capsys.readouterr().out
    assert not list((tmp_path / "a").glob("reconstruction*"))
    for name in ("features.png", "features-000000.png", "features-000001.png"):
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.size == (6 + columns * (128 + 6), 46 + 2 * (128 + 6))


def tile(sheet, column, row=0, side=128):
    """The pixels of one tile of a sheet."""
    left, top = 6 + column * (side + 6), 46 + row * (side + 6)
    return torch.tensor(np.asarray(sheet, dtype=int)[top:top + side, left:left + side])


def test_equal_features_have_equal_pictures_and_what_is_not_predicted_is_grey():
    images, tokens, ids = torch.rand(2, 3, 16, 16), torch.randn(2, 17, 24), torch.rand(2, 16).argsort(dim=1)
    importance = torch.arange(16.0).expand(2, 16) + 1
    one = torch.ones(3)
    for count in (16, 12):
        mask = torch.zeros(2, 16).scatter(1, ids[:, -count:], 1.0)
        pred = tokens[:, 1:].gather(1, ids[:, -count:, None].expand(-1, -1, 24)) * 7
        sheet = feature_sheet(images, tokens, importance, pred, ids[:, -count:], mask, one, one, 4, "")
        for row in (0, 1):
            true, predicted, heat = (tile(sheet, column, row)[16::32, 16::32] for column in (3, 4, 2))
            hidden = mask[row].view(4, 4) == 1
            assert (true - predicted)[hidden].abs().max() <= 1 and (predicted[~hidden] == 128).all()
            assert heat[3, 3].tolist() == [255] * 3 and heat.flatten(0, 1)[:, 0].diff().min() > 0
    assert len(true.flatten(0, 1).unique(dim=0)) > 10


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, message", [
    ("--target clip", "--target clip needs a teacher, and none is given: expected --teacher FILE"),
    ("--target encoder", "--target encoder needs a teacher"),
    ("--masking importance", "--masking importance needs a teacher"),
    ("--teacher CLIP", "a flag of a --teacher is given, and nothing asks for one: expected --target clip or"),
    ("--teacher-std 1,1,1", "a flag of a --teacher is given"),
    ("--target clip --teacher CLIP --norm-pix-loss", "--norm-pix-loss is of pixels, and --target clip pred"),
    ("--target clip --teacher CLIP --low-pass-radius 40", "--low-pass-radius is of pixels, and --target"),
    ("--decoder prompting", "--decoder prompting predicts all tokens, also the class token, which has no"),
    ("--target clip --teacher /nowhere.pth", "checkpoint /nowhere.pth does not exist"),
    ("--target clip --teacher LICENSE", "checkpoint LICENSE is a text of"),
    ("--target clip --teacher docs", "docs holds none of last.pt, "),
    ("--target clip --teacher MAE", "holds no CLIP tower; it begins with "),
    ("--target encoder --teacher CLIP", "is CLIP's: expected --target clip"),
    ("--target clip --teacher CLIP --in-chans 1 --mean 0.5 --std 0.2",
     "takes 3 channels, and --in-chans is 1: expected --in-chans 3; grey images become colour"),
    ("--target clip --teacher CLIP --teacher-key a", "is CLIP's: expected no --teacher-key"),
    ("--target clip --teacher CLIP --teacher-mean 0.5", "--teacher-mean 0.5: expected 3 numbers, one per"),
    ("--target clip --teacher CLIP --teacher-std 1,0,1", "expected 3 numbers above 0, one per channel"),
    ("--target clip --teacher CLIP --img-size 18", "img_size 18x18 is not a multiple of patch_size 4"),
    ("--target clip --teacher CLIP --img-size 2", "img_size 2x2 is not a multiple of patch_size 4"),
    ("--target clip --teacher CLIP --dtype float16 --teacher-std 1e-9,1,1", "not finite in torch.float16"),
    ("--target slip", "invalid choice: 'slip'"),
])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, cache, teachers, capfd, monkeypatch, flags,
                                                 message):
    monkeypatch.chdir(ROOT)
    words = {"CLIP": str(teachers["clip"]), "MAE": str(teachers["encoder"])}
    flags = [*SMALL, "--steps", "2", "--output-dir", str(tmp_path / "a"), "--cache-dir", str(cache),
             *(words.get(word, word) for word in flags.split())]
    with pytest.raises(SystemExit) as stop:
        run(train_pretrain.main, parse(train_pretrain.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()
