"""The composed soundscapes of benchmarks/: the ratio as asked, the truth as it is, each fold's own model on its own recordings."""

import shutil

import numpy as np
import pytest

from benchmarks import pooling, soundscapes
from benchmarks.composition import Composition, Event, active_frames, compose, deal
from src import evaluate
from src.deadline import Guard
from src.demo_data import RATE, noise, write_audio
from src.metadata import read_csv, read_metadata
from src.onnx_models import find_models
from src.scoring import Ensemble, score
from src.soundscapes import find_soundscapes


def make(data, seed: int, n_events: int = 1) -> Composition:
    recordings = read_metadata((data,)).table.iloc[::5]
    return compose(recordings, lambda rng: rng.standard_normal(8 * RATE), seconds=30, n_events=n_events, rng=np.random.default_rng(seed))


def high_passed(sound: np.ndarray) -> np.ndarray:
    """By setting Fourier coefficients to zero, unlike the code under test."""
    spectrum = np.fft.rfft(sound)
    spectrum[np.fft.rfftfreq(len(sound), 1 / RATE) < 200] = 0
    return np.fft.irfft(spectrum, len(sound))


@pytest.mark.parametrize(("seed", "snr_db"), [(0, -5), (1, 10)])
def test_an_event_has_the_ratio_that_was_asked_for(data, seed, snr_db):
    made = make(data, seed)
    again, other = make(data, seed), make(data, seed + 10)
    assert np.array_equal(made.at(snr_db), again.at(snr_db)) and not np.array_equal(made.at(snr_db), other.at(snr_db))
    (event,) = made.events
    active = np.zeros(len(made.background), bool)
    active[event.start * 1600 : (event.start + len(event.active)) * 1600] = np.repeat(event.active, 1600)
    power = [np.square(high_passed(sound)[active]).mean() for sound in (made.at(snr_db) - made.background, made.background)]
    assert 10 * np.log10(power[0] / power[1]) == pytest.approx(snr_db, abs=0.5)


def test_a_song_is_found_where_it_is_and_noise_is_none(rng):
    sound = noise(6, "rain", rng) * 0.01
    sound[2 * RATE : 3 * RATE] += 0.2 * np.sin(2 * np.pi * 3000 * np.arange(RATE) / RATE).astype(np.float32)
    assert np.flatnonzero(active_frames(sound)).tolist() == list(range(40, 60))
    assert not active_frames(rng.standard_normal(6 * RATE)).any()


def test_rows_truth_by_hand():
    events = [Event("x", "a", 95, np.ones(20, bool)),  # 0.25 s in the first row, 0.75 s in the second
              Event("y", "b", 180, np.array([1, 0] * 20, bool)),  # ten active frames on either side of 10 s
              Event("z", "a", 385, np.ones(60, bool))]  # over the end
    truth = Composition(np.zeros(0), np.zeros(0), events).truth(("b", "a", "c"), 4)
    assert truth.T.tolist() == [[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_no_recording_is_in_two_soundscapes(data):
    table = read_metadata((data,)).table
    hands = deal(table, 4, np.random.default_rng(0))
    assert sorted(name for hand in hands for name in hand.filename) == sorted(table.filename)
    assert len({hand.primary_label.iloc[0] for hand in hands[:3]}) == 3  # every species' first before its second


def test_rows_are_those_of_inference_and_max_and_smoothing_by_hand(tmp_path, run, data):
    write_audio(tmp_path / "s.ogg", make(data, 3, 4).at(10))
    (model,) = find_models([run], 1)
    windows = soundscapes.window_probabilities(model, [tmp_path / "s.ogg"], pooling.window_starts(6, 5.0), 8)[0]
    for hop in pooling.HOPS:
        guard = Guard(None, hop_seconds=hop, full_hop_seconds=5, n_models=1, n_rows=6)
        (scored,) = score(find_soundscapes(tmp_path, 30), Ensemble([model], model.classes, guard), batch_size=8)
        expected = scored.probability
        np.testing.assert_allclose(pooling.rows(windows, 6, 5.0, pooling.Option(hop)), expected, atol=1e-6)
    highest = pooling.rows(windows, 6, 5.0, pooling.Option(2.5, "max"))  # windows lie 1.25 s apart
    np.testing.assert_array_equal(highest[2], windows[[6, 8, 10]].max(axis=0))
    plain, smooth = (pooling.rows(windows, 6, 5.0, pooling.Option(smooth=s)) for s in (False, True))
    np.testing.assert_allclose(smooth[[0, 2]], [0.75 * plain[0] + 0.25 * plain[1], 0.25 * plain[1] + 0.5 * plain[2] + 0.25 * plain[3]], rtol=1e-5)


def test_the_whole_benchmark(tmp_path, run, data, capsys):
    shutil.copytree(run / "fold0", tmp_path / "run/fold0")
    write_audio(tmp_path / "noise/rain.ogg", noise(6, "rain", np.random.default_rng(5)) * 0.05)
    shutil.copy(data / "noise/wind.ogg", tmp_path / "noise/under_another_name.ogg")  # trained with
    flags = ["--run", str(tmp_path / "run"), "--noise", str(tmp_path / "noise"), "--per-fold", "2", "--seconds", "30", "--events", "4",
             "--snr-db", "-5", "10", "--resamples", "20", "--threads", "1", "--results", str(tmp_path)]
    assert soundscapes.main(flags) == 0
    assert "1 noise files (1 that the run was trained with are left out)" in capsys.readouterr().out
    report = (tmp_path / "soundscapes.md").read_text()
    assert "| -5 | " in report and "| all, pooled | " in report and "hop 1.25 s, max, smoothed" in report and "nan" not in report
    assert (tmp_path / "soundscapes.png").exists() and (tmp_path / "run/soundscapes/example.png").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/soundscapes").glob("*.npz")}
    assert len(kept) == 2 and soundscapes.main(flags) == 0  # continues: nothing is scored again
    assert kept == {path: path.stat().st_mtime_ns for path in kept} and (tmp_path / "soundscapes.md").read_text() == report
    tasks, _ = soundscapes.plan(soundscapes.SoundscapeSettings(run=tmp_path / "run", per_fold=2), 1)
    used = {name for task in tasks for name in task.hand.filename}
    held_out = set(read_csv(run / "fold0/oof.csv").filename)
    single = {name for name in held_out if not name.endswith("1.ogg")}  # number 1 of each species names a second one
    assert used <= held_out and used >= single and evaluate.read_oof(run / "fold0", list(tasks[0].model.classes)).filename.isin(held_out).all()


@pytest.mark.parametrize(("flags", "message"), [
    (["--seconds", "10"], "--seconds is at least 30"), (["--per-fold", "50"], "lower --per-fold"), (["--noise", "none"], "is no folder"),
    (["--noise", "TRAINED"], "hold some back")])
def test_bad_input(run, data, capsys, flags, message):
    flags = [str(data / "noise") if flag == "TRAINED" else flag for flag in flags]
    assert soundscapes.main(["--run", str(run), "--threads", "1", *flags]) == 1
    assert message in capsys.readouterr().err
