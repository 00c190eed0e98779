"""From WAV files to what the network sees, and from file names to labels.

    wave (n_samples,)  mono, 16 kHz, in [-1, 1]
      -> log_mel       X[t, m] = ln max(ε, Σ_f |FFT(frame t)[f]|² M[f, m])      (n_frames, 128)
      -> fit_frames    zeros up to 1024 frames, or cut                          (1024, 128)
      -> normalise     (X + 4.268) / (2 · 4.569)                                (1024, 128)
      -> SpecAug       in training, a random stripe of time and one of frequency become 0

Frame t is the 25 ms of sound from t · 10 ms on. Its mean is subtracted, then it is pre-emphasised
and tapered. M holds triangular mel filters, ε is 1.19e-7. A clip longer than 1024 frames (10.255 s)
is heard in windows of that length: in training one random window per epoch, in scoring as many as
cover it.

The files are <data>/<machine>/{train,test}/*.wav, the challenge's or one's own.

    python data.py --machine fan        # fetches a machine of DCASE2023 Task 2
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import resample

SAMPLE_RATE = 16000
FRAME, HOP, FFT = 400, 160, 512  # samples: a frame of 25 ms every 10 ms, padded to 512 for the FFT
N_FRAMES, N_MELS = 1024, 128  # what the AST takes
WINDOW = FRAME + (N_FRAMES - 1) * HOP  # 164,080 samples, 10.255 s: exactly 1024 frames
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values, from AST's own training


# Files and their names


def read_wav(path: str | Path) -> Tensor:
    """Any WAV file as mono 16 kHz in [-1, 1]: (n_samples,) float32.

    The AST was trained on such waves. At the scale of int16 every log-mel value would be too large
    by ln(32768²) = 20.8, and the results would still look plausible.
    ValueError, naming file and reason: unreadable, truncated, empty, not finite, another encoding.
    """
    samples, rate = read_samples(path)  # (n, channels) float32 in [-1, 1], at any rate
    return resample(samples.mean(dim=1), rate, SAMPLE_RATE)


class Clip(NamedTuple):
    """A WAV file and what its name says; None and '' where it says nothing."""

    path: Path
    machine: str
    split: str  # "train" or "test"
    domain: str | None  # "source" or "target"
    is_anomaly: bool | None
    attributes: str  # "vel_9_loc_A"; a class of training is (machine, attributes)


CLIP_NAME = (
    r"section_\d\d_(source|target)_(?:train|test)_(normal|anomaly)_\d{4}(?:_(.*))?\.(?i:wav)"
)


def parse_clip(path: str | Path) -> Clip:
    """Read what a name tells.

    fan/test/section_00_source_test_anomaly_0022_m-n_W.wav: machine fan, split test, domain source,
    an anomaly, attributes m-n_W. A name of another form is a clip without labels: the evaluation
    set's section_00_0000.wav, or one's own recordings.
    """
    path = Path(path)
    domain, label, attributes = None, None, None
    if match := re.fullmatch(CLIP_NAME, path.name):
        domain, label, attributes = match.groups()
    is_anomaly = {"normal": False, "anomaly": True}.get(label)
    machine, split = path.parent.parent.name, path.parent.name
    return Clip(path, machine, split, domain, is_anomaly, attributes or "")


# Windows of clips


def count_frames(n_samples: int | Tensor) -> int | Tensor:
    """How many whole frames fit: 998 into 10 s, 1198 into 12 s."""
    return 1 + (n_samples - FRAME) // HOP


def window_starts(n_samples: int) -> list[int]:
    """Where a clip's windows begin, in samples: as few as cover it, evenly spaced."""
    n_frames = max(count_frames(n_samples), N_FRAMES)  # a shorter clip is padded
    count = math.ceil(n_frames / N_FRAMES)
    last = n_frames - N_FRAMES  # first frame of the last window
    return [round(frame) * HOP for frame in np.linspace(0, last, count)]


class RandomWindows:
    """Sampler of an epoch: every clip once, in random order, at a random window.

    It yields (index of the clip, first sample). All its random numbers are drawn before the first
    pair. On a CPU SpecAug draws from the same generator while the loader reads ahead; how far ahead
    depends on the number of its processes, which must not change a run.
    """

    def __init__(self, clip_lengths: list[int]):
        self.clip_lengths = torch.tensor(clip_lengths)

    def __len__(self) -> int:
        return len(self.clip_lengths)

    def __iter__(self):
        spare = (count_frames(self.clip_lengths) - N_FRAMES).clamp(min=0)  # frames beyond a window
        start = (torch.rand(len(spare)) * (spare + 1)).long() * HOP  # in samples
        for index in torch.randperm(len(spare)).tolist():
            yield index, start[index].item()


