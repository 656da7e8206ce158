"""AudioSet, VGGSound, Speech Commands and UCR's time series, brought into the layout and through a training under their own recipes."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from src import audio, cache, evaluate, export, infer, prepare, train
from src.dataset import HeldOutWindows
from src.folds import read_folds
from src.metadata import read_csv, read_metadata
from src.run_config import read_config

from .conftest import make_soundscape


def tone(path, seconds, rate, hertz):
    t = np.arange(round(seconds * rate)) / rate
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * t) + 0.01 * np.random.default_rng(0).standard_normal(len(t)), rate)


def through_cache_and_training(out, tmp_path, *flags):
    """One epoch of fold 0 under the recipe that the data set brought; the cache and the run's config."""
    assert cache.main(["--data", str(out), "--out", str(tmp_path / "cache"), "--workers", "1"]) == 0
    assert train.main(["--data", str(out), "--folds", str(out / "folds.csv"), "--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run"),
                       "--model", "asca_test", "--input-side", "64", "--epochs", "1", "--batch-size", "4", "--threads", "1", *flags]) == 0
    return cache.Cache(tmp_path / "cache"), read_config(tmp_path / "run/fold0")


def held_out(tmp_path):
    return sorted(read_csv(tmp_path / "run/fold0/oof.csv").filename)


AUDIOSET = {  # video -> where a downloader put it; the last one is gone from YouTube
    "-0RWZT-miFs": ("balanced/-0RWZT-miFs.wav", 10.0, 44_100), "--aE2O5G5WE": ("balanced/Y--aE2O5G5WE.flac", 9.98, 48_000),
    "aaaaaaaaaaa": ("balanced/aaaaaaaaaaa_30000_40000.wav", 10.0, 16_000), "bbbbbbbbbbb": ("eval/bbbbbbbbbbb_30.000_40.000.wav", 10.05, 32_000),
    "ccccccccccc": ("eval/ccccccccccc.wav", 4.0, 32_000), "ddddddddddd": None}


