"""Random numbers by hashing integers: the same on every machine and with every version of numpy."""

import numpy as np
from numpy.typing import NDArray


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each 64-bit integer; a bijection.

    The finaliser of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def fold(*values: int | np.uint64) -> np.uint64:
    """Fold several non-negative integers into one 64-bit key; their order matters."""
    key = np.uint64(0)
    for value in values:
        key = splitmix64(np.array([int(key) ^ (int(value) & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64))[0]
    return key


def hashes(numbers: NDArray[np.int64], key: np.uint64) -> NDArray[np.uint64]:
    """Hash non-negative integers (n,) with a key; different integers have different hashes."""
    return splitmix64(numbers.astype(np.uint64) ^ key)
