"""RandAugment, random erasing, mixup and CutMix, and the random numbers that they draw.

Each is compared with timm where it is installed: timm's sources of random numbers are replaced by an Rng of
the same key, so that both draw the same numbers, and what could differ is what they do with them.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mff_min import augment, rng
from mff_min.augment import (
    FILL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPERATIONS,
    Mix,
    apply,
    draw_level,
    draw_mix,
    erase,
    erasing_box,
    fill_color,
    mix_arguments,
    mix_images,
    rand_augment,
    soft_targets,
)
from mff_min.kernels.ops import TORCH
from mff_min.rng import Rng, hash64, hash64_tensor, hash_key, int64_key, normal_noise

EPS = torch.finfo(torch.float32).eps
# Radius times cosine in fp32. Rounding u moves log u by eps / 2, the radius' square by eps, and the radius by
# sqrt(eps) at most, |sqrt(a) - sqrt(b)| being at most sqrt(|a - b|). The other roundings are relative to the
# radius, below 7: eps of its own, and 8 eps of the cosine, whose angle is below 2 pi and rounded twice.
NOISE_BOUND = math.sqrt(EPS) + 7 * 9 * EPS
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
FILLS = {"L": (116,), "RGB": FILL, "RGBA": (*FILL, 90)}


def picture(mode="RGB", height=37, width=53, seed=0):
    """Waves with some noise, of values from 30 to 220: what an operation does to either can be seen."""
    y, x, c = np.meshgrid(range(height), range(width), range(CHANNELS[mode]), indexing="ij")
    waves = 125 + 80 * np.sin(x / (4 + c)) * np.cos(y / (7 - c))
    values = waves + np.random.default_rng(seed).integers(-15, 16, waves.shape)
    return Image.fromarray(values.astype(np.uint8).squeeze(), mode if mode == "RGBA" else None)


def pixels(image):
    return np.asarray(image).astype(int)


def ks_distance(draws, cdf):
    """The largest distance between the share of draws below x and cdf(x)."""
    below = cdf(np.sort(draws))
    rank = np.arange(len(draws) + 1) / len(draws)
    return max(np.abs(below - rank[:-1]).max(), np.abs(below - rank[1:]).max())


def ks_bound(n, chance=1e-6):
    """What ks_distance exceeds with at most this chance (Massart, Ann. Probab. 1990)."""
    return math.sqrt(math.log(2 / chance) / (2 * n))


def normal_cdf(x):
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


# ---------------------------------------------------------------- random numbers


def test_streams_keep_their_numbers_and_new_ones_have_their_own():
    old = rng.ORDER, rng.CROP, rng.MASK, rng.REPLACE, rng.SHAPE
    assert old == (0, 1, 2, 3, 4)
    assert (rng.AUGMENT, rng.ERASE, rng.MIX, rng.NOISE) == (5, 6, 7, 8)


def test_two_uses_of_a_sample_share_no_numbers():
    streams = rng.CROP, rng.MASK, rng.AUGMENT, rng.ERASE, rng.MIX, rng.NOISE
    keys = [(0, stream, epoch, index) for stream in streams for epoch in range(3) for index in range(20)]
    assert len({hash_key(*key) for key in keys}) == len(keys)
    draws = np.concatenate([Rng(*key).random(100) for key in keys])
    assert len(np.unique(draws)) == len(draws)


@pytest.mark.parametrize("draw", [Rng.normal, lambda r: r.beta(0.8, 0.8), lambda r: r.beta(3, 0.2)])
def test_every_distribution_is_a_function_of_the_key(draw):
    one, again, other = Rng(1, 2), Rng(1, 2), Rng(2, 1)
    first = [draw(one) for _ in range(5)]
    assert first == [draw(again) for _ in range(5)] and len(set(first)) == 5
    assert not set(first) & {draw(other) for _ in range(5)}


def test_normal_numbers_are_normal():
    draws = np.array([Rng(3, i).normal() for i in range(4000)])
    assert ks_distance(draws, normal_cdf) < ks_bound(4000)
    source = Rng(4)
    draws = np.array([source.normal() for _ in range(4000)])
    assert ks_distance(draws, normal_cdf) < ks_bound(4000)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / math.sqrt(4000)


@pytest.mark.parametrize("a, b, cdf", [
    (1, 1, lambda x: x), (0.5, 0.5, lambda x: 2 / math.pi * np.arcsin(np.sqrt(x))),
    (0.8, 1, lambda x: x ** 0.8), (1, 0.3, lambda x: 1 - (1 - x) ** 0.3), (0.05, 1, lambda x: x ** 0.05),
    (2, 2, lambda x: x ** 2 * (3 - 2 * x)), (2, 1, np.square), (1, 4, lambda x: 1 - (1 - x) ** 4),
])
def test_beta_numbers_have_the_beta_distribution(a, b, cdf):
    source = Rng(5)
    draws = np.array([source.beta(a, b) for _ in range(2000)])
    assert ks_distance(draws, cdf) < ks_bound(2000)


@pytest.mark.parametrize("a", [1.0, 2.5])
def test_gamma_candidates_are_accepted_as_often_as_the_method_says(a):
    class Counting(Rng):
        candidates = 0

        def normal(self):
            self.candidates += 1
            return super().normal()

    source, n, d = Counting(22), 4000, a - 1 / 3
    for _ in range(n):
        source.log_gamma(a)
    # The area below v^d e^(d - dv), v = (1 + cx)^3, over that below the normal bell that covers it.
    share = math.exp(d) * math.gamma(a) * d ** (0.5 - a) / math.sqrt(2 * math.pi)
    assert abs(n / source.candidates - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_beta_of_mixup_has_its_mean_and_variance():
    source = Rng(6)
    draws = np.array([source.beta(0.8, 0.8) for _ in range(6000)])
    variance = 0.25 / 2.6                                               # of Beta(a, a): 1 / (4 (2 a + 1))
    kurtosis = 3 - 6 / 4.6                                              # and 3 - 6 / (2 a + 3)
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(variance / 6000)
    spread = variance * math.sqrt((kurtosis - 1) / 6000)                # of a mean of squares
    assert abs(((draws - 0.5) ** 2).mean() - variance) < 5 * spread


@pytest.mark.parametrize("a", [1e-8, 1e-3, 1e6])
def test_beta_stays_in_the_unit_interval_for_extreme_shapes(a):
    draws = np.array([Rng(7, i).beta(a, a) for i in range(400)])
    assert ((0 <= draws) & (draws <= 1)).all()
    side = (draws > 0.5).mean()                                         # not always the one or the other
    assert abs(side - 0.5) < 5 * 0.5 / math.sqrt(400)
    ends = ((draws < 0.01) | (draws > 0.99)).mean()
    assert ends > 0.9 if a < 1 else np.abs(draws - 0.5).max() < 5 / math.sqrt(8 * a)


# ---------------------------------------------------------------- noise on the device


def test_the_hash_in_pytorch_has_the_bits_of_the_hash_in_numpy():
    x = np.concatenate([hash64(np.arange(5000, dtype=np.uint64)), np.uint64([0, 1, 2 ** 63, 2 ** 64 - 1])])
    assert (x >= 2 ** 63).sum() > 2000                                  # negative as int64: shifts matter
    got = hash64_tensor(torch.from_numpy(x.view(np.int64)))
    assert np.array_equal(got.numpy().view(np.uint64), hash64(x))


def test_an_int64_key_has_the_bits_of_the_key():
    keys = [int64_key(0, rng.NOISE, 1, i) for i in range(50)]
    assert min(keys) < 0 < max(keys)
    assert [key % 2 ** 64 for key in keys] == [int(hash_key(0, rng.NOISE, 1, i)) for i in range(50)]


def test_noise_is_box_and_muller_of_the_numbers_of_an_rng():
    got = normal_noise(torch.tensor([int64_key(8, 1), int64_key(8, 2)]), (3, 5, 7))
    assert got.shape == (2, 3, 5, 7) and got.dtype == torch.float32
    counter = np.arange(105, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = hash64(np.stack([hash_key(8, 1) + counter, hash_key(8, 2) + counter]))
    assert np.array_equal(Rng(8, 2).random(105), (bits[1] >> np.uint64(11)) * 2.0 ** -53)
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + 1.0) / 2 ** 32))
    want = radius * np.cos(2 * np.pi * (bits & np.uint64(2 ** 32 - 1)) / 2 ** 32)
    assert np.abs(got.reshape(2, -1).numpy() - want).max() < NOISE_BOUND


def test_noise_is_standard_normal_and_independent():
    keys = torch.tensor([int64_key(9, i) for i in range(4)])
    noise = normal_noise(keys, (10_000,)).double()                      # (4, 10000)
    for row in noise:
        assert ks_distance(row.numpy(), normal_cdf) < ks_bound(10_000)
    assert abs(noise.mean()) < 5 / math.sqrt(40_000)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 40_000)
    both = np.corrcoef(np.concatenate([noise[:, :-1], noise[:, 1:]]))   # of samples and of neighbours
    assert np.abs(both - np.eye(8)).max() < 5 / math.sqrt(10_000)


# ---------------------------------------------------------------- RandAugment


def test_fill_is_the_mean_in_8_bits():
    assert FILL == fill_color(IMAGENET_MEAN) == (124, 116, 104)
    assert fill_color((0.45,)) == (115,) and fill_color((1.0, 0.0)) == (255, 0)


def test_there_are_fifteen_operations():
    assert len(OPERATIONS) == 15
    assert {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"} == set(augment.MOVES)


@pytest.mark.parametrize("mode", CHANNELS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_size_and_mode_and_does_something(name, mode):
    image = picture(mode)
    before = image.tobytes()
    for level in (0.9, -0.9) if name not in augment.TONES else (0.9,):
        got = apply(name, image, level, FILLS[mode])
        assert (got.size, got.mode) == (image.size, mode) and image.tobytes() == before
        assert (got.tobytes() == before) == (name == "Color" and mode == "L")   # grey has no colour


@pytest.mark.parametrize("name", [*augment.BLENDS, *augment.MOVES, "Solarize", "SolarizeAdd"])
def test_magnitude_0_changes_nothing(name):
    image = picture()
    assert apply(name, image, 0.0, FILL).tobytes() == image.tobytes()


@pytest.mark.parametrize("level", [0.0, 0.3, 0.55, 0.9, 1.0])
def test_tones_are_the_stated_functions_of_a_value(level):
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    value, bits, threshold = np.arange(256), 4 - int(4 * level), 256 - int(256 * level)
    raised = np.minimum(value + int(110 * level), 255)
    want = {"Invert": 255 - value, "Posterize": value // 2 ** (8 - bits) * 2 ** (8 - bits),
            "Solarize": np.where(value < threshold, value, 255 - value),
            "SolarizeAdd": np.where(value < 128, raised, value)}
    for name, values in want.items():
        assert np.array_equal(pixels(apply(name, image, level, (0,)))[0], values), name


def test_magnitude_10_leaves_no_bit():
    for mode in ("L", "RGB"):
        assert pixels(apply("Posterize", picture(mode), 1.0, FILLS[mode])).max() == 0


def test_auto_contrast_and_equalize_use_the_whole_range():
    image = picture("L")
    assert pixels(image).min() >= 30 and pixels(image).max() <= 220
    for name in ("AutoContrast", "Equalize"):
        values = pixels(apply(name, image, 0.5, (0,)))
        assert values.min() <= 1 and values.max() >= 254
    counts = np.histogram(pixels(apply("Equalize", image, 0.5, (0,))), bins=4, range=(0, 256))[0]
    assert np.abs(counts - 37 * 53 / 4).max() < 0.1 * 37 * 53


@pytest.mark.parametrize("name, plain", [
    ("Color", lambda x: np.repeat(pixels(picture().convert("L"))[..., None], 3, axis=2)),
    ("Contrast", lambda x: pixels(picture().convert("L")).mean().round()), ("Brightness", lambda x: 0),
])
@pytest.mark.parametrize("level", [-1.0, -0.5, 0.4, 1.0])
def test_blends_go_towards_the_plain_image_or_away_from_it(name, plain, level):
    x = pixels(picture())
    want = (1 + 0.9 * level) * x - 0.9 * level * plain(x)
    got = pixels(apply(name, picture(), level, FILL))
    assert np.abs(got - want.clip(0, 255)).max() <= 1                   # cut to whole numbers


@pytest.mark.parametrize("level, shift", [(0.5, 9), (-0.5, -9)])
def test_translations_move_by_a_share_of_the_side_and_fill_the_rest(level, shift):
    image = picture(height=40, width=40)                                # 0.45 * 40 * 0.5 is 9 pixels
    x = pixels(image)
    kept, filled = (slice(0, 31), slice(31, 40)) if shift > 0 else (slice(9, 40), slice(0, 9))
    source = slice(9, 40) if shift > 0 else slice(0, 31)
    across = pixels(apply("TranslateX", image, level, FILL))
    assert np.array_equal(across[:, kept], x[:, source]) and (across[:, filled] == FILL).all()
    down = pixels(apply("TranslateY", image, level, FILL))
    assert np.array_equal(down[kept], x[source]) and (down[filled] == FILL).all()


def test_shear_and_rotation_fill_the_corners_they_uncover():
    image, white = picture(height=40, width=40), Image.new("RGB", (40, 40), "white")
    for name in ("Rotate", "ShearX", "ShearY"):
        got = pixels(apply(name, white, 1.0, FILL))
        corners = [tuple(got[y, x]) for y in (0, -1) for x in (0, -1)]
        assert FILL in corners and (got[15:25, 15:25] == 255).all()
        assert apply(name, image, -1.0, FILL).tobytes() != apply(name, image, 1.0, FILL).tobytes()


@pytest.mark.parametrize("name, where", [
    ("Rotate", (30 + 10 * math.sqrt(0.75), 20 - 5)), ("ShearX", (40 - 0.3 * 20, 20)),
    ("ShearY", (40, 20 - 0.3 * 40)), ("TranslateX", (40 - 0.45 * 60, 20)),
    ("TranslateY", (40, 20 - 0.45 * 40)),
])
def test_moves_take_a_spot_where_their_equations_say(name, where):
    spot = np.zeros((40, 60), np.uint8)
    spot[18:22, 38:42] = 100                                            # its middle at (40, 20), in edges
    moved = pixels(apply(name, Image.fromarray(spot), 1.0, (0,)))
    y, x = np.indices(moved.shape) + 0.5
    centre = (moved * x).sum() / moved.sum(), (moved * y).sum() / moved.sum()
    assert np.abs(np.subtract(centre, where)).max() < 0.2               # negative lobes are cut off


@pytest.mark.parametrize("name", augment.MOVES)
def test_moves_are_bicubic_and_so_overshoot_at_an_edge(name):
    edges = np.full((40, 60), 60, np.uint8)
    edges[::8], edges[:, ::8] = 180, 180
    values = pixels(apply(name, Image.fromarray(edges), 0.7, (60,)))
    assert values.min() < 60 or values.max() > 180


@pytest.mark.parametrize("level", [-0.8, 0.8])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_grey_image_is_treated_as_each_channel_of_a_grey_colour_image(name, level):
    grey = picture("L")
    level = abs(level) if name in augment.TONES else level
    got = pixels(apply(name, grey, level, (116,)))
    want = pixels(apply(name, grey.convert("RGB"), level, (116,) * 3))
    assert np.array_equal(np.repeat(got[..., None], 3, axis=2), want)


@pytest.mark.parametrize("name", OPERATIONS)
def test_alpha_moves_with_the_colours_and_is_otherwise_kept(name):
    image = picture("RGBA")
    alpha = image.getchannel("A")
    got = apply(name, image, 0.8, (*FILL, 90))
    assert got.convert("RGB").tobytes() == apply(name, image.convert("RGB"), 0.8, FILL).tobytes()
    want = apply(name, alpha, 0.8, (90,)) if name in augment.MOVES else alpha
    assert got.getchannel("A").tobytes() == want.tobytes()
    assert (want.tobytes() != alpha.tobytes()) == (name in augment.MOVES)


def test_levels_are_normal_clipped_and_of_either_sign():
    source, n = Rng(10), 2000
    for name in ("Rotate", "Color"):
        levels = np.array([draw_level(name, source, 9, 0.5) for _ in range(n)])
        assert abs((levels < 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
    inside = lambda x: np.where(x < 1, normal_cdf((x * 10 - 9) / 0.5), 1.0)     # noqa: E731
    below = np.sort(np.abs(levels))
    assert below.max() == 1.0
    assert np.abs(inside(below[below < 1]) - np.arange((below < 1).sum()) / n).max() < ks_bound(n) + 1 / n
    tones = [draw_level("Invert", source, 0, 3) for _ in range(200)]
    assert min(tones) == 0.0 and 0 < max(tones) <= 1                    # clipped below, never negative


def count_operations(monkeypatch, n, **settings):
    """The names of the operations that n calls of rand_augment apply, a list for each."""
    applied, image = [], picture()
    monkeypatch.setattr(augment, "apply", lambda name, image, *_: applied[-1].append(name) or image)
    for i in range(n):
        applied.append([])
        rand_augment(image, Rng(11, i), **settings)
    return applied


def test_two_operations_are_drawn_with_replacement_and_each_is_applied_half_of_the_time(monkeypatch):
    n = 3000
    applied = count_operations(monkeypatch, n)
    lengths = np.bincount([len(names) for names in applied]) / n
    assert np.abs(lengths - [0.25, 0.5, 0.25]).max() < 5 * 0.5 / math.sqrt(n)
    names = [name for call in applied for name in call]
    share = np.array([names.count(name) for name in OPERATIONS]) / len(names)
    assert np.abs(share - 1 / 15).max() < 5 * math.sqrt(1 / 15 / len(names))
    assert any(len(call) == 2 and call[0] == call[1] for call in applied)
    always = count_operations(monkeypatch, 50, num_ops=3, probability=1.0)
    assert {len(call) for call in always} == {3}


@pytest.mark.parametrize("mode", CHANNELS)
def test_rand_augment_is_a_function_of_image_and_key(mode):
    def results():
        return [rand_augment(picture(mode), Rng(0, rng.AUGMENT, 0, i), fill=FILLS[mode]) for i in range(40)]
    first = [image.tobytes() for image in results()]
    assert first == [image.tobytes() for image in results()]
    assert len(set(first)) > 20
    assert {(image.mode, image.size) for image in results()} == {(mode, (53, 37))}


def test_a_fill_of_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"fill \(124, 116, 104\) has 3 values.* channel of L"):
        rand_augment(picture("L"), Rng(0))


# ---------------------------------------------------------------- RandAugment and timm

TIMM = {"Posterize": "PosterizeIncreasing", "Solarize": "SolarizeIncreasing", "Color": "ColorIncreasing",
        "Contrast": "ContrastIncreasing", "Brightness": "BrightnessIncreasing",
        "Sharpness": "SharpnessIncreasing", "TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}


def drawing_from(source):
    """Python's random, as far as timm uses it, with the numbers of an Rng."""
    return SimpleNamespace(random=source.uniform, uniform=source.uniform,
                           gauss=lambda mean, std: mean + std * source.normal(),
                           randint=lambda low, high: source.integer(low, high + 1))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_timms_over_all_magnitudes(name, mode, monkeypatch):
    theirs = pytest.importorskip("timm.data.auto_augment")
    fill = FILLS[mode] if mode == "RGB" else FILLS[mode][0]
    image = picture(mode, seed=1)
    for magnitude in [*np.linspace(0, 10, 41).tolist(), 9.99, 1 / 3]:
        for sign in (1, -1) if name not in augment.TONES else (1,):
            half = SimpleNamespace(random=lambda sign=sign: 0.5 - 0.25 * sign)
            monkeypatch.setattr(theirs, "random", half)
            settings = dict(img_mean=fill, interpolation=Image.Resampling.BICUBIC)
            operation = theirs.AugmentOp(TIMM.get(name, name), 1.0, magnitude, hparams=settings)
            got = apply(name, image, sign * magnitude / 10, FILLS[mode])
            try:
                want = operation(image)
            except ValueError:                                          # Pillow refuses to keep 0 bits
                assert name == "Posterize" and magnitude == 10
                want = Image.new(mode, image.size)
            assert got.tobytes() == want.tobytes(), (magnitude, sign)


