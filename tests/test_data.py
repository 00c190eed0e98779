"""data.py: names, WAV files, the front end, SpecAug, and fetching."""

import io
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
import torchaudio
from conftest import REAL, ROOT, assert_equal_within, in_a_process, needs_cuda, needs_real, serve
from scipy.io import wavfile
from torchaudio.compliance.kaldi import fbank, get_mel_banks

import data
from data import (
    SpecAug,
    Windows,
    check_clips,
    collate,
    count_frames,
    fit_frames,
    list_clips,
    log_mel,
    machine_names,
    normalise,
    parse_clip,
    read_wav,
    spectrogram,
    window_starts,
    write_file,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::scipy.io.wavfile.WavFileWarning"
)  # data.py does, pytest undoes it


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)
    return path


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20000, 20000, n_samples).astype(np.int16)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "machine", "split", "domain", "is_anomaly", "attributes"),
    [
        (
            "d/fan/train/section_00_source_train_normal_0040_m-n_X.wav",
            "fan",
            "train",
            "source",
            False,
            "m-n_X",
        ),
        (
            "d/fan/test/section_00_target_test_anomaly_0022_m-n_W.wav",
            "fan",
            "test",
            "target",
            True,
            "m-n_W",
        ),
        (
            "slider/test/section_00_source_test_normal_0027_vel_730_ac_0.11.wav",
            "slider",
            "test",
            "source",
            False,
            "vel_730_ac_0.11",
        ),
        (
            "ToyTrain/train/section_00_target_train_normal_0007.wav",
            "ToyTrain",
            "train",
            "target",
            False,
            "",
        ),
        ("bandsaw/test/section_00_0000.wav", "bandsaw", "test", None, None, ""),
        ("pump/test/Pumpe 3, links.wav", "pump", "test", None, None, ""),
        ("pump/test/section_00_source_test_normal_40_a.wav", "pump", "test", None, None, ""),
        ("fan/test/section_00_source_test_normal_0001_x.WAV", "fan", "test", "source", False, "x"),
    ],
)
def test_labels_come_from_the_name(path, machine, split, domain, is_anomaly, attributes):
    assert parse_clip(path) == (Path(path), machine, split, domain, is_anomaly, attributes)


@needs_real
@pytest.mark.parametrize("machine", ["fan", "bearing"])
def test_attributes_equal_the_challenges_table(machine):
    """attributes_00.csv lists parameter and value of every clip: joined, they are what the name
    says."""
    lines = (REAL / "real" / machine / "attributes_00.csv").read_text().splitlines()[1:]
    checked = 0
    for file_name, *parts in (line.split(",") for line in lines):
        clip = parse_clip(file_name)
        if clip.domain:
            assert clip.attributes == "_".join(part for part in parts if part)
            checked += 1
    assert checked >= 1000
    train = {parse_clip(line.split(",")[0]).attributes for line in lines if "/train/" in line}
    assert len(train) == {"fan": 4, "bearing": 22}[machine]


@needs_real
def test_the_real_clips_are_all_found():
    clips = [
        c
        for m in data.DEV
        for split in ("train", "test")
        for c in list_clips(REAL / "real", m, split)
    ]
    assert len(clips) == 28 and all(clip.domain and clip.is_anomaly is not None for clip in clips)
    lengths = [recording.n_samples for recording in check_clips(clips)]
    assert {clip.machine: n / 16000 for clip, n in zip(clips, lengths, strict=True)} == {
        "ToyCar": 12,
        "ToyTrain": 12,
        "bearing": 10,
        "fan": 10,
        "gearbox": 10,
        "slider": 10,
        "valve": 10,
    }


def test_clips_are_listed_sorted_whatever_the_case_of_wav_and_without_hidden_files(tmp_path):
    for name in ("b.WAV", "a.wav", "._a.wav", "notes.txt"):
        write_wav(tmp_path / "pump" / "train" / name, noise(500))
    assert [clip.path.name for clip in list_clips(tmp_path, "pump", "train")] == ["a.wav", "b.WAV"]


def test_an_anomaly_among_the_training_clips_is_refused(tmp_path):
    write_wav(tmp_path / "fan" / "train" / "section_00_source_train_anomaly_0000_x.wav", noise(500))
    with pytest.raises(ValueError, match="is an anomaly by its name"):
        list_clips(tmp_path, "fan", "train")


def test_machine_names_expand_groups_once():
    assert machine_names(["dev"]) == data.DEV and len(machine_names(["all", "fan", "pump"])) == 15
    for bad in ("../fan", "a/b", "a+b", "", ".hidden"):
        with pytest.raises(ValueError, match="name of a folder"):
            machine_names([bad])


