"""When a run has to stop: a loss or gradient that is no number, or a loss that leaps up.

The leap is measured in nats above the median of the last steps: the median does not follow a single bad batch, and
nats mean the same early and late in a run. The losses it looks back on are part of the checkpoint, so a resumed run
stops where an uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 32
"""Steps looked back on; nothing is a leap before there are as many."""


class LossGuard:
    """Looks at every step's loss and gradient, before the weights take the step."""

    def __init__(self, spike_nats: float | None) -> None:
        self._spike_nats = spike_nats
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step whose mean loss is `loss`, in nats; None if nothing is."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            which = "the gradient" if math.isfinite(loss) else "the loss"
            return f"{which} is no finite number"
        median = statistics.median(self._recent) if len(self._recent) == WINDOW else math.inf
        if self._spike_nats is not None and loss > median + self._spike_nats:
            return f"the loss leapt to {loss:.3f} from a median of {median:.3f} over {WINDOW} steps"
        self._recent.append(loss)
        return None

    def state(self) -> tuple[float, ...]:
        """The losses that later steps are compared with."""
        return tuple(self._recent)

    def load_state(self, losses: Iterable[float]) -> None:
        """Takes over what `state()` gave."""
        self._recent = deque(losses, maxlen=WINDOW)