def test_rand_augment_equals_timms_with_the_same_draws(monkeypatch):
    theirs, timm_data = pytest.importorskip("timm.data.auto_augment"), pytest.importorskip("timm.data")
    transform = timm_data.create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1",
                                           interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    timms, = (step for step in transform.transforms if isinstance(step, theirs.RandAugment))
    by_name = {operation.name: operation for operation in timms.ops}
    ops = [by_name[TIMM.get(name, name)] for name in OPERATIONS]
    assert len(timms.ops) == len(ops) == 15

    equal, refused, changed = 0, 0, 0
    for seed in range(400):
        image, source = picture(seed=seed % 5), Rng(12, seed)
        monkeypatch.setattr(theirs, "random", drawing_from(source))
        draw = lambda _, n, replace, p, source=source: [ops[source.integer(0, 15)] for _ in range(n)]   # noqa
        monkeypatch.setattr(theirs, "np", SimpleNamespace(random=SimpleNamespace(choice=draw)))
        ours = Rng(12, seed)
        got = rand_augment(image, ours)
        try:
            want = timms(image)
        except ValueError:                                              # 0 bits, as above
            refused += 1
            continue
        assert got.tobytes() == want.tobytes(), seed
        assert ours.drawn == source.drawn
        equal, changed = equal + 1, changed + (got.tobytes() != image.tobytes())
    assert equal >= 390 and changed > 250, (equal, refused, changed)


