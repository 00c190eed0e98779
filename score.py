"""Score: how far is a test clip from the nearest normal training clip of its machine?

    d(x, y) = 1 - e_x · e_y                    cosine distance of unit-length embeddings
    score(x) = mean of the k smallest d(x, y) over the bank of training clips y          (k = 1)
    decision(x) = score(x) > 90th percentile of the training clips' own scores

A training clip is its own nearest neighbour, so its own score leaves itself out. A machine has many source
and few target clips, and distances are not alike in both; --normalize says what is done about that:

    none      one bank of all training clips
    train     a bank per domain, (score - μ) / σ with μ, σ of that bank's leave-one-out scores; the smaller one
              (ours: what the next one does, without the test clips)
    test      the same with μ, σ of the test clips' scores: TRANSDUCTIVE, it looks at the whole test set
              (the lab's released RMIS back-end)
    density   one bank, d(x, y) / ρ(y), ρ(y) = mean distance of y to its own k nearest training clips
              (Wilkinghoff et al. 2025, arXiv 2509.10951)

    python score.py --machine fan                      # with the model in runs/fan
    python score.py --machine fan --pretrained         # with the untouched AST, no training

writes into the run folder, per machine: anomaly_score_*.csv and decision_result_*.csv as the challenge wants
them, nearest_*.csv (the training clip that decided each score), embeddings_*.npz (re-used by the next call).
"""

import argparse
import hashlib
import io
import json
import os
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

from backbone import WEIGHTS, Embedder, fetch_weights, load_ast
from data import (
    Clip,
    Windows,
    check_clips,
    collate,
    default_run,
    file_digest,
    list_clips,
    machine_names,
    make_run_folder,
    next_command,
    prepare,
    spectrogram,
    window_starts,
    write_csv,
    write_file,
)
from lora import merge_lora
from train import DEMO, at_least, check_device, last_line, load_run, prepare_demo

# ---------------------------------------------------------------- embeddings


