"""From WAV files to what the network sees, and what the names of the files tell.

In DCASE2023 Task 2 a clip is called, for example,
fan/test/section_00_target_test_anomaly_0022_m-n_W.wav:

    machine     a type of machine, fan: a folder with the folders train and test
    section     a subset of its clips; in 2023 each machine has one, 00
    domain      source, the usual conditions, has 990 training clips of a machine; target, changed
                conditions, has 10. Test clips come from both; scoring must not know which.
    attributes  how it ran and was recorded, m-n_W: its speed, its load, the microphone, ...

All training clips are normal. The test clips of seven machines (dev) are called normal or anomaly;
those of seven others (eval) are only numbered. How a clip reaches the network:

    wave          (n_samples,)     mono, 16 kHz, in [-1, 1]
    log-mel       (n_frames, 128)  X[t, m] = ln max(ε, Σ_f |FFT(frame t)[f]|² M[f, m])
    spectrogram   (1024, 128)      (X + 4.268) / 9.138, X padded with zeros or one window of it
    SpecAug       (1024, 128)      in training a random stripe of time and one of frequency are 0

Frame t is the 25 ms from t · 10 ms on, without its mean, pre-emphasised and tapered. M holds
triangular filters, evenly spaced on the mel scale; ε is 1.2e-7. A clip of more than 1024 frames
(10.255 s) has several windows: training takes a random one in each epoch, scoring all it needs to
cover the clip.

    python data.py --machine fan        # fetches a machine of DCASE2023 Task 2
"""

import io
import math
import re
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchaudio.compliance.kaldi import fbank
from torchaudio.functional import resample

SAMPLE_RATE = 16000
FRAME, HOP = 400, 160  # samples: a frame of 25 ms every 10 ms
N_FRAMES, N_MELS = 1024, 128  # what the AST takes
WINDOW = FRAME + (N_FRAMES - 1) * HOP  # 164,080 samples, 10.255 s: exactly 1024 frames
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values, from AST's own training


class Clip(NamedTuple):
    """A WAV file and what its name tells. What it does not tell is None, attributes ''."""

    path: Path
    machine: str
    split: str  # "train" or "test"
    domain: str | None  # "source" or "target"
    is_anomaly: bool | None
    attributes: str  # "m-n_W"; the classes of training are the pairs (machine, attributes)


CLIP_NAME = r"section_\d\d_(source|target)_(?:train|test)_(normal|anomaly)_\d{4}_?(.*)\.(?i:wav)"


def parse_clip(path: str | Path) -> Clip:
    """Read <machine>/<split>/<name>. A name of another form, such as section_00_0000.wav of the
    eval machines or that of your own recording, tells nothing.
    """
    path = Path(path)
    match = re.fullmatch(CLIP_NAME, path.name)
    domain, label, attributes = match.groups() if match else (None, None, "")
    is_anomaly = {"normal": False, "anomaly": True}.get(label)
    return Clip(path, path.parent.parent.name, path.parent.name, domain, is_anomaly, attributes)


def read_wav(path: str | Path) -> Tensor:
    """Any WAV file as mono 16 kHz in [-1, 1]: (n_samples,) float32. ValueError: see decode."""
    return resample(*decode(path), SAMPLE_RATE)


def decode(path: str | Path) -> tuple[Tensor, int]:
    """A WAV file at its own rate: mono, (n,) float32 in [-1, 1], and the rate in Hz.

    The scale matters: with samples of int16 as they are, every log-mel value would be too large
    by ln(32768²) = 20.8, and the results would still look plausible.
    ValueError, naming file and reason: not a WAV file that scipy reads right, truncated, not
    finite, of another scale, shorter than a frame.
    """
    try:
        content = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # unknown chunks are fine
            warnings.filterwarnings("error", "Reached EOF")  # but a truncated file is an error
            rate, samples = wavfile.read(io.BytesIO(content))
        seconds = len(samples) / rate
        fmt = content.index(b"fmt ") + 8
        channels, block_bytes, bits = struct.unpack_from("<2xH8xHH", content, fmt)
        # Such as 24 bits in 4 bytes: scipy takes them for 32.
        if content[:4] == b"RIFF" and 8 * block_bytes != channels * bits:
            raise ValueError(f"{bits} bits a sample in {block_bytes // channels} bytes")
    except Exception as error:  # scipy raises many kinds where a header is damaged
        raise ValueError(f"{path} is no WAV file that can be read: {error}") from error

    zero = 128 if samples.dtype.kind == "u" else 0  # samples of 8 bits are unsigned
    full_scale = 1 if samples.dtype.kind == "f" else 2 ** (8 * samples.itemsize - 1)
    samples = (samples.astype(np.float32) - zero) / full_scale
    if samples.ndim == 2:
        samples = samples.mean(axis=1)  # over the channels

    if seconds < FRAME / SAMPLE_RATE:
        raise ValueError(f"{path} is shorter than a frame of 25 ms")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} has samples that are not finite (NaN or infinity)")
    if (peak := np.abs(samples).max()) > 8:  # a little over 1 is normal
        raise ValueError(f"{path} has samples up to {peak:g}, not 1; divide by their full scale")
    return torch.from_numpy(samples), rate


