"""Windows + models -> each soundscape's rows, under the deadline guard."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from . import submission
from .config import AudioConfig
from .console import progress, say
from .deadline import Guard
from .onnx_models import OnnxModel
from .soundscapes import Soundscape, ahead, decode

TIME_WAS_UP, NOT_FINITE = "the time was up", "the model gave no finite number"


@dataclass(frozen=True)
class Scored:
    """One soundscape's rows."""

    number: int
    probability: np.ndarray  # (n_rows, C); the prior where no model looked
    known: np.ndarray  # (n_rows,) bool: where one did
    complete: bool  # False: the time was up before its end


class Ensemble:
    """The models with their classes in one order, run under the guard."""

    def __init__(self, models: list[OnnxModel], classes: Sequence[str], guard: Guard, pooling: str = "mean") -> None:
        self.models, self.guard, self.pooling = models, guard, pooling
        self.order = [[model.classes.index(label) for label in classes] for model in models]
        self.prior = np.mean([model.prior[order] for model, order in zip(models, self.order)], axis=0)
        self.halt = onnxruntime.RunOptions()  # ends a call that would outlast the time
        self.pending: list[list[np.ndarray]] = [[] for _ in models]  # of the present soundscape, (windows, C) each

    def starts(self, soundscape: Soundscape) -> dict[AudioConfig, np.ndarray]:
        plan = self.guard.plan
        return {model.audio: submission.window_starts(soundscape.n_rows, model.audio.window_seconds, self.guard.hop_of(number, plan))
                for number, model in enumerate(self.models[: plan.n_models])}

    def run(self, config: AudioConfig, windows: np.ndarray) -> bool:
        """One batch through the models of its recipe; False where the time does not suffice."""
        for place, model in enumerate(self.models[: self.guard.plan.n_models]):
            if model.audio != config:
                continue
            if not self.guard.fits(place, len(windows)):
                return False
            began = self.guard.clock()
            try:
                probability = model.probabilities(windows, self.halt)
            except Fail:
                if self.guard.time_is_up():
                    return False
                raise
            self.guard.model_ran(place, len(windows), self.guard.clock() - began)
            self.pending[place].append(probability[:, self.order[place]])
        return True

    def rows(self, number: int, soundscape: Soundscape, *, complete: bool) -> Scored:
        """The mean over the models of each row's probabilities; the prior where nothing decoded or nothing was scored."""
        n = soundscape.n_rows
        total, count = np.zeros((n, len(self.prior)), np.float32), np.zeros((n, 1), np.float32)
        for model, batches in zip(self.models, self.pending):
            if batches:
                probability = np.concatenate(batches)
                if not np.isfinite(probability).all():
                    soundscape.fault = soundscape.fault or NOT_FINITE
                of_model = submission.rows_from_windows(probability, soundscape.starts[model.audio], model.audio.window_seconds, n, self.pooling)
                reached = ~np.isnan(of_model[:, :1])
                total, count = total + np.where(reached, of_model, 0), count + reached
        known = (count[:, 0] > 0) & (np.arange(n) * submission.ROW_SECONDS < soundscape.seconds_decoded)
        self.pending = [[] for _ in self.models]
        return Scored(number, np.where(known[:, None], total / np.maximum(count, 1), self.prior).astype(np.float32), known, complete)


@contextmanager
def halting(guard: Guard, options: onnxruntime.RunOptions) -> Iterator[None]:
    """Ends the model's call under way when the time is up."""
    timer = threading.Timer(max(0.0, min(guard.left(), threading.TIMEOUT_MAX)), lambda: setattr(options, "terminate", True))
    timer.daemon = True
    if guard.limited:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def score(soundscapes: list[Soundscape], ensemble: Ensemble, *, batch_size: int, overviews: bool = False) -> Iterator[Scored]:
    """Every soundscape's rows, in order. When the time is up, the rest hold the prior and say so as their fault."""
    guard, n_done, told = ensemble.guard, 0, not ensemble.guard.limited
    batches = ahead(decode(soundscapes, ensemble.starts, batch_size, overviews=overviews), guard.left)
    total, scored = guard.rows_left, 0.0  # the latter: rows' worth of the present soundscape
    with halting(guard, ensemble.halt), progress(what="scoring", total=round(total), unit="row") as bar, closing(batches):
        for number, config, windows in batches:
            soundscape = soundscapes[number]
            if config is None:
                guard.give_up(soundscape.n_rows - scored if soundscape.starts else 0)  # one without a header was never counted
                scored = 0.0
                yield ensemble.rows(number, soundscape, complete=True)
                n_done += 1
                if not told and guard.measured() and guard.rows_left:
                    told = True
                    forecast = guard.forecast(guard.plan)
                    say(f"forecast: {forecast / guard.rows_left:.3f} s a row, {forecast / 60:.2f} min to go, {guard.left() / 60:.2f} min left")
                continue
            if not ensemble.run(config, windows):
                break
            rows = soundscape.n_rows * len(windows) / len(soundscape.starts[config]) if config == ensemble.models[0].audio else 0
            guard.rows_done(rows)
            scored += rows
            bar.update(round(total - guard.rows_left) - bar.n)
            before = guard.forecast(guard.plan)
            if guard.revise():
                say(f"deadline: {before / 60:.2f} min to go, {guard.left() / 60:.2f} min left: {guard.plan.n_models} of {len(ensemble.models)} "
                    f"model(s) from here on, windows every {guard.plan.hop_seconds:g} s from the next soundscape on")
    for number, soundscape in enumerate(soundscapes[n_done:], start=n_done):
        result = ensemble.rows(number, soundscape, complete=False)
        soundscape.fault = soundscape.fault or f"{TIME_WAS_UP}: {result.known.sum()} of {soundscape.n_rows} rows are scored"
        yield result
