"""Train: adapt the AST to the sounds of normal machines.

Every training clip is normal. What is learned is to tell machines and their operating conditions apart:
the class of a clip is its machine + attributes. A clip that then lies far from every training clip of its
machine is an anomaly (score.py). For a clip x of class y, with unit-length embedding e and class centre w:

    cos θ_j = e · w_j
    loss = -log softmax_y(s · [cos θ_1, ..., cos(θ_y + m), ..., cos θ_C])       ArcFace
                                                     s = scale, m = margin, C classes

Trained are the LoRA matrices, the pooling, the linear layer and the class centres; the AST stays frozen.

    python train.py --machine fan            # or several machines, dev, eval, all; -h lists the parameters
    python train.py --machine fan --demo     # made-up sounds and a tiny AST, no download, no GPU

writes the run folder runs/fan: args.json, log.csv, last.pt (for --resume), adapter.pt (what was trained).
"""

import argparse
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import sklearn
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from tqdm import tqdm

from backbone import AST, WEIGHTS, WEIGHTS_SHA256, Embedder, fetch_weights, load_ast, load_file
from data import (
    HOP,
    N_FRAMES,
    SpecAug,
    Windows,
    check_clips,
    collate,
    count_frames,
    default_run,
    file_digest,
    list_clips,
    machine_names,
    make_demo,
    make_run_folder,
    next_command,
    prepare,
    read_json,
    spectrogram,
    write_csv,
    write_file,
)
from lora import add_lora, count_parameters, load_lora_state_dict, lora_state_dict


class ArcFace(nn.Module):
    """Additive angular margin (Deng et al. 2019, arXiv 1801.07698, equation 3).

    dim      dimensions of the embedding
    classes  number of classes, one centre each
    scale    s, the logits' range is [-s, s];  margin  m in radians, 0 <= m < π/2

    forward: unit-length embeddings (B, dim), labels (B,) -> logits (B, classes), for cross-entropy.
    """

    def __init__(self, dim: int, classes: int, scale: float, margin: float):
        super().__init__()
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        cos = F.linear(embedding, F.normalize(self.centres)).clamp(-1, 1)  # (B, classes)
        cos_y = cos.gather(1, labels[:, None])  # (B, 1), the true class
        # sin θ = √(1 - cos² θ), factored to keep digits near ±1; at ±1 itself its slope is infinite: held at 1e-12
        sin_y = ((1 - cos_y) * (1 + cos_y)).clamp(min=1e-12).sqrt()
        with_margin = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)  # cos(θ + m)
        # Beyond θ = π - m, cos(θ + m) would rise again and reward the worst clips; the authors' code
        # (insightface, easy_margin off) goes on falling there, in a straight line.
        with_margin = torch.where(
            cos_y > -math.cos(self.margin), with_margin, cos_y - self.margin * math.sin(self.margin)
        )
        return self.scale * cos.scatter(1, labels[:, None], with_margin)

    @torch.no_grad()
    def classify(self, embedding: Tensor) -> Tensor:
        """The nearest class centre, without margin: (B, dim) -> labels (B,)."""
        return F.linear(embedding, F.normalize(self.centres)).argmax(dim=1)


# ---------------------------------------------------------------- the model


def make_model(args: argparse.Namespace) -> Embedder:
    """The pre-trained AST with what --tuning makes trainable."""
    ast = load_ast(args.weights).requires_grad_(args.tuning == "full")
    if args.tuning == "lora":
        add_lora(ast, args.targets, args.rank, args.alpha, args.dropout, args.layers)
    return Embedder(ast, args.pooling, args.embedding)


def trained_state(model: Embedder) -> dict[str, dict[str, Tensor]]:
    """All that differs from the public weights: the head, the adapters, the AST itself where it was trained."""
    state = {"head": model.head.state_dict(), "lora": lora_state_dict(model.ast)}
    return state | ({"ast": model.ast.state_dict()} if model.ast.pos_embed.requires_grad else {})


def load_trained_state(model: Embedder, state: dict[str, dict[str, Tensor]]) -> None:
    """The reverse, into a model that make_model built with the same arguments. ValueError: other arguments."""
    if state.keys() != trained_state(model).keys():
        raise ValueError("a checkpoint of another --tuning")
    load_lora_state_dict(model.ast, state["lora"])
    try:
        model.head.load_state_dict(state["head"])
        if "ast" in state:
            model.ast.load_state_dict(state["ast"])
    except RuntimeError as error:  # torch's own message: a line for each name or size
        raise ValueError(f"a checkpoint of another --pooling or size: {' '.join(str(error).split())}") from error


