"""Promise 1: a run that is killed ends, when its command is run again, as if nothing had happened."""

from faults.suite import Fault, Tally, fork, stage


def end_by_themselves(folder, quick):
    """Every stage, with nothing done to it."""
    tally = Tally()
    for name in ("pretrain", "probe", "finetune"):
        ended = fork(stage(name, folder / name, "--steps", 6))
        tally.note("" if ended.code == 0 else f"{name}: code {ended.code}, {ended.last}")
    return tally.outcome()


FAULTS = [Fault("no fault at all", 1, end_by_themselves)]
