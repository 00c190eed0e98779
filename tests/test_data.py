"""data.py: names, WAV files, the front end, windows, SpecAug, and fetching."""

import io
import math
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import plain
import pytest
import scipy
import torch
from conftest import REAL, ROOT, assert_equal_within, serve
from scipy.io import wavfile

import data
from data import (
    AllWindows,
    InputError,
    SpecAug,
    TrainingWindows,
    list_clips,
    machine_names,
    parse_clip,
    read_wav,
    spectrogram,
    window_starts,
)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)
    return path


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20000, 20000, n_samples).astype(np.int16)


@pytest.mark.parametrize(
    ("name", "domain", "is_anomaly", "attributes"),
    [
        ("section_00_source_train_normal_0040_m-n_X.wav", "source", False, "m-n_X"),
        ("section_00_target_test_anomaly_0022_m-n_W.wav", "target", True, "m-n_W"),
        ("section_00_source_test_normal_0027_vel_1_ac_0.11.wav", "source", False, "vel_1_ac_0.11"),
        ("section_00_target_train_normal_0007.wav", "target", False, ""),
        ("section_00_source_train_normal_00000012.wav", "source", False, ""),
        ("section_00_source_train_normal_12345_a_b.wav", "source", False, "a_b"),
        (
            "section_00_source_test_normal_0001_two\u2028lines.wav",
            "source",
            False,
            "two\u2028lines",
        ),
        ("section_00_source_test_normal_0001_x.WAV", "source", False, "x"),
        ("section_00_0000.wav", None, None, ""),
        ("Pumpe 3, links.wav", None, None, ""),
        ("section_00_source_test_normal_40_a.wav", None, None, ""),
        ("section_00_source_test_normal_0040a.wav", None, None, ""),
    ],
)
def test_labels_come_from_the_name(name, domain, is_anomaly, attributes):
    path = Path("d", "fan", "test", name)
    assert parse_clip(str(path)) == (path, "fan", "test", domain, is_anomaly, attributes)


def test_clips_are_listed_sorted_whatever_the_case_of_wav_and_without_hidden_files(tmp_path):
    for name in ("b.WAV", "a.wav", "._a.wav", "notes.txt", "c.flac"):
        write_wav(tmp_path / "pump" / "train" / name, noise(500))
    assert [clip.path.name for clip in list_clips(tmp_path, "pump", "train")] == ["a.wav", "b.WAV"]


def test_where_there_are_no_clips_the_message_says_what_there_is(tmp_path):
    """Another machine, other kinds of files, sub-folders, nothing."""
    for name in ("pump/train/a.m4a", "pump/train/day 1/a.wav", "Fan/train/a.wav"):
        write_wav(tmp_path / name, noise(500))
    (tmp_path / "Fan" / "test").mkdir()
    for machine, split, there in [
        ("fan", "train", f"{tmp_path} has Fan/, pump/"),
        ("pump", "train", f"{tmp_path}/pump/train has a.m4a, day 1/"),
        ("pump", "test", f"{tmp_path}/pump has train/"),
        ("Fan", "test", f"{tmp_path}/Fan/test is empty"),
    ]:
        with pytest.raises(FileNotFoundError) as error:
            list_clips(tmp_path, machine, split)
        assert str(error.value) == f"no WAV files in {tmp_path}/{machine}/{split}: {there}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["section_00_source_train_anomaly_0000_x.wav"],
            "is named as an anomaly; training data must be",
        ),
        (
            ["section_00_source_train_normal_012_x.wav"],
            "does not match the form of section_00_source",
        ),
        (["section_00_source_train_normal_0012-x.wav"], "_normal_0001_speed-2.wav; rename it"),
        (["section_0_target_train_normal_0012_x.wav"], "does not match the form of"),
        (
            ["section_00_0000.wav", "section_01_0000.wav"],
            "mixes 2 sections; give each its own folder",
        ),
        ([f"section_0{i}_source_train_normal_0000_x.wav" for i in "012"], "mixes 3 sections"),
    ],
)
def test_names_that_would_mislead_in_silence_are_refused(tmp_path, names, message):
    for name in ["any other name.wav", "section_resource_x.wav", *names]:
        write_wav(tmp_path / "fan" / "train" / name, noise(500))
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path, "fan", "train")
    for name in names:
        (tmp_path / "fan" / "train" / name).unlink()
    assert len(list_clips(tmp_path, "fan", "train")) == 2


