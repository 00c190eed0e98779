"""train.py: ArcFace, the whole loop against a plain one, and what happens to a run that is
interrupted or moved."""

import csv
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FLAGS,
    ROOT,
    assert_equal_within,
    embed_all,
    in_a_process,
    needs_cuda,
    serve,
    small_machines,
)
from scipy.io import wavfile

import backbone
import data
import score
import train
from data import HOP, RandomWindows, list_clips, read_wav
from train import ArcFace, load_run

# ---------------------------------------------------------------- ArcFace


def test_arcface_worked_example():
    """Two class centres at right angles, an embedding at 60° to the first (the true one): cos θ =
    (0.5, 0.866).

    With m = 30° the true class gets cos 90° = 0, the other keeps 0.866; s = 2 gives the logits (0,
    1.732), and the loss is ln(1 + e^1.732) = 1.8950. Without the margin it would be ln(1 + e^0.732)
    = 1.1247.
    """
    arcface = ArcFace(dim=2, classes=2, scale=2.0, margin=math.pi / 6)
    with torch.no_grad():
        arcface.centres.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))  # only their directions count
    embedding = torch.tensor([[0.5, math.sqrt(3) / 2]])
    logits = arcface(embedding, torch.tensor([0]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, math.sqrt(3)]]), atol=1e-6, rtol=0)
    assert F.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(1.8950, abs=1e-4)
    assert arcface.cosines(embedding).argmax(1).tolist() == [1]


ANGLES = [
    0.0,
    1e-4,
    1e-3,
    0.01,
    0.3,
    1.0,
    math.pi / 2,
    2.5,
    math.pi - 0.21,
    math.pi - 0.19,
    math.pi - 0.01,
    math.pi - 1e-3,
    math.pi - 1e-4,
    math.pi,
]