# ---------------------------------------------------------------- WAV files


def expected_decoding(samples: np.ndarray, rate: int) -> torch.Tensor:
    """(n,) or (n, channels) in [-1, 1] -> what read_wav must give."""
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    return torchaudio.functional.resample(torch.from_numpy(mono.astype(np.float32)), rate, 16000)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "offset", "scale"),
    [
        (np.uint8, 128, 2**7),
        (np.int16, 0, 2**15),
        (np.int32, 0, 2**31),
        (np.int64, 0, 2**63),
        (np.float32, 0, 1),
        (np.float64, 0, 1),
    ],
)
def test_every_sample_format_rate_and_channel_count(dtype, offset, scale, channels, rate, tmp_path):
    x = np.random.default_rng(1).uniform(-0.9, 0.9, (1000, channels)).squeeze()
    samples = (x * scale + offset).astype(dtype)
    wave = read_wav(write_wav(tmp_path / "x.wav", samples, rate))
    assert wave.dtype == torch.float32
    torch.testing.assert_close(
        wave, expected_decoding((samples.astype(float) - offset) / scale, rate), atol=1e-6, rtol=0
    )


@needs_real
def test_awkward_files_decode_as_libsndfile_decodes_them_or_are_refused():
    """manifest.tsv has libsndfile's verdict: channels, rate and frames, or an error."""
    decoded, refused = [], []
    for line in (REAL / "wav_cases" / "manifest.tsv").read_text().splitlines()[1:]:
        name, _, facts = line.split("\t")
        verdict = facts.split("sf: ")[1]
        try:
            wave = read_wav(REAL / "wav_cases" / name)
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)
            refused.append(name)
            continue
        assert "ERR" not in verdict, f"libsndfile refuses {name}"
        rate, frames = (
            int(verdict.split("Hz")[0].split()[-1]),
            int(verdict.split()[-1].removesuffix("fr")),
        )
        assert len(wave) == -(-frames * 16000 // rate)
        decoded.append(name)
    assert (len(decoded), len(refused)) == (21, 11)


def reference_files() -> list[Path]:
    folders = [Path(scipy.__file__).parent / "io" / "tests" / "data"] + (
        [REAL / "wav_cases"] if REAL else []
    )
    return [path for folder in folders for path in sorted(folder.glob("*.wav"))]


@pytest.mark.skipif(not reference_files(), reason="this scipy comes without its test files")
def test_decoded_samples_equal_libsndfiles():
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    pairs = []
    for path in reference_files():
        try:
            ours = read_wav(path)
            theirs, rate = soundfile.read(path, dtype="float64", always_2d=True)
        except (ValueError, soundfile.LibsndfileError):
            continue
        pairs.append((ours, expected_decoding(theirs, rate)))
    assert len(pairs) >= 13
    ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert_equal_within(1e-6, f"{len(pairs)} awkward WAV files against libsndfile", ours, theirs)


def riff(fmt: bytes, body: bytes, claim: int | None = None) -> bytes:
    chunks = (
        b"fmt "
        + struct.pack("<I", len(fmt))
        + fmt
        + b"data"
        + struct.pack("<I", len(body) if claim is None else claim)
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(body)) + b"WAVE" + chunks + body


PCM16 = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
FLOAT32 = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"this is a text file called .wav\n" * 10, "is no WAV file"),
        (riff(PCM16, b""), "no samples"),
        (riff(PCM16, bytes(2000), claim=4000), "truncated: 4000 bytes announced, 2000 there"),
        (riff(PCM16, bytes(2000), claim=0xFFFFFFFF), "truncated"),
        (
            riff(struct.pack("<HHIIHH", 1, 1, 16001, 32002, 2, 16), bytes(2000)),
            "16001 Hz cannot be converted",
        ),
        (
            riff(struct.pack("<HHIIHH", 1, 1, 10, 20, 2, 16), bytes(2000)),
            "10 Hz cannot be converted",
        ),
        (riff(FLOAT32, np.full(500, np.nan, np.float32).tobytes()), "not finite"),
        (riff(FLOAT32, np.full(500, np.inf, np.float32).tobytes()), "not finite"),
        (riff(FLOAT32, np.full(500, 9e3, np.float32).tobytes()), "up to 9000, not 1; divide them"),
        (
            riff(struct.pack("<HHIIHH", 1, 1, 16000, 64000, 4, 24), bytes(2000)),
            "24-bit samples in 4 bytes",
        ),
        (riff(struct.pack("<HHIIHH", 7, 1, 16000, 16000, 1, 8), bytes(2000)), "MULAW"),
        (riff(PCM16, bytes(2000))[:30], "truncated: 16 bytes announced"),
        (b"RIFF\x04\x00\x00\x00WAVE", "damaged or incomplete header"),
    ],
)
def test_unusable_files_are_refused_with_file_and_reason(content, reason, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_wav(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_directory_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "x.wav").mkdir()
    with pytest.raises(ValueError, match="Is a directory"):
        read_wav(tmp_path / "x.wav")
    with pytest.raises(ValueError, match="No such file"):
        read_wav(tmp_path / "y.wav")


def test_a_file_without_read_permission_is_refused(tmp_path):
    def read_as_nobody(argv):
        if os.geteuid() == 0:  # root may read everything
            os.setuid(65534)
        with pytest.raises(ValueError, match=r"x\.wav: Permission denied"):
            read_wav(argv[0])

    write_wav(tmp_path / "x.wav", noise(500)).chmod(0)
    assert in_a_process(read_as_nobody, [tmp_path / "x.wav"]) == 0


def test_scipys_own_test_files_give_a_wave_or_a_value_error():
    for path in reference_files():
        try:
            assert read_wav(path).isfinite().all()
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error)


