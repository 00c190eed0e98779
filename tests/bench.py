"""How fast, against what one would use instead: transformers' AST with peft's LoRA, fed by
torchaudio's fbank.

    pip install transformers peft          # optional: rows that need them are left out
    python tests/bench.py                  # 8 minutes on two CPU cores; not yet run on a GPU
    python tests/bench.py --quick          # LoRA step, log-mel and start-up only

Prints one Markdown table. Both sides of a ratio are measured in turn, in this one process, on the
same input (bare steps and eager: the first row's figure again); each is the median of its rounds.
The weights are random: speed does not depend on them.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from scipy.io import wavfile
from torch.utils.flop_counter import FlopCounterMode
from torchaudio.compliance.kaldi import fbank

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402
from backbone import AST, Embedder  # noqa: E402
from lora import add_lora, merge_lora  # noqa: E402

ROWS: list[tuple[str, ...]] = []


def row(what: str, ours: str, reference: str = "", ratio: str = "", aim: str = "") -> None:
    ROWS.append((what, ours, reference, ratio, aim))
    print(
        f"{time.perf_counter() - START:5.0f} s  {what}: {ours} {reference} {ratio}", file=sys.stderr
    )


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(*functions, rounds: int, warmup: int = 1) -> list[float]:
    """Median time of each function, called in turn: a b b a a b ..."""
    times = [[] for _ in functions]
    pairs = list(zip(functions, times, strict=True))
    for i in range(warmup + rounds):
        for function, list_ in reversed(pairs) if i % 2 else pairs:
            sync()
            start = time.perf_counter()
            function()
            sync()
            if i >= warmup:
                list_.append(time.perf_counter() - start)
    return [statistics.median(list_) for list_ in times]


def memory(function) -> float:
    """GiB that a first step adds at its peak on a GPU; on a CPU, what the forward pass keeps for
    the backward pass."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values()) / 2**30


# ---------------------------------------------------------------- the two sides


class Theirs(torch.nn.Module):
    """transformers' ASTModel and peft's LoRA under our pooling and linear layer."""

    def __init__(self, head: Embedder, tuning: str, layers: list[int] | None):
        super().__init__()
        import peft
        import transformers

        config = transformers.ASTConfig(attn_implementation="sdpa")
        self.ast = transformers.ASTModel(config).requires_grad_(tuning == "full")
        if tuning == "lora":
            pattern = r".*layers?\.(\d+)\..*\.(q_proj|v_proj|query|value)"
            found = [re.fullmatch(pattern, "." + name) for name, _ in self.ast.named_modules()]
            names = [m.string[1:] for m in found if m and (layers is None or int(m[1]) in layers)]
            self.ast = peft.get_peft_model(
                self.ast, peft.LoraConfig(r=64, lora_alpha=64, target_modules=names)
            )
            assert sum(p.numel() for p in self.parameters() if p.requires_grad) == 98_304 * len(
                names
            )
        self.pooling, self.linear = head.pooling, head.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(self.pooling(self.ast(x).last_hidden_state)).float(), dim=1)


def make_ours(
    tuning: str = "lora", layers: list[int] | None = None, ast: AST | None = None
) -> Embedder:
    ast = (ast or AST()).requires_grad_(tuning == "full")
    if tuning == "lora":
        add_lora(ast, ["q", "v"], rank=64, alpha=64, layers=layers)
    return Embedder(ast, "asp", 256)


