"""Score: how far is a test clip from the nearest normal training clip of its machine?

    d(x, y) = 1 - e_x · e_y              cosine distance of two windows' unit-length embeddings
    score(x) = mean of the k smallest d(x, y) over the bank y of training windows        (k = 1)

A clip is cut into windows of 1024 frames; one of 10 s is a single window. Each is scored by itself,
and the clip's score is that of its most anomalous window. A clip is called anomalous if its score
is above the 90th percentile of the training clips' own scores. For its own score a training clip
meets the bank without its own windows.

Distances differ between the many source and the few target clips. --normalize is to correct that:

    none      one bank of all training windows, no correction (the default)
    test      a bank for each domain, (score - μ) / σ for each, and the smallest of these. μ and σ
              are those of all test windows against that bank, so this is TRANSDUCTIVE: every score
              and decision depends on the whole test set (from RMIS, released by the lab of
              arXiv 2409.07016)
    train     the same with μ and σ of the bank's own scores (ours: it needs no test clips)
    density   one bank, d(x, y) / ρ(y), where ρ(y) is the mean distance of y to its 4 nearest
              neighbours from other clips (Wilkinghoff et al. 2025, arXiv 2509.10951)

When a training clip is scored, its windows leave the bank, but ρ, μ and σ are not computed anew.

    python score.py --machine fan                      # with the model in runs/fan
    python score.py --machine fan --pretrained         # with the untouched AST, no training

writes the challenge's CSV files into the run folder, and report_fan.csv for people.
"""

import numpy as np
import torch

import data
from backbone import Embedder
from data import Clip, spectrogram, window_starts

DENSITY_K = 4  # neighbours that ρ averages: ASDKit's default for this back-end (k_ref_normalize)


@torch.inference_mode()
def embed(
    model: Embedder, clips: list[Clip], clip_lengths: list[int], batch_size: int, workers: int
):
    """Embed all windows of all clips, in the order of the clips; `clip_lengths` are in samples.

    Yields for each batch the windows' clip indices (B,) and embeddings (B, D) of unit length,
    computed in float32 on every device.
    """
    model.eval()
    device = model.ast.pos_embed.device
    windows = []
    for index, n_samples in enumerate(clip_lengths):
        for start in window_starts(n_samples):
            windows.append((index, start))

    for waves, lengths, index in data.Loader(clips, windows, batch_size, workers, device):
        x = spectrogram(waves, lengths)  # (B, 1024, 128)
        yield index.cpu().numpy(), model(x).cpu().numpy()


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine distance of each row of x (m, D) to each row of y (n, D), of unit length: (m, n)."""
    d = x @ -y.T
    d += 1  # in place: d may fill the memory
    np.maximum(d, 0, out=d)  # rounding may go below 0
    return d


def nearest(d: np.ndarray, k: int = 1) -> np.ndarray:
    """Mean of the k smallest distances in each row: (m, n) -> (m,).

    ValueError: a row has fewer than k that are finite.
    """
    available = np.isfinite(d).sum(axis=1).min()
    if available < k:
        raise ValueError(
            f"{k} neighbours need {k} windows of other training clips, not {available}"
        )
    # Row by row, as np.partition copies what it sorts.
    return np.array([np.partition(row, k - 1)[:k].mean() for row in d])


def anomaly_scores(
    train: np.ndarray,
    test: np.ndarray,
    owner: np.ndarray,
    domain: np.ndarray,
    k: int,
    normalize: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Score the windows of one machine's test clips, and those of its training clips.

    train (n, D) and test (m, D) are embeddings. owner (n,) and domain (n,) tell of each training
    window which clip it is from, and that clip's domain: "source", "target", or None if its name
    tells none. Returns the scores of the test windows (m,) and of the training windows (n,).
    ValueError: too few clips for what is asked.
    """
    d_test, d_train = distances(test, train), distances(train, train)  # (m, n), (n, n)
    d_train[owner[:, None] == owner] = np.inf  # no training clip is its own neighbour

    if normalize == "density":
        rho = nearest(d_train, DENSITY_K).clip(min=1e-6)  # (n,); among equal clips it would be 0
        d_test /= rho
        d_train /= rho
    if normalize in ("none", "density"):
        return nearest(d_test, k), nearest(d_train, k)

    of_test, of_train = [], []
    for name in ("source", "target", None):
        bank = domain == name  # (n,) bool: these columns of the distances
        if not bank.any():
            continue
        test_scores, train_scores = nearest(d_test[:, bank], k), nearest(d_train[:, bank], k)
        # All test windows, as their domain is not to be used; or the windows of the bank itself.
        reference = test_scores if normalize == "test" else train_scores[bank]
        mean, std = reference.mean(), reference.std()
        if std < 1e-9:
            few = f"{len(reference)} scores of a domain do not vary; too few clips"
            raise ValueError(f"--normalize {normalize}: {few}")
        of_test.append((test_scores - mean) / std)
        of_train.append((train_scores - mean) / std)
    return np.min(of_test, axis=0), np.min(of_train, axis=0)