def test_a_thousand_mutated_files_give_a_wave_or_a_value_error(tmp_path):
    """Header and body bytes are changed, and some files cut; in 2 s and 1 GB (beyond what was
    there) each."""
    rng = random.Random(0)
    originals = [
        write_wav(tmp_path / f"{i}.wav", s, rate).read_bytes()
        for i, (s, rate) in enumerate(
            [
                (noise(160000), 16000),
                (noise(20000).reshape(-1, 2), 44100),
                (noise(9000) / np.float32(32768), 48000),
                (noise(8000).astype(np.int32) * 65536, 8000),
            ]
        )
    ]
    originals += [path.read_bytes() for path in reference_files()]
    if REAL:
        originals += [path.read_bytes() for path in sorted(REAL.glob("real/*/train/*.wav"))]
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {"wave": 0, "refused": 0}
    for _ in range(1000):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            content[
                rng.randrange(min(len(content), 60) if rng.random() < 0.8 else len(content))
            ] = rng.randrange(256)
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        (tmp_path / "mutated.wav").write_bytes(content)
        start = time.perf_counter()
        try:
            wave = read_wav(tmp_path / "mutated.wav")
            assert wave.ndim == 1 and wave.dtype == torch.float32 and wave.isfinite().all()
            outcomes["wave"] += 1
        except ValueError as error:
            assert "mutated.wav" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20
    assert min(outcomes.values()) > 50, outcomes


def test_all_bad_clips_are_listed_at_once(tmp_path):
    for i in range(12):
        write_wav(tmp_path / "pump" / "train" / f"short {i:02}.wav", noise(399))
    for i in range(3):
        write_wav(tmp_path / "pump" / "train" / f"whole {i}.wav", noise(400))
    (tmp_path / "pump" / "train" / "a.wav").write_text("no sound")
    with pytest.raises(ValueError, match="13 of 16 clips cannot be used") as error:
        check_clips(list_clips(tmp_path, "pump", "train"))
    message = str(error.value)
    assert "a.wav: is no WAV file" in message and "short 08.wav: shorter than one frame" in message
    assert "short 09.wav" not in message and message.endswith("and 3 more") and "\n" not in message


# ---------------------------------------------------------------- the front end


def kaldi(wave: torch.Tensor) -> torch.Tensor:
    """The official AST's call."""
    return fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


def test_mel_filters_equal_torchaudios_bit_for_bit():
    theirs, _ = get_mel_banks(128, 512, 16000.0, 20.0, 0.0, 100.0, -500.0, 1.0)
    ours = data.mel_filters(torch.device("cpu"))
    assert torch.equal(ours[:256], theirs.T) and (ours[256] == 0).all()


