import itertools
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.deadline import CLASSES, PRIOR, last_plan, limited, slow_model, verdict
from src import infer, submission, timeline
from src.deadline import Guard, Plan
from src.metadata import read_csv
from tests.conftest import make_soundscape, waveform


class Work:
    """An ensemble whose calls take a known time on a clock of its own; scores rows until the guard says stop."""

    def __init__(self, seconds: float | None, costs: list[float], *, n_rows: int, hop: float, other: float = 0.01, slower=lambda done: 1.0):
        self.now, self.costs, self.plans, self.done = 0.0, costs, [], 0.0
        guard = self.guard = Guard(seconds, hop_seconds=hop, full_hop_seconds=5.0, n_models=len(costs), n_rows=n_rows, clock=lambda: self.now)
        guard.reserve = 1.0
        while self.done < n_rows:
            plan = guard.plan
            windows = min(8, np.ceil((n_rows - self.done) * 5 / plan.hop_seconds))
            rows = min(windows * plan.hop_seconds / 5, n_rows - self.done)
            self.now += other * rows
            for model in range(plan.n_models):
                if not guard.fits(model, windows):
                    return
                took = costs[model] * windows * slower(self.done / n_rows)
                self.now += took
                guard.model_ran(model, windows, took)
            self.done += rows
            guard.rows_done(rows)
            if guard.revise():
                self.plans.append(guard.plan)


def test_without_a_limit_or_with_enough_nothing_is_dropped():
    for seconds in (None, 5000.0):
        work = Work(seconds, [0.3, 0.2], n_rows=1000, hop=2.5)
        assert work.done == 1000 and work.plans == [] and work.now == pytest.approx(1010)


def test_overlap_goes_first_then_members_from_the_last_then_soundscapes():
    everything = Work(None, [0.3, 0.2, 0.1], n_rows=1000, hop=2.5).now  # 1,210 s; without overlap 610, with two models 510, with one 310
    assert Work(900, [0.3, 0.2, 0.1], n_rows=1000, hop=2.5).plans == [Plan(5.0, 3)]
    assert Work(600, [0.3, 0.2, 0.1], n_rows=1000, hop=2.5).plans == [Plan(5.0, 2)]
    assert Work(400, [0.3, 0.2, 0.1], n_rows=1000, hop=5.0).plans == [Plan(5.0, 1)]
    hopeless = Work(100, [0.3, 0.2, 0.1], n_rows=1000, hop=2.5)
    assert hopeless.plans == [Plan(5.0, 1)] and 0 < hopeless.done < 1000 < everything


@pytest.mark.parametrize("place", [0.0, 0.002, 0.01])
def test_a_stall_at_the_start_drops_nothing(place):
    """Twenty seconds of a hundred minutes, at the first batch that begins behind `place` of the rows."""
    stalled = []

    def slower(done):
        if done >= place and not stalled:
            stalled.append(done)
        return 17.0 if stalled and stalled[0] == done else 1.0

    work = Work(6000, [0.03] * 5, n_rows=24_000, hop=5.0, slower=slower)
    assert stalled and work.done == 24_000 and work.plans == []


def test_a_window_shorter_than_a_row_has_several_a_row():
    guard = Guard(100.0, hop_seconds=5.0, full_hop_seconds=5.0, n_models=2, n_rows=10, window_seconds=[10.0, 1.0], clock=lambda: 0.0)
    guard.model_ran(0, 1, 0.3)
    guard.model_ran(1, 1, 0.2)
    assert [guard.hop_of(model, guard.plan) for model in (0, 1)] == [5.0, 1.0] and guard.forecast(guard.plan) == pytest.approx(10 * (0.3 + 5 * 0.2))


@settings(max_examples=60)
@given(share=st.floats(0.05, 1.5), costs=st.lists(st.floats(0.02, 2.0), min_size=1, max_size=5), hop=st.sampled_from([1.0, 2.5, 5.0]),
       late=st.floats(0.3, 3.0))