def most_anomalous(scores: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Index of each clip's highest-scoring window, in the order of the clips: -> (n_clips,)."""
    highest = {}
    for window, clip in enumerate(owner.tolist()):
        if clip not in highest or scores[window] > scores[highest[clip]]:
            highest[clip] = window
    return np.array(list(highest.values()))


def decide(scores: np.ndarray, train_scores: np.ndarray, percentile: float = 90):
    """Decisions (n_clips,) bool, and the threshold: a percentile of the training clips' own scores.

    Both arguments have one score a clip: that of its most anomalous window.

    For a trained model the threshold is low: training has drawn those clips together, and usually
    more than 10 % of the normal clips that the model has not heard lie above it.
    """
    threshold = np.percentile(train_scores, percentile)
    return scores > threshold, threshold


# ---------------------------------------------- plumbing: not needed to follow the method

import argparse
import importlib.util
import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from scipy.ndimage import uniform_filter1d
from tqdm import tqdm

import backbone
import train
from backbone import load_ast
from data import FFT, HOP, N_MELS, SAMPLE_RATE, Recording, list_clips, log_mel, mel_filters
from lora import merge_lora

# Embeddings that are kept

KEEP_WINDOWS, KEEP_SECONDS = 4096, 120  # after so many, what has been embedded is written


class Kept(NamedTuple):
    """What is kept of a clip, under the checksum of its file's content."""

    recording: Recording
    rows: np.ndarray  # (windows, D)


def read_kept(path: Path, model_id: str) -> dict[str, Kept]:
    """ValueError: the file is damaged, or of another model."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as stored:
            found, digests = str(stored["model"]), stored["digests"].tolist()
            recordings = [Recording(int(n), *more) for n, *more in stored["recordings"].tolist()]
            rows = np.split(stored["rows"], np.cumsum(stored["windows"])[:-1])
        kept = {digest: Kept(*two) for digest, *two in zip(digests, recordings, rows, strict=True)}
    except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it") from error
    if found != model_id:
        other = f"{path} comes from another model ({found}, not {model_id})"
        raise ValueError(f"{other}; delete it, or name another folder with --run")
    return kept


def write_kept(path: Path, model_id: str, kept: dict[str, Kept]) -> None:
    clips = kept.values()
    with data.whole_file(path) as file:
        np.savez(
            file,
            model=model_id,
            digests=list(kept),
            recordings=[clip.recording for clip in clips],
            windows=[len(clip.rows) for clip in clips],
            rows=np.concatenate([clip.rows for clip in clips]),
        )


class Machine:
    """One machine's clips by the checksum of their content, and what is kept of them."""

    def __init__(self, name: str, model_id: str, args: argparse.Namespace):
        """ValueError: an embeddings file that is damaged or of another model."""
        self.name, self.model_id, self.args = name, model_id, args
        self.file = args.run / f"embeddings_{name}.npz"
        self.kept = read_kept(self.file, model_id)
        self.tests = list_clips(args.data, name, "test")
        clips = list_clips(args.data, name, "train") + self.tests
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda clip: data.file_digest(clip.path), clips)
            digests = list(data.progress(digests, f"reading {name}", len(clips)))

        # Of copies among the training clips the first stands for all.
        self.train, self.copies = {}, []
        n_train = len(clips) - len(self.tests)
        for digest, clip in zip(digests[:n_train], clips):
            first = self.train.setdefault(digest, clip)
            if first is not clip:
                self.copies.append(f"{clip.path.name} = {first.path.name}")
        self.test_digests = digests[n_train:]
        self.new = {d: clip for d, clip in zip(digests, clips) if d not in self.kept}

    def embed(self, model: Embedder, recordings: dict[str, Recording]) -> None:
        """Embed the new clips. What is done is written now and then, and at the end."""
        args, digests, clips = self.args, list(self.new), list(self.new.values())
        lengths = [recordings[digest].n_samples for digest in digests]
        counts = [len(window_starts(n_samples)) for n_samples in lengths]
        begun = written = time.monotonic()
        unwritten, rows = 0, []
        with tqdm(total=sum(counts), desc=self.name, unit=" windows", disable=None) as bar:
            for index, found in embed(model, clips, lengths, args.batch_size, args.workers):
                for i, row in zip(index.tolist(), found):
                    rows.append(row)
                    if len(rows) == counts[i]:  # the windows of a clip follow each other
                        self.kept[digests[i]] = Kept(recordings[digests[i]], np.stack(rows))
                        rows = []
                bar.update(len(found))
                unwritten += len(found)
                late = time.monotonic() - written > KEEP_SECONDS
                if self.kept and (unwritten >= KEEP_WINDOWS or late):
                    write_kept(self.file, self.model_id, self.kept)
                    unwritten, written = 0, time.monotonic()
        rate = sum(counts) / (time.monotonic() - begun)
        print(f"{self.name}: embedded {sum(counts):,} windows, {rate:.1f} a second")
        current = [*self.train, *self.test_digests]
        self.kept = {digest: self.kept[digest] for digest in dict.fromkeys(current)}
        write_kept(self.file, self.model_id, self.kept)


