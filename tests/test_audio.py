import struct

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from src import audio, containers
from src.config import AudioConfig
from src.console import UserError
from tests.conftest import waveform

CONFIG = AudioConfig()


def oracle(sound: np.ndarray, config: AudioConfig = CONFIG) -> np.ndarray:
    power = librosa.feature.melspectrogram(
        y=sound, sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.win_length, window="hamming",
        n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, pad_mode="constant")
    return 10 * np.log10(power + 1e-10)


@pytest.mark.parametrize("config", [CONFIG, AudioConfig(n_fft=2048, win_length=2048, hop_length=512, n_mels=64, fmin=50, fmax=14_000)])
@pytest.mark.parametrize("seconds", [0.01, 0.999, 7.3])
def test_log_mel_equals_librosa(seconds, config):
    sound = waveform(seconds)
    ours = audio.log_mel(sound, config)
    assert ours.shape == (config.n_mels, 1 + len(sound) // config.hop_length) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, oracle(sound, config), atol=2e-3)


@given(cuts=st.lists(st.integers(0, 96_000), max_size=6))
@settings(deadline=None, max_examples=25)
def test_streamed_blocks_of_any_size_give_the_whole(cuts):
    sound = waveform(3)
    stream = audio.LogMelStream(CONFIG)
    blocks = [stream.push(block) for block in np.split(sound, sorted(cuts))] + [stream.finish()]
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), audio.log_mel(sound, CONFIG), atol=1e-4)


@pytest.mark.parametrize("sound", [np.zeros(32_000), np.ones(32_000), np.sign(np.sin(np.arange(32_000)))])
def test_silence_dc_and_clipping_stay_finite_and_in_range(sound):
    log_mel = audio.log_mel(sound.astype(np.float32), CONFIG)
    assert np.isfinite(log_mel).all() and log_mel.min() >= CONFIG.db_min - 1e-3


def test_silence_is_the_cache_s_zero():
    assert audio.to_uint8(audio.log_mel(np.zeros(32_000, np.float32), CONFIG), CONFIG).max() == 0


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_other_rates_and_stereo_are_resampled_and_mixed_down(tmp_path, rate):
    sound = waveform(4, rate)
    soundfile.write(tmp_path / "x.wav", np.stack([sound, 0.5 * sound], axis=1), rate, subtype="FLOAT")
    ours = audio.read_waveform(tmp_path / "x.wav", 32_000)
    expected = librosa.resample(0.75 * sound, orig_sr=rate, target_sr=32_000, res_type="soxr_hq")
    assert abs(len(ours) - len(expected)) <= 1
    n = min(len(ours), len(expected))
    assert np.abs(ours[:n] - expected[:n]).max() < 1e-3


@pytest.mark.parametrize("rate", [32_000, 44_100, 22_050])
@pytest.mark.parametrize(("start", "stop"), [(0, 500), (12_345, 60_001), (100_000, 900_000)])
def test_a_stretch_read_by_seeking_is_the_whole_s(tmp_path, rate, start, stop):
    soundfile.write(tmp_path / "x.ogg", waveform(4, rate), rate)
    whole = audio.read_waveform(tmp_path / "x.ogg", 32_000)
    stretch = audio.read_stretch(tmp_path / "x.ogg", start, stop, CONFIG)
    assert abs(len(stretch) - len(whole[start:stop])) <= 2
    n = min(len(stretch), len(whole[start:stop]))
    assert np.abs(stretch[:n] - whole[start:stop][:n]).max() < 1e-3


def test_nan_in_a_float_wav_becomes_finite(tmp_path):
    sound = waveform(2)
    sound[1000:2000] = np.nan
    sound[3000] = np.inf
    soundfile.write(tmp_path / "x.wav", sound, 32_000, subtype="FLOAT")
    assert np.isfinite(audio.log_mel(audio.read_waveform(tmp_path / "x.wav", 32_000), CONFIG)).all()


def test_damage_is_found_and_named(tmp_path):
    soundfile.write(tmp_path / "good.ogg", waveform(10), 32_000)
    whole = (tmp_path / "good.ogg").read_bytes()
    cases = {"empty": b"", "text": b"this is no audio", "cut": whole[: len(whole) // 2], "header": whole[:100], "html": b"<html></html>" * 50}
    for name, content in cases.items():
        path = tmp_path / f"{name}.ogg"
        path.write_bytes(content)
        with pytest.raises(audio.DamagedAudio) as error:
            audio.read_waveform(path, 32_000)
        assert str(error.value), name
    with pytest.raises(audio.DamagedAudio, match="missing"):
        audio.read_waveform(tmp_path / "none.ogg", 32_000)
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, np.float32), 32_000)
    with pytest.raises(audio.DamagedAudio, match="no samples"):
        audio.read_waveform(tmp_path / "zero.wav", 32_000)
    (tmp_path / "open.wav").write_bytes(riff(data_bytes=0) + bytes(64_000))  # the recorder's battery was empty
    with pytest.raises(audio.DamagedAudio, match="64044 bytes: the file was not closed"):
        audio.read_waveform(tmp_path / "open.wav", 32_000)
    assert len(audio.read_waveform(tmp_path / "good.ogg", 32_000)) == 320_000


