import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from src import folds, metadata
from src.console import UserError
from src.demo_data import write_audio
from src.folds import assign_folds, read_folds
from src.folds_audit import recordist_in_training
from src.metadata import read_metadata, targets, with_durations
from src.train import located
from src.train_settings import TrainSettings

REAL = Path(__file__).parents[2] / "shared/data/birdclef2023-meta"


def write(root: Path, rows: list[dict], **files: str) -> Path:
    full = [{"primary_label": "a", "secondary_labels": "[]", "author": "x", "filename": f"a/{n}.ogg"} | row for n, row in enumerate(rows)]
    pd.DataFrame(full).to_csv(root / "train_metadata.csv", index=False)
    for name, text in files.items():
        (root / f"{name}.csv").write_text(text)
    return root


@pytest.mark.parametrize(("row", "message"), [
    ({"filename": "../../etc/passwd"}, "row 3.*leaves the data folder"),
    ({"filename": "/etc/passwd"}, "row 3.*leaves the data folder"),
    ({"filename": "C:\\x.ogg"}, "leaves the data folder"),
    ({"filename": "a/0.ogg"}, "stands there twice"),
    ({"primary_label": ""}, "row 3: no primary_label"),
    ({"secondary_labels": "['b'"}, "row 3: secondary_labels .* is not a list"),
    ({"primary_label": " "}, "row 3: no primary_label"),
    ({"filename": "./"}, "leaves the data folder"),
    ({"filename": ""}, "row 3: no filename; is the table cut off"),
    ({"secondary_labels": "{[1]}"}, "is not a list"),
])
def test_bad_rows_are_refused_with_row_and_remedy(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_metadata([write(tmp_path, [{}, row])])


def test_missing_column_file_and_unknown_species_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_metadata([tmp_path])
    (tmp_path / "train_metadata.csv").write_text("primary_label,filename\na,x.ogg\n")
    with pytest.raises(UserError, match="secondary_labels, author"):
        read_metadata([tmp_path])
    (tmp_path / "train_metadata.csv").write_text("primary_label;secondary_labels;author;filename\na;[];x;x.ogg\n")
    with pytest.raises(UserError, match="not semicolons"):
        read_metadata([tmp_path])
    write(tmp_path, [{}], eBird_Taxonomy_v2021="SPECIES_CODE\nb\n")
    with pytest.raises(UserError, match="species a is not in eBird_Taxonomy_v2021.csv"):
        read_metadata([tmp_path])


def test_a_link_out_of_the_data_folder_is_refused_and_one_inside_is_not(tmp_path):
    (tmp_path / "train_audio/a").mkdir(parents=True)
    (tmp_path / "secret.ogg").write_text("")
    link = tmp_path / "train_audio/a/0.ogg"
    link.symlink_to(tmp_path / "secret.ogg")
    with pytest.raises(UserError, match="link out of the data folder"):
        read_metadata([write(tmp_path, [{}])])
    link.unlink()
    (tmp_path / "train_audio/a/real.ogg").write_text("")
    link.symlink_to(tmp_path / "train_audio/a/real.ogg")
    assert len(read_metadata([tmp_path]).table) == 1


def test_labels_that_look_like_numbers_stay_strings(tmp_path):
    labels = ["NA", "null", "1e5", "007", "12"]
    metadata = read_metadata([write(tmp_path, [{"primary_label": label} for label in labels])])
    assert metadata.table.primary_label.tolist() == labels and set(metadata.classes) == set(labels)


def test_classes_follow_the_sample_submission(tmp_path):
    write(tmp_path, [{"primary_label": "a"}, {"primary_label": "b"}], sample_submission="row_id,b,c,a\n")
    assert read_metadata([tmp_path]).classes == ("b", "c", "a")
    (tmp_path / "sample_submission.csv").write_text("row_id,b\n")
    with pytest.raises(UserError, match="no column of"):
        read_metadata([tmp_path])


def test_blanks_around_labels_make_no_species(tmp_path):
    read = read_metadata([write(tmp_path, [{"primary_label": "a "}, {"secondary_labels": "[' a']"}])])
    assert read.classes == ("a",) and read.table.secondary_labels[1] == ("a",)


def test_a_table_elsewhere_has_its_own_classes_and_says_so(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", [{"primary_label": "b"}])
    folder = write(tmp_path, [{}], sample_submission="row_id,a\n")
    assert read_metadata([folder], tmp_path / "other/train_metadata.csv").classes == ("b",) and "is not used" in capsys.readouterr().out
    assert read_metadata([folder]).classes == ("a",) and not capsys.readouterr().out


def test_rows_longer_than_the_header_are_refused(tmp_path):
    (tmp_path / "train_metadata.csv").write_text("filename,author,primary_label,secondary_labels\na.ogg,x,b,[],\n")
    with pytest.raises(UserError, match="more cells than its header"):
        read_metadata([tmp_path])


def test_targets_treat_secondary_labels_as_asked(tmp_path):
    table = read_metadata([write(tmp_path, [{"secondary_labels": "['b', 'zzz', 'a']"}, {"primary_label": "b"}])]).table
    expected = {"ignore": ([1, 0], [1, 1]), "mask": ([1, 0], [1, 0]), "soft": ([1, 0.5], [1, 1]), "hard": ([1, 1], [1, 1])}
    for kind, (target, weight) in expected.items():
        got = targets(table, ("a", "b"), kind)
        assert got[0][0].tolist() == target and got[1][0].tolist() == weight, kind


def test_further_folders_leave_out_copies_and_unknown_species(tmp_path, capsys):
    (tmp_path / "main").mkdir(), (tmp_path / "extra").mkdir()
    write(tmp_path / "main", [{"filename": "a/XC1.ogg"}, {"filename": "a/XC2.ogg"}, {"filename": "a/0001.wav"}])
    write(tmp_path / "extra", [{"filename": "other/XC1.ogg"}, {"filename": "a/XC9.ogg"}, {"primary_label": "new", "filename": "n/XC3.ogg"},
                               {"filename": "b/0001.wav"}, {"filename": "a/0001.wav"}])
    table = read_metadata([tmp_path / "main", tmp_path / "extra"]).table
    assert table.filename[table.is_extra].tolist() == ["a/XC9.ogg", "b/0001.wav"]  # a number is no archive's
    assert "1 of these copies, a/0001.wav for one, were known by their whole name alone" in capsys.readouterr().out
    assert table.copy_group.nunique() == len(table)


def test_a_further_folder_s_copy_of_another_name_is_told_by_its_duration_alone(tmp_path):
    for name, author, seconds in (("main", "A. B.", (3.21, 4.0)), ("extra", "A. B.", (3.21, 5.0)), ("others", "unknown", (4.0,))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [{"filename": f"a/{name}{k}.ogg", "author": author} for k in range(len(seconds))])
        for k, length in enumerate(seconds):
            write_audio(tmp_path / name / f"train_audio/a/{name}{k}.ogg", np.zeros(round(length * 32000), np.float32))
    table = read_metadata([tmp_path / "main", tmp_path / "extra", tmp_path / "others"]).table
    assert table.filename[table.is_extra].tolist() == ["a/extra1.ogg", "a/others0.ogg"]


def test_a_recordist_who_is_no_one_is_unknown(tmp_path):
    authors = ("unknown", "Anonymous", " N/A ", "", "nan", "Unknownson")
    table = read_metadata([write(tmp_path, [{"author": author, "duration_s": "3.3"} for author in authors])]).table
    assert table.author.tolist() == ["", "", "", "", "", "Unknownson"] and table.copy_group.nunique() == 6


def made_table(n: int = 300, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    species = rng.choice([f"s{k}" for k in range(12)], n, p=np.arange(1, 13) / 78)
    table = pd.DataFrame({"filename": [f"{k}.ogg" for k in range(n)], "primary_label": species,
                          "secondary_labels": [(rng.choice(species),) if rng.random() < 0.2 else () for _ in range(n)],
                          "author": rng.choice([f"p{k}" for k in range(60)] + [""], n), "copy_group": np.arange(n)})
    table.loc[[5, 9], "copy_group"] = 5
    copies = table.iloc[:6].assign(filename=[f"copy{k}" for k in range(6)], primary_label="copied", secondary_labels=[()] * 6, copy_group=n + 2)
    table = pd.concat([table, copies], ignore_index=True)  # one recording six times: a species that no fold may hold alone
    return pd.concat([table, table.iloc[:2].assign(filename=["r1", "r2"], primary_label="rare", copy_group=[n, n + 1])], ignore_index=True)


@pytest.mark.parametrize("strategy", ["multilabel", "author"])
def test_each_recording_has_one_side_and_copies_and_rare_species_theirs(strategy):
    table = made_table()
    of = assign_folds(table, strategy=strategy, n_folds=5, seed=0)
    assert set(of) == {-1, 0, 1, 2, 3, 4} and of[5] == of[9]
    assert (of[table.primary_label == "rare"] == -1).all()
    np.testing.assert_array_equal(of, assign_folds(table, strategy=strategy, n_folds=5, seed=0))
    assert (of != assign_folds(table, strategy=strategy, n_folds=5, seed=1)).any()
    for fold in range(5):  # every scored species is trained on
        assert set(table.primary_label[of == fold]) <= set(table.primary_label[of != fold])


def test_author_folds_keep_a_recordist_on_one_side():
    table = made_table()
    of = pd.Series(assign_folds(table, strategy="author", n_folds=5, seed=0))
    scored = (of >= 0) & (table.author != "")
    assert (of[scored].groupby(table.author[scored]).nunique() == 1).all()


def test_multilabel_folds_are_balanced():
    table = made_table()
    of = assign_folds(table, strategy="multilabel", n_folds=5, seed=0)
    counts = pd.crosstab(table.primary_label[of >= 0], of[of >= 0])
    assert np.abs(counts.to_numpy() - counts.sum(axis=1).to_numpy()[:, None] / 5).max() <= 3


def test_the_stage_repeats_its_bytes_and_refuses_to_replace_another_split(tmp_path, data, capsys):
    flags = ["--data", str(data), "--out", str(tmp_path / "f.csv"), "--n-folds", "3"]
    assert folds.main(flags) == 0
    first = (tmp_path / "f.csv").read_bytes()
    assert folds.main(flags) == 0 and (tmp_path / "f.csv").read_bytes() == first
    assert folds.main([*flags, "--seed", "7"]) == 1
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "f.csv").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"f.csv", "f.audit.md", "f.audit.png"}
    assert folds.main([*flags[:-1], "5", "--strategy", "author"]) == 1 and "only 3 recordists" in capsys.readouterr().err
    assert folds.main([*flags[:-1], "5", "--out", str(tmp_path / "g.csv")]) == 0 and "the audit lacks the strategy author" in capsys.readouterr().out
    (tmp_path / "bad.csv").write_text("filename,fold\nx,one\n")
    with pytest.raises(UserError, match="not a fold table"):
        read_folds(tmp_path / "bad.csv")


def test_folds_and_cache_are_named_after_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "input/birds"
    data.mkdir(parents=True)
    write(data, [{"primary_label": "ab"[number % 2], "author": str(number)} for number in range(12)])
    assert folds.main(["--data", "input/birds", "--n-folds", "3"]) == 0
    settings = located(TrainSettings(data=(Path("input/birds"),)))
    assert settings.folds == Path("folds/birds.csv") and settings.folds.exists() and settings.cache == Path("input/cache/birds")
    (data / "folds.csv").write_text("filename,fold\n")
    assert located(TrainSettings(data=(data,))).folds == data / "folds.csv"


def test_recordists_in_training_are_counted_as_by_hand():
    table, rng = made_table(), np.random.default_rng(3)
    fold = rng.integers(-2, 5, len(table))
    table["author"] = rng.choice([f"p{k}" for k in range(150)] + [""], len(table))
    expected = [author != "" and f >= 0 and any(other == author and g not in (f, -2) for other, g in zip(table.author, fold))
                for author, f in zip(table.author, fold)]
    assert recordist_in_training(table.author, fold).tolist() == expected and 0 < sum(expected) < (fold >= 0).sum()


def make_made(root: Path, rows: list[dict]) -> Path:
    root.mkdir()
    return write(root, rows)


def test_copies_are_found_where_some_recordings_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "read_header", lambda path: SimpleNamespace(seconds=3.5))
    data = make_made(tmp_path / "d", [{}] * 3)
    (data / "train_audio/a").mkdir(parents=True)
    for number in (1, 2):
        (data / f"train_audio/a/{number}.ogg").touch()
    table = with_durations(read_metadata([data]).table)
    assert table.copy_group[1] == table.copy_group[2] != table.copy_group[0] and np.isnan(table.duration_s[0])