def test_scoring_ends_in_time_whatever_the_pace_does(share, costs, hop, late):
    def slower(done):
        return 1.0 if done < 0.5 else late

    needed = Work(None, costs, n_rows=200, hop=hop, slower=slower).now
    work = Work(share * needed, costs, n_rows=200, hop=hop, slower=slower)
    longest_call = 8 * max(costs) * max(1.0, late)  # the first of a slower stretch may be one call late
    assert work.now <= max(share * needed - 1, 0) + longest_call + 1
    assert all(after.n_models <= before.n_models and after.hop_seconds >= before.hop_seconds for before, after in zip(work.plans, work.plans[1:]))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    root = tmp_path_factory.mktemp("slow")
    for number in range(2):
        slow_model(root / f"run/fold{number}", layers=12, seed=number)
    for number in range(3):
        make_soundscape(root / f"soundscapes/s_{number}.ogg", 60.0 if number else 15.0, seed=number)
    return root


def test_a_limit_that_is_far_too_short_leaves_a_valid_submission(slow, capsys):
    flags = ["--run", str(slow / "run"), "--soundscapes", str(slow / "soundscapes"), "--out", str(slow / "t.csv"), "--threads", "1"]
    assert infer.main([*flags, "--time-limit", "0.12"]) == 0
    text = capsys.readouterr().out
    table = pd.read_csv(slow / "t.csv", index_col="row_id")
    assert "filled with the prior" in text and "the time was up before" in text and len(table) == 27
    assert submission.check(slow / "t.csv", classes=CLASSES) == [] and np.allclose(table.loc["s_2_60"], PRIOR)
    assert read_csv(slow / "t_failures.csv").cause.str.startswith("the time was up: ").all()
    assert infer.main([*flags, "--time-limit", "5", "--started", "1000000000"]) == 0  # over before it began
    assert np.allclose(pd.read_csv(slow / "t.csv", index_col="row_id"), PRIOR)
    assert infer.main([*flags, "--time-limit", "5", "--started", "9e12"]) == 1 and "lies in the future" in capsys.readouterr().err


def test_tables_alone_end_before_the_limit_too(slow, tmp_path, capsys):
    flags = ["--run", str(slow / "run"), "--soundscapes", str(slow / "soundscapes"), "--format", "csv", "--tables", str(tmp_path / "t"), "--threads", "1"]
    began = time.monotonic()
    assert infer.main([*flags, "--time-limit", "0.1"]) == 0 and time.monotonic() - began < 3
    assert "the time was up before" in capsys.readouterr().out and (tmp_path / "t/all_detections.csv").exists()