def load_run(run: str | Path, weights: str | Path | None = None) -> tuple[Embedder, argparse.Namespace]:
    """-> (the trained model on the CPU, the arguments it was trained with).

    weights  where the AST's weights are now, if not where they were in training

    ValueError: not a run, not finished, an AST with another checksum, an adapter of another size.
    """
    run = Path(run)
    record = read_json(run / "args.json")
    if not record:
        raise ValueError(f"{run} is not a run of train.py; train one, or name its folder with --run")
    if not (run / "adapter.pt").exists():
        raise ValueError(f"{run} is not finished; repeat its train.py command with --resume")
    args = argparse.Namespace(**record["args"])
    args.weights = str(weights or args.weights)
    if not Path(args.weights).exists():
        raise ValueError(f"{args.weights}, the AST that {run} was trained on, is missing; --weights tells where it is")
    digest = file_digest(args.weights)
    if digest != record["weights_sha256"]:
        raise ValueError(
            f"{run} was trained on weights {record['weights_sha256'][:12]}, {args.weights} is {digest[:12]}"
        )
    model = make_model(args)
    try:
        load_trained_state(model, load_file(run / "adapter.pt"))
    except ValueError as error:
        raise ValueError(f"{run / 'adapter.pt'} does not fit args.json: {error}") from error
    return model, args


# ---------------------------------------------------------------- the run folder

# What a run folder holds beside args.json, in the order in which --overwrite removes it, before it replaces args.json:
# whenever that is cut short, no file is taken for one of the new run. With adapter.pt, a run is finished.
RESULTS = ["adapter.pt", "last.pt", "log.csv", "metrics.csv", "scoring_*.json", "embeddings_*.npz"]
RESULTS += ["anomaly_score_*.csv", "decision_result_*.csv", "nearest_*.csv"]
MAY_DIFFER = {"run", "data", "weights", "workers"}  # between a run and its --resume: places, and who reads the files