def test_machine_names_expand_groups_once():
    assert machine_names(["dev"]) == data.DEV and len(machine_names(["all", "fan", "pump"])) == 15


FORMATS = [(np.uint8, 128, 2**7), (np.int16, 0, 2**15), (np.int32, 0, 2**31),
           (np.int64, 0, 2**63), (np.float32, 0, 1), (np.float64, 0, 1)]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "offset", "scale"), FORMATS)
def test_every_sample_format_is_read_and_the_first_channel_counts(
    dtype, offset, scale, channels, tmp_path
):
    """The second channel is the first in opposite phase: a mean would be silent."""
    x = np.random.default_rng(1).uniform(-0.9, 0.9, (3000, channels))
    x[:, 1:2] = -x[:, :1]
    samples = (x * scale + offset).astype(dtype)
    wave = read_wav(write_wav(tmp_path / "x.wav", samples.squeeze()))
    expected = ((samples[:, 0].astype(float) - offset) / scale).astype(np.float32)
    assert wave.dtype == torch.float32
    torch.testing.assert_close(wave, torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_16_khz_keeps_its_bits(tmp_path):
    samples = noise(3000)
    wave = read_wav(write_wav(tmp_path / "x.wav", samples))
    assert torch.equal(wave, torch.from_numpy(samples) / 32768)


@pytest.mark.parametrize("rate", [8000, 11025, 15999, 16001, 41667, 44100, 44101, 192000])
def test_any_sample_rate_becomes_16_khz_quickly(tmp_path, rate):
    """10 s of three tones, against the same tones written down at 16 kHz."""

    def tones(rate: int) -> np.ndarray:
        t = np.arange(10 * rate) / rate
        return sum(0.2 * np.sin(2 * np.pi * hz * t + hz) for hz in (100, 1000, 3000))

    path = write_wav(tmp_path / "x.wav", tones(rate).astype(np.float32), rate)
    tracemalloc.start()
    start = time.process_time()
    wave = read_wav(path)
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 1e9
    tracemalloc.stop()
    assert len(wave) == 160_000
    middle = slice(1000, -1000)
    np.testing.assert_allclose(wave[middle], tones(16000)[middle], atol=1e-3)


def test_awkward_files_are_read_as_libsndfile_reads_them_or_refused(monkeypatch):
    """Of the 32 in wav_cases, 21 are read; libsndfile reads four more: two are compressed, two have
    float samples up to 16411, and one has 24 bits in 4 bytes.
    """
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    monkeypatch.setattr(data, "FRAME", 1e-3)  # some have 4 samples
    folders = [Path(scipy.__file__).parent / "io" / "tests" / "data"]
    folders += [REAL / "wav_cases"] if REAL else []
    pairs, names = [], []
    for path in [path for folder in folders for path in sorted(folder.glob("*.wav"))]:
        try:
            ours = read_wav(path)
        except InputError as error:
            assert str(error).startswith(f"{path} ")
            continue
        names.append(path.name)
        try:
            theirs, rate = soundfile.read(path, dtype="float64", always_2d=True)
        except soundfile.LibsndfileError:
            assert path.parent.name != "wav_cases", f"libsndfile refuses {path.name}"
            continue
        up, down = 16000 // math.gcd(16000, rate), rate // math.gcd(16000, rate)
        pairs.append((ours, torch.from_numpy(scipy.signal.resample_poly(theirs[:, 0], up, down))))
    assert REAL is None or len([n for n in names if (REAL / "wav_cases" / n).exists()]) == 21
    ours, theirs = (torch.cat(side) for side in zip(*pairs))
    assert_equal_within(1e-6, f"{len(pairs)} awkward WAV files against libsndfile", ours, theirs)


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


def riff(fmt: bytes, body: bytes, first: bytes = b"", last: bytes = b"") -> bytes:
    chunks = first + chunk(b"fmt ", fmt) + chunk(b"data", body) + last
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def fmt(codec: int = 1, channels: int = 1, rate: int = 16000, bits: int = 16, size: int = 0):
    """size: bytes of a sample, if not bits / 8."""
    block = channels * (size or bits // 8)
    return struct.pack("<HHIIHH", codec, channels, rate, rate * block, block, bits)


def rf64(fmt: bytes, body: bytes) -> bytes:
    sizes = struct.pack("<QQQI", 0, len(body), 0, 0)
    chunks = chunk(b"ds64", sizes) + chunk(b"fmt ", fmt) + b"data" + b"\xff" * 4 + body
    return b"RF64" + b"\xff" * 4 + b"WAVE" + chunks


def rifx(fmt: bytes, body: bytes) -> bytes:
    """Big-endian."""
    fmt = struct.pack(">HHIIHH", *struct.unpack("<HHIIHH", fmt))
    sizes = [struct.pack(">I", size) for size in (36 + len(body), 16, len(body))]
    return b"RIFX" + sizes[0] + b"WAVEfmt " + sizes[1] + fmt + b"data" + sizes[2] + body


BODY = noise(1000).tobytes()
GOOD = riff(fmt(), BODY)
WHOLE = {
    "an odd byte at the end": (riff(fmt(), BODY + b"x"), 1000),
    "half a frame": (riff(fmt(channels=2), BODY + b"ab"), 500),
    "a RIFF size of 0": (GOOD[:4] + bytes(4) + GOOD[8:], 1000),
    "a RIFF size that is too large": (GOOD[:4] + b"\xff" * 4 + GOOD[8:], 1000),
    "stray bytes behind": (GOOD + b"\0\1\2\3 stray bytes", 1000),
    "text before the format": (riff(fmt(), BODY, first=chunk(b"LIST", b"fmt \x18\0\0\0")), 1000),
    "text behind": (riff(fmt(), BODY, last=chunk(b"LIST", b"odd") + b"\0"), 1000),
    "a longer format": (riff(fmt() + bytes(24), BODY), 1000),
    "extensible": (riff(fmt(0xFFFE) + struct.pack("<HHIH14x", 22, 16, 4, 1), BODY), 1000),
    "RF64": (rf64(fmt(), BODY), 1000),
    "RIFX": (rifx(fmt(), noise(1000).byteswap().tobytes()), 1000),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whatever_recorders_write_around_the_samples_whole_files_are_read(tmp_path, case):
    content, n_samples = WHOLE[case]
    (tmp_path / "x.wav").write_bytes(content)
    expected = noise(1000)[:: 1000 // n_samples]
    assert torch.equal(read_wav(tmp_path / "x.wav"), torch.from_numpy(expected.copy()) / 32768)


FLOATS, SHORTS = np.full(500, np.nan, np.float32), noise(500)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html>Not found</html>", "not a WAV file"),
        (b"\0\0\0\x20ftypM4A " + bytes(100), r"not a WAV file \(a renamed m4a\?\)"),
        (GOOD[:-2], "is cut off: 2 bytes of samples are missing"),
        (rf64(fmt(), BODY)[:-10], "is cut off: 10 bytes"),
        (GOOD[:30], "not a WAV file"),
        (GOOD[:40] + bytes(4) + GOOD[44:], "shorter than a frame of 25 ms"),
        (riff(fmt(), BODY, last=chunk(b"data", BODY)), "has two data chunks"),
        (riff(fmt(), bytes(798)), "shorter than a frame of 25 ms"),
        (riff(fmt(bits=24, size=4), bytes(2000)), "24 bits in 4 bytes"),
        (rf64(fmt(bits=24, size=4), bytes(2000)), "24 bits in 4 bytes"),
        (rifx(fmt(bits=24, size=4), bytes(2000)), "24 bits in 4 bytes"),
        (
            riff(fmt(codec=7, bits=8), bytes(2000)),
            r"is compressed \(WAV format 7\): save it as PCM",
        ),
        (riff(fmt(channels=0), bytes(2000)), "0 channels of 16 bits"),
        (riff(fmt(rate=800), bytes(2000)), "800 Hz is outside 1 kHz to 1 MHz"),
        (riff(fmt(rate=0), bytes(2000)), "0 Hz is outside"),
        (riff(fmt(3, bits=32), FLOATS.tobytes()), "not finite"),
        (riff(fmt(3, bits=32), (0 * FLOATS + SHORTS).tobytes()), "not finite"),
        (riff(fmt(3, bits=32), np.full(500, -8.5, np.float32).tobytes()), "peaks at 8.5"),
        (riff(fmt(bits=32), SHORTS.astype("<i4").tobytes()), "16- or 24-bit numbers in 32 bits"),
        (riff(fmt(bits=32), (200 * SHORTS.astype("<i4")).tobytes()), "16- or 24-bit numbers"),
        (riff(fmt(bits=64), SHORTS.astype("<i8").tobytes()), "16- or 24-bit numbers in 64 bits"),
    ],
)
def test_unusable_files_are_refused_with_file_and_reason(content, reason, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        read_wav(path)
    assert str(error.value).startswith(f"{path} ")


def test_four_gibibytes_are_refused():
    """A RIFF header has sizes modulo 2³²."""

    class Huge(bytes):
        __len__ = lambda self: 2**32  # noqa: E731

    with pytest.raises(InputError, match="4 GiB or more"):
        data.decode_wav(Huge(GOOD))


@pytest.mark.parametrize("values", [256 * noise(500).astype("<i4") // 100, np.zeros(500, "<i4")])
def test_a_quiet_microphone_with_24_bits_at_the_top_of_32_and_silence_are_read(tmp_path, values):
    """Below 1/256 of full scale, with zeros in the lowest 8 bits."""
    values = values // 256 * 256
    (tmp_path / "x.wav").write_bytes(riff(fmt(bits=32), values.astype("<i4").tobytes()))
    expected = torch.from_numpy(values.astype(np.float32)) / 2**31
    assert torch.equal(read_wav(tmp_path / "x.wav"), expected)


@pytest.mark.parametrize("n_samples", [400, 559, 80001, 159999, 160000, 192000])
def test_a_spectrogram_is_the_official_one_of_10_s(n_samples):
    """Log-mel, padded, then normalised (YuanGongND/ast, src/dataloader.py); a clip that is shorter
    goes backwards and forwards.
    """
    torch.manual_seed(n_samples)
    wave = torch.rand(n_samples) * 2 - 1
    expected = plain.network_input(plain.mel_frames(plain.window_at(wave, 0)))
    assert torch.equal(spectrogram(wave), expected)


@pytest.mark.parametrize(
    ("n_samples", "expected"),
    [(400, [0]), (160000, [0]), (160001, [0, 1]), (192000, [0, 32000]), (320000, [0, 160000]),
     (400001, [0, 120000, 240001]), (480000, [0, 160000, 320000])],
)  # fmt: skip
def test_windows_cover_a_long_clip_evenly(n_samples, expected):
    assert window_starts(n_samples) == expected


def clip_of(folder: Path, n_samples: int, rate: int = 16000) -> data.Clip:
    path = folder / "pump" / "train" / f"{n_samples}.wav"
    return parse_clip(write_wav(path, noise(n_samples), rate))


def test_random_windows_are_drawn_from_all_places(tmp_path):
    """12 s have 32,000 samples beyond a window: u in [0, 1) chooses among 32,001 starts."""
    clip, short = clip_of(tmp_path, 192000), clip_of(tmp_path, 400)
    wave = read_wav(clip.path)
    windows = TrainingWindows([short, clip], [5, 7])
    for u, start in [(0.0, 0), (0.5, 16000), (1 - 1e-7, 32000), (1 - 1 / 32000, 31999)]:
        x, label = windows[1, u]
        assert label == 7 and torch.equal(x, spectrogram(wave, start))
    assert torch.equal(windows[0, 0.99][0], spectrogram(read_wav(short.path)))


def test_all_windows_of_a_clip(tmp_path):
    clip = clip_of(tmp_path, 96000, rate=8000)  # 12 s
    x, starts = AllWindows([clip])[0]
    wave = read_wav(clip.path)
    assert starts == [0, 32000]
    assert torch.equal(x, torch.stack([spectrogram(wave, start) for start in starts]))


def test_specaug_masks_one_stripe_each_and_leaves_the_rest():
    x = torch.rand(50, 100, 40) + 1
    torch.manual_seed(0)
    y = SpecAug(30, 10)(x)
    for clip, original in zip(y, x):
        rows, columns = (clip == 0).all(dim=1), (clip == 0).all(dim=0)
        for stripe in (rows, columns):
            edges = torch.diff(torch.nn.functional.pad(stripe.int(), (1, 1))).abs().sum()
            assert edges in (0, 2), "one contiguous stripe, or none"
        kept = ~rows[:, None] & ~columns[None, :]
        assert torch.equal(clip[kept], original[kept]) and (clip[~kept] == 0).all()


def test_specaug_stays_on_the_device_of_its_input():
    """PyTorch's meta device, which computes shapes only, stands for a GPU."""
    assert SpecAug(80, 80)(torch.empty(2, 1024, 128, device="meta")).device.type == "meta"


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, riff(fmt(), noise(500).tobytes()))
    return buffer.getvalue()


CLIPS = [f"fan/{split}/section_00_source_{split}_normal_0000_x.wav" for split in ("train", "test")]


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full_disk(path: Path, content: bytes):
        path.open("wb").write(content[:3])
        raise OSError(28, "No space left on device")

    (tmp_path / "last.pt").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*last\.pt: No space left on device"):
        data.save(tmp_path / "last.pt", {"new": 1})
    assert tree(tmp_path) == ["last.pt"] and (tmp_path / "last.pt").read_text() == "old"


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    """Loading says what PyTorch says, and never to delete the file."""
    reason = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"

    def full(*args, **options):
        raise RuntimeError(reason)

    data.save(tmp_path / "last.pt", {"a": 1})
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(InputError, match=r"cannot be loaded: .*can't allocate memory") as error:
        data.load(tmp_path / "last.pt", "a")
    assert "damaged" not in str(error.value) and "delete" not in str(error.value)


def test_a_development_machine_is_fetched_verified_and_unpacked(
    server, monkeypatch, tmp_path, capsys
):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    data.main(["--machine", "fan", "--data", str(tmp_path)])
    out = f"fetching the challenge's fan into {tmp_path}/fan\n"
    out += f"{tmp_path}/fan: training clips 1, test clips 1\n"
    assert capsys.readouterr().out == out
    assert tree(tmp_path) == sorted(CLIPS)
    data.fetch("fan", tmp_path)
    assert len(server.requests) == 1, "what is there is not fetched again"


def test_an_evaluation_machine_comes_from_two_archives_with_its_ground_truth(
    server, monkeypatch, tmp_path
):
    train, test = "bandsaw/train/a.wav", "bandsaw/test/section_00_0000.wav"
    serve(server, monkeypatch, 7830345, "eval_data_bandsaw_train", zip_of(train))
    serve(server, monkeypatch, 7860847, "eval_data_bandsaw_test", zip_of(test))
    for kind, name in (("data", "labels.csv"), ("domain", "domains.csv")):
        by_hand = tmp_path / "bandsaw.part" / "bandsaw" / name
        with pytest.raises(OSError, match=rf"in a browser and put the file at {by_hand}"):
            data.fetch("bandsaw", tmp_path)
        url = f"/truth/ground_truth_{kind}/ground_truth_bandsaw_section_00_test.csv"
        if kind == "data":
            by_hand.write_text(kind)
        else:
            server.files[url] = kind.encode()
    data.fetch("bandsaw", tmp_path)
    assert tree(tmp_path) == ["bandsaw/domains.csv", "bandsaw/labels.csv", test, train]
    assert (tmp_path / "bandsaw" / "labels.csv").read_text() == "data"
    assert (tmp_path / "bandsaw" / "domains.csv").read_text() == "domain"


def test_nothing_is_fetched_into_a_folder_that_exists_or_for_a_machine_of_ones_own(
    server, tmp_path
):
    (tmp_path / "bearing").mkdir()
    data.fetch("bearing", tmp_path)
    data.fetch("pump", tmp_path)
    assert server.requests == []


@pytest.mark.parametrize("fault", ["no answer", "cut", "nothing"])
def test_a_download_is_whole_or_not_there(server, monkeypatch, tmp_path, fault):
    """Also where no checksum would tell, as for the ground truth."""
    server.files["/labels.csv"], server.fault = b"section_00_0000.wav,1\n", fault
    url = f"http://127.0.0.1:{server.server_port}/labels.csv"
    with pytest.raises(OSError, match=r"cannot download .* and put the file at") as found:
        data.download(url, tmp_path / "labels.csv")
    assert "\n" not in str(found.value) and tree(tmp_path) == []
    server.fault = None
    data.download(url, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_bytes() == server.files["/labels.csv"]


@pytest.mark.parametrize("fault", ["web page", "by hand"])
def test_a_wrong_checksum_is_refused_and_no_folder_appears(server, monkeypatch, tmp_path, fault):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    if fault == "web page":
        server.files["/zenodo/7882613/files/dev_fan.zip"] = b"<!doctype html>"
    else:
        (tmp_path / "fan.part").mkdir()
        (tmp_path / "fan.part" / "dev_fan.zip").write_bytes(b"another file")
    with pytest.raises(InputError, match=r"dev_fan\.zip fails its md5 check: delete it"):
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == ["fan.part/.lock", "fan.part/dev_fan.zip"]


def test_there_is_an_archive_with_a_checksum_for_every_machine():
    names = {f"dev_{m}" for m in data.DEV}
    names |= {f"eval_data_{m}_{split}" for m in data.EVAL for split in ("train", "test")}
    assert names == set(data.ARCHIVE_MD5) and len(names) == 21


def test_a_download_that_was_stopped_while_unpacking_is_finished_by_the_next(
    server, monkeypatch, tmp_path
):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))

    def stopped(archive, folder):
        archive.extract(CLIPS[0], folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "extractall", stopped)
        data.fetch("fan", tmp_path)
    assert not (tmp_path / "fan").exists()
    data.fetch("fan", tmp_path)
    assert tree(tmp_path) == sorted(CLIPS) and len(server.requests) == 1


def test_a_folder_has_one_command_at_a_time(server, monkeypatch, tmp_path):
    """A second command is refused. Where the first was killed, the kernel has let go, even if a
    process that read clips for it still lives.
    """
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    with data.sole_use(tmp_path / "fan.part"):
        message = f"another command is working in {tmp_path}/fan.part"
        with pytest.raises(OSError, match=message):
            data.fetch("fan", tmp_path)
    hold = f"import data, os, pathlib, time; p = pathlib.Path({str(tmp_path / 'fan.part')!r})\n"
    hold += "with data.sole_use(p): os.kill(os.getpid(), 9) if os.fork() else time.sleep(3)"
    killed = subprocess.run([sys.executable, "-c", hold], cwd=ROOT)
    assert killed.returncode == -9
    data.fetch("fan", tmp_path)
    assert tree(tmp_path) == sorted(CLIPS)