# ---------------------------------------------------------------- random erasing


def test_erasing_boxes_have_the_stated_distribution():
    n = 4000
    boxes = np.array([erasing_box(224, 224, Rng(13, i), 0.25) for i in range(n)])
    erased = boxes[boxes[:, 2] > 0]
    assert (boxes[boxes[:, 2] == 0] == 0).all()
    assert abs(len(erased) / n - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    top, left, h, w = erased.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 224).all() and (left + w <= 224).all()
    area, aspect = h * w / 224 ** 2, h / w
    half = 0.5 / h.min() + 0.5 / w.min()                                # sides are rounded by half a pixel
    assert area.min() > 0.02 * (1 - half) and area.max() < 1 / 3 * (1 + half)
    assert aspect.min() > 0.3 * (1 - half) and aspect.max() < 1 / 0.3 * (1 + half)
    assert abs(np.log(aspect).mean()) < 5 * math.log(1 / 0.3) / math.sqrt(3 * len(erased))
    assert top.min() < 10 and (top + h).max() > 214


def test_probability_0_erases_nothing_and_1_everything():
    assert {erasing_box(32, 32, Rng(14, i), 0.0) for i in range(200)} == {(0, 0, 0, 0)}
    assert all(erasing_box(32, 32, Rng(14, i), 1.0)[2] > 0 for i in range(200))


