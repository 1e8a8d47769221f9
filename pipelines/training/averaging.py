"""An exponential moving average of the weights, which evaluation and the published model use in their place.

Polyak and Juditsky 1992 average the iterates; the exponential form forgets the early ones. Step t (from 1) has at most
the decay (1 + t) / (10 + t), so that the first weights, which are noise, do not linger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """The average of `parameters`, which it follows once a step."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self._average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Takes in the weights after `step` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._parameters[name].detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model's weights are the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, Tensor]:
        """The average by name of parameter."""
        return self._average

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state()` gave."""
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self._average.items():
            weights = self._parameters[name].detach().clone()
            self._parameters[name].copy_(average)
            average.copy_(weights)
