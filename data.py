"""From WAV files to what the network sees, and from file names to labels.

    wave (n_samples,) 16 kHz in [-1, 1], of a longer clip windows of 164,080 samples
      -> log_mel       X[t, m] = ln max(ε, Σ_f |FFT(frame t)[f]|² M[f, m])      (T frames, 128 mel bins)
      -> fit_frames    zeros up to T = 1024 frames, or cut                      (1024, 128)
      -> normalise     (X + 4.268) / (2 · 4.569)                                (1024, 128)
      -> SpecAug       in training: one random stripe of time and one of frequency set to 0

Frame t: 25 ms from t · 10 ms on, less its mean, pre-emphasised, windowed. M: triangular mel
filters. ε: 1.19e-7.

The files are the challenge's, `<data>/<machine>/{train,test}/*.wav`; `python data.py --machine fan`
fetches them.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE = 16000
FRAME, HOP, FFT = 400, 160, 512  # samples: a frame of 25 ms every 10 ms, padded to 512 for the FFT
N_FRAMES, N_MELS = 1024, 128  # what the AST takes
WINDOW = (
    FRAME + (N_FRAMES - 1) * HOP
)  # the 164,080 samples (10.255 s) that give exactly 1024 frames
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values, from AST's own training


@cache
def mel_filters(device: torch.device) -> Tensor:
    """M (257 FFT bins, 128): triangles between 130 points that are evenly spaced in mel = 1127 ln(1
    + Hz/700)."""
    low, high = (1127 * math.log(1 + hz / 700) for hz in (20, SAMPLE_RATE / 2))
    edges = low + torch.arange(N_MELS + 2) * ((high - low) / (N_MELS + 1))
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]  # (128, 1) each
    mel = (
        1127 * (1 + torch.arange(FFT // 2) * (SAMPLE_RATE / FFT) / 700).log()
    )  # of each FFT bin below 8 kHz
    filters = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(
        min=0
    )
    return torch.nn.functional.pad(filters, (0, 1)).T.to(device)  # 8 kHz itself has weight 0


def log_mel(waves: Tensor) -> Tensor:
    """Kaldi's log-mel filter bank: waves (B, n_samples) float in [-1, 1] -> (B, n_frames, 128),
    natural log.

    On a CPU bit-equal to torchaudio's kaldi.fbank as AST calls it (htk_compat, "hanning", no
    dither, no energy). ValueError: integer samples, or fewer than one frame of 400.
    """
    if not waves.is_floating_point() or waves.ndim != 2 or waves.shape[1] < FRAME:
        got = f"{waves.dtype} {tuple(waves.shape)}"
        raise ValueError(
            f"log_mel needs float waves (B, n_samples) of at least {FRAME} samples, got {got}"
        )
    # On a CPU clip by clip: one clip's frames fit into the cache, a batch's do not.
    parts = waves.split(1) if waves.device.type == "cpu" else [waves]
    return torch.cat([filter_bank(part.unfold(1, FRAME, HOP)) for part in parts])


def filter_bank(frames: Tensor) -> Tensor:
    """The equation: frames (B, T, 400) -> (B, T, 128)."""
    frames = frames - frames.mean(
        dim=2, keepdim=True
    )  # per frame: AST's waveform.mean() changes nothing then
    frames -= 0.97 * torch.cat(
        [frames[..., :1], frames[..., :-1]], dim=2
    )  # pre-emphasis, first sample repeated
    frames *= torch.hann_window(FRAME, periodic=False, device=frames.device)
    power = torch.fft.rfft(frames, n=FFT).abs().square_()  # (B, T, 257)
    return (power @ mel_filters(frames.device)).clamp_(min=torch.finfo(torch.float32).eps).log_()


def fit_frames(x: Tensor, n: int = N_FRAMES) -> Tensor:
    """Pad with zeros or cut (B, T, F) to (B, n, F); as in AST before `normalise`: padding then
    becomes 0.467."""
    return torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[1]))  # a negative pad cuts


def normalise(x: Tensor) -> Tensor:
    """AudioSet's mean to 0 and its standard deviation to 1/2. The factor 2 is AST's: it was trained
    so."""
    return (x - MEAN) / (2 * STD)


def spectrogram(waves: Tensor, lengths: Tensor) -> Tensor:
    """What the AST takes: waves (B, n_samples) int16 or float, with their lengths (B,), -> (B,
    1024, 128)."""
    x = fit_frames(log_mel(to_float(waves)))
    padding = torch.arange(N_FRAMES, device=x.device) >= count_frames(lengths)[:, None]  # (B, T)
    # After its end a clip has zero *samples* up to the batch's length, log-mel -15.9: make them
    # zero *frames*.
    return normalise(x.masked_fill(padding[:, :, None], 0))


def to_float(wave: Tensor) -> Tensor:
    """int16 to [-1, 1]; float as it is. The AST was trained on waves in [-1, 1]: samples left at
    the scale of int16 would add ln(32768²) = 20.8 to every log-mel value, and still give
    plausible-looking numbers."""
    return wave.float() / 32768 if wave.dtype == torch.int16 else wave


class SpecAug:
    """SpecAugment's masks (Park et al. 2019, arXiv 1904.08779, section 2), without its time
    warping.

    x (B, T, F) -> (B, T, F): in each clip, w frames from t₀ on and w' bins from f₀ on become 0,
    AudioSet's mean; w is uniform on {0..time_mask}, t₀ on {0..T-w}; likewise w', f₀. ValueError:
    wider than 1024 frames or 128 bins.
    """

    def __init__(self, time_mask: int, freq_mask: int):
        if not 0 <= time_mask <= N_FRAMES or not 0 <= freq_mask <= N_MELS:
            raise ValueError(
                f"SpecAug masks must be 0 to {N_FRAMES} frames and 0 to {N_MELS} mel bins wide"
            )
        self.time_mask, self.freq_mask = time_mask, freq_mask

    def __call__(self, x: Tensor) -> Tensor:
        B, T, F = x.shape
        in_time = self._stripes(B, T, self.time_mask, x.device)
        in_freq = self._stripes(B, F, self.freq_mask, x.device)
        return x.masked_fill(in_time[:, :, None] | in_freq[:, None, :], 0)

    @staticmethod
    def _stripes(B: int, size: int, max_width: int, device: torch.device) -> Tensor:
        """(B, size) bool: in each row one stripe of True, of random width and place."""
        width = torch.randint(max_width + 1, (B, 1), device=device)
        start = (torch.rand(B, 1, device=device) * (size - width + 1)).long()
        position = torch.arange(size, device=device)
        return (start <= position) & (position < start + width)


def count_frames(n_samples: int | Tensor) -> int | Tensor:
    """How many whole frames fit: 998 for 10 s, 1198 for 12 s."""
    return 1 + (n_samples - FRAME) // HOP


def window_starts(n_samples: int) -> list[int]:
    """First samples of the fewest evenly spaced 1024-frame windows that cover a clip; [0] if one is
    enough."""
    n_frames = count_frames(n_samples)
    count = -(-n_frames // N_FRAMES)
    return (
        [round(i * (n_frames - N_FRAMES) / (count - 1)) * HOP for i in range(count)]
        if count > 1
        else [0]
    )


class Windows(torch.utils.data.Dataset):
    """item (index of a clip, first sample) -> (at most 164,080 samples, index).

    In training drawn at random, in scoring evenly spaced; at multiples of the hop, as if the
    spectrogram were cut.
    """

    def __init__(self, clips: list["Clip"]):
        self.clips, self.last = (
            clips,
            (-1, None),
        )  # the last clip read: its next window needs no second reading

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, start = item
        if index != self.last[0]:
            self.last = index, decode(self.clips[index].path)
        return self.last[1][start : start + WINDOW], index


def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """-> waves (B, n_samples) padded with zeros, int16 if all are; lengths (B,); clip indices
    (B,)."""
    waves, indices = zip(*items, strict=True)
    if any(wave.dtype != torch.int16 for wave in waves):
        waves = [to_float(wave) for wave in waves]
    lengths = torch.tensor([len(wave) for wave in waves])
    return pad_sequence(waves, batch_first=True), lengths, torch.tensor(indices)


def decode(path: str | Path) -> Tensor:
    """Any WAV file -> mono 16 kHz (n_samples,): int16 where it holds just that, float32 in [-1, 1]
    otherwise.

    ValueError (naming file and reason): unreadable, truncated, empty, not finite, another encoding.
    """
    rate, samples = read_samples(path)  # (n,) or (n, channels)
    if rate == SAMPLE_RATE and samples.dtype == np.int16 and samples.ndim == 1:
        return torch.from_numpy(samples)
    if samples.dtype == np.uint8:  # 8-bit WAV is the unsigned one
        samples = (samples - 128.0) / 128
    elif samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    return torchaudio.functional.resample(
        torch.from_numpy(samples.astype(np.float32)), rate, SAMPLE_RATE
    )


class Clip(NamedTuple):  # one WAV file and what its name says; None and '' where it says nothing
    path: Path
    machine: str
    split: str  # "train" or "test"
    domain: str | None  # "source" or "target"
    is_anomaly: bool | None
    attributes: str  # e.g. "vel_9_loc_A"; with the machine, the class that training tells apart


CLIP_NAME = (
    r"section_\d\d_(source|target)_(?:train|test)_(normal|anomaly)_\d{4}(?:_(.*))?\.(?i:wav)"
)


def parse_clip(path: str | Path) -> Clip:
    """fan/test/section_00_source_test_anomaly_0022_m-n_W.wav -> machine fan, source, anomaly,
    attributes m-n_W.

    A name of another form (the evaluation set's section_00_0000.wav, one's own files) is a clip
    without labels.
    """
    path = Path(path)
    match = re.fullmatch(CLIP_NAME, path.name)
    domain, label, attributes = match.groups() if match else (None, None, None)
    is_anomaly = None if label is None else label == "anomaly"
    return Clip(
        path, path.parent.parent.name, path.parent.name, domain, is_anomaly, attributes or ""
    )


# -------------------------------------------- plumbing: nothing below is in the paper

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
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from scipy.io import wavfile
from tqdm import tqdm

# Folders of clips


def list_clips(root: str | Path, machine: str, split: str) -> list[Clip]:
    """The clips in root/machine/split, sorted by name. Hidden files (macOS's "._x.wav") are left
    out.

    FileNotFoundError: no such folder, or no WAV file in it. ValueError: an anomaly among the
    training clips.
    """
    folder = Path(root) / machine / split
    if not folder.is_dir():
        raise FileNotFoundError(why_missing(folder))
    paths = sorted(
        p for p in folder.iterdir() if p.suffix.lower() == ".wav" and not p.name.startswith(".")
    )
    if not paths:
        raise FileNotFoundError(f"{folder} has no WAV file; put this machine's {split} clips there")
    clips = [parse_clip(path) for path in paths]
    if anomalies := [clip for clip in clips if split == "train" and clip.is_anomaly]:
        path = anomalies[0].path
        raise ValueError(
            f"{path} is an anomaly by its name; training uses normal clips only: move it away"
        )
    return clips


def why_missing(folder: Path) -> str:
    root, machine, split = folder.parent.parent, folder.parent.name, folder.name
    if (folder.parent / machine / split).is_dir():
        return (
            f"{folder.parent / machine / split} is nested one folder too deep; move it to {folder}"
        )
    if machine in ARCHIVES:
        return f"{folder} is missing; `python data.py --machine {machine} --data {root}` fetches it"
    own = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    near = difflib.get_close_matches(machine, DEV + EVAL + own, n=1)
    return f"{folder} is missing; " + (
        f"did you mean {near[0]!r}?" if near else f"put {split} clips (WAV) there"
    )


# WAV files

# scipy warns of chunks that it skips (LIST, bext, ...); what would harm us is checked below
# instead.
warnings.filterwarnings("ignore", category=wavfile.WavFileWarning)


class WholeBytes(io.BytesIO):
    """Bytes that do not end in the middle of a read: of a truncated clip scipy would return what is
    left."""

    def read(self, size=-1):
        content = super().read(size)
        if 0 < len(content) < size:
            raise ValueError(f"truncated: {size} bytes announced, {len(content)} there")
        return content


def read_samples(path: str | Path) -> tuple[int, np.ndarray]:
    """(sample rate, samples (n,) or (n, channels)) of a WAV file. ValueError (naming it): it cannot
    be used."""
    try:
        content = Path(path).read_bytes()
        rate, samples = wavfile.read(WholeBytes(content))
        samples = samples.astype(samples.dtype.newbyteorder("="))  # RIFX is big-endian
        order = ">" if content[:4] == b"RIFX" else "<"
        channels, block, bits = struct.unpack_from(
            order + "2xH8xHH", content, content.find(b"fmt ") + 8
        )
        if block != channels * -(
            -bits // 8
        ):  # readers disagree on where in its bytes such a sample sits
            raise ValueError(
                f"{bits}-bit samples in {block / channels:g} bytes each; convert it to 16-bit PCM"
            )
        if samples.size == 0:
            raise ValueError("no samples")
        if samples.dtype.kind == "f" and not np.isfinite(samples).all():
            raise ValueError("samples that are not finite (NaN or infinity)")
        if (
            samples.dtype.kind == "f" and (peak := np.abs(samples).max()) > 8
        ):  # a little over 1 is normal
            raise ValueError(
                f"float samples up to {peak:g} instead of 1; divide them by their full scale"
            )
        # The resampling filter has about (rate / divisor) · (16000 / divisor) weights: 70,560 from
        # 44.1 kHz, 256 million from 16,001 Hz.
        if rate < 1000 or rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > 10_000_000:
            raise ValueError(
                f"a sample rate of {rate} Hz cannot be converted to 16 kHz; resample the file yourself"
            )
        return rate, samples
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (
        TypeError,
        ArithmeticError,
        NameError,
        struct.error,
    ) as error:  # scipy's, on some damaged headers
        raise ValueError(f"{path}: a damaged or incomplete header") from error


def read_wav(path: str | Path) -> Tensor:
    """As decode, float32 always. What can be read: PCM of 8 to 64 bit, float, EXTENSIBLE, RF64,
    RIFX."""
    return to_float(decode(path))


def check_clips(clips: list[Clip]) -> list[int]:
    """Decode every clip once, before any long work; -> their lengths in samples at 16 kHz.

    ValueError: lists every clip that cannot be used (the first ten, and how many).
    """

    def length(clip: Clip) -> int | str:
        try:
            n_samples = len(decode(clip.path))
        except ValueError as error:
            return str(error)
        return n_samples if n_samples >= FRAME else f"{clip.path}: shorter than one frame of 25 ms"

    with ThreadPoolExecutor() as pool:
        lengths = list(progress(pool.map(length, clips), "checking", len(clips)))
    if bad := [reason for reason in lengths if isinstance(reason, str)]:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        listed = "; ".join(bad[:10])
        raise ValueError(
            f"{len(bad)} of {len(clips)} clips cannot be used (mend or remove them): {listed}{more}"
        )
    return lengths


# What the commands share

DEV = ["ToyCar", "ToyTrain", "bearing", "fan", "gearbox", "slider", "valve"]
EVAL = ["ToyDrone", "ToyNscale", "ToyTank", "Vacuum", "bandsaw", "grinder", "shaker"]
PLACES = {
    "run",
    "data",
    "weights",
    "workers",
    "device",
    "compile",
}  # train.py's arguments that change no result


def machine_names(names: list[str]) -> list[str]:
    """The machines meant by --machine: dev, eval and all are expanded, doubles dropped, the order
    kept.

    ValueError: a name that cannot be the name of a folder in --data.
    """
    groups = {"dev": DEV, "eval": EVAL, "all": DEV + EVAL}
    for name in names:
        if not re.fullmatch(r"[^/\\+]+", name) or name.startswith("."):
            raise ValueError(f"--machine {name!r}: a machine is the name of a folder in --data")
    return list(dict.fromkeys(machine for name in names for machine in groups.get(name, [name])))


def default_run(names: list[str], pretrained: bool = False) -> Path:
    """Where a run of these --machine names is unless --run says otherwise: runs/fan,
    runs/pretrained-fan, ..."""
    return Path("runs") / ("pretrained-" * pretrained + "+".join(names))


def next_command(script: str, names: list[str], run: str | Path) -> str:
    """The command line that comes next for this run, printed at the end of a script."""
    elsewhere = f" --run {shlex.quote(str(run))}" if Path(run) != default_run(names) else ""
    return f"python {script} --machine {shlex.join(names)}{elsewhere}"


def make_loader(clips: list["Clip"], batches: list, workers: int, device: torch.device):
    """Yields what `collate` makes of each batch, a list of (clip index, first sample)."""
    return torch.utils.data.DataLoader(
        Windows(clips),
        batch_sampler=batches,
        num_workers=workers,
        # One batch in waiting for each: 4 x 10 MB of shared memory. Docker gives a container 64 MB.
        prefetch_factor=1 if workers else None,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )


def make_parser(prog: str, about: str) -> argparse.ArgumentParser:
    """A line a flag in -h; an error is one line, without the list of all flags before it."""

    def wide(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118)

    return argparse.ArgumentParser(
        prog, argparse.SUPPRESS, about, allow_abbrev=False, formatter_class=wide
    )


WORKER_KILLED = (
    "a process that reads WAV files was killed, mostly for want of shared memory; give the container more "
    "(docker run --shm-size=1g), or read without such processes: --workers 0"
)


@contextmanager
def one_line_errors(
    parser: argparse.ArgumentParser, interrupted: str = "the same command continues from here"
):
    """What a user can mend ends in one line and exit status 2; Ctrl-C in 130; anything else is a
    bug of ours."""
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; {interrupted}\n")
    except torch.OutOfMemoryError:
        parser.error(
            "the GPU's memory is too small for this --batch-size; halve it (train.py: double --accumulate)"
        )
    except (ValueError, OSError) as error:
        parser.error(
            str(error).strip().splitlines()[-1]
        )  # of a DataLoader worker's traceback, the line that is ours
    except RuntimeError as error:
        if not re.match(r"DataLoader worker .* (killed|exited)", str(error)):
            raise
        parser.error(WORKER_KILLED)


def progress(items, what: str, total: int, unit: str = "clips"):
    """Iterate with a bar; where the output is no terminal, with one line."""
    if not sys.stderr.isatty() and total:
        print(f"{what}: {total:,} {unit}", file=sys.stderr)
    return tqdm(items, what, total, leave=False, unit=unit, disable=None)


@contextmanager
def whole_file(path: str | Path):
    """A file to write to that replaces `path` when it is complete: whole or not at all, whatever
    happens."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write {path}: {error.strerror}; the file is as it was before"
            ) from error
        raise