def test_a_box_that_never_fits_erases_nothing():
    source = Rng(15)
    assert erasing_box(8, 8, source, 1.0, area=(2.0, 3.0), tries=4) == (0, 0, 0, 0)
    assert source.drawn == 1 + 4 * 2
    square = dict(area=(1.0, 1.0), aspect=(1.0, 1.0))                   # a whole side does not fit
    assert erasing_box(8, 8, source, 1.0, **square) == (0, 0, 0, 0) != erasing_box(9, 9, source, 1.0)


def test_the_aspect_of_an_erased_box_is_height_by_width():
    _, _, h, w = erasing_box(90, 90, Rng(23), 1.0, area=(0.25, 0.25), aspect=(2.25, 2.25))
    assert (h, w) == (round(45 * 1.5), round(45 / 1.5))


@pytest.mark.parametrize("size", [(224, 224), (32, 48), (48, 20), (5, 5), (1, 9)])
def test_erasing_boxes_equal_timms_with_the_same_draws(size, monkeypatch):
    theirs = pytest.importorskip("timm.data.random_erasing")
    timms, erased = theirs.RandomErasing(probability=0.8, mode="pixel", device="cpu"), 0
    for seed in range(300):
        source, ours = Rng(16, seed), Rng(16, seed)
        monkeypatch.setattr(theirs, "random", drawing_from(source))
        rows, columns = timms(torch.zeros(1, *size))[0].nonzero().T     # noise is never exactly 0
        top, left, h, w = erasing_box(*size, ours, 0.8)
        assert ours.drawn == source.drawn
        if h * w == 0:
            assert len(rows) == 0
            continue
        assert (top, left) == (rows.min(), columns.min()) and h * w == len(rows)
        assert (top + h - 1, left + w - 1) == (rows.max(), columns.max())
        erased += 1
    assert erased > (150 if min(size) > 5 else -1)


