"""Random numbers as a pure function of a key: nothing depends on workers, ranks or where a run was resumed.

A key is a few integers, for example (seed, MASK, epoch, sample). The generator is splitmix64 (Steele, Lea &
Flood, OOPSLA 2014) used as a counter: number i of a key is a hash of key + i. NumPy's own Generator is not
used because its distribution methods may change between versions.

For noise as large as images, normal_noise hashes the same counters in PyTorch, where the images are.
"""

import math

import numpy as np
import torch

# One stream for each use: two uses that share (seed, epoch, sample) never share numbers. MASK is for masks,
# or in fine-tuning, which has none, for drop path; ERASE is for boxes, and NOISE for what fills them.
ORDER, CROP, MASK, REPLACE, SHAPE, AUGMENT, ERASE, MIX, NOISE, SCENE = range(10)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_STEP, _INT1, _INT2 = int(_GOLDEN), int(_MIX1), int(_MIX2)              # the same as Python's ints
_ONES = 0xFFFFFFFFFFFFFFFF


def hash64(x):
    """64 well mixed bits for each uint64 of x, any shape."""
    with np.errstate(over="ignore"):                                    # wrapping at 2**64 is meant
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def hash_int(x):
    """hash64 of one Python int below 2**64: the same bits, in a fraction of the time of an array of one."""
    x = (x + _STEP) & _ONES
    x = ((x ^ (x >> 30)) * _INT1) & _ONES
    x = ((x ^ (x >> 27)) * _INT2) & _ONES
    return x ^ (x >> 31)


def hash_key(*key):
    """One uint64 for a key of integers; each of them is mixed in, so (1, 2) and (2, 1) differ."""
    state = 0
    for part in key:
        state = hash_int(state ^ (part & _ONES))
    return np.uint64(state)


def hash_keys(*key):
    """hash_key of many keys at once: each part is an int, or an int64 of each. Returns (keys,) uint64."""
    state = np.uint64(0)
    for part in np.broadcast_arrays(*(np.asarray(part, np.int64) for part in key)):
        state = hash64(state ^ part.view(np.uint64))                    # (keys,)
    return state


def numbers(keys, count):
    """What Rng(key).random(count) gives of each of these keys, (keys,) uint64: (keys, count)."""
    with np.errstate(over="ignore"):
        bits = hash64(keys[:, None] + np.arange(count, dtype=np.uint64) * _GOLDEN)      # (keys, count)
    return (bits >> np.uint64(11)) * 2.0 ** -53


def int64_key(*key):
    """hash_key's bits as a Python int that fits an int64 tensor: what normal_noise takes."""
    return int(hash_key(*key).view(np.int64))


class Rng:
    """Random numbers that depend on the key and on how many were drawn before, nothing else."""

    def __init__(self, *key):
        self.key, self.drawn = int(hash_key(*key)), 0

    def random(self, n):
        """The next n numbers, float64 with 53 random bits: shape (n,)."""
        first = (self.key + self.drawn * _STEP) & _ONES
        self.drawn += n
        return numbers(np.array([first], np.uint64), n)[0]

    def number(self):
        """The next number, a float: that of random(1), in a fraction of the time."""
        bits = hash_int((self.key + self.drawn * _STEP) & _ONES)
        self.drawn += 1
        return (bits >> 11) * 2.0 ** -53

    def uniform(self, low=0.0, high=1.0):
        """One float in [low, high)."""
        return low + (high - low) * self.number()

    def integer(self, low, high):
        """One int in low ... high - 1."""
        return low + int(self.number() * (high - low))

    def normal(self):
        """One float of the standard normal distribution (Box & Muller, Ann. Math. Statist. 1958)."""
        radius, angle = self.random(2)
        return math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)

    def beta(self, a, b):
        """One float of the beta distribution, a and b > 0: the share of a gamma variate in the sum of two."""
        excess = self.log_gamma(b) - self.log_gamma(a)
        return 1 / (1 + math.exp(min(excess, 700.0)))                   # exp(710) is no float

    def log_gamma(self, shape):
        """The logarithm of one variate of the gamma distribution of scale 1 (Marsaglia & Tsang, TOMS 2000).

        Below shape 1 it is the variate of shape + 1, times a uniform one to the power 1 / shape. That power
        is 0 in floats for small shapes, its logarithm is not.
        """
        boost = math.log(1 - self.uniform()) / shape if shape < 1 else 0.0
        d = (shape + 1 if shape < 1 else shape) - 1 / 3
        while True:
            x = self.normal()
            v = (1 + x / math.sqrt(9 * d)) ** 3
            if v > 0 and math.log(1 - self.uniform()) < x * x / 2 + d * (1 - v + math.log(v)):
                return math.log(d * v) + boost


def permutation(n, *key):
    """The numbers 0 ... n - 1 in an order that is a pure function of n and the key: (n,) int64."""
    with np.errstate(over="ignore"):
        bits = hash64(hash_key(*key) + np.arange(n, dtype=np.uint64) * _GOLDEN)
    return np.argsort(bits, kind="stable")


def normal_noise(keys, shape):
    """Standard normal noise of this shape for every key: keys (n,) int64, from int64_key -> (n, *shape) fp32.

    Number i of a key is made of the 64 bits that number i of an Rng is made of: the upper half is the radius
    and the lower half the angle (Box & Muller). It depends on no other key, and the device changes no more
    than the rounding of log and cos.
    """
    count = math.prod(shape)
    counter = torch.arange(count, device=keys.device) * _signed(_GOLDEN)    # (count,)
    bits = hash64_tensor(keys[:, None] + counter)                       # (keys, count)
    radius = (_shift(bits, 32) + 1).float() * 2.0 ** -32                # (keys, count), above 0
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0 ** -32)    # (keys, count)
    return ((-2 * radius.log()).sqrt() * angle.cos()).view(-1, *shape)


def hash64_tensor(x):
    """hash64 of an int64 tensor, on any device: the same 64 bits, read as signed."""
    x = x + _signed(_GOLDEN)                                            # int64 wraps at 2**64 as well
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _shift(x, n):
    """x >> n with zeros shifted in, where int64's own shift repeats the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(constant):
    """The int64 with the bits of an np.uint64, as a Python int."""
    return int(constant.view(np.int64))