@pytest.mark.parametrize("n_samples", [400, 401, 559, 560, 12345, 160000, 164079, 164080, 164081])
def test_log_mel_equals_torchaudio_bit_for_bit(n_samples):
    torch.manual_seed(n_samples)
    waves = torch.rand(3, n_samples) * 2 - 1
    waves[1] *= 1e-4
    waves[2, n_samples // 3 :] = 0  # digital silence reaches the floor
    features = log_mel(waves)
    assert features.shape == (3, count_frames(n_samples), 128)
    for wave, feature in zip(waves, features, strict=True):
        assert torch.equal(feature, kaldi(wave))
        assert torch.equal(log_mel(wave[None])[0], feature)


@needs_real
def test_log_mel_equals_torchaudio_on_the_real_clips():
    paths = sorted(REAL.glob("real/*/*/*.wav"))
    assert len(paths) == 28
    waves = [read_wav(path) for path in paths]
    ours, theirs = (
        torch.cat([log_mel(w[None])[0] for w in waves]),
        torch.cat([kaldi(w) for w in waves]),
    )
    assert_equal_within(0, "log-mel of 28 real clips against torchaudio", ours, theirs)


# Log-mel of two real fan clips, by torchaudio's fbank: mean, deviation, [frame, bin] -> value.
FAN = {
    "train/section_00_source_train_normal_0040_m-n_X.wav": (
        -5.25869,
        2.80380,
        {(0, 0): -10.73912, (500, 64): -3.70258, (997, 127): -3.48367},
    ),
    "test/section_00_target_test_normal_0021_m-n_Y.wav": (
        -7.61627,
        1.54875,
        {(0, 0): -6.69494, (500, 64): -6.00931, (997, 127): -7.95982},
    ),
}


@needs_real
@pytest.mark.parametrize("name", FAN)
def test_log_mel_of_real_clips_has_these_values(name):
    mean, std, values = FAN[name]
    x = log_mel(read_wav(REAL / "real" / "fan" / name)[None])[0]
    assert x.shape == (998, 128)
    assert x.mean().item() == pytest.approx(mean, abs=1e-4) and x.std().item() == pytest.approx(
        std, abs=1e-4
    )
    for (frame, mel_bin), value in values.items():
        assert x[frame, mel_bin].item() == pytest.approx(value, abs=1e-4)


@needs_cuda
def test_log_mel_on_a_gpu_is_close():
    waves = torch.rand(8, 160000) * 2 - 1
    torch.testing.assert_close(log_mel(waves.cuda()).cpu(), log_mel(waves), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "waves", [torch.zeros(2, 399), torch.zeros(400), torch.zeros(1, 400, dtype=torch.int16)]
)
def test_log_mel_refuses_short_and_integer_waves(waves):
    """Integer samples would be read at 32768 times the loudness: +20.8 in every value."""
    with pytest.raises(ValueError, match="at least 400 samples"):
        log_mel(waves)


def test_a_wave_at_the_scale_of_int16_would_be_off_by_20_8():
    wave = torch.rand(1, 16000) - 0.5
    difference = log_mel(wave * 32768) - log_mel(
        wave
    )  # but for the lowest filters, too narrow to hold an FFT bin
    assert difference.median().item() == pytest.approx(np.log(32768**2), abs=1e-3)


def test_padding_comes_before_normalisation():
    """A frame of padding is (0 + 4.2677393) / (2 · 4.5689974) = 0.467; digital silence (-15.94 +
    4.27) / 9.14."""
    x = spectrogram(torch.zeros(1, 16000), torch.tensor([16000]))
    assert x.shape == (1, 1024, 128)
    assert x[0, 98:].unique().item() == pytest.approx(0.467, abs=1e-3)
    assert x[0, :98].unique().item() == pytest.approx(-1.278, abs=1e-3)


def test_all_of_it_happens_on_the_device_of_the_waves():
    """PyTorch's meta device, which computes shapes only, stands for a GPU: a tensor that was made
    on the CPU could not be combined with its tensors."""
    waves = torch.empty(2, 16000, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    x = SpecAug(80, 80)(spectrogram(waves, lengths))
    assert x.device.type == "meta" and x.shape == (2, 1024, 128)
    assert data.mel_filters(waves.device).device.type == "meta"


def test_normalise_divides_by_twice_the_standard_deviation():
    assert normalise(torch.tensor(-4.2677393)).item() == pytest.approx(0, abs=1e-7)
    assert normalise(torch.tensor(-4.2677393 + 4.5689974)).item() == pytest.approx(0.5)


def test_fit_frames_pads_or_cuts():
    x = torch.ones(2, 5, 3)
    assert fit_frames(x, 7)[:, 5:].eq(0).all() and fit_frames(x, 7)[:, :5].eq(1).all()
    assert fit_frames(x, 4).shape == (2, 4, 3) and torch.equal(fit_frames(x, 5), x)


@pytest.mark.parametrize("n_samples", [400, 160000, 163920, 164080, 164240, 192000, 800000])
def test_windows_cover_a_long_clip_evenly(n_samples):
    starts, n_frames = window_starts(n_samples), count_frames(n_samples)
    assert starts[0] == 0 and all(start % 160 == 0 for start in starts)
    if n_frames > 1024:
        covered = {frame for start in starts for frame in range(start // 160, start // 160 + 1024)}
        assert covered == set(range(n_frames)) and len(starts) == -(-n_frames // 1024)
        assert np.ptp(np.diff(starts)) <= 160
    else:
        assert starts == [0]


def test_a_window_is_just_long_enough_for_1024_frames():
    assert data.WINDOW == 164080
    assert (count_frames(data.WINDOW - 1), count_frames(data.WINDOW)) == (1023, 1024)


def test_12_seconds_are_two_windows():
    assert count_frames(192000) == 1198 and window_starts(192000) == [0, 174 * 160]


def test_a_batch_of_unequal_clips_equals_each_clip_alone(tmp_path):
    """The zeros that fill a batch are no silence of the clip; and cutting the wave is cutting the
    spectrogram."""
    clips = [
        write_wav(tmp_path / "pump" / "train" / f"{n}.wav", noise(n, n))
        for n in (16000, 160000, 192000)
    ]
    clips.append(
        write_wav(
            tmp_path / "pump" / "train" / "float.wav", noise(44100, 5) / np.float32(32768), 44100
        )
    )
    windows = Windows([parse_clip(path) for path in clips])
    start = 100 * 160
    waves, lengths, indices = collate(
        [windows[0, 0], windows[1, 0], windows[2, start], windows[3, 0]]
    )
    assert indices.tolist() == [0, 1, 2, 3]
    batch = spectrogram(waves, lengths)
    for path, offset, x in zip(clips, (0, 0, 100, 0), batch, strict=True):
        alone = kaldi(read_wav(path))[offset : offset + 1024]
        assert torch.equal(x, normalise(fit_frames(alone[None]))[0])


# ---------------------------------------------------------------- SpecAug


def mask_widths(
    size_t: int, size_f: int, time_mask: int, freq_mask: int, clips: int
) -> tuple[torch.Tensor, ...]:
    """Widths and first positions of the time and frequency masks, recovered from what became 0."""
    torch.manual_seed(0)
    y = SpecAug(time_mask, freq_mask)(torch.ones(clips, size_t, size_f))
    in_time, in_freq = (y == 0).all(dim=2), (y == 0).all(dim=1)
    return in_time.sum(1), in_freq.sum(1), in_time, in_freq


def test_specaug_masks_one_stripe_each_and_leaves_the_rest():
    x = torch.rand(50, 100, 40) + 1
    torch.manual_seed(0)
    y = SpecAug(30, 10)(x)
    for clip, original in zip(y, x, strict=True):
        rows, columns = (clip == 0).all(dim=1), (clip == 0).all(dim=0)
        for stripe in (rows, columns):
            edges = torch.diff(torch.nn.functional.pad(stripe.int(), (1, 1))).abs().sum()
            assert edges in (0, 2), "one contiguous stripe, or none"
        kept = ~rows[:, None] & ~columns[None, :]
        assert torch.equal(clip[kept], original[kept]) and (clip[~kept] == 0).all()


def test_specaug_widths_are_uniform_from_0_to_the_maximum():
    """Mean of {0..8} is 4; each of the 9 widths has probability 1/9, within 4 standard errors over
    9,000 clips."""
    widths, _, _, _ = mask_widths(50, 20, time_mask=8, freq_mask=5, clips=9000)
    counts = torch.bincount(widths, minlength=9)
    assert len(counts) == 9 and widths.double().mean().item() == pytest.approx(
        4, abs=4 * 2.58 / 9000**0.5
    )
    assert (counts.double() - 1000).abs().max() < 4 * (9000 * 1 / 9 * 8 / 9) ** 0.5


def test_specaug_places_are_uniform():
    """A stripe of width 1 (max_width 1, half of the clips) starts at each of 10 frames equally
    often."""
    widths, _, in_time, _ = mask_widths(10, 20, time_mask=1, freq_mask=0, clips=20000)
    starts = in_time.sum(0).double()
    assert (starts - widths.sum() / 10).abs().max() < 4 * (10000 * 0.1 * 0.9) ** 0.5 + 1


def test_specaug_draws_each_clip_and_each_mask_independently():
    time_width, freq_width, _, _ = mask_widths(100, 100, 80, 80, clips=4000)
    assert len(time_width.unique()) > 70
    for a, b in ((time_width, freq_width), (time_width[1:], time_width[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 4000**0.5


@pytest.mark.parametrize(("time_mask", "freq_mask"), [(0, 0), (0, 10), (30, 0)])
def test_a_width_of_0_turns_a_mask_off(time_mask, freq_mask):
    time_width, freq_width, _, _ = mask_widths(100, 40, time_mask, freq_mask, clips=200)
    assert time_width.max() == 0 if time_mask == 0 else time_width.max() > 20
    assert freq_width.max() == 0 if freq_mask == 0 else freq_width.max() > 5


def test_specaug_may_mask_everything_but_not_more():
    SpecAug(1024, 128)
    assert mask_widths(10, 10, 10, 0, clips=500)[0].max() == 10
    for masks in ((-1, 0), (0, 129), (1025, 0)):
        with pytest.raises(ValueError, match="SpecAug"):
            SpecAug(*masks)


# ---------------------------------------------------------------- writing and fetching


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"old")
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); from data import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_file(sys.argv[2], bytes(5000))\n"
        "except OSError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, ROOT, path], capture_output=True, text=True
    ).stdout
    assert "cannot write" in out and "File too large" in out
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def zip_of(*names: str, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, content or riff(PCM16, noise(500).tobytes()))
    return buffer.getvalue()


FAN_ZIP = zip_of(
    "fan/train/section_00_source_train_normal_0000_m-n_X.wav",
    "fan/test/section_00_source_test_normal_0000_m-n_X.wav",
    "fan/attributes_00.csv",
)


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_development_machine_is_fetched_verified_and_unpacked(
    server, monkeypatch, tmp_path, capsys
):
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    data.main(["--machine", "fan", "--data", str(tmp_path)])
    assert "1 training clips, 1 test clips" in capsys.readouterr().out
    assert tree(tmp_path) == [
        "fan/attributes_00.csv",
        "fan/test/section_00_source_test_normal_0000_m-n_X.wav",
        "fan/train/section_00_source_train_normal_0000_m-n_X.wav",
    ]
    data.fetch("fan", tmp_path)
    assert len(server.requests) == 1, "what is there is not fetched again"


def test_an_evaluation_machine_comes_from_two_archives_with_its_ground_truth(
    server, monkeypatch, tmp_path
):
    serve(
        server,
        monkeypatch,
        7830345,
        "eval_data_bandsaw_train",
        zip_of("bandsaw/train/a.wav", "bandsaw/attributes_00.csv"),
    )
    serve(
        server,
        monkeypatch,
        7860847,
        "eval_data_bandsaw_test",
        zip_of("bandsaw/test/section_00_0000.wav"),
    )
    for kind in ("data", "domain"):
        name = f"ground_truth_{kind}/ground_truth_bandsaw_section_00_test.csv"
        server.files[f"/truth/{name}"] = b"section_00_0000.wav,1\n"
    data.prepare(["bandsaw"], tmp_path, ["train"])
    assert tree(tmp_path) == [
        "bandsaw/attributes_00.csv", "bandsaw/test/section_00_0000.wav", "bandsaw/train/a.wav",
        "ground_truth/ground_truth_data/ground_truth_bandsaw_section_00_test.csv",
        "ground_truth/ground_truth_domain/ground_truth_bandsaw_section_00_test.csv",
    ]  # fmt: skip


def test_nothing_is_fetched_into_a_folder_of_ones_own(server, tmp_path, capsys):
    """data/bearing/train with own files and no test folder, as a user made it."""
    write_wav(tmp_path / "bearing" / "train" / "recording 1.wav", noise(500))
    with pytest.raises(FileNotFoundError, match=r"bearing/test is missing; put test clips"):
        data.prepare(["bearing"], tmp_path, ["train", "test"])
    with pytest.raises(ValueError, match="nothing is fetched into it"):
        data.fetch("bearing", tmp_path)
    assert server.requests == []


def test_other_sound_files_beside_wavs_are_said(tmp_path, capsys):
    write_wav(tmp_path / "pump" / "train" / "a.wav", noise(500))
    for name in ("b.mp3", "c.flac"):
        (tmp_path / "pump" / "train" / name).touch()
    data.prepare(["pump"], tmp_path, ["train"])
    out = capsys.readouterr().out
    assert f"note: 2 files in {tmp_path}/pump/train are left out, no WAV: b.mp3, c.flac" in out


def test_there_is_an_archive_with_a_checksum_for_every_machine():
    assert set(data.ARCHIVES) == set(data.DEV + data.EVAL) and len(data.ARCHIVE_MD5) == 21
    assert {name for archives in data.ARCHIVES.values() for _, name, _ in archives} == set(
        data.ARCHIVE_MD5
    )


def test_a_broken_download_continues_where_it_stopped(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    server.cut_at = 100
    with pytest.raises(
        OSError, match=f"broke at 100 of {len(FAN_ZIP):,} bytes.*repeat the command to continue"
    ):
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == ["dev_fan.zip.part"]
    server.cut_at = None
    data.fetch("fan", tmp_path)
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100-"]
    assert len(tree(tmp_path)) == 3


@pytest.mark.parametrize(
    "agent", ["Python-urllib/3.11", "python-requests/2.32", "curl/8.5", "Wget/1.21", ""]
)
def test_the_server_that_refuses_library_agents_serves_ours(server, monkeypatch, tmp_path, agent):
    """As the data host has done since January 2026; the same server refuses these agents."""
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    server.refused_agents = ("python-urllib", "python-requests", "curl", "wget")
    with monkeypatch.context() as patch:
        patch.setattr(data, "AGENT", agent)
        with pytest.raises(OSError, match=r"the server refuses http.*\(403 Forbidden\): open http"):
            data.fetch("fan", tmp_path)
    data.fetch("fan", tmp_path)
    assert len(tree(tmp_path)) == 3


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_a_4xx_is_final_and_says_what_to_put_where(server, tmp_path, status, capsys):
    server.answers = [(status, {})]
    with pytest.raises(SystemExit) as stop:
        data.main(["--machine", "fan", "--data", str(tmp_path)])
    line = capsys.readouterr().err.splitlines()[-1]
    url = f"{data.ZENODO}/7882613/files/dev_fan.zip?download=1"
    assert (
        stop.value.code == 2
        and f"the server refuses {url} ({status} " in line
        and "continue" not in line
    )
    assert f"open {url} in a browser and put the file at {tmp_path}/dev_fan.zip; `python" in line
    assert len(server.requests) == 1 and tree(tmp_path) == []


@pytest.mark.parametrize(
    ("answers", "waits"),
    [
        ([(429, {"Retry-After": "7"})], [7]),
        ([(503, {"Retry-After": "600"}), (500, {})], [60, 5]),
        ([(429, {})], [60]),
        ([(502, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})], [60]),
    ],
)
def test_a_busy_server_is_asked_again_after_the_time_it_names(
    server, monkeypatch, tmp_path, answers, waits, capsys
):
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    server.answers, slept = list(answers), []
    monkeypatch.setattr(
        data.time, "sleep", lambda seconds: slept.append(seconds) if seconds else None
    )
    data.fetch("fan", tmp_path)
    assert slept == waits and len(tree(tmp_path)) == 3
    assert f"the server answers {answers[0][0]}" in (err := capsys.readouterr().err)
    assert f"trying again in {waits[0]} s" in err


def test_a_server_that_stays_busy_is_given_up_after_three_tries(server, monkeypatch, tmp_path):
    server.answers = [(503, {})] * 3
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"the server refuses .*503 Service Unavailable"):
        data.fetch("fan", tmp_path)
    assert len(server.requests) == 3


def test_a_web_page_in_place_of_a_file_is_called_that(server, tmp_path):
    page = b"\n<!DOCTYPE html><html>Blocked</html>"
    server.files["/zenodo/7882613/files/dev_fan.zip"] = page
    with pytest.raises(
        ValueError, match=r"what came from http.* is a web page: try again, or open"
    ):
        data.fetch("fan", tmp_path)
    server.files["/truth/x.csv"] = page
    with pytest.raises(ValueError, match="is a web page"):
        data.download(f"{data.GROUND_TRUTH}/x.csv", tmp_path / "x.csv")
    assert tree(tmp_path) == []
    (tmp_path / "dev_fan.zip").write_bytes(page)
    with pytest.raises(
        ValueError, match=r"dev_fan\.zip is a web page; delete it, or replace it by what a browser"
    ):
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == ["dev_fan.zip"], "what was put there by hand is not ours to delete"


def test_a_server_that_ignores_range_starts_over(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    (tmp_path / "dev_fan.zip.part").write_bytes(FAN_ZIP[:50])
    server.ignore_range = True
    data.fetch("fan", tmp_path)
    assert len(tree(tmp_path)) == 3


def test_a_download_killed_after_its_last_byte_is_complete(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    (tmp_path / "dev_fan.zip.part").write_bytes(FAN_ZIP)
    data.fetch("fan", tmp_path)
    assert len(tree(tmp_path)) == 3


def test_an_archive_put_there_by_hand_is_used(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    (tmp_path / "dev_fan.zip").write_bytes(FAN_ZIP + b"x")
    with pytest.raises(
        ValueError, match=r"dev_fan\.zip has not the MD5 checksum .*; delete it, or replace it"
    ):
        data.fetch("fan", tmp_path)
    (tmp_path / "dev_fan.zip").write_bytes(FAN_ZIP)
    data.fetch("fan", tmp_path)
    assert server.requests == [] and len(tree(tmp_path)) == 3


def test_ctrl_c_while_unpacking_keeps_the_archive(server, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    serve(server, monkeypatch, 7882613, "dev_fan", FAN_ZIP)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.zipfile.ZipFile, "extractall", interrupted)
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == ["dev_fan.zip"]
    data.fetch("fan", tmp_path)
    assert len(server.requests) == 1 and len(tree(tmp_path)) == 3


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path):
    server.files["/zenodo/7882613/files/dev_fan.zip"] = FAN_ZIP
    with pytest.raises(
        ValueError, match="has not the MD5 checksum 9348591e96fb0ad499a1e33b082562fc: try again"
    ):
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == []


def link(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for folder in ("train", "test"):
            file.writestr(f"fan/{folder}/a.wav", b"x")
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    return buffer.getvalue()


WHOLE = ("fan/train/a.wav", "fan/test/a.wav")


@pytest.mark.parametrize(
    ("content", "more"),
    [
        (zip_of(*WHOLE, "README.md", "__MACOSX/fan/._a.wav", "valve/train/a.wav"), []),
        (zip_of(*WHOLE, "../evil.wav", "/tmp/evil.wav", "C:\\evil.wav"), []),
        (zip_of(*WHOLE, "fan/../../evil.wav"), ["fan/evil.wav"]),
        (link("fan/train/link.wav"), ["fan/train/link.wav"]),
    ],
)
def test_only_what_lies_below_the_machine_is_taken_and_stays_inside_the_data(
    server, monkeypatch, tmp_path, content, more
):
    serve(server, monkeypatch, 7882613, "dev_fan", content)
    data.fetch("fan", tmp_path / "a" / "b")
    assert tree(tmp_path) == sorted(f"a/b/{name}" for name in (*WHOLE, *more))
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_of("fan/train/a.wav"), "has no folder fan/test"),
        (FAN_ZIP[:-30], "cannot be unpacked"),
        (FAN_ZIP[:200] + bytes([FAN_ZIP[200] ^ 1]) + FAN_ZIP[201:], "cannot be unpacked"),
        (b"PK no zip file", "cannot be unpacked"),
    ],
)
def test_a_damaged_archive_leaves_no_folder(server, monkeypatch, tmp_path, content, message):
    serve(server, monkeypatch, 7882613, "dev_fan", content)
    with pytest.raises(ValueError, match=message):
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == ["dev_fan.zip"]


def test_no_network_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "ZENODO", "http://127.0.0.1:9/zenodo")
    with pytest.raises(
        OSError,
        match=r"cannot fetch http.*put the file at .*dev_fan\.zip; `python tests/demo\.py`",
    ):
        data.fetch("fan", tmp_path)


def test_a_download_killed_at_random_moments_ends_with_the_same_bytes(
    server, monkeypatch, tmp_path
):
    """kill -9 while 600 KB arrive and are unpacked, eight times; then the same command once more,
    to the end."""
    names = [
        f"fan/{split}/section_00_source_{split}_normal_{i:04}_x.wav"
        for split in ("train", "test")
        for i in range(20)
    ]
    content = zip_of(*names, content=riff(PCM16, noise(7500).tobytes()))
    serve(server, monkeypatch, 7882613, "dev_fan", content)
    server.delay = 0.01
    rng, command = (
        random.Random(1),
        (data.main, ["--machine", "fan", "--data", str(tmp_path / "data")]),
    )
    ends = [in_a_process(*command, kill_after=rng.uniform(0.02, 0.3)) for _ in range(8)]
    assert ends.count(-signal.SIGKILL) >= 6
    server.delay = 0
    assert in_a_process(*command) == 0
    assert tree(tmp_path / "data") == sorted(names)
    assert all(
        (tmp_path / "data" / name).read_bytes() == riff(PCM16, noise(7500).tobytes())
        for name in names
    )
