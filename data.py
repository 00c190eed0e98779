"""From WAV files to the spectrograms that the network sees.

In DCASE2023 Task 2 a clip is called, for example,
fan/test/section_00_target_test_anomaly_0022_m-n_W.wav. From left to right:

    machine     one folder per machine type, with subfolders train and test
    section     a subset of the machine's clips; in 2023 there is only section 00
    domain      source (usual recording conditions) or target (changed conditions). Only 10 of
                1,000 training clips are target. The rules forbid using a test clip's domain.
    attributes  m-n_W, how the machine ran or was recorded: its speed, its load, the microphone

All training clips are normal. The names of test clips say normal or anomaly for seven machines (the
development set, dev), but not for the other seven (the evaluation set, eval).

A clip goes through these stages:

    wave          (n_samples,)  mono, 16 kHz, values in [-1, 1]
    window        (160000,)     10 s of it, the length that AST was trained on
    log-mel       (998, 128)    X[t, m] = ln max(ε, Σ_f |FFT(frame t)[f]|² M[f, m])
    spectrogram   (1024, 128)   (X - MEAN) / (2 STD), where X is padded with zeros
    SpecAug       (1024, 128)   in training, a random stripe of time and one of frequency are 0

Frame t covers 25 ms from t · 10 ms on; its mean is removed, and it is pre-emphasised and tapered. M
holds triangular filters that are evenly spaced on the mel scale, and ε is 1.2e-7. In a spectrogram,
0 is AudioSet's mean, so the padding is (0 - MEAN) / (2 STD) = 0.467.

From a longer clip, training draws one random window per epoch; scoring uses enough windows to cover
it. A shorter clip is played forwards, then backwards, and so on, until it fills a window.

    python data.py --machine fan        # downloads one machine of DCASE2023 Task 2
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import math
import os
import pickle
import re
import shutil
import struct
import sys
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, Sampler
from torchaudio.compliance.kaldi import fbank
from tqdm import tqdm

SAMPLE_RATE = 16000
WINDOW = 160000  # samples: the 10 s that the network sees at once
FRAME, HOP = 400, 160  # samples: fbank's frame of 25 ms every 10 ms, so 998 in a window
N_FRAMES, N_MELS = 1024, 128  # the size of AST's input
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values, from AST's own training

DEV = ["ToyCar", "ToyTrain", "bearing", "fan", "gearbox", "slider", "valve"]
EVAL = ["ToyDrone", "ToyNscale", "ToyTank", "Vacuum", "bandsaw", "grinder", "shaker"]


class InputError(ValueError):
    """An error that the user can fix: a file, a name, a setting. Printed as one line, without a
    traceback.
    """


class Clip(NamedTuple):
    """A WAV file and what its name says. Unknown values are None, unknown attributes ''."""

    path: Path
    machine: str
    split: str  # "train" or "test"
    domain: str | None  # "source" or "target"
    is_anomaly: bool | None
    attributes: str  # "m-n_W"


CLIP_NAME = r"section_\d\d_(source|target)_(?:train|test)_(normal|anomaly)_\d{4,}(?:_(.*))?\.\w+"


def parse_clip(path: str | Path) -> Clip:
    """Read <machine>/<split>/<name>. For any other name, only machine and split are filled in."""
    path = Path(path)
    domain = label = attributes = None
    if match := re.fullmatch(CLIP_NAME, path.name):
        domain, label, attributes = match.groups()
    is_anomaly = {"normal": False, "anomaly": True}.get(label)
    machine, split = path.parent.parent.name, path.parent.name
    return Clip(path, machine, split, domain, is_anomaly, attributes or "")


def list_clips(root: str | Path, machine: str, split: str) -> list[Clip]:
    """The clips in root/machine/split, sorted by name. Hidden files are left out.

    Raises FileNotFoundError if there are none, and InputError for an anomaly in train, for a near
    miss of the challenge's naming scheme, and for mixed sections.
    """
    folder = Path(root) / machine / split
    paths = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() == ".wav"]
    if not paths:
        raise FileNotFoundError(f"no WAV files in {folder}: {what_is_there(folder)}")
    clips = [parse_clip(path) for path in paths]
    for clip in clips:
        if split == "train" and clip.is_anomaly:
            raise InputError(f"{clip.path} is named as an anomaly; training data must be normal")
        looks_official = re.match(r"section_\d+_(source|target)_", clip.path.name)
        if looks_official and clip.domain is None:  # a typo would silently drop the attributes
            right = f"section_00_source_{split}_normal_0001_speed-2.wav"
            raise InputError(f"{clip.path} does not match the form of {right}; rename it")
    sections = {path.name[:10] for path in paths if re.match(r"section_\d\d_", path.name)}
    if len(sections) > 1:
        raise InputError(f"{folder} mixes {len(sections)} sections; give each its own folder")
    return clips


def read_wav(path: str | Path) -> Tensor:
    """Read a WAV file of any rate as mono, 16 kHz, in [-1, 1]: (n_samples,) float32.

    Only the first channel is used. It is the near microphone in DCASE2026 Task 2, and a mean would
    cancel channels of opposite phase. Raises InputError, naming file and reason, if the file
    cannot be read correctly.
    """
    try:
        rate, samples = decode_wav(Path(path).read_bytes())  # (n_samples, channels)
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    wave = to_float(samples[:, 0])
    divisor = math.gcd(SAMPLE_RATE, rate)
    return torch.from_numpy(resample_poly(wave, SAMPLE_RATE // divisor, rate // divisor))


def to_float(samples: np.ndarray) -> np.ndarray:
    """Samples of any WAV format -> float32 in [-1, 1].

    The scale matters: with int16 samples left as they are, every log-mel value would be too large
    by ln(32768²) = 20.8, and the results would still look plausible.
    """
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    if samples.dtype == np.uint8:  # 8-bit WAV is unsigned, with silence at 128
        return (samples.astype(np.float32) - 128) / 128
    full_scale = 2 ** (8 * samples.itemsize - 1)
    return samples.astype(np.float32) / full_scale


def spectrogram(wave: Tensor, start: int = 0) -> Tensor:
    """AST's input for the window starting at sample `start`: (n_samples,) -> (1024, 128).

    Log-mel by the same call as in AST's own loader (YuanGongND/ast, src/dataloader.py). The loader
    also subtracts the mean of the whole wave, which makes no difference, since fbank removes the
    mean of each frame. Frames of 25 ms every 10 ms are fbank's default.
    """
    window = wave[start : start + WINDOW]
    if len(window) < WINDOW:  # a short clip: forwards, then backwards, without a click
        there_and_back = torch.cat([window, window.flip(0)])
        window = there_and_back.repeat(math.ceil(WINDOW / len(there_and_back)))[:WINDOW]
    options = {"window_type": "hanning", "htk_compat": True, "use_energy": False, "dither": 0.0}
    x = fbank(window[None], sample_frequency=SAMPLE_RATE, num_mel_bins=N_MELS, **options)
    x = pad(x, (0, 0, 0, N_FRAMES - len(x)))  # 998 -> 1024; before normalising, as in AST's loader
    # With AST's factor of 2, AudioSet has mean 0 and standard deviation 1/2.
    return (x - MEAN) / (2 * STD)


class RandomOrder(Sampler):
    """Every clip once, in random order, as a pair (i, u): which clip, and which window of it, u in
    [0, 1). Both are drawn here, in the main process. A Dataset's draws would depend on --workers.
    """

    def __init__(self, n_clips: int):
        self.n_clips = n_clips

    def __len__(self) -> int:
        return self.n_clips

    def __iter__(self):
        u = torch.rand(self.n_clips)
        order = torch.randperm(self.n_clips)
        return zip(order.tolist(), u.tolist())


class TrainingWindows(Dataset):
    """For training: one window of a clip, (1024, 128), and the clip's class.

    Indexed by (i, u): i picks the clip; u places the window, 0 at the clip's start, almost 1 at its
    end.
    """

    def __init__(self, clips: list[Clip], labels: list[int]):
        self.clips, self.labels = clips, labels

    def __getitem__(self, item: tuple[int, float]) -> tuple[Tensor, int]:
        i, u = item
        wave = read_wav(self.clips[i].path)
        spare = max(0, len(wave) - WINDOW)  # samples
        start = int(u * (spare + 1))
        return spectrogram(wave, start), self.labels[i]


class AllWindows(Dataset):
    """For scoring: all windows of clip i, (n, 1024, 128), and their starts, in samples."""

    def __init__(self, clips: list[Clip]):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> tuple[Tensor, list[int]]:
        wave = read_wav(self.clips[i].path)
        starts = window_starts(len(wave))
        return torch.stack([spectrogram(wave, start) for start in starts]), starts


def window_starts(n_samples: int) -> list[int]:
    """Where a clip's windows start, in samples: the fewest that cover it, evenly spaced."""
    spare = max(0, n_samples - WINDOW)
    count = 1 + math.ceil(spare / WINDOW)
    return np.linspace(0, spare, count).round().astype(int).tolist()


