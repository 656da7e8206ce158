"""STAGE 2: recordings -> input/cache/<name>/: every log-mel once, as uint8, so that any crop is one small read."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio
from .config import AudioConfig, differences
from .console import UserError, begin_worker, progress, resumable, say, usable_cores
from .metadata import read_csv, read_metadata
from .settings import parse
from .storage import journal_line, original_cell, owned, read_journal, safe_cell, sha256, sync_folder, write_json, write_table, write_text

DATA, INDEX, HEADER, DAMAGED, JOURNAL = "log_mels.u8", "index.csv", "cache.json", "damaged.csv", "journal.partial"
FORMAT = 2
QUEUED = 8  # recordings a worker


@dataclass(frozen=True)
class CacheSettings:
    data: tuple[Path, ...] = (Path("input/birdclef-2023"),)
    """Folders in BirdCLEF's layout."""
    out: Path | None = None
    """The cache's folder. By default input/cache/<name of the first data folder>."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns for the first folder."""
    workers: int = 0
    """Processes; 0: one a core."""
    restart: bool = False
    """Begin anew, also where the folder holds a cache of another recipe or of other recordings."""
    verify: bool = False
    """Only read everything back and compare it with its checksums."""
    audio: AudioConfig = field(default_factory=AudioConfig)


def cache_folder(data: Path) -> Path:
    """Where a data set's cache lies: named after its folder."""
    return Path("input/cache") / data.absolute().name


class Cache:
    """A finished cache, opened for reading. `read` is one pread, safe after fork and in threads.

    Data: time-major (frames, n_mels) uint8, one recording after the other in log_mels.u8; index.csv holds each
    one's first frame, frames and CRC-32; cache.json the recipe, the tables' and its own SHA-256, and the data file's size.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        header = _read_header(self.folder)
        if header is None:
            unfinished = (self.folder / JOURNAL).exists()
            raise UserError(f"{self.folder} holds no {'finished ' if unfinished else ''}cache; "
                            f"{'the same python -m src.cache command continues it' if unfinished else 'make it with python -m src.cache'}")
        self.config = AudioConfig.from_dict(header["audio"])
        for file, digest in ((INDEX, header["index_sha256"]), (DAMAGED, header["damaged_sha256"])):
            if not (self.folder / file).exists() or sha256(self.folder / file) != digest:
                raise UserError(f"{self.folder / file} is damaged (its SHA-256 differs); make it again with python -m src.cache --restart")
        size = (self.folder / DATA).stat().st_size if (self.folder / DATA).exists() else -1
        if size != header["data_bytes"]:
            raise UserError(f"{self.folder / DATA} has {size} bytes instead of {header['data_bytes']}; "
                            "make it again with python -m src.cache --restart")
        index = read_csv(self.folder / INDEX)
        self.names = index.filename.tolist()
        self._row = {name: row for row, name in enumerate(self.names)}
        self._first = index.first_frame.astype(np.int64).to_numpy()
        self._frames = index.frames.astype(np.int64).to_numpy()
        self._crc32 = index.crc32.astype(np.int64).to_numpy()
        damaged = read_csv(self.folder / DAMAGED)
        self.damaged = dict(zip(damaged.filename.map(original_cell), damaged.cause))
        self._file: int | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def __getstate__(self) -> dict:  # a spawned worker opens the file itself
        return {**self.__dict__, "_file": None}

    def n_frames(self, name: str) -> int:
        return int(self._frames[self._row[name]])

    def read(self, name: str, start: int = 0, n_frames: int | None = None) -> np.ndarray:
        """(n, n_mels) uint8: frames [start, start + n_frames) of a recording, fewer where it ends."""
        row = self._row[name]
        stop = self._frames[row] if n_frames is None else min(start + n_frames, self._frames[row])
        if self._file is None:
            self._file = os.open(self.folder / DATA, os.O_RDONLY)
        n_mels = self.config.n_mels
        data = os.pread(self._file, int(stop - start) * n_mels, int(self._first[row] + start) * n_mels)
        return np.frombuffer(data, np.uint8).reshape(-1, n_mels)

    def verify(self) -> list[str]:
        """Reads everything; the file names of the recordings whose bytes differ from their CRC-32."""
        return [name for row, name in enumerate(progress(self.names, what="verifying", unit="file"))
                if zlib.crc32(self.read(name)) != self._crc32[row]]


def _read_header(folder: Path) -> dict | None:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEADER} is damaged: {error}; make it again with python -m src.cache --restart") from error
    if not isinstance(header, dict) or header.get("format", FORMAT) == FORMAT and header.pop("sha256", None) != _digest(header):
        raise UserError(f"{folder / HEADER} is damaged (its SHA-256 differs); make it again with python -m src.cache --restart")
    if header["format"] != FORMAT:
        raise UserError(f"{folder} is a cache of format {header['format']}, this is {FORMAT}; make it again with python -m src.cache --restart")
    return header


def _digest(header: dict) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _encode(job: tuple[str, str, AudioConfig]) -> tuple[bytes, str, int, int]:
    """One recording: its uint8 log-mel as bytes and "", or b"" and the cause of its damage; its cells above and below
    the dB range. Runs in a worker."""
    name, path, config = job
    try:
        stream = audio.LogMelStream(config)
        blocks = [stream.push(block) for block in audio.read_blocks(path, config.sample_rate)] + [stream.finish()]
        above = sum(int(np.count_nonzero(block > config.db_max)) for block in blocks)
        below = sum(int(np.count_nonzero(block < config.db_min - config.db_step / 2)) for block in blocks)  # silence is db_min, to a float's rounding
        return b"".join(np.ascontiguousarray(audio.to_uint8(block, config).T).tobytes() for block in blocks), "", above, below
    except audio.DamagedAudio as error:
        return b"", str(error), 0, 0


def _encode_all(jobs: Sequence[tuple], workers: int) -> Iterator[tuple[bytes, str, int, int]]:
    """The jobs' results, in their order, from `workers` processes. Raises UserError where one of them dies."""
    if workers <= 1:
        yield from map(_encode, jobs)
        return
    pool, waiting = ProcessPoolExecutor(workers, initializer=begin_worker), deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_encode, job))
            if len(waiting) > QUEUED * workers:  # a slow disk, or one long recording, must not gather the rest in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, as the system does where memory runs out; what is cached is kept: "
                        "the same command with fewer --workers continues") from None
    finally:
        pool.shutdown(cancel_futures=True)


