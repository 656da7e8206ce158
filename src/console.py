"""What every stage shares on the terminal: errors in one line, a progress bar, a clean end on a signal."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm


class UserError(Exception):
    """A fault that the user can mend. Its text names the file and the remedy; a stage prints it and exits 1."""


def stage(main: Callable[..., int | None], *, kept: str = "nothing stands half-written, {again} begins anew") -> Callable[..., int]:
    """Makes a stage's `main(argv)` end well: 0 done, 1 with one line for a UserError, 130 / 143 for Ctrl-C / SIGTERM, after saying what is `kept`.
    One of several processes ends at once on a signal, without a word."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        name = main.__module__ if main.__module__ != "__main__" else sys.modules["__main__"].__spec__.name
        # One of several processes may be waiting, inside C, for another that is gone: no handler written in Python would run, and its
        # launcher would wait half a minute to kill it. What is on disk is whole at any moment.
        on_signal = {signal.SIGTERM: _interrupt} if n_processes() == 1 else {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_DFL}
        previous = {number: signal.signal(number, action) for number, action in on_signal.items()}
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a species' name must not end hours of work where the console has an old code page
        try:
            return main(argv) or 0
        except UserError as error:
            who = "" if is_first_process() else f" in process {os.environ['RANK']}"
            print(f"{name}: error{who}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interrupt:
            code = 143 if interrupt.args else 130
            again = "the same command without --restart" if "--restart" in (sys.argv if argv is None else argv) else "the same command"
            print(f"\n{name}: interrupted; {kept.format(again=again)}", file=sys.stderr)
            return code
        finally:
            for number, action in previous.items():
                signal.signal(number, action)

    return run


resumable = functools.partial(stage, kept="what was finished is kept, {again} continues")


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt(signum)


def begin_worker() -> None:
    """A worker process's first act: Ctrl-C is the main process's to handle, and its end, however sudden, is this one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def usable_cores() -> int:
    """Those of the CPU that this process may use, which a batch system or taskset makes fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_processes() -> int:
    """That `accelerate launch` or torchrun started for this stage; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Of those that `accelerate launch` or torchrun started; the others keep quiet."""
    return os.environ.get("RANK", "0") == "0"


def progress(items: Iterable | None = None, *, what: str, total: int | None = None, unit: str = "it") -> tqdm:
    """A progress bar with an ETA on stderr; quiet where stderr is not a terminal, but for one line every 10 s."""
    return tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True, file=sys.stderr, disable=not is_first_process(),
                mininterval=0.2 if sys.stderr.isatty() else 10.0)


def say(text: str) -> None:
    """One line on stdout, at once (stages run under pipes and notebooks)."""
    if is_first_process():
        print(text, flush=True)