@pytest.mark.parametrize("theta", ANGLES)
def test_arcface_equals_an_independent_float64_computation_with_its_gradients(theta):
    """cos(θ + m) by way of the angle itself, in float64; beyond π - m the straight line cos θ - m
    sin m."""
    margin, scale = 0.2, 30.0
    other = 1.1  # the angle to the second centre
    raw = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float32)
    centres = torch.tensor([[1.0, 0.0], [math.cos(theta - other), math.sin(theta - other)]])
    arcface = ArcFace(2, 2, scale, margin)
    arcface.centres.data.copy_(centres)
    ours = raw.clone().requires_grad_()
    logits = arcface(F.normalize(ours), torch.tensor([0]))
    F.cross_entropy(logits, torch.tensor([0])).backward()

    x, w = raw.double().requires_grad_(), centres.double().requires_grad_()
    e, c = x / x.norm(), w / w.norm(dim=1, keepdim=True)
    angle = torch.atan2(
        e[0, 1] * c[0, 0] - e[0, 0] * c[0, 1], (e[0] * c[0]).sum()
    )  # exact at 0 and π too
    easy = angle + margin <= math.pi
    true = torch.cos(angle + margin) if easy else torch.cos(angle) - margin * math.sin(margin)
    expected = scale * torch.stack([true, (e[0] * c[1]).sum()])
    (torch.logsumexp(expected, 0) - expected[0]).backward()

    assert_equal_within(
        2e-3, f"ArcFace logits (±30) at {theta:.4g} rad against float64", logits[0], expected
    )
    assert ours.grad.isfinite().all() and arcface.centres.grad.isfinite().all()
    if (
        1e-3 <= theta <= math.pi - 1e-3
    ):  # at 0 and π the slope along the circle is cut off, see the next test
        torch.testing.assert_close(ours.grad.double(), x.grad, atol=2e-2, rtol=2e-3)
        torch.testing.assert_close(arcface.centres.grad.double(), w.grad, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_arcface_is_finite_exactly_at_and_opposite_a_centre(sign):
    arcface = ArcFace(3, 2, 30.0, 0.2)
    embedding = (sign * F.normalize(arcface.centres.detach()[:1])).requires_grad_()
    logits = arcface(embedding, torch.tensor([0]))
    logits.sum().backward()
    assert (
        logits.isfinite().all()
        and embedding.grad.isfinite().all()
        and arcface.centres.grad.isfinite().all()
    )


def test_arcface_falls_with_the_angle_all_the_way_to_pi():
    theta = torch.linspace(0, math.pi, 1000, dtype=torch.float64)
    arcface = ArcFace(2, 2, 30.0, 0.5).double()
    arcface.centres.data.copy_(torch.eye(2))
    logits = arcface(
        torch.stack([theta.cos(), theta.sin()], dim=1), torch.zeros(1000, dtype=torch.int64)
    )[:, 0]
    assert (logits.diff() < 0).all()


def test_the_line_begins_just_where_the_margin_reaches_pi():
    """As in the authors' code, cos θ > cos(π - m) is needed for cos(θ + m)."""
    cos = torch.tensor([[-math.cos(0.2), 0.0], [-math.cos(0.2) + 1e-6, 0.0]])
    logits = ArcFace(2, 2, 1.0, 0.2).logits(cos, torch.tensor([0, 0]))[:, 0]
    line = -math.cos(0.2) - 0.2 * math.sin(0.2)
    assert logits.tolist() == pytest.approx([line, -1.0], abs=1e-5)


def test_no_margin_is_a_scaled_cosine_and_the_margin_touches_the_true_class_only():
    torch.manual_seed(0)
    embedding, labels = F.normalize(torch.randn(5, 8)), torch.tensor([0, 1, 2, 0, 1])
    plain, with_margin = ArcFace(8, 3, 10.0, 0.0), ArcFace(8, 3, 10.0, 0.3)
    with_margin.load_state_dict(plain.state_dict())
    cos = embedding @ F.normalize(plain.centres).T
    torch.testing.assert_close(plain(embedding, labels), 10 * cos)
    difference = plain(embedding, labels) - with_margin(embedding, labels)
    true = F.one_hot(labels, 3).bool()
    assert (difference[true] > 0.1).all() and (difference[~true] == 0).all()


# ---------------------------------------------------------------- batches


def drawn(lengths: list[int], seed: int) -> list[tuple[int, int]]:
    torch.manual_seed(seed)
    return list(RandomWindows(lengths))


def test_an_epoch_has_every_clip_once_in_an_order_of_its_own():
    lengths = [160000] * 10 + [192000] * 11
    one, two = drawn(lengths, 1), drawn(lengths, 2)
    for epoch in (one, two):
        assert sorted(i for i, _ in epoch) == list(range(21)) and len(RandomWindows(lengths)) == 21
    assert [i for i, _ in one] != [i for i, _ in two] and one == drawn(lengths, 1)


def test_windows_of_long_clips_are_drawn_from_all_places_on_the_hop():
    """12 s are 1198 frames: the first frame is uniform on {0..174}; a 10 s clip has no choice."""
    starts = [start for _, start in drawn([192000] * 400, 0)]
    assert all(start % HOP == 0 and 0 <= start <= 174 * HOP for start in starts)
    assert len(set(starts)) > 140 and np.mean(starts) / HOP == pytest.approx(87, abs=4 * 50.5 / 20)
    assert {0, 1} == {start // HOP for _, start in drawn([164080 + 160] * 50, 0)}
    assert all(start == 0 for _, start in drawn([160000] * 9, 0))


# ----------------------------------------------------- the whole loop, against tests/plain.py


def noisy_clips(folder: Path) -> list[torch.Tensor]:
    """Seven clips of 6, 10 and 12 s in two classes, a hum in coloured noise; one of them with float
    samples."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i, seconds in enumerate([6, 10, 12, 10, 12, 6, 10]):
        t = np.arange(seconds * 16000) / 16000
        wave = (
            0.1 * np.sin(2 * np.pi * (200 + 150 * (i % 2)) * t)
            + 0.02 * np.cumsum(rng.normal(size=len(t))) / 50
        )
        wave = np.clip(wave + 0.01 * rng.normal(size=len(t)), -0.9, 0.9)
        samples = wave.astype(np.float32) if i == 3 else (32768 * wave).astype(np.int16)
        wavfile.write(
            folder / f"section_00_source_train_normal_{i:04}_spd_{i % 2}.wav", 16000, samples
        )
    return [plain.read(path) for path in sorted(folder.iterdir())]


def lively_weights(path: str) -> dict[str, torch.Tensor]:
    """A small AST whose tokens differ and attend: at ViT's initial 0.02 gradients are all but
    noise."""
    torch.manual_seed(1)
    ast = backbone.AST(dim=64, depth=2, heads=1)
    for name, parameter in ast.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save(ast.state_dict(), path)
    return ast.state_dict()


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
def test_training_equals_a_plain_loop(tmp_path, monkeypatch, tuning, micro_batch):
    """Every trained tensor to 1e-6 and every line of the log, through an uneven last batch.

    Left out are the biases of the keys, which a softmax does not see: their gradient is rounding
    noise, of which Adam makes whole steps.
    """
    monkeypatch.chdir(tmp_path)
    waves, public = noisy_clips(Path("data/fan/train")), lively_weights("ast.pth")
    numbers = {
        "epochs": 5, "lr": 1e-5, "ast_lr": 3e-6, "warmup": 5, "rank": 4, "alpha": 6.0, "seed": 3,
        "scale": 20.0, "margin": 0.3, "weight_decay": 1.0,
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    masks = ["--time-mask=300", "--freq-mask=50", "--batch-size=4"]
    masks += [f"--micro-batch={micro_batch}"]
    train.main(["--machine", "fan", *FLAGS, "--tuning", tuning, *flags, *masks])
    model, _ = load_run("runs/fan")
    last = train.backbone.load_file("runs/fan/last.pt")

    w, head, centres, log = plain.train(
        waves, [0, 1, 0, 1, 0, 1, 0], public, tuning=tuning, batch=4, masks=(300, 50), **numbers
    )
    rename = {
        name.replace(".base.", "."): tensor for name, tensor in model.ast.state_dict().items()
    }
    expected = w | head | {"centres": centres}
    found = rename | {n: t for n, t in model.state_dict().items() if not n.startswith("ast.")}
    found |= {"centres": last["arcface"]["centres"]}
    names = [name for name in expected if not name.endswith("attn.k.bias")]
    difference = max((found[name] - expected[name]).abs().max().item() for name in names)
    print(
        f"training, {tuning}, {micro_batch} of 4 at once, against a plain loop: "
        f"largest difference {difference:.1e}"
    )
    assert difference <= 1e-6 and found.keys() == expected.keys()
    moved = [name for name in public if not torch.equal(found[name], public[name])]
    assert moved == (list(public) if tuning == "full" else [])
    with open("runs/fan/log.csv") as file:
        rows = [
            [float(row[key]) for key in ("step", "lr", "loss", "accuracy")]
            for row in csv.DictReader(file)
        ]
    assert rows == [pytest.approx(line, rel=1e-5) for line in log]


def test_only_pretrained_weights_have_their_own_rate(small):
    """--ast-lr under --tuning full; everything that starts at random, and LoRA, has --lr in every
    row."""
    small_machines("fan")
    for tuning, expected in (("full", [1e-3, 3e-5]), ("lora", [1e-3, 1e-3]), ("frozen", [1e-3])):
        groups = backbone.load_file(
            run("--tuning", tuning, "--ast-lr", "3e-5", "--overwrite") / "last.pt"
        )
        groups = groups["optimizer"]["param_groups"]
        assert [group["initial_lr"] for group in groups] == expected
        assert all(group["fused"] is True for group in groups)
        sizes = [len(group["params"]) for group in groups]
        assert (
            sizes[0] == 7
            and sizes[1:] == {"full": [5 + 2 * 16 + 2], "lora": [2 * 2 * 2], "frozen": []}[tuning]
        )


# ---------------------------------------------------------------- runs

COMMAND = ["--machine", "fan", *FLAGS, "--epochs", "2", "--batch-size", "4", "--lr", "1e-3"]


def run(*flags: str) -> Path:
    """Train on the small fan in this process."""
    train.main([*COMMAND, *flags])
    return Path("runs/fan")


def error_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and err.startswith("train.py: error: ")
    return err


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter.pt", "log.csv")}


def log_of(folder: Path) -> list[dict[str, float]]:
    with open(folder / "log.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_training_learns_to_tell_the_classes_apart(small):
    small_machines("fan", "valve", n_train=12)
    log = log_of(
        run(
            "--machine",
            "fan",
            "valve",
            "--epochs",
            "16",
            "--time-mask",
            "0",
            "--freq-mask",
            "0",
            "--run",
            "runs/fan",
        )
    )
    assert log[-1]["loss"] < 0.7 * log[0]["loss"] and log[-1]["accuracy"] >= 0.5


@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_each_tuning_changes_exactly_what_it_says(small, tuning, capsys):
    small_machines("fan")
    model, args = load_run(run("--tuning", tuning, "--lr", "0.01"))
    public = train.load_ast(args.weights).state_dict()
    base = {name.replace(".base.", "."): tensor for name, tensor in model.ast.state_dict().items()}
    unchanged = all(torch.equal(base[name], tensor) for name, tensor in public.items())
    assert unchanged == (tuning != "full")
    adapters = [name for name in base if name[-2:] in (".A", ".B")]
    assert len(adapters) == (2 * 2 * 2 if tuning == "lora" else 0)
    assert all(base[name].abs().sum() > 0 for name in adapters), "every B has moved away from zero"
    count = {"lora": 4 * 64 * 128, "full": sum(t.numel() for t in public.values()), "frozen": 0}[
        tuning
    ]
    # on top: pooling 64·128 + 128 + 128·128 + 128·64, linear 128·256 + 256, seven class
    # centres of 256
    assert f"{count + 32_896 + 33_024 + 1_792:,} trainable parameters" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(small):
    small_machines("fan")
    first = results(run())
    assert results(run("--overwrite")) == first
    assert results(run("--overwrite", "--seed", "1"))["adapter.pt"] != first["adapter.pt"]


def test_dropout_acts_in_training_and_not_in_scoring(small):
    small_machines("fan")
    plain_ = results(run("--warmup", "0"))["adapter.pt"]
    assert results(run("--warmup", "0", "--dropout", "0.5", "--overwrite"))["adapter.pt"] != plain_
    clips = list_clips("data", "fan", "test")
    model, _ = load_run("runs/fan")
    rows = [embed_all(model.train(), clips) for _ in range(2)]
    np.testing.assert_array_equal(*rows)


def test_workers_do_not_change_the_result(small):
    small_machines("fan")
    first = results(run())
    assert results(run("--overwrite", "--workers", "2")) == first


def test_warm_up_is_linear_and_then_constant(small, capsys):
    """10 epochs of 2 steps: the 360 steps asked for are cut to a tenth of the run, 2; 8 epochs x 2
    with --warmup 1."""
    small_machines("fan")
    assert [row["lr"] for row in log_of(run("--lr", "0.006", "--epochs", "10"))] == [0.006] * 10
    assert "20 steps in 10 epochs, of which 2 warm up" in capsys.readouterr().out
    log = log_of(run("--lr", "0.006", "--epochs", "30", "--batch-size", "7", "--overwrite"))
    assert [row["lr"] for row in log] == pytest.approx([0.002, 0.004] + 28 * [0.006])
    capsys.readouterr()
    run("--epochs", "10", "--warmup", "1", "--overwrite")
    assert "20 steps in 10 epochs, of which 1 warm up" in capsys.readouterr().out


def test_a_run_that_continues_within_its_warm_up_goes_on_with_it(small, monkeypatch):
    """30 epochs of a step each, of which three warm up; cut off after the first."""
    small_machines("fan")
    flags = ["--lr", "0.006", "--epochs", "30", "--batch-size", "7"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 1)
        run(*flags)
    rates = [row["lr"] for row in log_of(run(*flags))]
    assert rates == pytest.approx([0.002, 0.004] + 28 * [0.006])


def test_twelve_clips_in_ten_epochs_have_warmed_up_after_the_first(small):
    small_machines("fan", n_train=12)
    first = log_of(run("--epochs", "10"))[0]
    assert (first["step"], first["lr"]) == (3, 1e-3)


def test_the_record_of_a_run_tells_how_it_was_made(small):
    small_machines("fan")
    record = json.loads((run() / "args.json").read_text())
    assert (
        record["args"]["rank"] == 64
        and record["args"]["alpha"] == 64.0
        and record["args"]["seed"] == 0
    )
    names = [f"fan/mode_{mode:02d}" for mode in range(7)]
    assert record["classes"] == names
    assert record["clips"] == {"fan": 7} and record["weights"] == "not the public AudioSet AST"
    assert record["versions"]["torch"] == torch.__version__ and len(record["weights_sha256"]) == 64


def test_one_class_alone_is_refused_with_the_ways_out(small, capsys):
    small_machines("fan")
    for i, clip in enumerate(list_clips("data", "fan", "train")):
        clip.path.rename(clip.path.with_name(f"recording {i}.wav"))
    assert (
        "train jointly with other machines" in (message := error_of(capsys))
        and "--pretrained" in message
    )
    assert not Path("runs").exists()


def test_missing_data_and_weights_are_fetched_first(small, server, monkeypatch, capsys):
    """Both from the loopback address, with their checksums; then the run goes to its end."""
    small_machines("fan")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in Path("data/fan").rglob("*.wav"):
            file.write(path, path.relative_to("data"))
    shutil.rmtree("data")
    serve(server, monkeypatch, 7882613, "dev_fan", buffer.getvalue())
    server.files["/model.safetensors"] = content = Path("ast.pth").read_bytes()
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    train.main(["--machine", "fan", "--epochs", "1", "--device", "cpu"])
    assert Path("runs/fan/adapter.pt").exists() and len(server.requests) == 2
    assert "weights/ast.safetensors: the public AudioSet AST" in capsys.readouterr().out


def test_the_log_is_readable_in_a_file(small):
    """A line an epoch, no bar and no carriage return where the output is no terminal."""
    small_machines("fan")
    for name in ("out", "err"):
        Path(name).touch()
    command = [sys.executable, "-c", CHILD, str(ROOT), *COMMAND]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("epoch")] == [
        "epoch 1: step 2",
        "epoch 2: step 4",
    ]
    assert "\r" not in result.stdout + result.stderr and len(lines) == len(set(lines))


# ---------------------------------------------------------------- interruptions


def test_a_finished_run_stays_as_it_is_and_says_what_comes_next(small, capsys):
    small_machines("fan")
    before = results(run())
    scores = Path("runs/fan/anomaly_score_fan_section_00_test.csv")
    scores.touch()
    capsys.readouterr()
    run()
    assert scores.exists()
    out = capsys.readouterr().out
    assert "runs/fan is finished already; next: python score.py --machine fan" in out
    assert results(Path("runs/fan")) == before
    assert results(run("--overwrite", "--seed", "1")) != before


def test_a_finished_run_without_its_last_pt_is_not_overwritten(small, capsys):
    small_machines("fan")
    (run() / "last.pt").unlink()
    assert "is finished, but has no last.pt to continue from" in error_of(capsys)
    assert Path("runs/fan/adapter.pt").exists()


def test_results_without_a_run_are_not_overwritten_either(small, capsys):
    small_machines("fan")
    Path("runs/fan").mkdir(parents=True)
    Path("runs/fan/anomaly_score_fan_section_00_test.csv").write_text("a.wav,1\n")
    assert "holds results of no known run" in error_of(capsys)
    run("--overwrite")
    assert not Path("runs/fan/anomaly_score_fan_section_00_test.csv").exists()


def interrupt_after_epoch(monkeypatch, epoch: int) -> None:
    """As if the power went right after that epoch's checkpoint."""
    write_log = train.Run.write_log

    def stop(run):
        write_log(run)
        if len(run.log) == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "write_log", stop)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_continued_run_ends_with_the_same_bytes(small, monkeypatch, capsys, tuning, workers):
    small_machines("fan")
    flags = ["--epochs", "4", "--tuning", tuning, "--dropout", "0.1", "--workers", workers]
    whole = results(run(*flags))
    shutil.rmtree("runs")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt_after_epoch(patch, 2)
        run(*flags)
    assert stop.value.code == 130
    again = " ".join([*COMMAND, *flags])
    assert f"interrupted; python train.py {again} continues after" in capsys.readouterr().err
    assert results(run(*flags)) == whole
    assert "continuing after epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "left"),
    [([], [".lock", "args.json", "last.pt", "log.csv"]), (["--overwrite"], [".lock", "args.json"])],
)
def test_a_run_cut_off_in_its_first_epoch_leaves_nothing_of_the_one_before(
    small, monkeypatch, flags, left
):
    """But for what continuing needs: else last.pt of one run could be taken for the other's."""
    small_machines("fan")
    folder = run("--epochs", "1")
    for name in (
        "anomaly_score_fan_section_00_test.csv",
        "embeddings_fan.npz",
        "fan.png",
        "metrics.csv",
    ):
        (folder / name).touch()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", stop)
    with pytest.raises(SystemExit):
        run("--epochs", "2", *flags)
    assert sorted(path.name for path in folder.iterdir()) == left