@torch.inference_mode()
def embed(model: Embedder, clips: list[Clip], batch_size: int, workers: int = 0) -> np.ndarray:
    """(len(clips), D) float32, of unit length; a clip longer than 1024 frames is the mean of its windows."""
    device = model.ast.pos_embed.device
    items = [(index, start) for index, n_samples in enumerate(check_clips(clips)) for start in window_starts(n_samples)]
    loader = torch.utils.data.DataLoader(
        Windows(clips),
        batch_size,
        sampler=items,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    of_window = []
    for waves, n_samples, _ in tqdm(loader, f"embedding {clips[0].machine}/{clips[0].split}", disable=None):
        x = spectrogram(waves.to(device, non_blocking=True), n_samples.to(device))  # in float32, as in training
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            of_window.append(model(x))  # (B, D)
    of_window = torch.cat(of_window).cpu()
    index = torch.tensor([index for index, _ in items])
    return F.normalize(torch.zeros(len(clips), of_window.shape[1]).index_add(0, index, of_window), dim=1).numpy()


def cached_embeddings(
    path: Path, model: Embedder, model_id: str, clips: dict[str, list[Clip]], batch_size: int, workers: int
) -> dict[str, np.ndarray]:
    """{"train": (n, D), "test": (m, D)} from `path` if it is of this model and these files, else made and kept.

    ValueError: the file is damaged, or of another model.
    """
    every = [clip for split in clips.values() for clip in split]
    stats = [(c.split, c.path.name, (info := c.path.stat()).st_size, info.st_mtime_ns) for c in every]
    files = hashlib.sha256(repr(stats).encode("utf-8", "surrogateescape")).hexdigest()
    if path.exists():
        try:
            with np.load(path) as stored:
                arrays = dict(stored)
            same_model, same_files = str(arrays["model"]) == model_id, str(arrays["files"]) == files
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged; delete it") from error
        if not same_model:
            found = f"{arrays['model']}, not {model_id}"
            raise ValueError(f"{path} comes from another model ({found}); delete it, or name another folder with --run")
        if same_files:
            return arrays
        print(f"{path} is stale: clips were added, removed or changed; embedding again")
    arrays = {split: embed(model, clips[split], batch_size, workers) for split in clips}
    buffer = io.BytesIO()
    np.savez(buffer, model=model_id, files=files, **arrays)
    write_file(path, buffer.getvalue())
    return arrays


# ---------------------------------------------------------------- nearest neighbours


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int = 1,
    density: np.ndarray | None = None,
    leave_one_out: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the k smallest cosine distances, and which row of the bank is the nearest.

    queries (m, D), bank (n, D), density (n,): d(x, y) is divided by density[y]
    leave_one_out: queries are the bank itself, and a row is not its own neighbour
    -> distance (m,) float32, index (m,). ValueError: fewer than k clips to choose from.
    """
    if len(bank) - leave_one_out < k:
        raise ValueError(f"{k} nearest neighbours need at least {k + leave_one_out} training clips, not {len(bank)}")

    def reduce(distances: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        if density is not None:
            distances = distances / density
        if leave_one_out:
            rows = np.arange(len(distances))
            distances[rows, start + rows] = np.inf
        smallest = np.partition(distances, k - 1, axis=1)[:, :k]
        return smallest.mean(axis=1), distances.argmin(axis=1)

    # scikit-learn works through the queries in chunks, so 100,000 clips need no 100,000² matrix
    chunks = list(pairwise_distances_chunked(queries, bank, reduce_func=reduce, metric="cosine"))
    distance, index = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return distance, index


def smote(target: np.ndarray, count: int, neighbours: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` synthetic rows on the lines between target clips, x + u (x' - x) with u uniform on [0, 1).

    target (n, D); x is drawn from its rows, x' from the 2 nearest others -> rows (count, D), index of x (count,)
    Source: Chawla et al. 2002 (arXiv 1106.1813); ratio and neighbours as in ASDKit.
    """
    random = np.random.default_rng(seed)
    near = NearestNeighbors(n_neighbors=neighbours).fit(target).kneighbors(return_distance=False)  # (n, neighbours)
    x = random.integers(len(target), size=count)
    other = near[x, random.integers(neighbours, size=count)]
    u = random.random((count, 1), dtype=np.float32)
    return target[x] + u * (target[other] - target[x]), x


def anomaly_scores(
    train: np.ndarray, test: np.ndarray, domains: list[str | None], k: int, normalize: str, smote_ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scores of one machine, by the equations at the top of this file.

    train (n, D), test (m, D), domains: of each training clip
    smote_ratio: fill the target clips up to this share of the source clips; 0 = off
    -> test scores (m,), training scores (n,) each with itself left out, nearest training clip (m,)
    ValueError: too few clips for what is asked.
    """
    n = len(train)
    source, target, unlabelled = (np.flatnonzero([d == name for d in domains]) for name in ("source", "target", None))
    rows, origin = train, np.arange(n)  # with SMOTE also synthetic rows, and the clip that each was made from
    if smote_ratio:
        if len(target) < 3:
            raise ValueError(f"--smote needs at least 3 target training clips, not {len(target)}")
        synthetic, x = smote(train[target], max(0, int(smote_ratio * len(source)) - len(target)))
        rows, origin = np.concatenate([train, synthetic]), np.concatenate([origin, target[x]])
        target = np.concatenate([target, np.arange(n, len(rows))])
    banks = [np.arange(len(rows))] if normalize in ("none", "density") else [source, target, unlabelled]

    per_bank = []
    for members in banks:
        if len(members) == 0:
            continue  # a domain without clips has no bank
        bank, real = rows[members], members[members < n]
        density = real_density = None
        if normalize == "density":
            density, _ = nearest(bank, bank, k, leave_one_out=True)
            real_density = density[: len(real)]
            if density.min() < 1e-6:
                raise ValueError("--normalize density: two training clips are the same; remove one of them")
        of_test, index = nearest(test, bank, k, density)
        # A training clip is compared with the other real clips: a synthetic one may be made from itself.
        of_train = np.empty(n, np.float32)
        of_train[real] = nearest(rows[real], rows[real], k, real_density, leave_one_out=True)[0]
        if len(others := np.setdiff1d(np.arange(n), real)):
            of_train[others] = nearest(train[others], rows[real], k)[0]
        mean, std = 0.0, 1.0
        if normalize in ("train", "test"):
            reference = of_train[real] if normalize == "train" else of_test
            mean, std = reference.mean(), reference.std()
            if std < 1e-9:
                few = f"{len(reference)} scores of a domain do not vary; too few clips"
                raise ValueError(f"--normalize {normalize}: {few}")
        per_bank.append(((of_test - mean) / std, (of_train - mean) / std, origin[members[index]]))

    test_scores, train_scores, origins = (np.stack(parts) for parts in zip(*per_bank, strict=True))
    best = test_scores.argmin(axis=0)
    return test_scores.min(axis=0), train_scores.min(axis=0), origins[best, np.arange(len(test))]


# ---------------------------------------------------------------- files


def score_machine(machine: str, model: Embedder, model_id: str, args: argparse.Namespace) -> None:
    """Embed, score and write the files of one machine."""
    run = args.run
    clips = {split: list_clips(args.data, machine, split) for split in ("train", "test")}
    train, test = clips["train"], clips["test"]
    cache = run / f"embeddings_{machine}.npz"
    arrays = cached_embeddings(cache, model, model_id, clips, args.batch_size, args.workers)
    domains = [clip.domain for clip in train]
    try:
        scores, train_scores, neighbours = anomaly_scores(
            arrays["train"], arrays["test"], domains, args.k, args.normalize, args.smote
        )
    except ValueError as error:
        raise ValueError(f"{machine}: {error}") from error
    threshold = np.percentile(train_scores, 90)
    decisions = scores > threshold

    # evaluate.py prints beside the numbers how they were made; until the new ones are whole, it is told nothing
    how_file = run / f"scoring_{machine}.json"
    how_file.unlink(missing_ok=True)
    names = [clip.path.name for clip in test]
    write_csv(run / f"anomaly_score_{machine}_section_00_test.csv", list(zip(names, scores.tolist(), strict=True)))
    write_csv(
        run / f"decision_result_{machine}_section_00_test.csv", list(zip(names, decisions.astype(int), strict=True))
    )
    distances = 1 - np.sum(arrays["test"] * arrays["train"][neighbours], axis=1)
    near = zip(names, [train[i].path.name for i in neighbours], distances.tolist(), strict=True)
    write_csv(run / f"nearest_{machine}.csv", [("test_clip", "nearest_training_clip", "distance"), *near])
    how = {"model": model_id.split()[0], "normalize": args.normalize, "k": args.k, "smote": args.smote}
    how |= {"data": str(args.data)}
    write_file(how_file, json.dumps(how).encode())
    counts = ", ".join(f"{domains.count(d)} {d}" for d in ("source", "target") if d in domains)
    print(
        f"{machine}: {len(test)} test clips against {len(train)} training clips"
        + (f" ({counts})" if counts else "")
        + f"; {decisions.sum()} above the threshold of {threshold:.4g}"
    )


# ---------------------------------------------------------------- the command line


def parse_args(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="score.py",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        description="Score the test clips of machines: python score.py --machine fan",
    )
    add = parser.add_argument
    add(
        "--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all; part of the run's or all"
    )
    add("--data", help="holds <machine>/{train,test}/*.wav (where the run was trained; data with --pretrained)")
    add("--run", help="the run folder, read and written (runs/<names>, runs/pretrained-<names>)")
    add("--weights", help="the AST's public weights (those of the run; weights/ast.safetensors with --pretrained)")
    add("--pretrained", action="store_true", help="use the AST as it is: mean of its class tokens, no run needed")
    add("--k", type=at_least(1), default=1, help="nearest neighbours to average (%(default)s) [same lab]")
    add("--normalize", default="none", choices=["none", "train", "test", "density"],
        help="between the domains, see the top of score.py; test is transductive (%(default)s) [same lab]")  # fmt: skip
    add("--smote", type=at_least(0, float), default=0.0,
        help="fill the target bank up to this share of the source bank: 0.2 [ASDKit] (%(default)s, off)")  # fmt: skip
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 (a GPU if there is one)",
    )
    add("--batch-size", type=at_least(1), default=32, help="windows of 10 s (%(default)s)")
    add("--demo", action="store_true", help="the made-up machines of train.py --demo")
    args = parser.parse_args(argv)
    if args.demo:
        if args.data or args.weights:
            parser.error("--demo brings its own data and weights: leave out --data and --weights")
        parser.set_defaults(**{name: DEMO[name] for name in ("data", "weights", "device", "batch_size")})
        args = parser.parse_args(argv)
    args.run = Path(args.run or default_run(args.machine, args.demo, args.pretrained))
    args.workers = 0 if args.device == "cpu" else min(8, os.cpu_count() or 1)
    return parser, args


def load_model(args: argparse.Namespace, machines: list[str]) -> tuple[Embedder, str]:
    """-> (the model, ready to embed; what identifies it). Fills in --data from the run."""
    if args.pretrained:
        args.data = args.data or "data"
        args.weights = args.weights or WEIGHTS
        prepare(machines, args.data, "train")  # tells a misspelt name before the weights are fetched
        fetch_weights(args.weights)
        model = Embedder(load_ast(args.weights), pooling="cls", embedding=None)
        model_id = f"pretrained {file_digest(args.weights)[:12]}"
    else:
        model, trained = load_run(args.run, args.weights)
        if untrained := [machine for machine in machines if machine not in machine_names(trained.machine)]:
            raise ValueError(
                f"{args.run} was not trained on {', '.join(untrained)}, only on {' '.join(trained.machine)}; "
                "train jointly, or use --pretrained"
            )
        args.data = args.data or trained.data
        model_id = f"adapter {file_digest(args.run / 'adapter.pt')[:12]}"
        merge_lora(model.ast)  # the same outputs, at the speed of the plain AST
    return model.to(args.device).eval(), model_id


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse_args(argv)
    try:
        check_device(args.device)
        machines = machine_names(args.machine)
        if args.demo:
            prepare_demo(machines)
        model, model_id = load_model(args, machines)
        for split in ("train", "test"):
            prepare(machines, args.data, split)
        new = [machine for machine in machines if not (args.run / f"embeddings_{machine}.npz").exists()]
        check_clips([clip for m in new for split in ("train", "test") for clip in list_clips(args.data, m, split)])
        make_run_folder(args.run)
        for machine in machines:
            score_machine(machine, model, model_id, args)
    except KeyboardInterrupt:
        parser.exit(130, f"\nscore.py: interrupted; python score.py {shlex.join(argv)} goes on with the next machine\n")
    except torch.OutOfMemoryError:
        parser.error(f"the GPU's memory is too small for --batch-size {args.batch_size}; halve it")
    except (ValueError, OSError) as error:
        parser.error(last_line(error))
    if args.normalize == "test":
        print("note: --normalize test is transductive: each score depends on the whole test set")
    print(f"wrote {args.run}; next: {next_command('evaluate.py', args.machine, args.run, args.demo)}")


if __name__ == "__main__":
    main()
