"""Score: how far is a test clip from the nearest normal training clip of its machine?

    d(x, y) = 1 - e_x · e_y              cosine distance of two windows' unit-length embeddings
    score(x) = mean of the k smallest d(x, y) over all y in the bank; k is 1 by default

The bank holds all windows of the machine's training clips (equal files count once). A clip of 10 s
is one window, one above 10.255 s has several. Each is scored by itself; the clip has the score of
its most anomalous window. A clip is called anomalous if its score is above the 90th percentile of
the training clips' scores. A training clip is scored against the other training clips only.

    python score.py --machine fan                      # with the model in runs/fan
    python score.py --machine fan --pretrained         # with the untouched AST, no training

writes the challenge's CSV files into the run folder, and report_fan.csv for people.
"""

import argparse
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

import backbone
import data
import train as training
from backbone import Embedder, load_ast
from data import Clip


def all_windows(clips: list[Clip], workers: int, device: torch.device):
    """Yields (index of the clip, start in samples, spectrogram (1024, 128)) for each window."""
    loader = training.make_loader(data.AllWindows(clips), workers, device, batch_size=None)
    for index, (x, starts) in enumerate(loader):  # x (n, 1024, 128), all of one clip
        for start, window in zip(starts, x):
            yield index, start, window


@torch.inference_mode()
def embed(model: Embedder, clips: list[Clip], batch_size: int, workers: int):
    """Embed all windows of all clips, in their order and in float32 on every device.

    Yields (index of the clip, start in samples, embedding (D,) of unit length) for each window.
    """
    model.eval()
    device = model.ast.pos_embed.device
    torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 of a float32's 23 mantissa bits
    windows = all_windows(clips, workers, device)
    while batch := list(islice(windows, batch_size)):  # full, whatever the clips' lengths
        index, start, x = zip(*batch)
        yield from zip(index, start, model(torch.stack(x).to(device)).cpu().numpy())


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine distance of each row of x (m, D) to each row of y (n, D), of unit length: (m, n)."""
    return (1 - x @ y.T).clip(min=0)  # rounding may go below 0


def nearest(d: np.ndarray, k: int) -> np.ndarray:
    """Mean of the k smallest distances in each row: (m, n) -> (m,).

    ValueError: a row has fewer than k that are finite.
    """
    found = np.isfinite(d).sum(axis=1).min()
    if k > found:
        why = "too few training clips, or training has diverged"
        raise ValueError(f"the {k} nearest of {found} distances to other clips: {why}")
    return np.partition(d, k - 1, axis=1)[:, :k].mean(axis=1)


def anomaly_scores(
    test: np.ndarray,
    train: np.ndarray,
    train_id: np.ndarray,
    domain: np.ndarray,
    k: int,
    normalize: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one machine's test windows (m,) and training windows (n,).

    test (m, D) and train (n, D) are embeddings; train_id (n,) and domain (n,) tell which clip a
    training window is from, and that clip's domain: "source", "target", or None if it is not known.
    ValueError: too few clips for what is asked, or see normalised.
    """
    d_test, d_train = distances(test, train), distances(train, train)  # (m, n), (n, n)
    d_train[train_id[:, None] == train_id] = np.inf  # no training clip is its own neighbour
    if normalize == "none":
        return nearest(d_test, k), nearest(d_train, k)
    return normalised(d_test, d_train, domain, k, normalize)


def most_anomalous(scores: np.ndarray, clip_id: np.ndarray) -> np.ndarray:
    """The index of each clip's highest-scoring window: scores (m,), clip_id (m,) -> (n_clips,)."""
    highest = []
    for clip in np.unique(clip_id):
        windows = np.flatnonzero(clip_id == clip)
        highest.append(windows[scores[windows].argmax()])
    return np.array(highest)


