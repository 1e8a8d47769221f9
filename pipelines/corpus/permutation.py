"""The order in which rows are visited: a keyed bijection in constant memory."""

from __future__ import annotations

import math

import blake3
import numpy as np
import numpy.typing as npt

from configs.errors import InputError

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_ROUNDS = 6
"""With four, rows a width apart are correlated (the chi-square of their pairs is 15 % too large); with six, not."""
_HALF = np.array(32, dtype=np.uint64)


class Permutation:
    """A bijection of 0..size-1 in constant memory, chosen by `key`.

    A generalised Feistel network over pairs (left, right) of a rectangle of height x width that just holds `size`
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): each round adds a keyed hash of one half to the
    other, modulo its side. The rectangle is larger than `size` by less than its height, so few values fall outside;
    those are walked along their cycle until they are inside.

    Small calls are the cost of some 50 numpy operations, whatever `size`: a network over a power of two would have to
    walk up to three values of four. Numbers are arrays without dimensions, which numpy takes twice as fast as scalars.
    """

    def __init__(self, size: int, key: bytes) -> None:
        if not 0 < size <= 1 << 63:
            raise InputError("size of a permutation", received=size, allowed="1 to 2**63")
        self.size = size
        height = math.isqrt(size - 1) + 1
        width = -(-size // height)
        self._height, self._width, self._size = (np.array(n, dtype=np.uint64) for n in (height, width, size))
        self._overhang = height * width > size
        material = np.frombuffer(blake3.blake3(key).digest(16 * _ROUNDS), dtype="<u8")
        numbers = [
            np.array(number, dtype=np.uint64) for number in material | (np.arange(2 * _ROUNDS) % 2).astype("<u8")
        ]
        self._keys = list(zip(numbers[::2], numbers[1::2], strict=True))

    def __call__(self, positions: Ints) -> Ints:
        """Where `positions`, an array of one dimension or more, go; same shape."""
        values = self._encrypt(np.array(positions, dtype=np.uint64))
        if self._overhang and values.size and values.max() >= self._size:
            flat = values.reshape(-1)
            outside = np.flatnonzero(flat >= self._size)
            while len(outside):
                flat[outside] = self._encrypt(flat[outside])
                outside = outside[flat[outside] >= self._size]
        return values.astype(np.int64)

    def _encrypt(self, values: Words) -> Words:
        left = values // self._width
        right = values - left * self._width
        for (first, first_odd), (second, second_odd) in zip(self._keys[::2], self._keys[1::2], strict=True):
            _add_hash(left, right, first, first_odd, self._height)
            _add_hash(right, left, second, second_odd, self._width)
        left *= self._width
        left += right
        return left


def _add_hash(target: Words, values: Words, key: Words, odd: Words, modulus: Words) -> None:
    """Adds a hash of `values` to `target` in place: the middle of a keyed square (Widynski, "Squares", 2020)."""
    mixed = np.add(values, key)
    np.multiply(mixed, odd, mixed)
    np.multiply(mixed, mixed, mixed)
    np.right_shift(mixed, _HALF, mixed)
    np.add(target, mixed, target)
    np.remainder(target, modulus, target)
