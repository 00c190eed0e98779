"""The method in miniature, on made-up sounds: no download, no GPU, a minute and a half on two CPU
cores.

    python tests/demo.py                    # one machine: the AST as it is, then adapted with LoRA
    python tests/demo.py --machine pump     # any name is a machine of its own
    python tests/demo.py --all              # five machines x three seeds x four rows, half an hour

Writes the sounds of a machine to data/demo/<name> in the challenge's layout, then runs the ordinary
commands, each printed before it runs, with the tiny AST that tests/pretrain.py has pre-trained on
other made-up sounds. It shows what a run looks like and compares the rows of the paper's table in
miniature, whichever of them wins; its figures are no figures of DCASE, and this is not the AudioSet
AST.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import os
import shlex
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import wavfile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402

# ---------------------------------------------------------------- sounds

HARMONICS = 24
FAULTS = ["harmonics", "knocks", "modulation", "pitch"]


class Sound(NamedTuple):
    """What a machine sounds like, and what lies between it and the recording."""

    pitch: float  # Hz
    harmonics: np.ndarray  # dB, (24,)
    modulation: tuple[float, float]  # of the loudness: Hz, depth
    knocks: tuple[float, float]  # a second, strength against the hum
    noise: tuple[float, float]  # of the background: dB an octave, dB against the hum
    microphone: np.ndarray  # dB at 31 Hz, 63 Hz, ... 8 kHz, (9,)
    level: float  # dB


def synthesise(random: np.random.Generator, sound: Sound, seconds: float) -> np.ndarray:
    """One recording, float64 (n_samples,)."""
    n = int(seconds * data.SAMPLE_RATE)
    t = np.arange(n) / data.SAMPLE_RATE
    order = np.arange(1, HARMONICS + 1)
    audible = order * sound.pitch < 0.45 * data.SAMPLE_RATE
    spectrum = np.zeros(2049, complex)
    phases = np.exp(2j * np.pi * random.random(HARMONICS))
    spectrum[order] = audible * 10 ** (sound.harmonics / 20) * phases
    period = np.fft.irfft(spectrum)  # one turn of the machine, 4096 points
    period /= period.std()
    wobble = (
        0.002
        * np.sin(2 * np.pi * random.uniform(0.3, 1.0) * t + random.uniform(0, 6))
        / (2 * np.pi * 0.6)
    )
    position = sound.pitch * (t + wobble) % 1 * 4096
    i = position.astype(int)
    wave = period[i] + (position - i) * (np.roll(period, -1)[i] - period[i])
    rate, depth = sound.modulation
    wave *= 1 + depth * np.sin(2 * np.pi * rate * t + random.uniform(0, 6))

    rate, strength = sound.knocks
    if rate and strength:
        k = np.arange(1200)
        for at in np.arange(random.uniform(0, 1 / rate), seconds, 1 / rate):
            at = int((at + random.normal(0, 0.003)) * data.SAMPLE_RATE)
            if 0 <= at < n:
                ring = np.exp(-k / 200) * np.sin(2 * np.pi * 2200 * k / data.SAMPLE_RATE)
                wave[at : at + 1200] += (ring * strength * random.uniform(0.7, 1.3))[: n - at]

    frequency = np.fft.rfftfreq(n, 1 / data.SAMPLE_RATE)
    slope, level = sound.noise
    shape = (np.maximum(frequency, 50) / 1000) ** (slope / 6.02)
    noise = np.fft.irfft(
        shape * (random.normal(size=len(shape)) + 1j * random.normal(size=len(shape))), n
    )
    noise *= 10 ** (level / 20) / noise.std()
    octave = np.log2(np.maximum(frequency, 31.25) / 31.25)  # 0 .. 8
    microphone = 10 ** (np.interp(octave, np.arange(9), sound.microphone) / 20)
    wave = np.fft.irfft(np.fft.rfft(wave + noise) * microphone, n)
    return wave / wave.std() * 0.05 * 10 ** (sound.level / 20)


def any_sound(random: np.random.Generator) -> Sound:
    """What tests/pretrain.py pre-trains on: any machine, background and microphone."""
    return Sound(
        pitch=float(np.exp(random.uniform(np.log(40), np.log(400)))),
        harmonics=-random.uniform(2, 8) * np.log2(np.arange(1, 25)) + random.normal(0, 6, 24),
        modulation=(
            float(np.exp(random.uniform(np.log(0.8), np.log(12)))),
            float(random.choice([0, random.uniform(0.1, 0.8)])),
        ),
        knocks=(random.uniform(2, 9), float(random.choice([0, random.uniform(0.3, 3)]))),
        noise=(random.uniform(-6, 3), random.uniform(-25, 5)),
        microphone=np.cumsum(random.normal(0, 2, 9)),
        level=random.uniform(-10, 10),
    )


def make_machine(
    root: str | Path, name: str, n_train: int = 168, n_test: int = 48, seconds: float = 10.0
) -> None:
    """Write a made-up machine to root/name in DCASE layout, unless it is there; a machine of its
    own for each name.

    n_train  training clips, of which the last fourteenth, at least three, are of the target domain
    n_test   test clips per domain and label

    Its attribute is one of twelve modes of operation, each with its own pitch, harmonics,
    modulation of the loudness, and knocks. From clip to clip these vary a little, the microphone
    more, the background's loudness and colour a lot; the target domain has another microphone and
    another background. A fault moves one of what the modes differ in to where no mode is, and
    leaves the level alone.
    """
    folder = Path(root) / name
    if folder.is_dir():
        return
    random = np.random.default_rng(zlib.crc32(name.encode()))
    machine = any_sound(random)._replace(
        pitch=float(np.exp(random.uniform(np.log(60), np.log(200))))
    )
    modes = [
        machine._replace(
            pitch=machine.pitch * float(np.exp(random.uniform(-0.25, 0.25))),
            harmonics=machine.harmonics + random.normal(0, 5, HARMONICS),
            modulation=(
                machine.modulation[0] * np.exp(random.uniform(-0.7, 0.7)),
                random.uniform(0.1, 0.6),
            ),
            knocks=(
                machine.knocks[0] * np.exp(random.uniform(-0.4, 0.4)),
                random.uniform(0.2, 1.5),
            ),
        )
        for _ in range(12)
    ]
    places = {
        domain: (random.normal(0, 1.5, 9), random.uniform(-3, 1)) for domain in ("source", "target")
    }
    part = folder.with_name(f".{name}.part")

    def write(split: str, domain: str, fault: str | None, index: int, mode: int) -> None:
        sound = recorded(random, modes[mode], *places[domain])
        wave = synthesise(random, with_fault(random, sound, fault) if fault else sound, seconds)
        label = "anomaly" if fault else "normal"
        path = part / split / f"section_00_{domain}_{split}_{label}_{index:04d}_mode_{mode:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)
        wavfile.write(path, data.SAMPLE_RATE, samples)

    n_source = n_train - max(3, n_train // 14)
    for i in range(n_train):
        write("train", "source" if i < n_source else "target", None, i, i % 12)
    for i in range(n_test):
        for domain in ("source", "target"):
            write("test", domain, None, i, i % 12)
            write("test", domain, FAULTS[i % 4], i, (i + i // 12) % 12)
    part.rename(folder)


def recorded(
    random: np.random.Generator, sound: Sound, microphone: np.ndarray, slope: float
) -> Sound:
    """Normal variation: what differs between two recordings of the same mode at the same place."""
    rate, depth = sound.modulation
    knock_rate, strength = sound.knocks
    return sound._replace(
        pitch=sound.pitch * random.normal(1, 0.004),
        harmonics=sound.harmonics + random.normal(0, 1, HARMONICS),
        modulation=(rate * random.normal(1, 0.03), depth * random.uniform(0.85, 1.15)),
        knocks=(knock_rate * random.normal(1, 0.03), strength * random.uniform(0.85, 1.15)),
        noise=(slope + random.normal(0, 3.5), random.uniform(-25, -8)),
        microphone=microphone + random.normal(0, 1, 9),
        level=random.uniform(-10, 10),
    )


def with_fault(random: np.random.Generator, sound: Sound, fault: str) -> Sound:
    if fault == "harmonics":
        return sound._replace(harmonics=sound.harmonics + random.normal(0, 4, HARMONICS))
    if fault == "knocks":
        return sound._replace(
            knocks=(sound.knocks[0] * random.choice([0.7, 1.4]), sound.knocks[1] + 0.8)
        )
    if fault == "modulation":
        return sound._replace(
            modulation=(sound.modulation[0] * random.choice([0.5, 2]), sound.modulation[1] + 0.15)
        )
    return sound._replace(pitch=sound.pitch * random.choice([0.88, 1.12]))


# ---------------------------------------------------------------- commands

WEIGHTS = ROOT / "tests" / "tiny_ast.pth"
ROWS = {  # row of the table -> the flags of its command
    "as it is": "--pretrained",
    "frozen": "--tuning frozen",
    "full": "--tuning full --ast-lr 2e-4",
    "LoRA": "--tuning lora --rank 8",
}
TRAINING = "--epochs 6 --batch-size 8 --lr 2e-3 --freq-mask 20"  # the same in every row
MACHINES = [
    "centrifuge",
    "crusher",
    "drill",
    "loom",
    "mixer",
]  # of --all; chosen before anything was trained on them
SEEDS = [0, 1, 2]


def command(script, line: str) -> None:
    print(f"\n$ python {Path(script.__file__).name} {line}", flush=True)
    script.main(shlex.split(line))


def figures_of(machine: str, row: str, seed: int = 0) -> dict[str, float]:
    """Train, score and evaluate one row of the table by the ordinary commands; -> its figures, in
    per cent."""
    run = Path("runs") / (
        f"demo-{machine}-{row.replace(' ', '-')}" + f"-seed{seed}" * (row != "as it is")
    )
    places = f"--machine {shlex.quote(machine)} --run {shlex.quote(str(run))}"
    here = f"--data data/demo --weights {shlex.quote(os.path.relpath(WEIGHTS))} --device cpu"
    if row == "as it is":
        command(score, f"{places} {ROWS[row]} {here}")
    else:
        command(train, f"{places} {ROWS[row]} {TRAINING} --seed {seed} {here} --overwrite")
        command(
            score,
            f"{places} --device cpu"
            + " --plot" * (importlib.util.find_spec("matplotlib") is not None),
        )
    command(evaluate, places)
    with open(run / "metrics.csv", newline="") as file:
        line = next(csv.DictReader(file))
    return {
        key: 100 * float(line[key])
        for key in ("official_score", "auc_source", "auc_target", "pauc")
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="fan", help="the made-up machine's name (%(default)s)")
    parser.add_argument(
        "--all", action="store_true", help=f"{', '.join(MACHINES)}; seeds 0, 1, 2; four rows"
    )
    args = parser.parse_args(argv)
    start = time.perf_counter()
    machines = MACHINES if args.all else [args.machine]
    for machine in machines:
        print(f"made-up sounds of a machine called {machine}: data/demo/{machine}")
        make_machine("data/demo", machine)
    trials = {}  # row -> the figures of each machine and seed
    jobs = [(row, machine, seed) for machine in machines for row in (ROWS if args.all else ("as it is", "LoRA"))
            for seed in (SEEDS if args.all and row != "as it is" else [0])]  # fmt: skip
    quiet = contextlib.ExitStack()
    if args.all:
        jobs = data.progress(jobs, "runs", len(jobs), "runs")
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
    with quiet:
        for row, machine, seed in jobs:
            trials.setdefault(row, []).append(list(figures_of(machine, row, seed).values()))
    print(
        f"\nMade-up sounds and a tiny AST: no figures of DCASE. {time.perf_counter() - start:.0f} s\n"
    )
    if args.all:
        adapted = np.reshape(trials["LoRA"], (len(machines), len(SEEDS), -1)).mean(axis=1)
        gain = (adapted - trials["as it is"])[:, 0]  # of the official score, of each machine
        error = gain.std(ddof=1) / len(gain) ** 0.5
        print(
            f"LoRA minus as it is: {gain.mean():.1f} ± {error:.1f} (mean and standard error over the machines)\n"
        )
    print(
        "| row | official score, % | AUC source | AUC target | pAUC |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for row in (row for row in ROWS if row in trials):
        means = np.mean(trials[row], axis=0)
        spread = [
            f" ± {value:.1f}" if args.all else ""
            for value in np.std(trials[row], axis=0, ddof=args.all)
        ]
        print(
            f"| {row} | "
            + " | ".join(f"{m:.1f}{s}" for m, s in zip(means, spread, strict=True))
            + " |"
        )


if __name__ == "__main__":
    main()