# From samples to spectrograms


@cache
def mel_filters(device: torch.device) -> Tensor:
    """M (257 FFT bins, 128 triangles), as Kaldi makes them from 20 Hz to 8 kHz.

    They stand on 130 points, evenly spaced on the mel scale, 1127 ln(1 + Hz/700): triangle m rises
    from point m to point m + 1 and falls to point m + 2.
    """
    # 0 stands for half of the sample rate. The last three are the defaults of Kaldi's fbank: vocal
    # tract length normalisation is off.
    filters, _ = get_mel_banks(N_MELS, FFT, SAMPLE_RATE, 20, 0, 100, -500, 1.0)  # (128, 256)
    return pad(filters, (0, 1)).T.to(device)  # the bin of 8 kHz itself has weight 0


def log_mel(waves: Tensor) -> Tensor:
    """Kaldi's log-mel filter bank: waves (B, n_samples) in [-1, 1] -> (B, n_frames, 128).

    On a CPU it is bit-equal to torchaudio's kaldi.fbank with the arguments of the official AST
    (htk_compat, "hanning", no dither, no energy). Before that call, AST's code subtracts the mean
    of the whole wave, which is redundant: each frame loses its mean anyway.
    ValueError: integer samples, or fewer than one frame of 400.
    """
    if not waves.is_floating_point() or waves.ndim != 2 or waves.shape[1] < FRAME:
        got = f"{waves.dtype} {tuple(waves.shape)}"
        raise ValueError(f"log_mel needs float waves (B, at least {FRAME} samples), got {got}")
    if waves.device.type == "cpu":  # faster: the frames of one clip fit into the CPU's cache
        return torch.cat([filter_bank(wave.unfold(1, FRAME, HOP)) for wave in waves.split(1)])
    return filter_bank(waves.unfold(1, FRAME, HOP))


def filter_bank(frames: Tensor) -> Tensor:
    """From frames (B, T, 400) to X, the equation at the top of this file: (B, T, 128)."""
    frames = frames - frames.mean(dim=2, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)  # the first is its own
    frames -= 0.97 * before  # pre-emphasis
    frames *= torch.hann_window(FRAME, periodic=False, device=frames.device)
    power = torch.fft.rfft(frames, n=FFT).abs().square_()  # (B, T, 257)
    mel = power @ mel_filters(frames.device)  # (B, T, 128)
    return mel.clamp_(min=torch.finfo(torch.float32).eps).log_()


def fit_frames(x: Tensor, n: int = N_FRAMES) -> Tensor:
    """Pad (B, T, F) with zeros, or cut it, to (B, n, F).

    As in the official code this comes before `normalise`, so a frame of padding becomes 0.467.
    """
    return pad(x, (0, 0, 0, n - x.shape[1]))  # a negative pad cuts


def normalise(x: Tensor) -> Tensor:
    """Bring AudioSet's mean to 0 and its standard deviation to 1/2, as the AST was trained."""
    return (x - MEAN) / (2 * STD)


def spectrogram(waves: Tensor, lengths: Tensor) -> Tensor:
    """What the AST takes: waves (B, n_samples) and their lengths (B,) -> (B, 1024, 128)."""
    x = fit_frames(log_mel(waves))
    # The loader has filled the shorter waves of a batch up with samples of 0, which log_mel turns
    # into -15.9. The AST was trained with log-mel values of 0 after the end of a clip.
    padding = torch.arange(N_FRAMES, device=x.device) >= count_frames(lengths)[:, None]  # (B, T)
    return normalise(x.masked_fill(padding[:, :, None], 0))


