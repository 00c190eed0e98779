"""The method in miniature: made-up sounds, and a tiny AST that was taught made-up sounds. No
download, no GPU, 1 to 3 minutes on two cores.

    python tests/demo.py                    # one machine: no network, AST as it is, frozen, LoRA
    python tests/demo.py --machine saw      # any name is a machine of its own
    python tests/demo.py --all              # five machines x three seeds, and full fine-tuning
    python tests/demo.py --all --machine ToyCar --data data     # the same rows, on real clips

Writes a machine's sounds to data/demo in the challenge's layout, then runs the ordinary commands,
each printed before it runs, with a tiny AST of 3 blocks and 64 dimensions. It was taught to tag
made-up general sounds (voices, music, rain, engines; tests/pretrain.py at commit e2820ac), none of
these machines among them. The learning rates were chosen on the names fan, pump, valve and gearbox,
for each trained row the best of 1e-3, 3e-3 and 1e-2 (--choose at e2820ac), before --all ran once.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import shlex
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import fft
from scipy.io import wavfile
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402

# ---------------------------------------------------------------- sounds

MODES = HARMONICS = 24
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
    """One way to run it: a pitch, harmonics, a modulation and knocks of its own."""
    modulation = machine.modulation[0] * float(np.exp(random.uniform(-0.7, 0.7)))
    knocks = machine.knocks[0] * float(np.exp(random.uniform(-0.4, 0.4)))
    return machine._replace(
        pitch=machine.pitch * float(np.exp(random.uniform(-0.25, 0.25))),
        harmonics=machine.harmonics + random.normal(0, 5, HARMONICS),
        modulation=(modulation, random.uniform(0.1, 0.6)),
        knocks=(knocks, random.uniform(0.2, 1.5)),
    )


def recorded(random: np.random.Generator, sound: Sound, microphone: np.ndarray, slope: float):
    """What differs between two recordings of one mode at one place: a little of everything, a lot
    of the background's loudness and colour.
    """
    (rate, depth), (knock_rate, strength) = sound.modulation, sound.knocks
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
    """Move one of what the modes differ in, and leave the level alone."""
    (rate, depth), (knock_rate, strength) = sound.modulation, sound.knocks
    if fault == "harmonics":
        return sound._replace(harmonics=sound.harmonics + random.normal(0, 4, HARMONICS))
    if fault == "knocks":
        return sound._replace(knocks=(knock_rate * random.choice([0.7, 1.4]), strength + 0.8))
    if fault == "modulation":
        return sound._replace(modulation=(rate * random.choice([0.5, 2]), depth + 0.15))
    return sound._replace(pitch=sound.pitch * random.choice([0.88, 1.12]))


def make_machine(
    root: str | Path, name: str, n_train: int = 168, n_test: int = 48, seconds: float = 10.0
) -> None:
    """Write a made-up machine to root/name, unless it is there; each name has its own sounds.

    n_train  training clips, of which the last fourteenth, at least three, are of the target
             domain, which has another microphone and another background
    n_test   test clips for each domain and label
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
    for split in ("train", "test"):
        (part / split).mkdir(parents=True, exist_ok=True)

    def write(split: str, domain: str, fault: str | None, index: int, mode: int) -> None:
        sound = recorded(random, modes[mode], *places[domain])
        if fault:
            sound = with_fault(random, sound, fault)
        wave = synthesise(random, sound, seconds)
        samples = np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)
        what = f"{domain}_{split}_{'anomaly' if fault else 'normal'}"
        path = part / split / f"section_00_{what}_{index:04d}_mode_{mode:02d}.wav"
        wavfile.write(path, data.SAMPLE_RATE, samples)

    for i in range(n_train):
        domain = "source" if i < n_train - max(3, n_train // 14) else "target"
        write("train", domain, None, i, i % MODES)
    for i in range(n_test):
        for domain in ("source", "target"):
            write("test", domain, None, i, i % MODES)
            write("test", domain, FAULTS[i % 4], i, (i + i // MODES) % MODES)
    part.rename(folder)


# ---------------------------------------------------------------- commands

WEIGHTS = ROOT / "tests" / "tiny_ast.safetensors"
ROWS = {  # of the table -> the flags of its command
    "no network": "",
    "as it is": "--pretrained",
    "frozen": "--tuning frozen --lr 1e-2",
    "full": "--tuning full --lr 3e-3 --ast-lr 3e-4",
    "LoRA": "--tuning lora --rank 8 --lr 3e-3",
}
UNTRAINED = ("no network", "as it is")
TRAINING = "--epochs 6 --batch-size 8 --freq-mask 20"  # the same in every row
MACHINES = ["auger", "chipper", "hoist", "kiln", "winch"]  # of --all
SEEDS = [0, 1, 2]
NUMBERS = ["harmonic_mean", "auc_source", "auc_target", "pauc"]


def command(script, line: str) -> None:
    print(f"\n$ python {Path(script.__file__).name} {line}", flush=True)
    script.main(shlex.split(line))


def score_without_network(root: str, machine: str, run: Path) -> None:
    """What AST is worth: the same nearest neighbour, on the mean and the standard deviation of each
    mel bin over the first 10 s.
    """
    features, clips = {}, {}
    for split in ("train", "test"):
        clips[split] = data.list_clips(root, machine, split)
        frames = [data.spectrogram(data.read_wav(clip.path))[:998] for clip in clips[split]]
        features[split] = np.array([np.concatenate([x.mean(0), x.std(0)]) for x in frames])
    found, _ = NearestNeighbors(n_neighbors=1).fit(features["train"]).kneighbors(features["test"])
    names = [clip.path.name for clip in clips["test"]]
    run.mkdir(parents=True, exist_ok=True)
    scores, _, record = evaluate.files_of(machine, run)
    data.write_csv(scores, zip(names, found[:, 0]))
    how = {"model": "no network", "normalize": "none", "k": 1, "setting": {}}
    about = {"scored_with": how, "scores_sha256": data.file_digest(scores), "data": root}
    record.write_text(json.dumps(about))


def numbers_of(root: str, machine: str, row: str, seed: int = 0, how: str = "none") -> list[float]:
    """Train, score and evaluate by the ordinary commands; -> NUMBERS, in per cent."""
    run = Path("runs/demo") / f"{machine}-{row.replace(' ', '-')}-seed{seed}"
    places = f"--machine {shlex.quote(machine)} --run {shlex.quote(str(run))}"
    here = f"--data {root} --weights {shlex.quote(os.path.relpath(WEIGHTS))} --device cpu"
    if row == "no network":
        print("\nnearest neighbour without a network")
        with data.one_line_errors():
            score_without_network(root, machine, run)
    elif row == "as it is":
        command(score, f"{places} {ROWS[row]} --normalize {how} {here}")
    else:
        command(train, f"{places} {ROWS[row]} {TRAINING} --seed {seed} {here}")
        has_matplotlib = importlib.util.find_spec("matplotlib") is not None
        plot = " --plot" if row == "LoRA" and has_matplotlib else ""
        command(score, f"{places} --normalize {how} --device cpu{plot}")
    command(evaluate, places)
    with open(run / "metrics.csv", newline="") as file:
        metrics = next(csv.DictReader(file))
    return [100 * float(metrics[name]) for name in NUMBERS]


def compare(machines: list[str], root: str) -> None:
    """--all: all rows over the seeds, with two back-ends; the same command again continues."""
    jobs = []
    for machine in machines:
        for row in ROWS:
            for seed in [0] if row in UNTRAINED else SEEDS:
                jobs += [(machine, row, seed, how) for how in ("none", "density")]
    found = {}
    for job in tqdm(jobs, "runs"):
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            found[job] = numbers_of(root, *job)
    table, scores = {}, {}
    for how in ("none", "density"):
        for row in ROWS:
            trials = [numbers for job, numbers in found.items() if job[1::2] == (row, how)]
            spread = np.std(trials, axis=0, ddof=1) if len(trials) > 1 else [np.nan] * 4
            cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(np.mean(trials, axis=0), spread)]
            table[f"{row}, {how}"] = cells
            scores[row] = np.reshape([n[0] for n in trials], (len(machines), -1)).mean(axis=1)
        for row in ("as it is", "frozen", "full") if len(machines) > 1 else ():
            gain = scores["LoRA"] - scores[row]  # of each machine
            error = gain.std(ddof=1) / len(gain) ** 0.5
            print(f"LoRA minus {row}, {how}: {gain.mean():.1f} ± {error:.1f} (standard error)")
    print_table(table)


def free_cores() -> int:
    """As many as were idle for half a second. The load average would still count an installation
    that has just ended.
    """

    def idle() -> int:
        return int(Path("/proc/stat").read_text().split()[4])  # clock ticks, of all cores together

    before = idle()
    time.sleep(0.5)
    return round((idle() - before) / (0.5 * os.sysconf("SC_CLK_TCK")))


def print_table(table: dict[str, list[str]]) -> None:
    print("\n| row | official score, % | AUC source | AUC target | pAUC |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row, cells in table.items():
        print(f"| {row} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The method in miniature, on made-up sounds.")
    add = parser.add_argument
    add("--machine", nargs="+", metavar="NAME", help=f"a name; several with --all ({MACHINES[0]})")
    add("--data", metavar="DIR", help="of real clips (none: made up in data/demo)")
    add("--all", action="store_true", help=f"{', '.join(MACHINES)}; all rows, seeds 0, 1, 2")
    args = parser.parse_args(argv)
    torch.set_num_threads(max(1, min(free_cores(), torch.get_num_threads())))  # or they thrash
    machines = args.machine or (MACHINES if args.all else MACHINES[:1])
    for machine in machines if args.data is None else []:
        make_machine("data/demo", machine)
    root = args.data or "data/demo"
    if args.all:
        return compare(machines, root)
    table = {}
    for row in ("no network", "as it is", "frozen", "LoRA"):
        table[row] = [f"{number:.1f}" for number in numbers_of(root, machines[0], row)]
    sounds = "Made-up sounds" if args.data is None else "Real sounds"
    print(f"\n{sounds}, and a tiny AST taught on made-up ones: no numbers of the paper's method.")
    print_table(table)
    page = f"runs/demo/{machines[0]}-LoRA-seed0/report_{machines[0]}.html"
    print(f"\nto look and listen, open {page} in a browser")


if __name__ == "__main__":
    main()