class SpecAug(NamedTuple):
    """SpecAugment without time warping (Park et al. 2019, arXiv 1904.08779, section 2).

    x (B, T, F) -> (B, T, F). In each of the B spectrograms, w frames starting at t₀ and v mel bins
    starting at f₀ are set to 0. w is uniform on {0..time_mask} and t₀ on {0..T-w}; likewise v and
    f₀.
    """

    time_mask: int  # frames
    freq_mask: int  # mel bins

    def __call__(self, x: Tensor) -> Tensor:
        B, T, F = x.shape
        in_time = stripes(B, T, self.time_mask, x.device)  # (B, T)
        in_freq = stripes(B, F, self.freq_mask, x.device)  # (B, F)
        return x.masked_fill(in_time[:, :, None] | in_freq[:, None, :], 0)


def stripes(B: int, size: int, max_width: int, device: torch.device) -> Tensor:
    """One random stripe of True per row: (B, size) bool."""
    width = torch.randint(min(max_width, size) + 1, (B, 1), device=device)
    start = (torch.rand(B, 1, device=device) * (size - width + 1)).long()
    position = torch.arange(size, device=device)
    return (start <= position) & (position < start + width)


# ---------------------------------------------- plumbing: not needed to follow the method


def machine_names(names: list[str]) -> list[str]:
    """Expand dev, eval and all; drop duplicates."""
    machines = []
    for name in names:
        machines += {"dev": DEV, "eval": EVAL, "all": DEV + EVAL}.get(name, [name])
    return list(dict.fromkeys(machines))