def build(table: pd.DataFrame, out: Path, config: AudioConfig, *, workers: int, restart: bool = False) -> Cache:
    """Writes the cache of the table's recordings (filename, path), or continues one that was interrupted.

    The data grow in log_mels.u8.partial in the table's order, one journal line a recording; the names under which
    a reader looks are given last. Raises UserError where the folder holds another recipe or other recordings.
    """
    with owned(out):
        plan = {"format": FORMAT, "audio": config.to_dict(), "recordings": len(table),
                "recordings_crc32": zlib.crc32("\n".join(table.filename).encode())}
        header = None if restart else _read_header(out)
        if header is not None:
            _refuse_differences(out, header, plan)
            cache = Cache(out)
            _refuse_newcomers(table, cache)
            say(f"{out} is complete: nothing to do")
            return cache
        partial = out / (DATA + ".partial")
        if restart:
            for name in (HEADER, INDEX, DAMAGED, DATA, JOURNAL):  # the header first: without it there is no cache
                (out / name).unlink(missing_ok=True)
        entries = _resume(out, plan, partial)
        if entries:
            say(f"continuing {out}: {len(entries)} of {len(table)} recordings are done")
        try:
            _grow(table, out, partial, entries, config, workers)
            _finish(out, partial, entries, plan)
            say(clipped_share(entries, config))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}; what is done is kept, the same command continues") from error
    return Cache(out)


def _refuse_differences(out: Path, old: dict, plan: dict) -> None:
    changed = differences({key: old.get(key) for key in plan}, plan)
    if changed:
        raise UserError(f"{out} holds another cache ({'; '.join(changed)}); name another --out, or begin anew with --restart")


def _refuse_newcomers(table: pd.DataFrame, cache: Cache) -> None:
    """Raises UserError for recordings that were not there, or could not be opened, and can be now: they would be left out for ever."""
    absent = [name for name, cause in cache.damaged.items() if cause == audio.MISSING or cause.startswith(audio.CANNOT_OPEN)]
    paths = table.set_index("filename").path.reindex(absent).dropna()
    there = [name for name, path in paths.items() if os.access(path, os.R_OK)]
    if there:
        raise UserError(f"{cache.folder} lacks {len(there)} recording(s) that could not be opened when it was made and can be now, {there[0]} for one; "
                        "take them in with --restart")


