"""Score: how far is a test clip from the nearest normal training clip of its machine?

    d(x, y) = 1 - e_x · e_y              cosine distance of two windows' unit-length embeddings
    score(x) = mean of the k smallest d(x, y) over all training windows y; k is 1 by default

A clip of up to 10 s is one window. A longer clip has several, and its score is that of its most
anomalous window. A clip is called anomalous if its score is above the 90th percentile of the
training clips' own scores. A training clip is scored against the other training clips only.

    python score.py --machine fan                      # with the model in runs/fan
    python score.py --machine fan --pretrained         # with the pre-trained AST, without training

writes into the run folder the challenge's CSV files, report_fan.csv with more columns, and
report_fan.html, a page to listen to the most anomalous clips.
"""

import argparse
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
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbone
import data
import evaluate
import lora
from backbone import Embedder, load_ast
from data import Clip
from train import load_run


class Windows(NamedTuple):
    """All windows of some clips, one after the other."""

    embedding: np.ndarray  # (n, D), of unit length
    clip_index: np.ndarray  # (n,) which clip a window is from
    start: np.ndarray  # (n,) where it starts in the clip, in samples


class Scorer(NamedTuple):
    """A model, and how it scores."""

    model: Embedder
    model_key: str  # changes with the model and with the code that computes embeddings
    root: Path  # folder of the clips
    record: dict  # for scoring_<machine>.json


@torch.inference_mode()
def embed(model: Embedder, clips: list[Clip], batch_size: int, workers: int):
    """Yields for each clip the embeddings of its windows, (n, D), and their starts, in samples.

    In float32 on every device.
    """
    model.eval()
    device = model.ast.pos_embed.device
    torch.backends.cuda.matmul.allow_tf32 = False  # TF32 keeps 10 of 23 mantissa bits: a GPU would
    torch.backends.cudnn.allow_tf32 = False  # give other scores than a CPU
    windows = data.AllWindows(clips)
    for items in DataLoader(windows, batch_size, num_workers=workers, collate_fn=list):
        # A batch of clips. Long clips have many windows, so windows are batched again.
        spectrograms, starts = zip(*items)
        x = torch.cat(spectrograms)
        e = torch.cat([model(part.to(device)).cpu() for part in x.split(batch_size)])
        counts = [len(of_clip) for of_clip in starts]
        for e_of_clip, starts_of_clip in zip(e.split(counts), starts):
            yield e_of_clip.clone(), starts_of_clip  # a view would be saved with its whole batch


def embed_new(scorer: Scorer, clips: list[Clip], file: Path, args: argparse.Namespace) -> list:
    """What `embed` yields, as a list. Clips that were embedded before are read from `file`.

    A clip is known by its checksum, so a renamed file is not embedded again. Another model, or any
    edit of data.py, lora.py or backbone.py, embeds all clips again.
    """
    known = {}  # checksum of a clip: (embeddings, starts)
    if file.exists():
        saved = data.load(file, "model", "clips")
        if saved["model"] == scorer.model_key:
            known = saved["clips"]
    checksums = [data.file_digest(clip.path) for clip in clips]
    new = {checksum: clip for checksum, clip in zip(checksums, clips) if checksum not in known}
    results = embed(scorer.model, list(new.values()), args.batch_size, args.workers)
    progress = tqdm(zip(results, new), "clips", len(new), leave=False, disable=None)
    try:
        for count, (result, checksum) in enumerate(progress, 1):
            known[checksum] = result
            if count % 100 == 0:
                data.save(file, {"model": scorer.model_key, "clips": known})
    finally:  # also after an error or Ctrl-C; only the clips that are still there are kept
        known = {checksum: known[checksum] for checksum in checksums if checksum in known}
        if new:
            data.save(file, {"model": scorer.model_key, "clips": known})
    return [known[checksum] for checksum in checksums]