def write_file(path: str | Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def write_csv(path: str | Path, rows: list) -> None:
    """A CSV file as the challenge wants it: fields quoted where they must be, \\n at the end of
    each line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(
        path, text.getvalue().encode("utf-8", "surrogateescape")
    )  # any name that a file can have


def read_json(path: str | Path) -> dict:
    """{} where there is no such file. ValueError: it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or delete its folder"
        ) from error


def make_run_folder(run: Path) -> None:
    """OSError: it cannot be made or written to."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "writable.part").touch()
        (run / "writable.part").unlink()
    except OSError as error:
        raise OSError(
            f"cannot use {run} as a run folder ({error.strerror}); name another with --run"
        ) from error


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
AGENT = "asd-lora/1.0 (reference implementation of arXiv 2409.07016)"  # Zenodo refuses default library agents


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
            after = error.headers.get("Retry-After", "5")  # seconds, or a date
            wait = min(60, int(after)) if after.isdigit() else 60
            print(
                f"{url}: the server answers {error.code} {error.reason}; trying again in {wait} s",
                file=sys.stderr,
            )
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
            raise ValueError(
                f"{path} {problem}; delete it, or replace it by what a browser gets from {url}"
            )
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"open {url} in a browser and put the file at {path}; `python tests/demo.py` needs no download"
    try:
        download_rest(url, part)
    except urllib.error.HTTPError as error:
        raise OSError(
            f"the server refuses {url} ({error.code} {error.reason}): {by_hand}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"cannot fetch {url} ({reason}); repeat the command to continue, or {by_hand}"
        ) from error
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
        bar = tqdm(
            desc=part.stem,
            total=total or None,
            initial=done,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        with part.open("ab" if done else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise OSError(f"the connection broke at {part.stat().st_size:,} of {total:,} bytes")


def unpack(archive: Path, machine: str, root: Path, splits: list[str]) -> None:
    """Move what a zip file has below `<machine>/` into root; each folder arrives whole or not at
    all.

    zipfile keeps every member inside its folder and makes no links. ValueError: not a whole zip
    file of the machine.
    """
    part = root / f".{archive.stem}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(
                part, [name for name in file.namelist() if name.startswith(f"{machine}/")]
            )
        if lacking := [split for split in splits if not (part / machine / split).is_dir()]:
            raise ValueError(f"{archive} has no folder {machine}/{lacking[0]}")
        (root / machine).mkdir(exist_ok=True)
        for source in (part / machine).iterdir():
            if not (
                root / machine / source.name
            ).exists():  # an evaluation machine's two archives share a file
                source.rename(root / machine / source.name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{archive} cannot be unpacked ({error}); delete it and try again"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch(machine: str, root: str | Path) -> None:
    """Download, verify and unpack what is missing of one DCASE2023 machine (a few hundred MB).

    For an evaluation machine also the ground truth that its file names do not tell.
    """
    root = Path(root)
    for record, name, splits in ARCHIVES[machine]:
        if not all((root / machine / split).is_dir() for split in splits):
            archive = root / f"{name}.zip"
            download(
                f"{ZENODO}/{record}/files/{name}.zip?download=1", archive, "md5", ARCHIVE_MD5[name]
            )
            unpack(archive, machine, root, splits)
            archive.unlink()
    for kind in ("data", "domain") if machine in EVAL else ():
        file = f"ground_truth_{kind}/ground_truth_{machine}_section_00_test.csv"
        download(f"{GROUND_TRUTH}/{file}", root / "ground_truth" / file)


def prepare(machines: list[str], root: str | Path, split: str) -> None:
    """Fetch the DCASE2023 machines of which `root` does not hold that split yet; the others must be
    there.

    One's own come first: a misspelt name is reported before anything is fetched. Errors: see
    list_clips, fetch.
    """
    for machine in sorted(machines, key=lambda machine: machine in ARCHIVES):
        folder = Path(root) / machine / split
        if machine in ARCHIVES and not folder.is_dir() and not (folder.parent / machine).is_dir():
            print(f"{folder} is missing: fetching {machine}")
            fetch(machine, root)
        list_clips(root, machine, split)


def main(argv: list[str] | None = None) -> None:
    about = "Fetch, verify and unpack machines of DCASE2023 Task 2: python data.py --machine fan"
    parser = make_parser("data.py", about)
    parser.add_argument(
        "--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all"
    )
    parser.add_argument(
        "--data", default="data", metavar="DIR", help="where to (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        for machine in machine_names(args.machine):
            if machine not in ARCHIVES:
                near = difflib.get_close_matches(machine, ARCHIVES, n=1)
                raise ValueError(
                    f"no machine {machine!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            fetch(machine, args.data)
            n_train, n_test = (
                len(list_clips(args.data, machine, split)) for split in ("train", "test")
            )
            print(f"{args.data}/{machine}: {n_train:,} training clips, {n_test:,} test clips")


if __name__ == "__main__":
    main()
