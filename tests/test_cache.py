"""STAGE 2: the cache holds the log-mels, survives what ends it, and refuses what differs."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from src import audio, cache
from src.cache import Cache
from src.console import UserError
from src.metadata import read_metadata
from tests.conftest import make_data, raise_


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_cache_holds_each_recording_s_log_mel(data, cached):
    opened = Cache(cached)
    table = read_metadata([data]).table
    assert opened.names == table.filename.tolist() and not opened.damaged and opened.verify() == []
    for name, path in zip(table.filename[:4], table.path):
        expected = audio.log_mel(audio.read_waveform(path, 32_000), opened.config)
        stored = opened.read(name).T * opened.config.db_step + opened.config.db_min
        assert np.abs(stored - expected.clip(-100, 20)).max() <= opened.config.db_step * 0.501
        np.testing.assert_array_equal(opened.read(name, 100, 50), opened.read(name)[100:150])


def test_damaged_recordings_are_listed_and_the_others_untouched(tmp_path, data, cached, capsys):
    make_data(tmp_path)
    broken = sorted((tmp_path / "train_audio").rglob("*.ogg"))[:3]
    broken[0].write_bytes(broken[0].read_bytes()[:-2000])
    broken[1].write_text("=cmd()")
    broken[2].unlink()
    assert cache.main(["--data", str(tmp_path), "--out", str(tmp_path / "c"), "--workers", "1"]) == 0
    damaged = Cache(tmp_path / "c").damaged
    assert len(damaged) == 3 and "truncated" in " ".join(damaged.values()) and "missing file" in damaged.values()
    whole = Cache(cached)
    for name in Cache(tmp_path / "c").names:
        np.testing.assert_array_equal(Cache(tmp_path / "c").read(name), whole.read(name))
    for path in (tmp_path / "train_audio").rglob("*.ogg"):
        path.unlink()
    assert cache.main(["--data", str(tmp_path), "--out", str(tmp_path / "none")]) == 1
    assert "none of the 18 recordings could be read" in capsys.readouterr().err


def test_killed_and_run_again_gives_the_same_cache(tmp_path):
    make_data(tmp_path, per_species=30)
    flags = ["--data", str(tmp_path), "--workers", "2"]
    assert cache.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    for kill in range(6):
        process = subprocess.Popen([sys.executable, "-m", "src.cache", *flags, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            size = (out / "log_mels.u8.partial").stat().st_size if (out / "log_mels.u8.partial").exists() else 0
            if size > 4_000_000 * (kill + 1):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        process.wait()
        if process.returncode == 0:
            break
        assert not (out / "cache.json").exists()
        until = time.monotonic() + 60
        while (left := [p for p in psutil.process_iter(["cmdline"]) if str(out) in (p.info["cmdline"] or [])]) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left, "a worker has outlived the stage"
    assert kill >= 1, "the cache was built before it could be killed"
    assert cache.main([*flags, "--out", str(out)]) == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_worker_that_the_system_kills_ends_the_stage_and_costs_nothing(tmp_path, data, cached, monkeypatch, capsys):
    flags, read_blocks, here = ["--data", str(data), "--out", str(tmp_path), "--workers", "2"], audio.read_blocks, os.getpid()
    last = sorted((data / "train_audio").rglob("*.ogg"))[-1]

    def killed(path, rate):
        if str(path) == str(last) and os.getpid() != here:
            time.sleep(0.5)  # until the others are done
            os.kill(os.getpid(), signal.SIGKILL)
        return read_blocks(path, rate)

    with monkeypatch.context() as patched:
        patched.setattr(audio, "read_blocks", killed)
        assert cache.main(flags) == 1 and "a worker process was killed" in capsys.readouterr().err
    assert cache.main(flags) == 0 and "continuing" in capsys.readouterr().out
    assert (tmp_path / "log_mels.u8").read_bytes() == (cached / "log_mels.u8").read_bytes()


def test_another_recipe_and_changed_bytes_are_refused(tmp_path, data, capsys):
    out = tmp_path / "c"
    flags = ["--data", str(data), "--out", str(out)]
    assert cache.main(flags) == 0 and cache.main([*flags, "--n-mels", "64"]) == 1
    assert "audio.n_mels: 128 -> 64" in capsys.readouterr().err
    with open(out / "log_mels.u8", "r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00")
    assert cache.main([*flags, "--verify"]) == 1 and "damaged in" in capsys.readouterr().out
    with open(out / "log_mels.u8", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="bytes instead of"):
        Cache(out)
    (out / "index.csv").write_text((out / "index.csv").read_text().replace("XC", "XD", 1))
    with pytest.raises(UserError, match="SHA-256 differs"):
        Cache(out)


def test_no_flipped_bit_of_the_tables_passes(tmp_path, data):
    out = tmp_path / "c"
    flags = ["--data", str(data), "--out", str(out), "--workers", "1"]
    assert cache.main(flags) == 0
    rng = np.random.default_rng(0)
    for name in ("cache.json", "index.csv", "damaged.csv"):
        whole = (out / name).read_bytes()
        for bit in rng.choice(8 * len(whole), 60, replace=False):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            (out / name).write_bytes(content)
            with pytest.raises(UserError, match="--restart"):
                Cache(out)
        (out / name).unlink()
        with pytest.raises(UserError):
            Cache(out)
        (out / name).write_bytes(whole)
    assert Cache(out).verify() == []


def test_a_flipped_bit_of_the_journal_costs_what_stands_behind_it_alone(tmp_path, data, cached, monkeypatch):
    flags, out = ["--data", str(data), "--out", str(tmp_path / "c"), "--workers", "1"], tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_finish", lambda *rest: raise_(KeyboardInterrupt()))
        assert cache.main(flags) == 130
    whole, data_bytes = (out / "journal.partial").read_bytes(), (out / "log_mels.u8.partial").read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 5, replace=False):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (out / "journal.partial").write_bytes(content)
        (out / "log_mels.u8.partial").write_bytes(data_bytes)
        assert cache.main(flags) == 0 and bytes_of(out) == bytes_of(cached)
        for path in out.iterdir():
            path.unlink()


def test_what_arrives_after_caching_is_not_left_out_in_silence(tmp_path, data, capsys):
    shutil.copytree(data / "train_audio", tmp_path / "train_audio")
    shutil.copy(data / "train_metadata.csv", tmp_path)
    late = sorted((tmp_path / "train_audio").rglob("*.ogg"))[3]
    content = late.read_bytes()
    late.unlink()
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "c"), "--workers", "1"]
    assert cache.main(flags) == 0 == cache.main(flags)
    late.write_bytes(content)
    capsys.readouterr()
    assert cache.main(flags) == 1
    assert f"lacks 1 recording(s) that could not be opened when it was made and can be now, {late.parent.name}" in capsys.readouterr().err
    assert cache.main([*flags, "--restart"]) == 0 and not Cache(tmp_path / "c").damaged


def test_the_data_s_own_recipe_is_there_before_flags_are_judged(tmp_path, data, capsys):
    shutil.copy(data / "train_metadata.csv", tmp_path)
    (tmp_path / "cache.yaml").write_text("fmax: 500.0\nwin_length: 200\n")
    flags = [f"--data={tmp_path}", "--sample-rate", "8000", "--n-fft", "512"]
    recipe = cache.parse(cache.CacheSettings, flags, prog="x", description="", of_data="cache.yaml").audio
    assert (recipe.sample_rate, recipe.fmax, recipe.win_length, recipe.n_fft) == (8000, 500.0, 200, 512)
    assert cache.main(["--data"]) == 1 and "--data names no folder" in capsys.readouterr().err
    for flags, message in ((["--n-mels", "0"], "at least one mel bin"), (["--window-seconds", "inf"], "finite"), (["--db-max", "nan"], "finite")):
        assert cache.main([f"--data={tmp_path}", *flags]) == 1 and message in capsys.readouterr().err
    for recipe, message in ((b"yes: 1\n", "unknown setting(s) True"), (b"workers: 3 # l\xe4rm\n", "not a readable YAML file"), (b'out: ""\n', "is empty")):
        (tmp_path / "own.yaml").write_bytes(recipe)
        assert cache.main([f"--data={tmp_path}", "--config", str(tmp_path / "own.yaml")]) == 1 and message in capsys.readouterr().err


def test_a_second_process_is_refused(tmp_path, data):
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from src.storage import owned\n"
                               f"with owned({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert cache.main(["--data", str(data), "--out", str(tmp_path)]) == 1
    finally:
        holder.kill()
        holder.wait()
    assert cache.main(["--data", str(data), "--out", str(tmp_path)]) == 0


def test_a_failure_while_the_header_is_written_loses_nothing(tmp_path, data, capsys, monkeypatch):
    flags = ["--data", str(data), "--out", str(tmp_path / "c"), "--workers", "1"]

    def full(*rest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_json", full)
        assert cache.main(flags) == 1 and "No space left on device; what is done is kept" in capsys.readouterr().err
    monkeypatch.setattr(cache, "_encode", lambda job: pytest.fail("it is encoded again"))
    assert cache.main(flags) == 0 and "18 of 18 recordings are done" in capsys.readouterr().out and len(Cache(tmp_path / "c").names) == 18


def test_the_share_of_clipped_cells_is_counted_also_over_an_interruption(tmp_path, data, capsys, monkeypatch):
    flags = ["--data", str(data), "--out", str(tmp_path / "c"), "--db-min", "-60", "--db-max", "-10", "--workers", "1"]
    encode, done = cache._encode, []

    def interrupted(job):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(job)
        return encode(job)

    monkeypatch.setattr(cache, "_encode", interrupted)
    assert cache.main(flags) == 130
    monkeypatch.undo()
    assert cache.main(flags) == 0
    config = Cache(tmp_path / "c").config
    cells = np.concatenate([audio.log_mel(audio.read_waveform(path, 32_000), config).ravel() for path in read_metadata([data]).table.path])
    above, below = (cells > -10).mean(), (cells < -60 - config.db_step / 2).mean()
    assert 0 < above < 0.5 and 0 < below < 1
    assert f"{above:.3%} of the cells above -10 dB, {below:.3%} below -60 dB\n" in capsys.readouterr().out
