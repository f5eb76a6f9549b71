"""Time: how much of it a run and each of its stages may take."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds that may still be spent, of a whole run or of one stage of it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, end: float | None = None):
        self.clock = clock
        self.start = clock()
        self.end = self.start + seconds if end is None else min(self.start + seconds, end)

    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    def spent(self) -> float:
        return self.clock() - self.start

    def allows(self, estimate: float) -> bool:
        """Whether something that takes about this long would end in time."""
        return self.left() >= estimate

    def part(self, seconds: float) -> Budget:
        """A part of this budget that ends no later than it does."""
        return Budget(seconds, self.clock, self.end)
