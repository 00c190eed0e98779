"""data.py: names, WAV files, the front end, windows, SpecAug, and fetching."""

import io
import random
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import plain
import pytest
import scipy
import torch
import torchaudio
from conftest import REAL, assert_equal_within, in_a_process, needs_real, serve
from scipy.io import wavfile

import data
from data import (
    AllWindows,
    RandomWindows,
    SpecAug,
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
        ("section_00_source_test_normal_0001_x.WAV", "source", False, "x"),
        ("section_00_0000.wav", None, None, ""),
        ("Pumpe 3, links.wav", None, None, ""),
        ("section_00_source_test_normal_40_a.wav", None, None, ""),
    ],
)
def test_labels_come_from_the_name(name, domain, is_anomaly, attributes):
    path = Path("d", "fan", "test", name)
    assert parse_clip(str(path)) == (path, "fan", "test", domain, is_anomaly, attributes)


def test_clips_are_listed_sorted_whatever_the_case_of_wav_and_without_hidden_files(tmp_path):
    for name in ("b.WAV", "a.wav", "._a.wav", "notes.txt", "c.flac"):
        write_wav(tmp_path / "pump" / "train" / name, noise(500))
    assert [clip.path.name for clip in list_clips(tmp_path, "pump", "train")] == ["a.wav", "b.WAV"]
    with pytest.raises(FileNotFoundError, match=r"no WAV file in .*pump/test"):
        list_clips(tmp_path, "pump", "test")


def test_an_anomaly_among_the_training_clips_is_refused(tmp_path):
    write_wav(tmp_path / "fan" / "train" / "section_00_source_train_anomaly_0000_x.wav", noise(500))
    with pytest.raises(ValueError, match="has anomalies by their names"):
        list_clips(tmp_path, "fan", "train")


def test_machine_names_expand_groups_once():
    assert machine_names(["dev"]) == data.DEV and len(machine_names(["all", "fan", "pump"])) == 15


def expected_decoding(samples: np.ndarray, rate: int) -> torch.Tensor:
    """(n, channels) in [-1, 1] -> what read_wav must give."""
    mono = torch.from_numpy(samples.mean(axis=1).astype(np.float32))
    return torchaudio.functional.resample(mono, rate, 16000)


FORMATS = [(np.uint8, 128, 2**7), (np.int16, 0, 2**15), (np.int32, 0, 2**31),
           (np.int64, 0, 2**63), (np.float32, 0, 1), (np.float64, 0, 1)]  # fmt: skip


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "offset", "scale"), FORMATS)
def test_every_sample_format_rate_and_channel_count(dtype, offset, scale, channels, rate, tmp_path):
    x = np.random.default_rng(1).uniform(-0.9, 0.9, (3000, channels))
    samples = (x * scale + offset).astype(dtype)
    wave = read_wav(write_wav(tmp_path / "x.wav", samples.squeeze(), rate))
    expected = expected_decoding((samples.astype(float) - offset) / scale, rate)
    assert wave.dtype == torch.float32
    torch.testing.assert_close(wave, expected, atol=1e-6, rtol=0)


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
        pairs.append((ours, expected_decoding(theirs, rate)))
    ours, theirs = (torch.cat(side) for side in zip(*pairs))
    assert_equal_within(1e-6, f"{len(pairs)} awkward WAV files against libsndfile", ours, theirs)


def riff(fmt: bytes, body: bytes) -> bytes:
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(body))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(body)) + b"WAVE" + chunks + body