def describe(args: argparse.Namespace, clips: list, classes: list) -> dict:
    """What args.json holds: everything that the result depends on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""  # no git here
    gpu = torch.cuda.get_device_name(args.device) if args.device != "cpu" else ""
    return {
        "args": {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")},
        "classes": ["/".join(parts) for parts in classes],
        "clips": dict(Counter(clip.machine for clip in clips)),
        "weights_sha256": file_digest(args.weights),
        "versions": {module.__name__: module.__version__ for module in (torch, torchaudio, numpy, sklearn)},
        "python": platform.python_version(),
        "hardware": gpu or platform.processor() or platform.machine(),
        "git_commit": commit,
    }


def check_run(run: Path, record: dict, resume: bool, overwrite: bool) -> None:
    """ValueError: the folder holds results and neither flag is given, or the run to be resumed was another one."""
    old = read_json(run / "args.json")
    if overwrite:
        return
    if not resume and (run / "adapter.pt").exists():
        raise ValueError(f"{run} holds a finished run; --overwrite replaces it, --run names another folder")
    if not resume and old:
        raise ValueError(f"{run} holds an unfinished run; --resume goes on with it, --overwrite starts again")
    if not old and any(any(run.glob(pattern)) for pattern in RESULTS):
        raise ValueError(f"{run} holds results of no known run; --overwrite removes them, --run names another folder")
    if old:
        before, now = (
            r["args"] | {key: r[key] for key in ("classes", "clips", "weights_sha256")} for r in (old, record)
        )
        changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
        if changed := [key for key in changed if key not in MAY_DIFFER]:
            changes = [f"{key} was {str(before.get(key))[:60]}, is {str(now.get(key))[:60]}" for key in changed]
            raise ValueError(f"cannot resume {run}: {'; '.join(changes)}")


def save(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


# ---------------------------------------------------------------- training


def draw_batches(lengths: list[int], batch_size: int, seed: int) -> list[list[tuple[int, int]]]:
    """One epoch: every clip once, in random order, at a random window -> batches of (clip index, first sample)."""
    generator = torch.Generator().manual_seed(seed)
    spare = (count_frames(torch.tensor(lengths)) - N_FRAMES).clamp(min=0)  # frames beyond one window
    start = (torch.rand(len(lengths), generator=generator) * (spare + 1)).long() * HOP
    order = torch.randperm(len(lengths), generator=generator)
    return [[(i, start[i].item()) for i in batch.tolist()] for batch in order.split(batch_size)]


def epoch_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """(for the batches, for masks and dropout): all randomness of an epoch, so resuming needs no generator states."""
    return 1_000_000 * seed + 2 * epoch, 1_000_000 * seed + 2 * epoch + 1


def train(args: argparse.Namespace) -> None:
    """From the clips to runs/<name>/adapter.pt.

    ValueError: unusable clips, one class only, a run folder that is taken, a loss that is not finite.
    """
    run, device = Path(args.run), torch.device(args.device)
    machines = machine_names(args.machine)
    clips = [clip for machine in machines for clip in list_clips(args.data, machine, "train")]
    classes = sorted({(clip.machine, clip.attributes) for clip in clips})
    if len(classes) < 2:
        raise ValueError(
            f"all {len(clips)} clips are of one class ({'/'.join(classes[0])}), so there is nothing to tell apart; "
            "train jointly with other machines (--machine pump fan valve), or skip training: score.py --pretrained"
        )
    labels = torch.tensor([classes.index((clip.machine, clip.attributes)) for clip in clips], device=device)

    record = describe(args, clips, classes)
    check_run(run, record, args.resume, args.overwrite)
    if args.resume and (run / "adapter.pt").exists():
        print(f"{run} is finished already; next: {next_command('score.py', args.machine, run, args.demo)}")
        return
    torch.manual_seed(epoch_seeds(args.seed, 0)[0])
    model = make_model(args)
    arcface = ArcFace(model.head.linear.out_features, len(classes), args.scale, args.margin)
    trainable, total = count_parameters(model)
    print(f"{len(clips)} clips of {len(machines)} machines, {len(classes)} classes, on {args.device}")
    public = "the public AudioSet AST" if record["weights_sha256"] == WEIGHTS_SHA256 else "not the public AudioSet AST"
    print(f"{args.weights}: {public}")
    print(f"{trainable + arcface.centres.numel():,} trainable parameters; {total:,} in the model")
    lengths = check_clips(clips)

    model, arcface = model.to(device), arcface.to(device)
    parameters = [p for p in (*model.parameters(), *arcface.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=device.type == "cuda")
    done, step, log = 0, 0, []
    make_run_folder(run)
    if args.resume and (run / "last.pt").exists():
        checkpoint = load_file(run / "last.pt")
        load_trained_state(model, checkpoint["model"])
        arcface.load_state_dict(checkpoint["arcface"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        done, step, log = checkpoint["epoch"], checkpoint["step"], checkpoint["log"]
        print(f"resuming after epoch {done} of {args.epochs}")
    else:
        for path in [path for pattern in RESULTS for path in run.glob(pattern)]:
            path.unlink()
    write_file(run / "args.json", json.dumps(record, indent=1).encode())
    if args.compile:
        model.compile()

    # One loader over all epochs: its workers go on reading while an epoch ends.
    epochs = range(done + 1, args.epochs + 1)
    plan = {epoch: draw_batches(lengths, args.batch_size, epoch_seeds(args.seed, epoch)[0]) for epoch in epochs}
    loader = torch.utils.data.DataLoader(
        Windows(clips),
        batch_sampler=[batch for epoch in epochs for batch in plan[epoch]],
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    augment = SpecAug(args.time_mask, args.freq_mask)
    with tqdm(total=args.epochs * len(clips), initial=done * len(clips), unit="clip", smoothing=0.05) as progress:
        for epoch in epochs:
            torch.manual_seed(epoch_seeds(args.seed, epoch)[1])
            model.train()
            totals, unread = torch.zeros(2, dtype=torch.float64), []  # summed loss and hits of this epoch
            seen, sizes, steps_before = 0, [len(batch) for batch in plan[epoch]], step
            for i, size in enumerate(sizes):
                waves, n_samples, index = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                y = labels[index]
                x = augment(spectrogram(waves, n_samples))  # (B, 1024, 128)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    embedding = model(x)  # (B, embedding)
                logits = arcface(embedding, y)  # (B, classes), in float32
                loss = F.cross_entropy(logits, y)
                hits = (arcface.classify(embedding.detach()) == y).sum()

                first = i - i % args.accumulate  # of the batches whose gradients make one step
                in_step = sizes[first : first + args.accumulate]
                (loss * size / sum(in_step)).backward()
                if i + 1 == first + len(in_step):
                    step += 1
                    for group in optimizer.param_groups:
                        group["lr"] = warm_up(step, args)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                progress.update(size)
                seen += size
                unread.append(torch.stack([loss.detach() * size, hits]))
                if len(unread) == 10 or i + 1 == len(sizes):  # reading from a GPU waits for it: not every batch
                    numbers = torch.stack(unread).double().cpu()  # (batches, 2)
                    if not numbers.isfinite().all():
                        bad = i + 1 - len(unread) + numbers.isfinite().all(dim=1).int().argmin().item()
                        at_step = steps_before + bad // args.accumulate + 1
                        raise ValueError(diverged("the loss is not finite", at_step, args, epoch))
                    totals, unread = totals + numbers.sum(dim=0), []
                    mean_loss, accuracy = (totals / seen).tolist()
                    progress.set_postfix(epoch=epoch, loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.3f}")
            if not all(parameter.isfinite().all() for parameter in parameters):
                raise ValueError(diverged("a weight is not finite", step, args, epoch))
            row = {"epoch": epoch, "step": step, "lr": warm_up(step, args), "loss": mean_loss, "accuracy": accuracy}
            log.append(row)
            state = {"epoch": epoch, "step": step, "log": log, "model": trained_state(model)}
            save(run / "last.pt", state | {"arcface": arcface.state_dict(), "optimizer": optimizer.state_dict()})
            write_log(run / "log.csv", log)

    write_log(run / "log.csv", log)  # again: a kill may have left it an epoch behind last.pt
    save(run / "adapter.pt", trained_state(model))
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    size = (run / "adapter.pt").stat().st_size
    print(f"wrote {run}: adapter.pt ({size / 1e6:.1f} MB), last.pt, log.csv, args.json")
    print(f"next: {next_command('score.py', args.machine, run, args.demo)}")


def warm_up(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step, counted from 1: linear up to --warmup, then constant."""
    return args.lr * min(1, step / max(args.warmup, 1))