BOXES = torch.tensor([[2, 3, 20, 30], [0, 0, 0, 0], [10, 0, 1, 40], [0, 5, 0, 7], [4, 4, 28, 36]])


def erasable(dtype=torch.float32):
    return torch.rand(5, 3, 32, 40).to(dtype), torch.tensor([int64_key(17, i) for i in range(5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erase_fills_boxes_with_the_noise_of_the_sample_and_nothing_else(dtype):
    images, keys = erasable(dtype)
    noise = normal_noise(keys, (3, 32, 40)).to(dtype)
    want = images.clone()
    for i, (top, left, h, w) in enumerate(BOXES.tolist()):
        where = i, slice(None), slice(top, top + h), slice(left, left + w)
        want[where] = noise[where]
    got = erase(images, BOXES, keys)
    assert got is images and torch.equal(got, want)


def test_what_is_erased_does_not_depend_on_the_batch():
    images, keys = erasable()
    order = torch.tensor([4, 0, 2])
    alone = erase(images[order].clone(), BOXES[order], keys[order])
    assert torch.equal(erase(images, BOXES, keys)[order], alone)


def test_images_without_a_box_are_left_alone_and_cost_no_noise(monkeypatch):
    images, keys = erasable()
    asked = []
    count = lambda keys, shape: asked.append(len(keys)) or normal_noise(keys, shape)    # noqa: E731
    monkeypatch.setattr("mff_min.augment.normal_noise", count)
    before = images.clone()
    assert torch.equal(erase(images, torch.zeros(5, 4, dtype=torch.int64), keys), before) and asked == []
    erase(images, BOXES, keys)
    assert asked == [3]


def test_erased_values_have_the_moments_of_a_standard_normal():
    images, keys = torch.full((8, 3, 64, 64), 7.0), torch.tensor([int64_key(18, i) for i in range(8)])
    boxes = torch.tensor([[8, 4, 48, 56]] * 8)
    values = erase(images, boxes, keys)[:, :, 8:56, 4:60].double()
    n = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(n) and abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values ** 4).mean() - 3) < 5 * math.sqrt(96 / n)        # the variance of z ** 4 is 96
    assert len(values.unique()) > 0.9 * n                               # a value of its own for each channel


@pytest.mark.gpu
def test_on_a_gpu_erasing_and_mixing_wait_for_nothing_and_give_what_a_cpu_gives():
    images, keys = erasable()
    on_gpu, labels, mixes = images.cuda(), torch.arange(5).cuda(), (Mix(0.3), Mix(0.75, (6, 10, 18, 30)))
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        erase(on_gpu, BOXES, keys)
        mixed = [mix_images(on_gpu, mix) for mix in mixes]
        targets = soft_targets(labels, 7, 0.1, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    erase(images, BOXES, keys)
    assert (on_gpu.cpu() - images).abs().max() < NOISE_BOUND
    for got, mix in zip(mixed, mixes, strict=True):
        assert (got.cpu() - mix_images(images, mix)).abs().max() < NOISE_BOUND + 4 * EPS * images.abs().max()
    assert (targets.cpu() - soft_targets(labels.cpu(), 7, 0.1, 0.3)).abs().max() <= EPS


# ---------------------------------------------------------------- mixup and CutMix


def uint8_batch(n=6, size=(24, 40)):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8)
    return pixels, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)