def decide(scores: np.ndarray, train_scores: np.ndarray, percentile: float = 90):
    """Decisions (n_clips,) bool, and the threshold: a percentile of the training clips' scores.

    Both arrays have one score per clip. For a trained model the threshold is low: training has
    drawn those clips together, so more than 10 % of new normal clips may lie above it.
    ValueError: a percentile below 1 (was 0.9 meant to be 90?) or above 100.
    """
    if not 1 <= percentile <= 100:
        raise ValueError(f"the percentile is from 1 to 100, not {percentile}")
    threshold = np.percentile(train_scores, percentile)
    return scores > threshold, threshold


def score_machine(machine: str, model: Embedder, model_id: str, args: argparse.Namespace) -> None:
    """Score one machine, from its clips to its files."""
    train_clips, test_clips = clips_to_judge(machine, args)  # {clip: checksum of its file}
    kept = kept_embeddings(machine, train_clips | test_clips, model, model_id, args)
    # For each window: its embedding, the index of its clip, its first sample.
    train, train_id, train_start = stacked(kept, train_clips)
    test, test_id, test_start = stacked(kept, test_clips)

    domain = np.array([clip.domain for clip in train_clips])[train_id]
    scores, train_scores = anomaly_scores(test, train, train_id, domain, args.k, args.normalize)
    worst = most_anomalous(scores, test_id)  # a window of each test clip
    clip_scores = scores[worst]
    train_clip_scores = train_scores[most_anomalous(train_scores, train_id)]
    alarms, threshold = decide(clip_scores, train_clip_scores, args.percentile)

    d = distances(test[worst], train)
    near = d.argmin(axis=1)  # a training window for each test clip, by plain distance
    train_names = np.array([clip.path.name for clip in train_clips])
    report = {
        "test_clip": np.array([clip.path.name for clip in test_clips]),
        "score": clip_scores,
        "threshold": np.full(len(worst), threshold),
        "alarm": alarms.astype(int),
        "nearest_training_clip": train_names[train_id[near]],
        "distance": d.min(axis=1),
        "at_seconds": test_start[worst] / data.SAMPLE_RATE,
        "nearest_at_seconds": train_start[near] / data.SAMPLE_RATE,
    }
    write_results(machine, report, train_clip_scores, model_id, args)


DENSITY_K = 4  # neighbours: ASDKit's default for --normalize density (k_ref_normalize)


