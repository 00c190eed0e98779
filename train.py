"""Train: adapt AST to the sounds of normal machines.

Every training clip is normal. What the model learns is to tell machines and their attributes apart:
the class of a clip is its machine together with its attributes. To do that, the embedding must keep
the details in which normal sounds differ. A sound that fits none of them then ends up far from all
normal clips. score.py measures how far.

The loss is ArcFace. For a clip of class y with embedding e, and a centre w_j for each class, all of
unit length,

    cos θ_j = e · w_j
    loss = -log softmax_y(s · [cos θ_1, ..., cos(θ_y + m), ..., cos θ_C])

By default the LoRA matrices, the head and the class centres are trained; the pre-trained weights of
AST stay as they are. There is no validation set: choosing an epoch would need anomalies.

    python train.py --machine fan            # several machines, or dev/eval/all, train one model

writes into runs/fan: log.csv, last.pt (everything needed to continue) and, at the end, adapter.pt
(the trained weights for score.py, without the class centres). The same command again continues.
"""

import argparse
import hashlib
import math
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbone
import data
from backbone import Embedder, load_ast
from data import InputError
from lora import add_lora, count_parameters, load_trained_state, trained_state


class ArcFace(nn.Module):
    """Additive angular margin loss (Deng et al. 2019, arXiv 1801.07698, equation 3).

    Each class has one trained centre; only its direction matters. The margin is in radians.
    forward: unit-length embeddings (B, dim), labels (B,) -> logits (B, classes) for cross-entropy.
    """

    def __init__(self, dim: int, classes: int, scale: float, margin: float):
        super().__init__()
        if not 0 <= margin < math.pi / 2:
            raise InputError(f"ArcFace margin must be in [0, π/2) radians, got {margin}")
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        cos = F.linear(embedding, F.normalize(self.centres))  # cos θ to each centre, (B, classes)
        cos_y = cos.gather(1, labels[:, None])  # (B, 1)
        # sin θ = √(1 - cos² θ), as a product, which is exact near ±1. The clamp keeps the gradient
        # finite: at 0 the slope of √ is infinite.
        sin_y = ((1 - cos_y) * (1 + cos_y)).clamp(min=1e-12).sqrt()
        with_margin = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)  # cos(θ + m)

        # Beyond θ = π - m, cos(θ + m) would rise again and reward the worst clips. There the
        # authors' code (insightface, easy_margin off) uses a straight line in cos θ instead.
        line = cos_y - self.margin * math.sin(self.margin)
        too_far = cos_y <= -math.cos(self.margin)  # θ + m >= π
        with_margin = torch.where(too_far, line, with_margin)
        return self.scale * cos.scatter(1, labels[:, None], with_margin)


def make_model(args: argparse.Namespace) -> Embedder:
    """The pre-trained AST and a new head. The parameters that require a gradient are trained: the
    head always, the adapters with --tuning lora, and all of AST with --tuning full.
    """
    ast = load_ast(args.weights).requires_grad_(args.tuning == "full")
    if args.tuning == "lora":
        try:
            add_lora(ast, args.targets, args.rank, args.alpha, args.dropout, args.layers)
        except ValueError as error:
            raise InputError(str(error)) from error
    return Embedder(ast, args.pooling, args.embedding)


