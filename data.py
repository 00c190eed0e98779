"""From WAV files to the spectrograms that the network sees.

In DCASE2023 Task 2 a clip is called, for example,
fan/test/section_00_target_test_anomaly_0022_m-n_W.wav. From left to right:

    machine     a type of machine: a folder with the folders train and test
    section     a subset of the machine's clips; in 2023 there is only section 00
    domain      source, the usual recording conditions, or target, changed ones. Only 10 of 1,000
                training clips are from target. The rules forbid using a test clip's domain.
    attributes  how the machine ran or was recorded, m-n_W: its speed, its load, the microphone

All training clips are normal. The names of test clips say normal or anomaly for seven machines (the
development set, dev), but not for the other seven (the evaluation set, eval).

A clip goes through these stages:

    wave          (n_samples,)     mono, 16 kHz, values in [-1, 1]
    log-mel       (n_frames, 128)  X[t, m] = ln max(ε, Σ_f |FFT(frame t)[f]|² M[f, m])
    spectrogram   (1024, 128)      (X + 4.268) / 9.138, where X is padded with zeros
    SpecAug       (1024, 128)      in training, a random stripe of time and one of frequency are 0

Frame t is the 25 ms that start at t · 10 ms, with its mean removed, pre-emphasised and tapered. M
holds triangular filters that are evenly spaced on the mel scale, and ε is 1.2e-7.

One spectrogram shows a window of 10 s, the length that AST was trained on. Of a longer clip,
training takes a random window in each epoch, and scoring takes as many as cover it.

    python data.py --machine fan        # downloads one machine of DCASE2023 Task 2
"""

import argparse
import contextlib
import csv
import hashlib
import io
import math
import re
import shutil
import struct
import sys
import tempfile
import urllib.request
import warnings
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
FRAME, HOP = 400, 160  # samples: a frame of 25 ms every 10 ms, so 998 frames in a window
N_FRAMES, N_MELS = 1024, 128  # the size of AST's input
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values, from AST's own training


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
    """Read <machine>/<split>/<name>. From a name of another form, only the first two are known."""
    path = Path(path)
    domain = label = attributes = None
    if match := re.fullmatch(CLIP_NAME, path.name):
        domain, label, attributes = match.groups()
    is_anomaly = {"normal": False, "anomaly": True}.get(label)
    machine, split = path.parent.parent.name, path.parent.name
    return Clip(path, machine, split, domain, is_anomaly, attributes or "")


def list_clips(root: str | Path, machine: str, split: str) -> list[Clip]:
    """The clips in root/machine/split, sorted by name. Hidden files are left out.

    Raises FileNotFoundError if there are none, and ValueError for an anomaly in train, for a name
    that is nearly in the challenge's form, and for clips of several sections.
    """
    folder = Path(root) / machine / split
    paths = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() == ".wav"]
    if not paths:
        raise FileNotFoundError(f"no WAV files in {folder}")
    clips = [parse_clip(path) for path in paths]
    for clip in clips:
        if split == "train" and clip.is_anomaly:
            raise ValueError(f"{clip.path} is an anomaly by its name: train on normal clips only")
        # A name with a small mistake would be accepted without its attributes.
        if clip.domain is None and re.match(r"section_\d+_(source|target)_", clip.path.name):
            right = f"section_00_source_{split}_normal_0001_speed-2.wav"
            raise ValueError(f"{clip.path} is not quite named like {right}: rename it")
    sections = {path.name[:10] for path in paths if re.match(r"section_\d\d_", path.name)}
    if len(sections) > 1:
        raise ValueError(f"{folder} has clips of {len(sections)} sections: make a folder for each")
    return clips


