"""Train: adapt the AST to the sounds of normal machines.

Every training clip is normal. What is learned is to tell machines and their operating conditions
apart: the class of a clip is its machine + attributes. A clip that then lies far from every
training clip of its machine is an anomaly (score.py). For a clip x of class y, with unit-length
embedding e and class centre w:

    cos θ_j = e · w_j
    loss = -log softmax_y(s · [cos θ_1, ..., cos(θ_y + m), ..., cos θ_C])       ArcFace
                                                     s = scale, m = margin, C classes

Trained are the LoRA matrices, the pooling, the linear layer and the class centres; the AST stays
frozen. By default rank 64 on q and v of all blocks (alpha 64, no dropout), attentive statistics to
256 dimensions, s = 30, m = 0.2, SpecAug up to 80 frames and 80 bins, AdamW at 1e-4 after a warm-up,
25 epochs in batches of 32: -h and README.md say where each value comes from.

    python train.py --machine fan            # or several, or dev, eval, all: one joint model

writes runs/fan: args.json, log.csv, last.pt (for --resume), adapter.pt (what was trained, less the
class centres).
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import backbone
import data
from backbone import Embedder, load_ast
from data import HOP, N_FRAMES, SpecAug, count_frames, spectrogram
from lora import add_lora, count_parameters, load_trained_state, trained_state


class ArcFace(nn.Module):
    """Additive angular margin (Deng et al. 2019, arXiv 1801.07698, equation 3); one centre a class,
    m in radians.

    forward: unit-length embeddings (B, dim), labels (B,) -> logits (B, classes), for cross-entropy.
    """

    def __init__(self, dim: int, classes: int, scale: float, margin: float):
        super().__init__()
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))

    def cosines(self, embedding: Tensor) -> Tensor:
        """cos θ to each class centre, (B, classes); the largest is the class that the clip is taken
        for."""
        return F.linear(embedding, F.normalize(self.centres)).clamp(-1, 1)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        cos = self.cosines(embedding)
        cos_y = cos.gather(1, labels[:, None])  # (B, 1), the true class
        # sin θ = √(1 - cos² θ), factored to keep digits near ±1; at ±1 itself its slope is
        # infinite: held at 1e-12
        sin_y = ((1 - cos_y) * (1 + cos_y)).clamp(min=1e-12).sqrt()
        with_margin = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)  # cos(θ + m)
        # Beyond θ = π - m, cos(θ + m) would rise again and reward the worst clips; the authors'
        # code (insightface, easy_margin off) goes on falling there, in a straight line of cos θ.
        line = cos_y - self.margin * math.sin(self.margin)
        with_margin = torch.where(cos_y > -math.cos(self.margin), with_margin, line)
        return self.scale * cos.scatter(1, labels[:, None], with_margin)


# The model and what of it is trained


def make_model(args: argparse.Namespace) -> Embedder:
    """The pre-trained AST under pooling and linear layer; what requires a gradient is what --tuning
    trains."""
    ast = load_ast(args.weights).requires_grad_(args.tuning == "full")
    if args.tuning == "lora":
        add_lora(ast, args.targets, args.rank, args.alpha, args.dropout, args.layers)
    return Embedder(ast, args.pooling, args.embedding)


def make_optimizer(
    model: Embedder, arcface: ArcFace, args: argparse.Namespace
) -> torch.optim.AdamW:
    """AdamW; the head has the same rate under every --tuning, so that lora, full and frozen can be
    compared."""
    head = [*model.pooling.parameters(), *model.linear.parameters(), *arcface.parameters()]
    groups = [{"params": head, "lr": args.lr}]
    if args.tuning != "frozen":
        in_ast = [p for p in model.ast.parameters() if p.requires_grad]
        groups.append({"params": in_ast, "lr": args.ast_lr if args.tuning == "full" else args.lr})
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=args.device != "cpu")


def warm_up(step: int, warmup: int) -> float:
    """The share of its peak that a learning rate has at a step, counted from 1: linear, then
    constant."""
    return min(1.0, step / max(warmup, 1))


# Batches


def epoch_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """(for the batches, for masks and dropout): all randomness of an epoch, so a resumed run
    repeats it."""
    return 1_000_000 * seed + 2 * epoch, 1_000_000 * seed + 2 * epoch + 1


def draw_batches(lengths: list[int], batch_size: int, seed: int) -> list[list[tuple[int, int]]]:
    """One epoch: every clip once, in random order, at a random window -> batches of (clip index,
    first sample)."""
    generator = torch.Generator().manual_seed(seed)
    spare = (count_frames(torch.tensor(lengths)) - N_FRAMES).clamp(
        min=0
    )  # frames beyond one window
    start = (torch.rand(len(lengths), generator=generator) * (spare + 1)).long() * HOP
    order = torch.randperm(len(lengths), generator=generator)
    return [[(i, start[i].item()) for i in batch.tolist()] for batch in order.split(batch_size)]


# Training


def train_epoch(
    model, arcface, optimizer, augment, labels, batches, steps, step, warmup, progress
) -> tuple:
    """Every clip once; -> (number of the last step, mean loss, accuracy), the last two over this
    epoch's clips.

    labels   (n,) class of each clip, on the device batches  yields (waves, lengths, clip indices),
    as data.collate makes them steps    for each optimizer step the batches whose gradients it takes
    together, as draw_batches made them step     number of the last step before this epoch;  warmup
    steps of it
    """
    model.train()
    device, totals, seen = labels.device, torch.zeros(2, dtype=torch.float64), 0
    for batches_of_step in steps:
        n = sum(map(len, batches_of_step))  # clips
        of_step = torch.zeros(2, device=device)  # summed loss, clips classified rightly
        for _ in batches_of_step:
            waves, lengths, index = (
                tensor.to(device, non_blocking=True) for tensor in next(batches)
            )
            y = labels[index]
            x = augment(spectrogram(waves, lengths))  # (B, 1024, 128)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                embedding = model(x)  # (B, embedding)
            loss = F.cross_entropy(
                arcface(embedding, y), y, reduction="sum"
            )  # logits (B, classes), float32
            (loss / n).backward()
            with torch.no_grad():
                of_step += torch.stack(
                    [loss, (arcface.cosines(embedding).argmax(dim=1) == y).sum()]
                )
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * warm_up(step, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        totals += of_step.cpu()  # waits for the GPU: once a step, after all its work is queued
        if not totals.isfinite().all():
            raise ValueError(DIVERGED.format("the loss", step))
        seen += n
        mean_loss, accuracy = (totals / seen).tolist()
        progress.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
        progress.update(n)
    return step, mean_loss, accuracy


def train(args: argparse.Namespace) -> None:
    """From the clips to runs/<name>/adapter.pt.

    ValueError: unusable clips, one class only, a run folder that is taken, a loss that is not
    finite.
    """
    device = torch.device(args.device)
    clips = [
        clip
        for m in data.machine_names(args.machine)
        for clip in data.list_clips(args.data, m, "train")
    ]
    classes = sorted({(clip.machine, clip.attributes) for clip in clips})
    labels = torch.tensor(
        [classes.index((clip.machine, clip.attributes)) for clip in clips], device=device
    )
    record, checkpoint = open_run(args, clips, classes)
    if is_finished(args, checkpoint):
        return
    lengths = data.check_clips(clips)  # in samples

    torch.manual_seed(epoch_seeds(args.seed, 0)[0])
    model = make_model(args).to(device)
    arcface = ArcFace(model.linear.out_features, len(classes), args.scale, args.margin).to(device)
    optimizer = make_optimizer(model, arcface, args)
    n_steps = args.epochs * math.ceil(math.ceil(len(clips) / args.batch_size) / args.accumulate)
    warmup = min(args.warmup, n_steps // 10)
    trainable, total = count_parameters(model)
    print(f"{trainable + arcface.centres.numel():,} trainable parameters, {total:,} in the model")
    print(f"{n_steps:,} steps in {args.epochs} epochs, of which {warmup} warm up")
    done, step, log = start_run(args, record, checkpoint, model, arcface, optimizer)
    if args.compile:
        model.compile()

    # One loader over all epochs: its workers read on while an epoch ends.
    epochs = range(done + 1, args.epochs + 1)
    drawn = {
        e: draw_batches(lengths, args.batch_size, epoch_seeds(args.seed, e)[0]) for e in epochs
    }
    batches = iter(
        data.make_loader(clips, [batch for e in epochs for batch in drawn[e]], args.workers, device)
    )
    augment = SpecAug(args.time_mask, args.freq_mask)
    with tqdm(
        total=args.epochs * len(clips), initial=done * len(clips), unit="clip", disable=None
    ) as progress:
        for epoch in epochs:
            progress.set_description(f"epoch {epoch}/{args.epochs}")
            torch.manual_seed(epoch_seeds(args.seed, epoch)[1])
            steps = [
                drawn[epoch][i : i + args.accumulate]
                for i in range(0, len(drawn[epoch]), args.accumulate)
            ]
            step, loss, accuracy = train_epoch(
                model, arcface, optimizer, augment, labels, batches, steps, step, warmup, progress
            )
            lr = args.lr * warm_up(step, warmup)
            log.append({"epoch": epoch, "step": step, "lr": lr, "loss": loss, "accuracy": accuracy})
            save_epoch(args, log, model, arcface, optimizer)
            progress.write(
                f"epoch {epoch}: step {step:,}, loss {loss:.4f}, accuracy {accuracy:.3f}"
            )
    finish_run(args, log, model)


# -------------------------------------------- plumbing: nothing below is in the paper

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter

import numpy
import sklearn
import torchaudio

# The run folder

ONE_CLASS = (
    "all {} clips are of one class ({}), so there is nothing to tell apart; train jointly with other machines "
    "(--machine pump fan valve), or skip training: score.py --pretrained"
)
DIVERGED = "{} is not finite at step {}; last.pt holds the epochs before; take a smaller --lr, with --overwrite"
# What a run folder holds beside args.json. With adapter.pt, a run is finished: it is the first to
# be removed, so that whenever that is cut short, no file is taken for one of the new run.
SCORES = [
    "anomaly_score_*.csv",
    "decision_result_*.csv",
    "nearest_*.csv",
    "metrics.csv",
    "scoring_*.json",
    "*.png",
]
RESULTS = ["adapter.pt", *SCORES, "embeddings_*.npz"]
PROGRESS = ["last.pt", "log.csv"]
MAY_DIFFER = {*data.PLACES, "epochs"}  # between a run and its --resume


def describe(args: argparse.Namespace, clips: list, classes: list) -> dict:
    """What args.json holds: everything that the result depends on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""  # no git here
    digest = data.file_digest(args.weights)
    return {
        "args": {
            name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")
        },
        "classes": ["/".join(parts) for parts in classes],
        "clips": dict(Counter(clip.machine for clip in clips)),
        "weights": ("" if digest == backbone.WEIGHTS_SHA256 else "not ")
        + "the public AudioSet AST",
        "weights_sha256": digest,
        "versions": {
            module.__name__: module.__version__ for module in (torch, torchaudio, numpy, sklearn)
        },
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if args.device != "cpu" else platform.machine(),
        "git_commit": commit,
    }


