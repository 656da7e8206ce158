"""kill -9 at random moments of a training, then the same command: is everything equal, bit for bit?

    python -m benchmarks.kill_training [--kills 20]

Makes a small data set, trains one fold of three epochs without interruption (moving average on, a quarter of the crops on the
waveform path), then again and again with one SIGKILL at a moment drawn over that training's length, and compares every file it
leaves. Writes benchmarks/results/kill_training.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import about
from src.console import UserError, progress, say, stage
from src.demo_data import make_recordings, noise, write_audio
from src.settings import parse
from src.storage import write_text

SAME = ("weights.safetensors", "oof.csv", "history.csv", "golden_windows.safetensors")


@dataclass(frozen=True)
class KillSettings:
    kills: int = 20
    epochs: int = 3
    seed: int = 0


def same(one: Path, other: Path) -> bool:
    """Whether two fold folders hold the same results: every tensor, and every byte of the tables."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in SAME)


def kill_once(command: list[str], after: float) -> str:
    """Starts the command, kills it after so many seconds, and says what it had reached."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        process.wait(after)
        return "was done already"
    except subprocess.TimeoutExpired:
        process.kill()
        epochs = process.communicate()[0].count("crops/s")
        return f"{epochs} epochs saved" if epochs else "in the first epoch or before it"


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(KillSettings, argv, prog="python -m benchmarks.kill_training", description=__doc__)
    rng = np.random.default_rng(settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "data"
        make_recordings(data, rng).to_csv(data / "train_metadata.csv", index=False)
        write_audio(data / "noise/wind.ogg", 0.05 * noise(10, "wind", rng))
        for module, *flags in (("src.folds", "--out", root / "folds.csv"), ("src.cache", "--out", root / "cache")):
            subprocess.run([sys.executable, "-m", module, "--data", str(data), *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
        train = [sys.executable, "-m", "src.train", "--data", str(data), "--folds", str(root / "folds.csv"), "--cache", str(root / "cache"), "--noise",
                 str(data / "noise"), "--config", "src/recipes/demo.yaml", "--epochs", str(settings.epochs), "--ema-decay", "0.99", "--threads", "1"]
        began = time.perf_counter()
        subprocess.run([*train, "--run", str(root / "alone")], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        say(f"uninterrupted: {seconds:.0f} s; now {settings.kills} kills at random moments of it")
        rows, equal = [], 0
        for number in progress(range(settings.kills), what="killing", unit="kill"):
            run, moment = root / f"killed{number}", float(rng.uniform(0, seconds))
            reached = kill_once([*train, "--run", str(run)], moment)
            subprocess.run([*train, "--run", str(run)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            verdict = same(root / "alone/fold0", run / "fold0") and not list(run.rglob("*.partial"))
            equal += verdict
            rows.append(f"| {number + 1} | {moment / seconds:.0%} | {reached} | {'yes' if verdict else 'NO'} |")
        lines = ["# A training killed at random moments", "", about(f"python -m benchmarks.kill_training --kills {settings.kills}"), "",
                 f"**{equal} of {settings.kills}** equal the uninterrupted training bit for bit: weights, out-of-fold table, history, golden windows; no "
                 f"temporary file is left. {settings.epochs} epochs, one thread, moving average and waveform augmentation on.", "",
                 "| kill | moment, share of the uninterrupted time | it had reached | equal |", "|---|---|---|---|", *rows]
    write_text(Path("benchmarks/results/kill_training.md"), "\n".join([*lines, ""]))
    say("\n".join(lines))
    if equal < settings.kills:
        raise UserError(f"{settings.kills - equal} of {settings.kills} trainings differ from the uninterrupted one")


if __name__ == "__main__":
    sys.exit(main())
