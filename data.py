"""From WAV files to what the network sees, and from file names to labels.

    wave (n_samples,) 16 kHz in [-1, 1]
      -> log_mel       X[t, m] = ln max(ε, Σ_f M[m, f] |FFT(frame t)[f]|²)      (T frames, F=128 mel bins)
      -> fit_frames    zeros up to T=1024 frames, or cut                        (1024, 128)
      -> normalise     (X + 4.268) / (2 · 4.569)                                (1024, 128)
      -> SpecAug       in training: one random stripe of time and one of frequency set to 0

frame t is 25 ms long and starts at t · 10 ms, M are triangular mel filters, ε is float32's 1.19e-7.

The folder layout is the challenge's, `<data>/<machine>/{train,test}/*.wav`; labels are read from the file
names. The command fetches and verifies a machine of DCASE2023 Task 2:

    python data.py --machine fan
"""

import argparse
import csv
import difflib
import errno
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import stat
import struct
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from scipy.io import wavfile
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.compliance.kaldi import get_mel_banks
from tqdm import tqdm

DEV = ["ToyCar", "ToyTrain", "bearing", "fan", "gearbox", "slider", "valve"]
EVAL = ["ToyDrone", "ToyNscale", "ToyTank", "Vacuum", "bandsaw", "grinder", "shaker"]

SAMPLE_RATE = 16000
FRAME, HOP = 400, 160  # samples: 25 ms every 10 ms
N_FRAMES, N_MELS = 1024, 128  # what the AST takes
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values, from AST's own training


# ---------------------------------------------------------------- clips and their names


class Clip(NamedTuple):
    """One WAV file and what its name says; None and '' where it says nothing."""

    path: Path
    machine: str
    split: str  # "train" or "test"
    domain: str | None  # "source" or "target"
    is_anomaly: bool | None
    attributes: str  # e.g. "vel_9_loc_A"; with the machine, the class that training tells apart


CLIP_NAME = re.compile(r"section_\d\d_(source|target)_(?:train|test)_(normal|anomaly)_\d{4}(?:_(.*))?\.(?i:wav)")


def parse_clip(path: str | Path) -> Clip:
    """Machine and split from the folders, the rest from the name, in the challenge's grammar:

    fan/test/section_00_source_test_anomaly_0022_m-n_W.wav -> domain source, anomaly, attributes m-n_W
    A name outside it (the evaluation set's section_00_0000.wav, one's own files) is a clip without labels.
    """
    path = Path(path)
    match = CLIP_NAME.fullmatch(path.name)
    domain, label, attributes = match.groups() if match else (None, None, None)
    is_anomaly = None if label is None else label == "anomaly"
    return Clip(path, path.parent.parent.name, path.parent.name, domain, is_anomaly, attributes or "")


def list_clips(root: str | Path, machine: str, split: str) -> list[Clip]:
    """The clips in root/machine/split, sorted by name. Hidden files (macOS's "._x.wav") are left out.

    FileNotFoundError: no such folder, or no WAV file in it. ValueError: an anomaly among the training clips.
    """
    folder = Path(root) / machine / split
    if not folder.is_dir():
        raise FileNotFoundError(_why_missing(folder))
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".wav" and not p.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{folder} has no WAV file; put this machine's {split} clips there")
    clips = [parse_clip(path) for path in paths]
    for clip in clips:
        if split == "train" and clip.is_anomaly:
            raise ValueError(f"{clip.path} is an anomaly by its name; training uses normal clips only: move it away")
    return clips


