"""Tables for people, read back with pandas and by the formats' own rules."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from src import audio, detections, infer, species
from src.audio import CANNOT_OPEN, DamagedAudio
from src.console import UserError
from src.detections import Detection
from src.storage import read_journal
from tests.conftest import make_soundscape, raise_, waveform

RAVEN = ["Selection", "View", "Channel", "Begin File", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Common Name", "Score"]


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """A season's folder: two days, a file of the same name in each, other formats and rates, and a damaged one; a taxonomy beside it."""
    root = tmp_path_factory.mktemp("field")
    make_soundscape(root / "season/day 1/rec.ogg", 22.0)
    make_soundscape(root / "season/day 2/rec.ogg", 16.0, seed=1)
    soundfile.write(root / "season/=cmd.wav", waveform(11, 44_100), 44_100)
    soundfile.write(root / "season/day 2/x.flac", np.stack([waveform(7, 48_000)] * 2, axis=1), 48_000)
    soundfile.write(root / "season/day 2/y.mp3", waveform(8, 22_050), 22_050)
    (root / "season/zero.wav").write_bytes(b"")
    (root / "season/._rec.ogg").write_bytes(b"AppleDouble")
    (root / "taxonomy.csv").write_text("primary_label,scientific_name,common_name\ndemcuc1,Cuculus demo,Demo Cuckoo\ndemdov1,Columba demo,=Dove\ndemowl1,,\n")
    return root


def detect(run, field, out, *flags) -> int:
    return infer.main(["--run", str(run), "--soundscapes", str(field / "season"), "--recursive", "--out", str(out / "s.csv"), "--tables", str(out / "tables"),
                       "--threads", "1", "--expected-seconds", "10", "--threshold", "0.2", *flags])


