"""Recordings -> windows -> rows: which files of a folder count, where windows begin, how rows follow from them."""

import os

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from src import submission
from src.config import AudioConfig
from src.console import UserError
from src.soundscapes import WindowStream, decode, find_soundscapes
from tests.conftest import waveform


@given(n=st.integers(1, 40), window=st.sampled_from([2.0, 5.0, 10.0]), hop=st.sampled_from([1.0, 2.0, 2.5, 5.0]))
def test_windows_cover_every_row_and_rows_are_means_by_overlap_or_maxima(n, window, hop):
    starts = submission.window_starts(n, window, min(hop, window))
    probability = np.arange(len(starts), dtype=float)[:, None]
    rows = submission.rows_from_windows(probability, starts, window, n)
    highest = submission.rows_from_windows(probability, starts, window, n, "max")
    grid = np.arange(0, n * 5, 0.5) + 0.25  # an independent integral: the mean over half seconds of the windows above each
    for k in range(n):
        weights = np.array([sum(s <= t < s + window for t in grid[10 * k : 10 * k + 10]) for s in starts], float)
        assert rows[k, 0] == pytest.approx((weights @ probability[:, 0]) / weights.sum(), abs=1e-4)
        assert highest[k, 0] == probability[weights >= weights.max() / 2].max()
    if window == 5.0 == hop:
        assert rows[:, 0].tolist() == list(range(n))


@pytest.mark.parametrize(("seconds", "rows"), [(0.01, 1), (4, 1), (7.6, 2), (7.5, 2), (12.5, 3), (599.9, 120), (600.02, 120), (602.6, 121)])
def test_row_rule(seconds, rows):
    assert submission.n_rows(seconds) == rows


@given(seconds=st.floats(0.01, 4000))
def test_for_people_rows_reach_the_end(seconds):
    n = submission.n_rows(seconds, to_the_end=True)
    assert n == 1 or 5 * (n - 1) < seconds - 0.49 and seconds < 5 * n + 0.51
    assert n in (submission.n_rows(seconds), submission.n_rows(seconds) + 1) or seconds % 5 > 2.49


def test_a_header_that_promises_hours_costs_no_memory():
    config, sound, starts = AudioConfig(), waveform(12), submission.window_starts(7200, 5.0, 2.5)
    honest, boastful = (WindowStream(config, at) for at in (starts[:5], starts))
    windows, first = boastful.push(sound) + boastful.finish(), honest.push(sound) + honest.finish()
    assert len(first) == 5 and len(windows) == 7, "all that begin less than a row behind the end"
    np.testing.assert_array_equal(windows[:5], first)


def test_a_recording_that_grows_while_it_is_read_costs_no_memory_and_is_told(tmp_path):
    config, sound = AudioConfig(), waveform(12)
    stream = WindowStream(config, submission.window_starts(2, 5.0, 5.0))
    assert len(stream.push(sound)) == 2
    for _ in range(20):
        assert stream.push(sound) == [] and stream.frames.shape[1] == 0
    soundfile.write(tmp_path / "grows.wav", sound[: 5 * 32_000], 32_000)
    (found,) = find_soundscapes(tmp_path, 60)
    soundfile.write(tmp_path / "grows.wav", sound, 32_000)
    batches = list(decode([found], lambda s: {config: submission.window_starts(s.n_rows, 5.0, 5.0)}, 8))
    assert [windows is None or len(windows) for _, _, windows in batches] == [1, True] and found.fault.startswith("grew while it was being read")


def test_names_that_are_no_text_are_refused_before_any_work(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.wav")).touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(UserError, match=r"caf\\udce9.wav.*is not UTF-8.*rename"):
        find_soundscapes(tmp_path, 60)


def test_linked_folders_are_entered_once(tmp_path):
    season, card = tmp_path / "season", tmp_path / "card"
    for path in (season / "day/a.wav", season / ".trash/b.wav", card / "c.wav", card / "deep/d.wav"):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waveform(1), 32_000)
    for link, to in ((season / "card", card), (season / "card again", card), (season / "a day", season / "day"), (card / "loop", season), (card / "own", card)):
        link.symlink_to(to, target_is_directory=True)
    assert [s.name for s in find_soundscapes(season, 60, recursive=True)] == ["card/c", "card/deep/d", "day/a"]
    assert find_soundscapes(season, 60) == []


@pytest.mark.parametrize("rates", [(32_000, 16_000), (16_000, 32_000)])
def test_the_first_model_s_rate_is_decoded_first(soundscapes, rates):
    configs = [AudioConfig(sample_rate=rate, fmax=8000.0) for rate in rates]
    found = find_soundscapes(soundscapes, 600.0)[:1]
    batches = decode(found, lambda s: {config: submission.window_starts(s.n_rows, 5.0, 5.0) for config in configs}, 1)
    assert tuple(dict.fromkeys(config.sample_rate for _, config, _ in batches if config)) == rates