def open_run(args: argparse.Namespace, clips: list, classes: list) -> tuple[dict, dict | None]:
    """-> (the record of this run, what last.pt holds if there is something to resume).

    ValueError: one class only; the folder holds results and neither flag is given; the run to be
    resumed was another.
    """
    if len(classes) < 2:
        raise ValueError(ONE_CLASS.format(len(clips), "/".join(classes[0])))
    run, record = Path(args.run), describe(args, clips, classes)
    print(
        f"{len(clips):,} clips, {len(classes)} classes; {args.weights}: {record['weights']}; on {args.device}"
    )
    if args.overwrite:
        return record, None
    old = data.read_json(run / "args.json")
    if not old:
        if any(any(run.glob(pattern)) for pattern in RESULTS + PROGRESS):
            results = f"{run} holds results of no known run"
            raise ValueError(f"{results}; --overwrite removes them, --run names another folder")
        return record, None
    if not args.resume:
        state = (
            "a finished run"
            if (run / "adapter.pt").exists()
            else "an unfinished run; --resume continues it"
        )
        raise ValueError(
            f"{run} holds {state}; --overwrite replaces it, --run names another folder"
        )
    kept = ("classes", "clips", "weights_sha256")
    before, now = ({**r["args"], **{key: r[key] for key in kept}} for r in (old, record))
    changed = [
        k
        for k in sorted(now.keys() | before.keys())
        if now.get(k) != before.get(k) and k not in MAY_DIFFER
    ]
    if changed:
        changes = [
            f"{key} was {str(before.get(key))[:60]}, is {str(now.get(key))[:60]}" for key in changed
        ]
        raise ValueError(f"cannot resume {run}: {'; '.join(changes)}")
    if not (run / "last.pt").exists():
        return record, None
    checkpoint = backbone.load_file(run / "last.pt")
    if checkpoint["epoch"] > args.epochs:
        raise ValueError(
            f"cannot resume {run}: it has {checkpoint['epoch']} epochs already, --epochs {args.epochs}"
        )
    return record, checkpoint


