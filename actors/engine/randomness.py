"""Numbers that are a function of a request's seed and a place alone: the same on every machine, in every batch."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same on every machine for a (seed, position).

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied to the seed and then to the position.
    """
    # 52 bits: the largest result times a sum of probabilities still rounds to less than that sum.
    return (_mix(_mix(seed) + position) >> 12) * 2.0**-52


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of several answers to a request; the first one's is the request's own."""
    # From places before the first position, where `uniform` never draws.
    return seed if index == 0 else _mix(_mix(seed) - index) >> 1


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