def _why_missing(folder: Path) -> str:
    root, machine, split = folder.parent.parent, folder.parent.name, folder.name
    if (folder.parent / machine / split).is_dir():
        return f"{folder.parent / machine / split} is nested one folder too deep; move it to {folder}"
    if machine in ARCHIVES:
        return f"{folder} is missing; `python data.py --machine {machine} --data {root}` fetches it"
    known = DEV + EVAL + ([p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else [])
    near = difflib.get_close_matches(machine, known, n=1)
    return f"{folder} is missing; " + (f"did you mean {near[0]!r}?" if near else f"put {split} clips (WAV) there")


def machine_names(names: list[str]) -> list[str]:
    """The machines meant by --machine: dev, eval and all are expanded, doubles dropped, the order kept.

    ValueError: a name that cannot be the name of a folder in --data.
    """
    groups = {"dev": DEV, "eval": EVAL, "all": DEV + EVAL}
    for name in names:
        if not re.fullmatch(r"[^/\\+]+", name) or name.startswith("."):
            raise ValueError(f"--machine {name!r}: a machine is the name of a folder in --data")
    return list(dict.fromkeys(machine for name in names for machine in groups.get(name, [name])))


def default_run(names: list[str], demo: bool = False, pretrained: bool = False) -> Path:
    """Where a run of these --machine names goes unless --run says otherwise: runs/fan, runs/demo-fan, ..."""
    return Path("runs") / ("demo-" * demo + "pretrained-" * pretrained + "+".join(names))


def next_command(script: str, names: list[str], run: Path, demo: bool) -> str:
    """The command line that goes on with this run, to be printed at the end of a script."""
    elsewhere = f" --run {shlex.quote(str(run))}" if run != default_run(names, demo) else ""
    return f"python {script} --machine {shlex.join(names)}" + elsewhere + " --demo" * demo


def write_file(path: str | Path, content: bytes) -> None:
    """Write a whole file or none: after a crash or a full disk, `path` is what it was before."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; the file is as it was before") from error


def write_csv(path: str | Path, rows: list) -> None:
    """A CSV file as the challenge wants it: fields quoted where they must be, \\n at the end of each line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))  # any name that a file can have


def read_json(path: str | Path) -> dict:
    """{} where there is no such file. ValueError: it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete its folder") from error


def make_run_folder(run: Path) -> None:
    """OSError: it cannot be made or written to."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK):
            raise PermissionError(errno.EACCES, "no write permission")
    except OSError as error:
        raise OSError(f"cannot use {run} as a run folder ({error.strerror}); name another with --run") from error


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The checksum of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# ---------------------------------------------------------------- WAV files

# scipy warns of chunks that it skips (LIST, bext, ...); what would harm us is checked below instead.
warnings.filterwarnings("ignore", category=wavfile.WavFileWarning)


class _WholeBytes(io.BytesIO):
    """Bytes that do not end in the middle of a read: of a truncated clip scipy would return what is left."""

    def read(self, size=-1):
        content = super().read(size)
        if 0 < len(content) < size:
            raise ValueError(f"truncated: {size} bytes announced, {len(content)} there")
        return content


def _decode(path: str | Path) -> Tensor:
    """Mono 16 kHz samples (n_samples,): int16 where the file holds just that, float32 in [-1, 1] otherwise."""
    try:
        content = Path(path).read_bytes()
        rate, samples = wavfile.read(_WholeBytes(content))
        order = ">" if content[:4] == b"RIFX" else "<"
        channels, block, bits = struct.unpack_from(order + "2xH8xHH", content, content.find(b"fmt ") + 8)
        if block != channels * -(-bits // 8):  # readers disagree on where in its bytes such a sample sits
            raise ValueError(f"{bits}-bit samples in {block / channels:g} bytes each; convert it to 16-bit PCM")
        samples = samples.astype(samples.dtype.newbyteorder("="))  # RIFX is big-endian
        if samples.size == 0:
            raise ValueError("no samples")
        if rate == SAMPLE_RATE and samples.dtype == np.int16 and samples.ndim == 1:
            return torch.from_numpy(samples)
        if samples.dtype.kind == "f":
            if not np.isfinite(samples).all():
                raise ValueError("samples that are not finite (NaN or infinity)")
            if (peak := np.abs(samples).max()) > 8:  # a little over 1 is normal, int16 values as floats are not
                raise ValueError(f"float samples up to {peak:g} instead of 1; divide them by their full scale")
        elif samples.dtype == np.uint8:  # 8-bit WAV is the unsigned one
            samples = (samples.astype(np.float32) - 128) / 128
        else:
            samples = samples / -float(np.iinfo(samples.dtype).min)
        if samples.ndim == 2:
            samples = samples.mean(axis=1)
        return _to_16khz(torch.from_numpy(samples.astype(np.float32)), rate)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, ArithmeticError, NameError, struct.error) as error:  # scipy's, on some damaged headers
        raise ValueError(f"{path}: a damaged or incomplete header") from error


