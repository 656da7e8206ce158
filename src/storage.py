"""Files that are whole or absent: atomic writing, one owner per folder, digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from .console import UserError

if TYPE_CHECKING:  # what installs the wheels on Kaggle needs no pandas
    import pandas as pd


FORMULA = tuple("=+-@\t\r")  # a spreadsheet runs a cell that begins so


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and takes the final name.

    On any failure, a full disk included, the final name is untouched and the temporary file is gone.
    The temporary name is fixed, so what a killed process left is overwritten by the next run.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it takes the final name, and what stood there is deleted afterwards.

    A link of that name is removed, but nothing that it leads to. On any failure what stood there stays.
    """
    path = Path(path)
    partial, old = (path.with_name(path.name + ending) for ending in (".partial", ".old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut (POSIX; elsewhere the rename alone has to do)."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # shared folders of virtual machines and some network mounts refuse it, and the file is there
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_table(path: Path | str, table: pd.DataFrame, float_format: str | None = None) -> None:
    """A CSV without the index, its lines ended alike on every system."""
    with atomic(path) as partial:
        table.to_csv(partial, index=False, float_format=float_format, lineterminator="\n")


def journal_line(record: dict) -> str:
    """A line of a journal: its CRC-32, and the record."""
    text = json.dumps(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def append_to_journal(path: Path, record: dict) -> None:
    """Raises UserError where it cannot be written, on a full disk for one."""
    try:
        with open(path, "a", encoding="utf-8") as journal:
            journal.write(journal_line(record))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_journal(path: Path) -> list[dict]:
    """What `journal_line` wrote there, an empty record for a damaged line, and nothing for a torn last one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    parts = [line.partition(b" ") for line in lines]
    return [json.loads(text) if crc == b"%08x" % zlib.crc32(text) else {} for crc, _, text in parts]


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def owned(folder: Path | str) -> Iterator[None]:
    """Holds `folder` for this process; a second process is refused while the first lives (the kernel frees the lock)."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = _acquired(Path(folder) / ".lock", f"{folder} is in use by another process; wait for it, or name another folder")
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def owned_file(path: Path) -> Iterator[None]:
    """The same for a file to be written, where the place knows locks; the lock beside it is deleted in the end."""
    lock = None
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks is no reason to write nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(path.with_name(f".{path.name}.lock"), f"{path} is in use by another process; wait for it, or name another file")
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # Windows keeps what is open
                Path(lock.lock_file).unlink()
            lock.release()


def _acquired(file: Path, taken: str) -> FileLock:
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(taken) from None
    return lock


def fold_folders(run: Path, *files: str) -> list[Path]:
    """A run's folds that hold any of these files, in the order of their numbers; a fold3_backup is none."""
    folds = [folder for folder in run.glob("fold*") if re.fullmatch(r"fold\d+", folder.name) and any((folder / file).exists() for file in files)]
    return sorted(folds, key=lambda folder: int(folder.name[4:]))


def safe_cell(text: str) -> str:
    """A text cell for a table that people open: a leading = + - @ would run as a formula in a spreadsheet."""
    return "'" + text if text[:1] in FORMULA else text


def original_cell(text: str) -> str:
    """What `safe_cell` was given."""
    return text[1:] if text[:1] == "'" and text[1:2] in FORMULA else text