def test_mixes_are_of_both_kinds_and_of_the_stated_distribution():
    n = 3000
    mixes = [draw_mix(Rng(19, i), 64, 96) for i in range(n)]
    blends = np.array([mix.lam for mix in mixes if mix.box is None])
    assert abs(len(blends) / n - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert abs(((blends - 0.5) ** 2).mean() - 0.25 / 2.6) < 5 * 0.25 / math.sqrt(len(blends))
    for mix in mixes:
        if mix.box is not None:
            top, left, bottom, right = mix.box
            assert 0 <= top <= bottom <= 64 and 0 <= left <= right <= 96
            assert mix.lam == 1 - (bottom - top) * (right - left) / (64 * 96)
    middles = np.array([mix.box for mix in mixes if mix.box is not None and 0.4 < mix.lam < 0.9])
    assert (middles[:, 0] == 0).any() and (middles[:, 2] == 64).any()
    assert (middles[:, 1] == 0).any() and (middles[:, 3] == 96).any()


def test_a_cutmix_box_is_clipped_and_its_share_is_that_of_what_is_left():
    # lam 0.75 asks for a box of half the image's sides.
    corner = SimpleNamespace(integer=lambda low, high: low, beta=lambda a, b: 0.75)
    assert draw_mix(corner, 40, 60, mixup=0, cutmix=1.0) == Mix(1 - 10 * 15 / 2400, (0, 0, 10, 15))
    middle = SimpleNamespace(integer=lambda low, high: high // 2, beta=lambda a, b: 0.75)
    assert draw_mix(middle, 40, 60, mixup=0, cutmix=1.0) == Mix(0.75, (10, 15, 30, 45))
    assert draw_mix(middle, 10, 10, mixup=0, cutmix=1.0) == Mix(0.75, (3, 3, 8, 8))     # an odd side, 5


def test_an_alpha_of_0_turns_a_kind_off_and_both_turn_off_mixing():
    mixes = {name: [draw_mix(Rng(20, i), 32, 32, **alphas) for i in range(60)] for name, alphas in {
        "mixup": dict(cutmix=0), "cutmix": dict(mixup=0), "none": dict(mixup=0, cutmix=0),
        "never": dict(switch_prob=0.0), "always": dict(switch_prob=1.0)}.items()}
    assert all(mix.box is None and 0 < mix.lam < 1 for mix in mixes["mixup"] + mixes["never"])
    assert all(mix.box is not None for mix in mixes["cutmix"] + mixes["always"])
    assert set(mixes["none"]) == {Mix(1.0, None)}
    with pytest.raises(ValueError, match="mixup -0.1 and cutmix 1.0"):
        draw_mix(Rng(0), 32, 32, mixup=-0.1)


@pytest.mark.parametrize("n", [1, 5, 6])
@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.75, (6, 10, 18, 30)), Mix()])
def test_images_are_mixed_with_the_batch_in_reverse_order(mix, n):
    batch, mean, std = uint8_batch(n)
    plain = TORCH.prepare(batch, mean, std)
    got = TORCH.prepare(batch, mean, std, **mix_arguments(mix, n, "cpu"))
    if mix.box is None:
        want = mix.lam * plain + (1 - mix.lam) * plain.flip(0)
    else:
        want = plain.clone()
        want[:, :, 6:18, 10:30] = plain.flip(0)[:, :, 6:18, 10:30]
    assert (got - want).abs().max() <= 4 * EPS * plain.abs().max()      # lam, 1 - lam, two products, a sum
    assert torch.equal(mix_images(plain, mix), got)
    assert torch.equal(got, plain) == (mix == Mix()) or n == 1