def test_sound_behind_a_wav_s_data_chunk_is_told_and_other_chunks_are_not(tmp_path):
    path, second = tmp_path / "a.wav", bytes(64_000)
    chunk = struct.pack("<4sI", b"guan", 1_000_001) + bytes(1_000_002)
    for behind, fault in ((b"", ""), (bytes(200_000), ""), (chunk + bytes(1000), ""), (second * 50, "counts 64000 bytes, and 3200000 more follow"),
                          (chunk + second * 5, "and 320000 more follow")):
        path.write_bytes(riff(data_bytes=64_000) + second + behind)
        assert fault in containers.wav_fault(path) and bool(fault) == bool(containers.wav_fault(path))
    path.write_bytes(riff(data_bytes=64_000)[:-4] + b"\xff" * 4 + second * 50)  # of a pipe: all of it is read
    assert len(audio.read_waveform(path, 32_000)) == 1_600_000


def riff(*, rate: int = 32_000, data_bytes: int) -> bytes:
    """The 44 bytes ahead of a WAV's 16-bit mono samples."""
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + data_bytes, b"WAVE", b"fmt ", 16, 1, 1, rate, min(2 * rate, 2**32 - 1), 2, 16, b"data", data_bytes)


@pytest.mark.parametrize("bit", range(32))
def test_no_flipped_bit_of_a_wav_s_rate_takes_the_memory(tmp_path, bit):
    path = tmp_path / "a.wav"
    path.write_bytes(riff(rate=48_000 ^ 1 << bit, data_bytes=96_000) + bytes(96_000))
    try:
        assert 1000 <= audio.read_header(path).sample_rate <= 2_000_000
    except audio.DamagedAudio:
        assert not 1000 <= 48_000 ^ 1 << bit <= 2_000_000


@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_an_ogg_file_is_found(tmp_path_factory, where, bit):
    path = tmp_path_factory.mktemp("ogg") / "a.ogg"
    soundfile.write(path, waveform(2.0), 32_000, format="OGG", subtype="VORBIS")
    assert containers.ogg_fault(path) == ""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(audio.DamagedAudio):
        audio.read_waveform(path, 32_000)