def default_run(machines: list[str], kind: str = "") -> Path:
    """The default run folder; machines as on the command line."""
    return Path("runs", kind + "+".join(machines))


def what_is_there(folder: Path) -> str:
    """What the user finds where clips were expected, or in the nearest folder above."""
    while not folder.is_dir():
        folder = folder.parent
    names = [path.name + "/" * path.is_dir() for path in sorted(folder.glob("[!.]*"))]
    return f"{folder} has {shortened(names)}" if names else f"{folder} is empty"


def shortened(items: list[str]) -> str:
    """The first ten, and how many more there are."""
    rest = f", and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + rest


def decode_wav(content: bytes) -> tuple[int, np.ndarray]:
    """The sample rate in Hz, and the samples as they are stored, (n_samples, channels).

    Raises InputError, "is ..." or "has ...", if they cannot be read correctly.
    """
    rate, samples = wavfile.read(io.BytesIO(plain_wav(content)))
    return rate, samples.reshape(len(samples), -1)


def plain_wav(content: bytes) -> bytes:
    """The same WAV file, reduced to its format and complete frames of samples, since scipy fails on
    other things that recorders write. Raises InputError as decode_wav does.
    """
    if len(content) >= 2**32:
        raise InputError("has 4 GiB or more: cut it into clips")
    kind = content[:4] + content[8:12]
    if kind not in (b"RIFFWAVE", b"RIFXWAVE", b"RF64WAVE") or len(content) < 44:
        raise InputError("is empty, or not a WAV file (a renamed m4a?)")
    order = ">" if content.startswith(b"RIFX") else "<"
    chunks, position = {}, 12
    while position + 8 <= len(content):
        name, size = struct.unpack_from(f"{order}4sI", content, position)
        if name == b"data" and content.startswith(b"RF64"):
            (size,) = struct.unpack_from("<Q", content, 28)  # 64 bits, in the first chunk, ds64
        chunk = content[position + 8 : position + 8 + size]
        if name == b"data" and len(chunk) < size:
            raise InputError(f"is cut off: {size - len(chunk):,} bytes of samples are missing")
        if name == b"data" and name in chunks:
            raise InputError("has two data chunks: save it again as an ordinary WAV")
        chunks.setdefault(name, chunk)
        position += 8 + size + size % 2  # chunks start at even bytes
    fmt, samples = chunks.get(b"fmt ", b""), chunks.get(b"data", b"")
    if len(fmt) < 16:
        raise InputError("has a damaged header")

    codec, channels, rate, block, bits = struct.unpack_from(f"{order}HHI4xHH", fmt)
    if codec == 0xFFFE and len(fmt) >= 26:  # "extensible": the real codec comes later
        (codec,) = struct.unpack_from(f"{order}H", fmt, 24)
    if codec not in (1, 3):
        raise InputError(f"is compressed (WAV format {codec}): save it as PCM")
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"has a wrong sample rate: {rate} Hz is outside 1 kHz to 1 MHz")
    width = math.ceil(bits / 8)  # bytes of a sample
    usual = 1 <= channels <= 512 and width in {1: (1, 2, 3, 4, 8), 3: (4, 8)}[codec]
    if not usual or block != channels * width:
        raise InputError(f"has {channels} channels of {bits} bits in {block} bytes: save it as PCM")
    size = len(samples) - len(samples) % block
    if size < block * rate * FRAME / SAMPLE_RATE:
        raise InputError("is shorter than a frame of 25 ms, or the recorder was cut off")
    if codec == 3 or width >= 4:
        dtype = f"{order}{'i' if codec == 1 else 'f'}{width}"
        refuse_wrong_scale(np.frombuffer(samples[:size], dtype)[::channels])
    riff = b"RIFX" if order == ">" else b"RIFF"
    head = struct.pack(f"{order}4sI8s", riff, 36 + size, b"WAVEfmt ")
    head += struct.pack(f"{order}IHHIIHH", 16, codec, channels, rate, rate * block, block, bits)
    return head + struct.pack(f"{order}4sI", b"data", size) + samples[:size]