class SpecAug:
    """SpecAugment's two masks (Park et al. 2019, arXiv 1904.08779, section 2), without its warping.

    x (B, T, F) -> (B, T, F). In each of the B spectrograms w frames from t₀ on, and v bins
    from f₀ on, become 0, which is AudioSet's mean. w is uniform on {0..time_mask}, t₀ on {0..T-w};
    likewise v and f₀.
    ValueError: a mask wider than 1024 frames or 128 bins.
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
import difflib
import hashlib
import http.client
import io
import json
import os
import shlex
import shutil
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from scipy.io import wavfile
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# Folders of clips

DEV = ["ToyCar", "ToyTrain", "bearing", "fan", "gearbox", "slider", "valve"]
EVAL = ["ToyDrone", "ToyNscale", "ToyTank", "Vacuum", "bandsaw", "grinder", "shaker"]
OTHER_AUDIO = {".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff"}


def files_in(folder: Path, suffixes: set[str]) -> list[Path]:
    """The files of these kinds, sorted. Hidden ones (macOS's "._x.wav") are left out."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted(p for p in paths if p.suffix.lower() in suffixes and not p.name.startswith("."))


def list_clips(root: str | Path, machine: str, split: str) -> list[Clip]:
    """The clips in root/machine/split, sorted by name.

    FileNotFoundError: no such folder, or no WAV file in it. ValueError: an anomaly for training.
    """
    folder = Path(root) / machine / split
    if not folder.is_dir():
        raise FileNotFoundError(why_missing(folder))
    clips = [parse_clip(path) for path in files_in(folder, {".wav"})]
    if not clips:
        others = "; convert its other sound files" if files_in(folder, OTHER_AUDIO) else ""
        raise FileNotFoundError(f"{folder} has no WAV file; put {split} clips there{others}")
    for clip in clips:
        if split == "train" and clip.is_anomaly:
            what = f"{clip.path} is an anomaly by its name"
            raise ValueError(f"{what}; training uses normal clips only: move it away")
    return clips


def why_missing(folder: Path) -> str:
    root, machine, split = folder.parent.parent, folder.parent.name, folder.name
    if (folder.parent / machine / split).is_dir():
        nested = folder.parent / machine / split
        return f"{nested} is nested one folder too deep; move it to {folder}"
    if machine in ARCHIVES and not is_own(root, machine):
        return f"{folder} is missing; `python data.py --machine {machine} --data {root}` fetches it"
    if folder.parent.is_dir():
        for path in folder.parent.iterdir():
            if path.is_dir() and path.name.lower() == split:
                return f"{folder} is missing; {path} is there: rename it to {split}"
        return f"{folder} is missing; put {split} clips (WAV) there"
    own = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    near = did_you_mean(machine, DEV + EVAL + own)
    return f"{folder} is missing" + (near or f"; put {split} clips (WAV) there")


def did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1)
    return "".join(f"; did you mean {name!r}?" for name in known if name.lower() in near)


def are_the_challenges(names: list[str]) -> bool:
    return all(re.match(r"section_\d\d_", name) for name in names)


def is_own(root: str | Path, machine: str) -> bool:
    """Whether the machine's folder holds files of other names than the challenge's."""
    folders = [Path(root) / machine / split for split in ("train", "test")]
    names = [path.name for folder in folders for path in files_in(folder, {".wav"} | OTHER_AUDIO)]
    return not are_the_challenges(names)


def machine_names(names: list[str]) -> list[str]:
    """The machines meant by --machine: dev, eval and all are expanded, doubles dropped.

    ValueError: a name that cannot be the name of a folder in --data.
    """
    groups = {"dev": DEV, "eval": EVAL, "all": DEV + EVAL}
    machines = []
    for name in names:
        if not re.fullmatch(r"[^/\\+]+", name) or name.startswith("."):
            raise ValueError(f"--machine {name!r}: a machine is the name of a folder in --data")
        machines += groups.get(name, [name])
    return list(dict.fromkeys(machines))


# WAV files

# scipy warns of chunks that it skips (LIST, bext, ...); what would harm us is checked below.
warnings.filterwarnings("ignore", category=wavfile.WavFileWarning)
OTHER_FORMATS = {b"ID3": "MP3", b"\xff\xfb": "MP3", b"\xff\xf3": "MP3", b"fLaC": "FLAC",
                 b"OggS": "Ogg"}  # fmt: skip


class WholeBytes(io.BytesIO):
    """Bytes that do not end within a read: of a truncated clip scipy would return what is left."""

    def read(self, size=-1):
        content = super().read(size)
        if 0 < len(content) < size:
            raise ValueError(f"truncated: {size} bytes announced, {len(content)} there")
        return content