def read_wav(path: str | Path) -> Tensor:
    """Read a WAV file of any rate as mono, 16 kHz, in [-1, 1]: (n_samples,) float32.

    Channels are averaged, as in the challenge's baseline. Raises ValueError, with file and reason,
    for anything that cannot be read right.
    """
    content = Path(path).read_bytes()
    if not content:
        raise ValueError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # unknown chunks are fine
            warnings.filterwarnings("error", "Reached EOF")  # a file that is cut off is not
            rate, samples = wavfile.read(io.BytesIO(content))
    except Exception as error:  # scipy raises many kinds
        reason = "its header is damaged, or the recorder was cut off"
        if isinstance(error, (ValueError, wavfile.WavFileWarning)):
            reason = error
        raise ValueError(f"{path} cannot be read as a WAV file: {reason}") from error
    if not 1000 <= rate <= 1_000_000:
        raise ValueError(f"{path} has a sample rate of {rate} Hz: its header is damaged")
    if len(samples) / rate < FRAME / SAMPLE_RATE:
        raise ValueError(f"{path} is shorter than a frame of 25 ms")

    # Subtle: scipy reads 24-bit samples stored in 4 bytes as 32-bit, 256 times too quiet. After the
    # format chunk's size stand 2 bytes, CHANNELS, 8 bytes, BLOCK BYTES and BITS.
    if chunk := re.search(rb"fmt [\x10\x12\x28]\0\0\0", content):
        channels, block_bytes, bits = struct.unpack_from("<2xH8xHH", content, chunk.end())
        if content.startswith(b"RIFF") and 8 * block_bytes != channels * bits:
            raise ValueError(f"{path} has {bits} bits in {block_bytes // channels} bytes a sample")

    wave = to_float(samples)
    if wave.ndim == 2:  # (n_samples, channels)
        wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise ValueError(f"{path} has samples that are not finite (NaN or infinity)")
    peak = np.abs(wave).max()
    if peak > 8:  # a little over 1 is normal for floating-point files
        raise ValueError(f"{path} has samples up to {peak:g}, expected 1: divide by full scale")
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
    """AST's input for the 10 s of a wave from sample `start` on: (n_samples,) -> (1024, 128).

    Log-mel by the same call as in AST's own loader (YuanGongND/ast, src/dataloader.py). The loader
    also subtracts the mean of the whole wave, which makes no difference, since fbank removes the
    mean of each frame.
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
    # With AST's factor of 2, AudioSet has mean 0 and standard deviation 1/2.
    return (x - MEAN) / (2 * STD)


class TrainingWindows(Dataset):
    """For training: a random window of a clip, (1024, 128), and the clip's class.

    Its index is a pair (i, u): which clip, and where the window lies, from u = 0, at the clip's
    start, to almost 1, at its end. The DataLoader takes the pairs from RandomOrder.
    """

    def __init__(self, clips: list[Clip], labels: list[int]):
        self.clips, self.labels = clips, labels

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, float]) -> tuple[Tensor, int]:
        i, u = item
        wave = read_wav(self.clips[i].path)
        spare = max(0, len(wave) - WINDOW)  # samples
        start = int(u * (spare + 1))
        return spectrogram(wave, start), self.labels[i]


class RandomOrder(Sampler):
    """Every clip once, in random order, as a pair (i, u) for TrainingWindows.

    Order and u are drawn in the main process, so results do not depend on --workers.
    """

    def __init__(self, n_clips: int):
        self.n_clips = n_clips

    def __len__(self) -> int:
        return self.n_clips

    def __iter__(self):
        u = torch.rand(self.n_clips)
        order = torch.randperm(self.n_clips)
        return zip(order.tolist(), u.tolist())


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


class SpecAug:
    """SpecAugment's two masks (Park et al. 2019, arXiv 1904.08779, section 2), without its warping.

    x (B, T, F) -> (B, T, F). In each of the B spectrograms, w frames from t₀ on and v mel bins from
    f₀ on become 0, which is AudioSet's mean. w is uniform on {0..time_mask} and t₀ on {0..T-w};
    likewise v and f₀.
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