def refuse_wrong_scale(values: np.ndarray) -> None:
    """Refuse floating-point numbers, or integers of 32 bits and more, that are not full scale."""
    peak, bits = max(float(values.max()), -float(values.min())), 8 * values.itemsize
    if not math.isfinite(peak):
        raise InputError("has samples that are not finite (NaN or infinity)")
    if values.dtype.kind == "f" and peak > 8:  # a little over 1 is normal
        raise InputError(f"peaks at {peak:g}; floating-point samples should lie within ±1")
    # Below 1/256 of full scale, though the lowest 8 bits are used.
    if values.dtype.kind == "i" and peak < 2 ** (bits - 9) and (values & 0xFF).any():
        raise InputError(f"has 16- or 24-bit numbers in {bits} bits: shift them to full scale")


# What the command lines have in common


def add_machine(parser: argparse.ArgumentParser) -> None:
    options = {"nargs": "+", "required": True, "metavar": "NAME", "type": machine_name}
    text = "folders in --data, or DCASE2023 machines, which are fetched, or dev, eval, all"
    parser.add_argument("--machine", help=text, **options)


def machine_name(text: str) -> str:
    """argparse type: a folder name. A slash at its end is ignored."""
    name = text.rstrip("/")
    if "/" in name or name in ("", ".", ".."):
        right = "for data/hall1/pump2 write --data data/hall1 --machine pump2"
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder name: {right}")
    return name


def at_least(least: int | float):
    """argparse type: a finite number >= least, an integer if `least` is one."""

    def number(text: str) -> int | float:
        value = type(least)(text)
        if not least <= value < math.inf:
            raise ValueError
        return value

    number.__name__ = f"number >= {least:g}"  # for argparse's message
    return number


positive, above_zero = at_least(1), at_least(1e-12)


