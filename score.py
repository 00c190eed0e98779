"""Score: how far is a test clip from the nearest normal training clip of its machine?

    d(x, y) = 1 - e_x · e_y              cosine distance of two windows' unit-length embeddings
    score(x) = mean of the k smallest d(x, y) over all training windows y; k is 1 by default

A clip of up to 10 s is one window. A longer clip has several, and its score is that of its most
anomalous window. A clip is called anomalous if its score is above the 90th percentile of the
training clips' own scores. A training clip is scored against the other training clips only.

    python score.py --machine fan                      # with the model in runs/fan
    python score.py --machine fan --pretrained         # with the pre-trained AST, without training

writes into the run folder the challenge's CSV files, report_fan.csv with more columns, and
report_fan.html, a page to listen to the most anomalous clips. It also writes scoring_fan.json (how
it was scored, for evaluate.py) and embeddings_fan.pt (so that scoring again is quick).
"""

import argparse
import datetime
import hashlib
import html
import importlib.util
import io
import json
import os
import shlex
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbone
import data
import evaluate
import lora
from backbone import Embedder, load_ast
from data import Clip, InputError
from train import load_run


class Windows(NamedTuple):
    """All windows of some clips in one flat list, since clips differ in length."""

    embedding: np.ndarray  # (n, D), of unit length
    clip_index: np.ndarray  # (n,) which clip a window is from
    start: np.ndarray  # (n,) where it starts in the clip, in samples
    digest: str = ""  # of the clips' checksums; evaluate.py averages runs on equal clips only


class Scorer(NamedTuple):
    """A model, its data folder, and a record of how it scores."""

    model: Embedder
    model_key: str  # of kept embeddings: changes with the model, data.py, lora.py and backbone.py
    root: Path
    record: dict  # for scoring_<machine>.json


COPY = 1e-6  # windows at a smaller distance are of the same recording


@torch.inference_mode()
def embed(model: Embedder, clips: list[Clip], batch_size: int = 8, workers: int = 0):
    """Yields for each clip the embeddings of its windows, (n, D), and their starts, in samples.

    In float32 on every device. TF32, which keeps 10 of 23 mantissa bits, is switched off: a GPU's
    scores would differ from a CPU's. Raises InputError if embeddings are not finite.
    """
    model.eval()
    device = model.ast.pos_embed.device
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    timeout = backbone.WORKER_TIMEOUT if workers else 0
    loader = DataLoader(
        data.AllWindows(clips), batch_size, num_workers=workers, timeout=timeout, collate_fn=list
    )
    for items in loader:
        # A batch of clips. Long clips have many windows, so windows are batched again.
        spectrograms, starts = zip(*items)
        x = torch.cat(spectrograms)
        e = torch.cat([model(part.to(device)).cpu() for part in x.split(batch_size)])
        if not e.isfinite().all():
            reason = "the weights are not finite, or too large"
            raise InputError(f"{reason}: train again with a smaller --lr")
        counts = [len(of_clip) for of_clip in starts]
        for e_of_clip, starts_of_clip in zip(e.split(counts), starts):
            yield e_of_clip.clone(), starts_of_clip  # a view would be saved with its whole batch