DEV = ["ToyCar", "ToyTrain", "bearing", "fan", "gearbox", "slider", "valve"]
EVAL = ["ToyDrone", "ToyNscale", "ToyTank", "Vacuum", "bandsaw", "grinder", "shaker"]


def machine_names(names: list[str]) -> list[str]:
    """The machines meant by --machine, each once: dev, eval and all are groups of them."""
    machines = []
    for name in names:
        machines += {"dev": DEV, "eval": EVAL, "all": DEV + EVAL}.get(name, [name])
    return list(dict.fromkeys(machines))


# What the command lines have in common


def add_machine(parser: argparse.ArgumentParser) -> None:
    options = {"nargs": "+", "required": True, "metavar": "NAME"}
    text = "one or several names, or the groups dev, eval, all"
    parser.add_argument("--machine", type=lambda name: name.rstrip("/"), help=text, **options)


def add_hardware(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    text = "cpu, cuda or cuda:1 (cuda, where there is one)"
    add = parser.add_argument
    add("--device", default="cuda" if gpu else "cpu", type=existing_device, help=text)
    text = "processes that read WAV files (4 with a GPU, else 0: the main process reads)"
    add("--workers", default=4 if gpu else 0, type=int, metavar="N", help=text)


def existing_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {reason}") from error


def positive(text: str) -> int:
    """An argument's type: an integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


@contextlib.contextmanager
def one_line_errors():
    """Errors that a user can mend end in one line; all others keep their traceback."""
    # File names that the terminal cannot show are printed with escapes.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: run the same command again to continue")
    except (ValueError, OSError, ImportError) as error:
        # An error in a DataLoader's worker carries a traceback; the message is its last line.
        message = str(error).strip().split("\n")[-1].removeprefix("ValueError: ")
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


# Files


def make_folder(folder: Path) -> None:
    """Raises OSError if the folder cannot be made or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write(path: Path, content: bytes) -> None:
    """Replace the file as a whole: nobody ever reads half of it."""
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
    """Load what `save` wrote, without executing anything in it."""
    buffer = io.BytesIO(Path(path).read_bytes())
    try:
        content = torch.load(buffer, map_location="cpu", weights_only=True)
        if not set(keys) <= set(content):
            raise KeyError(keys)
    except Exception as error:  # of many kinds; PyTorch then advises weights_only=False, unsafe
        reason = "was not written by this program, or is damaged: delete it"
        raise ValueError(f"{path} {reason}") from error
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
AGENT = "asd-lora/1.0 (https://arxiv.org/abs/2409.07016)"  # Zenodo refuses urllib's own


def fetch(machine: str, root: str | Path) -> None:
    """Download, verify and unpack a machine of DCASE2023 (0.4 GB), unless its folder exists.

    Unpacks into <machine>.part and renames it when it is complete. An eval machine also gets the
    labels that are not in its file names.
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
    """Download `url` to `path`, unless it exists, and verify its checksum where one is given."""
    by_hand = f"open {url} in a browser and put the file at {path}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
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
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a nonsense header
            reason = " ".join(str(error).split())
            raise OSError(f"cannot download {url} ({reason}): try again, or {by_hand}") from error
        finally:
            part.unlink(missing_ok=True)
    if digest and file_digest(path, algorithm) != digest:
        raise ValueError(f"{path} has a wrong {algorithm}: delete it; then try again, or {by_hand}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Download and verify machines of DCASE2023.")
    add_machine(parser)
    parser.add_argument(
        "--data", default="data", metavar="DIR", help="folder for them (%(default)s)"
    )
    args = parser.parse_args(argv)
    with one_line_errors():
        for machine in machine_names(args.machine):
            fetch(machine, args.data)
            train = len(list_clips(args.data, machine, "train"))
            test = len(list_clips(args.data, machine, "test"))
            print(f"{args.data}/{machine}: training clips {train}, test clips {test}")


if __name__ == "__main__":
    main()