def make_optimizer(model: Embedder, arcface: ArcFace, args: argparse.Namespace):
    """AdamW. The head and the class centres always use --lr, whatever --tuning is."""
    head = [*model.pool.parameters(), *model.linear.parameters(), *arcface.parameters()]
    in_ast = [p for p in model.ast.parameters() if p.requires_grad]
    ast_lr = args.ast_lr if args.tuning == "full" else args.lr
    groups = [{"params": head, "lr": args.lr}, {"params": in_ast, "lr": ast_lr}]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def train_step(
    model: Embedder, arcface: ArcFace, optimizer, x: Tensor, y: Tensor, micro_batch: int | None
) -> float:
    """One optimizer step on spectrograms x (B, 1024, 128) of classes y (B,) -> the mean loss.

    Only micro_batch clips (None: all) go through the network at once, which takes less memory.
    Results are the same up to rounding (and dropout's draws). Raises InputError, without taking the
    step, if the loss is not finite.
    """
    size = micro_batch or len(x)
    total = torch.zeros((), device=x.device)
    for x_part, y_part in zip(x.split(size), y.split(size)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            embedding = model(x_part)  # (b, embedding), float32 again
        logits = arcface(embedding, y_part)  # (b, classes)
        # len(y) is the whole batch: the parts add up to its mean loss, and so do their gradients.
        loss = F.cross_entropy(logits, y_part, reduction="sum") / len(y)
        loss.backward()
        total += loss.detach()

    mean_loss = total.item()
    if not math.isfinite(mean_loss):
        raise InputError("the loss is not finite: start a new run with a smaller --lr")
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss


def train(args: argparse.Namespace) -> None:
    """Train one model on the clips of all machines in args.machine, and save it in args.run.

    Raises InputError for clips or settings that are invalid or inconsistent.
    """
    # Clips and classes.
    clips = []
    for machine in args.machine:
        clips += data.list_clips(args.data, machine, "train")
    class_of_clip = [(clip.machine, clip.attributes) for clip in clips]
    classes = sorted(set(class_of_clip))
    labels = [classes.index(class_) for class_ in class_of_clip]
    print(f"clips: {len(clips):,}, classes: {len(classes)}")
    if len(classes) < 2:
        reason = "name the states (README), add machines, or use score.py --pretrained"
        raise InputError(f"nothing to learn, since all clips are one class: {reason}")

    # Model, loss and optimizer.
    torch.manual_seed(1_000_000 * args.seed)  # and from there on one seed for each epoch
    model = make_model(args).to(args.device).train()
    if args.compile:
        model.compile(dynamic=False)  # one graph for each batch size: the last batch is smaller
    arcface = ArcFace(args.embedding, len(classes), args.scale, args.margin).to(args.device)
    optimizer = make_optimizer(model, arcface, args)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]  # the warm-up changes the groups'
    augment = data.SpecAug(args.time_mask, args.freq_mask)
    trainable, total = count_parameters(model)
    print(f"parameters: {total:,}, of which {trainable:,} are trained")

    # Data.
    loader = DataLoader(
        data.TrainingWindows(clips, labels),
        args.batch_size,
        sampler=data.RandomOrder(len(clips)),  # draws which clip, and which window of it
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        timeout=backbone.WORKER_TIMEOUT if args.workers else 0,
        pin_memory=args.device.type == "cuda",
        generator=torch.Generator(),  # so the loader itself draws nothing from the global one
    )
    warmup_steps = args.warmup * len(loader)

    # Continuing after the last whole epoch, if this run has one with the same setting: what the
    # result depends on. restore() loads all three, and returns a row of the log for each epoch.
    setting = make_setting(args, clips, classes)
    log = restore(args.run / "last.pt", setting, model, arcface, optimizer)

    # The epochs. Each has its own seed, so a run that continues draws the same numbers.
    for epoch in range(len(log) + 1, args.epochs + 1):
        torch.manual_seed(1_000_000 * args.seed + epoch)
        step = (epoch - 1) * len(loader)
        total_loss = 0.0
        for x, y in tqdm(loader, f"epoch {epoch}", leave=False, disable=None):
            step += 1
            warmup = min(1.0, step / max(1, warmup_steps))  # linear, then constant
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs):
                group["lr"] = warmup * peak_lr
            x = augment(x.to(args.device, non_blocking=True))
            y = y.to(args.device, non_blocking=True)
            loss = train_step(model, arcface, optimizer, x, y, args.micro_batch)
            total_loss += loss * len(y)

        weights = trained_state(model)
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise InputError("the weights are not finite: start a new run with a smaller --lr")
        mean_loss = total_loss / len(clips)
        print(f"epoch {epoch}: loss {mean_loss:.4f}")
        log.append((epoch, step, optimizer.param_groups[0]["lr"], mean_loss))
        data.write_csv(args.run / "log.csv", [("epoch", "step", "lr", "loss"), *log])
        checkpoint = {
            "setting": setting,
            "model": weights,
            "arcface": arcface.state_dict(),
            "optimizer": optimizer.state_dict(),
            "log": log,
        }
        data.save(args.run / "last.pt", checkpoint)

    # Saving.
    paths = {"data": str(args.data), "weights": str(args.weights)}
    adapter = {"setting": setting, "weights": trained_state(model), "paths": paths}
    data.save(args.run / "adapter.pt", adapter)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings: the paper's recipe, as far as it is known (README). Fills in every default."""
    about = "Train one model on the normal sounds of all machines that are named."
    parser = argparse.ArgumentParser(description=f"{about} Defaults are in brackets.")
    data.add_machine(parser)
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", help="run folder (runs/<machines joined by +>)")
    add("--data", default="data", metavar="DIR", help="has <machine>/train/*.wav (%(default)s)")
    add("--weights", default=backbone.WEIGHTS, metavar="FILE", help="pre-trained AST (%(default)s)")
    backbone.add_hardware(parser)
    text = "clips per forward pass; lower it to save GPU memory (default: the whole batch)"
    add("--micro-batch", type=data.positive, metavar="N", help=text)
    add("--compile", action="store_true", help="compile the model: faster after a slow start")

    add = parser.add_argument_group("what is trained").add_argument
    text = "what is trained besides the head: LoRA, all of AST, or nothing (%(default)s)"
    add("--tuning", default="lora", choices=["lora", "full", "frozen"], help=text)
    add("--rank", type=data.positive, default=64, help="LoRA's rank (%(default)s)")
    add(
        "--alpha",
        type=data.above_zero,
        help="LoRA's update is scaled by alpha/rank (default: the rank)",
    )
    add("--dropout", type=float, default=0.0, help="dropout on LoRA's input (%(default)s)")
    text = "layers with adapters, any of q k v proj fc1 fc2 (q v)"
    add("--targets", nargs="+", default=["q", "v"], metavar="NAME", help=text)
    add(
        "--layers", nargs="+", type=int, metavar="I", help="blocks with adapters, e.g. 8 9 10 (all)"
    )
    text = "attentive statistics or mean of the patches, or the class tokens (%(default)s)"
    add("--pooling", default="asp", choices=list(backbone.POOLINGS), help=text)
    add("--embedding", type=data.positive, default=256, help="its dimension (%(default)s)")

    add = parser.add_argument_group("ArcFace and SpecAug").add_argument
    text = "s, which sharpens the softmax (%(default)s)"
    add("--scale", type=data.above_zero, default=30.0, help=text)
    add("--margin", type=float, default=0.2, help="m, the angular margin in radians (%(default)s)")
    text = "maximum width of the time mask, in frames of 10 ms (%(default)s)"
    add("--time-mask", type=data.at_least(0), default=80, help=text)
    text = "maximum width of the frequency mask, in mel bins of 128 (%(default)s)"
    add("--freq-mask", type=data.at_least(0), default=80, help=text)

    add = parser.add_argument_group("optimizer").add_argument
    text = "rate of head, centres and LoRA (%(default)s)"
    add("--lr", type=data.above_zero, default=1e-4, help=text)
    text = "rate of AST with --tuning full (%(default)s)"
    add("--ast-lr", type=data.above_zero, default=1e-5, help=text)
    add("--warmup", type=data.at_least(0), default=1, help="warm-up epochs (%(default)s)")
    add("--weight-decay", type=data.at_least(0.0), default=0.01, help="of AdamW (%(default)s)")
    add("--epochs", type=data.positive, default=25, help="passes over all clips (%(default)s)")
    add("--batch-size", type=data.positive, default=32, help="clips per step (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")

    args = parser.parse_args(argv)
    args.run = args.run or data.default_run(args.machine)
    args.machine = sorted(data.machine_names(args.machine))
    args.alpha = float(args.rank) if args.alpha is None else args.alpha
    return args