def make_step(model: torch.nn.Module, x: torch.Tensor):
    """A training step as train.py takes it, from the network's input to the optimizer."""
    model = model.to(DEVICE).train()
    arcface = train.ArcFace(256, 167, 30.0, 0.2).to(DEVICE)
    parameters = [p for p in (*model.parameters(), *arcface.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    y = torch.arange(len(x), device=DEVICE) % 167

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            embedding = model(x)
        F.cross_entropy(arcface(embedding, y), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---------------------------------------------------------------- what is measured


def matrix_rate() -> float:
    """FLOP/s of this device's own matrix product: bf16 8192³ on a GPU, float32 4096³ on a CPU."""
    n, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (4096, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, rounds=10 if DEVICE.type == "cuda" else 3)[0]


def front_end(step_time: float) -> None:
    def theirs(waves: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                fbank(
                    wave[None],
                    htk_compat=True,
                    sample_frequency=16000,
                    use_energy=False,
                    window_type="hanning",
                    num_mel_bins=128,
                    dither=0.0,
                    frame_shift=10,
                )
                for wave in waves
            ]
        )

    for B in (1, 32):
        waves = (torch.rand(B, 160000) * 2 - 1).to(DEVICE)
        ours, reference = seconds(
            lambda w=waves: data.log_mel(w), lambda w=waves: theirs(w), rounds=100 // B + 5
        )
        difference = (data.log_mel(waves) - theirs(waves)).abs().max().item()
        equal = "bit-equal" if difference == 0 else f"within {difference:.0e}"
        row(
            f"log-mel, batch {B}, {equal}",
            f"{1e3 * ours / B:.2f} ms/clip",
            f"torchaudio {1e3 * reference / B:.2f}",
            f"{reference / ours:.2f}",
            "≥ 1.2" if DEVICE.type == "cpu" else "",
        )
    if DEVICE.type == "cuda":
        waves = torch.rand(BATCH, 160000, device=DEVICE) * 2 - 1
        lengths = torch.full((BATCH,), 160000, device=DEVICE)
        augment = train.SpecAug(80, 80)
        ours = seconds(lambda: augment(data.spectrogram(waves, lengths)), rounds=20)[0]
        row(
            "log-mel + SpecAug, share of a step",
            f"{1e3 * ours:.1f} ms",
            f"step {1e3 * step_time:.1f} ms",
            f"{ours / step_time:.1%}",
            "< 2 %",
        )


def training_steps() -> dict[str, float]:
    """Our step against theirs, for LoRA everywhere, LoRA in the upper third, and full
    fine-tuning."""
    x = torch.randn(BATCH, 1024, 128, device=DEVICE)
    times = {}
    settings = [
        ("LoRA 64 on q, v", "lora", None, "≥ 1.3" if DEVICE.type == "cuda" else "≥ 1.0"),
        ("LoRA in layers 8-11", "lora", [8, 9, 10, 11], ""),
        ("full fine-tuning", "full", None, ""),
    ]
    for name, tuning, layers, aim in settings[: 1 if QUICK else 3]:
        model = make_ours(tuning, layers)
        ours = make_step(model, x)
        rounds = 15 if DEVICE.type == "cuda" else 4
        if HAVE_THEIRS:
            theirs = make_step(Theirs(make_ours(tuning, layers), tuning, layers), x)
            kept = memory(ours), memory(theirs)  # the warm-up at the same time
            times[name], reference = seconds(ours, theirs, rounds=rounds, warmup=0)
            row(
                f"training step, {name}, batch {BATCH}",
                f"{BATCH / times[name]:.3g} clips/s",
                f"transformers + peft {BATCH / reference:.3g}",
                f"{reference / times[name]:.2f}",
                aim,
            )
            what = "peak memory" if DEVICE.type == "cuda" else "kept for backward"
            row(
                f"{what}, {name}",
                f"{kept[0]:.2f} GiB",
                f"{kept[1]:.2f} GiB",
                f"{kept[0] / kept[1]:.2f}",
                "≤ 1.0",
            )
            del theirs
        else:
            times[name] = seconds(ours, rounds=rounds)[0]
            row(f"training step, {name}, batch {BATCH}", f"{BATCH / times[name]:.3g} clips/s")
        if name == "LoRA 64 on q, v":
            one = make_step(model, x[:1])
            with (
                FlopCounterMode(display=False) as counter,
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            ):
                one()
            del one
            rate = matrix_rate()
            flops = BATCH * counter.get_total_flops() / times[name]
            row(
                f"share of the matrix rate ({counter.get_total_flops() / 1e12:.2f} TFLOP a clip)",
                f"{flops / 1e12:.3g} TFLOP/s",
                f"matrix product {rate / 1e12:.3g}",
                f"{flops / rate:.0%}",
                "≥ 50 %" if DEVICE.type == "cuda" else "≥ 85 %",
            )
        del model, ours
    if QUICK:
        return times
    upper, all_ = times["LoRA in layers 8-11"], times["LoRA 64 on q, v"]
    row(
        "layers 8-11 against all layers",
        f"{upper:.3g} s",
        f"{all_:.3g} s",
        f"{upper / all_:.2f}",
        "< 0.75",
    )
    return times


def compiled() -> None:
    """Full batches and a tail batch in turn, as in training: a graph for each."""
    x = torch.randn(BATCH + 1, 1024, 128, device=DEVICE)
    steps = {}
    for name in ("eager", "compiled"):
        model = make_ours()
        if name == "compiled":
            model.compile(dynamic=False)
        steps[name] = make_step(model, x[:BATCH]), make_step(model, x[BATCH:])
    start = time.perf_counter()
    try:
        for full, tail in steps.values():
            full(), tail()
        sync()
    except Exception as error:
        row("--compile", f"not measured: {str(error).strip().splitlines()[-1][:80]}")
        return
    first = time.perf_counter() - start
    rounds = 15 if DEVICE.type == "cuda" else 2
    again, eager = seconds(steps["compiled"][0], steps["eager"][0], rounds=rounds, warmup=0)
    row(
        "--compile against eager, LoRA step after a tail batch",
        f"{BATCH / again:.3g} clips/s",
        f"eager {BATCH / eager:.3g}",
        f"{eager / again:.2f}",
        f"first steps {first:.0f} s",
    )


def write_clips(folder: Path, machine: str, n: int) -> None:
    """n clips of 10 s in DCASE layout; noise, two classes."""
    (folder / machine / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = rng.integers(-20000, 20000, 160000).astype(np.int16)
    for i in range(n):
        name = f"section_00_source_train_normal_{i:04}_spd_{i % 2}.wav"
        wavfile.write(folder / machine / "train" / name, 16000, np.roll(samples, i))


def from_files(folder: Path, weights: Path, step_time: float) -> None:
    """Scoring and a whole train.py epoch from WAV files, against the network alone."""
    model = make_ours()
    merge_lora(model.ast)
    model = model.to(DEVICE).eval()
    n, batch = (512, 64) if DEVICE.type == "cuda" else (4, 2)
    clips = data.list_clips(folder, "many", "train")[:n]
    x = torch.randn(batch, 1024, 128, device=DEVICE)

    @torch.inference_mode()
    def forward(bf16: bool = False) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            return torch.cat([model(x) for _ in range(n // batch)])

    workers = 2 if DEVICE.type == "cuda" else 0
    lengths = [recording.n_samples for recording in data.check_clips(clips)]

    def from_wav() -> None:
        for _ in score.embed(model, clips, lengths, batch, workers):
            pass

    ours, alone = seconds(from_wav, forward, rounds=2, warmup=0)
    row(
        f"embedding {n} WAV files, merged weights",
        f"{n / ours:.3g} clips/s",
        f"alone {n / alone:.3g}",
        f"{alone / ours:.0%}",
        "≥ 90 %",
    )
    if DEVICE.type == "cuda":
        full, half = seconds(forward, lambda: forward(bf16=True), rounds=3)
        moved = (1 - (forward()[:batch] * forward(bf16=True)[:batch]).sum(1)).max().item()
        row("embedding in float32 against bf16", f"{n / full:.3g} clips/s", f"bf16 {n / half:.3g}",
            f"{half / full:.2f}", f"bf16 moves an embedding by up to {moved:.1e}")  # fmt: skip

    epoch_clips, epoch_batch = (2000, BATCH) if DEVICE.type == "cuda" else (4, BATCH)
    subset = folder / "epoch"
    (subset / "some" / "train").mkdir(parents=True)
    for path in sorted((folder / "many" / "train").iterdir())[:epoch_clips]:
        (subset / "some" / "train" / path.name).symlink_to(path)
    argv = [
        "--machine",
        "some",
        "--data",
        str(subset),
        "--weights",
        str(weights),
        "--run",
        str(folder / "run"),
        "--epochs",
        "2",
        "--batch-size",
        str(epoch_batch),
        "--device",
        str(DEVICE),
        "--overwrite",
    ]
    ends = []
    save_epoch = train.Run.save_epoch

    def timed(*arguments) -> None:
        save_epoch(*arguments)
        ends.append(time.perf_counter())

    train.Run.save_epoch = timed
    train.main(argv)
    train.Run.save_epoch = save_epoch
    whole, bare = ends[1] - ends[0], step_time * epoch_clips / epoch_batch
    row(f"train.py, second epoch of {epoch_clips} WAV files", f"{epoch_clips / whole:.3g} clips/s",
        f"bare steps {epoch_clips / bare:.3g}", f"{bare / whole:.0%}", "≥ 95 %")  # fmt: skip


def start_up(folder: Path, weights: Path) -> None:
    """From the command to the first batch on the device: 14 machines x 1,000 clips of 10 s."""
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); import train\n"
        "def first(*_): os._exit(0)\n"
        "train.spectrogram = first; train.main(sys.argv[2:])"
    )
    names = data.DEV + data.EVAL
    write_clips(folder, "one", 1)
    (clip,) = (folder / "one" / "train").iterdir()
    for machine in names:
        (folder / "many" / machine / "train").mkdir(parents=True)
        for i in range(1000):
            name = f"section_00_source_train_normal_{i:04}_spd_{i % 12}.wav"
            os.link(clip, folder / "many" / machine / "train" / name)
    argv = [
        "--machine",
        *names,
        "--data",
        str(folder / "many"),
        "--weights",
        str(weights),
        "--device",
        str(DEVICE),
    ]
    argv += ["--run", str(folder / "start"), "--overwrite"]
    bare = "import torch, torchaudio, sklearn.metrics"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ours, imports = seconds(
        lambda: subprocess.run(
            [sys.executable, "-c", code, str(ROOT), *argv], check=True, **silent
        ),
        lambda: subprocess.run([sys.executable, "-c", bare], check=True),
        rounds=2,
    )
    row(
        "start-up, command to first batch, 14 x 1,000 clips",
        f"{ours:.1f} s",
        f"imports alone {imports:.1f} s",
    )


def resident() -> float:
    """MiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(folder: Path) -> None:
    """Reading and front end by number of clips, a step by batch size, neighbours by size of the
    bank."""
    clips = data.list_clips(folder, "many", "train")
    for n in (250, 500, 1000, 2000):
        before = resident()
        start = time.perf_counter()
        lengths = [recording.n_samples for recording in data.check_clips(clips[:n])]
        checked = time.perf_counter() - start
        loader = data.Loader(clips, data.RandomWindows(lengths), 32, 0, DEVICE)
        for waves, n_samples, _ in loader:
            data.spectrogram(waves, n_samples)
        sync()
        whole = time.perf_counter() - start
        grown = resident() - before
        row(
            f"growth: check, read and log-mel of {n:,} clips, one process",
            f"{whole:.1f} s (checks {checked:.1f} s)",
            f"{1e3 * whole / n:.1f} ms/clip",
            f"{grown:+.0f} MiB",
        )
    for B in (8, 16, 32, 64, 128):
        gpu = DEVICE.type == "cuda"
        model = make_ours(ast=None if gpu else AST(64, 1, 1))
        step = make_step(model, torch.randn(B, 1024, 128, device=DEVICE))
        try:
            time_ = seconds(step, rounds=10 if gpu else 1)[0]
            what = "base AST" if gpu else "tiny AST (64 x 1)"
            row(
                f"growth: LoRA step, {what}, batch {B}",
                f"{B / time_:.3g} clips/s",
                f"{memory(step):.2f} GiB",
            )
        except torch.OutOfMemoryError:
            row(f"growth: LoRA step, base AST, batch {B}", "does not fit")
        del model, step
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(200, 256)).astype(np.float32)
    for n in (1_000, 100_000):
        bank = rng.normal(size=(n, 256)).astype(np.float32)
        time_ = seconds(lambda b=bank: score.nearest(score.distances(queries, b)), rounds=5)[0]
        row(f"growth: 200 clips scored against {n:,} embeddings", f"{1e3 * time_:.0f} ms")


def loader_cost(folder: Path) -> None:
    """Reading one 10 s clip: the challenge's format, and what a recorder may give."""
    rng = np.random.default_rng(0)
    for rate, channels in ((16000, 1), (44100, 2)):
        path = folder / f"{rate}.wav"
        samples = rng.integers(-20000, 20000, (10 * rate, channels)).astype(np.int16)
        wavfile.write(path, rate, samples)
        time_ = seconds(lambda path=path: data.read_wav(path), rounds=9)[0]
        what = f"reading 10 s at {rate / 1000:g} kHz, {channels} channels, one process"
        row(what, f"{1e3 * time_:.1f} ms/clip")


def large_machine(folder: Path) -> None:
    """20,000 training clips x 5,000 test clips through score.py, with embeddings made up."""
    for split, n in (("train", 20_000), ("test", 5_000)):
        (folder / "pump" / split).mkdir(parents=True)
        for i in range(n):
            samples = np.array([i % 30_000, split == "train"] * 200, np.int16)
            wavfile.write(folder / "pump" / split / f"{i}.wav", 16000, samples)
    train.save(folder / "ast.pth", AST(64, 1, 1).state_dict())
    rng, run = np.random.default_rng(0), folder / "run"
    run.mkdir()
    kept = {}
    for path in folder.glob("pump/*/*.wav"):
        vector = rng.normal(size=(1, 768)).astype(np.float32)
        recording = data.Recording(400, -20.0, 0.0, 0.0)
        kept[data.file_digest(path)] = score.Kept(recording, vector / np.linalg.norm(vector))
    model_id = f"pretrained-cls {data.file_digest(folder / 'ast.pth')[:12]}"
    score.write_kept(run / "embeddings_pump.npz", model_id, kept)
    for normalize in ("none", "density"):
        code = (
            "import re, sys; sys.path.insert(0, sys.argv[1]); import score\n"
            "score.main(sys.argv[2:])\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
        )
        argv = ["--machine", "pump", "--pretrained", "--data", str(folder), "--run", str(run),
                "--weights", str(folder / "ast.pth"), "--normalize", normalize,
                "--device", "cpu"]  # fmt: skip
        start = time.perf_counter()
        command = [sys.executable, "-c", code, str(ROOT), *argv]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        elapsed, peak = time.perf_counter() - start, int(out.splitlines()[-1]) / 2**20
        what = f"score.py --normalize {normalize}, 20,000 x 5,000 clips, all files written"
        row(what, f"{elapsed:.0f} s", f"peak {peak:.1f} GiB", "", "< 30 s, < 4 GiB")


def main() -> None:
    versions = f"torch {torch.__version__}, torchaudio {torchaudio.__version__}"
    if HAVE_THEIRS:
        import peft
        import transformers

        versions += f", transformers {transformers.__version__}, peft {peft.__version__}"
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{cpu}, {torch.get_num_threads()} threads"
    )
    precision = "bf16 autocast" if DEVICE.type == "cuda" else "float32"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder, weights = Path(temporary), Path(temporary) / "ast.pth"
        train.save(weights, AST().state_dict())
        times = training_steps()
        front_end(times["LoRA 64 on q, v"])
        if not QUICK:
            write_clips(folder, "many", 2000)
            from_files(folder, weights, times["LoRA 64 on q, v"])
            growth(folder)
            compiled()
            loader_cost(folder)
            large_machine(folder / "large")
        start_up(folder / "start-up", weights)
    took = f"{time.perf_counter() - START:.0f} s in all"
    print(f"{name}; {versions}; batch {BATCH}, {precision}; {took}\n")
    print("| what | ours | reference | ratio | aim |\n| --- | ---: | ---: | ---: | ---: |")
    for cells in ROWS:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch-size", type=int, help="of the training steps (32 on a GPU, 1 on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help="LoRA step, log-mel and start-up only")
    args = parser.parse_args()
    QUICK = args.quick
    DEVICE = torch.device(args.device)
    BATCH = args.batch_size or (32 if DEVICE.type == "cuda" else 1)
    START = time.perf_counter()
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401

        HAVE_THEIRS = True
    except ImportError:
        HAVE_THEIRS = False
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