def make_audioset(root, labels="/m/09x0r,/m/05zppz"):
    for number, place in enumerate(filter(None, AUDIOSET.values())):
        tone(root / "clips" / place[0], *place[1:], hertz=500 * (number + 1))
    (root / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/m/0k4j,"Car"\n3,/t/dd00001,"Baby laughter"\n')
    header = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=5\n" \
        "# YTID, start_seconds, end_seconds, positive_labels\n"
    videos = list(AUDIOSET)
    (root / "balanced_train_segments.csv").write_text(header + "".join(f'{video}, 30.000, 40.000, "{labels}"\n' for video in videos[:3]))
    (root / "eval_segments.csv").write_text(
        header + f'{videos[3]}, 30.000, 40.000, "/m/0k4j"\n{videos[4]}, 0.000, 4.000, "/m/0k4j,/m/09x0r"\n{videos[5]}, 30.000, 40.000, "/t/dd00001"\n')


def test_audioset_trains_on_ten_seconds_and_several_labels(tmp_path, capsys):
    make_audioset(tmp_path / "source")
    out = tmp_path / "out"
    assert prepare.main(["audioset", str(tmp_path / "source"), "--out", str(out)]) == 0
    assert "1 of 6 recordings are not there" in capsys.readouterr().out and read_csv(out / "missing_audio.csv").filename.tolist() == ["ddddddddddd_000030.wav"]
    metadata = read_metadata([out])
    assert metadata.classes == ("/m/09x0r", "/m/05zppz", "/m/0k4j", "/t/dd00001")  # AudioSet's order; the second is never a primary label
    assert metadata.table.secondary_labels[0] == ("/m/05zppz",) and read_csv(out / "taxonomy.csv").common_name[1] == "Male speech, man speaking"
    assert list(read_folds(out / "folds.csv").values()) == [-1, -1, -1, 0, 0, 0]
    made, config = through_cache_and_training(out, tmp_path)
    assert made.config.window_frames == 1000 and config["audio"]["window_seconds"] == 10 and config["settings"]["secondary_labels"] == "hard"
    assert config["prior"] == pytest.approx([1 - 1e-6, 1 - 1e-6, 1e-6, 1e-6]) and config["recordings"].items() >= {"training": 3, "held_out": 2}.items()
    assert held_out(tmp_path) == ["eval/bbbbbbbbbbb_30.000_40.000.wav", "eval/ccccccccccc.wav"]
    assert made.n_frames("balanced/Y--aE2O5G5WE.flac") == 999  # 9.98 s: filled up from its own beginning
    window, _ = HeldOutWindows(["balanced/Y--aE2O5G5WE.flac"], made)[0]
    np.testing.assert_array_equal(window[999:], window[:1])
    assert evaluate.main(["--run", str(tmp_path / "run"), "--resamples", "2"]) == 0 and "primary and secondary" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize(("old", "new", "message"), [
    ("/m/09x0r,/m/05zppz", "/m/09x0r,/m/nothing", r"balanced_train_segments.csv, line 4: label '/m/nothing'"),
    ("--aE2O5G5WE, 30.000", "--aE2O5G5WE, half past", r"balanced_train_segments.csv, line 5: .* is not YTID"),
    ("--aE2O5G5WE, 30.000", "../../x, 30.000", r"balanced_train_segments.csv, line 5"),
    (', "/m/09x0r,/m/05zppz"', "", r"balanced_train_segments.csv, line 4")])
def test_odd_rows_of_a_clip_table_are_named_with_their_line(tmp_path, capsys, old, new, message):
    make_audioset(tmp_path / "source")
    file = tmp_path / "source/balanced_train_segments.csv"
    file.write_text(file.read_text().replace(old, new))
    assert prepare.main(["audioset", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out/train_metadata.csv").exists()


def test_clips_that_are_no_audio_yet_are_told_apart_from_none(tmp_path, capsys):
    make_audioset(tmp_path / "source")
    for path in (tmp_path / "source/clips").rglob("*.*"):
        path.rename(path.with_suffix(".mp4"))
    assert prepare.main(["audioset", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 1 and "there are .mp4 files" in capsys.readouterr().err


def test_vggsound_holds_out_its_test_set(tmp_path, capsys):
    source, out, table = tmp_path / "source", tmp_path / "source/prepared", tmp_path / "source/vggsound.csv"
    rows = [("---g-f_I2yQ", 1, "people marching", "test"), ("--0PQM4-hqg", 30, "donkey/ass braying", "train"),
            ("--56QUhyDQM", 185, "engine accelerating, revving, vroom", "train"), ("--5OkAjCI7g", 40, "people marching", "train"),
            ("--gone-----", 40, "people marching", "test"), ("--gone-----", 70, "people marching", "train")]
    for number, (video, start, _, _) in enumerate(rows[:-2]):
        tone(source / f"video/{video}_{start:06d}.wav", 10, 22_050, 700 * (number + 1))
    table.write_text("".join(f'{video},{start},"{label}",{split}\n' for video, start, label, split in rows))
    for _ in range(2):  # the second time, the first one's link lies in the source
        assert prepare.main(["vggsound", str(source), "--out", str(out)]) == 0
    assert read_metadata([out]).classes == ("donkey_ass_braying", "engine_accelerating_revving_vroom", "people_marching")
    written = read_csv(out / "train_metadata.csv")
    assert written.common_name[2] == "engine accelerating, revving, vroom" and written.filename[0] == "---g-f_I2yQ_000001.wav"
    assert read_csv(out / "missing_audio.csv").filename.tolist() == ["--gone-----_000040.wav", "--gone-----_000070.wav"]
    made, config = through_cache_and_training(out, tmp_path)
    assert config["audio"]["window_seconds"] == 10 and made.config.window_frames == 1000 and held_out(tmp_path) == ["---g-f_I2yQ_000001.wav"]
    capsys.readouterr()
    for old, new, message in (("train", "trian", "line 2: 'donkey/ass braying', 'trian'"), ("donkey/ass braying", "People, marching", "spellings of one")):
        table.write_text(table.read_text().replace(old, new))
        assert prepare.main(["vggsound", str(source), "--out", str(out)]) == 1 and message in capsys.readouterr().err
        table.write_text(table.read_text().replace(new, old))


def make_speech_commands(root):
    for number, word in enumerate(("yes", "no", "bed")):
        for speaker, seconds in (("00f0204f", 1.0), ("0a9f9af7", 0.6), ("a69b9b3e", 1.0), ("c120e80e", 1.0)):
            tone(root / word / f"{speaker}_nohash_0.wav", seconds, 16_000, 600 * (number + 1))
    tone(root / "_background_noise_/pink_noise.wav", 3, 16_000, 100)
    (root / "testing_list.txt").write_text("yes/a69b9b3e_nohash_0.wav\nno/a69b9b3e_nohash_0.wav\nno/ffffffff_nohash_1.wav\n")
    (root / "validation_list.txt").write_text("bed/c120e80e_nohash_0.wav\n")


def test_speech_commands_keeps_both_lists_out_of_training_down_to_the_submission(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    make_speech_commands(source)
    (source / "yes/._a69b9b3e_nohash_0.wav").touch()  # what macOS leaves on other disks
    assert prepare.main(["speech_commands", str(source), "--out", str(out)]) == 0 and "1 of 13 recordings are not there" in capsys.readouterr().out
    assert read_metadata([out]).classes == ("bed", "no", "yes") and set(read_csv(out / "train_metadata.csv").author) >= {"00f0204f", "ffffffff"}
    test, validation = read_folds(out / "folds.csv"), read_folds(out / "folds_validation.csv")
    for listed, other, table in (("testing", "validation", test), ("validation", "testing", validation)):
        assert {name for name in table if table[name] == 0} == set((source / f"{listed}_list.txt").read_text().split())
        assert {name for name in table if table[name] == -2} == set((source / f"{other}_list.txt").read_text().split())
    made, config = through_cache_and_training(out, tmp_path, "--noise", str(out / "train_audio/_background_noise_"))
    assert config["recordings"].items() >= {"training": 9, "held_out": 2}.items()
    assert held_out(tmp_path) == ["no/a69b9b3e_nohash_0.wav", "yes/a69b9b3e_nohash_0.wav"]
    assert made.config.window_frames == 100 and made.n_frames("bed/0a9f9af7_nohash_0.wav") == 61 and config["settings"]["time_mask_frames"] == 10
    highest = made.read("no/00f0204f_nohash_0.wav")[10:90, -3:]
    assert highest.mean() > made.read("no/00f0204f_nohash_0.wav")[10:90].mean() / 3  # the last mel bins lie below 8 kHz, where there is sound
    assert export.main(["--run", str(tmp_path / "run")]) == 0
    make_soundscape(tmp_path / "long/a.wav", 10.0)
    assert infer.main(["--run", str(tmp_path / "run"), "--soundscapes", str(tmp_path / "long"), "--out", str(tmp_path / "s.csv"), "--threads", "1"]) == 0
    rows = pd.read_csv(tmp_path / "s.csv", index_col="row_id")
    log_mel = audio.log_mel(audio.read_waveform(tmp_path / "long/a.wav", 32_000), made.config)
    model, _ = export.load_model(tmp_path / "run/fold0")
    with torch.inference_mode():  # a row of 5 s is the mean of its five windows
        expected = model(torch.from_numpy(np.stack([log_mel[None, :, k : k + 100] for k in range(0, 1000, 100)]))).sigmoid().numpy()
    np.testing.assert_allclose(rows[config["classes"]], expected.reshape(2, 5, 3).mean(axis=1), atol=1e-5)


def test_odd_lists_of_speech_commands_are_refused(tmp_path, capsys):
    make_speech_commands(tmp_path / "source")
    for text, message in (("yes/a69b9b3e_nohash_0.wav\nyes\n", "testing_list.txt, line 2: 'yes'"), ("bed/c120e80e_nohash_0.wav\n", "and in validation_list")):
        (tmp_path / "source/testing_list.txt").write_text(text)
        assert prepare.main(["speech_commands", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 1 and message in capsys.readouterr().err


def make_ucr(root, form):
    """Rising and falling ramps, and a wave; lengths vary, values are missing, a series of the test set has none."""
    ramp = np.linspace(-2, 2, 60)
    series = {"TRAIN": [("1", ramp), ("2", -ramp), ("-1", np.sin(ramp * 20)), ("1", ramp[:40])], "TEST": [("2", -ramp), ("1", ramp), ("2", ramp * np.nan)]}
    series["TRAIN"][0][1][20:25] = np.nan
    root.mkdir()
    for part, rows in series.items():
        if form == "tsv":  # 2018's archive pads a short series with NaN
            text = "".join("\t".join([label, *(f"{v:.6g}".replace("nan", "NaN") for v in np.pad(x, (0, 60 - len(x)), constant_values=np.nan))]) + "\n"
                           for label, x in rows)
        else:
            text = "# Ramps\n@problemName Ramps\n@timeStamps false\n@missing true\n@univariate true\n@equalLength false\n@classLabel true -1 1 2\n@data\n" + \
                "".join(",".join("?" if np.isnan(v) else f"{v:.6g}" for v in x) + f":{label}\n" for label, x in rows)
        (root / f"Ramps_{part}.{form}").write_text(text)


def test_a_ucr_series_becomes_a_sound_that_shows_it(tmp_path, capsys):
    make_ucr(tmp_path / "Ramps", "tsv")
    out = tmp_path / "out"
    assert prepare.main(["ucr", str(tmp_path / "Ramps"), "--out", str(out)]) == 0 and "1 of 7 recordings are not there" in capsys.readouterr().out
    assert read_csv(out / "missing_audio.csv").filename.tolist() == ["Ramps_TEST_00003.flac"] and read_metadata([out]).classes == ("-1", "1", "2")
    for number in (1, 4):  # the missing values are bridged, and the short one fills its second too
        sound, rate = soundfile.read(out / f"train_audio/Ramps_TRAIN_{number:05d}.flac")
        assert rate == 4000 and np.abs(sound - np.linspace(0.1, 0.9, 4000)).max() < 1e-4
    made, config = through_cache_and_training(out, tmp_path)
    assert made.config.window_frames == 200 and held_out(tmp_path) == ["Ramps_TEST_00001.flac", "Ramps_TEST_00002.flac"]
    rising, falling = (made.read(f"Ramps_TRAIN_0000{k}.flac")[10:190, 0].astype(int) for k in (1, 2))
    assert (np.diff(rising) >= 0).all() and (np.diff(falling) <= 0).all() and rising.max() < 255  # 8 bits hold it all, with its sign
    assert config["settings"]["time_mask_frames"] == 20 and config["audio"]["fmax"] == 500


def test_both_forms_of_the_ucr_archive_give_the_same_files(tmp_path, capsys):
    for form in ("tsv", "ts"):
        make_ucr(tmp_path / form, form)
        (tmp_path / form / f"._Ramps_TRAIN.{form}").write_bytes(b"\0\5\x16\7")  # what macOS leaves on other disks
        assert prepare.main(["ucr", str(tmp_path / form), "--out", str(tmp_path / f"out_{form}")]) == 0
    assert "mind that" not in capsys.readouterr().out
    one, other = ({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")} for out in (tmp_path / "out_tsv", tmp_path / "out_ts"))
    assert one == other and len(one) == 15
    make_ucr(tmp_path / "other", "tsv")
    for file in (tmp_path / "other").iterdir():
        file.rename(file.with_name(file.name.replace("Ramps", "Other")))
    assert prepare.main(["ucr", str(tmp_path / "other"), "--out", str(tmp_path / "out_ts")]) == 1 and "not from ucr Other" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "old", "new", "message"), [
    ("tsv", "-1\t", "-1\tx", "Ramps_TRAIN.tsv, line 3: could not convert"),
    ("tsv", "-1\t", "-1\t-1e308\t1e308\t", "line 3: its values span more"), ("ts", ":-1", ":3", "Ramps_TRAIN.ts, line 11: label '3'"),
    ("ts", ":-1", ":0.5:-1", "line 11: 2 colons"), ("ts", "@univariate true", "@univariate false", "several channels"),
    ("ts", "@timeStamps false", "@timeStamps true", "time stamps"), ("ts", "@classLabel true -1 1 2", "@targetLabel true", "no class labels")])
def test_odd_time_series_are_refused(tmp_path, capsys, form, old, new, message):
    make_ucr(tmp_path / "Ramps", form)
    file = tmp_path / f"Ramps/Ramps_TRAIN.{form}"
    file.write_text(file.read_text().replace(old, new))
    assert prepare.main(["ucr", str(tmp_path / "Ramps"), "--out", str(tmp_path / "out")]) == 1 and message in capsys.readouterr().err
    shutil.copy(file, file.with_name(f"Other_TRAIN.{form}"))
    assert prepare.main(["ucr", str(tmp_path / "Ramps"), "--out", str(tmp_path / "out")]) == 1 and "instead of one" in capsys.readouterr().err


def test_clips_behind_links_to_other_disks_are_refused_at_once(tmp_path, capsys):
    for number, split in enumerate(("train", "test")):
        tone(tmp_path / f"disk{number}/{split}/{number}0-g-f_I2yQ_000001.wav", 10, 22_050, 700)
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / split).symlink_to(tmp_path / f"disk{number}" / split)
    (tmp_path / "source/vggsound.csv").write_text('00-g-f_I2yQ,1,"a",train\n10-g-f_I2yQ,1,"b",test\n')
    assert prepare.main(["vggsound", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 1
    assert "leads out of" in capsys.readouterr().err