def _resume(out: Path, plan: dict, partial: Path) -> list[dict]:
    """The journal's entries whose data are whole; cuts the data file and the journal behind the last of them."""
    journal = out / JOURNAL
    parsed = list(itertools.takewhile(bool, read_journal(journal)))
    if parsed and not partial.exists() and (out / DATA).exists():  # it ended between the data's last name and the header
        os.replace(out / DATA, partial)
    if parsed and partial.exists():
        _refuse_differences(out, parsed[0], plan)
    else:
        parsed = [plan]
        partial.write_bytes(b"")
    entries, n_mels = [], plan["audio"]["n_mels"]
    with open(partial, "r+b") as data:
        for entry in parsed[1:]:
            if zlib.crc32(data.read(entry["frames"] * n_mels)) != entry["crc32"]:
                break
            entries.append(entry)
        data.truncate(sum(entry["frames"] for entry in entries) * n_mels)
    write_text(journal, "".join(map(journal_line, [plan, *entries])))
    return entries


def _grow(table: pd.DataFrame, out: Path, partial: Path, entries: list[dict], config: AudioConfig, workers: int) -> None:
    todo = table.iloc[len(entries) :]
    jobs = [(name, path, config) for name, path in zip(todo.filename, todo.path)]
    with open(partial, "ab") as data, open(out / JOURNAL, "a", encoding="utf-8") as journal:
        results = _encode_all(jobs, min(workers, len(jobs)))
        for (name, _, _), (log_mel, cause, above, below) in zip(jobs, progress(results, what="caching", total=len(jobs), unit="file")):
            entry = {"filename": name, "frames": len(log_mel) // config.n_mels, "crc32": zlib.crc32(log_mel), "cause": cause,
                     "above": above, "below": below}
            data.write(log_mel)
            data.flush()
            journal.write(journal_line(entry))
            journal.flush()
            entries.append(entry)
        os.fsync(data.fileno())


def _finish(out: Path, partial: Path, entries: list[dict], plan: dict) -> None:
    index = pd.DataFrame(entries)[["filename", "frames", "crc32", "cause"]]
    damaged = index[index.cause != ""]
    if len(damaged) == len(index):
        (out / JOURNAL).unlink()
        partial.unlink()
        raise UserError(f"none of the {len(index)} recordings could be read; the first, {damaged.filename.iloc[0]}: "
                        f"{damaged.cause.iloc[0]}. Is the audio below train_audio/?")
    index.insert(1, "first_frame", index.frames.cumsum() - index.frames)
    write_table(out / INDEX, index[index.cause == ""].drop(columns="cause"))
    write_table(out / DAMAGED, damaged[["filename", "cause"]].map(safe_cell))
    os.replace(partial, out / DATA)
    sync_folder(out)
    header = {**plan, "index_sha256": sha256(out / INDEX), "damaged_sha256": sha256(out / DAMAGED), "data_bytes": (out / DATA).stat().st_size}
    write_json(out / HEADER, header | {"sha256": _digest(header)})
    (out / JOURNAL).unlink()


def clipped_share(entries: list[dict], config: AudioConfig) -> str:
    """One line: how many of the recordings' cells the dB range cuts. The journal carries the counts over an interruption."""
    cells = max(1, sum(entry["frames"] for entry in entries) * config.n_mels)
    above, below = (sum(entry[side] for entry in entries) / cells for side in ("above", "below"))
    return f"clipped at the recipe's range: {above:.3%} of the cells above {config.db_max:+g} dB, {below:.3%} below {config.db_min:+g} dB"


@resumable
def main(argv: list[str] | None = None) -> int:
    settings = parse(CacheSettings, argv, prog="python -m src.cache", description=__doc__, of_data="cache.yaml")
    out = settings.out or cache_folder(settings.data[0])
    if settings.verify:
        cache = Cache(out)
        broken = cache.verify()
        for name in broken:
            say(f"damaged in {out}: {name}")
        say(f"{out}: {len(cache.names) - len(broken)} of {len(cache.names)} recordings are intact")
        return int(bool(broken))
    table = read_metadata(settings.data, settings.metadata).table
    workers = settings.workers or usable_cores()
    say(f"{len(table)} recordings with {workers} process(es); recipe: {settings.audio}")
    cache = build(table, out, settings.audio, workers=workers, restart=settings.restart)
    frames = sum(map(cache.n_frames, cache.names))
    say(f"{out} holds {len(cache.names)} recordings, {frames / settings.audio.frames_per_second / 3600:.2f} h, "
        f"{frames * settings.audio.n_mels / 1e6:.0f} MB; {len(cache.damaged)} damaged, listed in {out / DAMAGED}")
    for name, cause in list(cache.damaged.items())[:5]:
        say(f"  left out: {name}: {cause}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
