"""data.py: names, WAV files, the front end, windows, SpecAug, and fetching."""

import io
import math
import random
import signal
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import plain
import pytest
import scipy
import torch
from conftest import REAL, assert_equal_within, in_a_process, needs_real, serve
from scipy.io import wavfile

import data
from data import (
    AllWindows,
    RandomOrder,
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
    with pytest.raises(FileNotFoundError, match=r"no WAV files in .*pump/test"):
        list_clips(tmp_path, "pump", "test")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["section_00_source_train_anomaly_0000_x.wav"], "is an anomaly by its name"),
        (["section_00_source_train_normal_012_x.wav"], "is not quite named like section_00_source"),
        (["section_00_source_train_normal_0012-x.wav"], "_normal_0001_speed-2.wav: rename it"),
        (["section_0_target_train_normal_0012_x.wav"], "is not quite named like"),
        (["section_00_0000.wav", "section_01_0000.wav"], "2 sections: make a folder for each"),
        ([f"section_0{i}_source_train_normal_0000_x.wav" for i in "012"], "clips of 3 sections"),
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
def test_every_sample_format_and_channel_count(dtype, offset, scale, channels, tmp_path):
    x = np.random.default_rng(1).uniform(-0.9, 0.9, (3000, channels))
    samples = (x * scale + offset).astype(dtype)
    wave = read_wav(write_wav(tmp_path / "x.wav", samples.squeeze()))
    expected = ((samples.astype(float) - offset) / scale).mean(axis=1).astype(np.float32)
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


@needs_real
@pytest.mark.filterwarnings("error::scipy.io.wavfile.WavFileWarning")
def test_awkward_files_decode_as_libsndfile_decodes_them_or_are_refused(monkeypatch):
    """manifest.tsv has libsndfile's verdict. Two files that it reads are refused here, as they are
    shorter than their header says, and two with float samples up to 16411.
    """
    monkeypatch.setattr(data, "FRAME", 0)  # some have 4 samples
    decoded = refused = 0
    for line in (REAL / "wav_cases" / "manifest.tsv").read_text().splitlines()[1:]:
        name, _, facts = line.split("\t")
        try:
            read_wav(REAL / "wav_cases" / name)
        except ValueError as error:
            assert name in str(error)
            refused += 1
        else:
            assert "ERR" not in facts.split("sf: ")[1], f"libsndfile refuses {name}"
            decoded += 1
    assert (decoded, refused) == (19, 13)


def test_decoded_samples_equal_libsndfiles(monkeypatch):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    monkeypatch.setattr(data, "FRAME", 0)
    folders = [Path(scipy.__file__).parent / "io" / "tests" / "data"]
    folders += [REAL / "wav_cases"] if REAL else []
    pairs = []
    for path in [path for folder in folders for path in sorted(folder.glob("*.wav"))]:
        try:
            ours = read_wav(path)
            theirs, rate = soundfile.read(path, dtype="float64", always_2d=True)
        except (ValueError, soundfile.LibsndfileError):
            continue
        up, down = 16000 // math.gcd(16000, rate), rate // math.gcd(16000, rate)
        resampled = scipy.signal.resample_poly(theirs.mean(axis=1), up, down)
        pairs.append((ours, torch.from_numpy(resampled)))
    ours, theirs = (torch.cat(side) for side in zip(*pairs))
    assert_equal_within(1e-6, f"{len(pairs)} awkward WAV files against libsndfile", ours, theirs)


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


def riff(fmt: bytes, body: bytes, first: bytes = b"") -> bytes:
    chunks = first + chunk(b"fmt ", fmt) + chunk(b"data", body)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