@contextlib.contextmanager
def one_line_errors():
    """Print errors that the user can fix as one line; keep the traceback of all others."""
    # File names that the terminal cannot show are printed with escapes.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: run the same command again to continue")
    except (InputError, OSError, ImportError) as error:
        message = str(error).strip()
        if "\nOriginal Traceback" in message:  # from a process that reads WAV files
            message = message.split("\n")[-1].split(": ", 1)[1]  # without the error's class
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):
            raise
        reason = "a process that reads WAV files died or got stuck (memory?)"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {reason}: try --workers 0")


# Files and folders


@contextlib.contextmanager
def sole_use(folder: Path):
    """Make a folder, and keep other commands out of it until this one ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another command is working in {folder}") from error
        except OSError:
            pass  # a file system without locks
        os.register_at_fork(after_in_child=lock.close)  # only this process holds it
        yield


def write(path: Path, content: bytes) -> None:
    """Write atomically."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def write_csv(path: Path, rows) -> None:
    """Lines end in \\n, as in the challenge."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def save(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load(path: Path, *keys: str) -> dict:
    """Load what `save` wrote, with these keys, without executing anything in it."""
    buffer = io.BytesIO(Path(path).read_bytes())
    foreign = f"{path} was not written by this program"
    try:
        content = torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's own message suggests to load it unsafely
        raise InputError(foreign) from error
    except Exception as error:  # of many kinds, and not always the file's fault
        raise InputError(f"{path} cannot be loaded: {error!r}".split("\n")[0]) from error
    if not set(keys) <= set(content):
        raise InputError(foreign)
    return content


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The checksum of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# Downloading the challenge's data

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
AGENT = "asd-lora/1.0 (https://arxiv.org/abs/2409.07016)"  # Zenodo rejects urllib's default


def fetch_missing(machines: list[str], root: str | Path) -> None:
    """Fetch the machines of DCASE2023. Your own come first: they fail before any download."""
    for machine in sorted(machines, key=lambda machine: machine in DEV + EVAL):
        fetch(machine, root)
        list_clips(root, machine, "train")


def fetch(machine: str, root: str | Path) -> None:
    """Download, verify and unpack a machine of DCASE2023 (0.4 GB), unless its folder exists.

    Unpacks into <machine>.part and renames it when it is complete. Eval file names carry no labels,
    so those are downloaded too.
    """
    root = Path(root)
    if (root / machine).exists() or machine not in DEV + EVAL:
        return
    print(f"fetching the challenge's {machine} into {root / machine}")
    part = root / f"{machine}.part"
    if machine in DEV:
        archives = {f"dev_{machine}": 7882613}  # name: Zenodo's record
    else:
        archives = {f"eval_data_{machine}_train": 7830345, f"eval_data_{machine}_test": 7860847}
    with sole_use(part):
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
    """Download `url` to `path`, unless it exists, and verify its checksum where one is given."""
    by_hand = f"open {url} in a browser and put the file at {path}"
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        request = urllib.request.Request(url, headers={"User-Agent": AGENT})
        try:
            with urllib.request.urlopen(request, timeout=60) as response, part.open("wb") as file:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(file, "write", size, desc=path.name, disable=None) as target:
                    shutil.copyfileobj(response, target)
                received = file.tell()
            if received == 0 or (size > 0 and received != size):
                raise OSError(f"got only {received:,} of {size:,} bytes")
            part.replace(path)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: malformed header
            reason = " ".join(str(error).split())
            raise OSError(f"cannot download {url} ({reason}): try again, or {by_hand}") from error
        finally:
            part.unlink(missing_ok=True)
    if digest and file_digest(path, algorithm) != digest:
        reason = f"fails its {algorithm} check: delete it; then try again"
        raise InputError(f"{path} {reason}, or {by_hand}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Download and verify machines of DCASE2023.")
    add_machine(parser)
    text = "where to put them (%(default)s)"
    parser.add_argument("--data", default="data", metavar="DIR", help=text)
    args = parser.parse_args(argv)
    with one_line_errors():
        machines = machine_names(args.machine)
        fetch_missing(machines, args.data)
        for machine in machines:
            train = len(list_clips(args.data, machine, "train"))
            test = len(list_clips(args.data, machine, "test"))
            print(f"{args.data}/{machine}: training clips {train}, test clips {test}")


if __name__ == "__main__":
    main()
