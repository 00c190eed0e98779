"""How fast, beside what one would use instead: transformers' AST with peft's LoRA.

    pip install transformers peft && python tests/bench.py

Made for a GPU; a few minutes on two CPU cores. Prints one Markdown table. Both sides of a step's
ratio are measured in turn, in this one process, on the same input; each is the median of its
rounds. The weights are random: speed does not depend on them.
"""

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from scipy.io import wavfile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402
from backbone import AST, Embedder  # noqa: E402
from lora import merge_lora  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BATCH, ROUNDS, CLIPS = (32, 15, 3200) if GPU else (1, 3, 8)
ROWS = []


def row(*cells: str) -> None:
    """What was measured, ours, what it is compared with, the ratio."""
    ROWS.append(f"| {' | '.join(cells)} |")
    print(ROWS[-1], file=sys.stderr)


def seconds(*functions, rounds: int = ROUNDS) -> list[float]:
    """Median time of each function, called in turn: a b, b a, ...; the first round is left out."""
    times = {function: [] for function in functions}
    for i in range(rounds + 1):
        for function in functions if i % 2 else functions[::-1]:
            start = time.perf_counter()
            function()
            if GPU:
                torch.cuda.synchronize()
            times[function].append(time.perf_counter() - start)
    return [statistics.median(times[function][1:]) for function in functions]


def memory(function) -> str:
    """What a step adds at its peak; only a GPU tells."""
    if not GPU:
        return "-"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f} GiB"


class Theirs(torch.nn.Module):
    """transformers' ASTModel and peft's LoRA under our head."""

    def __init__(self, ours: Embedder, tuning: str):
        super().__init__()
        config = transformers.ASTConfig(attn_implementation="sdpa")
        self.ast = transformers.ASTModel(config).requires_grad_(tuning == "full")
        if tuning == "lora":
            layers = [name for name, _ in self.ast.named_modules()]
            layers = [name for name in layers if re.search(r"(q_proj|v_proj|query|value)$", name)]
            assert len(layers) == 24
            config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=layers)
            self.ast = peft.get_peft_model(self.ast, config)
        self.pool, self.linear = ours.pool, ours.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(self.pool(self.ast(x).last_hidden_state)).float())


def make_step(args: argparse.Namespace, x: torch.Tensor, theirs=False, micro_batch=None):
    """-> a function that takes one of train.py's own steps."""
    model = train.make_model(args)
    model = (Theirs(model, args.tuning) if theirs else model).to(DEVICE)
    if args.compile:
        model.compile(dynamic=False)
    arcface = train.ArcFace(256, 167, 30.0, 0.2).to(DEVICE)
    optimizer = train.make_optimizer(model, arcface, args)
    y = torch.arange(len(x), device=DEVICE) % 167
    return lambda: train.train_step(model, arcface, optimizer, x, y, micro_batch)


def steps() -> float:
    """Training steps of every --tuning -> seconds of a LoRA step."""
    x = torch.randn(BATCH, 1024, 128, device=DEVICE)
    found = {}
    for flags in ("lora", "full", "frozen", *["lora --compile", "full --compile"] * GPU):
        args = parse("--tuning", *flags.split())
        ours = make_step(args, x)
        peak = memory(ours)  # of a first step, which also makes the optimizer's state
        theirs = make_step(args, x, theirs=True)
        their_peak = memory(theirs)
        found[flags], t = seconds(ours, theirs)
        row(f"step, {flags}, batch {BATCH}", f"{found[flags]:.3g} s, {peak}",
            f"{t:.3g} s, {their_peak}", f"{t / found[flags]:.2f}")  # fmt: skip
    if GPU:
        parts = make_step(parse(), x, micro_batch=8)
        row("step, lora, --micro-batch 8", f"{seconds(parts)[0]:.3g} s, {memory(parts)}", "", "")
    with FlopCounterMode(display=False) as counter:
        make_step(parse(), x[:1])()
    n, dtype = (8192, torch.bfloat16) if GPU else (4096, torch.float32)
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    rate = 2 * n**3 / seconds(lambda: a @ a)[0]  # FLOP/s of the device's own matrix product
    achieved = BATCH * counter.get_total_flops() / found["lora"]
    row("TFLOP/s of a LoRA step, of a matrix product", f"{achieved / 1e12:.3g}",
        f"{rate / 1e12:.3g}", f"{achieved / rate:.0%}")  # fmt: skip
    return found["lora"]


def epochs(folder: Path, step: float) -> None:
    """Clips a second of train.py's second epoch, from WAV files, beside bare steps."""
    bare = BATCH / step
    for workers in (2, 4, 8) if GPU else (0,):
        ends, run, save = [], folder / f"run{workers}", data.save
        argv = ["--machine", "pump", "--data", str(folder), "--weights", str(folder / "ast")]
        argv += ["--run", str(run), "--epochs", "2", "--batch-size", str(BATCH)]
        data.save = lambda *a: (save(*a), ends.append(time.perf_counter()))  # noqa: B023
        train.main([*argv, "--workers", str(workers)])
        data.save = save
        rate = CLIPS / (ends[1] - ends[0])
        row(f"epoch of {CLIPS:,} WAV files, {workers} processes", f"{rate:.3g} clips/s",
            f"bare steps {bare:.3g}", f"{rate / bare:.0%}")  # fmt: skip
    hours = 14_000 * 25 / rate / 3600  # 14 machines, 25 epochs
    row("hours of training: one machine; joint model; 48 of these",
        f"{hours / 14:.2g}; {hours:.2g}; {48 * hours:.3g}", "", "")  # fmt: skip


def scoring(folder: Path) -> None:
    """Windows a second from WAV files, and the distances of their embeddings."""
    model = train.make_model(parse())
    merge_lora(model.ast)
    model, batch = model.to(DEVICE), 32 if GPU else 4
    clips = data.list_clips(folder, "pump", "train")[: 16 * batch]
    took = seconds(lambda: list(score.embed(model, clips, batch, 4 * GPU)), rounds=1)[0]
    row("embedding WAV files in float32", f"{len(clips) / took:.3g} clips/s", "", "")
    e = F.normalize(torch.randn(20_000, 256)).numpy()
    took = seconds(lambda: score.nearest(score.distances(e, e), 2), rounds=1)[0]
    row("distances of 20,000 embeddings to each other, 2 nearest", f"{took:.2g} s", "", "")


def parse(*flags: str) -> argparse.Namespace:
    weights = str(Path(FOLDER.name) / "ast")
    return train.parse_args(["--machine", "x", "--weights", weights, *flags])


def main() -> None:
    from conftest import write_ast

    folder, rng = Path(FOLDER.name), np.random.default_rng(0)
    (folder / "pump" / "train").mkdir(parents=True)
    for i in range(CLIPS):
        name = f"section_00_source_train_normal_{i:04}_spd_{i % 2}.wav"
        samples = rng.integers(-20000, 20000, 160_000).astype(np.int16)
        wavfile.write(folder / "pump" / "train" / name, 16000, samples)
    torch.manual_seed(0)
    write_ast(folder / "ast", AST())
    with contextlib.redirect_stdout(sys.stderr):
        epochs(folder, steps())
        scoring(folder)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    name = torch.cuda.get_device_name() if GPU else f"{cpu}, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; {'bfloat16' if GPU else 'float32'}\n")
    print("| what | ours | beside | ratio |\n| --- | ---: | ---: | ---: |", *ROWS, sep="\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER = tempfile.TemporaryDirectory()
    main()