def normalised(
    d_test: np.ndarray, d_train: np.ndarray, domain: np.ndarray, k: int, normalize: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the test windows (m,) and of the training windows (n,) under --normalize.

    Distances tend to be smaller among the many source clips than among the few target clips, and in
    sparse regions even a normal sound is far from the next. Two ways to make them comparable:

    density  d(x, y) / ρ(y), where ρ(y) is the mean distance of y to its nearest neighbours from
             other clips (Wilkinghoff et al. 2025, arXiv 2509.10951)
    test     min over the domains of (score - μ) / σ, with a bank for each domain, and μ and σ of
             all test windows' scores against that bank (from RMIS, code of the paper's lab). This
             is TRANSDUCTIVE: each score depends on the whole test set. Later rules forbid it.

    When a training clip is scored, its windows leave the bank; ρ, μ and σ stay as they are.
    ValueError: too few clips, or test scores that do not vary.
    """
    if normalize == "density":
        rho = nearest(d_train, DENSITY_K).clip(min=1e-6)  # (n,); among equal clips it would be 0
        return nearest(d_test / rho, k), nearest(d_train / rho, k)

    of_test, of_train = [], []  # --normalize test
    for name in ("source", "target", None):  # None: not known
        bank = domain == name  # (n,) bool: these columns of the distances
        if bank.any():
            scores, train_scores = nearest(d_test[:, bank], k), nearest(d_train[:, bank], k)
            mean, std = scores.mean(), scores.std()
            if std < 1e-9:
                raise ValueError("--normalize test needs test clips whose scores vary")
            of_test.append((scores - mean) / std)
            of_train.append((train_scores - mean) / std)
    return np.min(of_test, axis=0), np.min(of_train, axis=0)


# ---------------------------------------------- plumbing: not needed to follow the method

import contextlib
import json
import shlex
import time

from tqdm import tqdm

import evaluate
from lora import merge_lora

SAVE_EVERY = 60  # seconds: how often embeddings are saved while they come


def clips_to_judge(machine: str, args: argparse.Namespace) -> tuple[dict, dict]:
    """-> the training clips, of copies only one, and the test clips: {clip: checksum}.

    Says what is judged, and what is left out. Errors: see list_clips.
    """
    clips, said = {}, {}
    for split in ("train", "test"):
        listed = data.list_clips(args.data, machine, split)
        clips[split] = {clip: data.file_digest(clip.path) for clip in listed}
        said[split] = f"{len(listed)} {split} clips"
        others = set(listed[0].path.parent.glob("[!.]*")) - {clip.path for clip in listed}
        if others:
            names = sorted(path.name for path in others)
            said[split] += f" ({len(names)} not read: {', '.join(names[:10])})"
    bank = {digest: clip for clip, digest in clips["train"].items()}
    if copies := len(clips["train"]) - len(bank):
        said["train"] += f" ({copies} copies)"
    if copies := sum(digest in bank for digest in clips["test"].values()):
        said["test"] += f" ({copies} copies of train clips)"
    print(f"{machine}: {said['test']} against {said['train']}")
    return {clip: digest for digest, clip in bank.items()}, clips["test"]


def sound_of(clip: Clip) -> tuple[float, float, int]:
    """Seconds, level in dB (0 is full scale), and the file's Hz. ValueError: see decode."""
    wave, rate = data.decode(clip.path)
    return len(wave) / rate, 10 * (wave.square().mean() + 1e-12).log10().item(), rate


def say_what_is_unlike(machine: str, sounds: dict) -> None:
    """A line each on length, level and sample rate unlike those of most training clips."""
    clips = list(sounds)
    in_train = np.array([clip.split == "train" for clip in clips])
    measures = [("length", "s", 0.5), ("level", "dB", 6), ("sample rate", "Hz", 0)]
    for values, (what, unit, slack) in zip(np.transpose([*sounds.values()]), measures):
        low, high = np.percentile(values[in_train], [5, 95]).round(1)
        unlike = np.flatnonzero((values < low - slack) | (values > high + slack))
        named = [f"{clips[i].split}/{clips[i].path.name} ({values[i]:.6g})" for i in unlike]
        if named:
            usual = f"most training clips have {low:g} to {high:g} {unit}"
            what = f"{len(named)} of unusual {what} ({usual})"
            print(f"note: {machine}: {what}: {', '.join(named[:10])}")


def kept_embeddings(machine: str, clips: dict, model: Embedder, model_id: str, args) -> dict:
    """{clip: checksum} -> {clip: (embeddings of its windows (n, D), where they start, its sound)}.

    They are kept in the run folder under model and content, also after Ctrl-C. Only new clips are
    read: first all are decoded, so that a bad file is named at once. Says what is unlike.
    """
    file = args.run / f"embeddings_{machine}.pt"
    kept = training.load(file) if file.exists() else {}
    keys = {clip: f"{model_id} {digest}" for clip, digest in clips.items()}
    sounds = {key: kept[key][2] if key in kept else sound_of(clip) for clip, key in keys.items()}
    say_what_is_unlike(machine, {clip: sounds[key] for clip, key in keys.items()})
    new = {key: clip for clip, key in keys.items() if key not in kept}
    if new:
        training.save(file, kept)  # a folder that cannot be written to is noticed now
        windows = embed(model, list(new.values()), args.batch_size, args.workers)
        by_clip = tqdm(groupby(windows, itemgetter(0)), machine, len(new), disable=None)
        saved = time.monotonic()
        try:
            for (_, of_clip), key in zip(by_clip, new):
                _, starts, e = zip(*of_clip)
                kept[key] = (torch.from_numpy(np.stack(e)), list(starts), sounds[key])
                if time.monotonic() - saved > SAVE_EVERY:
                    training.save(file, kept)
                    saved = time.monotonic()
        finally:
            training.save(file, {key: kept[key] for key in keys.values() if key in kept})
    return {clip: kept[key] for clip, key in keys.items()}