def test_no_mixing_is_told_as_nothing():
    assert mix_arguments(Mix(), 6, "cpu") == {} == mix_arguments(Mix(1.0, (3, 4, 3, 4)), 6, "cpu")


@pytest.mark.parametrize("smoothing, lam", [(0.0, 1.0), (0.1, 1.0), (0.1, 0.3), (0.0, 0.7), (0.5, 0.0)])
def test_soft_targets_are_smoothed_mixed_and_sum_to_1(smoothing, lam):
    labels = torch.tensor([3, 0, 3, 6, 2])
    got = soft_targets(labels, 7, smoothing, lam)
    assert got.shape == (5, 7) and got.dtype == torch.float32 and (got >= 0).all()
    assert (got.sum(dim=1) - 1).abs().max() <= 7 * EPS
    off, onto = smoothing / 7, 1 - smoothing
    for i, row in enumerate(got):
        want = torch.full((7,), off)
        want[labels[i]] += lam * onto
        want[labels[-1 - i]] += (1 - lam) * onto
        assert (row - want).abs().max() <= 4 * EPS
    assert (soft_targets(labels, 7, 0.0, 1.0) == torch.nn.functional.one_hot(labels, 7)).all()


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.2, 0.5)])
def test_mixing_equals_timms_with_the_same_draws(mixup, cutmix, monkeypatch):
    theirs = pytest.importorskip("timm.data.mixup")
    centred = SimpleNamespace(randint=lambda low, high, size: 5)
    monkeypatch.setattr(theirs, "np", SimpleNamespace(random=centred, sqrt=np.sqrt, clip=np.clip))
    if cutmix and theirs.rand_bbox((10, 10), 0.75)[:2] != (3, 8):
        pytest.skip("this timm cuts a box of an odd side one pixel short, as timm up to 1.0.25 does")
    timms = theirs.Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1, num_classes=11)
    batch, mean, std = uint8_batch()
    plain, labels, kinds = TORCH.prepare(batch, mean, std), torch.tensor([3, 9, 3, 0, 10, 7]), set()
    found = []

    def draw_box(*arguments, cutmix_bbox_and_lam=theirs.cutmix_bbox_and_lam, **settings):
        (top, bottom, left, right), lam = cutmix_bbox_and_lam(*arguments, **settings)
        found.append((top, left, bottom, right))
        return (top, bottom, left, right), lam
    monkeypatch.setattr(theirs, "cutmix_bbox_and_lam", draw_box)

    for seed in range(200):
        source, ours = Rng(21, seed), Rng(21, seed)
        first = [0.0]                                                   # timm asks whether to mix at all
        rand = lambda source=source, first=first: first.pop() if first else source.uniform()    # noqa: E731
        draws = SimpleNamespace(rand=rand, beta=source.beta,
                                randint=lambda low, high, size, source=source: source.integer(low, high))
        monkeypatch.setattr(theirs, "np", SimpleNamespace(random=draws, sqrt=np.sqrt, clip=np.clip))
        found.clear()
        want, targets = timms(plain.clone(), labels)

        mix = draw_mix(ours, 24, 40, mixup, cutmix)
        assert ours.drawn == source.drawn
        assert found == ([] if mix.box is None else [mix.box])
        got = TORCH.prepare(batch, mean, std, **mix_arguments(mix, 6, "cpu"))
        # lam and 1 - lam are rounded once, then two products and a sum: 4 roundings of at most max|x|.
        assert (got - want).abs().max() <= 4 * EPS * plain.abs().max()
        assert torch.equal(mix_images(plain, mix), got)
        assert (soft_targets(labels, 11, 0.1, mix.lam) - targets).abs().max() <= EPS
        kinds.add(mix.box is None)
    assert kinds == ({True, False} if mixup and cutmix else {not cutmix})