PCM16 = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
PCM24_IN_4 = struct.pack("<HHIIHH", 1, 1, 16000, 64000, 4, 24)
FLOAT32 = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
MULAW = struct.pack("<HHIIHH", 7, 1, 16000, 16000, 1, 8)
RATE_0 = struct.pack("<HHIIHH", 1, 1, 0, 0, 2, 16)
GOOD = riff(PCM16, bytes(2000))
UNREADABLE = "cannot be read as a WAV file"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html>Not found</html>", UNREADABLE),
        (b"ID3" + bytes(100), UNREADABLE),
        (b"\0\0\0\x20ftypM4A " + bytes(100), UNREADABLE),
        (GOOD[:-2], "Reached EOF prematurely"),
        (GOOD[:30], UNREADABLE),
        (GOOD[:4] + bytes(4) + GOOD[8:], "the recorder was cut off"),
        (GOOD[:40] + bytes(4) + GOOD[44:], "shorter than a frame of 25 ms"),
        (riff(PCM16, b""), "shorter than a frame of 25 ms"),
        (riff(PCM16, bytes(798)), "shorter than a frame of 25 ms"),
        (riff(FLOAT32, np.full(500, np.nan, np.float32).tobytes()), "not finite"),
        (riff(FLOAT32, np.full(500, -8.5, np.float32).tobytes()), "up to 8.5, expected 1"),
        (riff(PCM24_IN_4, bytes(2000)), "24 bits in 4 bytes a sample"),
        (riff(PCM24_IN_4, bytes(2000), chunk(b"note", b"fmt 24")), "24 bits in 4 bytes a sample"),
        (riff(MULAW, bytes(2000)), "MULAW"),
        (riff(RATE_0, bytes(2000)), "a sample rate of 0 Hz: its header is damaged"),
    ],
)
def test_unusable_files_are_refused_with_file_and_reason(content, reason, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_wav(path)
    assert str(path) in str(error.value) and "variable" not in str(error.value)


@pytest.mark.parametrize("comment", [b"fmt ", b"the fmt is fine!", b"fmt \x18\0\0\0"])
def test_a_comment_before_the_format_refuses_no_good_file(tmp_path, comment):
    (tmp_path / "x.wav").write_bytes(riff(PCM16, noise(500).tobytes(), chunk(b"LIST", comment)))
    assert torch.equal(read_wav(tmp_path / "x.wav"), torch.from_numpy(noise(500)) / 32768)


@pytest.mark.parametrize("n_samples", [400, 559, 560, 160000, 192000])
def test_a_spectrogram_is_the_official_one_of_10_s(n_samples):
    """Log-mel, padded, then normalised (YuanGongND/ast, src/dataloader.py)."""
    torch.manual_seed(n_samples)
    wave = torch.rand(n_samples) * 2 - 1
    expected = plain.network_input(plain.mel_frames(wave[:160000]))
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
    assert len(windows) == 2


def test_the_random_order_is_drawn_first_the_places_then_the_order():
    torch.manual_seed(5)
    u, order = torch.rand(7), torch.randperm(7)
    torch.manual_seed(5)
    pairs = list(RandomOrder(7))
    assert pairs == list(zip(order.tolist(), u.tolist())) and len(RandomOrder(7)) == 7


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


def test_specaug_may_mask_everything_but_not_more():
    SpecAug(1024, 128)
    for wrong in ((-1, 0), (0, -1), (0, 129), (1025, 0)):
        with pytest.raises(ValueError, match="SpecAug"):
            SpecAug(*wrong)


def test_specaug_stays_on_the_device_of_its_input():
    """PyTorch's meta device, which computes shapes only, stands for a GPU."""
    assert SpecAug(80, 80)(torch.empty(2, 1024, 128, device="meta")).device.type == "meta"


def zip_of(*names: str, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, content or riff(PCM16, noise(500).tobytes()))
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


def test_a_development_machine_is_fetched_verified_and_unpacked(
    server, monkeypatch, tmp_path, capsys
):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    data.main(["--machine", "fan", "--data", str(tmp_path)])
    assert f"{tmp_path}/fan: training clips 1, test clips 1" in capsys.readouterr().out
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


FAULTS = ["no answer", "nonsense", "length", "chunked and cut", "cut", "nothing"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_is_whole_or_not_there(server, monkeypatch, tmp_path, fault):
    """Also where no checksum would tell, as for the ground truth."""
    server.files["/labels.csv"], server.fault = b"section_00_0000.wav,1\n", fault
    url = f"http://127.0.0.1:{server.server_port}/labels.csv"
    with pytest.raises(OSError, match=r"cannot download .* and put the file at") as found:
        data.download(url, tmp_path / "fan" / "labels.csv")
    assert "\n" not in str(found.value) and tree(tmp_path) == []
    server.fault = None
    data.download(url, tmp_path / "fan" / "labels.csv")
    assert (tmp_path / "fan" / "labels.csv").read_bytes() == server.files["/labels.csv"]


@pytest.mark.parametrize("fault", ["web page", "by hand"])
def test_a_wrong_checksum_is_refused_and_no_folder_appears(server, monkeypatch, tmp_path, fault):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    if fault == "web page":
        server.files["/zenodo/7882613/files/dev_fan.zip"] = b"<!doctype html>"
    else:
        (tmp_path / "fan.part").mkdir()
        (tmp_path / "fan.part" / "dev_fan.zip").write_bytes(b"another file")
    with pytest.raises(ValueError, match=r"dev_fan\.zip has a wrong md5: delete it"):
        data.fetch("fan", tmp_path)
    assert tree(tmp_path) == ["fan.part/dev_fan.zip"]


def test_there_is_an_archive_with_a_checksum_for_every_machine():
    names = {f"dev_{m}" for m in data.DEV}
    names |= {f"eval_data_{m}_{split}" for m in data.EVAL for split in ("train", "test")}
    assert names == set(data.ARCHIVE_MD5) and len(names) == 21


def test_a_download_killed_at_random_moments_ends_with_the_same_bytes(
    server, monkeypatch, tmp_path
):
    """kill -9 while 600 KB arrive and are unpacked, six times; then once more, to the end."""
    names = [f"fan/{split}/{i}.wav" for split in ("train", "test") for i in range(20)]
    content = riff(PCM16, noise(7500).tobytes())
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*names, content=content))
    server.delay, rng = 0.01, random.Random(1)
    command = (data.main, ["--machine", "fan", "--data", str(tmp_path)])
    ends = [in_a_process(*command, kill_after=rng.uniform(0.02, 0.3)) for _ in range(6)]
    assert ends.count(-signal.SIGKILL) >= 4
    server.delay = 0
    assert in_a_process(*command) == 0
    found = [name for name in tree(tmp_path) if not name.endswith(".part")]
    assert found == sorted(names)
    assert all((tmp_path / name).read_bytes() == content for name in names)
