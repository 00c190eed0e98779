"""The method in miniature, on made-up sounds: no download, no GPU, a minute and a half on two CPU
cores.

    python tests/demo.py                    # one machine: the AST as it is, frozen, with LoRA
    python tests/demo.py --machine saw      # any name is a machine of its own
    python tests/demo.py --all              # five machines x three seeds x four rows, half an hour

Writes the sounds of a machine to data/demo/<name> in the challenge's layout, then runs the ordinary
commands, each printed before it runs, with the tiny AST that tests/pretrain.py has pre-trained on
general sounds, none of them a machine's of this file. Its figures are no figures of DCASE, and this
is not the AudioSet AST.

The protocol, written before the first comparison was run:

1. Does LoRA beat a trained head on the frozen AST, and full fine-tuning, with few clips of a
   machine that pre-training never heard? Figure: the official score; same epochs in every row.
2. Design 1: 24 modes (ToyCar has 26) of 7 training clips; modes and faults differ in details of
   one hum, which no tag of the pre-training needed. Too hard (no trained row above 60 on average):
   design 2, 12 modes of 14 clips. Too easy (a row above 90): design 3, details half as far apart.
3. Rates: on fan, pump, valve, gearbox, seed 0, each trained row takes the best mean of 1e-3, 3e-3,
   1e-2 (--choose); under "full" the AST's own weights move at a tenth, as in train.py's defaults.
4. Then once, on auger, chipper, hoist, kiln, winch, seeds 0, 1, 2 (--all). Printed, whatever it is:
   each row's mean ± standard deviation; LoRA minus each other row ± standard error over machines.
"""

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
from scipy import fft
from scipy.io import wavfile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402

# ---------------------------------------------------------------- sounds

MODES = 24
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
    """One recording, float32 (n_samples,)."""
    n = int(seconds * data.SAMPLE_RATE)
    t = np.arange(n) / data.SAMPLE_RATE
    hum = harmonics(random, sound, t)

    rate, depth = sound.modulation
    hum *= 1 + depth * np.sin(2 * np.pi * rate * t + random.uniform(0, 6))

    rate, strength = sound.knocks
    k = np.arange(1200)
    ring = strength * np.exp(-k / 200) * np.sin(2 * np.pi * 2200 * k / data.SAMPLE_RATE)
    for moment in np.arange(random.uniform(0, 1 / rate), seconds, 1 / rate):
        at = int((moment + random.normal(0, 0.003)) * data.SAMPLE_RATE)
        if 0 <= at < n:
            hum[at : at + 1200] += (random.uniform(0.7, 1.3) * ring)[: n - at]

    hz = np.fft.rfftfreq(n, 1 / data.SAMPLE_RATE)
    octave = np.log2(np.maximum(hz, 31.25) / 31.25)  # 0 .. 8
    slope, level = sound.noise
    noise = fft.rfft(random.standard_normal(n, np.float32))
    noise *= 10 ** (slope * np.maximum(octave, 0.7) / 20)
    noise *= 10 ** (level / 20) / fft.irfft(noise, n).std()
    microphone = 10 ** (np.interp(octave, np.arange(9), sound.microphone) / 20)
    wave = fft.irfft((fft.rfft(hum.astype(np.float32)) + noise) * microphone.astype(np.float32), n)
    return wave / wave.std() * 0.05 * 10 ** (sound.level / 20)


def harmonics(random: np.random.Generator, sound: Sound, t: np.ndarray) -> np.ndarray:
    """The hum at times t, of standard deviation 1; its pitch wanders a little."""
    order = np.arange(1, HARMONICS + 1)
    audible = order * sound.pitch < 0.45 * data.SAMPLE_RATE
    spectrum = np.zeros(2049, complex)
    phases = np.exp(2j * np.pi * random.random(HARMONICS))
    spectrum[order] = audible * 10 ** (sound.harmonics / 20) * phases
    turn = np.fft.irfft(spectrum)  # one turn of the machine, 4096 points
    turn /= turn.std()
    phase = 2 * np.pi * random.uniform(0.3, 1.0) * t + random.uniform(0, 6)
    wander = 0.002 * np.sin(phase) / (2 * np.pi * 0.6)
    position = sound.pitch * (t + wander) % 1 * 4096
    i = position.astype(int)
    return turn[i] + (position - i) * (np.roll(turn, -1)[i] - turn[i])


def any_machine(random: np.random.Generator) -> Sound:
    return Sound(
        pitch=float(np.exp(random.uniform(np.log(60), np.log(200)))),
        harmonics=-random.uniform(2, 8) * np.log2(np.arange(1, 25)) + random.normal(0, 6, 24),
        modulation=(float(np.exp(random.uniform(np.log(0.8), np.log(12)))), 0.3),
        knocks=(random.uniform(2, 9), 0.8),
        noise=(0.0, -15.0),
        microphone=np.zeros(9),
        level=0.0,
    )


