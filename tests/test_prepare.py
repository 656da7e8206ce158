"""Years of BirdCLEF and ESC as they are published, brought into the layout of BirdCLEF 2023 and through the stages; whose settings come first."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src import cache, evaluate, folds, prepare, train
from src.competitions import COMPETITIONS
from src.console import UserError
from src.demo_data import noise, write_audio
from src.folds import read_folds
from src.metadata import read_csv, read_metadata
from src.settings import parse
from src.sources.birdclef import soundscape_labels
from src.sources.layout import COLUMNS

from .conftest import make_soundscape

ESC10 = Path(__file__).parents[2] / "shared/data/esc10"
LABELS = {"birdclef-2023": ["abethr1", "NA"], "birdclef-2024": ["asbfly", "zitcis1"], "birdclef-2025": ["1139490", "grekis"],
          "birdclef-2026": ["22961", "007"]}
YEAR_2025 = ["primary_label", "secondary_labels", "type", "filename", "collection", "rating", "url", "latitude", "longitude", "scientific_name",
             "common_name", "author", "license"]  # 2025's columns in 2025's order; 2026's are the same


def make_year(root, name, n=3):
    """A small folder as the competition publishes it; the last recording's audio is missing."""
    new, rows = name >= "birdclef-2025", []
    for label in LABELS[name]:
        for number in range(n):
            file = f"{label}/{'iNat' if new else 'XC'}{label}{number}.ogg"
            write_audio(root / "train_audio" / file, noise(1.5 + number / 2, "wind", np.random.default_rng(number)) * 0.02)
            rows.append({"primary_label": label, "secondary_labels": "['']" if new else "[]", "type": "['']", "filename": file, "collection": "iNat",
                         "rating": "0.0", "url": "https://example.org", "latitude": "1.5", "longitude": "2.5", "scientific_name": f"S {label}",
                         "common_name": f"C {label}", "author": f"A{number}", "license": "cc"})
    rows[1]["secondary_labels"] = f"['{LABELS[name][1]}']"
    table = pd.DataFrame(rows)
    table = table[YEAR_2025] if new else table[list(COLUMNS)]
    table.to_csv(root / COMPETITIONS[name].metadata, index=False)
    (root / "train_audio" / table.filename.iloc[-1]).unlink()
    taxonomy = "primary_label,inat_taxon_id,scientific_name,common_name,class_name\n" if new else "SPECIES_CODE,SCI_NAME,PRIMARY_COM_NAME\n"
    (root / COMPETITIONS[name].taxonomy).write_text(taxonomy + "".join(f"{label},1,S,C,Aves\n" if new else f"{label},S,C\n" for label in LABELS[name]))
    columns = sorted(LABELS[name])
    (root / "sample_submission.csv").write_text(f"row_id,{','.join(columns)}\nsoundscape_1_5,{','.join(['0.1'] * len(columns))}\n")
    (root / "test_soundscapes").mkdir()
    if name == "birdclef-2026":
        (root / "train_soundscapes").mkdir()
        (root / "train_soundscapes_labels.csv").write_text(
            "filename,start,end,primary_label\nBC2026_Train_0001_S05_20250227_010002.ogg,00:00:00,00:00:05,22961;007\n"
            "BC2026_Train_0001_S05_20250227_010002.ogg,00:00:55,00:01:00,22961\nBC2026_Train_0001_S05_20250227_010002.ogg,00:00:55,00:01:00,007\n")
    return table