def stacked(kept: dict, clips: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    e, starts, _ = zip(*(kept[clip] for clip in clips))
    clip_id = np.repeat(np.arange(len(clips)), [len(of_clip) for of_clip in starts])
    return np.concatenate(e), clip_id, np.concatenate(starts)


def write_results(
    machine: str, report: dict, train_scores: np.ndarray, model_id: str, args: argparse.Namespace
) -> None:
    """The CSV files, and the ten highest scores. The old picture and metrics.csv are removed."""
    for old in (args.run / f"{machine}.png", args.run / "metrics.csv"):
        old.unlink(missing_ok=True)
    report = {name: column.tolist() for name, column in report.items()}
    names, end = report["test_clip"], f"{machine}_section_00_test.csv"
    data.write_csv(args.run / f"anomaly_score_{end}", zip(names, report["score"]))
    data.write_csv(args.run / f"decision_result_{end}", zip(names, report["alarm"]))
    rows = sorted(zip(*report.values()), key=lambda row: -row[1])
    data.write_csv(args.run / f"report_{machine}.csv", [list(report), *rows])
    how = f"{model_id.split()[0]}, normalize {args.normalize}, k {args.k}"
    how += f", percentile {args.percentile:g}" + ", TRANSDUCTIVE" * (args.normalize == "test")
    with data.whole_file(args.run / f"scoring_{machine}.json", "w") as file:
        json.dump({"scored_with": how, "data": str(args.data)}, file)  # for evaluate.py

    print(f"{machine}: {sum(report['alarm'])} above the threshold of {rows[0][2]:.4g} ({how})")
    print("     score     from         the ten highest, and the nearest training clip of each")
    for name, score, _, alarm, near, _, seconds, _ in rows[:10]:
        print(f"  {score:8.4g}  {seconds:5.0f} s  {'ALARM' if alarm else '     '}  {name} | {near}")
    if args.plot:
        plot(args.run / f"{machine}.png", machine, rows, train_scores, args.data)


def plot(path: Path, machine: str, rows: list[tuple], train_scores: np.ndarray, root: str) -> None:
    """All scores, and the three highest clips beside their nearest training clips."""
    from matplotlib.figure import Figure  # optional: see requirements.txt

    figure = Figure(figsize=(8, 9), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=[1.6, 1, 1, 1])
    top = figure.add_subplot(grid[0, :])
    names, scores, thresholds, *_ = zip(*rows)
    places = np.linspace(0, len(rows) - 1, len(train_scores))
    top.plot(places, -np.sort(-train_scores), ".", color="silver", label="training clips")
    colours, label = "tab:blue", "test clips"
    with contextlib.suppress(ValueError):  # labels are missing or wrong: evaluate.py says which
        is_anomaly, _ = evaluate.labels_of(machine, names, root)
        colours = ["tab:red" if anomalous else "tab:green" for anomalous in is_anomaly]
        label = "test clips (green: normal, red: anomalous)"
    top.scatter(range(len(rows)), scores, s=12, c=colours, zorder=2, label=label)
    top.axhline(thresholds[0], color="black", linestyle="--", label="threshold")
    top.set(title=machine, xlabel="clips, the highest scores first", ylabel="anomaly score")
    top.legend()
    for i, (name, score, _, _, near, _, at, near_at) in enumerate(rows[:3], 1):
        clip, near = Path(root, machine, "test", name), Path(root, machine, "train", near)
        draw_clip(figure.add_subplot(grid[i, 0]), clip, at, f"no. {i}, score {score:.3g}")
        draw_clip(figure.add_subplot(grid[i, 1]), near, near_at, "its nearest training clip")
    with data.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_clip(axes, path: Path, seconds: float, what: str) -> None:
    wave = data.read_wav(path)[round(seconds * data.SAMPLE_RATE) :]
    n_frames = 1 + (len(wave) - data.FRAME) // data.HOP  # without the padding
    x = data.spectrogram(wave)[:n_frames].numpy()
    axes.imshow(x.T, origin="lower", aspect="auto", vmin=-1, vmax=1.2, cmap="magma")
    axes.set_title(f"{what}, from {seconds:.1f} s\n{path.name}", fontsize=8, parse_math=False)
    axes.set(xlabel="frames of 10 ms", ylabel="mel bins up to 8 kHz")


def make_parser() -> argparse.ArgumentParser:
    about = "Score test clips by their distance to normal training clips."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--run", metavar="DIR", help="read and written (runs/[pretrained-][mean-]<names>)")
    add("--data", metavar="DIR", help="holds <machine>/{train,test}/*.wav (the run's, or data)")
    add("--weights", metavar="FILE", help=f"of the AST (the run's, or {backbone.WEIGHTS})")
    add("--pretrained", action="store_true", help="the AST as it is: no training")
    what = "with --pretrained: average of the class tokens or of the patches (cls) [our choice]"
    add("--pooling", choices=["cls", "mean"], help=what)
    add("--k", type=training.positive, default=1, help="neighbours (%(default)s) [same lab]")
    what = "by density, or by the test scores: transductive (%(default)s) [same lab]"
    add("--normalize", default="none", choices=["none", "density", "test"], help=what)
    what = "percentile of the training clips' scores that is the threshold (90) [our choice]"
    add("--percentile", type=float, default=90.0, metavar="P", help=what)
    training.add_hardware(add)
    add("--batch-size", type=training.positive, default=32, help="windows at once (%(default)s)")
    add("--plot", action="store_true", help="draw <machine>.png; needs matplotlib")
    return parser


def load_model(args: argparse.Namespace, machines: list[str]) -> tuple[Embedder, str]:
    """-> (the model, what identifies it); fills in --data. Errors: also those of load_run."""
    if args.pretrained:
        weights, pooling = args.weights or backbone.WEIGHTS, args.pooling or "cls"
        args.data = args.data or "data"
        backbone.fetch_weights(weights)
        model = Embedder(load_ast(weights), pooling, embedding=None)
        return model.to(args.device), f"pretrained-{pooling} {data.file_digest(weights)}"

    if args.pooling:
        raise ValueError("--pooling goes with --pretrained; a trained run has its own")
    model, trained = training.load_run(args.run, args.weights)
    args.data = args.data or trained.data
    if not set(machines) <= set(data.machine_names(trained.machine)):
        raise ValueError(f"{args.run} was trained on no other than {' '.join(trained.machine)}")
    merge_lora(model.ast)  # the same outputs, at the speed of the plain AST
    digest = data.file_digest(args.run / "adapter.pt")
    return model.to(args.device), f"adapter-{trained.precision} {digest}"


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    kind = "pretrained-" * args.pretrained + "mean-" * (args.pooling == "mean")
    args.run = Path(args.run or f"runs/{kind}{'+'.join(args.machine)}")
    with data.one_line_errors():
        machines = data.machine_names(args.machine)
        model, model_id = load_model(args, machines)
        args.run.mkdir(parents=True, exist_ok=True)
        for machine in machines:
            data.fetch(machine, args.data)
            score_machine(machine, model, model_id, args)
    evaluation = ["python", "evaluate.py", "--machine", *args.machine, "--run", str(args.run)]
    print(f"wrote {args.run}; next: {shlex.join(evaluation)}")


if __name__ == "__main__":
    main()