def windows_of(clips: list[Clip], scorer: Scorer, args: argparse.Namespace) -> Windows:
    """All windows of some clips of one machine, of which only new ones go through the network. One
    file keeps the embeddings of training and test clips.

    A clip is identified by its checksum, so a renamed file is not embedded again. Another model, or
    any edit of data.py, lora.py or backbone.py, embeds all clips again.
    """
    file = args.run / f"embeddings_{clips[0].machine}.pt"
    known = {}  # checksum of a clip: what `embed` yields for it
    if file.exists():
        saved = data.load(file, "model", "clips")
        if saved["model"] == scorer.model_key:
            known = saved["clips"]
    checksums = [data.file_digest(clip.path) for clip in clips]
    new = {checksum: clip for checksum, clip in zip(checksums, clips) if checksum not in known}
    embedded = embed(scorer.model, list(new.values()), args.batch_size, args.workers)  # lazy
    try:
        for checksum, result in zip(tqdm(new, "clips", leave=False, disable=None), embedded):
            known[checksum] = result
    finally:  # also after an error or Ctrl-C
        if new:
            data.save(file, {"model": scorer.model_key, "clips": known})

    embeddings, starts = zip(*[known[checksum] for checksum in checksums])
    embedding = torch.cat(embeddings).numpy()
    clip_index = np.repeat(np.arange(len(clips)), [len(of_clip) for of_clip in starts])
    digest = hashlib.sha256(" ".join(sorted(checksums)).encode()).hexdigest()
    return Windows(embedding, clip_index, np.concatenate(starts), digest)


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine distance of each row of x (m, D) to each row of y (n, D), of unit length: (m, n)."""
    return (1 - x @ y.T).clip(min=0)  # rounding can give values just below 0


def distances_within(windows: Windows) -> np.ndarray:
    """Distances (n, n) of windows to each other, infinite for those that may not be neighbours: two
    of the same clip, and two that are equal, from a clip and its copy in another file.
    """
    d = distances(windows.embedding, windows.embedding)
    same_clip = windows.clip_index[:, None] == windows.clip_index
    copies = (d < COPY) & ~same_clip
    if copies.any():
        repeated = windows.clip_index[np.tril(copies).any(axis=1)]  # not the first of its kind
        print(f"copies among the training clips: {len(set(repeated))}")
    d[same_clip | copies] = np.inf
    return d


def nearest(d: np.ndarray, k: int) -> np.ndarray:
    """Mean of the k smallest distances in each row: (m, n) -> (m,).

    Raises InputError if a row has fewer than k that are finite.
    """
    if k > fewest_neighbours(d):
        reason = f"a clip has only {fewest_neighbours(d)} windows of other clips as neighbours"
        raise InputError(f"too few training clips: {reason}, not {k} (by --k, or by density: 4)")
    return np.partition(d, k - 1, axis=1)[:, :k].mean(axis=1)


def fewest_neighbours(d: np.ndarray) -> int:
    """The smallest number of finite distances in a row of d (m, n)."""
    return int(np.isfinite(d).sum(axis=1).min())


def anomaly_scores(
    d_test: np.ndarray, d_train: np.ndarray, domain: np.ndarray, k: int, normalize: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one machine's test windows, (m,), and training windows, (n,).

    d_test (m, n) and d_train (n, n) are distances to the training windows. domain (n,) is "source",
    "target" or "".
    """
    if normalize == "density":
        return density_scores(d_test, d_train, k)
    if normalize == "test":
        return standardised_scores(d_test, d_train, domain, k)
    return nearest(d_test, k), nearest(d_train, k)


def most_anomalous(scores: np.ndarray, clip_index: np.ndarray) -> np.ndarray:
    """Each clip's highest-scoring window: scores (m,), clip_index (m,) -> indices (n_clips,)."""
    highest = []
    for clip in range(clip_index.max() + 1):
        windows = np.flatnonzero(clip_index == clip)
        highest.append(windows[scores[windows].argmax()])
    return np.array(highest)


def score_machine(machine: str, scorer: Scorer, args: argparse.Namespace) -> None:
    """Score one machine, from its clips to its files."""
    # Clips.
    train_clips, test_clips = clips_to_score(machine, scorer.root)
    if not test_clips:  # none yet
        look_at_training_clips(train_clips, scorer, args)
        return

    # Embeddings of all their windows.
    train_windows = windows_of(train_clips, scorer, args)
    test_windows = windows_of(test_clips, scorer, args)

    # Distances to the training windows.
    d_test = distances(test_windows.embedding, train_windows.embedding)  # (m, n)
    d_train = distances_within(train_windows)  # (n, n)

    # Scores of all windows. A clip has the score of its most anomalous window.
    domain = np.array([train_clips[i].domain or "" for i in train_windows.clip_index])  # (n,)
    window_scores, train_window_scores = anomaly_scores(
        d_test, d_train, domain, args.k, args.normalize
    )
    worst_window = most_anomalous(window_scores, test_windows.clip_index)  # one for each test clip
    worst_train_window = most_anomalous(train_window_scores, train_windows.clip_index)

    # Threshold. A trained model has fitted these clips, so their scores and the threshold are too
    # low: expect more false alarms than the percentile suggests.
    train_clip_scores = train_window_scores[worst_train_window]
    threshold = np.percentile(train_clip_scores, args.percentile)

    # Results: one row for each test clip, with its nearest training clip (by plain distance, even
    # when the score is normalised).
    rows = []
    for clip, window in zip(test_clips, worst_window):
        near = d_test[window].argmin()  # a training window
        row = {
            "test_clip": clip.path.name,
            "score": float(window_scores[window]),
            "threshold": float(threshold),
            "alarm": int(window_scores[window] > threshold),
            "nearest_training_clip": train_clips[train_windows.clip_index[near]].path.name,
            "distance": float(d_test[window, near]),
            "at_seconds": float(test_windows.start[window] / data.SAMPLE_RATE),
            "nearest_at_seconds": float(train_windows.start[near] / data.SAMPLE_RATE),
        }
        rows.append(row)

    # Training clips that may be faulty themselves, and all files.
    suspects = suspicious_training_clips(d_train, train_windows, train_clips)
    digests = [train_windows.digest, test_windows.digest]
    write_results(machine, rows, suspects, train_clip_scores, digests, scorer, args)