def _to_16khz(wave: Tensor, rate: int) -> Tensor:
    divisor = np.gcd(rate, SAMPLE_RATE)
    # The resampling filter has about (rate / divisor) · (16000 / divisor) weights: 70,560 from 44.1 kHz,
    # 256 million from 16,001 Hz.
    if rate < 1000 or rate // divisor * (SAMPLE_RATE // divisor) > 10_000_000:
        raise ValueError(f"a sample rate of {rate} Hz cannot be converted to 16 kHz; resample the file yourself")
    return torchaudio.functional.resample(wave, rate, SAMPLE_RATE)


def _to_float(wave: Tensor) -> Tensor:
    # The AST was trained on waves in [-1, 1]. Samples left at the scale of int16 would add
    # ln(32768²) = 20.8 to every log-mel value, and still give plausible-looking numbers.
    return wave.float() / 32768 if wave.dtype == torch.int16 else wave


def read_wav(path: str | Path) -> Tensor:
    """A WAV file as float32 (n_samples,) in [-1, 1], mono (mean of the channels), 16 kHz.

    Reads what scipy.io.wavfile reads: PCM of 8 to 64 bit, float, EXTENSIBLE, RF64, RIFX.
    ValueError (naming file and reason): unreadable, truncated, empty, not finite, another encoding.
    """
    return _to_float(_decode(path))


def check_clips(clips: list[Clip]) -> list[int]:
    """Decode every clip once, before any long work; -> their lengths in samples at 16 kHz.

    ValueError: lists every clip that cannot be used (the first ten, and how many).
    """

    def length(clip: Clip) -> int | str:
        try:
            n_samples = len(_decode(clip.path))
        except ValueError as error:
            return str(error)
        return n_samples if n_samples >= FRAME else f"{clip.path}: shorter than one frame of 25 ms"

    with ThreadPoolExecutor() as pool:
        lengths = list(tqdm(pool.map(length, clips), "checking clips", len(clips), leave=False, disable=None))
    if bad := [reason for reason in lengths if isinstance(reason, str)]:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        listed = "; ".join(bad[:10])
        raise ValueError(f"{len(bad)} of {len(clips)} clips cannot be used (mend or remove them): {listed}{more}")
    return lengths


# ---------------------------------------------------------------- windows and batches

WINDOW = FRAME + (N_FRAMES - 1) * HOP  # 164,080 samples give exactly 1024 frames


def count_frames(n_samples: int | Tensor) -> int | Tensor:
    """How many whole frames fit: 998 for 10 s, 1198 for 12 s."""
    return 1 + (n_samples - FRAME) // HOP