def diverged(what: str, step: int, args: argparse.Namespace, epoch: int) -> str:
    kept = f"{args.run}/last.pt holds epoch {epoch - 1}" if epoch > 1 else "no epoch was finished"
    where = f"at step {step} (learning rate {warm_up(step, args):g})"
    return f"{what} {where}; {kept}; start again with a smaller --lr and --overwrite"


def write_log(path: Path, log: list[dict]) -> None:
    write_csv(path, [["epoch", "step", "lr", "loss", "accuracy"], *(row.values() for row in log)])


# ---------------------------------------------------------------- the command line

DEMO = {
    "data": "data/demo",
    "weights": "data/demo/ast.pth",
    "epochs": 2,
    "batch_size": 4,
    "warmup": 5,
    "lr": 1e-3,
    "device": "cpu",
    "workers": 0,
}
DEMO_NOTE = "demo: made-up sounds and a tiny AST with random weights; this shows the plumbing, not the method"


def prepare_demo(machines: list[str]) -> None:
    """Write the demo's sounds and weights, unless they are there."""
    print(DEMO_NOTE)
    for machine in machines:
        make_demo(DEMO["data"], machine)
    weights = Path(DEMO["weights"])
    if not weights.exists():
        torch.manual_seed(0)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save(weights, AST(dim=64, depth=12, heads=1).state_dict())