# Two ways to make distances comparable, for --normalize. Distances tend to be smaller among the
# many source clips than among the few target clips, and in sparse regions even a normal sound is
# far from its neighbours.

DENSITY_K = 4  # neighbours: ASDKit's default (k_ref_normalize)


def density_scores(
    d_test: np.ndarray, d_train: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide d(x, y) by ρ(y), the mean distance of y to its nearest neighbours from other clips
    (Wilkinghoff et al. 2025, arXiv 2509.10951).

    Simplification: ρ is not recomputed without the training clip being scored.
    """
    rho = nearest(d_train, DENSITY_K).clip(min=1e-6)  # (n,); column y of d is divided by ρ(y)
    return nearest(d_test / rho, k), nearest(d_train / rho, k)


def standardised_scores(
    d_test: np.ndarray, d_train: np.ndarray, domain: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """min over the domains D of (s_D(x) - mean) / std, where s_D(x) is the score against the
    training clips of D, and mean and std are over all test windows (RMIS, the authors' lab).

    TRANSDUCTIVE: each score depends on the whole test set, which the challenge's rules forbid.
    """
    all_test, all_train = [], []
    for name in np.unique(domain):
        columns = domain == name  # (n,) bool
        test_scores = nearest(d_test[:, columns], k)
        train_scores = nearest(d_train[:, columns], k)
        mean, std = test_scores.mean(), test_scores.std()
        if std < 1e-9:
            raise InputError("--normalize test needs test clips whose scores vary")
        all_test.append((test_scores - mean) / std)
        all_train.append((train_scores - mean) / std)
    return np.min(all_test, axis=0), np.min(all_train, axis=0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings: how a trained run, or the pre-trained AST, scores."""
    about = "Score test clips by their distance to normal training clips. Defaults are in brackets."
    parser = argparse.ArgumentParser(description=about)
    data.add_machine(parser)
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", help="run folder (runs/[pretrained-]<machines>)")
    add("--data", metavar="DIR", help="has <machine>/{train,test}/*.wav (the run's, or data)")
    add("--weights", metavar="FILE", help=f"pre-trained AST (the run's, or {backbone.WEIGHTS})")
    add("--pretrained", action="store_true", help="score with the pre-trained AST, not with a run")
    add("--pooling", choices=["cls", "mean"], help="of --pretrained: class tokens or patches (cls)")
    add("--k", type=data.positive, default=1, help="nearest neighbours (%(default)s)")
    text = "normalise distances by density, or by test-set statistics: transductive (%(default)s)"
    add("--normalize", default="none", choices=["none", "density", "test"], help=text)
    text = "the threshold, as a percentile of the training clips' scores (90)"
    add("--percentile", type=float, default=90.0, metavar="P", help=text)
    add("--plot", action="store_true", help="draw <machine>.png for the page; needs matplotlib")
    backbone.add_hardware(parser)
    text = "clips per batch, windows per forward pass (8); reading an hour takes 1.5 GB a worker"
    add("--batch-size", type=data.positive, default=8, help=text)
    args = parser.parse_args(argv)
    if args.pooling and not args.pretrained:
        parser.error("--pooling goes with --pretrained: a trained model has its own")
    if not 1 <= args.percentile <= 100:
        parser.error("--percentile must be from 1 to 100, such as 90")
    kind = "pretrained-" if args.pretrained else ""
    if args.pooling == "mean":
        kind += "mean-"
    args.run = args.run or data.default_run(args.machine, kind)
    return args


# ---------------------------------------------- plumbing: not needed to follow the method


def clips_to_score(machine: str, root: Path) -> tuple[list[Clip], list[Clip]]:
    """The training clips and the test clips, of which there may be none yet.

    Raises InputError, naming all files that cannot be read.
    """
    train, test = data.list_clips(root, machine, "train"), []
    if any((root / machine / "test").glob("[!.]*")):
        test = data.list_clips(root, machine, "test")
    unreadable = []
    for clip in train + test:
        try:
            data.plain_wav(clip.path.read_bytes())
        except InputError as error:
            unreadable.append(f"{clip.path} {error}")
    if unreadable:
        raise InputError(f"these files cannot be read: {data.shortened(unreadable)}")
    paths = {clip.path for clip in train + test}
    files = [*(root / machine).glob("train/[!.]*"), *(root / machine).glob("test/[!.]*")]
    not_read = sorted(path.name for path in files if path not in paths)
    note = f" (not read: {data.shortened(not_read)})" if not_read else ""
    print(f"{machine}: test clips {len(test)}, training clips {len(train)}{note}")
    if len(train) < 20:
        print("So few training clips make the threshold a guess: fifty or more are better.")
    return train, test


def look_at_training_clips(clips: list[Clip], scorer: Scorer, args: argparse.Namespace) -> None:
    windows = windows_of(clips, scorer, args)
    print_suspects(suspicious_training_clips(distances_within(windows), windows, clips))


def suspicious_training_clips(d_train: np.ndarray, train: Windows, clips: list[Clip]) -> list[dict]:
    """Most unusual training clips, with their distance relative to the median (1 = typical): the
    first three, and all above 5, at most 20. The distance is that of a clip's worst window to the
    20 nearest windows of other clips, or to fewer, where there are fewer.
    """
    distance = nearest(d_train, min(20, max(1, fewest_neighbours(d_train))))
    worst_window = most_anomalous(distance, train.clip_index)
    times = distance[worst_window] / max(np.median(distance[worst_window]), 1e-6)
    suspects = []
    for i in np.argsort(-times)[:20]:
        if len(suspects) < 3 or times[i] > 5:
            at = train.start[worst_window[i]] / data.SAMPLE_RATE
            row = {"clip": clips[i].path.name, "times_median": times[i], "at_seconds": at}
            suspects.append(row)
    return suspects


SUSPECTS = """Training clips that stand out. 3 means three times as far from the others as usual;
listen to everything above 5. Remove what is faulty, since it makes similar faults look normal, and
score again until none is above 5. Several faulty clips that are alike may not be listed."""


def print_suspects(suspects: list[dict]) -> None:
    print(SUSPECTS)
    for suspect in suspects:
        times, seconds = suspect["times_median"], suspect["at_seconds"]
        print(f"  {times:8.3g}  {seconds:5.0f} s         {suspect['clip']}")


def write_results(
    machine: str, rows: list[dict], suspects: list[dict], train_clip_scores, digests, scorer, args
) -> None:
    """Write all files of a machine, and print the highest scores."""
    run, root = args.run, scorer.root
    scores, decisions, record_file = evaluate.files_of(machine, run)
    data.write_csv(scores, [(row["test_clip"], row["score"]) for row in rows])
    data.write_csv(decisions, [(row["test_clip"], row["alarm"]) for row in rows])
    record = scorer.record | {"scores_sha256": data.file_digest(scores)}
    record["scored_with"] = record["scored_with"] | {"clips": digests}
    data.write(record_file, json.dumps(record, indent=1).encode())

    rows = sorted(rows, key=itemgetter("score"), reverse=True)
    data.write_csv(run / f"report_{machine}.csv", [rows[0].keys(), *[row.values() for row in rows]])
    how = f"{evaluate.words(record['scored_with'])}, training clips {len(train_clip_scores)}"
    alarms, percent = sum(row["alarm"] for row in rows), f"{args.percentile:g} %"
    summary = f"{alarms} of {len(rows)} test clips are above the threshold"
    summary += f" ({rows[0]['threshold']:.4g}, which {percent} of the training clips stay below)"
    if 2 * alarms > len(rows):
        summary += ".\nSo many usually mean that the day, gain or microphone differs from training,"
        summary += " or that all training clips are of one hour"
    page = make_page(machine, rows, suspects, summary, how, root, args)
    data.write(run / f"report_{machine}.html", page.encode("utf-8", "backslashreplace"))
    try:
        labels, _ = evaluate.labels_of(machine, [row["test_clip"] for row in rows], root)
    except InputError as error:
        print(f"note: ignoring labels: {error}")
        labels = {}
    if args.plot:
        plot(run / f"{machine}.png", machine, rows, train_clip_scores, labels, root)

    print(f"{how}\n{summary}")
    copies = [row["test_clip"] for row in rows if row["distance"] < COPY]
    if copies:
        print(f"copies of training clips among the test clips: {data.shortened(copies)}")
    print("     score     from         the ten highest, and the nearest training clip of each")
    for row in rows[:10]:
        alarm = "ALARM" if row["alarm"] else "     "
        clips = f"{row['test_clip']} | {row['nearest_training_clip']}"
        print(f"  {row['score']:8.4g}  {row['at_seconds']:5.0f} s  {alarm}  {clips}")
    print_suspects(suspects)
    print(f"to listen, open {run / f'report_{machine}.html'} in a browser")
    if labels:
        evaluation = ["python", "evaluate.py", "--machine", machine, "--run", str(run)]
        print(f"next: {shlex.join(evaluation)}")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
body { font: 16px sans-serif; max-width: 60em; margin: auto; padding: 1em }
table, audio { width: 100% } table { border-collapse: collapse; table-layout: fixed }
td { border-top: 1px solid #aaa; padding: .5em; overflow-wrap: anywhere }
td:first-child { width: 8em } img { width: 100%; max-width: 45em }
@media (max-width: 40em) {
td, td:first-child { display: block; width: auto; border: 0 } tr { border-top: 1px solid #aaa } }
</style>"""
READING = """<p>A score is the distance to the most similar training clips. ALARM: above the
threshold. The players start at the most unusual 10 s. They need the recordings in their place, so a
copy of this page elsewhere has no sound.</p>"""


def make_page(
    machine: str, rows: list[dict], suspects: list[dict], summary: str, how: str, root, args
) -> str:
    """A page to listen to. Its players point to the recordings, relative to the run folder."""

    def player(split: str, name: str, start: float) -> str:
        path = quote(os.fsencode(os.path.relpath(root / machine / split / name, args.run)))
        end = start + data.WINDOW / data.SAMPLE_RATE
        source = f"{path}#t={start:.2f},{end:.2f}"  # a media fragment: the suspicious window
        link = f'<a href="{path}">{html.escape(name)}</a>, from {start:.0f} s'
        return f'{link}<br><audio controls preload="none" src="{source}"></audio>'

    title, alarms = html.escape(machine), sum(row["alarm"] for row in rows)
    lines = [f"{PAGE}<title>{title}: {len(rows)} clips, {alarms} alarms</title>"]
    lines.append(f"<h1>{title}: what sounds unusual</h1>{READING}<p>{summary}.</p><table>")
    for number, row in enumerate(rows[:10], 1):
        alarm = "<b>ALARM</b>" if row["alarm"] else ""
        clip = player("test", row["test_clip"], row["at_seconds"])
        near = player("train", row["nearest_training_clip"], row["nearest_at_seconds"])
        lines.append(f"<tr><td>{number}. score {row['score']:.4g} {alarm}")
        lines.append(f"<td>{clip}<td>nearest training clip: {near}")
    lines.append(f"</table><p>{SUSPECTS}</p><table>")
    for suspect in suspects:
        clip = player("train", suspect["clip"], suspect["at_seconds"])
        lines.append(f"<tr><td>{suspect['times_median']:.3g} times<td>{clip}")
    lines.append("</table>")
    if args.plot:
        lines.append(f'<img src="{quote(os.fsencode(machine))}.png" alt="scores, spectrograms">')
    lines.append(f"<p><small>{datetime.date.today()}; {html.escape(how)}</small></html>\n")
    return "\n".join(lines)


def plot(path: Path, machine: str, rows: list[dict], train_clip_scores, labels, root) -> None:
    """The scores of all clips; below, the three highest clips beside their nearest ones."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may not exist here
    from matplotlib.figure import Figure  # optional, so it is not imported at the top

    kinds = {"training\nclips": train_clip_scores}
    for kind, label in (("normal", False), ("anomalous", True), ("test", None)):
        kinds[f"{kind}\nclips"] = [
            row["score"] for row in rows if labels.get(row["test_clip"]) is label
        ]
    kinds = {kind: scores for kind, scores in kinds.items() if len(scores)}
    highest = rows[:3]
    figure = Figure(figsize=(5, 2.6 + 1.7 * len(highest)), layout="constrained")
    grid = figure.add_gridspec(1 + len(highest), 2, height_ratios=[1.6] + [1] * len(highest))
    axes = figure.add_subplot(grid[0, :])
    colours = ["#777777", "#0072B2", "#D55E00", "#009E73"]
    for y, scores in enumerate(kinds.values()):
        height = np.random.default_rng(0).uniform(-0.3, 0.3, len(scores))  # to tell dots apart
        axes.plot(scores, y + height, ".", color=colours[y])
    axes.axvline(rows[0]["threshold"], color="black", linestyle="--")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="anomaly score (dashed: threshold)", title="each dot is a clip")
    for i, row in enumerate(highest, 1):
        clip = root / machine / "test" / row["test_clip"]
        near = root / machine / "train" / row["nearest_training_clip"]
        left = draw(figure.add_subplot(grid[i, 0]), clip, row["at_seconds"])
        right = draw(figure.add_subplot(grid[i, 1]), near, row["nearest_at_seconds"])
        right.set_clim(*left.get_clim())  # one colour scale for a pair
        left.axes.set(title=f"no. {i}: {row['score']:.3g}", ylabel="kHz")
        right.axes.set(title="its nearest training clip")
    figure.supxlabel("seconds")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    data.write(path, picture.getvalue())


def draw(axes, path: Path, start: float):
    """The spectrogram of a window, in seconds and kHz, with its median subtracted, so that a loud
    clip and a quiet one can be compared.
    """
    wave = data.read_wav(path)[round(start * data.SAMPLE_RATE) :][: data.WINDOW]
    n_frames = 1 + (len(wave) - data.FRAME) // data.HOP  # without the padding
    x = data.spectrogram(wave)[:n_frames].numpy()
    x -= np.median(x)
    extent = (start, start + len(wave) / data.SAMPLE_RATE, 0, data.N_MELS)
    khz = np.array([0.5, 1, 2, 4, 8])
    mel = np.log1p(np.array([20, *1000 * khz]) / 700)  # the first and last bins are at its ends
    axes.set_yticks(data.N_MELS * (mel[1:] - mel[0]) / (mel[-1] - mel[0]), [f"{f:g}" for f in khz])
    low, high = np.percentile(x, [5, 99.9])
    colours = {"cmap": "cividis", "vmin": low, "vmax": high}
    return axes.imshow(x.T, origin="lower", aspect="auto", extent=extent, **colours)


def load_scorer(args: argparse.Namespace) -> Scorer:
    run = None if args.pretrained else load_run(args.run, args.weights)
    root = args.data or ("data" if run is None else run.data)
    machines = data.machine_names(args.machine)
    for machine in machines:
        if run is not None and machine not in run.setting["machine"]:
            raise InputError(f"{args.run} was not trained on {machine}")
    data.fetch_missing(machines, root)
    if run is None:
        weights, pooling = args.weights or backbone.WEIGHTS, args.pooling or "cls"
        backbone.fetch_weights(weights)
        model = Embedder(load_ast(weights), pooling, embedding_dim=None)
        setting = {"weights_sha256": data.file_digest(weights), "pooling": pooling}
        model_key, record = str(setting), {}
    else:
        model, setting, model_key = run.model, run.setting, run.digest
        lora.merge_lora(model.ast)  # the same outputs, at the speed of the plain AST
        record = {"adapter_sha256": model_key}
    for module in (data, lora, backbone):
        model_key += f" {data.file_digest(module.__file__)}"
    kind = "pretrained" if args.pretrained else "trained"
    scored_with = {"k": args.k, "normalize": args.normalize, "model": kind, "setting": setting}
    record |= {"scored_with": scored_with, "percentile": args.percentile, "data": str(root)}
    return Scorer(model.to(args.device), model_key, Path(root), record)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with data.one_line_errors():
        if args.plot and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--plot needs matplotlib: pip install matplotlib")
        print(f"device: {args.device}")
        scorer = load_scorer(args)
        with data.sole_use(args.run):
            for machine in data.machine_names(args.machine):
                score_machine(machine, scorer, args)


if __name__ == "__main__":
    main()