PCM16 = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
PCM24_IN_4 = struct.pack("<HHIIHH", 1, 1, 16000, 64000, 4, 24)
FLOAT32 = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
MULAW = struct.pack("<HHIIHH", 7, 1, 16000, 16000, 1, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no WAV file that can be read"),
        (b"<!doctype html><html>Not found</html>", "is no WAV file that can be read"),
        (b"ID3" + bytes(100), "is no WAV file that can be read"),
        (riff(PCM16, bytes(2000))[:-2], "Reached EOF prematurely"),
        (riff(PCM16, bytes(2000))[:30], "is no WAV file that can be read"),
        (riff(PCM16, bytes(798)), "shorter than a frame of 25 ms"),
        (riff(FLOAT32, np.full(500, np.nan, np.float32).tobytes()), "not finite"),
        (riff(FLOAT32, np.full(500, -8.5, np.float32).tobytes()), "up to 8.5, not 1"),
        (riff(PCM24_IN_4, bytes(2000)), "24 bits a sample in 4 bytes"),
        (riff(MULAW, bytes(2000)), "MULAW"),
    ],
)
def test_unusable_files_are_refused_with_file_and_reason(content, reason, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_wav(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("n_samples", [400, 559, 560, 160000, 164080, 192000])
def test_a_spectrogram_is_the_official_one(n_samples):
    """Log-mel, padded or cut, then normalised (YuanGongND/ast, src/dataloader.py)."""
    torch.manual_seed(n_samples)
    wave = torch.rand(n_samples) * 2 - 1
    expected = plain.network_input(plain.mel_frames(wave)[:1024])
    assert torch.equal(spectrogram(wave), expected)


@pytest.mark.parametrize("n_samples", [400, 160000, 163920, 164080, 164240, 192000, 800000])
def test_windows_cover_a_long_clip_evenly(n_samples):
    starts, n_frames = window_starts(n_samples), 1 + (n_samples - 400) // 160
    assert starts[0] == 0 and all(start % 160 == 0 for start in starts)
    assert len(starts) == max(1, -(-n_frames // 1024))
    if len(starts) > 1:
        assert starts[-1] == (n_frames - 1024) * 160
        assert max(np.diff(starts)) <= 1024 * 160 and np.ptp(np.diff(starts)) <= 160


def clip_of(folder: Path, n_samples: int, rate: int = 16000) -> data.Clip:
    path = folder / "pump" / "train" / f"{n_samples}.wav"
    return parse_clip(write_wav(path, noise(n_samples), rate))


def test_random_windows_are_drawn_from_all_places_on_the_hop(tmp_path):
    """12 s have 174 frames beyond a window: u in [0, 1) chooses among 175; a frame has none."""
    clip, short = clip_of(tmp_path, 192000), clip_of(tmp_path, 400)
    wave = read_wav(clip.path)
    for u, frame in [(0.0, 0), (0.5, 87), (1 - 1e-7, 174), (174 / 175 - 1e-4, 173)]:
        x, label = RandomWindows([short, clip], [5, 7], torch.tensor([0.9, u]))[1]
        assert label == 7 and torch.equal(x, spectrogram(wave, frame * 160))
    x, _ = RandomWindows([short], [0], torch.tensor([0.99]))[0]
    assert torch.equal(x, spectrogram(read_wav(short.path)))


def test_all_windows_of_a_clip(tmp_path):
    clip = clip_of(tmp_path, 96000, rate=8000)  # 12 s
    x, starts = AllWindows([clip])[0]
    wave = read_wav(clip.path)
    assert starts == [0, 174 * 160]
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


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "last.pt").write_text("old")
    with pytest.raises(OSError), data.whole_file(tmp_path / "last.pt", "w") as file:
        file.write("half of the ne")
        raise OSError(28, "No space left on device")
    assert tree(tmp_path) == ["last.pt"] and (tmp_path / "last.pt").read_text() == "old"


def test_a_development_machine_is_fetched_verified_and_unpacked(
    server, monkeypatch, tmp_path, capsys
):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    data.main(["--machine", "fan", "--data", str(tmp_path)])
    assert "1 training clips, 1 test clips" in capsys.readouterr().out
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


@pytest.mark.parametrize("fault", ["cut", "web page", "by hand"])
def test_a_wrong_checksum_is_refused_and_no_folder_appears(server, monkeypatch, tmp_path, fault):
    serve(server, monkeypatch, 7882613, "dev_fan", zip_of(*CLIPS))
    if fault == "cut":
        server.cut_at = 100
    elif fault == "web page":
        server.files["/zenodo/7882613/files/dev_fan.zip"] = b"<!doctype html>"
    else:
        (tmp_path / "fan.part").mkdir()
        (tmp_path / "fan.part" / "dev_fan.zip").write_bytes(b"another file")
    with pytest.raises(ValueError, match=r"dev_fan\.zip has another md5: delete it"):
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