def test_tables_are_what_raven_audacity_and_spreadsheets_read(tmp_path, run, field):
    flags = ["--format", "submission,raven", "audacity csv", "--pictures", str(tmp_path / "pictures")]
    assert detect(run, field, tmp_path, *flags) == 0
    before = files(tmp_path)
    assert detect(run, field, tmp_path, *flags) == 0 and files(tmp_path) == before  # a submission is made anew, to the same bytes
    rows = pd.read_csv(tmp_path / "s.csv", index_col="row_id")
    assert rows.index[rows.index.str.startswith("day ")].tolist()[:5] == [f"day 1/rec_{5 * k}" for k in range(1, 5)] + ["day 2/rec_5"]
    assert infer.main(["--check", str(tmp_path / "s.csv"), "--soundscapes", str(field / "season"), "--recursive", "--expected-seconds", "10"]) == 0
    tables = tmp_path / "tables"
    whole = pd.read_csv(tables / "all_detections.csv", keep_default_na=False)
    assert whole.columns.tolist() == ["file", "start_s", "end_s", "label", "scientific_name", "common_name", "probability"]
    assert set(whole.file) <= {"'=cmd.wav", "day 1/rec.ogg", "day 2/rec.ogg", "day 2/x.flac", "day 2/y.mp3"} and len(whole) > 3
    for name, file in (("=cmd", "'=cmd.wav"), ("day 1/rec", "rec.ogg"), ("day 2/x", "x.flac"), ("zero", "zero.wav")):
        selections = pd.read_csv(tables / f"{name}.raven.txt", sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
        labels = [line.split("\t") for line in (tables / f"{name}.audacity.txt").read_text().splitlines()]
        listed = pd.read_csv(tables / f"{name}.detections.csv", keep_default_na=False)
        assert selections.columns.tolist() == RAVEN and len(selections) == len(labels) == len(listed)
        assert selections.Selection.tolist() == list(range(1, len(selections) + 1)) and set(selections["Begin File"]) <= {file}
        numbers = listed[["start_s", "end_s", "probability"]].to_numpy(float)
        np.testing.assert_allclose(selections[["Begin Time (s)", "End Time (s)", "Score"]].to_numpy(float), numbers)
        np.testing.assert_allclose(np.array([line[:2] for line in labels], float).reshape(-1, 2), numbers[:, :2])
        assert [line[2].rpartition(" ")[0] for line in labels] == selections["Common Name"].tolist()
    assert whole.end_s.max() <= 20.0 and {"Demo Cuckoo", "'=Dove"} & set(whole.common_name)
    assert sorted(p.relative_to(tmp_path / "pictures").as_posix() for p in (tmp_path / "pictures").rglob("*.png")) == [
        "=cmd.png", "day 1/rec.png", "day 2/rec.png", "day 2/x.png", "day 2/y.png", "zero.png"]
    # every detection is its rows' highest probability, and no row above the threshold is missing
    for file, of_file in whole.groupby("file"):
        stem = file.lstrip("'").rpartition(".")[0]
        of_rows = rows[rows.index.str.fullmatch(rf"{stem}_\d+")]
        covered = pd.DataFrame(False, of_rows.index, of_rows.columns)
        for d in of_file.itertuples():
            stretch = slice(int(d.start_s // 5), int(np.ceil(d.end_s / 5)))
            assert d.probability == pytest.approx(of_rows[d.label].iloc[stretch].max(), abs=1e-4) and (of_rows[d.label].iloc[stretch] >= 0.2).all()
            covered.iloc[stretch, covered.columns.get_loc(d.label)] = True
        assert covered.equals(of_rows >= 0.2)


@given(st.data())
def test_neighbours_are_merged_and_unknown_rows_hold_nothing(data):
    n = data.draw(st.integers(1, 12))
    probability = np.array(data.draw(st.lists(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=2, max_size=2), min_size=n, max_size=n)))
    known = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    found = detections.find_detections(probability, known, ["a", "b"], np.array([0.5, 0.95]), 5.0 * n - 1)
    text = "".join("x" if known[k] and probability[k, 0] >= 0.5 else " " for k in range(n))
    assert [(d.start // 5, np.ceil(d.end / 5)) for d in found] == [(k, k + len(run)) for run, k in runs(text)] and {d.label for d in found} <= {"a"}


def runs(text: str) -> list[tuple[str, int]]:
    import re

    return [(m.group(), m.start()) for m in re.finditer("x+", text)]


def test_thresholds_species_and_names(tmp_path, field, capsys):
    names = species.read_names(None, field / "season")
    assert names["demcuc1"] == ("Cuculus demo", "Demo Cuckoo")
    classes = ["demcuc1", "demdov1", "demowl1"]

    def choose(thresholds=None, listed=None):
        for name, text in (("t.csv", thresholds), ("l.txt", listed)):
            (tmp_path / name).write_text(text or "")
        return species.choose_thresholds(classes, names, threshold=0.5, per_species=tmp_path / "t.csv" if thresholds else None,
                                            species=tmp_path / "l.txt" if listed else None).tolist()

    assert choose("primary_label,threshold\ndemdov1,0.8\nother,0.3\n") == [0.5, 0.8, 0.5] and "passed over: other" in capsys.readouterr().out
    assert choose(None, "demo cuckoo\n\nCuculus demo_Demo Cuckoo\ndemowl1\nRara avis\n") == [0.5, np.inf, 0.5]
    assert "1 line(s)" in capsys.readouterr().out
    names["demowl1"] = ("Cuculus demo", "Another")
    assert choose(None, "cuculus demo\n") == [0.5, np.inf, 0.5]  # of a name that two labels share, both
    for bad, message in (("primary_label,threshold\ndemdov1,x\n", "row 2: threshold 'x'"), ("label,t\na,1\n", "needs the columns")):
        with pytest.raises(UserError, match=message):
            choose(bad)
    with pytest.raises(UserError, match="none of the models' species"):
        choose(None, "Rara avis\n")
    table = tmp_path / "taxonomy.csv"
    table.write_text("SCIENTIFIC_NAME,COMMON_NAME,SPECIES_CODE\nCuculus demo,Demo Cuckoo,demcuc1\n")  # as eBird's web service writes it
    assert species.read_names(table, tmp_path) == {"demcuc1": ("Cuculus demo", "Demo Cuckoo")}
    table.write_text("SPECIES_CODE,FAMILY\ndemcuc1,Cuculidae\n")
    assert species.read_names(None, tmp_path / "season") == {} and "taxonomy.csv is passed over" in capsys.readouterr().out
    with pytest.raises(UserError, match="lacks a species' code or its names"):
        species.read_names(table, tmp_path)


def test_cells_are_no_formulas_and_break_no_table():
    found, names = [Detection(0, 5, "a\tb\nc", 0.5)], {"a\tb\nc": ("@x", "-y")}
    line = detections.raven(found, "+dir/=f.wav", names, (20, 16_000)).splitlines()[1].split("\t")
    assert line == ["1", "Spectrogram 1", "1", "'=f.wav", "0.000", "5.000", "20", "16000", "'-y", "0.5000"]
    row = next(csv.DictReader(detections.table(found, "+dir/=f.wav", names).splitlines()))
    assert (row["file"], row["label"], row["scientific_name"], row["start_s"]) == ("'+dir/=f.wav", "a b c", "'@x", "0.000")
    assert detections.audacity(found, {}) == "0.000000\t5.000000\ta b c 0.50\n"


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_an_interrupted_folder_is_continued_with_the_same_bytes(tmp_path, run, field, capsys):
    flags = ["--format", "raven", "csv"]
    assert detect(run, field, tmp_path / "whole", *flags) == 0
    expected = files(tmp_path / "whole/tables")
    code = ("import os, sys\nfrom src import detections, infer\nadd = detections.DetectionTables.add\n"
            "def once(self, *rest):\n    add(self, *rest)\n    os.kill(os.getpid(), 9)\n"
            "detections.DetectionTables.add = once\ninfer.main(sys.argv[1:])")
    out = tmp_path / "cut"
    command = ["--run", str(run), "--soundscapes", str(field / "season"), "--recursive", "--out", str(out / "s.csv"), "--tables", str(out / "tables"),
               "--threads", "1", "--expected-seconds", "10", "--threshold", "0.2", *flags]
    assert subprocess.run([sys.executable, "-c", code, *command]).returncode == -9
    journal = out / "tables/done.jsonl"
    assert len(journal.read_text().splitlines()) == 2 and (out / "tables/=cmd.raven.txt").exists() and not (out / "tables/all_detections.csv").exists()
    journal.write_text(journal.read_text() + '{"file": "torn\n{"file": "torn')
    capsys.readouterr()
    assert infer.main(command) == 0
    text = capsys.readouterr().out
    assert "1 of 6 recordings are done" in text and "their missing stretches hold no detection" in text
    assert files(out / "tables") == expected and not (out / "s.csv").exists()
    assert infer.main(command) == 0 and "6 of 6 recordings are done" in capsys.readouterr().out and files(out / "tables") == expected
    csv = next((out / "tables").rglob("*.detections.csv"))
    ours = csv.read_bytes()
    for theirs in (ours.replace(b",", b";"), b"\xff\xfe" + ours):  # as spreadsheets save it
        csv.write_bytes(theirs)
        assert infer.main(command) == 1 and f"{csv} was saved again by another program" in capsys.readouterr().err and csv.read_bytes() == theirs
    csv.write_bytes(ours)
    assert infer.main([*command, "--hop-seconds", "2.5"]) == 1 and "hop_seconds: 5.0 -> 2.5" in capsys.readouterr().err
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_bytes("".join(lines[:3]).encode() + b"\xff" + "".join(lines[3:]).encode())  # one record is damaged, the settings are not
    assert infer.main([*command, "--hop-seconds", "2.5"]) == 1 and "hop_seconds: 5.0 -> 2.5" in capsys.readouterr().err
    assert infer.main([*command, "--soundscapes", str(field / "season/day 1")]) == 1 and "day 1" in capsys.readouterr().err
    assert infer.main(command) == 0 and "5 of 6 recordings are done" in capsys.readouterr().out and sorted(files(out / "tables")) == sorted(expected)
    assert infer.main([*command, "--hop-seconds", "2.5", "--restart", "--format", "raven"]) == 0
    assert read_journal(journal)[0]["hop_seconds"] == 2.5
    assert not list((out / "tables").rglob("*detections.csv")), "other settings' tables are gone"


def test_another_recording_of_the_same_name_size_and_time_is_not_done(tmp_path, run, capsys):
    card = tmp_path / "card"
    card.mkdir()
    soundfile.write(card / "a.wav", waveform(6), 32_000)
    flags = ["--run", str(run), "--soundscapes", str(card), "--tables", str(tmp_path / "t"), "--format", "csv", "--threshold", "0", "--threads", "1"]
    assert infer.main(flags) == 0
    before, facts = (tmp_path / "t/a.detections.csv").read_bytes(), (card / "a.wav").stat()
    soundfile.write(card / "a.wav", 0 * waveform(6), 32_000)
    os.utime(card / "a.wav", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (card / "a.wav").stat().st_size == facts.st_size and infer.main(flags) == 0
    assert "recordings are done" not in capsys.readouterr().out and (tmp_path / "t/a.detections.csv").read_bytes() != before


def test_what_an_earlier_card_held_stays_in_the_tables(tmp_path, run, capsys):
    """A folder that is filled from one memory card after the other, and one day is not mounted."""
    card, tables = tmp_path / "card", tmp_path / "t"
    (card / "$RECYCLE.BIN").mkdir(parents=True)
    for name in ("first.wav", "$RECYCLE.BIN/deleted.wav"):
        soundfile.write(card / name, waveform(6), 32_000)
    (card / "empty.wav").touch()
    flags = ["--run", str(run), "--soundscapes", str(card), "--recursive", "--tables", str(tables), "--format", "csv", "--threshold", "0", "--threads", "1"]
    assert infer.main(flags) == 0
    once, failures = pd.read_csv(tables / "all_detections.csv"), (tables / "failures.csv").read_text()
    assert set(once.file) == {"first.wav"} and "empty.wav" in failures, "deleted recordings are none"
    (card / "first.wav").rename(tmp_path / "first.wav")
    (card / "empty.wav").unlink()
    capsys.readouterr()
    assert infer.main(flags) == 0 and "2 recording(s) of earlier runs, empty.wav for one, are no longer in" in capsys.readouterr().out
    assert pd.read_csv(tables / "all_detections.csv").equals(once) and (tables / "failures.csv").read_text() == failures
    soundfile.write(card / "second.wav", waveform(6), 32_000)
    assert infer.main(flags) == 0 and list(dict.fromkeys(pd.read_csv(tables / "all_detections.csv").file)) == ["first.wav", "second.wav"]
    (tmp_path / "first.wav").rename(card / "first.wav")
    capsys.readouterr()
    assert infer.main(flags) == 0 and "2 of 2 recordings are done" in capsys.readouterr().out
    (card / "first.wav").unlink()
    assert infer.main([*flags, "--restart"]) == 0 and set(pd.read_csv(tables / "all_detections.csv").file) == {"second.wav"}
    assert not (tables / "first.detections.csv").exists()


def test_what_could_not_be_opened_is_tried_again(tmp_path, run, monkeypatch, capsys):
    soundfile.write(tmp_path / "in.wav", waveform(6), 32_000)
    (tmp_path / "card").mkdir()
    shutil.copy(tmp_path / "in.wav", tmp_path / "card/a.wav")
    flags = ["--run", str(run), "--soundscapes", str(tmp_path / "card"), "--tables", str(tmp_path / "t"), "--format", "csv", "--threads", "1"]
    denied = DamagedAudio(f"{CANNOT_OPEN}: Permission denied")
    with monkeypatch.context() as patched:
        patched.setattr(audio, "read_header", lambda path: raise_(denied))
        assert infer.main(flags) == 0 and "cannot be opened: Permission denied" in (tmp_path / "t/failures.csv").read_text()
    assert infer.main(flags) == 0 and not (tmp_path / "t/failures.csv").exists()
    assert infer.main(flags) == 0 and "1 of 1 recordings are done" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_costs_no_scored_row(tmp_path, run, capsys, monkeypatch):
    for name in "ab":
        make_soundscape(tmp_path / f"in/{name}.ogg", 6.0)
    flags = ["--run", str(run), "--soundscapes", str(tmp_path / "in"), "--out", str(tmp_path / "s.csv"), "--threads", "1"]
    assert infer.main(flags) == 0
    expected = pd.read_csv(tmp_path / "s.csv", index_col="row_id")
    with monkeypatch.context() as patched:
        patched.setattr(detections.DetectionTables, "add", lambda *rest: raise_(detections.UserError("no space")))
        assert infer.main([*flags, "--format", "submission", "csv"]) == 1 and "no space" in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "s.csv", index_col="row_id").loc["a_5"].equals(expected.loc["a_5"])
    (tmp_path / "in/b.ogg").rename(tmp_path / f"in/{'ö' * 120}.ogg")
    assert infer.main([*flags, "--format", "csv", "--restart"]) == 1 and "the name is too long" in capsys.readouterr().err


def test_files_of_other_kinds_are_told(tmp_path, run, capsys):
    make_soundscape(tmp_path / "in/a.ogg", 5.0)
    (tmp_path / "in/phone.M4A").write_bytes(b"x")
    assert infer.main(["--run", str(run), "--soundscapes", str(tmp_path / "in"), "--out", str(tmp_path / "s.csv"), "--threads", "1"]) == 0
    assert "1 file(s) of other kinds are passed over, phone.M4A" in capsys.readouterr().out


def test_bad_options_are_refused(tmp_path, run, field, capsys):
    assert infer.main(["--run", str(run), "--soundscapes", str(field / "season"), "--out", str(tmp_path / "s.csv"), "--threshold", "0.2"]) == 1
    assert "--threshold is for tables and pictures" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert detect(run, field, tmp_path, "--pictures", str(tmp_path / "file")) == 1 and "file cannot be made: File exists" in capsys.readouterr().err
    for flags, message in ((["--format", "xls"], "--format xls"), (["--threshold", "2"], "--threshold must be"), (["--competition", "birdclef"], "known are")):
        assert detect(run, field, tmp_path, *flags) == 1 and message in capsys.readouterr().err


def test_a_recording_that_disappears_costs_itself_alone(tmp_path, run, field, monkeypatch, capsys):
    season = shutil.copytree(field / "season", tmp_path / "season")
    add = detections.DetectionTables.add

    def unplugged(self, soundscape, *rest):
        if soundscape.name == "day 1/rec":
            soundscape.path.unlink()
            (season / "day 2/x.flac").unlink()
        add(self, soundscape, *rest)

    monkeypatch.setattr(detections.DetectionTables, "add", unplugged)
    flags = ["--run", str(run), "--soundscapes", str(season), "--recursive", "--tables", str(tmp_path / "tables"), "--format", "csv", "--threads", "1"]
    assert infer.main(flags) == 0 and (tmp_path / "tables/day 2/y.detections.csv").exists()
    failed = pd.read_csv(tmp_path / "tables/failures.csv")
    assert failed.set_index("filename").cause["day 2/x.flac"] == "missing file"
    monkeypatch.undo()
    for _ in range(2):  # back again, and never taken for done before
        shutil.copytree(field / "season", season, dirs_exist_ok=True)
        capsys.readouterr()
        assert infer.main(flags) == 0
    assert "6 of 6 recordings are done" in capsys.readouterr().out and "x.flac" not in (tmp_path / "tables/failures.csv").read_text()


def test_a_selection_ends_under_half_the_recording_s_rate(tmp_path, run):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/slow.wav", waveform(6, 8_000), 8_000)
    flags = ["--run", str(run), "--soundscapes", str(tmp_path / "in"), "--tables", str(tmp_path / "out"), "--format", "raven", "--threshold", "0"]
    assert infer.main([*flags, "--threads", "1"]) == 0
    table = pd.read_csv(tmp_path / "out/slow.raven.txt", sep="\t")
    assert len(table) and set(table["High Freq (Hz)"]) == {4000}


def test_a_console_of_an_old_code_page_ends_nothing(tmp_path, run):
    make_soundscape(tmp_path / "ünï 日本/x.ogg", 5.0)
    command = [sys.executable, "-m", "src.infer", "--run", str(run), "--soundscapes", str(tmp_path / "ünï 日本"), "--out", str(tmp_path / "s.csv")]
    done = subprocess.run([*command, "--threads", "1"], env={**os.environ, "PYTHONIOENCODING": "cp1252"}, stdout=subprocess.PIPE, text=True, encoding="cp1252")
    assert done.returncode == 0 and r"\u65e5\u672c" in done.stdout