def window_starts(n_samples: int) -> list[int]:
    """First samples of the fewest evenly spaced 1024-frame windows that cover a clip; [0] if it fits into one."""
    n_frames = count_frames(n_samples)
    count = -(-n_frames // N_FRAMES)
    return [round(i * (n_frames - N_FRAMES) / (count - 1)) * HOP for i in range(count)] if count > 1 else [0]


class Windows(torch.utils.data.Dataset):
    """item (index of a clip, first sample) -> (at most 164,080 samples, index).

    Which window is the sampler's choice: random in training, evenly spaced in scoring. Starting at a
    multiple of the hop makes cutting the wave the same as cutting the spectrogram.
    """

    def __init__(self, clips: list[Clip]):
        self.clips = clips

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, start = item
        return _decode(self.clips[index].path)[start : start + WINDOW], index


def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """-> waves (B, n_samples) padded with zeros, lengths (B,), clip indices (B,).

    Samples stay int16 if all are, which halves what travels to the GPU.
    """
    waves, indices = zip(*items, strict=True)
    if any(wave.dtype != torch.int16 for wave in waves):
        waves = [_to_float(wave) for wave in waves]
    lengths = torch.tensor([len(wave) for wave in waves])
    return pad_sequence(waves, batch_first=True), lengths, torch.tensor(indices)


# ---------------------------------------------------------------- waves to network input


@cache
def _window_and_mel_filters(device: torch.device) -> tuple[Tensor, Tensor]:
    """Hann window (400,) and mel filters (257, 128) on `device`."""
    band = {"low_freq": 20.0, "high_freq": 0.0}  # 0: up to half the sample rate
    no_warping = {"vtln_low": 100.0, "vtln_high": -500.0, "vtln_warp_factor": 1.0}
    filters, _ = get_mel_banks(N_MELS, 512, SAMPLE_RATE, **band, **no_warping)  # (128, 256)
    filters = torch.nn.functional.pad(filters, (0, 1)).T  # the 257th FFT bin, 8 kHz, has weight 0
    return torch.hann_window(FRAME, periodic=False).to(device), filters.to(device)


def log_mel(waves: Tensor) -> Tensor:
    """Kaldi's log-mel filter bank: waves (B, n_samples) float32 in [-1, 1] -> (B, n_frames, 128), natural log.

    Computed where the waves are. On a CPU it equals, bit for bit, torchaudio.compliance.kaldi.fbank with
    AST's settings: htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.
    ValueError: integer samples, or fewer than one frame of 400.
    """
    if not waves.is_floating_point() or waves.ndim != 2 or waves.shape[1] < FRAME:
        shape = f"{waves.dtype} {tuple(waves.shape)}"
        raise ValueError(f"log_mel needs float waves (B, n_samples) of at least {FRAME} samples, got {shape}")
    if waves.device.type == "cpu" and len(waves) > 1:  # one clip's frames fit into the cache, a batch's do not
        return torch.cat([log_mel(wave[None]) for wave in waves])
    window, filters = _window_and_mel_filters(waves.device)
    frames = waves.unfold(1, FRAME, HOP)  # (B, T, 400), a view
    frames = frames - frames.mean(dim=2, keepdim=True)
    frames -= 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=2)  # pre-emphasis, first sample repeated
    frames *= window
    power = torch.fft.rfft(frames, n=512).abs().square_()  # (B, T, 257)
    return (power @ filters).clamp_(min=torch.finfo(torch.float32).eps).log_()


def fit_frames(x: Tensor, n: int = N_FRAMES) -> Tensor:
    """Pad with zeros or cut (B, T, F) to (B, n, F).

    This comes before `normalise`, as in AST: a padded frame is then 0.467, not 0 and not silence (-1.278).
    """
    return torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[1]))  # a negative pad cuts


def normalise(x: Tensor) -> Tensor:
    """AudioSet's mean to 0 and its standard deviation to 1/2. The factor 2 is AST's: it was trained so."""
    return (x - MEAN) / (2 * STD)


def spectrogram(waves: Tensor, lengths: Tensor) -> Tensor:
    """What the AST takes: waves (B, n_samples) int16 or float, with their lengths (B,), -> (B, 1024, 128)."""
    x = fit_frames(log_mel(_to_float(waves)))
    padding = torch.arange(N_FRAMES, device=x.device) >= count_frames(lengths)[:, None]  # (B, T)
    # A clip shorter than its batch has zero *samples* there, whose log-mel is -15.9: make them zero *frames*.
    return normalise(x.masked_fill(padding[:, :, None], 0))


class SpecAug:
    """SpecAugment's masks (Park et al. 2019, arXiv 1904.08779, section 2), without its time warping.

    time_mask, freq_mask  greatest widths, in frames and mel bins; 0 turns a mask off

    x (B, T, F) -> (B, T, F): in each clip independently, w frames from t₀ on and w' bins from f₀ on become 0,
    the mean of AudioSet after `normalise`; w is uniform on {0..time_mask}, t₀ on {0..T-w}; likewise w', f₀.
    ValueError: a width below 0, or above 1024 frames or 128 bins.
    """

    def __init__(self, time_mask: int, freq_mask: int):
        if not 0 <= time_mask <= N_FRAMES or not 0 <= freq_mask <= N_MELS:
            raise ValueError(f"SpecAug masks must be 0 to {N_FRAMES} frames and 0 to {N_MELS} mel bins wide")
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