def check_device(name: str) -> None:
    """ValueError: not cpu, cuda or cuda:N, or a GPU that is not there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: cpu, cuda or cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: no such GPU here ({torch.cuda.device_count()} found); --device cpu is slow")


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


def parse_args(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage=argparse.SUPPRESS,  # an error is then one line, not the whole list of flags first
        allow_abbrev=False,
        description="Train on one or more machines: python train.py --machine fan. "
        "[paper], [same lab], [ASDKit] or [our choice] tells where a default comes from: see README.md.",
    )
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="machine names, or dev, eval, all; trained jointly")
    add("--data", default="data", help="holds <machine>/train/*.wav (%(default)s)")
    add("--run", help="the run folder (runs/<names joined by +>)")
    add("--weights", default=WEIGHTS, help="the AST's public weights (%(default)s)")
    add("--tuning", default="lora", choices=["lora", "full", "frozen"],
        help="what of the AST is trained: adapters, everything, nothing (%(default)s) [paper]")  # fmt: skip
    add("--rank", type=at_least(1), default=64, help="LoRA rank (%(default)s) [paper]")
    add("--alpha", type=at_least(1e-9, float), help="LoRA scaling is alpha/rank (= rank, so 1) [our choice]")
    add("--dropout", type=at_least(0, float), default=0.0, help="on LoRA's input (%(default)s) [ASDKit]")
    add("--targets", nargs="+", default=["q", "v"], choices=["q", "k", "v", "proj", "fc1", "fc2"],
        help="layers that get LoRA (q v) [ASDKit; paper: v matters most]")  # fmt: skip
    add("--layers", type=layer_list, default=None, help="blocks that get LoRA: all, 8-11, 0,5 (all) [paper]")
    add("--pooling", default="asp", choices=["cls", "asp"],
        help="class tokens, or attentive statistics of the patches (%(default)s) [same lab]")  # fmt: skip
    add("--embedding", type=at_least(1), default=256, help="dimensions (%(default)s) [ASDKit]")
    add("--epochs", type=at_least(1), default=25, help="(%(default)s) [ASDKit]")
    add("--batch-size", type=at_least(1), default=32, help="clips (%(default)s) [same lab]")
    add(
        "--accumulate",
        type=at_least(1),
        default=1,
        help="batches for a step, where memory is short (%(default)s) [our choice]",
    )
    add("--lr", type=at_least(1e-12, float), default=1e-4, help="AdamW's learning rate (%(default)s) [ASDKit]")
    add(
        "--warmup",
        type=at_least(0),
        default=360,
        help="steps of linear warm-up, then constant (%(default)s) [same lab]",
    )
    add("--weight-decay", type=at_least(0, float), default=0.01, help="AdamW's (%(default)s) [our choice: PyTorch's]")
    add("--time-mask", type=at_least(0), default=80, help="SpecAug, frames, 0 = off (%(default)s) [same lab]")
    add("--freq-mask", type=at_least(0), default=80, help="SpecAug, mel bins, 0 = off (%(default)s) [same lab]")
    add("--margin", type=at_least(0, float), default=0.2, help="ArcFace's, radians (%(default)s) [same lab]")
    add("--scale", type=at_least(1e-9, float), default=30.0, help="ArcFace's (%(default)s) [same lab]")
    add("--seed", type=at_least(0), default=0, help="(%(default)s) [our choice]")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 (a GPU if there is one)",
    )
    add("--workers", type=at_least(0), help="processes that read WAV files (up to 8 for a GPU, 0 for a CPU)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--overwrite", action="store_true", help="replace what the run folder holds")
    add("--demo", action="store_true", help="made-up sounds and a tiny AST: needs no download and no GPU")
    args = parser.parse_args(argv)
    if args.demo:
        if (args.data, args.weights) != (parser.get_default("data"), parser.get_default("weights")):
            parser.error("--demo brings its own data and weights: leave out --data and --weights")
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    args.alpha = float(args.rank) if args.alpha is None else args.alpha
    args.run = str(args.run or default_run(args.machine, args.demo))
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else min(8, os.cpu_count() or 1)
    return parser, args


def last_line(error: Exception) -> str:
    """The message; of an error in a DataLoader worker, which carries its traceback, the line that is ours."""
    return str(error).strip().splitlines()[-1]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse_args(argv)
    try:
        check_device(args.device)
        if args.margin >= math.pi / 2:
            raise ValueError(f"--margin {args.margin}: radians, below π/2 = 1.57")
        if args.resume and args.overwrite:
            raise ValueError("--resume goes on, --overwrite starts again: give one of them")
        SpecAug(args.time_mask, args.freq_mask)
        machines = machine_names(args.machine)
        if args.demo:
            prepare_demo(machines)
        prepare(machines, args.data, "train")
        fetch_weights(args.weights)
        train(args)
    except KeyboardInterrupt:
        again = shlex.join([flag for flag in argv if flag not in ("--overwrite", "--resume")])
        parser.exit(
            130, f"train.py: interrupted; python train.py {again} --resume goes on after the last whole epoch\n"
        )
    except torch.OutOfMemoryError:
        parser.error(f"the GPU's memory is too small for --batch-size {args.batch_size}; halve it, double --accumulate")
    except (ValueError, OSError) as error:
        parser.error(last_line(error))


if __name__ == "__main__":
    main()
