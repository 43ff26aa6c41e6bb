"""A finished segmenter, as train_segment.py writes it."""

from mff_tasks.ade20k import IGNORED
from mff_tasks.attention import add_relative_positions
from mff_tasks.finished import Kind
from mff_tasks.upernet import Segmenter


def build(encoder, num_classes, config, fusion, ops):
    """The Segmenter of a run's flags."""
    if config.get("rel_pos"):
        add_relative_positions(encoder)
    return Segmenter(encoder, num_classes, config["width"], fusion, ops)


SEGMENTER = Kind("segmenter.pt", "train_segment.py", build, switches=("fused", "rel_pos"), least=2,
                 most=IGNORED)
FILE, find_segmenter, load_segmenter = SEGMENTER.file, SEGMENTER.find, SEGMENTER.load