# ---------------------------------------------- plumbing: not needed to follow the method

# A setting has every argument but these. Clips are compared by name, and weights by checksum. The
# others change a result by rounding and random draws only; the kind of device is in "precision".
WHERE = ("run", "data", "weights", "device", "workers", "compile", "micro_batch")


def make_setting(args: argparse.Namespace, clips: list[data.Clip], classes: list) -> dict:
    """What a run's result depends on: arguments, names of the clips, AST's weights, precision."""
    setting = {name: value for name, value in vars(args).items() if name not in WHERE}
    setting["targets"] = sorted(args.targets)
    setting["layers"] = sorted(args.layers) if args.layers else None
    setting["classes"] = ["/".join(names) for names in classes]
    setting["clips"] = []
    for machine in args.machine:
        names = [clip.path.name for clip in clips if clip.machine == machine]
        digest = hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:8]
        setting["clips"].append(f"{machine}: {len(names)} clips, digest of their names {digest}")
    setting["weights_sha256"] = data.file_digest(args.weights)
    setting["precision"] = "bfloat16" if args.device.type == "cuda" else "float32"
    return setting


def restore(path: Path, setting: dict, model: Embedder, arcface: ArcFace, optimizer) -> list:
    """Load last.pt into model, loss and optimizer, and return its log; [] if there is no such file.

    Raises InputError if it was trained with another setting. Only the number of epochs may differ.
    """
    if not path.exists():
        return []
    saved = data.load(path, "setting", "model", "arcface", "optimizer", "log")
    was = saved["setting"] | {"epochs": setting["epochs"]}
    epochs_done = len(saved["log"])
    changed = []
    for name in was | setting:
        if was.get(name) != setting.get(name):
            text = f"{name} was {was.get(name)}, is {setting.get(name)}"
            changed.append(text if len(text) < 200 else f"other {name}")
    if changed:
        advice = "delete the folder, or name another one with --run"
        other = "; ".join(changed)
        raise InputError(f"{path.parent} was trained with other settings: {other}; {advice}")
    if epochs_done > setting["epochs"]:
        raise InputError(f"{path.parent} has been trained for {epochs_done} epochs already")
    load_trained_state(model, saved["model"])
    arcface.load_state_dict(saved["arcface"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"continuing after epoch {epochs_done}")
    return saved["log"]


class TrainedRun(NamedTuple):
    model: Embedder  # on the CPU
    setting: dict
    digest: str  # SHA-256 of adapter.pt
    data: str  # the folder of the clips it was trained on


def load_run(run: str | Path, weights: str | None = None) -> TrainedRun:
    """Load a trained model: while a run trains for more epochs, the one of fewer epochs.

    weights: the path of AST's weights, if they have moved. Raises InputError if no training has
    finished, or if the weights are not those of its training.
    """
    adapter = Path(run) / "adapter.pt"
    if not adapter.exists():
        raise InputError(f"{run} has no trained model: train first, or use --pretrained")
    digest = data.file_digest(adapter)
    saved = data.load(adapter, "setting", "weights", "paths")
    weights = weights or saved["paths"]["weights"]
    if data.file_digest(weights) != saved["setting"]["weights_sha256"]:
        raise InputError(f"{weights} is not the AST that {run} was trained on")
    model = make_model(argparse.Namespace(**saved["setting"], weights=weights))
    load_trained_state(model, saved["weights"])
    return TrainedRun(model, saved["setting"], digest, saved["paths"]["data"])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with data.one_line_errors():
        print(f"device: {args.device}")
        data.fetch_missing(args.machine, args.data)
        backbone.fetch_weights(args.weights)
        with data.sole_use(args.run):
            train(args)
        score = ["python", "score.py", "--machine", *args.machine, "--run", str(args.run)]
        print(f"{args.run} is trained; next: {shlex.join(score)}")


if __name__ == "__main__":
    main()
