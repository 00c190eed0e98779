"""Train: adapt the AST to the sounds of normal machines.

Every training clip is normal. What is learned is to tell machines and their attributes apart: the
class of a clip is its machine with its attributes. To do so, the embedding must keep the details in
which normal sounds differ. A sound that is like none of them should lie far from all (score.py).
The loss is ArcFace. For a clip of class y, with its embedding e and a centre w_j of each class, all
of unit length,

    cos θ_j = e · w_j
    loss = -log softmax_y(s · [cos θ_1, ..., cos(θ_y + m), ..., cos θ_C])

By default the LoRA matrices, the head and the class centres are trained; the pre-trained weights
of the AST stay as they are. There is no validation set: choosing an epoch would need anomalies.

    python train.py --machine fan            # or several, or dev, eval, all: one joint model

writes runs/fan: args.json, log.csv, last.pt (the state to continue from) and adapter.pt (the
trained weights for score.py, without the class centres). The same command again continues.
"""

import argparse
import math
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import backbone
import data
from backbone import Embedder, load_ast
from lora import add_lora, count_parameters, load_trained_state, trained_state


class ArcFace(nn.Module):
    """Additive angular margin loss (Deng et al. 2019, arXiv 1801.07698, equation 3).

    Each class has one trained centre, of which only the direction counts; the margin is in radians.
    forward: unit-length embeddings (B, dim), labels (B,) -> logits (B, classes) for cross-entropy.
    ValueError: a margin that is negative, or π/2 and more.
    """

    def __init__(self, dim: int, classes: int, scale: float, margin: float):
        super().__init__()
        if not 0 <= margin < math.pi / 2:
            raise ValueError(f"ArcFace's margin is in radians, from 0 to below π/2; got {margin}")
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        cos = F.linear(embedding, F.normalize(self.centres))  # cos θ to each centre, (B, classes)
        cos_y = cos.gather(1, labels[:, None])  # (B, 1)
        # sin θ = √(1 - cos² θ): 1 - cos² loses digits near ±1, the product does not. The clamp
        # keeps the gradient finite: at 0 the slope of √ is infinite.
        sin_y = ((1 - cos_y) * (1 + cos_y)).clamp(min=1e-12).sqrt()
        with_margin = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)  # cos(θ + m)

        # Beyond θ = π - m, cos(θ + m) would rise again and reward the worst clips. There the
        # authors' code (insightface, easy_margin off) has a straight line in cos θ instead.
        line = cos_y - self.margin * math.sin(self.margin)
        with_margin = torch.where(cos_y > -math.cos(self.margin), with_margin, line)
        return self.scale * cos.scatter(1, labels[:, None], with_margin)


def make_model(args: argparse.Namespace) -> Embedder:
    """The pre-trained AST and a new head. What requires a gradient is trained: always the head,
    with --tuning lora also the adapters, with --tuning full also the whole AST.
    """
    ast = load_ast(args.weights).requires_grad_(args.tuning == "full")
    if args.tuning == "lora":
        alpha = args.rank if args.alpha is None else args.alpha
        add_lora(ast, args.targets, args.rank, alpha, args.dropout, args.layers)
    return Embedder(ast, args.pooling, args.embedding)