def is_finished(args: argparse.Namespace, checkpoint: dict | None) -> bool:
    """If so, says what comes next: the run and its scores stay as they are."""
    finished = (
        bool(checkpoint)
        and checkpoint["epoch"] == args.epochs
        and Path(args.run, "adapter.pt").exists()
    )
    if finished:
        print(
            f"{args.run} is finished already; next: {data.next_command('score.py', args.machine, args.run)}"
        )
    return finished


def start_run(
    args, record: dict, checkpoint: dict | None, model: Embedder, arcface: ArcFace, optimizer
) -> tuple:
    """-> (last whole epoch, last step, log); model, class centres and optimizer become what they
    were after it.

    Makes the folder and removes what a run before has left; resuming needs last.pt and log.csv.
    """
    run, state = Path(args.run), checkpoint or {"epoch": 0, "step": 0, "log": []}
    if checkpoint:
        load_trained_state(model, checkpoint["model"])
        arcface.load_state_dict(checkpoint["arcface"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        print(f"resuming after epoch {checkpoint['epoch']}")
    data.make_run_folder(run)
    for pattern in RESULTS if checkpoint else RESULTS + PROGRESS:
        for path in run.glob(pattern):
            path.unlink()
    data.write_file(run / "args.json", json.dumps(record, indent=1).encode())
    return state["epoch"], state["step"], state["log"]


def save(path: Path, state: dict) -> None:
    """Straight into the file, with no second copy in memory."""
    with data.whole_file(path) as file:
        torch.save(state, file)


def save_epoch(
    args: argparse.Namespace, log: list[dict], model: Embedder, arcface: ArcFace, optimizer
) -> None:
    """ValueError: a weight is not finite; then nothing is written."""
    if not all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(DIVERGED.format("a weight", log[-1]["step"]))
    state = {
        "epoch": log[-1]["epoch"],
        "step": log[-1]["step"],
        "log": log,
        "model": trained_state(model),
    }
    state |= {"arcface": arcface.state_dict(), "optimizer": optimizer.state_dict()}
    save(Path(args.run, "last.pt"), state)
    write_log(args, log)


def write_log(args: argparse.Namespace, log: list[dict]) -> None:
    data.write_csv(Path(args.run, "log.csv"), [list(log[0]), *(row.values() for row in log)])


def finish_run(args: argparse.Namespace, log: list[dict], model: Embedder) -> None:
    write_log(args, log)  # again: a kill may have left it an epoch behind last.pt
    adapter = Path(args.run, "adapter.pt")
    save(adapter, trained_state(model))
    if args.device != "cpu":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(
        f"wrote {args.run}: adapter.pt ({adapter.stat().st_size / 1e6:.1f} MB), last.pt, log.csv, args.json"
    )
    print(f"next: {data.next_command('score.py', args.machine, args.run)}")


def load_run(
    run: str | Path, weights: str | Path | None = None
) -> tuple[Embedder, argparse.Namespace]:
    """-> (the trained model on the CPU, the arguments it was trained with).

    weights  where the AST's weights are now, if not where they were in training

    ValueError: not a run, not finished, an AST with another checksum, an adapter of another size.
    """
    run = Path(run)
    record = data.read_json(run / "args.json")
    if not record:
        raise ValueError(
            f"{run} is not a run of train.py; train one, or name its folder with --run"
        )
    if not (run / "adapter.pt").exists():
        raise ValueError(f"{run} is not finished; repeat its train.py command with --resume")
    args = argparse.Namespace(**record["args"])
    args.weights = str(weights or args.weights)
    if not Path(args.weights).exists():
        raise ValueError(
            f"{args.weights}, the AST that {run} was trained on, is missing; --weights tells where it is"
        )
    digest, trained_on = data.file_digest(args.weights), record["weights_sha256"]
    if digest != trained_on:
        raise ValueError(
            f"{run} was trained on weights {trained_on[:12]}, {args.weights} is {digest[:12]}"
        )
    model, state = make_model(args), backbone.load_file(run / "adapter.pt")
    try:
        load_trained_state(model, state)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{run / 'adapter.pt'} does not fit args.json: {error}") from error
    return model, args


# The command line


def check_device(name: str) -> None:
    """Make a GPU the current one (or pinned memory would open a context on the first), in full
    float32.

    ValueError: not cpu, cuda or cuda:N, or a GPU that is not there.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: cpu, cuda or cuda:N")
    if name != "cpu":
        if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
            n_found = torch.cuda.device_count()
            raise ValueError(
                f"--device {name}: no such GPU here ({n_found} found); --device cpu is slow"
            )
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.backends.cudnn.allow_tf32 = (
            False  # PyTorch's default for convolutions; it keeps 10 bits of 23
        )


def at_least(least: float, number: type = int):
    def parse(text: str) -> int | float:
        value = number(text)
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = number.__name__  # argparse names it where `text` is no number
    return parse


def layer_list(text: str) -> list[int] | None:
    """'all' -> None, '8-11' -> [8, 9, 10, 11], '0,5' -> [0, 5]"""
    if text == "all":
        return None
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"all, 8-11 or 0,5, got {text!r}")
    spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    if any(span[0] > span[-1] for span in spans):
        raise argparse.ArgumentTypeError(f"{text!r} runs backwards")
    return [layer for span in spans for layer in range(span[0], span[-1] + 1)]


def add_hardware(add) -> None:
    """The flags that train.py and score.py have in common."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=gpu, help="cpu, cuda, cuda:1 (a GPU if there is one)")
    add(
        "--workers",
        type=at_least(0),
        help="processes that read WAV files (4 for a GPU, 0 for a CPU)",
    )


def workers_for(args: argparse.Namespace) -> int:
    """4 read faster than a GPU trains."""
    return (
        args.workers
        if args.workers is not None
        else 0
        if args.device == "cpu"
        else min(4, os.cpu_count() or 1)
    )


TUNING = ["lora", "full", "frozen"]
LAYERS = ["q", "k", "v", "proj", "fc1", "fc2"]
TARGETS_HELP = "layers with LoRA, any of q k v proj fc1 fc2 (q v) [ASDKit; paper: v matters most]"
WARMUP_HELP = """steps up to those rates, at most a tenth of the run, so more of them where a run is resumed with more
epochs; a step once taken stays taken (%(default)s) [same lab]"""


def make_parser() -> argparse.ArgumentParser:
    about = """Train on normal sounds.

  python train.py --machine fan                  one machine, into runs/fan
  python train.py --machine all --seed 1         one joint model of all 14 machines

Behind each default stands where it comes from: [paper], [same lab], [ASDKit], [our choice]; see README.md."""
    parser = data.make_parser("train.py", about)
    rate = at_least(1e-12, float)
    # fmt: off
    add = parser.add_argument_group("data and weights").add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all; one joint model")
    add("--data", default="data", metavar="DIR", help="holds <machine>/train/*.wav (%(default)s)")
    add("--weights", default=backbone.WEIGHTS, metavar="FILE", help="the AST's public weights (%(default)s)")
    add = parser.add_argument_group("LoRA").add_argument
    add("--tuning", default="lora", choices=TUNING, help="train adapters, all of the AST, none (%(default)s) [paper]")
    add("--rank", type=at_least(1), default=64, help="r (%(default)s) [paper]")
    add("--alpha", type=at_least(1e-9, float), help="the update is scaled by alpha/rank (= rank, so 1) [our choice]")
    add("--dropout", type=at_least(0, float), default=0.0, help="on the update's input (%(default)s) [ASDKit]")
    add("--targets", nargs="+", default=["q", "v"], choices=LAYERS, metavar="LAYER", help=TARGETS_HELP)
    add("--layers", type=layer_list, default=None, help="blocks that get LoRA: all, 8-11, 0,5 (all) [paper]")
    add = parser.add_argument_group("head").add_argument
    add("--pooling", default="asp", choices=["cls", "asp"], help="class tokens, or patches (%(default)s) [same lab]")
    add("--embedding", type=at_least(1), default=256, help="dimensions (%(default)s) [ASDKit]")
    add = parser.add_argument_group("ArcFace").add_argument
    add("--scale", type=at_least(1e-9, float), default=30.0, help="s (%(default)s) [same lab]")
    add("--margin", type=at_least(0, float), default=0.2, help="m, radians (%(default)s) [same lab]")
    add = parser.add_argument_group("SpecAug").add_argument
    add("--time-mask", type=at_least(0), default=80, help="greatest width, frames; 0 = off (%(default)s) [same lab]")
    add("--freq-mask", type=at_least(0), default=80, help="greatest width, mel bins; 0 = off (%(default)s) [same lab]")
    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", type=rate, default=1e-4, help="of LoRA, head and class centres (%(default)s) [ASDKit]")
    add("--ast-lr", type=rate, default=1e-5, help="of pre-trained weights, under full (%(default)s) [AST's own]")
    add("--warmup", type=at_least(0), default=360, help=WARMUP_HELP)
    add("--weight-decay", type=at_least(0, float), default=0.01, help="AdamW's (%(default)s) [our choice: PyTorch's]")
    add("--epochs", type=at_least(1), default=25, help="times that every clip is seen (%(default)s) [ASDKit]")
    add("--batch-size", type=at_least(1), default=32, help="clips (%(default)s) [same lab]")
    add("--accumulate", type=at_least(1), default=1, help="batches a step (%(default)s) [our choice]")
    add("--seed", type=at_least(0), default=0, help="of everything random (%(default)s) [our choice]")
    add = parser.add_argument_group("run").add_argument
    add("--run", metavar="DIR", help="the run folder (runs/<names joined by +>)")
    add_hardware(add)
    add("--compile", action="store_true", help="torch.compile the model")
    add("--resume", action="store_true", help="continue an interrupted run, or a finished one with more --epochs")
    add("--overwrite", action="store_true", help="replace what the run folder holds")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    args.alpha = float(args.rank) if args.alpha is None else args.alpha
    args.run = str(args.run or data.default_run(args.machine))
    args.workers = workers_for(args)
    again = shlex.join([flag for flag in argv if flag not in ("--overwrite", "--resume")])
    with data.one_line_errors(
        parser, f"python train.py {again} --resume continues after the last whole epoch"
    ):
        if args.margin >= math.pi / 2:
            raise ValueError(f"--margin {args.margin}: radians, below π/2 = 1.57")
        if args.resume and args.overwrite:
            raise ValueError("--resume continues, --overwrite starts again: give one of them")
        check_device(args.device)
        SpecAug(args.time_mask, args.freq_mask)
        data.prepare(data.machine_names(args.machine), args.data, "train")
        backbone.fetch_weights(args.weights)
        train(args)


if __name__ == "__main__":
    main()
