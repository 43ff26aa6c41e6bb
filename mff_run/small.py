"""Settings for a small machine: --small takes them instead of the paper's, where a flag gives no other.

Pre-training vit_test and vit_t takes them unless --no-small is given. Images have 8 x 8 patches (vit_test:
12 x 12), and a step sees 32 or 64 of them. The learning rate of vit_s and larger is MAE's 2.4e-3, scaled by
the square root of the batch, from 4096 images to 64; that of fine-tuning comes from 4e-3 at 1024 likewise.
"""

import os
import shlex
from dataclasses import fields, replace

from mff_min.config import typed
from mff_run.world import this_command

BY_DEFAULT = ("vit_test", "vit_t")
COLUMNS = ("img_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "global_batch", "lr")
PRETRAIN = {
    "vit_test": ((48, 48), 64, 3, 2, 32, 3e-3),
    "vit_t": ((128, 128), 96, 2, 3, 64, 1e-3),
    "vit_s": ((128, 128), 192, 2, 6, 64, 3e-4),
    "vit_b": ((128, 128), 256, 2, 8, 64, 3e-4),
    "vit_l": ((128, 128), 256, 2, 8, 64, 3e-4),
    "vit_h": ((112, 112), 256, 2, 8, 64, 3e-4),
}
DATA = ("data", "num_classes", "names", "reduce_zero_label")             # flags that say what to train on
PROBE = dict(global_batch=64)                                           # lr by its blr
FINETUNE = dict(global_batch=64, lr=1e-3)
SEGMENT = dict(img_size=(32, 32), width=32, global_batch=32, lr=1e-2, layer_decay=0.8, drop_path=0.0,
               clip_grad=1.0, steps=400)
DETECT = dict(img_size=(32, 32), scale=(0.8, 1.25), window=4, width=32, proposals=200, regions=32,
              global_batch=16, lr=3e-3, layer_decay=0.8, drop_path=0.0, clip_grad=1.0, steps=600)


def of_model(name):
    """What --small gives the pre-training of a model of MODELS, as a dict."""
    return dict(zip(COLUMNS, PRETRAIN[name], strict=True), epochs=100.0)


def complete(cfg, given, settings, by_default):
    """cfg with these settings, where they are asked for and no flag in `given` speaks against one of them."""
    if not given.get("small", by_default):
        return cfg
    settings = settings | batches(settings["global_batch"], given)
    if "blr" in given:
        settings.pop("lr", None)
    if "steps" in given:
        settings.pop("epochs", None)
    if "schedule" in given:
        settings.pop("steps", None)
    return replace(cfg, small=True, **{name: value for name, value in settings.items() if name not in given})


def batches(images, given):
    """A batch_size and a global_batch of about so many images, an even number of them on every process."""
    size = os.environ.get("WORLD_SIZE", "1")
    size = max(int(size), 1) if size.isdecimal() else 1                 # start_world refuses what is none
    if "global_batch" in given:
        share = given["global_batch"] // size
        fitting = [count for count in range(2, min(share, images) + 1, 2) if share % count == 0]
        return dict(batch_size=max(fitting, default=2))
    batch_size = given.get("batch_size", max(images // size // 2 * 2, 2))
    together = max(batch_size * size, 1)
    return dict(batch_size=batch_size, global_batch=max(images // together, 1) * together)


def taken(cfg, settings):
    """Those of these settings that a configuration has, as flags."""
    settings = settings | batches(settings["global_batch"], {})
    chosen = {name: value for name, value in settings.items() if getattr(cfg, name) == value}
    return " ".join(f"{flag_of(name)} {f'{value:g}' if isinstance(value, float) else typed(value)}"
                    for name, value in chosen.items())


def instead(cfg, seconds):
    """The command to try where images of so many seconds each make a run hopeless on a CPU."""
    if hasattr(cfg, "model"):
        flags, names, steps = "--model vit_test", ("data", "in_chans", "mean", "std"), 500      # minutes
    else:
        images = 1800 / seconds                                         # of half an hour
        flags, names, steps = "--small", ("checkpoint", *DATA), images / cfg.small_settings["global_batch"]
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in (*names, "device") and value != field.default:
            words = () if value is True else (shlex.quote(str(typed(value))),)
            flags = " ".join((flags, flag_of(field.name), *words))
    return (f"python {this_command()} {flags} --steps {max(int(steps), 1)} "
            f"--output-dir {shlex.quote(cfg.output_dir)}-small")


def flag_of(name):
    """The flag of a setting."""
    return "--" + name.replace("_", "-")
