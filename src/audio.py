"""An audio file -> waveform -> log-mel -> windows: the one front-end of cache, training and inference."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.sparse
import soundfile
import soxr
from numpy.lib.stride_tricks import sliding_window_view

from .config import AudioConfig
from .containers import flac_excess, flac_shortage, mp3_fault, ogg_fault, wav_fault

SUFFIXES = (".ogg", ".oga", ".opus", ".wav", ".flac", ".mp3", ".aif", ".aiff")
EPSILON = 1e-10  # added to the power: silence becomes -100 dB, not -inf
BLOCK_FRAMES = 125  # spectrogram frames computed at once: their arrays stay in a core's cache and on the heap, which halves the time
BLOCK_SECONDS = 2.0  # decoded at once: stays in the cache too
MAX_RATE = 2_000_000  # Hz; recorders of bats reach 500,000
UNKNOWN_LENGTH = 2**63 - 1  # samples, by libsndfile
MIN_BYTES_PER_SECOND = 8  # a header that claims more audio than this per byte of file is damaged
MISSING, CANNOT_OPEN = "missing file", "cannot be opened"  # no damage: another try may succeed


class DamagedAudio(Exception):
    """A file that does not decode to what its header promises; the text is the cause."""


@dataclass(frozen=True)
class Header:
    sample_rate: int  # Hz, of the file
    n_samples: int  # per channel, at the file's rate

    @property
    def seconds(self) -> float:
        return self.n_samples / self.sample_rate


def read_header(path: Path | str) -> Header:
    """The header's facts. Raises DamagedAudio where there is no readable, believable header."""
    try:
        with soundfile.SoundFile(path) as file:
            header = Header(file.samplerate, file.frames)
        size, excess = os.path.getsize(path), flac_excess(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        raise DamagedAudio(_cause(path, error)) from error
    if header.n_samples <= 0:
        raise DamagedAudio("no samples" if size < 1000 else f"the header counts no samples in {size} bytes: the file was not closed; "
                           "ffmpeg -i OLD NEW recovers what it holds")
    if header.n_samples == UNKNOWN_LENGTH:  # an encoder that wrote into a pipe
        raise DamagedAudio("the header does not say how long it is; ffmpeg -i OLD NEW.flac writes it anew")
    if not 1000 <= header.sample_rate <= MAX_RATE or header.seconds > size / MIN_BYTES_PER_SECOND + 1:
        raise DamagedAudio(f"header claims {header.seconds:.0f} s at {header.sample_rate} Hz in {size} bytes")
    if excess:
        raise DamagedAudio(excess)
    return header


def _cause(path: Path | str, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                return "empty file"
    except FileNotFoundError:
        return MISSING
    except OSError as failure:
        return f"{CANNOT_OPEN}: {failure.strerror}"
    return str(getattr(error, "error_string", error)).strip().rstrip(".") or type(error).__name__


def read_blocks(path: Path | str, sample_rate: int) -> Iterator[np.ndarray]:
    """Yields the file's waveform as float32 mono blocks at `sample_rate`, in bounded memory.

    Everything that decodes is yielded; then DamagedAudio is raised if the file raised, held fewer samples than
    its header says, or has Ogg pages or bytes of a WAV that are damaged or missing. Never decodes to int16: soundfile wraps Vorbis peaks over 1.0.
    """
    header = read_header(path)
    resample = None
    if header.sample_rate != sample_rate:
        resample = soxr.ResampleStream(header.sample_rate, sample_rate, 1, dtype="float32", quality="HQ")
    n_decoded, cause, skips_damage = 0, None, False
    try:
        with soundfile.SoundFile(path) as file:
            skips_damage = file.format in ("OGG", "MP3")
            while cause is None:
                block, error = _read(file, round(BLOCK_SECONDS * header.sample_rate))
                cause = None if error is None else _cause(path, error)
                n_decoded += len(block)
                if not len(block):
                    break
                yield _clean(block) if resample is None else resample.resample_chunk(_clean(block))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        cause = _cause(path, error)
    if resample is not None:
        yield resample.resample_chunk(np.zeros(0, np.float32), last=True)
    try:
        if cause is None and n_decoded < header.n_samples and not mp3_fault(path):  # without a length in an MP3 the header's is a guess
            cause = f"only {n_decoded} of {header.n_samples} samples decode"
            if skips_damage:  # these decoders go on behind a gap as if there were none
                cause += f"; times behind the damage are up to {(header.n_samples - n_decoded) / header.sample_rate:.1f} s early"
        cause = cause or ogg_fault(path) or wav_fault(path) or flac_shortage(path) or None
    except OSError as error:
        cause = cause or _cause(path, error)
    if cause:
        raise DamagedAudio(cause)


def _read(file: soundfile.SoundFile, n: int) -> tuple[np.ndarray, Exception | None]:
    """The next n samples (n, channels), fewer at the end; where the decoder raises, those ahead of the damage, and the error."""
    block = np.full((n, file.channels), np.nan, np.float32)
    try:
        return file.read(out=block), None
    except (soundfile.LibsndfileError, RuntimeError) as error:
        return block[: np.count_nonzero(~np.isnan(block[:, 0]))], error  # what was not decoded is still NaN


def _clean(block: np.ndarray) -> np.ndarray:
    """(n, channels) -> finite mono (n,): the channels' mean; NaN and infinity, which float WAVs can hold, become 0."""
    mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
    if not np.isfinite(np.dot(mono, mono)):
        mono = np.clip(np.nan_to_num(mono, nan=0.0, posinf=0.0, neginf=0.0), -1.0, 1.0)
    return mono


def read_waveform(path: Path | str, sample_rate: int) -> np.ndarray:
    """The whole file, (n_samples,) float32 mono at `sample_rate`. Raises DamagedAudio."""
    return np.concatenate(list(read_blocks(path, sample_rate)))


@lru_cache(maxsize=8)
def _window(config: AudioConfig) -> np.ndarray:
    """The periodic Hamming window, zero-padded on both sides to n_fft."""
    n = np.arange(config.win_length)
    window = np.zeros(config.n_fft, np.float32)
    left = (config.n_fft - config.win_length) // 2
    window[left : left + config.win_length] = 0.54 - 0.46 * np.cos(2 * np.pi * n / config.win_length)
    return window


@lru_cache(maxsize=8)
def _filterbank(config: AudioConfig) -> scipy.sparse.csr_matrix:
    """(n_mels, n_fft / 2 + 1) Slaney mel filters from librosa; sparse, since 1.5 % of it is not zero."""
    import librosa.filters  # here, since it takes a second to import

    return scipy.sparse.csr_matrix(
        librosa.filters.mel(sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
                            fmin=config.fmin, fmax=config.fmax))


def frames_to_log_mel(padded: np.ndarray, config: AudioConfig) -> np.ndarray:
    """(n_samples,) -> (n_mels, n_frames) float32 dB; frame t covers samples [t hop, t hop + n_fft) of `padded`."""
    frames = sliding_window_view(padded, config.n_fft)[:: config.hop_length]
    log_mel = np.empty((config.n_mels, len(frames)), np.float32)
    for start in range(0, len(frames), BLOCK_FRAMES):
        block = frames[start : start + BLOCK_FRAMES] * _window(config)  # (<= BLOCK_FRAMES, n_fft)
        power = np.abs(scipy.fft.rfft(block, axis=-1)) ** 2  # (<= BLOCK_FRAMES, n_fft / 2 + 1), complex64 -> float32
        log_mel[:, start : start + BLOCK_FRAMES] = _filterbank(config) @ power.T
    log_mel += EPSILON
    np.log(log_mel, out=log_mel)  # numpy's log10 takes four times as long
    log_mel *= 10 / math.log(10)
    return log_mel


class LogMelStream:
    """Waveform blocks -> log-mel blocks (n_mels, n): together `log_mel` of the whole waveform, in bounded memory."""

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self._rest = np.zeros(config.n_fft // 2, np.float32)  # centred frames: half an n_fft of zeros on either side

    def push(self, block: np.ndarray) -> np.ndarray:
        """The frames that the block completes, (n_mels, n), n >= 0."""
        rest = np.concatenate([self._rest, block])
        if len(rest) < self.config.n_fft:
            self._rest = rest
            return np.empty((self.config.n_mels, 0), np.float32)
        frames = frames_to_log_mel(rest, self.config)
        self._rest = rest[frames.shape[1] * self.config.hop_length :]
        return frames

    def finish(self) -> np.ndarray:
        """The last frames, once no more blocks come."""
        return self.push(np.zeros(self.config.n_fft // 2, np.float32))


def log_mel(waveform: np.ndarray, config: AudioConfig) -> np.ndarray:
    """(n_samples,) float32 -> (n_mels, 1 + n_samples // hop_length) float32 dB, as librosa's melspectrogram
    (centred, zero padding, power 2, Slaney scale and norm) in 10 log10(x + 1e-10)."""
    stream = LogMelStream(config)
    return np.concatenate([stream.push(waveform), stream.finish()], axis=1)


def read_stretch(path: Path | str, start: int, stop: int, config: AudioConfig) -> np.ndarray:
    """Samples [start, stop) of the recording at the recipe's rate, by seeking; cut where the recording ends.

    At another rate the stretch is read with 0.1 s of context and from a sample that both rates share, so that
    it equals the resampled whole to within the resampler's ripple. Raises DamagedAudio.
    """
    try:
        with soundfile.SoundFile(path) as file:
            common = math.gcd(file.samplerate, config.sample_rate)
            up, down = config.sample_rate // common, file.samplerate // common
            context = 0 if up == down else math.ceil(0.1 * common)
            first = max(0, start // up - context)  # counted in shared samples: `down` of the file's, `up` of ours
            file.seek(min(first * down, file.frames))
            n_wanted = (math.ceil(stop / up) + context - first) * down if context else stop - start
            block = _clean(file.read(n_wanted, dtype="float32", always_2d=True))
            if context:
                block = soxr.resample(block, file.samplerate, config.sample_rate, quality="HQ")
                block = block[start - first * up :]
            return block[: stop - start]
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise DamagedAudio(_cause(path, error)) from error


def to_uint8(spectrogram: np.ndarray, config: AudioConfig) -> np.ndarray:
    """dB -> the cache's uint8 scale over [db_min, db_max]."""
    scaled = (spectrogram - config.db_min) * (1 / config.db_step)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