@pytest.mark.parametrize("finished", [True, False])
def test_two_epochs_and_one_more_are_three_wherever_the_run_has_moved(small, monkeypatch, finished):
    """Other places, other workers, more epochs; what was scored with the shorter run is gone."""
    small_machines("fan")
    whole = results(run("--epochs", "3", "--warmup", "0"))
    shutil.rmtree("runs")
    with monkeypatch.context() as patch:
        if not finished:
            interrupt_after_epoch(patch, 2)
        try:
            run("--epochs", "2" if finished else "4", "--warmup", "0")
        except SystemExit as stop:
            assert stop.code == 130 and not finished
    Path("runs/fan/anomaly_score_fan_section_00_test.csv").touch()
    for place in ("runs/fan", "data", "ast.pth"):
        shutil.move(place, f"moved-{Path(place).name}")
    more = [
        "--run",
        "moved-fan",
        "--data",
        "moved-data",
        "--weights",
        "moved-ast.pth",
        "--workers",
        "1",
    ]
    run("--epochs", "3", "--warmup", "0", *more)
    assert results(Path("moved-fan")) == whole
    assert not Path("moved-fan/anomaly_score_fan_section_00_test.csv").exists()


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--lr", "0.5"], "lr was 0.001, is 0.5"),
        (["--rank", "8"], "alpha was 64.0, is 8.0; rank was 64, is 8"),
        (["--layers", "1"], r"layers was None, is [1]"),
        (["--seed", "3"], "seed was 0, is 3"),
        (["--warmup", "0"], "warmup was 360, is 0"),
        (["--epochs", "1"], "has 2 epochs already, --epochs asks for 1"),
    ],
)
def test_continuing_with_other_arguments_is_refused(small, monkeypatch, capsys, flags, difference):
    small_machines("fan")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 2)
        run()
    assert f"{difference}" in error_of(capsys, *flags)