def read_samples(path: str | Path) -> tuple[Tensor, int]:
    """Samples (n, channels) float32 in [-1, 1] and their rate. ValueError: see read_wav.

    PCM of 8 to 64 bit, float, EXTENSIBLE, RF64 and RIFX can be read.
    """
    try:
        content = Path(path).read_bytes()
        for start, name in OTHER_FORMATS.items():
            if content.startswith(start):
                raise ValueError(f"is a file of another format, {name}; convert it to WAV")
        if content[:4] not in (b"RIFF", b"RIFX", b"RF64"):
            raise ValueError("is no WAV file" if content else "is empty")
        rate, samples = wavfile.read(WholeBytes(content))
        check_format(content, rate, samples)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, ArithmeticError, NameError, struct.error) as error:  # scipy's, if damaged
        raise ValueError(f"{path}: a damaged or incomplete header") from error
    zero, full = 0, 1
    if samples.dtype.kind == "u":  # 8-bit WAV is the unsigned one
        zero, full = 128, 128
    elif samples.dtype.kind == "i":
        full = -float(np.iinfo(samples.dtype).min)
    samples = (samples.reshape(len(samples), -1).astype(np.float32) - zero) / np.float32(full)
    return torch.from_numpy(samples), rate


def check_format(content: bytes, rate: int, samples: np.ndarray) -> None:
    """ValueError: samples that could be misread, or that are no sound."""
    order = ">" if content[:4] == b"RIFX" else "<"
    fmt = content.find(b"fmt ") + 8
    channels, block, bits = struct.unpack_from(order + "2xH8xHH", content, fmt)
    if block != channels * -(-bits // 8):  # readers disagree on where in its bytes a sample sits
        size = f"{bits}-bit samples in {block / channels:g} bytes each"
        raise ValueError(f"{size}; convert it to 16-bit PCM")
    if samples.size == 0:
        raise ValueError("no samples")
    if samples.dtype.kind == "f":
        if not np.isfinite(samples).all():
            raise ValueError("samples that are not finite (NaN or infinity)")
        if (peak := np.abs(samples).max()) > 8:  # a little over 1 is normal
            high = f"float samples up to {peak:g}, not 1"
            raise ValueError(f"{high}; divide them by their full scale")
    # The resampling filter has about (rate / divisor) · (16000 / divisor) weights: 70,560 from
    # 44.1 kHz, 256 million from 16,001 Hz.
    if rate < 1000 or rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > 10_000_000:
        raise ValueError(f"{rate} Hz cannot be converted to 16 kHz; resample the file yourself")


class Recording(NamedTuple):
    """What a look at a clip tells before any long work; score.py keeps these beside embeddings."""

    n_samples: int  # at 16 kHz
    level: float  # dB: 0 is a square wave at full scale
    clipped: float  # share of the samples that are at full scale
    silent: float  # share of its 10 ms that stay below -80 dB


def look_at(clip: Clip) -> Recording | str:
    """Decode a clip; where it cannot be used, say why."""
    try:
        wave = read_wav(clip.path)
    except ValueError as error:
        return str(error)
    if len(wave) < FRAME:
        return f"{clip.path}: shorter than one frame of 25 ms"
    level = 10 * math.log10(wave.square().mean().item() + 1e-12)
    clipped = (wave.abs() >= 0.999).float().mean().item()
    peaks = wave[: len(wave) // HOP * HOP].view(-1, HOP).abs().amax(dim=1)
    return Recording(len(wave), level, clipped, (peaks < 1e-4).float().mean().item())


def check_clips(clips: list[Clip]) -> list[Recording]:
    """Decode every clip once, before any long work.

    ValueError: lists every clip that cannot be used (the first ten, and how many).
    """
    with ThreadPoolExecutor() as pool:
        found = list(progress(pool.map(look_at, clips), "checking", len(clips)))
    if bad := [reason for reason in found if isinstance(reason, str)]:
        what = f"{len(bad)} of {len(clips)} clips cannot be used (mend or remove them)"
        raise ValueError(f"{what}: {first_ten(bad, '; ')}")
    return found


def first_ten(items: list, separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 10:,} more" if len(items) > 10 else ""
    return separator.join(map(str, items[:10])) + more


# Labels


def read_csv(path: Path, number: type) -> dict[str, float]:
    """A two-column CSV file without header -> {name: number}. ValueError: a wrong or double row."""
    rows = {}
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, row in enumerate(csv.reader(file), 1):
            try:
                name, text = row
                value = number(text)
            except ValueError as error:
                what = f"{','.join(row)!r} is not name,{number.__name__}"
                raise ValueError(f"{path}, line {line}: {what}") from error
            if name in rows or not math.isfinite(value):
                what = "stands there twice" if name in rows else f"has the value {value}"
                raise ValueError(f"{path}, line {line}: {name} {what}")
            rows[name] = value
    return rows


def read_01(path: Path, names: list[str]) -> list[bool]:
    """0 or 1 for each of `names`, from a CSV file that has exactly these names, in any order."""
    table = read_csv(path, int)
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"{path} has no row for {len(missing)} clips: {first_ten(missing)}")
    if unknown := sorted(table.keys() - set(names)):
        what = f"{len(unknown)} rows that were not scored"
        raise ValueError(f"{path} has {what}: {first_ten(unknown)}")
    if wrong := [name for name in names if table[name] not in (0, 1)]:
        raise ValueError(f"{path}: {wrong[0]} is {table[wrong[0]]}, not 0 or 1")
    return [bool(table[name]) for name in names]


def read_own_labels(path: Path, names: list[str]) -> list[bool | None]:
    """As people write them: a header, semicolons, spaces, names without .wav, only some clips.

    -> is_anomaly of each of `names`, None where the file says nothing. ValueError: a line that
    cannot be understood, a clip twice, no line for any of the clips.
    """
    known = {}
    for name in names:
        for spelling in (Path(name).stem, name):
            known[unicodedata.normalize("NFC", spelling)] = name
    labels = {}
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    delimiter = max(",;\t", key=text.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in rows:
        if not any(map(str.strip, row)):
            continue
        # A name that holds the delimiter and stands without quotes is still all but the last field.
        name, label = delimiter.join(row[:-1]).strip(), row[-1].strip()
        if label not in ("0", "1"):
            if rows.line_num == 1 and readable(name) not in known:
                continue  # a header
            example = f"{names[0]}{delimiter}1 for an anomaly, 0 for a normal clip"
            what = f"{delimiter.join(row)!r} is no label"
            raise ValueError(f"{path}, line {rows.line_num}: {what}; a right line is {example}")
        name = known.get(readable(name), name)
        if name in labels:
            raise ValueError(f"{path}, line {rows.line_num}: {name} stands there twice")
        labels[name] = label == "1"
    if not labels.keys() & set(names):
        raise ValueError(f"{path} names none of the test clips; a right line is {names[0]},1")
    if unknown := sorted(labels.keys() - set(names)):
        print(f"note: {path} names {len(unknown)} that are no test clips: {first_ten(unknown)}")
    return [labels.get(name) for name in names]


def readable(name: str) -> str:
    """A name with composed letters; bytes that are no UTF-8 are read as a spreadsheet's."""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = name.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return unicodedata.normalize("NFC", name)


def labels_of(machine: str, names: list[str], root: Path) -> tuple[list[bool | None], list[bool]]:
    """(is_anomaly, is_target) of the test clips called `names`.

    From the names; for one's own from root/machine/labels.csv; for the evaluation machines from
    root/ground_truth. None: not known. A clip without a domain counts as source.
    ValueError: something is wrong with one of the files.
    """
    clips = [parse_clip(Path(machine, "test", name)) for name in names]
    is_anomaly = [clip.is_anomaly for clip in clips]
    is_target = [clip.domain == "target" for clip in clips]
    own = root / machine / "labels.csv"
    file = f"ground_truth_{machine}_section_00_test.csv"
    paths = [root / "ground_truth" / f"ground_truth_{kind}" / file for kind in ("data", "domain")]
    if None in is_anomaly and own.exists():
        named = read_own_labels(own, names)
        is_anomaly = [a if a is not None else b for a, b in zip(is_anomaly, named)]
    elif None in is_anomaly and are_the_challenges(names) and all(path.exists() for path in paths):
        is_anomaly, is_target = (read_01(path, names) for path in paths)
    return is_anomaly, is_target


# Batches


class Windows(torch.utils.data.Dataset):
    """windows[index, start] is the sound of a clip from a sample on, and the clip's index.

    The sound has 164,080 samples, or fewer where the clip ends.
    """

    def __init__(self, clips: list[Clip]):
        self.clips = clips
        self.last_index, self.last_wave = None, None  # the windows of a clip follow each other

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, start = item
        if index != self.last_index:
            self.last_index, self.last_wave = index, read_wav(self.clips[index].path)
        return self.last_wave[start : start + WINDOW], index


def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Waves (B, n_samples), padded with zeros; their lengths (B,); the clips' indices (B,)."""
    waves, indices = zip(*items)
    lengths = [len(wave) for wave in waves]
    return pad_sequence(waves, batch_first=True), torch.tensor(lengths), torch.tensor(indices)


class Loader:
    """Yields what `collate` makes of batches of windows, on the device.

    windows yields (index of the clip, first sample), in the same order or another each time.
    """

    def __init__(self, clips, windows, batch_size: int, workers: int, device: torch.device):
        self.device = device
        self.loader = torch.utils.data.DataLoader(
            Windows(clips),
            batch_size,
            sampler=windows,
            num_workers=workers,
            persistent_workers=workers > 0,
            # A batch in waiting for each worker: 2 x 21 MB of shared memory. Docker gives 64 MB.
            prefetch_factor=1 if workers else None,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that it draws nothing from the one of training
        )

    def __iter__(self):
        for batch in self.loader:
            yield [tensor.to(self.device, non_blocking=True) for tensor in batch]


# What the commands share

# train.py's arguments that change no result. Which kind of device it was does: see `precision`.
PLACES = {"run", "data", "weights", "workers", "device", "compile", "micro_batch"}


def default_run(names: list[str], pretrained: str = "") -> Path:
    """Where a run of these --machine names is by default: runs/fan, runs/pretrained-fan, ..."""
    return Path("runs") / (pretrained + "+".join(names))


def next_command(script: str, names: list[str], run: str | Path) -> str:
    """The command line that comes next for this run, printed at the end of a script."""
    elsewhere = f" --run {shlex.quote(str(run))}" if Path(run) != default_run(names) else ""
    return f"python {script} --machine {shlex.join(names)}{elsewhere}"


class Parser(argparse.ArgumentParser):
    """A line a flag in -h; an error is one line, with the nearest right flag."""

    def __init__(self, prog: str, about: str):
        def wide(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118)

        super().__init__(prog, argparse.SUPPRESS, about, allow_abbrev=False, formatter_class=wide)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """And keep the command line for what Ctrl-C says: the same again, without --overwrite."""
        argv = sys.argv[1:] if argv is None else argv
        again = [flag for flag in argv if flag != "--overwrite"]
        self.again = f"python {self.prog} {shlex.join(again)}"
        return super().parse_args(argv)

    def error(self, message: str):
        if unknown := re.search(r"unrecognized arguments:.*?(--[\w-]+)", message):
            message += did_you_mean(unknown[1], list(self._option_string_actions))
        super().error(message)


# What PyTorch says, and what a user can do about it.
REMEDIES = [
    (r"^(CUDA|HIP).* out of memory",
     "the GPU's memory is too small; halve train.py's --micro-batch or score.py's --batch-size"),
    (r"No working C\+\+ compiler|Failed to find C compiler",
     "--compile needs a C++ compiler; install one (apt install g++), or leave --compile out"),
    (r"^DataLoader worker .* (killed|exited)",
     "a process that reads WAV files was killed, mostly for want of shared memory; give the "
     "container more (docker run --shm-size=1g), or read without such processes: --workers 0"),
]  # fmt: skip


@contextmanager
def one_line_errors(parser: Parser, continues: str = "continues from here"):
    """What a user can mend ends in one line and exit status 2, Ctrl-C in 130, a bug in a traceback.

    With the environment variable ASD_TRACEBACK=1 the traceback is printed before any such line.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are no UTF-8
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; {parser.again} {continues}\n")
    except Exception as error:
        message = what_to_do(error)
        if message is None:
            raise
        if os.environ.get("ASD_TRACEBACK"):
            traceback.print_exc()
        parser.error(message)


def what_to_do(error: Exception) -> str | None:
    """The one line for an error that a user can mend; None for a bug."""
    if isinstance(error, ValueError | OSError):
        return str(error).strip().splitlines()[-1]  # of a worker's traceback, the line that is ours
    for symptom, remedy in REMEDIES:
        if re.search(symptom, str(error)):
            return remedy
    return None


def progress(items, what: str, total: int, unit: str = "clips"):
    """Iterate with a bar; where the output is no terminal, with one line."""
    if not sys.stderr.isatty() and total:
        print(f"{what}: {total:,} {unit}", file=sys.stderr)
    return tqdm(items, what, total, leave=False, unit=unit, disable=None)


@contextmanager
def whole_file(path: str | Path):
    """A file to write to that replaces `path` when it is complete: whole or not at all.

    OSError: it cannot be written, for whatever reason; the old file is as it was.
    """
    path = Path(path)
    part = path.with_name(f"{path.name[:200]}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        part.replace(path)
    except OSError as error:
        why = f"cannot write {path}: {error.strerror}"
        raise OSError(f"{why}; the file is as it was before") from error
    finally:
        part.unlink(missing_ok=True)  # if it is still there


def write_file(path: str | Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def write_csv(path: str | Path, rows: list) -> None:
    """A CSV file as the challenge wants it: quotes only where they are needed, \\n ends a line."""

    def field(value: object) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text

    text = "".join(",".join(map(field, row)) + "\n" for row in rows)
    write_file(path, text.encode("utf-8", "surrogateescape"))  # any name that a file can have


def read_json(path: str | Path) -> dict:
    """{} where there is no such file. ValueError: it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore or delete its folder") from error


def make_run_folder(run: Path) -> None:
    """OSError: it cannot be made or written to."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        why = f"cannot use {run} as a run folder ({error.strerror})"
        raise OSError(f"{why}; name another with --run") from error


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The checksum of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# Fetching the challenge's data

# The development set is Zenodo's record 7882613, the additional training set 7830345, the
# evaluation set 7860847.
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
# machine -> (record, archive, the folders it holds)
ARCHIVES = {m: [(7882613, f"dev_{m}", ["train", "test"])] for m in DEV}
ARCHIVES |= {
    m: [(7830345, f"eval_data_{m}_train", ["train"]), (7860847, f"eval_data_{m}_test", ["test"])]
    for m in EVAL
}
# Zenodo refuses the default agents of libraries, and recommends name/version (URL).
AGENT = "asd-lora/1.0 (https://arxiv.org/abs/2409.07016)"


def open_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """From byte `start` on; up to three tries where the server is busy (429, 5xx). OSError: it
    stays so."""
    headers = {"User-Agent": AGENT} | ({"Range": f"bytes={start}-"} if start else {})
    for left in (2, 1, 0):
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
        except urllib.error.HTTPError as error:
            if not left or (error.code != 429 and error.code < 500):
                raise
            usual = "60" if error.code == 429 else "5"
            after = error.headers.get("Retry-After", usual)  # seconds, or a date
            wait = min(60, int(after)) if after.isdigit() else 60
            busy = f"{url}: the server answers {error.code} {error.reason}"
            print(f"{busy}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def download(url: str, path: Path, algorithm: str = "", digest: str = "") -> None:
    """Fetch `url` to `path`, unless it is there; a broken download continues where it stopped
    (`<path>.part`).

    algorithm, digest  "md5" or "sha256" and the checksum in hex; none where the publisher gives
    none OSError: no network, a broken connection, or the server refuses. ValueError: not the file
    that was expected.
    """
    if path.exists():  # put there by hand, or kept from a run that was interrupted while unpacking
        if problem := what_is_wrong(path, algorithm, digest):
            instead = f"delete it, or replace it by what a browser gets from {url}"
            raise ValueError(f"{path} {problem}; {instead}")
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"open {url} in a browser and put the file at {path}"
    by_hand += "; `python tests/demo.py` needs no download"
    try:
        download_rest(url, part)
    except urllib.error.HTTPError as error:
        refused = f"the server refuses {url} ({error.code} {error.reason})"
        raise OSError(f"{refused}: {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        broken = f"cannot fetch {url} ({reason}); repeat the command to continue"
        raise OSError(f"{broken}, or {by_hand}") from error
    if problem := what_is_wrong(part, algorithm, digest):
        part.unlink()
        raise ValueError(f"what came from {url} {problem}: try again, or {by_hand}")
    part.replace(path)


def what_is_wrong(path: Path, algorithm: str, digest: str) -> str:
    with path.open("rb") as file:
        if file.read(100).lstrip().startswith(b"<"):
            return "is a web page"
    wrong = digest and file_digest(path, algorithm) != digest
    return f"has not the {algorithm.upper()} checksum {digest}" if wrong else ""


def download_rest(url: str, part: Path) -> None:
    done = part.stat().st_size if part.exists() else 0
    try:
        response = open_url(url, done)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left: it was interrupted after the last byte
            return
        raise
    with response:
        if response.status != 206:  # the server ignores Range and sends everything
            done = 0
        total = done + int(response.headers.get("Content-Length", 0))
        options = {"unit": "B", "unit_scale": True, "disable": None}
        bar = tqdm(desc=part.stem, total=total or None, initial=done, **options)
        with part.open("ab" if done else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise OSError(f"the connection broke at {part.stat().st_size:,} of {total:,} bytes")


def unpack(archive: Path, machine: str, root: Path, splits: list[str]) -> None:
    """Move what a zip file has below `<machine>/` into root; each folder arrives whole or not.

    zipfile keeps every member inside its folder and makes no links.
    ValueError: not a whole zip file of the machine.
    """
    part = root / f".{archive.stem}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            wanted = [name for name in file.namelist() if name.startswith(f"{machine}/")]
            file.extractall(part, wanted)
        for split in splits:
            if not (part / machine / split).is_dir():
                raise ValueError(f"{archive} has no folder {machine}/{split}")
        (root / machine).mkdir(exist_ok=True)
        for source in (part / machine).iterdir():
            target = root / machine / source.name
            if not target.exists():  # an evaluation machine's two archives share a file
                source.rename(target)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        broken = f"{archive} cannot be unpacked ({error})"
        raise ValueError(f"{broken}; delete it and try again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch(machine: str, root: str | Path) -> None:
    """Download, verify and unpack what is missing of one DCASE2023 machine (a few hundred MB).

    For an evaluation machine also the ground truth that its file names do not tell.
    ValueError: its folder holds files of other names than the challenge's.
    """
    root = Path(root)
    if is_own(root, machine):
        own = f"{root / machine} holds recordings of other names than the challenge's"
        raise ValueError(f"{own}; nothing is fetched into it: rename the folder")
    for record, name, splits in ARCHIVES[machine]:
        if not all((root / machine / split).is_dir() for split in splits):
            archive = root / f"{name}.zip"
            url = f"{ZENODO}/{record}/files/{name}.zip?download=1"
            download(url, archive, "md5", ARCHIVE_MD5[name])
            unpack(archive, machine, root, splits)
            archive.unlink()
    for kind in ("data", "domain") if machine in EVAL else ():
        file = f"ground_truth_{kind}/ground_truth_{machine}_section_00_test.csv"
        download(f"{GROUND_TRUTH}/{file}", root / "ground_truth" / file)


def prepare(machines: list[str], root: str | Path, splits: list[str]) -> None:
    """Fetch the DCASE2023 machines of which `root` does not hold those splits yet.

    One's own machines must be there, and come first: a misspelt name is reported before anything
    is fetched. Errors: see list_clips, fetch.
    """
    for machine in sorted(machines, key=lambda machine: machine in ARCHIVES):
        for split in splits:
            folder = Path(root) / machine / split
            nested = folder.parent / machine
            if machine in ARCHIVES and not (folder.is_dir() or nested.is_dir()):
                if not is_own(root, machine):
                    print(f"{folder} is missing: fetching {machine}")
                    fetch(machine, root)
            list_clips(root, machine, split)
            if others := files_in(folder, OTHER_AUDIO):
                names = first_ten([path.name for path in others])
                print(f"note: {len(others)} files in {folder} are left out, no WAV: {names}")
            if folders := [path.name for path in folder.iterdir() if path.is_dir()]:
                print(f"note: folders in {folder} are not searched: {first_ten(folders)}")


def main(argv: list[str] | None = None) -> None:
    about = "Fetch, verify and unpack machines of DCASE2023 Task 2: python data.py --machine fan"
    parser = Parser("data.py", about)
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--data", default="data", metavar="DIR", help="where to (default: %(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        for machine in machine_names(args.machine):
            if machine not in ARCHIVES:
                raise ValueError(f"no machine {machine!r}{did_you_mean(machine, list(ARCHIVES))}")
            fetch(machine, args.data)
            counts = []
            for split in ("train", "test"):
                counts.append(len(list_clips(args.data, machine, split)))
            print(f"{args.data}/{machine}: {counts[0]:,} training clips, {counts[1]:,} test clips")


if __name__ == "__main__":
    main()