def spectrogram(wave: Tensor, start: int = 0) -> Tensor:
    """The AST's input from a wave, from sample `start` on: (n_samples,) -> (1024, 128).

    Log-mel by the same call as in AST's own loader (YuanGongND/ast, src/dataloader.py). The loader
    also subtracts the mean of the whole wave, which changes nothing: each frame loses its own.
    """
    window = wave[start : start + WINDOW]
    x = fbank(
        window[None],
        sample_frequency=SAMPLE_RATE,
        frame_length=25,  # ms
        frame_shift=10,
        num_mel_bins=N_MELS,
        window_type="hanning",
        htk_compat=True,
        use_energy=False,
        dither=0.0,
    )  # (n_frames, 128)
    x = pad(x, (0, 0, 0, N_FRAMES - len(x)))  # before normalising, so the padding becomes 0.467
    # AudioSet's mean becomes 0, its standard deviation 1/2. The 2 is AST's own.
    return (x - MEAN) / (2 * STD)


# What training and scoring take from a clip


def frames_beyond_a_window(n_samples: int) -> int:
    """How many more frames a clip has than a window: 0 for 10 s, 174 for 12 s."""
    return max(0, 1 + (n_samples - FRAME) // HOP - N_FRAMES)


class RandomWindows(Dataset):
    """For training: dataset[i] is a random window of clip i, (1024, 128), and the clip's class.

    u (n_clips,) says where each clip's window lies: 0 is the first place, almost 1 the last.
    """

    def __init__(self, clips: list[Clip], labels: list[int], u: Tensor):
        self.clips, self.labels, self.u = clips, labels, u

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        wave = read_wav(self.clips[i].path)
        first_frame = int(self.u[i] * (frames_beyond_a_window(len(wave)) + 1))
        return spectrogram(wave, first_frame * HOP), self.labels[i]


class AllWindows(Dataset):
    """For scoring: dataset[i] is all windows of clip i, (n, 1024, 128), and where each starts, in
    samples.
    """

    def __init__(self, clips: list[Clip]):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> tuple[Tensor, list[int]]:
        wave = read_wav(self.clips[i].path)
        starts = window_starts(len(wave))
        return torch.stack([spectrogram(wave, start) for start in starts]), starts


def window_starts(n_samples: int) -> list[int]:
    """Where a clip's windows begin, in samples: as few as cover it, evenly spaced."""
    last = frames_beyond_a_window(n_samples)  # the first frame of the last window
    count = 1 + math.ceil(last / N_FRAMES)
    return [round(frame) * HOP for frame in np.linspace(0, last, count)]


class SpecAug:
    """SpecAugment's two masks (Park et al. 2019, arXiv 1904.08779, section 2), without its warping.

    x (B, T, F) -> (B, T, F). In each of the B spectrograms w frames from t₀ on, and v bins
    from f₀ on, become 0, which is AudioSet's mean. w is uniform on {0..time_mask}, t₀ on {0..T-w};
    likewise v and f₀.
    ValueError: a mask wider than 1024 frames or 128 bins, or negative.
    """

    def __init__(self, time_mask: int, freq_mask: int):
        if not 0 <= time_mask <= N_FRAMES or not 0 <= freq_mask <= N_MELS:
            raise ValueError(f"SpecAug masks are 0 to {N_FRAMES} frames, 0 to {N_MELS} bins wide")
        self.time_mask, self.freq_mask = time_mask, freq_mask

    def __call__(self, x: Tensor) -> Tensor:
        B, T, F = x.shape
        in_time = stripes(B, T, self.time_mask, x.device)  # (B, T)
        in_freq = stripes(B, F, self.freq_mask, x.device)  # (B, F)
        return x.masked_fill(in_time[:, :, None] | in_freq[:, None, :], 0)


def stripes(B: int, size: int, max_width: int, device: torch.device) -> Tensor:
    """In each of B rows one stripe of True, of random width and place: (B, size) bool."""
    width = torch.randint(max_width + 1, (B, 1), device=device)
    start = (torch.rand(B, 1, device=device) * (size - width + 1)).long()
    position = torch.arange(size, device=device)
    return (start <= position) & (position < start + width)


# ---------------------------------------------- plumbing: not needed to follow the method

import argparse
import csv
import hashlib
import shutil
import sys
import urllib.request
import zipfile
from contextlib import contextmanager

from tqdm import tqdm

DEV = ["ToyCar", "ToyTrain", "bearing", "fan", "gearbox", "slider", "valve"]
EVAL = ["ToyDrone", "ToyNscale", "ToyTank", "Vacuum", "bandsaw", "grinder", "shaker"]


def machine_names(names: list[str]) -> list[str]:
    """The machines meant by --machine, each once: dev, eval and all are groups of them."""
    machines = []
    for name in names:
        machines += {"dev": DEV, "eval": EVAL, "all": DEV + EVAL}.get(name, [name])
    return list(dict.fromkeys(machines))


def list_clips(root: str | Path, machine: str, split: str) -> list[Clip]:
    """The clips in root/machine/split, sorted by name; "._x.wav" and the like are left out.

    FileNotFoundError: there is none. ValueError: an anomaly for training.
    """
    folder = Path(root) / machine / split
    clips = [parse_clip(path) for path in sorted(folder.glob("[!.]*.[wW][aA][vV]"))]
    if not clips:
        raise FileNotFoundError(f"no WAV file in {folder}")
    if split == "train" and any(clip.is_anomaly for clip in clips):
        raise ValueError(f"{folder} has anomalies by their names; train on normal clips only")
    return clips


# What the commands share

# What args.json holds and no result depends on, except with --dropout on micro_batch. The kind of
# device does count, as `precision`.
CIRCUMSTANCES = "run data weights workers device compile micro_batch versions hardware args".split()


def setting(record: dict) -> dict:
    """Of what args.json holds, all that a result depends on: {"rank": 64, "classes": ..., ...}."""
    return {k: v for k, v in (record | record["args"]).items() if k not in CIRCUMSTANCES}


@contextmanager
def one_line_errors():
    """What a user can mend ends in one line on standard error, as does Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command again continues with what has been saved")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = lines[-1] if "Traceback" in str(error) else lines[0]  # that of a reading process
        sys.exit(f"{Path(sys.argv[0]).name}: error: {reason}")


@contextmanager
def whole_file(path: Path, mode: str = "wb", **options):
    """A file to write to; it takes the place of `path` when it is complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open(mode, **options) as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path: Path, rows: list) -> None:
    """Adds no header, and ends lines with \\n, as the challenge wants it."""
    with whole_file(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The checksum of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# Fetching the challenge's data

ZENODO = "https://zenodo.org/records"
EVALUATOR = "https://raw.githubusercontent.com/nttcslab/dcase2023_task2_evaluator"
GROUND_TRUTH = f"{EVALUATOR}/3aa8a9fe09a9a55d9dccb74fd4f17ba9791fb5ea"
ARCHIVE_MD5 = {
    "dev_ToyCar": "4e3bf15f4101ed4ed4f1fecde2e2b2a3",
    "dev_ToyTrain": "6b02a6c65eebb3b8b1ae59a6b25bb897",
    "dev_bearing": "8a813bc8d8f156b5395bfccdfac7673c",
    "dev_fan": "9348591e96fb0ad499a1e33b082562fc",
    "dev_gearbox": "b6e55f6a31faa0fc8569ec0afdd53ccf",
    "dev_slider": "b3f8dee36b4718c36d659a4fd1c4afe0",
    "dev_valve": "b2051a2022eadb53cd97581120811cae",
    "eval_data_ToyDrone_test": "fdae7b8d1f4cadb2bea88bc93e2367db",
    "eval_data_ToyDrone_train": "7fea367d1384a1521ae24f72203238de",
    "eval_data_ToyNscale_test": "62f5f5043d8fb3a305b1c2e1025872de",
    "eval_data_ToyNscale_train": "9332822f3e47afd984c01f2ecb5ca3af",
    "eval_data_ToyTank_test": "f5639bf58c47169c622751f19c6fc321",
    "eval_data_ToyTank_train": "b1fd3ab7de7561290df2d477de1c9d33",
    "eval_data_Vacuum_test": "a32524fd8c45b574a560685b38acc4e1",
    "eval_data_Vacuum_train": "1c8de33d9a8c7850a1f7aaddb97d87be",
    "eval_data_bandsaw_test": "2a8e8f39f6584ab366a8f4da52d4d7a6",
    "eval_data_bandsaw_train": "9274dfe63de028743823f1123f8b4b47",
    "eval_data_grinder_test": "631b3e1608b6077772829a6e68c82c77",
    "eval_data_grinder_train": "17569c1f9df23621a0dbabc430684a35",
    "eval_data_shaker_test": "ba98c98caa96051ec80e24e44b8fca56",
    "eval_data_shaker_train": "35f821b5645b731fb5a1750e33b95fc3",
}
AGENT = "asd-lora/1.0 (https://arxiv.org/abs/2409.07016)"  # Zenodo refuses those of libraries


def fetch(machine: str, root: str | Path) -> None:
    """Download, verify and unpack a machine of DCASE2023 (0.4 GB), unless its folder is there.

    All happens in <machine>.part; <machine> appears when it is whole. That of an eval machine also
    gets the ground truth, which the names of its clips do not tell. Errors: see download.
    """
    root = Path(root)
    if (root / machine).exists() or machine not in DEV + EVAL:
        return
    part = root / f"{machine}.part"
    if machine in DEV:
        archives = {f"dev_{machine}": 7882613}  # name: Zenodo's record
    else:
        archives = {f"eval_data_{machine}_train": 7830345, f"eval_data_{machine}_test": 7860847}
    for name, record in archives.items():
        url, path = f"{ZENODO}/{record}/files/{name}.zip?download=1", part / f"{name}.zip"
        download(url, path, "md5", ARCHIVE_MD5[name])
        zipfile.ZipFile(path).extractall(part)  # <machine>/{train,test}/*.wav
    if machine in EVAL:
        truth = f"ground_truth_{machine}_section_00_test.csv"
        download(f"{GROUND_TRUTH}/ground_truth_data/{truth}", part / machine / "labels.csv")
        download(f"{GROUND_TRUTH}/ground_truth_domain/{truth}", part / machine / "domains.csv")
    (part / machine).rename(root / machine)
    shutil.rmtree(part)


def download(url: str, path: Path, algorithm: str = "", digest: str = "") -> None:
    """Fetch `url` to `path`, unless it is there, and verify its checksum where one is given.
    OSError: no network, or the server refuses. ValueError: another checksum.
    """
    by_hand = f"open {url} in a browser and put the file at {path}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": AGENT})
        try:
            with urllib.request.urlopen(request, timeout=60) as response, whole_file(path) as file:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(file, "write", size, desc=path.name, disable=None) as target:
                    shutil.copyfileobj(response, target)
        except OSError as error:
            raise OSError(f"cannot fetch {url} ({error}): try again, or {by_hand}") from error
    if digest and file_digest(path, algorithm) != digest:
        raise ValueError(f"{path} has another {algorithm}: delete it; try again, or {by_hand}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch and verify machines of DCASE2023 Task 2.")
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--data", default="data", metavar="DIR", help="the folder for them (%(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors():
        for machine in machine_names(args.machine):
            fetch(machine, args.data)
            train, test = (len(list_clips(args.data, machine, s)) for s in ("train", "test"))
            print(f"{args.data}/{machine}: {train} training clips, {test} test clips")


if __name__ == "__main__":
    main()