def test_clips_cut_to_one_length_are_no_copies_wherever_the_length_stands(tmp_path):
    table = read_metadata([make_made(tmp_path / "d", [{"duration_s": "5.0"}] * 60)]).table
    assert table.copy_group.nunique() == 60


@pytest.mark.parametrize("strategy", ["multilabel", "author"])
def test_one_species_alone_is_split_evenly(tmp_path, strategy):
    rows = [{"author": f"author {number}"} for number in range(10)] + [{"primary_label": "b"}] * 3
    table = read_metadata([make_made(tmp_path / "d", rows)]).table
    of = assign_folds(table, strategy=strategy, n_folds=5, seed=0)
    assert np.bincount(of[:10]).tolist() == [2] * 5 and (of[10:] == -1).all()


def test_folds_that_would_hold_out_nothing_are_refused(tmp_path, capsys):
    flags = ["--data", str(make_made(tmp_path / "d", [{"primary_label": "abc"[k % 3]} for k in range(60)])), "--out"]
    assert folds.main([*flags, str(tmp_path / "f.csv"), "--n-folds", "60"]) == 1 and "nothing would be held out" in capsys.readouterr().err
    assert folds.main([*flags, str(tmp_path / "f.csv"), "--seed", "-1"]) == 1 and "--seed -1" in capsys.readouterr().err
    assert folds.main([*flags, str(tmp_path)]) == 1 and "is a folder" in capsys.readouterr().err
    (tmp_path / "f.csv").write_bytes(b"\xff")
    assert folds.main([*flags, str(tmp_path / "f.csv")]) == 1 and "another split" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.exists(), reason=f"the real BirdCLEF2023 metadata are not at {REAL}")
def test_the_committed_folds_are_those_of_the_real_metadata(tmp_path):
    flags = ["--data", str(REAL), "--metadata", str(REAL / "extra/train_metadata_with_durations.csv"), "--out", str(tmp_path / "f.csv")]
    assert folds.main(flags) == 0
    committed = Path(__file__).parents[1] / "folds/birdclef-2023.csv"
    assert (tmp_path / "f.csv").read_bytes() == committed.read_bytes()
    of = read_folds(committed)
    assert len(of) == 16_941 and json.dumps(sorted(set(of.values()))) == "[-1, 0, 1, 2, 3, 4]"