# What is said before scoring


def say(machine: Machine) -> None:
    """What would decide in silence: few clips, copies, and clips unlike the training clips."""

    def note(what: str, found: list[str]) -> None:
        if found:
            print(f"note: {machine.name}: {len(found)} {what}: {data.first_ten(found)}")

    if len(machine.train) < 20:
        few = f"only {len(machine.train)} training clips; the threshold says little"
        print(f"note: {machine.name}: {few}")
    note("training clips are copies of others and count once", machine.copies)
    same = zip(machine.tests, machine.test_digests)
    copies = [clip.path.name for clip, digest in same if digest in machine.train]
    note("test clips are copies of training clips, so their score is 0", copies)

    train = np.array([measures(machine.kept[digest].recording) for digest in machine.train])
    tests = np.array([measures(machine.kept[digest].recording) for digest in machine.test_digests])
    train_clips = list(machine.train.values())
    for (what, slack, unequal), of_train, of_tests in zip(MEASURES, train.T, tests.T):
        low, high = np.percentile(of_train, [5, 95])
        unlike = of_tests > high + slack
        if "%" not in what:  # less clipping or silence is no reason
            unlike |= of_tests < low - slack
        named = with_values(machine.tests, of_tests, np.flatnonzero(unlike))
        note(f"test clips are unlike the training clips in {what} ({low:.3g} to {high:.3g})", named)
        if np.ptp(of_train) > unequal:
            extremes = with_values(train_clips, of_train, [of_train.argmin(), of_train.argmax()])
            print(f"note: {machine.name}: training clips differ in {what}: {', '.join(extremes)}")


def with_values(clips: list[Clip], values: np.ndarray, chosen) -> list[str]:
    return [f"{clips[i].path.name} ({values[i]:.3g})" for i in chosen]


# What is measured, how far beyond the training clips a test clip may lie, and how far these may
# differ.
MEASURES = [
    ("length up to a window's, in s", 0.1, 0.1),
    ("level in dB", 3.0, 20.0),
    ("% of clipped samples", 0.1, 1.0),
    ("% of silence", 5.0, 50.0),
]


def measures(recording: Recording) -> list[float]:
    """In the order of MEASURES. A clip is padded to a window; beyond that no length matters."""
    seconds = min(recording.n_samples, data.WINDOW) / SAMPLE_RATE
    return [seconds, recording.level, 100 * recording.clipped, 100 * recording.silent]


# Scores and files