def make_optimizer(model: Embedder, arcface: ArcFace, args: argparse.Namespace):
    """AdamW. Head and class centres have --lr under every --tuning, for a fair comparison."""
    head = [p for name, p in model.named_parameters() if not name.startswith("ast.")]
    groups = [{"params": [*head, *arcface.parameters()], "lr": args.lr}]
    if in_ast := [p for p in model.ast.parameters() if p.requires_grad]:
        ast_lr = args.ast_lr if args.tuning == "full" else args.lr
        groups.append({"params": in_ast, "lr": ast_lr})
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def train_step(
    model: Embedder, arcface: ArcFace, optimizer, x: Tensor, y: Tensor, micro_batch: int | None
) -> float:
    """One optimizer step on spectrograms x (B, 1024, 128) of the classes y (B,) -> the mean loss.

    Only micro_batch clips are in the network at once (None: all), which takes less memory. That
    changes the result only by rounding and, with --dropout, by its draws.
    ValueError: the loss is not finite; no step is taken then.
    """
    size = micro_batch or len(x)
    mean_loss = torch.zeros((), device=x.device)  # .item() after each part would wait for a GPU
    for x_part, y_part in zip(x.split(size), y.split(size)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            embedding = model(x_part)  # (b, embedding), float32 again
        logits = arcface(embedding, y_part)  # (b, classes)
        # The losses of the parts add up to the mean loss of the batch, and so do their gradients.
        loss = F.cross_entropy(logits, y_part, reduction="sum") / len(y)
        loss.backward()
        mean_loss += loss.detach()

    if not mean_loss.isfinite():
        raise ValueError("the loss is not finite: start a new run with a smaller --lr")
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss.item()


def shuffled_batches(clips: list, labels: list[int], args: argparse.Namespace):
    """Yields every clip once, in random order, a random window of each: x (B, 1024, 128), y (B,).

    Both are drawn here, so that a run does not depend on the number of processes that read.
    """
    windows = data.RandomWindows(clips, labels, u=torch.rand(len(clips)))
    order = torch.randperm(len(clips)).tolist()
    device = torch.device(args.device)
    loader = make_loader(windows, args.workers, device, batch_size=args.batch_size, sampler=order)
    for x, y in tqdm(loader, "batches", leave=False, disable=None):
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def train(args: argparse.Namespace) -> None:
    """From the clips to <run>/adapter.pt.

    ValueError: unusable clips or settings, one class only, another run in the folder, a loss that
    is not finite. FileNotFoundError: no clips.
    """
    # The clips, and the class of each.
    clips = []
    for machine in data.machine_names(args.machine):
        clips += data.list_clips(args.data, machine, "train")
    class_of_clip = [(clip.machine, clip.attributes) for clip in clips]
    classes = sorted(set(class_of_clip))
    print(f"{len(clips):,} clips of {len(classes)} classes")
    if len(classes) < 2:
        raise ValueError("one class: train jointly with other machines, or score.py --pretrained")
    labels = [classes.index(name) for name in class_of_clip]

    # The model, the loss, the optimizer, and the learning rate: a linear warm-up, then constant.
    torch.manual_seed(1_000_000 * args.seed)
    model = make_model(args).to(args.device)  # in training mode, as every new module
    if args.compile:
        model.compile(dynamic=False)  # a graph for each size of batch
    arcface = ArcFace(args.embedding, len(classes), args.scale, args.margin).to(args.device)
    optimizer = make_optimizer(model, arcface, args)
    steps_per_epoch = math.ceil(len(clips) / args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    warmup = max(1, min(args.warmup, n_steps // 10))
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    trainable, total = count_parameters(model)
    print(f"{trainable:,} of the model's {total:,} parameters are trained, in {n_steps:,} steps")

    # A run that was interrupted continues after its last whole epoch. Of the model, which is not
    # among the parts, only the trained weights are saved.
    run = Path(args.run)
    parts = {"arcface": arcface, "optimizer": optimizer, "schedule": schedule}
    log = []  # a row for each finished epoch, so that its length says where to continue
    record = make_record(args, clips, classes)
    saved = load_checkpoint(run, record)  # an error if it is of another run
    if saved is not None:
        load_trained_state(model, saved["model"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log = saved["log"]
        print(f"continuing after epoch {len(log)}")

    # The epochs. Each has a seed of its own, so that a run that continues draws the same numbers.
    augment = data.SpecAug(args.time_mask, args.freq_mask)
    for epoch in range(len(log) + 1, args.epochs + 1):
        torch.manual_seed(1_000_000 * args.seed + epoch)
        sum_of_losses = 0.0
        for x, y in shuffled_batches(clips, labels, args):
            loss = train_step(model, arcface, optimizer, augment(x), y, args.micro_batch)
            sum_of_losses += loss * len(y)
            lr = schedule.get_last_lr()[0]  # the head's in this step, for the log
            schedule.step()

        mean_loss = sum_of_losses / len(clips)
        log.append((epoch, epoch * steps_per_epoch, lr, mean_loss))
        print(f"epoch {epoch}: loss {mean_loss:.4f}")
        states = {name: part.state_dict() for name, part in parts.items()}
        save_epoch(run, record, {"model": trained_state(model), **states, "log": log})

    save(run / "adapter.pt", trained_state(model))
    score = ["python", "score.py", "--machine", *args.machine, "--run", args.run]
    print(f"{run} is trained; next: {shlex.join(score)}")


def make_parser() -> argparse.ArgumentParser:
    """The settings, and in brackets who chose their defaults: README.md says who that is."""
    about = "Train one model for all machines named. (Default) [who chose it: see README]."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument_group("what, where and how").add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--data", default="data", metavar="DIR", help="holds <machine>/train/*.wav (%(default)s)")
    add("--weights", default=backbone.WEIGHTS, metavar="FILE", help="of the AST (%(default)s)")
    add("--run", metavar="DIR", help="the run folder (runs/<names joined by +>)")
    add_hardware(add)
    add("--micro-batch", type=positive, help="clips in the network at once (all of a batch)")
    add("--compile", action="store_true", help="torch.compile the model")

    add = parser.add_argument_group("LoRA").add_argument
    what = "train adapters, all or nothing of the AST; always the head (%(default)s) [abstract]"
    add("--tuning", default="lora", choices=["lora", "full", "frozen"], help=what)
    add("--rank", type=int, default=64, help="r (%(default)s) [reported]")
    add("--alpha", type=float, help="scales the update by alpha/rank (the rank) [our choice]")
    add("--dropout", type=float, default=0.0, help="on LoRA's input (%(default)s) [ASDKit]")
    add("--targets", nargs="+", default=["q", "v"], help="any of q k v proj fc1 fc2 (q v) [ASDKit]")
    add("--layers", nargs="+", type=int, help="blocks, such as 8 9 10 11 (all) [reported]")

    add = parser.add_argument_group("head").add_argument
    what = "attentive statistics or mean of the patches, or class tokens (%(default)s) [same lab]"
    add("--pooling", default="asp", choices=["asp", "mean", "cls"], help=what)
    add("--embedding", type=positive, default=256, help="size (%(default)s) [ASDKit]")

    add = parser.add_argument_group("ArcFace").add_argument
    add("--scale", type=float, default=30.0, help="s (%(default)s) [same lab]")
    add("--margin", type=float, default=0.2, help="m, in radians (%(default)s) [same lab]")

    add = parser.add_argument_group("SpecAug").add_argument
    add("--time-mask", type=int, default=80, help="widest, in frames (%(default)s) [same lab]")
    add("--freq-mask", type=int, default=80, help="widest, in mel bins (%(default)s) [same lab]")

    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", type=float, default=1e-4, help="of head, centres, LoRA (%(default)s) [ASDKit]")
    add("--ast-lr", type=float, default=1e-5, help="of AST, full tuning (%(default)s) [AST's own]")
    add("--warmup", type=int, default=360, help="steps, <= a tenth of all (%(default)s) [same lab]")
    add("--weight-decay", type=float, default=0.01, help="AdamW's (%(default)s) [our choice]")
    add("--epochs", type=positive, default=25, help="passes over all clips (%(default)s) [ASDKit]")
    add("--batch-size", type=positive, default=32, help="clips in a step (%(default)s) [same lab]")
    add("--seed", type=int, default=0, help="of all that is random (%(default)s) [our choice]")
    return parser


# ---------------------------------------------- plumbing: not needed to follow the method

import json
from collections import Counter
from importlib.metadata import version

from torch.utils.data import DataLoader, Dataset


def make_loader(dataset: Dataset, workers: int, device: torch.device, **options):
    """PyTorch's loader. Each process has one batch in waiting (in training 32 x 0.52 MB)."""
    return DataLoader(
        dataset,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # so that it draws nothing from the one of training
        **options,
    )


# The run folder


def make_record(args: argparse.Namespace, clips: list[data.Clip], classes: list[tuple]) -> dict:
    """What args.json holds: how a run was made."""
    on_gpu = args.device != "cpu"
    return {
        "args": vars(args) | {"precision": "bfloat16" if on_gpu else "float32"},
        "classes": ["/".join(names) for names in classes],
        "clips": dict(Counter(clip.machine for clip in clips)),
        "weights_sha256": data.file_digest(args.weights),
        "versions": {name: version(name) for name in ("torch", "torchaudio", "numpy")},
        "hardware": torch.cuda.get_device_name(args.device) if on_gpu else "CPU",
    }


def load_checkpoint(run: Path, record: dict) -> dict | None:
    """What last.pt holds. None: the folder has none. ValueError: it is that of another run."""
    if not (run / "last.pt").exists():
        return None
    was, now = data.setting(json.loads((run / "args.json").read_text())), data.setting(record)
    was["epochs"] = max(was["epochs"], now["epochs"])  # more may be trained
    if changed := [key for key in now if now[key] != was.get(key)]:
        what = [f"{key} was {str(was.get(key))[:60]}, is {str(now[key])[:60]}" for key in changed]
        other = f"{run} holds another run ({'; '.join(what)})"
        raise ValueError(f"{other}: delete the folder, or name another with --run")
    return load(run / "last.pt")


def save_epoch(run: Path, record: dict, state: dict) -> None:
    """args.json, last.pt, log.csv; results of an earlier epoch are removed first."""
    run.mkdir(parents=True, exist_ok=True)
    made = "adapter.pt anomaly_score_* decision_result_* report_* scoring_* metrics.csv *.png"
    for pattern in made.split():
        for path in run.glob(pattern):
            path.unlink()
    with data.whole_file(run / "args.json", "w") as file:
        json.dump(record, file, indent=1)
    save(run / "last.pt", state)
    data.write_csv(run / "log.csv", [("epoch", "step", "lr", "loss"), *state["log"]])


def save(path: Path, state: dict) -> None:
    with data.whole_file(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict:
    """What `save` wrote; nothing is executed. ValueError: damaged, or more than plain tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, and PyTorch's advice is to execute it
        raise ValueError(f"{path} is damaged, or no file of ours: delete it") from error


def load_run(run: str | Path, weights: str | None = None) -> tuple[Embedder, argparse.Namespace]:
    """-> (the trained model on the CPU, the arguments it was trained with).

    weights  where the AST's weights are now, if not where they were in training
    ValueError: no finished run, an AST with another checksum, an adapter that is damaged or of
    another size.
    """
    run = Path(run)
    if not (run / "adapter.pt").exists():
        raise ValueError(f"{run} is no finished run of train.py (or is --pretrained missing?)")
    record = json.loads((run / "args.json").read_text())
    args = argparse.Namespace(**record["args"])
    args.weights = weights or args.weights
    if data.file_digest(args.weights) != record["weights_sha256"]:
        raise ValueError(f"{args.weights} is not the AST that {run} was trained on")
    model = make_model(args)
    load_trained_state(model, load(run / "adapter.pt"))
    return model, args


def positive(text: str) -> int:
    """An argument's type: argparse refuses 0 and less as an "invalid positive value"."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_hardware(add) -> None:
    """The arguments that train.py and score.py have in common."""
    gpu = torch.cuda.is_available()
    add("--device", default="cuda" if gpu else "cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    what = "processes that read WAV files (%(default)s; 4 with a GPU)"
    add("--workers", type=int, default=4 if gpu else 0, metavar="N", help=what)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    args.run = args.run or f"runs/{'+'.join(args.machine)}"
    with data.one_line_errors():
        for machine in data.machine_names(args.machine):
            data.fetch(machine, args.data)
        backbone.fetch_weights(args.weights)
        train(args)


if __name__ == "__main__":
    main()