def windows_of(embedded: list[tuple[Tensor, list[int]]]) -> Windows:
    """Put the embeddings of several clips, and their starts, one after the other."""
    embedding = torch.cat([of_clip for of_clip, _ in embedded]).numpy()
    counts = [len(starts) for _, starts in embedded]
    clip_index = np.repeat(np.arange(len(embedded)), counts)
    start = np.concatenate([starts for _, starts in embedded])
    return Windows(embedding, clip_index, start)


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine distance of each row of x (m, D) to each row of y (n, D), of unit length: (m, n)."""
    return (1 - x @ y.T).clip(min=0)  # rounding may go below 0


def nearest(d: np.ndarray, k: int) -> np.ndarray:
    """Mean of the k smallest distances in each row: (m, n) -> (m,).

    Raises ValueError if a row has fewer than k that are finite.
    """
    fewest = np.isfinite(d).sum(axis=1).min()  # neighbours in any row
    if k > fewest:
        reason = f"a clip has only {fewest} windows of other clips as neighbours, not {k}"
        raise ValueError(f"too few training clips: {reason}")
    return np.partition(d, k - 1, axis=1)[:, :k].mean(axis=1)


def anomaly_scores(
    d_test: np.ndarray, d_train: np.ndarray, domain: np.ndarray, k: int, normalize: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one machine's test windows, (m,), and training windows, (n,).

    d_test (m, n) and d_train (n, n) are distances to the training windows; in d_train, those within
    a clip are infinite. domain (n,) is "source", "target", or "" where it is not known.
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
    # Clips. Of identical training clips only one counts.
    train_clips, test_clips = clips_to_score(machine, scorer.root)

    # Embeddings of all their windows.
    file = args.run / f"embeddings_{machine}.pt"
    embedded = embed_new(scorer, train_clips + test_clips, file, args)
    train = windows_of(embedded[: len(train_clips)])
    test = windows_of(embedded[len(train_clips) :])

    # Distances to the training windows. A training clip is no neighbour of itself.
    d_test = distances(test.embedding, train.embedding)  # (m, n)
    d_train = distances(train.embedding, train.embedding)  # (n, n)
    same_clip = train.clip_index[:, None] == train.clip_index  # (n, n)
    d_train[same_clip] = np.inf

    # Scores of all windows. A clip has the score of its most anomalous window.
    domain = np.array([train_clips[i].domain or "" for i in train.clip_index])  # (n,)
    scores, train_scores = anomaly_scores(d_test, d_train, domain, args.k, args.normalize)
    worst = most_anomalous(scores, test.clip_index)  # one window of each test clip
    worst_of_train = most_anomalous(train_scores, train.clip_index)

    # Threshold. It is too low for a trained model, which has fitted these clips: expect more false
    # alarms than the percentile suggests.
    train_clip_scores = train_scores[worst_of_train]
    threshold = np.percentile(train_clip_scores, args.percentile)

    # Results: one row for each test clip. Its nearest training clip is the nearest one by plain
    # distance, also where the score is normalised.
    rows = []
    for clip, window in zip(test_clips, worst):
        near = d_test[window].argmin()
        row = {
            "test_clip": clip.path.name,
            "score": float(scores[window]),
            "threshold": float(threshold),
            "alarm": int(scores[window] > threshold),
            "nearest_training_clip": train_clips[train.clip_index[near]].path.name,
            "distance": float(d_test[window, near]),
            "at_seconds": float(test.start[window] / data.SAMPLE_RATE),
            "nearest_at_seconds": float(train.start[near] / data.SAMPLE_RATE),
        }
        rows.append(row)

    # Training clips that may be faulty themselves, and all files.
    suspects = suspicious_training_clips(d_train, train, train_clips)
    write_results(machine, rows, suspects, train_clip_scores, scorer, args)


# Two ways to make distances comparable, for --normalize. Distances tend to be smaller among the
# many source clips than among the few target clips, and in sparse regions even a normal sound is
# far from its neighbours.

DENSITY_K = 4  # neighbours: ASDKit's default (k_ref_normalize)


def density_scores(
    d_test: np.ndarray, d_train: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide d(x, y) by ρ(y), the mean distance of y to its nearest neighbours from other clips
    (Wilkinghoff et al. 2025, arXiv 2509.10951).

    Simplification: a training clip that is being scored still counts in the ρ of its neighbours.
    """
    rho = nearest(d_train, DENSITY_K).clip(min=1e-6)  # (n,) of each column; 0 among equal clips
    return nearest(d_test / rho, k), nearest(d_train / rho, k)