@pytest.mark.parametrize("name", list(COMPETITIONS))
def test_every_year_comes_into_one_layout(tmp_path, name, capsys):
    original, out = make_year(tmp_path / "source", name), tmp_path / "out"
    assert prepare.main([name, str(tmp_path / "source"), "--out", str(out)]) == 0
    written = read_csv(out / "train_metadata.csv")
    assert written.columns.tolist() == list(COLUMNS)
    same = [column for column in COLUMNS if column != "secondary_labels"]
    pd.testing.assert_frame_equal(written[same], original[same], check_dtype=False)
    metadata = read_metadata([out])
    assert metadata.classes == tuple(sorted(LABELS[name]))
    assert metadata.table.secondary_labels.tolist()[:2] == [(), (LABELS[name][1],)]
    assert read_csv(out / "missing_audio.csv").filename.tolist() == [original.filename.iloc[-1]] and "1 of 6 recordings" in capsys.readouterr().out
    assert (out / "train_audio").is_symlink() and (out / "test_soundscapes").is_dir()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert prepare.main([name, str(tmp_path / "source"), "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    if name == "birdclef-2026":
        labels = read_csv(out / "soundscape_labels.csv")
        assert dict(zip(labels.row_id, labels.labels)) == {"BC2026_Train_0001_S05_20250227_010002_5": "22961 007",
                                                           "BC2026_Train_0001_S05_20250227_010002_60": "22961 007"}


def test_2026_goes_through_folds_and_cache_and_is_scored_by_its_own_metric(tmp_path, capsys):
    make_year(tmp_path / "source", "birdclef-2026")
    data = tmp_path / "out"
    assert prepare.main(["birdclef-2026", str(tmp_path / "source"), "--out", str(data)]) == 0
    assert folds.main(["--data", str(data), "--out", str(tmp_path / "f.csv"), "--n-folds", "2"]) == 0
    assert set(folds.read_folds(tmp_path / "f.csv").values()) <= {-1, 0, 1}
    assert cache.main(["--data", str(data), "--out", str(tmp_path / "cache"), "--workers", "1"]) == 0
    made = cache.Cache(tmp_path / "cache")
    assert len(made.names) == 5 and made.damaged == {"007/iNat0072.ogg": "missing file"}
    labels = data / "soundscape_labels.csv"
    pd.DataFrame({"row_id": read_csv(labels).row_id, "007": [0.3, 0.2], "22961": [0.6, 0.1]}).to_csv(tmp_path / "s.csv", index=False)
    capsys.readouterr()
    flags = ["--submission", str(tmp_path / "s.csv"), "--labels", str(labels), "--resamples", "2"]
    for name, first in (("birdclef-2023", "padded cmAP"), ("birdclef-2026", "macro ROC-AUC")):
        assert evaluate.main([*flags, "--competition", name]) == 0
        assert capsys.readouterr().out.splitlines()[1].strip().startswith(first)


@pytest.mark.parametrize("row", ["a_1.ogg,0,-5,x", ",0,5,x"])
def test_a_labelled_stretch_has_a_recording_and_an_end(tmp_path, row):
    (tmp_path / "labels.csv").write_text(f"filename,start,end,primary_label\na_1.ogg,0,00:00:05,x\n{row}\n")
    with pytest.raises(UserError, match="labels.csv, line 3: .* a stretch has a recording and ends behind its begin"):
        soundscape_labels(tmp_path / "labels.csv")


def test_without_links_the_audio_is_copied(tmp_path, monkeypatch):
    make_year(tmp_path / "source", "birdclef-2024")

    def refuse(*_, **__):
        raise OSError(1, "a privilege is missing")

    monkeypatch.setattr(os, "symlink", refuse)
    assert prepare.main(["birdclef-2024", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/train_audio").is_symlink() and len(list((tmp_path / "out/train_audio").rglob("*.ogg"))) == 5


def test_wrong_folders_are_refused(tmp_path, capsys):
    make_year(tmp_path / "source", "birdclef-2024")
    for name, source, out, message in (("birdclef-2025", "source", "x", "train.csv does not exist"), ("birdclef-2024", "none", "x", "is no folder"),
                                       ("birdclef-2024", "source", "source", "is the source itself")):
        assert prepare.main([name, str(tmp_path / source), "--out", str(tmp_path / out)]) == 1 and message in capsys.readouterr().err


def test_other_recordings_are_never_replaced(tmp_path, capsys):
    make_year(tmp_path / "source", "birdclef-2024")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train_metadata.csv").write_text("mine")
    flags = ["birdclef-2024", str(tmp_path / "source"), "--out"]
    assert prepare.main([*flags, str(tmp_path / "mine")]) == 1 and "name another --out" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [".lock", "train_metadata.csv"]
    (tmp_path / "mine/train_metadata.csv").rename(tmp_path / "mine/folds.csv")
    assert prepare.main([*flags, str(tmp_path / "mine")]) == 1 and "folds.csv is there already" in capsys.readouterr().err
    assert prepare.main([*flags, str(tmp_path / "out")]) == 0 == prepare.main([*flags, str(tmp_path / "out")])
    (tmp_path / "file").touch()
    assert prepare.main([*flags, str(tmp_path / "file")]) == 1 and "cannot use" in capsys.readouterr().err


def test_a_recipe_of_one_s_own_is_kept(tmp_path, capsys):
    make_year(tmp_path / "source", "birdclef-2024")
    (tmp_path / "out").mkdir()
    flags = ["birdclef-2024", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    assert prepare.main(flags) == 0
    (tmp_path / "out/train.yaml").write_text("epochs: 7\n")
    assert prepare.main(flags) == 0 and "train.yaml is kept" in capsys.readouterr().out
    assert (tmp_path / "out/train.yaml").read_text() == "epochs: 7\n"


def test_esc10_keeps_its_folds_and_trains(tmp_path, capsys):
    source = tmp_path / "ESC-50-master"  # the repository's own table
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 4):
        for target, (category, in_ten) in enumerate((("dog", True), ("rain", True), ("cow", False))):
            name = f"{fold}-{target}-A-{target}.wav"
            rows.append(f"{name},{fold},{target},{category},{str(in_ten).upper() if fold == 1 else in_ten},{fold}{target},A")
            if name != "3-1-A-1.wav":
                make_soundscape(source / "audio" / name, 1.0, seed=target)
    (source / "meta").mkdir()
    (source / "meta/esc50.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "esc10"
    assert prepare.main(["esc10", str(source), "--out", str(out)]) == 0
    assert "1 of 6 recordings are not there" in capsys.readouterr().out
    assert cache.main(["--data", str(out), "--out", str(tmp_path / "cache")]) == 0
    folds = read_folds(out / "folds.csv")
    assert sorted(folds.values()) == [0, 0, 1, 1, 2, 2] and folds["2-1-A-1.wav"] == 1
    flags = ["--data", str(out), "--folds", str(out / "folds.csv"), "--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run")]
    assert train.main([*flags, "--model", "asca_test", "--input-side", "64", "--epochs", "1", "--fold", "0", "--threads", "1"]) == 0
    (source / "meta/esc50.csv").write_text("filename,fold,category\n" + "".join(f"{n}.wav,1,c{n}\n" for n in range(11)))
    assert prepare.main(["esc10", str(source), "--out", str(tmp_path / "x")]) == 1 and "no column esc10" in capsys.readouterr().err
    assert prepare.main(["esc50", str(tmp_path), "--out", str(tmp_path / "x")]) == 1 and "no copy of" in capsys.readouterr().err


def test_flags_and_recipes_beat_the_data_set_s(tmp_path):
    (tmp_path / "cache.yaml").write_text("window_seconds: 10.0\nfmax: 8000.0\n")
    (tmp_path / "mine.yaml").write_text("window_seconds: 5.0\n")  # the default, and meant

    def window(*flags):
        settings = parse(cache.CacheSettings, ["--data", str(tmp_path), *flags], prog="p", description="d", of_data="cache.yaml")
        return settings.audio.window_seconds, settings.audio.fmax

    assert window() == (10, 8000) and window("--window-seconds", "3") == (3, 8000)
    assert window("--config", str(tmp_path / "mine.yaml")) == (5, 8000)
    (tmp_path / "cache.yaml").write_text("window_secs: 10.0\n")
    with pytest.raises(UserError, match="cache.yaml: unknown setting"):
        window()


@pytest.mark.skipif(not ESC10.exists(), reason="the real ESC-10 is not here")
def test_the_real_esc10_is_balanced_over_its_folds(tmp_path):
    assert prepare.main(["esc10", str(ESC10), "--out", str(tmp_path / "out")]) == 0
    written = read_csv(tmp_path / "out/train_metadata.csv").assign(fold=list(read_folds(tmp_path / "out/folds.csv").values()))
    assert written.groupby(["fold", "primary_label"]).size().tolist() == [8] * 40 and not (tmp_path / "out/missing_audio.csv").exists()
