"""The deadline guard: from the measured pace, how much of the work still fits. Pure: the clock is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SAFETY = 1.1  # a forecast must fit this many times
DECAY = 0.98  # the pace remembers some 50 batches: one that stalls does not decide, a machine that slows down does
EARLY, LATE = 0.02, 0.05  # shares of the time: before the first nothing is decided, since a stall would; behind the second two batches do
MEASURED_BATCHES = 4  # before the first decision, else


@dataclass(frozen=True)
class Plan:
    """How the soundscapes that are still to come are scored."""

    hop_seconds: float
    n_models: int  # the first so many of the ensemble


class Pace:
    """Seconds a unit (a window, a row). The first measurement counts only until the second: it warms up."""

    def __init__(self) -> None:
        self.seconds = self.amount = 0.0
        self.n = 0

    def add(self, seconds: float, amount: float) -> None:
        decay = DECAY if self.n > 1 else 0.0
        self.seconds, self.amount, self.n = self.seconds * decay + seconds, self.amount * decay + amount, self.n + 1

    @property
    def per_unit(self) -> float:
        return self.seconds / self.amount if self.amount else 0.0


class Guard:
    """Measures, forecasts and, when the forecast exceeds the time left, takes the next poorer plan; it never goes back.

    The order: overlapping windows first, then the ensemble's members from the last to the second, and when not even one
    model fits, `time_is_up` comes while soundscapes are left, and those keep the prior. Without a limit nothing happens.
    """

    def __init__(self, seconds: float | None, *, hop_seconds: float, full_hop_seconds: float, n_models: int, n_rows: int,
                 window_seconds: Sequence[float] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.limited = clock, seconds is not None
        self.ends = clock() + seconds if seconds is not None else float("inf")
        self._early, self._late = (clock() + share * seconds if seconds is not None else float("inf") for share in (EARLY, LATE))
        self.reserve = 0.0  # seconds that the last write and its validation need
        self.plan, self.full_hop_seconds = Plan(hop_seconds, n_models), full_hop_seconds  # the latter: windows side by side
        self.longest_hop = [min(full_hop_seconds, seconds) for seconds in window_seconds] or [full_hop_seconds] * n_models  # short windows leave no gaps
        self.rows_left = float(n_rows)
        self.model_pace = [Pace() for _ in range(n_models)]  # a window
        self.other_pace = Pace()  # a row: decoding that the model waits for, writing, drawing
        self._last, self._in_models = clock(), 0.0

    def left(self) -> float:
        """Seconds until scoring must end."""
        return self.ends - self.reserve - self.clock()

    def hop_of(self, model: int, plan: Plan) -> float:
        return min(plan.hop_seconds, self.longest_hop[model])

    def time_is_up(self) -> bool:
        return self.left() <= 0

    def fits(self, model: int, n_windows: int) -> bool:
        """Whether one more call of this model ends in time."""
        return n_windows * self.model_pace[model].per_unit < self.left()

    def model_ran(self, model: int, n_windows: int, seconds: float) -> None:
        self.model_pace[model].add(seconds, n_windows)
        self._in_models += seconds

    def rows_done(self, rows: float) -> None:
        """After each batch: how many rows' worth it was."""
        now = self.clock()
        if rows > 0:
            self.other_pace.add(max(0.0, now - self._last - self._in_models), rows)
            self.rows_left = max(0.0, self.rows_left - rows)
            self._last, self._in_models = now, 0.0

    def give_up(self, rows: float) -> None:
        """Rows that nobody will score, since their file ended before them."""
        self.rows_left = max(0.0, self.rows_left - rows)

    def forecast(self, plan: Plan) -> float:
        """Seconds that the rows left will take."""
        windows = (self.full_hop_seconds / self.hop_of(model, plan) for model in range(plan.n_models))  # a row
        return self.rows_left * (self.other_pace.per_unit + sum(n * pace.per_unit for n, pace in zip(windows, self.model_pace)))

    def measured(self) -> bool:
        now = self.clock()
        return now > self._early and self.other_pace.n >= (2 if now > self._late else MEASURED_BATCHES)

    def poorer(self) -> list[Plan]:
        """What can still be dropped, one thing after the other."""
        hop = max(self.plan.hop_seconds, self.full_hop_seconds)
        fewer = [Plan(hop, n) for n in range(self.plan.n_models - 1, 0, -1)]
        return ([Plan(hop, self.plan.n_models)] if hop > self.plan.hop_seconds else []) + fewer

    def revise(self) -> bool:
        """Whether a poorer plan had to be taken: the first that fits, else the poorest."""
        choices = self.poorer()
        if not (self.limited and choices and self.measured()) or SAFETY * self.forecast(self.plan) <= self.left():
            return False
        self.plan = next((plan for plan in choices if SAFETY * self.forecast(plan) <= self.left()), choices[-1])
        return True
