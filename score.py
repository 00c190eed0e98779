"""Score: how far is a test clip from the nearest normal training clip of its machine?

    d(x, y) = 1 - e_x · e_y                    cosine distance of unit-length embeddings
    score(x) = mean of the k smallest d(x, y) over the bank of training clips y          (k = 1)
    decision(x) = score(x) > 90th percentile of the training clips' own scores

The trained model's adapters are merged, then: embed -> anomaly_scores -> decide. A training clip is
its own nearest neighbour, so its own score leaves itself out. Distances differ between the many
source and the few target clips; --normalize corrects for it:

    none      one bank of all training clips, no correction
    test      a bank per domain, (score - μ) / σ with μ, σ of the test clips' scores, the smaller of the two:
              TRANSDUCTIVE, scores and threshold look at the whole test set (the lab's released RMIS back-end)
    train     the same with μ, σ of the bank's own leave-one-out scores (ours: needs no test clips)
    density   one bank, d(x, y) / ρ(y), ρ(y) = mean distance of y to its 4 nearest in the bank
              (Wilkinghoff et al. 2025, arXiv 2509.10951)

    python score.py --machine fan                      # with the model in runs/fan
    python score.py --machine fan --pretrained         # with the untouched AST, no training

writes into the run folder the challenge's CSV files, and of each test clip the nearest training
clip.
"""

import numpy as np
import torch
import torch.nn.functional as F

import data
from backbone import Embedder
from data import Clip, spectrogram, window_starts

DENSITY_K = 4  # neighbours that ρ averages: ASDKit's default for this back-end (k_ref_normalize)


# Embeddings


@torch.inference_mode()
def embed(
    model: Embedder, clips: list[Clip], lengths: list[int], batch_size: int, workers: int = 0
) -> np.ndarray:
    """(len(clips), D) of unit length; a clip longer than 1024 frames is the mean of its windows,
    rescaled.

    lengths: of the clips in samples. In float32 on every device: bf16 would move distances by up to
    3 %.
    """
    model.eval()
    device = model.ast.pos_embed.device
    windows = [
        [(index, start) for start in window_starts(n_samples)]
        for index, n_samples in enumerate(lengths)
    ]
    at_once = max(
        1, batch_size // max(map(len, windows))
    )  # a clip's windows stay in one batch: it is read once
    batches = [
        [w for clip in windows[i : i + at_once] for w in clip]
        for i in range(0, len(clips), at_once)
    ]
    loader = data.make_loader(clips, batches, workers, device)
    of_window = []
    for waves, n_samples, _ in data.progress(
        loader, f"embedding {clips[0].machine}", len(batches), "batches"
    ):
        x = spectrogram(waves.to(device, non_blocking=True), n_samples.to(device))
        of_window.append(model(x).cpu())  # (B, D)
    index = torch.tensor([index for batch in batches for index, _ in batch])
    of_clip = torch.zeros(len(clips), of_window[0].shape[1]).index_add(
        0, index, torch.cat(of_window)
    )
    return F.normalize(of_clip, dim=1).numpy()


# Nearest neighbours


