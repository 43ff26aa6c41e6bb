"""A finished detector, as train_detect.py writes it."""

from mff_min.errors import UserError
from mff_tasks.attention import add_windows
from mff_tasks.finished import Kind, as_list
from mff_tasks.rcnn import MaskRCNN


def build(encoder, num_classes, config, fusion, ops):
    """The MaskRCNN of a run's flags."""
    add_windows(encoder, config["window"])
    sizes = config["proposals"], config["regions"]
    return MaskRCNN(encoder, num_classes, config["width"], fusion, ops, *sizes)


DETECTOR = Kind("detector.pt", "train_detect.py", build, sizes=("width", "window", "proposals", "regions"),
                needs=("category_ids",))
FILE, find_detector = DETECTOR.file, DETECTOR.find


def load_detector(path, device, ops):
    """(the Finished detector in a file, the original ids of its classes). Raises UserError for another."""
    finished = DETECTOR.load(path, device, ops)
    ids = as_list(finished.state["category_ids"])
    if len(ids) != len(finished.classes) or len({*map(str, ids)}) < len(ids) \
            or not all(type(number) is int and abs(number) < 2 ** 53 for number in ids):
        raise UserError(f"checkpoint {path} has category_ids that are not those of its "
                        f"{len(finished.classes)} classes: expected a whole number for each, each once; "
                        f"train_detect.py writes such a file when it ends")
    return finished, ids
