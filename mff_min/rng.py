"""Random numbers as a pure function of a key: nothing depends on workers, ranks or where a run was resumed.

A key is a few integers, for example (seed, MASK, epoch, sample). The generator is splitmix64 (Steele, Lea &
Flood, OOPSLA 2014) used as a counter: number i of a key is a hash of key + i. NumPy's own Generator is not
used because its distribution methods may change between versions.
"""

import numpy as np

# One stream for each use: two uses that share (seed, epoch, sample) never share numbers.
ORDER, CROP, MASK, REPLACE, SHAPE = range(5)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash64(x):
    """64 well mixed bits for each uint64 of x, any shape."""
    with np.errstate(over="ignore"):                                    # wrapping at 2**64 is meant
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def hash_key(*key):
    """One uint64 for a key of integers; each of them is mixed in, so (1, 2) and (2, 1) differ."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = hash64(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return state[0]


class Rng:
    """Uniform numbers in [0, 1), which depend on the key and on how many were drawn before, nothing else."""

    def __init__(self, *key):
        self.key, self.drawn = hash_key(*key), 0

    def random(self, n):
        """The next n numbers, float64 with 53 random bits: shape (n,)."""
        counter = np.arange(self.drawn, self.drawn + n, dtype=np.uint64)
        self.drawn += n
        with np.errstate(over="ignore"):
            bits = hash64(self.key + counter * _GOLDEN)
        return (bits >> np.uint64(11)) * 2.0 ** -53

    def uniform(self, low=0.0, high=1.0):
        """One float in [low, high)."""
        return float(low + (high - low) * self.random(1)[0])

    def integer(self, low, high):
        """One int in low ... high - 1."""
        return low + int(self.random(1)[0] * (high - low))


def permutation(n, *key):
    """The numbers 0 ... n - 1 in an order that is a pure function of n and the key: (n,) int64."""
    with np.errstate(over="ignore"):
        bits = hash64(hash_key(*key) + np.arange(n, dtype=np.uint64) * _GOLDEN)
    return np.argsort(bits, kind="stable")
