"""What the containers of sound say of themselves and libsndfile does not ask: Ogg's checksums, the lengths in WAV, AIFF, FLAC and MP3."""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

UNKNOWN_SIZES = (range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 0x100000000))  # in a WAV whose writer could not know its length: it was a pipe
WAV_JUNK = 2**18  # bytes behind a WAV's chunks that are passed over, 4 s at 32 kHz: recorders fill up their blocks
FLAC_CUT = 4  # a header that claims so many times the frames that there is room for is damaged; a file cut shorter is lost anyway


def ogg_fault(path: Path | str) -> str:
    """What is wrong with an Ogg file's pages (RFC 3533), which Vorbis decodes around in silence: a wrong checksum, a page lost, doubled or
    cut, no end of stream, another stream behind it. "" where nothing is, and for other formats."""
    next_page: dict[int, int] = {}  # of each logical stream, by serial number
    with open(path, "rb") as file:
        if file.read(4) != b"OggS":
            return ""
        file.seek(0)
        number, at_end, begun = 0, False, False
        while header := file.read(27):
            if header[:4] != b"OggS":
                return "" if at_end else f"damaged: no Ogg page follows page {number}"  # a tag behind the end is none of ours
            sizes = file.read(header[26]) if len(header) == 27 else b""
            body = file.read(sum(sizes))
            if len(header) < 27 or len(sizes) < header[26] or len(body) < sum(sizes):
                return "truncated: the last Ogg page is cut"
            flags, serial, sequence, checksum = struct.unpack("<5xB8xIII1x", header)
            if _ogg_crc(header[:22] + bytes(4) + header[26:] + sizes + body) != checksum:
                return f"damaged: the checksum of Ogg page {number + 1} is wrong"
            if flags & 2 and begun:  # streams side by side all begin ahead of the first page of sound
                return "chained: only the first of several streams decodes"
            if sequence != next_page.get(serial, sequence):
                return f"damaged: Ogg page {number + 1} is not the one that follows page {number}"
            next_page[serial], at_end, number, begun = sequence + 1, bool(flags & 4), number + 1, not flags & 2
    return "" if at_end else "truncated: the last Ogg page lacks the end-of-stream flag"


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """Ogg's CRC-32 is zlib's with every byte's bits in the other order, and nothing inverted at its begin and end."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def wav_fault(path: Path | str) -> str:
    """Whether a WAV's data chunk, an RF64 or an AIFF promises more than the file holds, or a WAV's less than follows it, which libsndfile
    passes over. "" where not, and for other formats."""
    with open(path, "rb") as file:
        riff = file.read(12)
        if riff[:4] == b"FORM" or riff[:4] == b"RF64":
            size = int.from_bytes(riff[4:8], "big") if riff[:4] == b"FORM" else int.from_bytes(file.read(16)[8:], "little")
            missing = 8 + size - os.path.getsize(path)
            return f"truncated: the header promises {missing} bytes more" if missing > 0 else ""
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            return ""
        while len(chunk := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", chunk)
            if name == b"data" and any(size in sizes for sizes in UNKNOWN_SIZES):
                return ""
            if name == b"data":
                missing = file.tell() + size - os.path.getsize(path)
                return f"truncated: the data chunk promises {missing} bytes more" if missing > 0 else _wav_shortage(file, size)
            file.seek(size + size % 2, os.SEEK_CUR)
    return ""


def _wav_shortage(file: BinaryIO, size: int) -> str:
    """Whether a file, read up to its data chunk's content of `size` bytes, goes on behind it with what are no chunks: more sound, where a recorder
    lost its power or a length over 4 GiB began anew from 0."""
    at, whole = file.tell() + size + size % 2, os.fstat(file.fileno()).st_size
    while at < whole:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        if not re.fullmatch(rb"[ -~]{4}", name) or at + 8 + length > whole:
            break
        at += 8 + length + length % 2
    return f"damaged: the data chunk counts {size} bytes, and {whole - at} more follow" if whole - at > WAV_JUNK else ""


def mp3_fault(path: Path | str) -> str:
    """Whether an MP3 lacks the frame that says how long it is, so that libsndfile guesses by the first bit rate and stops there.
    "" where not, and for other formats. What decodes may still be all, so `read_blocks` does not call it damaged."""
    with open(path, "rb") as file:
        while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:
            size = int.from_bytes(bytes(tag[6:]), "big")  # four times seven bits
            file.seek(sum((size >> 8 * place & 127) << 7 * place for place in range(4)) + (10 if tag[5] & 16 else 0), os.SEEK_CUR)
        first = tag + file.read(4096)
    is_mp3 = len(first) > 2 and first[0] == 0xFF and first[1] >= 0xE0
    return "MP3 without a length header: its end may be missing" if is_mp3 and not re.search(b"Xing|Info|VBRI", first) else ""


def flac_excess(path: Path | str) -> str:
    """Whether a FLAC's header counts far more samples than its bytes can hold. "" where not, and for other formats."""
    facts = _flac(path)
    if facts is None or not facts.least or facts.samples // facts.block * facts.least <= FLAC_CUT * facts.bytes:
        return ""
    return f"the header counts {facts.samples} samples in {facts.bytes} bytes of FLAC"


def flac_shortage(path: Path | str) -> str:
    """Whether a FLAC holds more frames than its header counts, which libsndfile passes over. "" where not, and for other formats."""
    facts = _flac(path)
    if facts is None or not facts.most or facts.bytes <= (math.ceil(facts.samples / facts.block) + 1) * facts.most:
        return ""
    return f"damaged: the header counts {facts.samples} samples, and more follow"


@dataclass(frozen=True)
class _Flac:
    block: int  # samples a frame, where all are alike
    least: int  # bytes of the smallest frame; 0: not known
    most: int
    samples: int
    bytes: int  # of all frames


def _flac(path: Path | str) -> _Flac | None:
    """STREAMINFO (RFC 9639); None for other formats, for frames of many lengths, and where it does not say how many samples follow."""
    with open(path, "rb") as file:
        if file.read(4) != b"fLaC":
            return None
        info, last = b"", False
        while not last and len(head := file.read(4)) == 4:
            last, size = bool(head[0] & 128), int.from_bytes(head[1:], "big")
            if head[0] & 127:
                file.seek(size, os.SEEK_CUR)
            else:
                info = file.read(size)
        n_bytes = os.path.getsize(path) - file.tell()
    shortest, longest, least, most = (int.from_bytes(info[first:end], "big") for first, end in ((0, 2), (2, 4), (4, 7), (7, 10)))
    samples = int.from_bytes(info[10:18], "big") & (1 << 36) - 1
    return _Flac(longest, least, most, samples, n_bytes) if 0 < shortest == longest and samples else None
