"""The order in which rows are visited: a keyed bijection in constant memory."""

from __future__ import annotations

import blake3
import numpy as np
import numpy.typing as npt

from configs.errors import InputError

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_ROUNDS = 6


class Permutation:
    """A bijection of 0..size-1 in constant memory, chosen by `key`.

    A balanced Feistel network over the next even power of two of bits, at most 64, with values that fall outside
    walked along their cycle until they are inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, key: bytes) -> None:
        if not 0 < size <= 1 << 63:
            raise InputError("size of a permutation", received=size, allowed="1 to 2**63")
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        material = blake3.blake3(key).digest(8 * _ROUNDS)
        self._round_keys = np.frombuffer(material, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> Ints:
        """Where `positions` go; same shape."""
        values = self._encrypt(np.array(positions, dtype=np.uint64))
        outside = np.flatnonzero(values >= np.uint64(self.size))
        flat = values.reshape(-1)
        while len(outside):
            flat[outside] = self._encrypt(flat[outside])
            outside = outside[flat[outside] >= np.uint64(self.size)]
        return values.astype(np.int64)

    def _encrypt(self, values: Words) -> Words:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            mixed = _mix(right ^ key)
            mixed &= self._mask
            mixed ^= left
            left, right = right, mixed
        return (left << self._half_bits) | right


def _mix(values: Words) -> Words:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014); works in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