def any_mode(random: np.random.Generator, machine: Sound) -> Sound:
    """One way to run it: a pitch, harmonics, a modulation of the loudness and knocks of its own."""
    modulation = machine.modulation[0] * float(np.exp(random.uniform(-0.7, 0.7)))
    knocks = machine.knocks[0] * float(np.exp(random.uniform(-0.4, 0.4)))
    return machine._replace(
        pitch=machine.pitch * float(np.exp(random.uniform(-0.25, 0.25))),
        harmonics=machine.harmonics + random.normal(0, 5, HARMONICS),
        modulation=(modulation, random.uniform(0.1, 0.6)),
        knocks=(knocks, random.uniform(0.2, 1.5)),
    )


def make_machine(
    root: str | Path, name: str, n_train: int = 168, n_test: int = 48, seconds: float = 10.0
) -> None:
    """Write a made-up machine to root/name in DCASE layout, unless it is there; a machine of its
    own for each name.

    n_train  training clips, of which the last fourteenth, at least three, are of the target domain
    n_test   test clips per domain and label

    Its attribute is one of 24 modes of operation, each with its own pitch, harmonics, modulation
    of the loudness, and knocks. From clip to clip these vary a little, the microphone more, the
    background's loudness and colour a lot; the target domain has another microphone and another
    background. A fault moves one of what the modes differ in, and leaves the level alone.
    """
    folder = Path(root) / name
    if folder.is_dir():
        return
    random = np.random.default_rng(zlib.crc32(name.encode()))
    machine = any_machine(random)
    modes = [any_mode(random, machine) for _ in range(MODES)]
    places = {}
    for domain in ("source", "target"):
        places[domain] = (random.normal(0, 1.5, 9), random.uniform(-3, 1))
    part = folder.with_name(f".{name}.part")

    def write(split: str, domain: str, fault: str | None, index: int, mode: int) -> None:
        sound = recorded(random, modes[mode], *places[domain])
        if fault:
            sound = with_fault(random, sound, fault)
        label = "anomaly" if fault else "normal"
        path = part / split / f"section_00_{domain}_{split}_{label}_{index:04d}_mode_{mode:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = synthesise(random, sound, seconds)
        samples = np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)
        wavfile.write(path, data.SAMPLE_RATE, samples)

    n_source = n_train - max(3, n_train // 14)
    for i in range(n_train):
        write("train", "source" if i < n_source else "target", None, i, i % MODES)
    for i in range(n_test):
        for domain in ("source", "target"):
            write("test", domain, None, i, i % MODES)
            write("test", domain, FAULTS[i % 4], i, (i + i // MODES) % MODES)
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
    rate, depth = sound.modulation
    knock_rate, strength = sound.knocks
    if fault == "harmonics":
        return sound._replace(harmonics=sound.harmonics + random.normal(0, 4, HARMONICS))
    if fault == "knocks":
        return sound._replace(knocks=(knock_rate * random.choice([0.7, 1.4]), strength + 0.8))
    if fault == "modulation":
        return sound._replace(modulation=(rate * random.choice([0.5, 2]), depth + 0.15))
    return sound._replace(pitch=sound.pitch * random.choice([0.88, 1.12]))


# ---------------------------------------------------------------- commands

WEIGHTS = ROOT / "tests" / "tiny_ast.pth"
# Row of the table -> the flags of its command; the rates are what --choose found (75.7, 79.1 and
# 78.6 on average over the four names; the AST as it is 73.8).
ROWS = {
    "as it is": "--pretrained",
    "frozen": "--tuning frozen --lr 1e-2",
    "full": "--tuning full --lr 3e-3 --ast-lr 3e-4",
    "LoRA": "--tuning lora --rank 8 --lr 3e-3",
}
TRAINING = "--epochs 6 --batch-size 8 --freq-mask 20"  # the same in every row
SHOWN = ["as it is", "frozen", "LoRA"]  # without --all
MACHINES = ["auger", "chipper", "hoist", "kiln", "winch"]  # of --all
SEEDS = [0, 1, 2]
CHOOSING = ["fan", "pump", "valve", "gearbox"]  # of --choose
RATES = ["1e-3", "3e-3", "1e-2"]
FIGURES = ["official_score", "auc_source", "auc_target", "pauc"]


def command(script, line: str) -> None:
    print(f"\n$ python {Path(script.__file__).name} {line}", flush=True)
    script.main(shlex.split(line))


def figures_of(
    machine: str, row: str, seed: int = 0, flags: str | None = None, more: str = "--overwrite"
) -> list[float]:
    """Train, score and evaluate one row by the ordinary commands; -> its FIGURES, in per cent."""
    flags = flags or ROWS[row]
    run = Path("runs/demo") / f"{machine}-{row.replace(' ', '-')}-seed{seed}"
    places = f"--machine {shlex.quote(machine)} --run {shlex.quote(str(run))}"
    here = f"--data data/demo --weights {shlex.quote(os.path.relpath(WEIGHTS))} --device cpu"
    if row == "as it is":
        command(score, f"{places} {flags} {here}")
    else:
        command(train, f"{places} {flags} {TRAINING} --seed {seed} {here} {more}")
        drawn = row == "LoRA" and importlib.util.find_spec("matplotlib") is not None
        command(score, f"{places} --device cpu" + " --plot" * drawn)
    command(evaluate, places)
    with open(run / "metrics.csv", newline="") as file:
        line = next(csv.DictReader(file))
    return [100 * float(line[figure]) for figure in FIGURES]


def run_all(jobs: list[tuple], more: str) -> dict[tuple, list[float]]:
    """(machine, row, seed, ...) -> its figures, with a bar instead of what the commands print."""
    found = {}
    quiet = contextlib.ExitStack()
    jobs = data.progress(jobs, "runs", len(jobs), "runs")
    quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
    quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
    with quiet:
        for job in jobs:
            make_machine("data/demo", job[0])
            found[job] = figures_of(*job, more=more)
    return found


def compare() -> None:
    """--all: the rows over machines and seeds, and what LoRA is worth beside each of the others.

    The same command again continues: runs that are finished are only scored again.
    """
    jobs = []
    for machine in MACHINES:
        jobs.append((machine, "as it is", 0))
        for row in list(ROWS)[1:]:
            jobs += [(machine, row, seed) for seed in SEEDS]
    found = run_all(jobs, more="")
    lines, scores = [], {}
    for row in ROWS:
        trials = np.array([figures for job, figures in found.items() if job[1] == row])
        spread = trials.std(axis=0, ddof=1)
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(trials.mean(axis=0), spread, strict=True)]
        lines.append((row, cells))
        scores[row] = trials[:, 0].reshape(len(MACHINES), -1).mean(axis=1)  # of each machine
    print()
    for row in list(ROWS)[:-1]:
        gain = scores["LoRA"] - scores[row]
        error = gain.std(ddof=1) / len(gain) ** 0.5
        print(f"LoRA minus {row}: {gain.mean():.1f} ± {error:.1f}")
    print(f"(mean and standard error over {len(MACHINES)} machines)\n")
    print_table(lines)


def choose(machines: list[str]) -> None:
    """--choose: the official score of each row at each rate, as the protocol says."""
    jobs = []
    for machine in machines:
        jobs.append((machine, "as it is", 0))
        for row in list(ROWS)[1:]:
            for rate in RATES:
                jobs.append((machine, row, 0, at_rate(row, rate)))
    found = run_all(jobs, more="--overwrite")
    print(f"\n| row | {' | '.join(machines)} | mean |")
    print("| --- |" + " ---: |" * (len(machines) + 1))
    for _, row, _, *flags in jobs[: len(jobs) // len(machines)]:
        scores = [found[(machine, row, 0, *flags)][0] for machine in machines]
        cells = [f"{score:.1f}" for score in [*scores, np.mean(scores)]]
        print(f"| {row} {' '.join(flags)} | {' | '.join(cells)} |")


def at_rate(row: str, rate: str) -> str:
    """The row's flags with this rate instead; the AST's own weights move at a tenth of it."""
    words = ROWS[row].split()
    for flag, value in (("--lr", rate), ("--ast-lr", f"{float(rate) / 10:.0e}")):
        if flag in words:
            words[words.index(flag) + 1] = value
    return " ".join(words)


def show(machine: str) -> None:
    """One machine and one seed, with all that the commands print."""
    print(f"made-up sounds of a machine called {machine}: data/demo/{machine}")
    make_machine("data/demo", machine)
    lines = []
    for row in SHOWN:
        lines.append((row, [f"{figure:.1f}" for figure in figures_of(machine, row)]))
    print()
    print_table(lines)


def print_table(lines: list[tuple[str, list[str]]]) -> None:
    print("Made-up sounds and a tiny AST: no figures of DCASE.\n")
    print("| row | official score, % | AUC source | AUC target | pAUC |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row, cells in lines:
        print(f"| {row} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser("tests/demo.py", __doc__)
    add = parser.add_argument
    add("--machine", nargs="+", metavar="NAME", help="the made-up machine's name (fan)")
    add("--all", action="store_true", help=f"{', '.join(MACHINES)}; seeds 0, 1, 2; four rows")
    add("--choose", action="store_true", help=f"{', '.join(CHOOSING)}; three rates; three rows")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    with data.one_line_errors(parser, "continues; all that is finished is kept"):
        if args.all:
            compare()
        elif args.choose:
            choose(args.machine or CHOOSING)
        else:
            show((args.machine or ["fan"])[0])
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
