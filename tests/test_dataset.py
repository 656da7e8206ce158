"""Items of a batch: crops on both paths, augmentation, sampling, mixup, held-out windows."""

import pickle

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from src import cache
from src.augment import AugmentSettings, SpecAugment, WaveformAugment, draw_mixup, mel_shift, mix
from src.cache import Cache
from src.console import UserError
from src.dataset import BalancedSampler, Crops, HeldOutWindows, as_is, sampling_share, to_log_mel
from src.metadata import read_metadata, targets
from tests.conftest import make_data, waveform


def crops_of(data, cached, **settings) -> Crops:
    metadata = read_metadata([data])
    target, weight = targets(metadata.table, metadata.classes)
    return Crops(metadata.table, Cache(cached), target, weight, settings=AugmentSettings(**settings), noise=data / "noise", seed=3)


@pytest.mark.parametrize(("rate", "memory"), [(32_000, 0), (44_100, 0), (44_100, 1)])
def test_the_waveform_path_gives_the_cache_s_frames(tmp_path, rng, rate, memory):
    """Within the uint8 step, at a recording's ends too, and for recordings shorter than a window."""
    table = make_data(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "train_audio").rglob("*.ogg"))):
        soundfile.write(path, waveform((2.3, 5.0, 5.8, 9.1)[number % 4], rate), rate)
    assert cache.main(["--data", str(tmp_path), "--out", str(tmp_path / "c")]) == 0
    crops = crops_of(tmp_path, tmp_path / "c", waveform_memory=memory)
    crops.waveform_augment = lambda stretch, rng: stretch
    for row in range(4):
        n, window = crops.cache.n_frames(table.filename[row]), crops.cache.config.window_frames
        for start in {0, max(0, n - window) // 2, max(0, n - window)}:
            waveform_path = crops.waveform_crop(row, start, window, rng)
            frames = np.arange(start, start + window) % n if n < window else np.arange(start, start + window)
            expected = crops.cache.read(table.filename[row])[frames]
            assert waveform_path.shape == (500, 128)
            assert np.abs(waveform_path.astype(int) - expected).max() <= (1 if rate == 32_000 or memory else 4), (row, start)
    if memory:
        soundfile.write(crops.paths[5], waveform(4, rate), rate)
        with pytest.raises(UserError, match="readable when it was cached, and is not now: its length is another one"):
            crops.waveform_crop(5, 0, 500, rng)


def test_audio_that_is_gone_is_refused_before_the_first_epoch(tmp_path, data, cached):
    table, (target, weight) = read_metadata([data]).table, np.zeros((2, 18, 3), np.float32)
    table.loc[[3, 5], "path"] = str(tmp_path / "gone.ogg")
    with pytest.raises(UserError, match=r"gone.ogg is not there \(2 recording"):
        Crops(table, Cache(cached), target, weight, settings=AugmentSettings(), noise=data / "noise", seed=3)
    Crops(table, Cache(cached), target, weight, settings=AugmentSettings(waveform_probability=0), noise=data / "noise", seed=3)


def test_items_do_not_depend_on_the_workers_or_the_memory(data, cached):
    settings = {"waveform_probability": 0.5, "spec_augment_probability": 1.0, "stretch": 0.2, "mel_shift_bins": 4, "filter_db": 6, "roll_probability": 0.5}
    from_files, crops = (crops_of(data, cached, **settings, waveform_memory=memory) for memory in (0, 2))
    assert np.array_equal(pickle.loads(pickle.dumps(from_files)).crop(0, 0, 0), crops.crop(0, 0, 0))  # as a spawned worker gets it
    sampler = BalancedSampler(sampling_share(read_metadata([data]).table, power=0.5, use_rating=True), 6, seed=3)
    batches = []
    for workers, dataset in ((2, crops), (0, crops), (0, from_files)):
        np.random.seed(workers)  # the global state must not matter
        batches.append(torch.cat([b["crop"] for b in DataLoader(dataset, batch_sampler=sampler, collate_fn=as_is, num_workers=workers)]))
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
    assert crops.waveforms.lengths.any() and from_files.waveforms.samples is None
    sampler.epochs = range(1, 2)
    assert not torch.equal(batches[0], torch.cat([b["crop"] for b in DataLoader(crops, batch_sampler=sampler, collate_fn=as_is)]))


def test_the_mel_axis_moves_by_at_most_so_many_bins():
    crop, moved = np.arange(128, dtype=np.uint8)[None].repeat(3, axis=0), set()
    for seed in range(40):
        shifted = mel_shift(crop, 2, np.random.default_rng(seed)).astype(int)
        moved.add(20 - int(shifted[0, 20]))
        assert (shifted == (np.arange(128) - (20 - shifted[0, 20])).clip(0, 127)).all()
    assert moved == {-2, -1, 0, 1, 2}


def test_a_longer_stretch_becomes_a_faster_window(data, cached):
    """Frames that count up one by one: within a stretched window they count up by the factor, from 1 / 1.5 to 1.5."""
    crops = crops_of(data, cached, stretch=0.5, mel_shift_bins=0, roll_probability=0, filter_db=0, spec_augment_probability=0, waveform_probability=0)
    row = int(np.argmax([crops.cache.n_frames(name) for name in crops.names]))
    counted = np.linspace(0, 255, crops.cache.n_frames(crops.names[row])).astype(np.uint8)[:, None].repeat(128, axis=1)
    crops.cache.read = lambda name, start=0, n=None: counted[start:] if n is None else counted[start : start + n]
    step = 255 / len(counted)
    factors = [np.diff(crops.crop(0, place, row)[:, 0].astype(int)).clip(0).sum() / 499 / step for place in range(40)]
    assert min(factors) < 0.8 and max(factors) > 1.2
    assert min(factors) > 1 / 1.5 - 0.05 and max(factors) < 1.5 + 0.05


def test_rare_species_are_drawn_more_often_than_their_share():
    table = pd.DataFrame({"primary_label": ["a"] * 80 + ["b"] * 20, "rating": 0.0})
    share = sampling_share(table, power=0.5, use_rating=True)
    assert share[0] / share[-1] == pytest.approx((20 / 80) ** 0.5)
    drawn = np.array([row for batch in BalancedSampler(share, 10, seed=0, n_crops=5000) for _, _, row in batch])
    assert len(drawn) == 5000 and (drawn >= 80).mean() == pytest.approx(1 / 3, abs=0.03)  # 20 sqrt(5) : 80 sqrt(5 / 4)


def test_well_rated_and_unlabelled_recordings_are_drawn_as_they_should():
    table = pd.DataFrame({"primary_label": ["a"] * 4 + ["b"] * 4 + [""] * 92, "rating": [5.0, 2.5, 0.0, 0.0] * 25})
    share = sampling_share(table, power=0.5, use_rating=True)
    assert (share[:4] / share[0]).tolist() == pytest.approx([1, 0.5, 0.75, 0.75])  # not rated: the mean of 5 and 2.5
    for power in (-400.0, 400.0):
        with pytest.raises(UserError, match="--sampling-power -?400 leaves no number to draw by"):
            sampling_share(table, power=power, use_rating=False)
    np.testing.assert_allclose(sampling_share(table, power=0.5, use_rating=False), 5.0)  # both species are 1/25 of all, and the rest is no species


def test_of_several_crops_the_loudest_is_chosen(data, cached):
    off = {"stretch": 0, "mel_shift_bins": 0, "roll_probability": 0, "filter_db": 0, "spec_augment_probability": 0, "waveform_probability": 0}
    starts = []
    for choices in (1, 8):
        crops = crops_of(data, cached, **off, crop_choices=choices)
        row = int(np.argmax([crops.cache.n_frames(name) for name in crops.names]))
        louder = np.linspace(0, 255, crops.cache.n_frames(crops.names[row])).astype(np.uint8)[:, None].repeat(128, axis=1)
        crops.cache.read = lambda name, start=0, n=None, louder=louder: louder[start : start + n]
        starts.append(np.mean([crops.crop(0, place, row)[0, 0] for place in range(40)]) / louder[-500, 0])
    assert starts[0] == pytest.approx(1 / 2, abs=0.15) and starts[1] == pytest.approx(8 / 9, abs=0.06)  # the mean of one draw, and of the highest of eight


def test_held_out_windows_cover_the_first_minute(cached, monkeypatch):
    opened = Cache(cached)
    windows = HeldOutWindows(opened.names, opened)
    for place, name in enumerate(opened.names):
        n = sum(1 for p, _ in windows.places if p == place)
        assert n == max(1, round((opened.n_frames(name) - 1) / 500))
    assert all(windows[item][0].shape == (500, 128) for item in range(len(windows)))
    monkeypatch.setattr("src.dataset.SCORED_SECONDS", 5.0)  # as if a minute were so short
    assert len(windows) > len(HeldOutWindows(opened.names, opened)) == len(opened.names)


def test_background_noise_meets_its_snr_and_leaves_silence_alone(data, rng):
    augment = WaveformAugment(AugmentSettings(min_snr_db=10, max_snr_db=10, gain_db=0), data / "noise", 32_000)
    sound = waveform(5)
    noise = augment(sound, rng) - sound
    assert 20 * np.log10(sound.std() / noise.std()) == pytest.approx(10, abs=0.3)
    silent = np.full(32_000, 1e-6, np.float32)
    assert 0.001 < np.abs(augment(silent, rng)).max() < 1  # the noise's own level: neither nothing nor amplified
    np.testing.assert_array_equal(augment(sound, np.random.default_rng(5)), augment(sound, np.random.default_rng(5)))
    with pytest.raises(UserError, match="no readable audio"):
        WaveformAugment(AugmentSettings(), data / "cache", 32_000)


def test_masks_are_bands_filled_with_the_mean(rng):
    crop = rng.choice([40, 60, 180, 220], (500, 128)).astype(np.uint8)  # the mean is none of them
    masking = SpecAugment(AugmentSettings(spec_augment_probability=1.0, frequency_masks=2, frequency_mask_bins=10, time_masks=1, time_mask_frames=60), 500, 128)
    bins, frames = [], []
    for _ in range(60):
        masked = masking(crop, rng)
        changed = masked != crop
        over_time, over_mel = changed.all(axis=1), changed.all(axis=0)  # masked frames, masked bins
        assert (changed == over_time[:, None] | over_mel).all() and (masked[changed] == round(crop.mean())).all()
        assert np.abs(np.diff(np.r_[0, over_time, 0])).sum() <= 2 and np.abs(np.diff(np.r_[0, over_mel, 0])).sum() <= 4  # edges of one band, of two
        bins.append(over_mel.sum())
        frames.append(over_time.sum())
    assert 10 < max(bins) <= 20 and 40 < max(frames) <= 60 and min(bins) == min(frames) == 0


def test_mixup_adds_powers_and_unites_targets(rng):
    settings = AugmentSettings(mixup_probability=1.0)
    log_mel, target, weight = torch.randn(8, 1, 4, 5) * 20 - 50, torch.eye(8), torch.ones(8, 8)
    weight[2, 3] = 0
    partner, share = draw_mixup(8, settings, np.random.default_rng(1))
    mixed, new_target, new_weight = mix(log_mel, target, weight, settings, np.random.default_rng(1))
    power = share[:, None, None, None] * 10 ** (log_mel.numpy() / 10) + (1 - share[:, None, None, None]) * 10 ** (log_mel.numpy()[partner] / 10)
    np.testing.assert_allclose(mixed.numpy(), 10 * np.log10(power), atol=1e-3)
    assert torch.equal(new_target, torch.maximum(target, target[partner])) and new_weight[2, 3] == 0
    linear = mix(log_mel, target, weight, AugmentSettings(mixup_probability=1.0, mixup_target="linear"), np.random.default_rng(1))[1]
    np.testing.assert_allclose(linear.sum(1).numpy(), 1, atol=1e-6)
    unmixed = mix(log_mel, target, weight, AugmentSettings(mixup_probability=0.0), rng)
    assert torch.equal(unmixed[0], log_mel) and torch.equal(unmixed[1], target)


def test_uint8_comes_back_as_decibels(cached):
    config = Cache(cached).config
    log_mel = to_log_mel(torch.tensor([[[0, 255]]], dtype=torch.uint8), config)
    assert log_mel.shape == (1, 1, 2, 1) and log_mel.flatten().tolist() == pytest.approx([-100, 20], abs=1e-4)
