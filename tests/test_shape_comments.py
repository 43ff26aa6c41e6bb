"""Shape comments are true: each is compared with the shape of what its line computes, while the line runs.

A shape comment is one like (B, 1 + L, D) behind an assignment or a return. Of several names it holds for each
or has a shape for each; "..." is any number of dimensions, and L' another L.
"""

import ast
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sources import FILES, ROOT, comments, complaints

from mff_data import cifar, crops, decode, shapes
from mff_data.sources import ImageArray
from mff_data.views import Views, collate
from mff_min import augment, mim, probe, targets, vit
from mff_min.kernels import reference
from mff_min.kernels.ops import TORCH
from mff_run import picture
from mff_run.finite import FiniteSteps
from mff_run.world import World
from tools import examine, measures


def read_shapes(comment):
    """The shapes that a comment begins with: "(B, 1 + L'), ..." gives [["B", "1 + L_"]]."""
    found, rest = [], comment.removeprefix("each ")
    while match := re.match(r"\(([\w' ,.+*/-]*)\)(?:,| and)? ?", rest):
        found.append([part.strip().replace("'", "_") for part in match[1].split(",") if part.strip()])
        rest = rest[match.end():]
    return found


def shape_comments(path, text):
    """The shape comments of a file: {(path, line): (function, last line of the statement, names, shapes)}.

    The function is (first line, name), as its code object has them. A return has no names.
    """
    found = {(path, line): (None, line, [], shapes) for line, comment, alone in comments(text)
             if not alone and (shapes := read_shapes(comment))}
    for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
        key = min([function.lineno, *(node.lineno for node in function.decorator_list)]), function.name
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign | ast.Return):
                continue
            for place in [(path, line) for line in range(node.lineno, node.end_lineno + 1)]:
                if place in found:
                    *_, said = found.pop(place)
                    names = [name.id for target in getattr(node, "targets", []) for name in ast.walk(target)
                             if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
                    said = said if len(said) > 1 else said * max(len(names), 1)
                    found[path, node.lineno] = key, node.end_lineno, names, said
    return found


class Witness:
    """While it is entered, every shape comment of `claims` is compared with what its line has computed.

    In a comment, a name is the function's local int of that name; else one of the sizes that truth allows, or
    any size where truth says nothing: the same one throughout a call.
    """

    def __init__(self, claims, truth):
        self.claims, self.truth, self.seen, self.false = claims, truth, set(), set()
        self.functions = {(path, function) for (path, _), (function, *_) in claims.items()}

    def __enter__(self):
        self.tracer_before = sys.gettrace()
        sys.settrace(self.call)

    def __exit__(self, *error):
        sys.settrace(self.tracer_before)

    def call(self, frame, event, argument):
        code = frame.f_code
        path = code.co_filename.removeprefix(f"{ROOT}/").replace("mff_min/kernels/", "kernels/")
        if (path, (code.co_firstlineno, code.co_name)) not in self.functions:
            return None
        running, letters = None, {}

        def trace(frame, event, value):
            nonlocal running
            _, end, names, said = self.claims[path, running] if running else (None, 0, [], [])
            if running and (event == "return" or not running <= frame.f_lineno <= end):
                values = [frame.f_locals.get(name) for name in names] if names else [value]
                if all(hasattr(value, "shape") for value in values):    # not where it has raised
                    self.compare((path, running), zip(values, said, strict=True), frame.f_locals, letters)
                running = None
            if event == "line" and (path, frame.f_lineno) in self.claims:
                running = frame.f_lineno
            return trace
        return trace

    def compare(self, place, pairs, known, letters):
        self.seen.add(place)
        for value, said in pairs:
            open_ended = said[0] == "..."
            sizes, wanted = (value.shape[1 - len(said):], said[1:]) if open_ended else (value.shape, said)
            if len(sizes) != len(wanted) or not all(
                    self.agrees(*pair, known, letters) for pair in zip(wanted, sizes, strict=True)):
                self.false.add(f"{place[0]}:{place[1]}: ({', '.join(said)}) is {tuple(value.shape)}")

    def agrees(self, expression, size, known, letters):
        names = set(re.findall(r"[a-zA-Z]\w*", expression))
        values = letters | {name: known[name] for name in names if type(known.get(name)) is int}
        for name in names - set(values):
            candidates = self.truth.get(name, range(1, 1024))
            fits = [n for n in candidates if eval(expression, {}, values | {name: n}) == size]
            if not fits:
                return False
            values[name] = letters[name] = fits[0]
        allowed = all(values[name] in self.truth.get(name, [values[name]]) for name in names)
        return allowed and eval(expression, {}, values) == size


# No two letters share a size. D, h, d and T have one in the encoder and one in the decoder, which is E wide.
TRUTH = dict(B=[6], C=[3, 1], P=[4], H=[36], W=[44], L=[99], L_=[104], V=[24], K=[75], T=[25, 100],
             Q=[25, 100, 75], M=[7], N=[48], D=[60, 32], E=[32], h=[5, 2], d=[12, 16], n=[8], S=[37], G=[13],
             H_=[9, 10, 36], W_=[11, 10, 44], F=[5])


def exercise():
    """Call what the shape comments are about, with the sizes of TRUTH."""
    size = dict(img_size=(36, 44), patch_size=4, embed_dim=60, depth=7, num_heads=5)
    target = targets.PixelTarget(4, mean=[0.4] * 3, std=[1.0] * 3, low_pass_radius=5.25)
    model = mim.MaskedAutoencoder(vit.VisionTransformer(**size), range(7), target, decoder_embed_dim=32,
                                  decoder_depth=1, decoder_num_heads=2)
    images, noise = torch.rand(6, 3, 36, 44), torch.rand(6, 99)
    mean, std = torch.full((3,), 0.4), torch.ones(3)
    pixels, box = (images * 255).to(torch.uint8), torch.tensor([[2, 3, 20, 30]] * 6)
    TORCH.prepare(pixels, mean, std, partner=torch.arange(6).flip(0), lam=torch.rand(6), box=box)
    world, optimizer = World(0, 1, 0, torch.device("cpu")), torch.optim.AdamW([mean], fused=True)
    FiniteSteps(optimizer, world, None, None, None, "", half=True).guard(1, 0.1, noise[0, 0], noise[0, 1])
    filtered = target.filter(TORCH.prepare(pixels, mean, std))
    reference.low_pass_products(images, 5.25)
    model(images, noise, pixels)
    pred, ids, mask = model.predict(images, noise)
    TORCH.patch_loss(pred, pixels, ids, 4, True, mean, std)
    levels, pairs = [torch.rand(6, 25, 60)] * 7, [(torch.rand(60, 60), torch.rand(60))] * 6
    reference.merge_projections(levels, torch.rand(7), pairs)
    model.fusion_weights()
    with mock.patch.object(vit, "CPU_HAS_BF16", True):
        q, k, v = (torch.rand(6, 5, n, 12, dtype=torch.bfloat16, requires_grad=True) for n in (75, 100, 100))
        vit.attend(q, k, v)
    for norm_pix in (False, True):
        targets.patch_mean_loss(images, ids, 4, norm_pix, TORCH)
        picture.reconstruction_sheet(images, filtered, pred, ids, mask, 4, norm_pix, mean, std, "")
    picture.to_uint8(images[:, :1], mean[:1], std[:1])
    for pool in ("token", "avg"):
        classifier = vit.VisionTransformer(**size, num_classes=10, global_pool=pool, drop_path=0.5)
        classifier(images, torch.rand(6, 7, 2))
    vit.resize_pos_embed(model.encoder.pos_embed, (9, 11), (13, 8))

    tokens = torch.rand(6, 100, 60)
    measures.log_amplitudes(tokens[:, 1:], (9, 11))
    weights = measures.attention_weights(model.encoder.blocks[0].attn, tokens)
    measures.attention_distance(weights, (9, 11), 4)
    measures.unbiased_hsic(measures.gram(tokens), measures.gram(levels[0]))
    examine.look_at(model.encoder, None, images, TORCH)

    features, labels = torch.rand(6, 60), torch.arange(6)
    scores = probe.logistic_scores(torch.rand(8, 60), torch.arange(8), 13, features)
    probe.count_hits(scores, labels)
    probe.knn_scores(torch.rand(8, 60), torch.arange(8), 13, features, 3, 0.07)

    source = ImageArray(np.zeros((6, 72, 88, 3), np.uint8), {"class": [0] * 6}, [""], "")
    for crop in crops.CROPS:
        view = Views(source, crop, (36, 44), 3, 99, 0, lambda image, rng: image, 1.0)
        collate([view[0, i] for i in range(6)])
    deep = decode.eight_bits(np.zeros((36, 44, 5), np.uint16))
    crops.resize_to_cover(deep, (18, 22), crops.BICUBIC)
    crops.to_mode(deep, 5)
    augment.erase(images, box, torch.arange(6))
    for mix in (augment.Mix(0.3), augment.Mix(0.75, (0, 0, 18, 22))):
        augment.mix_images(images, mix)
    augment.soft_targets(labels, 13, 0.1, 0.3)
    shapes.render("train", range(8), 37)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test.bin").write_bytes(bytes(8 * 3074))
        cifar.read_cifar(folder, "val", "cifar100")


def false_comments(files, truth, work):
    """(complaints, comments that work() never reaches, number of comments) of {path: text}."""
    claims = {}
    for path, text in files.items():
        claims |= shape_comments(path, text)
    witness = Witness(claims, truth)
    with witness, torch.no_grad():
        work()
    return sorted(witness.false), sorted(set(claims) - witness.seen), len(claims)


def test_shape_comments_are_true():
    files = {path: text for path, text in FILES.items() if path.startswith("mff_min/") or "reference" in path}
    false, unseen, _ = false_comments(files, TRUTH, exercise)
    assert false == []
    assert unseen == []


PLANTED = """
def attend(x, ids):
    B, T, D = x.shape
    y = x.transpose(1, 2)                                               # (B, D, T)
    first, last = y[..., 0], y[..., -1]                                 # each (B, D)
    y = x.gather(
        1, ids)                                                         # (B, V, V)
    return y.flatten(1)                                                 # (..., V * V)
"""


@pytest.mark.parametrize("old, new, complaint", [
    ("", "", ""), ("(B, D, T)", "(B, T, D)", "planted:4: (B, T, D) is (6, 60, 25)"),
    ("each (B, D)", "(B, D), (B, T)", "planted:5: (B, T) is (6, 60)"),
    ("(B, V, V)", "(B, V, D)", "planted:6: (B, V, D) is (6, 24, 24)"),
    ("(B, V, V)", "(B, V)", "planted:6: (B, V) is (6, 24, 24)"),
    ("V * V", "V", "planted:8: (..., V) is (6, 576)"),
    ("T, D = x", "D, T = x", "planted:4: (B, D, T) is (6, 60, 25)"),
])
def test_a_false_shape_comment_is_caught(old, new, complaint):
    text, names = PLANTED.replace(old, new), {}
    exec(compile(text, "planted", "exec"), names)
    x, ids = torch.zeros(6, 25, 60), torch.zeros(6, 24, 24, dtype=torch.int64)
    false, unseen, count = false_comments({"planted": text}, TRUTH, lambda: names["attend"](x, ids))
    assert count == 4 and unseen == [] and (complaint in str(false) if complaint else false == [])


def test_a_shape_comment_that_is_never_reached_is_caught():
    _, unseen, _ = false_comments({"planted": PLANTED}, TRUTH, lambda: None)
    assert unseen == [("planted", line) for line in (4, 5, 6, 8)]


def missing_from_legend(path, text):
    """The letters of a file's shape comments must stand in its docstring, in the paragraph "Shapes: ..."."""
    legend = re.search(r"^Shapes: (.*?)(\n\n|\Z)", ast.get_docstring(ast.parse(text)) or "", re.M | re.S)
    named = re.findall(r"\w+", legend[1]) if legend else []
    said = [said for *_, pairs in shape_comments(path, text).values() for said in pairs]
    letters = {name.rstrip("_") for shape in said for name in re.findall(r"[a-zA-Z]\w*", ",".join(shape))}
    return [f"{path}: {letter} is not in its legend" for letter in sorted(letters)
            if len(letter) == 1 and letter not in named]


def test_shape_letters_are_explained_at_the_top():
    assert complaints(missing_from_legend) == []


def test_an_unexplained_letter_is_caught():
    legend = '"""An op.\n\nShapes: B images, V visible patches,\nD width.\n\nT: tokens."""\n'
    assert missing_from_legend("planted", legend + PLANTED) == ["planted: T is not in its legend"]
    assert len(missing_from_legend("planted", PLANTED)) == 4