def test_a_competition_sets_the_expected_length_and_the_limit(slow, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/BC2026_Test_0001_S05_20250227_010002.ogg").write_bytes(b"broken")
    flags = ["--run", str(slow / "run"), "--soundscapes", str(tmp_path / "test"), "--out", str(tmp_path / "s.csv")]
    for more, rows, prior_first in (([], 120, False), (["--competition", "birdclef-2026"], 12, True),
                                (["--competition", "birdclef-2024", "--time-limit", "0"], 48, False)):
        assert infer.main([*flags, *more]) == 0 and ("filled with the prior" in capsys.readouterr().out) == prior_first
        assert read_csv(tmp_path / "s.csv").row_id.tolist() == [f"BC2026_Test_0001_S05_20250227_010002_{5 * k}" for k in range(1, rows + 1)]
        drawn = timeline.main(["--submission", str(tmp_path / "s.csv"), *flags[2:4], "--out", str(tmp_path), *more[:2]])
        assert drawn == 0 and (tmp_path / "BC2026_Test_0001_S05_20250227_010002.png").exists()
    assert infer.main([*flags, "--expected-seconds", "10"]) == 0
    drawn = timeline.main(["--submission", str(tmp_path / "s.csv"), *flags[2:4], "--out", str(tmp_path / "none")])
    assert drawn == 0 and "no readable header" in (told := capsys.readouterr().out) and "not drawn" in told and not (tmp_path / "none").exists()


def test_a_killed_run_leaves_a_valid_submission(slow):
    process = subprocess.Popen(limited(slow, 100.0), stdout=subprocess.PIPE, text=True)
    assert any("filled with the prior" in line for line in process.stdout)
    process.kill()
    process.wait()
    process.stdout.close()
    assert verdict(slow)[0]


def test_rows_that_a_cut_file_does_not_reach_leave_the_forecast(slow, tmp_path):
    from src.onnx_models import find_models
    from src.scoring import Ensemble, score
    from src.soundscapes import find_soundscapes

    soundfile.write(tmp_path / "cut.mp3", waveform(60), 32_000)
    content = (tmp_path / "cut.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(content[: len(content) // 3])
    (tmp_path / "none.wav").write_bytes(b"")
    make_soundscape(tmp_path / "whole.ogg", 20.0)
    found, (model, *_) = find_soundscapes(tmp_path, 60), find_models([slow / "run"], 1)
    guard, left = Guard(None, hop_seconds=5.0, full_hop_seconds=5.0, n_models=1, n_rows=12 + 4), []
    for result in score(found, Ensemble([model], CLASSES, guard), batch_size=8):
        left.append(round(guard.rows_left, 3))
        assert result.known.tolist() == {0: [True] * 4 + [False] * 8, 1: [False] * 12, 2: [True] * 4}[result.number]
        assert np.allclose(result.probability[~result.known], PRIOR)
    assert left == [4, 4, 0]


def test_dropped_members_count_no_more_and_the_others_as_before(slow):
    """A guard that drops the second model at once: the rows are the first model's alone."""
    from src.onnx_models import find_models
    from src.scoring import Ensemble, score
    from src.soundscapes import find_soundscapes

    models = find_models([slow / "run"], 1)
    found = find_soundscapes(slow / "soundscapes", 60)[:1]
    by_plan = []
    for models_used, plan in (([models[0]], Plan(5.0, 1)), (models, Plan(5.0, 1))):
        guard = Guard(None, hop_seconds=5.0, full_hop_seconds=5.0, n_models=len(models_used), n_rows=3)
        guard.plan = plan
        by_plan.append(next(score(found, Ensemble(models_used, CLASSES, guard), batch_size=8)).probability)
    np.testing.assert_array_equal(*by_plan)


def test_what_is_dropped_is_told_and_the_measurement_reads_it(slow, capsys):
    """On a clock that each look at it puts forward a second, so that no member but the first fits."""
    from src.onnx_models import find_models
    from src.scoring import Ensemble, score
    from src.soundscapes import find_soundscapes

    guard = Guard(40.0, hop_seconds=2.5, full_hop_seconds=5.0, n_models=2, n_rows=27, clock=itertools.count().__next__)
    list(score(find_soundscapes(slow / "soundscapes", 60), Ensemble(find_models([slow / "run"], 1), CLASSES, guard), batch_size=2))
    assert guard.plan == Plan(5.0, 1)
    assert last_plan(capsys.readouterr().out) == "1 of 2 model(s) from here on, windows every 5 s from the next soundscape on"
    assert last_plan("wrote s.csv") == "all"


ABANDONED = """
import time
from src.soundscapes import ahead

def slow():
    time.sleep(0.5)
    print("decoded")
    yield

list(ahead(slow(), lambda: 0.0))
print("left alone")
"""


def test_a_decoder_that_is_left_alone_ends_before_python_does():
    """Else its C++ meets an interpreter that is gone, and the process aborts behind its whole submission."""
    done = subprocess.run([sys.executable, "-c", ABANDONED], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["left alone", "decoded"], done.stderr