# ---------------------------------------------------------------- fetching the challenge's data

ZENODO = "https://zenodo.org/records"
GROUND_TRUTH = (
    "https://raw.githubusercontent.com/nttcslab/dcase2023_task2_evaluator/3aa8a9fe09a9a55d9dccb74fd4f17ba9791fb5ea"
)
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
# machine -> (Zenodo record, archive, the folders it holds): the development set is record 7882613, the
# additional training set 7830345, the evaluation set 7860847.
ARCHIVES = {machine: [(7882613, f"dev_{machine}", ("train", "test"))] for machine in DEV} | {
    machine: [
        (7830345, f"eval_data_{machine}_train", ("train",)),
        (7860847, f"eval_data_{machine}_test", ("test",)),
    ]
    for machine in EVAL
}


def download(url: str, path: Path, algorithm: str = "", digest: str = "") -> None:
    """Fetch `url` to `path`; a broken download goes on where it stopped, from `<path>.part`.

    algorithm, digest  "md5" or "sha256" and the checksum in hex; none where the publisher gives none
    OSError: no network, or the connection broke. ValueError: a wrong checksum; the download is deleted then.
    """
    part = path.with_name(path.name + ".part")
    if path.exists():  # put there by hand, or kept from a run that was interrupted while unpacking
        part = path
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _download_rest(url, part)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(
                f"cannot fetch {url} ({getattr(error, 'reason', error)}); the same command goes on from here, or put "
                f"the file at {path} yourself; --demo needs no download"
            ) from error
    if digest and file_digest(part, algorithm) != digest:
        part.unlink()
        raise ValueError(f"{url} has not the {algorithm} checksum {digest}; deleted, try again")
    part.replace(path)