def test_what_decodes_of_a_truncated_file_is_still_yielded(tmp_path):
    soundfile.write(tmp_path / "x.ogg", waveform(20), 32_000)
    content = (tmp_path / "x.ogg").read_bytes()
    (tmp_path / "x.ogg").write_bytes(content[: len(content) * 2 // 3])
    seconds = 0.0
    with pytest.raises(audio.DamagedAudio):
        for block in audio.read_blocks(tmp_path / "x.ogg", 32_000):
            seconds += len(block) / 32_000
    assert 5 < seconds < 19


def decoded(path) -> tuple[float, str]:
    """Seconds that are yielded, and what is said to be wrong."""
    seconds = 0.0
    try:
        for block in audio.read_blocks(path, 32_000):
            seconds += len(block) / 32_000
    except audio.DamagedAudio as error:
        return seconds, str(error)
    return seconds, ""


def test_the_samples_ahead_of_a_decoder_s_error_are_kept(tmp_path):
    soundfile.write(tmp_path / "x.flac", waveform(30), 32_000)
    content = (tmp_path / "x.flac").read_bytes()
    (tmp_path / "x.flac").write_bytes(content[: len(content) // 2])
    seconds, cause = decoded(tmp_path / "x.flac")
    assert 14.5 < seconds < 16 and cause, "not only whole blocks of two seconds"


def test_a_truncated_wav_is_named_and_one_from_a_pipe_is_not(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, waveform(2), 32_000, subtype="PCM_16")
    whole = path.read_bytes()
    place = whole.index(b"data") + 4
    path.write_bytes(whole[:-64_000])
    assert decoded(path) == (1.0, "truncated: the data chunk promises 64000 bytes more")
    sizes = [b"\xff" * 4, b"\0\xf0\xff\x7f"]  # as ffmpeg and as SoX write it where they cannot go back
    for content in (whole, whole + b"LIST\x04\0\0\0tags", *(whole[:place] + size + whole[place + 4 :] for size in sizes)):
        path.write_bytes(content)
        assert decoded(path) == (2.0, "")
    for kind in ("RF64", "AIFF", "FLAC"):
        soundfile.write(path, waveform(2), 32_000, format=kind)
        assert decoded(path) == (2.0, "")
        path.write_bytes(path.read_bytes()[:-64_000])
        seconds, cause = decoded(path)
        assert 0.5 < seconds < 1.1 and (cause if kind == "FLAC" else cause == "truncated: the header promises 64000 bytes more"), kind


def test_a_flac_s_length_is_believed_as_far_as_its_frames_have_room(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, waveform(60), 32_000)
    whole = path.read_bytes()
    verdicts = {}
    for bit in range(36):  # of STREAMINFO's total
        content = bytearray(whole)
        content[8 + 17 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        claimed = 60 * 32_000 ^ 1 << bit
        try:
            audio.read_header(path)
            verdicts[claimed / 32_000] = decoded(path)[1]
        except audio.DamagedAudio as error:
            assert claimed > 200 * 32_000 and f"counts {claimed} samples" in str(error) or "header claims" in str(error)
    path.write_bytes(whole[:21] + bytes([whole[21] & 0xF0]) + bytes(4) + whole[26:])  # as an encoder leaves it that writes into a pipe
    with pytest.raises(audio.DamagedAudio, match="does not say how long it is; ffmpeg"):
        audio.read_header(path)
    assert max(verdicts) < 400, "no header of hours for a minute of sound"
    assert all(cause for seconds, cause in verdicts.items() if seconds < 50 or seconds > 60)


def test_a_chained_ogg_file_is_named_and_streams_side_by_side_are_not(tmp_path):
    for name, seconds in (("a", 30), ("b", 5)):
        soundfile.write(tmp_path / f"{name}.ogg", waveform(seconds), 32_000)
    first, second = ((tmp_path / f"{name}.ogg").read_bytes() for name in "ab")
    (tmp_path / "c.ogg").write_bytes(first + second)
    assert decoded(tmp_path / "c.ogg") == (30.0, "chained: only the first of several streams decodes")
    begin = 28 + second[27]  # the first page: a header of 27 bytes, one size, so many bytes
    (tmp_path / "d.ogg").write_bytes(second[:begin] + first + second[begin:])
    assert containers.ogg_fault(tmp_path / "d.ogg") == ""


def test_times_behind_lost_data_are_said_to_be_early(tmp_path):
    for name in ("x.ogg", "x.mp3", "x.flac"):
        soundfile.write(tmp_path / name, waveform(20), 32_000)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2] + content[len(content) * 6 // 10 :])
        seconds, cause = decoded(tmp_path / name)
        assert name == "x.flac" and "early" not in cause or cause.endswith(f"times behind the damage are up to {20 - seconds:.1f} s early"), name


@pytest.mark.parametrize("rate", [22_050, 44_100])
def test_a_whole_mp3_without_a_length_is_not_damaged(tmp_path, rate):
    """At a constant bit rate the guess from the file's size is a frame or two beyond its end."""
    path = tmp_path / "x.mp3"
    soundfile.write(path, waveform(60, rate), rate, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    content = path.read_bytes()
    path.write_bytes(content[content.index(content[:2], 4) :])
    assert containers.mp3_fault(path) and audio.read_header(path).seconds != 60
    seconds, cause = decoded(path)
    assert seconds == pytest.approx(60, abs=0.1) and cause == ""


def test_an_mp3_without_a_length_is_told_from_one_with_it(tmp_path):
    sound = np.concatenate([waveform(4), np.zeros(4 * 32_000, np.float32)])
    path = tmp_path / "x.mp3"
    soundfile.write(path, sound, 32_000, format="MP3", bitrate_mode="VARIABLE")
    content = path.read_bytes()
    second = content.index(content[:2], 4)
    tag = b"ID3\x04\0\0\0\0\x01\x02" + bytes(130)
    for head in (b"", tag, tag + tag):
        path.write_bytes(head + content)
        assert containers.mp3_fault(path) == ""
        path.write_bytes(head + content[second:])
        assert containers.mp3_fault(path) == "MP3 without a length header: its end may be missing"
    soundfile.write(path, sound, 32_000, format="WAV")
    assert containers.mp3_fault(path) == ""


def test_an_unusable_recipe_is_refused():
    with pytest.raises(UserError, match="win_length"):
        AudioConfig(win_length=2000)
    with pytest.raises(UserError, match="other keys"):
        AudioConfig.from_dict({"sample_rate": 1})
