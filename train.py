"""Train: adapt the AST to the sounds of normal machines.

Every training clip is normal. What is learned is to tell machines and their operating conditions
apart: the class of a clip is its machine with its attributes. A clip that then lies far from every
training clip of its machine is an anomaly (score.py). For a clip of class y, with the embedding e
and a centre w_j for each class, all of unit length,

    cos θ_j = e · w_j
    loss = -log softmax_y(s · [cos θ_1, ..., cos(θ_y + m), ..., cos θ_C])            ArcFace

Trained are, by default, the LoRA matrices, the pooling, the linear layer and the class centres; the
pre-trained weights of the AST stay as they are.

    python train.py --machine fan            # or several, or dev, eval, all: one joint model

writes runs/fan: args.json, log.csv, last.pt (to continue from), and adapter.pt (what was trained).
The same command again continues a run that was interrupted.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import backbone
import data
from backbone import Embedder, load_ast
from data import RandomWindows, SpecAug, spectrogram
from lora import add_lora, count_parameters, load_trained_state, trained_state

# Flag, default, meaning, and who chose the default. The paper is Zheng et al., arXiv 2409.07016:
# [abstract] its abstract says so; [reported] others report it of the paper; [same lab] the
# DCASE2025 report of its first author; [ASDKit] an independent recipe,
# TakuyaFujimura/dcase-asd-toolkit; [AST's own] as its authors trained it. See README.md.
HYPERPARAMETERS = {
    "LoRA": [
        ("--tuning", "lora", "adapters (lora), all of the AST (full), or none (frozen) [abstract]"),
        ("--rank", 64, "r of the update [reported]"),
        ("--alpha", None, "scales the update by alpha/rank; left out: alpha = rank [our choice]"),
        ("--dropout", 0.0, "on the update's input [ASDKit]"),
        ("--targets", ["q", "v"], "linear layers that get it: q k v proj fc1 fc2 [ASDKit]"),
        ("--layers", "all", "blocks that get it: all, or such as 8-11 or 0,5 [reported]"),
    ],
    "head": [
        ("--pooling", "asp", "attentive statistics or mean of patches, or cls tokens [same lab]"),
        ("--embedding", 256, "dimensions of the embedding [ASDKit]"),
    ],
    "ArcFace": [
        ("--scale", 30.0, "s [same lab]"),
        ("--margin", 0.2, "m, in radians [same lab]"),
    ],
    "SpecAug": [
        ("--time-mask", 80, "greatest width in frames; 0 = off [same lab]"),
        ("--freq-mask", 80, "greatest width in mel bins; 0 = off [same lab]"),
    ],
    "optimizer": [
        ("--lr", 1e-4, "AdamW's rate for LoRA, head and class centres [ASDKit]"),
        ("--ast-lr", 1e-5, "AdamW's rate for the AST's own weights, if --tuning full [AST's own]"),
        ("--warmup", 360, "steps in which the rates rise, at most a tenth of the run [same lab]"),
        ("--weight-decay", 0.01, "AdamW's [our choice]"),
        ("--epochs", 25, "times that every clip is heard [ASDKit]"),
        ("--batch-size", 32, "clips in an optimizer step [same lab]"),
        ("--seed", 0, "of everything random [our choice]"),
    ],
}  # fmt: skip


class ArcFace(nn.Module):
    """Additive angular margin loss (Deng et al. 2019, arXiv 1801.07698, equation 3).

    Each class has one trained centre, of which only the direction counts; the margin is in radians.
    forward: unit-length embeddings (B, dim), labels (B,) -> logits (B, classes) for cross-entropy.
    """

    def __init__(self, dim: int, classes: int, scale: float, margin: float):
        super().__init__()
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        return self.logits(self.cosines(embedding), labels)

    def cosines(self, embedding: Tensor) -> Tensor:
        """cos θ to each class centre, (B, classes). The predicted class has the largest."""
        return F.linear(embedding, F.normalize(self.centres))

    def logits(self, cos: Tensor, labels: Tensor) -> Tensor:
        """Put the margin on the cosine of the true class, and scale: (B, classes)."""
        cos_y = cos.gather(1, labels[:, None])  # (B, 1)
        # sin θ = √(1 - cos² θ), factored to keep digits near ±1, where its slope is infinite. By
        # rounding, cos θ may lie a little outside ±1.
        sin_y = ((1 - cos_y) * (1 + cos_y)).clamp(min=1e-12).sqrt()
        with_margin = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)  # cos(θ + m)

        # Beyond θ = π - m, where cos θ = -cos m, cos(θ + m) would rise again and reward the worst
        # clips. There the authors' code (insightface, easy_margin off) takes a line instead.
        line = cos_y - self.margin * math.sin(self.margin)
        with_margin = torch.where(cos_y > -math.cos(self.margin), with_margin, line)
        return self.scale * cos.scatter(1, labels[:, None], with_margin)


def make_model(args: argparse.Namespace) -> Embedder:
    """The pre-trained AST, then pooling and linear layer.

    What requires a gradient is trained: pooling, linear layer, and what --tuning says of the AST.
    main has made --alpha a number and --layers a list, or None for all.
    """
    ast = load_ast(args.weights).requires_grad_(args.tuning == "full")
    if args.tuning == "lora":
        add_lora(ast, args.targets, args.rank, args.alpha, args.dropout, args.layers)
    return Embedder(ast, args.pooling, args.embedding)


def make_optimizer(model: Embedder, arcface: ArcFace, args: argparse.Namespace):
    """AdamW. Head and class centres have the same rate under every --tuning: a fair comparison."""
    on_top = [*model.pooling.parameters(), *model.linear.parameters(), *arcface.parameters()]
    groups = [{"params": on_top, "lr": args.lr}]
    in_ast = [p for p in model.ast.parameters() if p.requires_grad]
    if in_ast:
        groups.append({"params": in_ast, "lr": args.ast_lr if args.tuning == "full" else args.lr})
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def train_step(
    model: Embedder, arcface: ArcFace, optimizer, x: Tensor, y: Tensor, micro_batch: int
) -> tuple[float, int]:
    """One optimizer step on spectrograms x (B, 1024, 128) of the classes y (B,).

    micro_batch of them go through the network at once. Returns the mean loss, and the number of
    clips whose nearest centre was that of their own class.
    ValueError: the loss is not finite; the weights are then as they were.
    """
    mean_loss, hits = 0.0, 0  # become tensors: only .item(), below, waits for a GPU
    for x_part, y_part in zip(x.split(micro_batch), y.split(micro_batch)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            embedding = model(x_part)  # (b, embedding), float32 again
        cos = arcface.cosines(embedding)  # (b, classes)
        logits = arcface.logits(cos, y_part)
        # The losses of the parts add up to the mean loss of the batch, and so do their gradients.
        loss = F.cross_entropy(logits, y_part, reduction="sum") / len(y)
        loss.backward()
        mean_loss += loss.detach()
        hits += (cos.argmax(dim=1) == y_part).sum()

    if not mean_loss.isfinite():
        raise ValueError(DIVERGED.format("the loss"))
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss.item(), hits.item()


def train(args: argparse.Namespace) -> None:
    """From the clips to runs/<name>/adapter.pt.

    ValueError: unusable clips, one class only, another run in the folder, a loss not finite.
    """
    # The clips, and the class of each.
    clips = []
    for machine in data.machine_names(args.machine):
        clips += data.list_clips(args.data, machine, "train")
    class_of_clip = [(clip.machine, clip.attributes) for clip in clips]
    classes = sorted(set(class_of_clip))
    class_index = {name: i for i, name in enumerate(classes)}
    run = Run(args, clips, classes)
    if run.finished:
        return
    clip_lengths = [recording.n_samples for recording in data.check_clips(clips)]  # at 16 kHz
    device = torch.device(args.device)
    labels = torch.tensor([class_index[name] for name in class_of_clip], device=device)

    # Model, loss and optimizer. If the run continues, they are restored from its last whole epoch.
    torch.manual_seed(seed_of_epoch(args.seed, 0))
    model = make_model(args).to(device)
    arcface = ArcFace(args.embedding, len(classes), args.scale, args.margin).to(device)
    optimizer = make_optimizer(model, arcface, args)
    run.restore(model, arcface, optimizer)
    if args.compile:
        model.compile(dynamic=False)  # a graph for each size of (micro-)batch

    # The learning rates: a linear warm-up, then constant.
    n_steps = args.epochs * math.ceil(len(clips) / args.batch_size)
    warmup = max(1, min(args.warmup, n_steps // 10))
    print(f"{n_steps:,} steps in {args.epochs} epochs, of which {warmup:,} warm up")
    last_step = run.step - 1  # counted from 0; -1 if there was none
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup), last_step)

    # The epochs. Each has its own seed, so a run that was interrupted draws the same random numbers
    # as one that was not.
    windows = RandomWindows(clip_lengths)
    loader = data.Loader(clips, windows, args.batch_size, args.workers, device)
    augment = SpecAug(args.time_mask, args.freq_mask)
    with run.open():
        for epoch in range(run.epoch + 1, args.epochs + 1):
            torch.manual_seed(seed_of_epoch(args.seed, epoch))
            for waves, lengths, index in loader:  # (B, n_samples), (B,), (B,)
                x = augment(spectrogram(waves, lengths))  # (B, 1024, 128)
                y = labels[index]  # (B,)
                loss, hits = train_step(model, arcface, optimizer, x, y, args.micro_batch)
                run.log_step(loss, hits, len(y))
                schedule.step()
            run.save_epoch(epoch)
        run.finish()


# ---------------------------------------------- plumbing: not needed to follow the method

import errno
import fcntl
import json
import os
import platform
import re
import subprocess
from collections import Counter
from contextlib import contextmanager

import numpy as np
import sklearn
import torchaudio

ONE_CLASS = (
    "all {} clips are of one class ({}), so there is nothing to tell apart; train jointly with "
    "other machines (--machine pump fan valve), or skip training: score.py --pretrained"
)
DIVERGED = (
    "{} is not finite; last.pt holds the epochs before; take a smaller --lr, with --overwrite"
)
# What a run folder holds beside args.json. With adapter.pt, a run is finished: it is the first to
# be removed, so that whenever that is cut short, no file is taken for one of the new run.
SCORES = ["anomaly_score_*.csv", "decision_result_*.csv", "report_*.csv", "metrics.csv",
          "scoring_*.json", "*.png"]  # fmt: skip
RESULTS = ["adapter.pt", *SCORES, "embeddings_*.npz", "*.part"]
PROGRESS = ["last.pt", "log.csv"]


def seed_of_epoch(seed: int, epoch: int) -> int:
    """Epoch 0 stands for the first weights."""
    return 1_000_000 * seed + epoch


class Run:
    """The run folder: what was asked for, how far it is, and what was trained."""

    def __init__(self, args: argparse.Namespace, clips: list[data.Clip], classes: list[tuple]):
        """Compare with what the folder holds, and say what will be done.

        ValueError: one class only, or another run in the folder.
        """
        self.args, self.folder, self.n_clips = args, Path(args.run), len(clips)
        self.sums = np.zeros(3)  # of the epoch so far: loss, hits, clips
        if len(classes) < 2:
            raise ValueError(ONE_CLASS.format(len(clips), "/".join(classes[0])))
        self.record = self.describe(clips, classes)
        weights = f"{args.weights}: {self.record['weights']}"
        print(f"{len(clips):,} clips, {len(classes)} classes; {weights}; on {args.device}")

        checkpoint = None if args.overwrite else self.find_checkpoint()
        self.checkpoint = checkpoint or {"epoch": 0, "step": 0, "log": []}
        self.epoch, self.step = self.checkpoint["epoch"], self.checkpoint["step"]
        self.log = self.checkpoint["log"]
        self.finished = self.epoch == args.epochs and (self.folder / "adapter.pt").exists()
        if self.finished:
            print(f"{args.run} is finished already; next: {self.next_command()}")
        elif self.epoch:
            print(f"continuing after epoch {self.epoch}")

    def describe(self, clips: list[data.Clip], classes: list[tuple]) -> dict:
        """What args.json holds: everything that the result depends on."""
        digest = data.file_digest(self.args.weights)
        public = digest == backbone.WEIGHTS_SHA256
        modules = (torch, torchaudio, np, sklearn)
        on_gpu = self.args.device != "cpu"
        args = {name: value for name, value in vars(self.args).items() if name != "overwrite"}
        return {
            "args": args | {"precision": "bfloat16" if on_gpu else "float32"},
            "classes": ["/".join(parts) for parts in classes],
            "clips": dict(Counter(clip.machine for clip in clips)),
            "weights": ("" if public else "not ") + "the public AudioSet AST",
            "weights_sha256": digest,
            "versions": {module.__name__: module.__version__ for module in modules},
            "python": platform.python_version(),
            "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "git_commit": git_commit(),
        }

    def find_checkpoint(self) -> dict | None:
        """What last.pt holds, if the folder's run is this one. ValueError: it is another."""
        folder, epochs = self.folder, self.args.epochs
        old = data.read_json(folder / "args.json")
        if not old:
            if any(any(folder.glob(pattern)) for pattern in RESULTS + PROGRESS):
                what = f"{folder} holds results of no known run"
                raise ValueError(f"{what}; --overwrite removes them, --run names another folder")
            return None
        kept = ("classes", "clips", "weights_sha256")
        before, now = ({**r["args"], **{k: r.get(k) for k in kept}} for r in (old, self.record))
        changes = []
        for key in sorted(now.keys() | before.keys()):
            if now.get(key) != before.get(key) and key not in {*data.PLACES, "epochs"}:
                was, value = str(before.get(key))[:60], str(now.get(key))[:60]
                changes.append(f"{key} was {was}, is {value}")
        if changes:
            other = f"{folder} holds another run: {'; '.join(changes)}"
            raise ValueError(f"{other}; --overwrite starts again, --run names another folder")
        if not (folder / "last.pt").exists():
            if (folder / "adapter.pt").exists():
                what = f"{folder} is finished, but has no last.pt to continue from"
                raise ValueError(f"{what}; --overwrite starts again")
            return None
        checkpoint = backbone.load_file(folder / "last.pt")
        if checkpoint["epoch"] > epochs:
            has = f"{folder} has {checkpoint['epoch']} epochs already, --epochs asks for {epochs}"
            raise ValueError(f"{has}; --overwrite starts again, --run names another folder")
        return checkpoint

    def restore(self, model: Embedder, arcface: ArcFace, optimizer) -> None:
        """If the run continues, make them what they were after its last whole epoch."""
        self.model, self.arcface, self.optimizer = model, arcface, optimizer
        trainable, total = count_parameters(model)
        trainable += arcface.centres.numel()
        print(f"{trainable:,} trainable parameters, {total:,} in the model")
        if self.epoch:
            load_trained_state(model, self.checkpoint["model"])
            arcface.load_state_dict(self.checkpoint["arcface"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
        del self.checkpoint

    @contextmanager
    def open(self):
        """Take the folder, remove what a run before has left, and show a bar over all epochs.

        ValueError: another train.py is at work in the folder.
        """
        data.make_run_folder(self.folder)
        with locked(self.folder / ".lock"):
            for pattern in RESULTS if self.epoch else RESULTS + PROGRESS:
                for path in self.folder.glob(pattern):
                    path.unlink()
            record = json.dumps(self.record, indent=1)
            data.write_file(self.folder / "args.json", record.encode())
            total, done = self.args.epochs * self.n_clips, self.epoch * self.n_clips
            with tqdm(total=total, initial=done, unit="clip", disable=None) as self.bar:
                yield

    def log_step(self, loss: float, hits: int, n: int) -> None:
        """Count an optimizer step on n clips, before the learning rate changes."""
        self.step += 1
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.sums += (n * loss, hits, n)
        self.loss, self.accuracy = (self.sums[:2] / self.sums[2]).tolist()
        self.bar.set_postfix(loss=self.loss, accuracy=self.accuracy, refresh=False)
        self.bar.update(n)

    def save_epoch(self, epoch: int) -> None:
        """ValueError: a weight is not finite; then nothing is written."""
        for group in self.optimizer.param_groups:
            if not all(p.isfinite().all() for p in group["params"]):
                raise ValueError(DIVERGED.format("a weight"))
        self.sums[:] = 0
        row = {"epoch": epoch, "step": self.step, "lr": self.lr}
        self.log.append(row | {"loss": self.loss, "accuracy": self.accuracy})
        state = {"epoch": epoch, "step": self.step, "log": self.log}
        state |= {"model": trained_state(self.model), "arcface": self.arcface.state_dict()}
        save(self.folder / "last.pt", state | {"optimizer": self.optimizer.state_dict()})
        self.write_log()
        means = f"loss {self.loss:.4f}, accuracy {self.accuracy:.3f}"
        tqdm.write(f"epoch {epoch}: step {self.step:,}, {means}")

    def write_log(self) -> None:
        rows = [list(self.log[0]), *(row.values() for row in self.log)]
        data.write_csv(self.folder / "log.csv", rows)

    def finish(self) -> None:
        self.write_log()  # again: a kill may have left it an epoch behind last.pt
        save(self.folder / "adapter.pt", trained_state(self.model))
        if self.args.device != "cpu":
            print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        size = (self.folder / "adapter.pt").stat().st_size / 1e6
        print(f"wrote {self.folder}: adapter.pt ({size:.1f} MB), last.pt, log.csv, args.json")
        print(f"next: {self.next_command()}")

    def next_command(self) -> str:
        return data.next_command("score.py", self.args.machine, self.args.run)


@contextmanager
def locked(path: Path):
    """However this process ends, the lock ends with it. ValueError: another process holds it."""
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            wait = f"another train.py is at work in {path.parent}; wait for it"
            raise ValueError(f"{wait}, or name another folder with --run") from error
        except OSError as error:
            why = f"cannot be locked ({error.strerror})"
            print(f"note: {path.parent} {why}; let no other run use it")
        yield


def git_commit() -> str:
    """'' where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def save(path: Path, state: dict) -> None:
    """Straight into the file, with no second copy in memory."""
    with data.whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what PyTorch's writer makes of a disk that is full
            raise OSError(errno.ENOSPC, "is the disk full?") from error


def load_run(run: str | Path, weights: str | None = None) -> tuple[Embedder, argparse.Namespace]:
    """-> (the trained model on the CPU, the arguments it was trained with).

    weights  where the AST's weights are now, if not where they were in training

    ValueError: not a run, not finished, an AST with another checksum, an adapter of another size.
    """
    run = Path(run)
    record = data.read_json(run / "args.json")
    if not record:
        pretrained = run.with_name(f"pretrained-{run.name}")
        there = f"; {pretrained} is there: add --pretrained" if pretrained.is_dir() else ""
        if any(run.glob("scoring_*.json")):
            there = " but scores of the untouched AST: add --pretrained"
        what = f"{run} is not a run of train.py"
        raise ValueError(f"{what}{there or '; train one, or name its folder with --run'}")
    if not (run / "adapter.pt").exists():
        raise ValueError(f"{run} is not finished; the same train.py command again continues it")
    args = argparse.Namespace(**record["args"])
    args.weights = str(weights or args.weights)
    if not Path(args.weights).exists():
        missing = f"{args.weights}, the AST that {run} was trained on, is missing"
        raise ValueError(f"{missing}; --weights tells where it is")
    digest, trained_on = data.file_digest(args.weights), record["weights_sha256"]
    if digest != trained_on:
        here = f"{args.weights} is {digest[:12]}"
        raise ValueError(f"{run} was trained on weights {trained_on[:12]}, {here}")
    model, state = make_model(args), backbone.load_file(run / "adapter.pt")
    try:
        load_trained_state(model, state)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{run / 'adapter.pt'} does not fit args.json: {error}") from error
    return model, args


# The command line


def check_device(name: str) -> None:
    """Make a GPU the current one, in full float32; else pinned memory would use the first one's.

    ValueError: not cpu, cuda or cuda:N, or a GPU that is not there.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: cpu, cuda or cuda:N")
    if name != "cpu":
        found = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= found:
            none = f"--device {name}: no such GPU here ({found} found)"
            raise ValueError(f"{none}; --device cpu is slow")
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.backends.cudnn.allow_tf32 = False  # the default for convolutions keeps 10 bits of 23


def at_least(least: float, number: type = int):
    """For argparse: a finite number, not below `least`."""

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
    layers = []
    for part in text.split(","):
        first, last = int(part.split("-")[0]), int(part.split("-")[-1])
        if first > last:
            raise argparse.ArgumentTypeError(f"{text!r} runs backwards")
        layers += range(first, last + 1)
    return layers


def add_hardware(add) -> None:
    """The flags that train.py and score.py have in common."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=gpu, help="cpu, cuda, cuda:1 (a GPU if there is one)")
    about = "processes that read WAV files (2 for a GPU, 0 for a CPU; more for 44.1 kHz stereo)"
    add("--workers", type=at_least(0), help=about)


def workers_for(args: argparse.Namespace) -> int:
    if args.workers is not None:
        return args.workers
    return 0 if args.device == "cpu" else min(2, os.cpu_count() or 1)


CHOICES = {"--tuning": ["lora", "full", "frozen"], "--pooling": ["asp", "mean", "cls"],
           "--targets": ["q", "k", "v", "proj", "fc1", "fc2"]}  # fmt: skip
MAY_BE_ZERO = {"--dropout", "--margin", "--time-mask", "--freq-mask", "--warmup",
               "--weight-decay", "--seed"}  # fmt: skip


def add_hyperparameter(add, flag: str, default, meaning: str) -> None:
    """A flag of the table at the top of this file."""
    shown = " ".join(default) if isinstance(default, list) else default
    options = {"default": default, "help": meaning if shown is None else f"{meaning} ({shown})"}
    if flag in CHOICES:
        options |= {"choices": CHOICES[flag]}
        if isinstance(default, list):
            options |= {"nargs": "+", "metavar": "LAYER"}
    elif flag == "--layers":
        options |= {"default": layer_list(default), "type": layer_list}
    elif isinstance(default, int):
        options |= {"type": at_least(0 if flag in MAY_BE_ZERO else 1)}
    else:
        options |= {"type": at_least(0 if flag in MAY_BE_ZERO else 1e-12, float)}
    add(flag, **options)


def make_parser() -> data.Parser:
    about = """Train on normal sounds.

  python train.py --machine fan                  one machine, into runs/fan
  python train.py --machine all --seed 1         one joint model of all 14 machines

The same command again continues. In brackets: who chose the default, see README.md."""
    parser = data.Parser("train.py", about)
    add = parser.add_argument_group("data and weights").add_argument
    add("--machine", nargs="+", required=True, metavar="NAME",
        help="names, or dev, eval, all; one joint model")  # fmt: skip
    add("--data", default="data", metavar="DIR", help="holds <machine>/train/*.wav (%(default)s)")
    add("--weights", default=backbone.WEIGHTS, metavar="FILE",
        help="the AST's public weights (%(default)s)")  # fmt: skip
    for group, flags in HYPERPARAMETERS.items():
        add = parser.add_argument_group(group).add_argument
        for flag, default, meaning in flags:
            add_hyperparameter(add, flag, default, meaning)
    add = parser.add_argument_group("run").add_argument
    add("--run", metavar="DIR", help="the run folder (runs/<names joined by +>)")
    add_hardware(add)
    about = "clips that go through the network at once (the whole batch): less memory, same result"
    add("--micro-batch", type=at_least(1), metavar="N", help=about)
    add("--compile", action="store_true", help="torch.compile the model")
    add("--overwrite", action="store_true", help="start again, whatever the run folder holds")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.alpha = float(args.rank) if args.alpha is None else args.alpha
    args.run = str(args.run or data.default_run(args.machine))
    args.workers = workers_for(args)
    args.micro_batch = args.micro_batch or args.batch_size
    with data.one_line_errors(parser, "continues after the last epoch"):
        if args.margin >= math.pi / 2:
            raise ValueError(f"--margin {args.margin}: radians, below π/2 = 1.57")
        check_device(args.device)
        SpecAug(args.time_mask, args.freq_mask)
        data.prepare(data.machine_names(args.machine), args.data, ["train"])
        backbone.fetch_weights(args.weights)
        train(args)


if __name__ == "__main__":
    main()