def _download_rest(url: str, part: Path) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left: it was interrupted after the last byte
            return
        raise
    with response:
        if response.status != 206:  # the server ignores Range and sends everything
            done = 0
        total = done + int(response.headers.get("Content-Length", 0))
        with (
            part.open("ab" if done else "wb") as file,
            tqdm(desc=part.stem, total=total or None, initial=done, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise OSError(f"the connection broke at {part.stat().st_size:,} of {total:,} bytes")


def unpack(archive: Path, machine: str, root: Path, splits: tuple[str, ...]) -> None:
    """Move `<machine>/<split>` of a zip file into root; each folder arrives whole or not at all.

    ValueError: not a zip file, or one with names outside `<machine>/` or links; nothing is written then.
    """
    part = root / f".{archive.stem}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                parts = info.filename.split("/")
                if (
                    parts[0] != machine
                    or ".." in parts
                    or "\\" in info.filename
                    or stat.S_ISLNK(info.external_attr >> 16)
                ):
                    raise ValueError(f"{archive} holds {info.filename!r}, which is not a file of {machine}/; deleted")
            file.extractall(part)
        if lacking := [split for split in splits if not (part / machine / split).is_dir()]:
            raise ValueError(f"{archive} has no folder {machine}/{lacking[0]}; deleted")
        (root / machine).mkdir(exist_ok=True)
        for source in (part / machine).iterdir():
            if not (root / machine / source.name).exists():
                source.rename(root / machine / source.name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}); deleted, try again") from error
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
            download(f"{ZENODO}/{record}/files/{name}.zip?download=1", archive, "md5", ARCHIVE_MD5[name])
            try:
                unpack(archive, machine, root, splits)
            except ValueError:  # of no use; but an interruption leaves it, and the next call takes it from there
                archive.unlink()
                raise
            archive.unlink()
    for kind in ("data", "domain") if machine in EVAL else ():
        file = f"ground_truth_{kind}/ground_truth_{machine}_section_00_test.csv"
        if not (root / "ground_truth" / file).exists():
            download(f"{GROUND_TRUTH}/{file}", root / "ground_truth" / file)


def prepare(machines: list[str], root: str | Path, split: str) -> None:
    """Fetch the DCASE2023 machines of which `root` does not hold that split yet; the others must be there.

    One's own come first, so that a misspelt name is told before anything is fetched. Errors: see list_clips, fetch.
    """
    for machine in sorted(machines, key=lambda machine: machine in ARCHIVES):
        folder = Path(root) / machine / split
        if machine in ARCHIVES and not folder.is_dir() and not (folder.parent / machine).is_dir():
            print(f"{folder} is missing: fetching {machine}")
            fetch(machine, root)
        list_clips(root, machine, split)


# ---------------------------------------------------------------- the made-up machines of --demo


def make_demo(root: str | Path, machine: str, n_train: int = 14, n_test: int = 5, seconds: float = 10.0) -> None:
    """Write a small made-up machine in DCASE layout to root/machine, unless there; from a fixed seed.

    It hums at a speed that its attributes name, over noise; the target domain has another speed and another
    microphone. Anomalies are the faults that real machines have: a changed harmonic, knocks, more noise.

    n_train  training clips, the last three of the target domain;  n_test  test clips per domain and label
    """
    folder = Path(root) / machine
    if folder.is_dir():
        return
    random = np.random.default_rng(zlib.crc32(machine.encode()))
    part = folder.with_name(f".{machine}.part")
    shutil.rmtree(part, ignore_errors=True)
    pitch = random.uniform(40, 90)  # Hz, of this machine at speed 1

    def write(split: str, domain: str, label: str, index: int) -> None:
        speed = 4 if domain == "target" else 1 + index % 3
        fault = (index + index // 3) % 3 if label == "anomaly" else None
        wave = _demo_wave(random, seconds, pitch * (1 + speed / 4), domain == "target", fault)
        name = f"section_00_{domain}_{split}_{label}_{index:04d}_spd_{speed}.wav"
        (part / split).mkdir(parents=True, exist_ok=True)
        wavfile.write(part / split / name, SAMPLE_RATE, wave)

    for index in range(n_train):
        write("train", "target" if index >= n_train - 3 else "source", "normal", index)
    for index in range(n_test):
        for domain in ("source", "target"):
            for label in ("normal", "anomaly"):
                write("test", domain, label, index)
    part.rename(folder)


def _demo_wave(random, seconds: float, pitch: float, other_microphone: bool, fault: int | None) -> np.ndarray:
    """One clip, int16 (n_samples,). fault: None, 0 a changed harmonic, 1 knocks, 2 more noise."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    harmonics = 1 / np.arange(1, 13) ** 1.2 * random.uniform(0.8, 1.2, 12)
    if fault == 0:
        harmonics[4:7] *= 4
    pitch *= random.normal(1, 0.003)
    wave = sum(a * np.sin(2 * np.pi * (n + 1) * pitch * t + random.uniform(0, 6)) for n, a in enumerate(harmonics))
    wave *= 1 + 0.2 * np.sin(2 * np.pi * random.uniform(1, 2) * t)
    noise = random.normal(0, 1, len(t))
    wave += noise * (0.6 if fault == 2 else 0.25)
    if fault == 1:
        for start in random.integers(0, len(t) - 800, 3 * round(seconds)):
            wave[start : start + 800] += 3 * np.exp(-np.arange(800) / 120) * random.normal(0, 1, 800)
    if other_microphone:
        wave = wave + 0.7 * np.roll(wave, 5)
    return np.clip(wave * 3000 * random.uniform(0.8, 1.2), -32767, 32767).astype(np.int16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data.py", usage=argparse.SUPPRESS, description="Fetch, verify and unpack machines of DCASE2023 Task 2."
    )
    parser.add_argument("--machine", nargs="+", required=True, help="names, or dev, eval, all")
    parser.add_argument("--data", default="data", help="where to (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        for machine in machine_names(args.machine):
            if machine not in ARCHIVES:
                near = difflib.get_close_matches(machine, ARCHIVES, n=1)
                raise ValueError(f"no machine {machine!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            fetch(machine, args.data)
            print(
                f"{args.data}/{machine}: {len(list_clips(args.data, machine, 'train'))} training clips, "
                f"{len(list_clips(args.data, machine, 'test'))} test clips"
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "data.py: interrupted; the same command goes on from here\n")


if __name__ == "__main__":
    main()