def test_continuing_with_other_clips_or_weights_is_refused(small, monkeypatch, capsys):
    small_machines("fan")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 1)
        run()
    for clip in list_clips("data", "fan", "train")[-2:]:
        clip.path.unlink()
    message = error_of(capsys)
    assert "clips was {'fan': 7}, is {'fan': 5}" in message and "classes was" in message
    torch.manual_seed(5)
    train.save(Path("ast.pth"), backbone.AST(64, 2, 1).state_dict())
    assert "weights_sha256 was" in error_of(capsys)


@pytest.mark.parametrize(
    "flags",  # batches of 4 and 3 clips; the fourth call fails, in the second epoch
    [["--batch-size", "4"], ["--batch-size", "7", "--micro-batch", "3"]],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    small, monkeypatch, capsys, flags
):
    small_machines("fan")
    logits, calls = ArcFace.logits, []

    def explode(self, cos, labels):
        calls.append(1)
        return logits(self, cos, labels) * (math.nan if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(ArcFace, "logits", explode)
        message = error_of(capsys, *flags, "--epochs", "3")
    assert "the loss is not finite; last.pt holds the epochs before; take a smaller --lr" in message
    assert (
        backbone.load_file("runs/fan/last.pt")["epoch"] == 1
        and not Path("runs/fan/adapter.pt").exists()
    )


def test_weights_that_are_not_finite_are_not_kept(small, monkeypatch, capsys):
    """The very last step of an epoch spoils them: no loss has seen it."""
    small_machines("fan")
    step, calls = torch.optim.AdamW.step, []

    def spoil(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spoil)
        assert "a weight is not finite; last.pt" in error_of(capsys)
    assert backbone.load_file("runs/fan/last.pt")["epoch"] == 1


def test_a_write_that_fails_leaves_the_last_good_checkpoint(small, monkeypatch, capsys):
    small_machines("fan")
    whole = results(run("--epochs", "3"))
    shutil.rmtree("runs")
    torch_save, calls = torch.save, []

    def fail(state, file):
        calls.append(1)
        torch_save(state, file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        message = error_of(capsys, "--epochs", "3")
    assert (
        "cannot write runs/fan/last.pt: No space left on device; the file is as it was before"
        in message
    )
    assert backbone.load_file("runs/fan/last.pt")["epoch"] == 1 and not list(
        Path("runs/fan").glob("*.part")
    )
    assert results(run("--epochs", "3")) == whole


def test_a_checkpoint_is_written_without_a_second_copy_in_memory(tmp_path):
    """200 MB of tensors: the process grows by less than 60 MB while they are saved."""

    def saving(argv):
        state = {"a": torch.ones(50_000_000)}
        train.save(tmp_path / "small.pt", {"a": torch.ones(10)})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train.save(tmp_path / "large.pt", state)
        os._exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 60 * 1024)

    assert in_a_process(saving, []) == 0


def test_training_and_scoring_killed_at_random_moments_end_with_the_same_bytes(small):
    """kill -9, five times in training and three times in scoring, each time continuing with the
    same command."""
    small_machines("fan", n_train=14, n_test=8)
    rng, folder = random.Random(0), Path("runs/fan")
    training = (train.main, [*COMMAND, "--epochs", "6"])
    resuming = (train.main, training[1])
    scoring = (score.main, ["--machine", "fan", "--device", "cpu"])

    def seconds(command) -> float:
        start = time.perf_counter()
        assert in_a_process(*command) == 0
        return time.perf_counter() - start

    whole_training, whole_scoring = seconds(training), seconds(scoring)
    names = ["adapter.pt", "log.csv", "embeddings_fan.npz", "report_fan.csv"]
    names += [f"{kind}_fan_section_00_test.csv" for kind in ("anomaly_score", "decision_result")]
    whole = {name: (folder / name).read_bytes() for name in names}
    shutil.rmtree("runs")
    ends = [
        in_a_process(*resuming, kill_after=rng.uniform(0.05, 0.5) * whole_training)
        for _ in range(5)
    ]
    assert in_a_process(*resuming) == 0
    ends += [
        in_a_process(*scoring, kill_after=rng.uniform(0.1, 0.9) * whole_scoring) for _ in range(3)
    ]
    assert in_a_process(*scoring) == 0
    assert ends.count(-signal.SIGKILL) >= 5
    assert {name: (folder / name).read_bytes() for name in names} == whole


CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
import backbone, data, train
data.N_FRAMES = train.N_FRAMES = backbone.N_FRAMES = 96
data.WINDOW, data.fit_frames.__defaults__ = data.FRAME + 95 * data.HOP, (96,)
train.main(sys.argv[2:])
"""


def test_ctrl_c_ends_with_one_line_that_says_how_to_continue(small):
    small_machines("fan", n_train=14)
    flags = [*COMMAND, "--epochs", "500"]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("runs/fan/last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    again = f"python train.py {' '.join(flags)}"
    assert err.splitlines()[-1] == f"train.py: interrupted; {again} continues after the last epoch"
    assert "Traceback" not in err


def test_a_killed_worker_ends_in_a_line_that_names_the_way_out(small, monkeypatch, capsys):
    """What a bus error for want of shared memory looks like from outside."""
    small_machines("fan")
    monkeypatch.setattr(
        data.Windows, "__getitem__", lambda self, item: os.kill(os.getpid(), signal.SIGBUS)
    )
    message = error_of(capsys, "--workers", "1")
    assert (
        "want of shared memory" in message
        and "--shm-size=1g" in message
        and "--workers 0" in message
    )


def test_two_workers_read_for_a_gpu_with_one_batch_each_in_waiting():
    parse = train.make_parser().parse_args
    assert train.workers_for(parse(["--machine", "fan", "--device", "cpu"])) == 0
    assert train.workers_for(parse(["--machine", "fan", "--device", "cuda"])) == min(
        2, os.cpu_count()
    )
    assert train.workers_for(parse(["--machine", "fan", "--device", "cuda", "--workers", "9"])) == 9
    assert data.Loader([], [], 1, 2, torch.device("cpu")).loader.prefetch_factor == 1


# ---------------------------------------------------------------- loading


def test_a_run_is_loaded_as_it_was_trained(small):
    small_machines("fan")
    model, args = load_run(
        run("--rank", "4", "--alpha", "6", "--targets", "v", "fc1", "--layers", "1")
    )
    state = backbone.load_file("runs/fan/adapter.pt")
    assert args.layers == [1] and sum(name.startswith("ast.") for name in state) == 2 * 2
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert model.ast.blocks[1].attn.v.scaling == 1.5


def change_args(**changes) -> None:
    path = Path("runs/fan/args.json")
    record = json.loads(path.read_text())
    record["args"] |= changes
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rank": 8},
            "another rank or size was trained: ast.blocks.0.attn.q.A is (64, 64), not (8, 64)",
        ),
        (
            {"targets": ["q", "k"]},
            "something else was trained: 8 names differ, ast.blocks.0.attn.k.A for one",
        ),
        (
            {"layers": [0]},
            "something else was trained: 4 names differ, ast.blocks.1.attn.q.A for one",
        ),
        ({"tuning": "full"}, "something else was trained"),
        (
            {"embedding": 100},
            "another rank or size was trained: linear.weight is (256, 128), not (100, 128)",
        ),
        (
            {"pooling": "cls"},
            "something else was trained: 4 names differ, pooling.hidden_of_context.weight for one",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(small, changes, message):
    small_machines("fan")
    folder = run()
    change_args(**changes)
    with pytest.raises(ValueError) as error:
        load_run(folder)
    assert f"adapter.pt does not fit args.json: {message}" in str(error.value) and "\n" not in str(
        error.value
    )


def test_other_weights_than_trained_on_are_refused(small):
    small_machines("fan")
    folder = run()
    train.save(Path("other.pth"), backbone.AST(64, 2, 1).state_dict())
    with pytest.raises(
        ValueError, match=r"was trained on weights [0-9a-f]{12}, other.pth is [0-9a-f]{12}"
    ):
        load_run(folder, "other.pth")
    Path("ast.pth").rename("moved.pth")
    assert load_run(folder, "moved.pth")[1].weights == "moved.pth", (
        "the place may differ, the content may not"
    )


def test_a_damaged_or_hostile_adapter_is_refused(small):
    small_machines("fan")
    folder = run()
    content = (folder / "adapter.pt").read_bytes()
    (folder / "adapter.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"adapter\.pt.*cannot be loaded"):
        load_run(folder)
    torch.save({"linear.bias": Path("x")}, folder / "adapter.pt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_run(folder)


# ---------------------------------------------------------------- what a GPU does, without one


def test_a_step_in_bfloat16_keeps_float32_where_it_matters(small, monkeypatch):
    """The autocast that a GPU has, on the CPU: every trained tensor, its gradient and the loss are
    float32, the loss is within 1 % of float32's, and three epochs lower it."""
    small_machines("fan")
    flags = ["--time-mask", "0", "--freq-mask", "0", "--epochs", "3", "--lr", "0.003"]
    in_float32 = log_of(run(*flags))
    autocast, dtypes = torch.autocast, set()

    def always(device, dtype, enabled):
        assert (device, dtype, enabled) == ("cpu", torch.bfloat16, False)
        return autocast(device, dtype)

    logits, step = ArcFace.logits, torch.optim.AdamW.step

    def seen_logits(self, cos, labels):
        out = logits(self, cos, labels)
        dtypes.update({("cos", cos.dtype), ("logits", out.dtype)})
        return out

    def seen_step(self, *args):
        for group in self.param_groups:
            dtypes.update((kind, x.dtype) for p in group["params"] for kind, x in
                          (("parameter", p), ("gradient", p.grad)))  # fmt: skip
        return step(self, *args)

    attention, inside = F.scaled_dot_product_attention, set()

    def seen_attention(q, k, v):
        inside.update({q.dtype, k.dtype, v.dtype})
        return attention(q, k, v)

    monkeypatch.setattr(torch, "autocast", always)
    monkeypatch.setattr(ArcFace, "logits", seen_logits)
    monkeypatch.setattr(torch.optim.AdamW, "step", seen_step)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen_attention)
    log = log_of(run(*flags, "--overwrite"))
    assert dtypes == {(kind, torch.float32) for kind in ("cos", "logits", "parameter", "gradient")}
    assert inside == {torch.bfloat16}
    assert log[0]["loss"] != in_float32[0]["loss"]
    assert log[0]["loss"] == pytest.approx(in_float32[0]["loss"], rel=0.01)
    assert log[2]["loss"] < log[0]["loss"]