def stack(kept: list[Kept]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All windows of some clips: embeddings (m, D), clip index (m,), first sample (m,)."""
    owner = np.repeat(np.arange(len(kept)), [len(one.rows) for one in kept])
    starts = [window_starts(one.recording.n_samples) for one in kept]
    return np.concatenate([one.rows for one in kept]), owner, np.concatenate(starts)


class Verdict(NamedTuple):
    """What is found of one test clip; the nearest training clip is by plain distance."""

    clip: Clip
    score: float
    alarm: bool
    start: int  # first sample of the most anomalous window
    nearest: Clip
    nearest_start: int
    distance: float


def judge(machine: Machine) -> tuple[list[Verdict], np.ndarray, float]:
    """-> (a verdict for each test clip, the training clips' own scores, the threshold)."""
    args, bank = machine.args, list(machine.train.values())
    train, owner, train_start = stack([machine.kept[digest] for digest in machine.train])
    test, test_owner, test_start = stack([machine.kept[digest] for digest in machine.test_digests])
    domain = np.array([bank[i].domain for i in owner], object)
    try:
        of_test, of_train = anomaly_scores(train, test, owner, domain, args.k, args.normalize)
    except ValueError as error:
        raise ValueError(f"{machine.name}: {error}") from error
    at = most_anomalous(of_test, test_owner)
    train_scores = of_train[most_anomalous(of_train, owner)]
    decisions, threshold = decide(of_test[at], train_scores, args.percentile)

    d = distances(test[at], train)  # (clips, n)
    verdicts = []
    for i, (clip, window, near) in enumerate(zip(machine.tests, at, d.argmin(axis=1))):
        found = (of_test[window].item(), bool(decisions[i]), test_start[window].item())
        nearest_clip = (bank[owner[near]], train_start[near].item(), d[i, near].item())
        verdicts.append(Verdict(clip, *found, *nearest_clip))
    return verdicts, train_scores, threshold


REPORT = ["test_clip", "score", "threshold", "alarm", "nearest_training_clip", "distance",
          "at_seconds"]  # fmt: skip


def score_machine(machine: Machine) -> None:
    """Score one machine and write its files; what it does not make anew is removed."""
    run, name, args = machine.args.run, machine.name, machine.args
    say(machine)
    verdicts, train_scores, threshold = judge(machine)

    # evaluate.py prints beside the numbers how they were made; until the new ones are whole, it is
    # told nothing.
    how_scored = run / f"scoring_{name}.json"
    for old in (how_scored, run / f"{name}.png", run / "metrics.csv"):
        old.unlink(missing_ok=True)
    scores = [(v.clip.path.name, v.score) for v in verdicts]
    decisions = [(v.clip.path.name, int(v.alarm)) for v in verdicts]
    data.write_csv(run / f"anomaly_score_{name}_section_00_test.csv", scores)
    data.write_csv(run / f"decision_result_{name}_section_00_test.csv", decisions)
    highest = sorted(verdicts, key=lambda v: -v.score)
    table = [REPORT]
    for v in highest:
        row = [v.clip.path.name, v.score, threshold, int(v.alarm)]
        row += [v.nearest.path.name, v.distance, round(v.start / SAMPLE_RATE, 2)]
        table.append(row)
    data.write_csv(run / f"report_{name}.csv", table)
    how = {"model": machine.model_id.split()[0], "normalize": args.normalize, "k": args.k}
    how |= {"percentile": args.percentile, "data": str(args.data)}
    data.write_file(how_scored, json.dumps(how).encode())

    domains = [clip.domain for clip in machine.train.values()]
    counts = ", ".join(f"{domains.count(d)} {d}" for d in ("source", "target") if d in domains)
    n_alarms = sum(v.alarm for v in verdicts)
    print(f"{name}: {len(verdicts)} test clips against {len(domains)} training clips"
          + f" ({counts})" * bool(counts)
          + f"; {n_alarms} above the threshold of {threshold:.4g}")  # fmt: skip
    print(f"  {'score':>8}  {'at':>6}  the ten highest, and the nearest training clip of each")
    for v in highest[:10]:
        seconds, names = v.start / SAMPLE_RATE, f"{v.clip.path.name} | {v.nearest.path.name}"
        print(f"  {v.score:8.4g}  {seconds:4.0f} s  {'ALARM' if v.alarm else '     '} {names}")
    if args.plot:
        plot(run / f"{name}.png", machine, verdicts, train_scores, threshold)


# The picture


def spectrum(clip: Clip, start: int) -> np.ndarray:
    """Log-mel (T, 128) of a window, in dB."""
    wave = data.read_wav(clip.path)[start : start + data.WINDOW]
    return 10 / np.log(10) * log_mel(wave[None])[0].numpy()


def drawn(ranked: list[Verdict], labels: list[bool | None]) -> dict[str, int]:
    """What is drawn, by its heading: the three highest, the worst miss, the worst false alarm."""
    places = range(len(ranked))
    misses = [i for i in places if labels[i] is True and not ranked[i].alarm]
    false_alarms = [i for i in places if labels[i] is False and ranked[i].alarm]
    found = {f"no. {number}": i for number, i in enumerate(places[::-1][:3], 1)}
    if misses and misses[0] not in found.values():
        found["worst miss"] = misses[0]
    if false_alarms and false_alarms[-1] not in found.values():
        found["worst false alarm"] = false_alarms[-1]
    return found


def plot(path: Path, machine: Machine, verdicts: list[Verdict], train_scores, threshold) -> None:
    """All scores; of some clips the spectrum, that of the nearest training clip, the difference."""
    from matplotlib.figure import Figure  # optional: see requirements.txt

    ranked = sorted(verdicts, key=lambda v: v.score)
    scores = np.array([v.score for v in ranked])
    names = [v.clip.path.name for v in ranked]
    labels, _ = data.labels_of(machine.name, names, Path(machine.args.data))
    rows = drawn(ranked, labels)
    figure = Figure(figsize=(14, 3.4 + 2.4 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(1 + len(rows), 3, height_ratios=[1.3] + [1] * len(rows))
    top = figure.add_subplot(grid[0, :])

    # Training clips in grey, spread over the width; test clips in order, coloured by label.
    spread = np.linspace(0, max(1, len(ranked) - 1), len(train_scores))
    label = f"training clips, each without itself ({len(train_scores)})"
    top.plot(spread, np.sort(train_scores), ".", color="gray", markersize=4, label=label)
    kinds = {None: ("test clips", "tab:blue"), False: ("labelled normal", "tab:green"),
             True: ("labelled anomaly", "tab:orange")}  # fmt: skip
    for kind, (what, colour) in kinds.items():
        places = [i for i, given in enumerate(labels) if given is kind]
        if places:
            label = f"{what} ({len(places)})"
            top.plot(places, scores[places], "o", markersize=4, color=colour, label=label)
    above = sum(v.alarm for v in ranked)
    label = f"threshold {threshold:.3g}: {above} clips lie above"
    top.axhline(threshold, color="black", linestyle="--", label=label)
    for heading, i in rows.items():
        beside = {"textcoords": "offset points", "fontsize": 8, "ha": "center"}
        top.annotate(heading, (i, scores[i]), (0, 6), **beside)
    title = f"{machine.name}: {len(ranked)} test clips by anomaly score"
    top.set_title(f"{title}; those named are drawn below", parse_math=False)
    top.set_ylabel("distance to normal")
    top.set_xlabel("test clips in order of score")
    top.legend(loc="upper left")

    hz = np.array([250, 500, 1000, 2000, 4000, 7500])
    filters = mel_filters(torch.device("cpu"))
    bins = filters[hz * FFT // SAMPLE_RATE].argmax(dim=1).numpy()  # where each is heard most
    pairs = []
    for i in rows.values():
        v = ranked[i]
        pairs.append((spectrum(v.clip, v.start), spectrum(v.nearest, v.nearest_start)))
    low, high = np.percentile(np.concatenate([x for pair in pairs for x in pair]), [2, 99.9])
    loudness = {"vmin": low, "vmax": high, "cmap": "magma"}
    louder = {"vmin": -20, "vmax": 20, "cmap": "RdBu_r"}
    meaning = "difference, over 0.5 s\nred: louder than that clip, blue: quieter"
    for row, ((heading, i), (x, near)) in enumerate(zip(rows.items(), pairs), 1):
        v = ranked[i]
        n = min(len(x), len(near))
        difference = uniform_filter1d(x[:n] - near[:n], 50, axis=0, mode="nearest")
        at, name = v.start / SAMPLE_RATE, data.readable(v.clip.path.name)
        its_nearest = f"its nearest normal training clip\n{data.readable(v.nearest.path.name)}"
        panels = [
            (x, loudness, f"{heading}, score {v.score:.3g}, from {at:.1f} s\n{name}"),
            (near, loudness, its_nearest),
            (difference, louder, meaning),
        ]
        for column, (values, scale, title) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            extent = (0, len(values) * HOP / SAMPLE_RATE, -0.5, N_MELS - 0.5)
            image = axes.imshow(values.T, origin="lower", aspect="auto", extent=extent, **scale)
            axes.set_title(title, fontsize=7.5, parse_math=False)
            axes.set_yticks(bins, hz / 1000)
            axes.set_ylabel("kHz (mel scale)" if column == 0 else None)
            axes.set_xlabel("seconds" if row == len(rows) else None)
            if column:
                figure.colorbar(image, label="dB", extend="both")
    with data.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


# The command line


def make_parser() -> data.Parser:
    about = """Score test clips by their distance to normal training clips.

  python score.py --machine fan                  with the model that train.py left in runs/fan
  python score.py --machine pump --pretrained    with the AST as it is: no training, no labels"""
    parser = data.Parser("score.py", about)
    # fmt: off
    add = parser.add_argument_group("what is scored").add_argument
    add("--machine", nargs="+", required=True, metavar="NAME",
        help="names, or dev, eval, all; of the run's")
    add("--data", metavar="DIR", help="holds <machine>/{train,test}/*.wav (the run's; or data)")
    add("--run", metavar="DIR",
        help="the run folder, read and written (runs/<names>, runs/pretrained-<names>)")
    add("--weights", metavar="FILE", help=f"the AST's weights (the run's; or {backbone.WEIGHTS})")
    add("--pretrained", action="store_true", help="the AST as it is: no run needed")
    add("--pooling", choices=["cls", "mean"],
        help="with --pretrained: mean of the class tokens, or of the patches (cls) [our choice]")
    add = parser.add_argument_group("back-end").add_argument
    add("--k", type=train.at_least(1), default=1,
        help="nearest neighbours to average (%(default)s) [same lab]")
    add("--normalize", default="none", choices=["none", "train", "test", "density"],
        help="see the top of score.py (%(default)s) [same lab]")
    add("--percentile", type=percentile, default=90.0, metavar="P",
        help="of the training clips' own scores is the threshold (%(default)s) [our choice]")
    add = parser.add_argument_group("run").add_argument
    train.add_hardware(add)
    add("--batch-size", type=train.at_least(1), default=32, help="windows of 10 s (%(default)s)")
    add("--plot", action="store_true",
        help="draw <machine>.png: scores, and what is unusual in the highest three")
    # fmt: on
    return parser


def percentile(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100 or 0 < value < 1:
        raise argparse.ArgumentTypeError(f"in per cent, such as 99, got {text}")
    return value


def load_model(args: argparse.Namespace, machines: list[str]) -> tuple[Embedder, str]:
    """-> (the model, ready to embed; what identifies it). Fills in --data, and prepares it."""
    both = ["train", "test"]
    if args.pretrained:
        args.data, weights = args.data or "data", args.weights or backbone.WEIGHTS
        data.prepare(machines, args.data, both)  # tells a misspelt name before weights are fetched
        backbone.fetch_weights(weights)
        model = Embedder(load_ast(weights), args.pooling, embedding=None)
        model_id = f"pretrained-{args.pooling} {data.file_digest(weights)[:12]}"
    else:
        model, trained = train.load_run(args.run, args.weights)
        of_run = data.machine_names(trained.machine)
        if untrained := [machine for machine in machines if machine not in of_run]:
            names = ", ".join(untrained)
            only = f"{args.run} was not trained on {names}, only on {' '.join(trained.machine)}"
            raise ValueError(f"{only}; train jointly, or use --pretrained")
        args.data = args.data or trained.data
        data.prepare(machines, args.data, both)
        model_id = f"adapter {data.file_digest(args.run / 'adapter.pt')[:12]}"
        merge_lora(model.ast)  # the same outputs, at the speed of the plain AST
    return model.to(args.device), model_id


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    prefix = ""
    if args.pretrained:
        prefix = "pretrained-mean-" if args.pooling == "mean" else "pretrained-"
    args.run = Path(args.run or data.default_run(args.machine, prefix))
    args.workers = train.workers_for(args)
    kept = "continues; what was embedded until a few minutes ago is kept"
    with data.one_line_errors(parser, kept):
        if args.pooling and not args.pretrained:
            raise ValueError("--pooling goes with --pretrained; a trained run has its own")
        args.pooling = args.pooling or "cls"
        train.check_device(args.device)
        if args.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib; pip install matplotlib")
        names = data.machine_names(args.machine)
        model, model_id = load_model(args, names)
        data.make_run_folder(args.run)
        machines = [Machine(name, model_id, args) for name in names]
        new = {}  # all new clips of all machines are checked before the first is embedded
        for machine in machines:
            new |= machine.new
        recordings = dict(zip(new, data.check_clips(list(new.values()))))
        for machine in machines:
            if machine.new:
                machine.embed(model, recordings)
            score_machine(machine)
    if args.normalize == "test":
        print("note: --normalize test is transductive: each score depends on the whole test set")
    print(f"wrote {args.run}; next: {data.next_command('evaluate.py', args.machine, args.run)}")


if __name__ == "__main__":
    main()