def standardised_scores(
    d_test: np.ndarray, d_train: np.ndarray, domain: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """min over the domains of (score - μ) / σ, where a score is the distance to the training clips
    of that domain, and μ and σ are over all test windows (from RMIS, code of the paper's lab).

    TRANSDUCTIVE: each score depends on the whole test set. Later challenge rules forbid it.
    """
    all_test, all_train = [], []
    for name in np.unique(domain):
        columns = domain == name  # (n,) bool
        test_scores = nearest(d_test[:, columns], k)
        train_scores = nearest(d_train[:, columns], k)
        mean, std = test_scores.mean(), test_scores.std()
        if std < 1e-9:
            raise ValueError("--normalize test needs test clips whose scores vary")
        all_test.append((test_scores - mean) / std)
        all_train.append((train_scores - mean) / std)
    return np.min(all_test, axis=0), np.min(all_train, axis=0)


# ---------------------------------------------- plumbing: not needed to follow the method


def clips_to_score(machine: str, root: Path) -> tuple[list[Clip], list[Clip]]:
    """The training clips, of which identical files count once, and the test clips.

    A copy among the training clips would be its own neighbour. Prints what is read and what is not.
    """
    listed = data.list_clips(root, machine, "train")
    test = data.list_clips(root, machine, "test")
    train = {data.file_digest(clip.path): clip for clip in listed}  # key: the file's content
    copies = len(listed) - len(train)
    copies += sum(data.file_digest(clip.path) in train for clip in test)
    read = {clip.path for clip in listed + test}
    not_read = []
    for split in ("train", "test"):
        files = sorted((root / machine / split).glob("[!.]*"))
        not_read += [path.name for path in files if path not in read]
    notes = []
    if not_read:
        notes.append(f"not read: {', '.join(not_read[:10])}")
    if copies:
        notes.append(f"copies of training clips: {copies}")
    note = f" ({'; '.join(notes)})" if notes else ""
    print(f"{machine}: test clips {len(test)}, training clips {len(listed)}{note}")
    if len(train) < 2:
        raise ValueError(f"{machine} needs at least 2 training clips that are not the same")
    return list(train.values()), test


def suspicious_training_clips(d_train: np.ndarray, train: Windows, clips: list[Clip]) -> list[dict]:
    """The three training clips that differ most from the others: by the mean distance of a clip's
    worst window to the 20 nearest windows of other clips (or to fewer, where there are fewer).
    """
    available = np.isfinite(d_train).sum(axis=1).min()
    distance = nearest(d_train, min(20, available))
    worst = most_anomalous(distance, train.clip_index)
    times = distance[worst] / max(np.median(distance[worst]), 1e-6)
    suspects = []
    for i in np.argsort(-times)[:3]:
        at = train.start[worst[i]] / data.SAMPLE_RATE
        suspects.append({"clip": clips[i].path.name, "times_median": times[i], "at_seconds": at})
    return suspects


SUSPECTS = """Training clips that differ most from the others, and how far they are from these (1 is
usual). Listen to them too: a faulty training clip makes similar faults look normal. A clip that is
not listed can still be faulty, above all if several resemble each other."""


def write_results(
    machine: str, rows: list[dict], suspects: list[dict], train_clip_scores, scorer: Scorer, args
) -> None:
    """Write all files of a machine, and print the highest scores. The record of the scoring is
    deleted first and written last, so it never describes other scores.
    """
    run, root, suffix = args.run, scorer.root, f"{machine}_section_00_test.csv"
    for name in (f"scoring_{machine}.json", f"{machine}.png", "metrics.csv"):
        (run / name).unlink(missing_ok=True)
    scores = [(row["test_clip"], row["score"]) for row in rows]
    decisions = [(row["test_clip"], row["alarm"]) for row in rows]
    data.write_csv(run / f"anomaly_score_{suffix}", scores)
    data.write_csv(run / f"decision_result_{suffix}", decisions)

    rows = sorted(rows, key=itemgetter("score"), reverse=True)
    data.write_csv(run / f"report_{machine}.csv", [rows[0].keys(), *[row.values() for row in rows]])
    names = [row["test_clip"] for row in rows]
    is_anomaly = evaluate.known_labels(machine, names, root)
    if args.plot:
        plot(run / f"{machine}.png", machine, rows, train_clip_scores, is_anomaly, root)
    how = f"{evaluate.words(scorer.record['scored_with'])}, percentile {args.percentile:g}"
    alarms = f"{sum(row['alarm'] for row in rows)} of {len(rows)}"
    summary = f"above the threshold of {rows[0]['threshold']:.4g}: {alarms} ({how})"
    page = make_page(machine, summary, rows[:10], suspects, root, run)
    data.write(run / f"report_{machine}.html", page.encode("utf-8", "backslashreplace"))
    data.write(run / f"scoring_{machine}.json", json.dumps(scorer.record, indent=1).encode())

    print(summary)
    print("     score     from         the ten highest, and the nearest training clip of each")
    for row in rows[:10]:
        alarm = "ALARM" if row["alarm"] else "     "
        clips = f"{row['test_clip']} | {row['nearest_training_clip']}"
        print(f"  {row['score']:8.4g}  {row['at_seconds']:5.0f} s  {alarm}  {clips}")
    print(SUSPECTS)
    for suspect in suspects:
        times, seconds = suspect["times_median"], suspect["at_seconds"]
        print(f"  {times:8.3g}  {seconds:5.0f} s         {suspect['clip']}")
    print(f"to listen, open {run / f'report_{machine}.html'} in a browser")
    if is_anomaly is not None:
        evaluation = ["python", "evaluate.py", "--machine", machine, "--run", str(run)]
        print(f"next: {shlex.join(evaluation)}")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
body { font: 16px sans-serif; max-width: 60em; margin: auto; padding: 1em }
table, audio { width: 100% } table { border-collapse: collapse; table-layout: fixed }
td { border-top: 1px solid #aaa; padding: .5em; overflow-wrap: anywhere }
td:first-child { width: 7em } img { width: 100%; max-width: 45em }
@media (max-width: 40em) {
td, td:first-child { display: block; width: auto; border: 0 } tr { border-top: 1px solid #aaa } }
</style>"""


def make_page(machine: str, summary: str, rows: list[dict], suspects: list[dict], root, run) -> str:
    """A page to listen to. Its players point to the recordings, relative to the run folder."""

    def player(split: str, name: str, start: float) -> str:
        path = quote(os.fsencode(os.path.relpath(root / machine / split / name, run)))
        end = start + data.WINDOW / data.SAMPLE_RATE
        source = f"{path}#t={start:.2f},{end:.2f}"  # a media fragment: the suspicious window
        text = f"from {start:.0f} s: {html.escape(name)}"
        return f'{text}<br><audio controls preload="none" src="{source}"></audio>'

    title = html.escape(machine)
    lines = [PAGE, f"<title>{title}</title><h1>{title}</h1><p>{html.escape(summary)}</p>"]
    if (run / f"{machine}.png").exists():
        lines.append(f'<img src="{quote(os.fsencode(machine))}.png" alt="scores, spectrograms">')
    lines.append("<table>")
    for number, row in enumerate(rows, 1):
        alarm = "<b>ALARM</b>" if row["alarm"] else ""
        clip = player("test", row["test_clip"], row["at_seconds"])
        near = player("train", row["nearest_training_clip"], row["nearest_at_seconds"])
        lines.append(
            f"<tr><td>{number}. {row['score']:.4g} {alarm}<td>{clip}<td>resembles most, {near}"
        )
    lines.append(f"</table><p>{SUSPECTS}</p><table>")
    for suspect in suspects:
        clip = player("train", suspect["clip"], suspect["at_seconds"])
        lines.append(f"<tr><td>{suspect['times_median']:.3g}<td>{clip}")
    return "\n".join([*lines, "</table></html>\n"])


def plot(path: Path, machine: str, rows: list[dict], train_clip_scores, is_anomaly, root) -> None:
    """The scores of all clips; below, the three highest clips beside their nearest ones."""
    from matplotlib.figure import Figure  # optional, so it is not imported at the top

    scores = np.array([row["score"] for row in rows])
    kinds = {"training\nclips": train_clip_scores}
    if is_anomaly is None:
        kinds["test\nclips"] = scores
    else:
        kinds["normal\nclips"] = scores[~is_anomaly]
        kinds["anomalous\nclips"] = scores[is_anomaly]

    highest = rows[:3]
    figure = Figure(figsize=(5, 2.6 + 1.7 * len(highest)), layout="constrained")
    grid = figure.add_gridspec(1 + len(highest), 2, height_ratios=[1.6] + [1] * len(highest))
    axes = figure.add_subplot(grid[0, :])
    for y, (values, colour) in enumerate(zip(kinds.values(), ["#777777", "#0072B2", "#D55E00"])):
        height = np.random.default_rng(0).uniform(-0.3, 0.3, len(values))  # to tell dots apart
        axes.plot(values, y + height, ".", color=colour)
    axes.axvline(rows[0]["threshold"], color="black", linestyle="--")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="anomaly score (dashed: threshold)", ylim=(-0.5, len(kinds) - 0.5))
    axes.set_title("each dot is a clip")
    for i, row in enumerate(highest, 1):
        clip = root / machine / "test" / row["test_clip"]
        near = root / machine / "train" / row["nearest_training_clip"]
        left = draw(figure.add_subplot(grid[i, 0]), clip, row["at_seconds"])
        right = draw(figure.add_subplot(grid[i, 1]), near, row["nearest_at_seconds"])
        right.set_clim(*left.get_clim())  # one colour scale for a pair
        left.axes.set(title=f"no. {i}: {row['score']:.3g}", ylabel="kHz")
        right.axes.set(title="its nearest")
    figure.supxlabel("seconds")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    data.write(path, picture.getvalue())


def draw(axes, path: Path, start: float):
    """The spectrogram of a window, in seconds and kHz."""
    wave = data.read_wav(path)[round(start * data.SAMPLE_RATE) :][: data.WINDOW]
    n_frames = 1 + (len(wave) - data.FRAME) // data.HOP  # without the padding
    x = data.spectrogram(wave)[:n_frames].numpy()
    extent = (start, start + len(wave) / data.SAMPLE_RATE, 0, data.N_MELS)
    khz = np.array([0.5, 1, 2, 4, 8])
    mel = np.log1p(np.array([20, *1000 * khz]) / 700)  # the first and last bins are at its ends
    axes.set_yticks(data.N_MELS * (mel[1:] - mel[0]) / (mel[-1] - mel[0]), [f"{f:g}" for f in khz])
    low, high = np.percentile(x, [5, 99.9])
    colours = {"cmap": "cividis", "vmin": low, "vmax": high}
    return axes.imshow(x.T, origin="lower", aspect="auto", extent=extent, **colours)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    about = "Score test clips by their distance to normal training clips. Defaults are in brackets."
    parser = argparse.ArgumentParser(description=about)
    data.add_machine(parser)
    add = parser.add_argument
    add("--run", metavar="DIR", help="run folder (runs/<names>, or runs/pretrained-<names>)")
    add("--data", metavar="DIR", help="with <machine>/{train,test}/*.wav (the run's, or data)")
    add("--weights", metavar="FILE", help=f"pre-trained AST (the run's, or {backbone.WEIGHTS})")
    add("--pretrained", action="store_true", help="score with the pre-trained AST, not with a run")
    add("--pooling", choices=["cls", "mean"], help="its mean of class tokens or patches (cls)")
    add("--k", type=data.positive, default=1, help="nearest neighbours (%(default)s)")
    text = "make domains comparable by density, or by test scores: transductive (%(default)s)"
    add("--normalize", default="none", choices=["none", "density", "test"], help=text)
    text = "the threshold, as a percentile of the training clips' scores (90)"
    add("--percentile", type=float, default=90.0, metavar="P", help=text)
    add("--plot", action="store_true", help="draw <machine>.png for the page; needs matplotlib")
    data.add_hardware(parser)
    text = "clips read at once, and windows in the network; an hour of sound takes 0.4 GB (8)"
    add("--batch-size", type=data.positive, default=8, help=text)
    args = parser.parse_args(argv)
    if args.pooling and not args.pretrained:
        parser.error("--pooling goes with --pretrained: a trained model has its own")
    if not 1 <= args.percentile <= 100:
        parser.error("--percentile is from 1 to 100, such as 90")
    kind = "pretrained-" if args.pretrained else ""
    if args.pooling == "mean":
        kind += "mean-"
    args.run = Path(args.run or f"runs/{kind}{'+'.join(args.machine)}")
    return args


def load_scorer(args: argparse.Namespace) -> Scorer:
    if args.pretrained:
        weights, pooling = args.weights or backbone.WEIGHTS, args.pooling or "cls"
        data.make_folder(args.run)
        backbone.fetch_weights(weights)
        model = Embedder(load_ast(weights), pooling, embedding=None)
        setting = {"weights_sha256": data.file_digest(weights), "pooling": pooling}
        root, model_key, record = args.data or "data", str(setting), {}
    else:
        run = load_run(args.run, args.weights)
        other = set(data.machine_names(args.machine)) - set(run.setting["machine"])
        if other:
            raise ValueError(f"{args.run} was not trained on {' '.join(sorted(other))}")
        data.make_folder(args.run)
        model, setting = run.model, run.setting
        lora.merge_lora(model.ast)  # the same outputs, at the speed of the plain AST
        root, model_key, record = args.data or run.data, run.digest, {"adapter_sha256": run.digest}
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
        for machine in data.machine_names(args.machine):
            data.fetch(machine, scorer.root)
            score_machine(machine, scorer, args)


if __name__ == "__main__":
    main()
