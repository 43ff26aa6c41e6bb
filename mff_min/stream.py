"""Which sample is seen when: a pure function of the seed, so a run resumes anywhere, on any number of
ranks.
"""

from functools import lru_cache

from mff_min import rng


class Stream:
    """The samples of this rank's micro-batches, from step `start` to step `stop`: lists of (epoch, index).

    The epochs' permutations stand one behind the other, and step s takes the global_batch samples from
    position s * global_batch on: every sample is seen once in every epoch, batches are always full, and no
    epoch has a tail. Ranks take equal runs of the global batch, and micro-batches equal runs of a rank's
    share.

    With repeats > 1 an epoch shows that many views of each image side by side, and as many fewer images
    (repeated augmentation, arXiv 1901.09335, with epochs as short as DeiT's): views of one image differ in
    their first number, epoch * repeats + view.
    """

    def __init__(self, num_samples, global_batch, batch_size, seed, start, stop, rank=0, world_size=1,
                 repeats=1):
        self.num_samples, self.global_batch, self.batch_size = num_samples, global_batch, batch_size
        self.repeats = repeats
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.order = lru_cache(maxsize=2)(lambda epoch: rng.permutation(num_samples, seed, rng.ORDER, epoch))

    def __len__(self):
        return (self.stop - self.start) * (self.global_batch // (self.batch_size * self.world_size))

    def __iter__(self):
        share = self.global_batch // self.world_size
        for step in range(self.start, self.stop):
            first = step * self.global_batch + self.rank * share
            for position in range(first, first + share, self.batch_size):
                yield [self.sample(p) for p in range(position, position + self.batch_size)]

    def sample(self, position):
        """(epoch, index) of one position of the endless stream."""
        epoch, offset = divmod(position, self.num_samples)
        place, view = divmod(offset, self.repeats)
        return epoch * self.repeats + view, int(self.order(epoch)[place])


def each_once(count, batch_size, world):
    """Batches of (epoch 0, index) for this rank: every index below count is in one batch of one rank."""
    share = [(0, i) for i in range(world.rank, count, world.size)]
    return [share[first:first + batch_size] for first in range(0, len(share), batch_size)]