def test_compile_keeps_a_static_graph_for_full_batches(small, monkeypatch):
    """Batches of 3, 3 and 2 clips in two epochs: one graph for 3, one for 2, and no other."""
    small_machines("fan", n_train=8)
    without = log_of(run("--batch-size", "3"))
    graphs, calls, compile_ = [], [], torch.nn.Module.compile

    def backend(graph, inputs):
        number = len(graphs)
        graphs.append(graph)

        def call(*arguments):
            sizes = [len(x) for x in arguments if x.shape[1:] == (96, 128)]
            calls.append((*sizes, number))
            return graph.forward(*arguments)

        return call

    def counted(self, **options):
        compile_(self, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    torch._dynamo.reset()
    log = log_of(run("--batch-size", "3", "--compile", "--overwrite"))
    assert calls == [(3, 0), (3, 0), (2, 1)] * 2
    for row, other in zip(log, without):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_compile_without_a_compiler_says_what_to_install(small):
    small_machines("fan")

    def without_compiler(argv):
        os.environ["PATH"] = str(Path("nowhere"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path("cache").resolve())
        sys.stderr = Path("err").open("w", buffering=1)  # noqa: SIM115
        train.main(argv)

    assert in_a_process(without_compiler, [*COMMAND, "--compile"]) == 2
    assert Path("err").read_text().splitlines()[-1].startswith("train.py: error: --compile needs a")


@pytest.mark.parametrize("asked", ["", "1"])
def test_asd_traceback_prints_the_whole_of_an_error(small, monkeypatch, capsys, asked):
    small_machines("fan")
    monkeypatch.setenv("ASD_TRACEBACK", asked)
    with pytest.raises(SystemExit):
        run("--dropout", "1")
    err = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in err and "in add_lora" in err) == bool(asked)
    assert err.splitlines()[-1].startswith("train.py: error: LoRA dropout must be")


def test_what_was_trained_in_bfloat16_is_not_continued_in_float32(small, capsys):
    """The record says which it was; cuda and cuda:1 are the same, cuda and cpu are not."""
    small_machines("fan")
    run()
    record = json.loads(Path("runs/fan/args.json").read_text())
    assert record["args"]["precision"] == "float32"
    change_args(precision="bfloat16", device="cuda:1")
    assert "precision was bfloat16, is float32" in error_of(capsys, "--epochs", "3")
    change_args(precision="float32", device="cuda:1")
    run("--epochs", "3")


def test_a_second_training_in_one_folder_is_refused(small, capsys):
    small_machines("fan")
    lock = "import fcntl, sys, time; f = open('runs/fan/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    run()
    held = subprocess.Popen(
        [sys.executable, "-c", lock + "; print('held', flush=True); time.sleep(99)"],
        stdout=subprocess.PIPE,
    )
    assert held.stdout.readline() == b"held\n"
    before = results(Path("runs/fan"))
    assert "another train.py is at work in runs/fan" in error_of(capsys, "--epochs", "3")
    assert results(Path("runs/fan")) == before
    held.kill()
    held.wait()
    run("--epochs", "3")


def test_a_disk_that_fills_within_pytorchs_writer_is_one_line(small, capsys):
    """A limit on the size of files stands for the full disk: last.pt does not fit."""
    small_machines("fan")

    def limited(argv):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        sys.stderr = Path("err").open("w", buffering=1)  # noqa: SIM115
        train.main(argv)

    assert in_a_process(limited, COMMAND) == 2
    message = Path("err").read_text().splitlines()[-1]
    assert "cannot write runs/fan/last.pt" in message and "the file is as it was" in message
    assert not list(Path("runs/fan").glob("*.part")) and not Path("runs/fan/last.pt").exists()


# ---------------------------------------------------------------- on a GPU


@needs_cuda
def test_training_on_a_gpu_agrees_with_the_cpu(small):
    """bf16 against float32: the first losses agree within 2 %."""
    small_machines("fan")
    losses = {}
    for device in ("cpu", "cuda"):
        log = log_of(run("--overwrite", "--device", device, "--time-mask", "0", "--freq-mask", "0"))
        losses[device] = [row["loss"] for row in log]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


@needs_cuda
@pytest.mark.parametrize(
    "flags",
    [
        ["--tuning", "full"],
        ["--tuning", "frozen"],
        ["--compile"],
        ["--micro-batch", "2"],
        ["--workers", "0"],
        ["--workers", "4"],
        ["--device", "cuda:0"],
    ],
)
def test_every_way_to_train_runs_on_a_gpu(small, flags):
    small_machines("fan")
    assert all(math.isfinite(row["loss"]) for row in log_of(run("--device", "cuda", *flags)))


@needs_cuda
def test_bf16_embeddings_point_where_float32_ones_do(small):
    small_machines("fan")
    model, _ = load_run(run())
    wave = read_wav(list_clips("data", "fan", "test")[0].path)[None]
    x = train.spectrogram(wave, torch.tensor([wave.shape[1]]))
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cuda", torch.bfloat16):
            embedding = model.cuda()(x.cuda()).cpu()
    assert F.cosine_similarity(embedding, expected).min() >= 0.999


@needs_cuda
def test_a_run_resumes_on_a_gpu(small, monkeypatch):
    small_machines("fan")
    whole = [row["loss"] for row in log_of(run("--device", "cuda"))]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 1)
        run("--device", "cuda", "--overwrite")
    resumed = log_of(run("--device", "cuda"))
    assert [row["loss"] for row in resumed] == pytest.approx(whole, rel=0.01)


@needs_cuda
def test_scoring_on_a_gpu_equals_the_cpu(small):
    """Both in float32: embeddings to 1e-4, convolutions included (no TF32)."""
    small_machines("fan")
    model, _ = load_run(run())
    train.check_device("cuda")
    clips = list_clips("data", "fan", "test")
    expected, found = embed_all(model, clips), embed_all(model.cuda(), clips)
    assert_equal_within(1e-4, "embeddings on a GPU against the CPU", found, expected)