def nearest(queries: np.ndarray, bank: np.ndarray, k: int = 1, density: np.ndarray | None = None,
            own: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """Mean of the k smallest distances of each query to the bank: rows of unit length (m, D), (n,
    D) -> (m,).

    density (n,): d(x, y) is divided by density[y]
    own (m,): the row of the bank that is query i itself and is left out; -1 for none
    ValueError: fewer than k clips to choose from.
    """
    alone = own is not None and (own >= 0).any()
    if len(bank) - alone < k:
        raise ValueError(
            f"{k} nearest neighbours need at least {k + alone} training clips, not {len(bank)}"
        )
    scores = []
    for i in range(0, len(queries), 1000):  # in chunks: 100,000 clips need no 100,000² matrix
        d = (1 - queries[i : i + 1000] @ bank.T).clip(min=0)  # (chunk, n); rounding may go below 0
        if density is not None:
            d /= density
        if own is not None:
            rows = np.flatnonzero(own[i : i + 1000] >= 0)
            d[rows, own[i : i + 1000][rows]] = np.inf
        scores.append(np.partition(d, k - 1, axis=1)[:, :k].mean(axis=1))
    return np.concatenate(scores)


def anomaly_scores(train: np.ndarray, test: np.ndarray, domains: list[str | None], k: int, normalize: str,
                   smote_ratio: float) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One machine: train (n, D), test (m, D) -> test scores (m,), training scores (n,) each with
    itself left out.

    domains: of each training clip. smote_ratio: fill the target clips up to this share of the
    source clips, with unit-length points on the lines between them; 0 = off. A training clip is
    compared with the other real clips only: a synthetic one may be made from itself. ValueError:
    too few clips for what is asked.
    """
    n, domains = len(train), np.array(domains, object)
    synthetic = train[:0]
    if smote_ratio:
        is_target = domains == "target"
        wanted = int(smote_ratio * (domains == "source").sum()) - is_target.sum()
        synthetic = smote(train[is_target], max(0, wanted))

    if normalize in ("none", "density"):
        bank, density = np.concatenate([train, synthetic]), np.ones(n + len(synthetic), np.float32)
        if normalize == "density":
            density = nearest(bank, bank, DENSITY_K, own=np.arange(len(bank))).clip(
                min=1e-6
            )  # 0 for copies
        return nearest(test, bank, k, density), nearest(
            train, train, k, density[:n], own=np.arange(n)
        )

    of_test, of_train = [], []
    for domain in ("source", "target", None):
        members = np.flatnonzero(domains == domain)
        if len(members) == 0:
            continue  # a domain without clips has no bank
        real = train[members]
        own = np.full(n, -1)
        own[members] = np.arange(len(members))
        test_scores = nearest(
            test, np.concatenate([real, synthetic]) if domain == "target" else real, k
        )
        train_scores = nearest(train, real, k, own=own)
        reference = train_scores[members] if normalize == "train" else test_scores
        mean, std = reference.mean(), reference.std()
        if std < 1e-9:
            few = f"{len(reference)} scores of a domain do not vary; too few clips"
            raise ValueError(f"--normalize {normalize}: {few}")
        of_test.append((test_scores - mean) / std)
        of_train.append((train_scores - mean) / std)
    return np.min(of_test, axis=0), np.min(of_train, axis=0)


def decide(scores: np.ndarray, train_scores: np.ndarray) -> tuple[np.ndarray, float]:
    """-> (decisions (m,) bool, threshold): above the 90th percentile of the training clips' own
    scores.

    A trained model has heard those clips, and draws them together: the threshold is low, and more
    than one in ten of the normal clips that it has not heard exceed it.
    """
    threshold = np.percentile(train_scores, 90)
    return scores > threshold, threshold


# -------------------------------------------- plumbing: nothing below is in the paper

import argparse
import importlib.util
import json
import shlex
import sys
import zipfile
from pathlib import Path

from scipy.ndimage import uniform_filter1d
from sklearn.neighbors import NearestNeighbors

import backbone
import train
from backbone import load_ast
from data import FFT, HOP, N_MELS, SAMPLE_RATE, list_clips, log_mel, mel_filters
from lora import merge_lora

# Synthetic clips, off by default

SMOTE_NEIGHBOURS = 2  # as in ASDKit


def smote(target: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Synthetic rows between target clips (n, D): x + u (x' - x), u uniform on [0, 1), -> (count,
    D) of unit length.

    x is any row, x' one of the 2 nearest others (Chawla et al. 2002, arXiv 1106.1813). ValueError:
    fewer than 3 clips.
    """
    if len(target) <= SMOTE_NEIGHBOURS:
        raise ValueError(
            f"--smote needs at least {SMOTE_NEIGHBOURS + 1} target training clips, not {len(target)}"
        )
    random = np.random.default_rng(seed)
    near = (
        NearestNeighbors(n_neighbors=SMOTE_NEIGHBOURS).fit(target).kneighbors(return_distance=False)
    )  # (n, 2)
    x = random.integers(len(target), size=count)
    other = near[x, random.integers(SMOTE_NEIGHBOURS, size=count)]
    rows = target[x] + random.random((count, 1), dtype=np.float32) * (target[other] - target[x])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Embeddings that are kept


def file_id(clip: Clip) -> str:
    """What tells whether a clip is still the one that was embedded: its name, size and time of
    change."""
    stat = clip.path.stat()
    return f"{clip.split}/{clip.path.name} {stat.st_size} {stat.st_mtime_ns}"


def read_kept(path: Path, model_id: str) -> dict[str, np.ndarray]:
    """file_id -> embedding (D,). ValueError: the file is damaged, or of another model."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as stored:
            found, kept = (
                str(stored["model"]),
                dict(zip(stored["files"].tolist(), stored["embeddings"], strict=True)),
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it") from error
    if found != model_id:
        other = f"{path} comes from another model ({found}, not {model_id})"
        raise ValueError(f"{other}; delete it, or name another folder with --run")
    return kept


def embed_machines(machines: list[str], model: Embedder, model_id: str, args: argparse.Namespace):
    """Yields each machine's training clips, then test clips, and their embeddings (n, D) in that
    order.

    Kept ones where there are some; all other clips of all machines are checked before the first is
    embedded. ValueError: clips that cannot be used, an embeddings file that is damaged or of
    another model.
    """
    clips = {
        m: [clip for split in ("train", "test") for clip in list_clips(args.data, m, split)]
        for m in machines
    }
    ids = {clip: file_id(clip) for m in machines for clip in clips[m]}
    kept = {m: read_kept(args.run / f"embeddings_{m}.npz", model_id) for m in machines}
    new = {m: [clip for clip in clips[m] if ids[clip] not in kept[m]] for m in machines}
    unchecked = [clip for m in machines for clip in new[m]]
    lengths = dict(zip(unchecked, data.check_clips(unchecked), strict=True))
    data.make_run_folder(args.run)
    for m in machines:
        if new[m]:
            made = embed(
                model, new[m], [lengths[clip] for clip in new[m]], args.batch_size, args.workers
            )
            kept[m] |= {ids[clip]: row for clip, row in zip(new[m], made, strict=True)}
        rows = np.stack([kept[m][ids[clip]] for clip in clips[m]])
        if new[m]:
            with data.whole_file(args.run / f"embeddings_{m}.npz") as file:
                np.savez(
                    file, model=model_id, files=[ids[clip] for clip in clips[m]], embeddings=rows
                )
        yield clips[m], rows


# Files


def score_machine(
    clips: list[Clip], rows: np.ndarray, model_id: str, args: argparse.Namespace
) -> None:
    """Score one machine and write its files."""
    run, machine, n = args.run, clips[0].machine, sum(clip.split == "train" for clip in clips)
    names, domains = [clip.path.name for clip in clips], [clip.domain for clip in clips[:n]]
    try:
        scores, train_scores = anomaly_scores(
            rows[:n], rows[n:], domains, args.k, args.normalize, args.smote
        )
    except ValueError as error:
        raise ValueError(f"{machine}: {error}") from error
    decisions, threshold = decide(scores, train_scores)

    # evaluate.py prints beside the numbers how they were made; until the new ones are whole, it is
    # told nothing
    how_scored = run / f"scoring_{machine}.json"
    how_scored.unlink(missing_ok=True)
    for kind, values in (
        ("anomaly_score", scores.tolist()),
        ("decision_result", decisions.astype(int)),
    ):
        data.write_csv(
            run / f"{kind}_{machine}_section_00_test.csv", list(zip(names[n:], values, strict=True))
        )
    similarity = rows[n:] @ rows[:n].T
    near = similarity.argmax(
        axis=1
    )  # real clips only, by plain distance, however the score was made
    table = zip(names[n:], [names[i] for i in near], 1 - similarity.max(axis=1), strict=True)
    data.write_csv(
        run / f"nearest_{machine}.csv", [("test_clip", "nearest_training_clip", "distance"), *table]
    )
    how = {
        "model": model_id.split()[0],
        "normalize": args.normalize,
        "k": args.k,
        "smote": args.smote,
    }
    data.write_file(how_scored, json.dumps(how | {"data": str(args.data)}).encode())

    counts = ", ".join(f"{domains.count(d)} {d}" for d in ("source", "target") if d in domains)
    print(f"{machine}: {len(scores)} test clips against {n} training clips" + f" ({counts})" * bool(counts)
          + f"; {decisions.sum()} above the threshold of {threshold:.4g}")  # fmt: skip
    if args.plot:
        plot(run / f"{machine}.png", clips[n:], scores, threshold, [clips[i] for i in near])


def decibels(clip: Clip) -> np.ndarray:
    """Log-mel (T, 128) in dB."""
    return 10 / np.log(10) * log_mel(data.read_wav(clip.path)[None])[0].numpy()


def plot(
    path: Path, clips: list[Clip], scores: np.ndarray, threshold: float, neighbours: list[Clip]
) -> None:
    """All scores, and for the three highest: the clip, its nearest training clip, and where it is
    louder."""
    from matplotlib.figure import Figure  # optional: see requirements.txt

    order, shown = scores.argsort(kind="stable"), min(3, len(clips))
    figure = Figure(figsize=(14, 3.4 + 2.4 * shown), layout="constrained")
    grid = figure.add_gridspec(1 + shown, 3, height_ratios=[1.3] + [1] * shown)
    top = figure.add_subplot(grid[0, :])
    kinds = [clip.domain or "test clip" for clip in clips]
    if all(clip.is_anomaly is not None for clip in clips):
        kinds = ["labelled anomaly" if clip.is_anomaly else "labelled normal" for clip in clips]
    for kind, colour in zip(
        sorted(set(kinds), reverse=True), ("tab:green", "tab:orange"), strict=False
    ):
        ranks = [rank for rank, i in enumerate(order) if kinds[i] == kind]
        top.plot(
            ranks,
            scores[order[ranks]],
            "o",
            markersize=4,
            color=colour,
            label=f"{kind} ({len(ranks)})",
        )
    above = (scores > threshold).sum()
    top.axhline(
        threshold,
        color="black",
        linestyle="--",
        label=f"threshold {threshold:.3g}: {above} clips lie above",
    )
    for place in range(1, shown + 1):
        xy = (len(order) - place, scores[order[-place]])
        top.annotate(str(place), xy, (0, 6), textcoords="offset points", fontsize=8, ha="center")
    top.set(title=f"{clips[0].machine}: {len(clips)} test clips by anomaly score; 1 to {shown} are drawn below",
            ylabel="distance to normal")  # fmt: skip
    top.legend(loc="upper left")

    hz = np.array([250, 500, 1000, 2000, 4000, 7500])
    bins = (
        mel_filters(torch.device("cpu"))[hz * FFT // SAMPLE_RATE].argmax(dim=1).numpy()
    )  # where each is heard most
    pairs = [(decibels(clips[i]), decibels(neighbours[i])) for i in order[::-1][:shown]]
    every = np.concatenate([x for pair in pairs for x in pair])
    loudness = {
        "vmin": np.percentile(every, 2),
        "vmax": np.percentile(every, 99.9),
        "cmap": "magma",
    }
    for row, (i, (clip, near)) in enumerate(zip(order[::-1], pairs, strict=False), 1):
        n = min(len(clip), len(near))
        smooth = uniform_filter1d(clip[:n] - near[:n], 50, axis=0, mode="nearest")
        names = (f"no. {row}, score {scores[i]:.3g}\n{clips[i].path.name}",
                 f"its nearest normal training clip\n{neighbours[i].path.name}",
                 "difference, over 0.5 s\nred: louder than that clip, blue: quieter")  # fmt: skip
        for column, (x, name) in enumerate(zip((clip, near, smooth), names, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            scale = loudness if column < 2 else {"vmin": -20, "vmax": 20, "cmap": "RdBu_r"}
            extent = (0, len(x) * HOP / SAMPLE_RATE, -0.5, N_MELS - 0.5)
            image = axes.imshow(x.T, origin="lower", aspect="auto", extent=extent, **scale)
            axes.set_title(name, fontsize=7.5)
            axes.set(yticks=bins, yticklabels=hz / 1000, ylabel="kHz (mel scale)" if column == 0 else None,
                     xlabel="seconds" if row == shown else None)  # fmt: skip
            if column:
                figure.colorbar(image, label="dB", extend="both")
    with data.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


# The command line

BACK_ENDS = ["none", "train", "test", "density"]


def make_parser() -> argparse.ArgumentParser:
    about = """Score test clips by their distance to normal training clips.

  python score.py --machine fan                  with the model that train.py left in runs/fan
  python score.py --machine pump --pretrained    with the AST as it is: no training, no labels"""
    parser = data.make_parser("score.py", about)
    # fmt: off
    add = parser.add_argument_group("what is scored").add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all; of the run's")
    add("--data", metavar="DIR", help="holds <machine>/{train,test}/*.wav (the run's; data with --pretrained)")
    add("--run", metavar="DIR", help="the run folder, read and written (runs/<names>, runs/pretrained-<names>)")
    add("--weights", metavar="FILE", help=f"the AST's public weights (the run's; {backbone.WEIGHTS} with --pretrained)")
    add("--pretrained", action="store_true", help="the AST as it is: mean of its class tokens, no run needed")
    add = parser.add_argument_group("back-end").add_argument
    add("--k", type=train.at_least(1), default=1, help="nearest neighbours to average (%(default)s) [same lab]")
    add("--normalize", default="none", choices=BACK_ENDS, help="see the top of score.py (%(default)s) [same lab]")
    add("--smote", type=train.at_least(0, float), default=0.0, help="target / source clips to reach (0, off)")
    add = parser.add_argument_group("run").add_argument
    train.add_hardware(add)
    add("--batch-size", type=train.at_least(1), default=32, help="windows of 10 s (%(default)s)")
    add("--plot", action="store_true", help="draw <machine>.png: scores, and what is unusual in the highest three")
    # fmt: on
    return parser


def load_model(args: argparse.Namespace, machines: list[str]) -> tuple[Embedder, str]:
    """-> (the model, ready to embed; what identifies it). Fills in --data from the run."""
    if args.pretrained:
        args.data, weights = args.data or "data", args.weights or backbone.WEIGHTS
        data.prepare(
            machines, args.data, "train"
        )  # reports a misspelt name before the weights are fetched
        backbone.fetch_weights(weights)
        model = Embedder(load_ast(weights), pooling="cls", embedding=None)
        model_id = f"pretrained {data.file_digest(weights)[:12]}"
    else:
        model, trained = train.load_run(args.run, args.weights)
        if untrained := [
            machine for machine in machines if machine not in data.machine_names(trained.machine)
        ]:
            only = f"{args.run} was not trained on {', '.join(untrained)}, only on {' '.join(trained.machine)}"
            raise ValueError(f"{only}; train jointly, or use --pretrained")
        args.data = args.data or trained.data
        model_id = f"adapter {data.file_digest(args.run / 'adapter.pt')[:12]}"
        merge_lora(model.ast)  # the same outputs, at the speed of the plain AST
    return model.to(args.device).eval(), model_id


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    args.run = Path(args.run or data.default_run(args.machine, args.pretrained))
    args.workers = train.workers_for(args)
    with data.one_line_errors(
        parser, f"python score.py {shlex.join(argv)} continues with the next machine"
    ):
        train.check_device(args.device)
        if args.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib; pip install matplotlib")
        machines = data.machine_names(args.machine)
        model, model_id = load_model(args, machines)
        for split in ("train", "test"):
            data.prepare(machines, args.data, split)
        for clips, rows in embed_machines(machines, model, model_id, args):
            score_machine(clips, rows, model_id, args)
    if args.normalize == "test":
        print("note: --normalize test is transductive: each score depends on the whole test set")
    print(f"wrote {args.run}; next: {data.next_command('evaluate.py', args.machine, args.run)}")


if __name__ == "__main__":
    main()
