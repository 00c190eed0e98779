"""train.py: ArcFace, the loop, and what happens to a run that is interrupted or asked for something else."""

import csv
import hashlib
import io
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_equal_within, in_a_process, needs_cuda, serve, small_demo

import backbone
import score
import train
from data import HOP, list_clips, read_wav
from train import ArcFace, draw_batches, load_run

# ---------------------------------------------------------------- ArcFace


def test_arcface_worked_example():
    """Two class centres at right angles, an embedding at 60° to the first (the true one): cos θ = (0.5, 0.866).

    With m = 30° the true class gets cos 90° = 0, the other keeps 0.866; s = 2 gives the logits (0, 1.732),
    and the loss is ln(1 + e^1.732) = 1.8950. Without the margin it would be ln(1 + e^0.732) = 1.1247.
    """
    arcface = ArcFace(dim=2, classes=2, scale=2.0, margin=math.pi / 6)
    with torch.no_grad():
        arcface.centres.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))  # only their directions count
    embedding = torch.tensor([[0.5, math.sqrt(3) / 2]])
    logits = arcface(embedding, torch.tensor([0]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, math.sqrt(3)]]), atol=1e-6, rtol=0)
    assert F.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(1.8950, abs=1e-4)
    assert arcface.classify(embedding).tolist() == [1]


ANGLES = [0.0, 1e-4, 1e-3, 0.01, 0.3, 1.0, math.pi / 2, 2.5, math.pi - 0.21, math.pi - 0.19, math.pi - 0.01,
          math.pi - 1e-3, math.pi - 1e-4, math.pi]  # fmt: skip


@pytest.mark.parametrize("theta", ANGLES)
def test_arcface_equals_an_independent_float64_computation_with_its_gradients(theta):
    """cos(θ + m) by way of the angle itself, in float64; beyond π - m the straight line cos θ - m sin m."""
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
    angle = torch.atan2(e[0, 1] * c[0, 0] - e[0, 0] * c[0, 1], (e[0] * c[0]).sum())  # exact at 0 and π too
    easy = angle + margin <= math.pi
    true = torch.cos(angle + margin) if easy else torch.cos(angle) - margin * math.sin(margin)
    expected = scale * torch.stack([true, (e[0] * c[1]).sum()])
    (torch.logsumexp(expected, 0) - expected[0]).backward()

    assert_equal_within(2e-3, f"ArcFace logits (±30) at {theta:.4g} rad against float64", logits[0], expected)
    assert ours.grad.isfinite().all() and arcface.centres.grad.isfinite().all()
    if 1e-3 <= theta <= math.pi - 1e-3:  # at 0 and π the slope along the circle is cut off, see the next test
        torch.testing.assert_close(ours.grad.double(), x.grad, atol=2e-2, rtol=2e-3)
        torch.testing.assert_close(arcface.centres.grad.double(), w.grad, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_arcface_is_finite_exactly_at_and_opposite_a_centre(sign):
    arcface = ArcFace(3, 2, 30.0, 0.2)
    embedding = (sign * F.normalize(arcface.centres.detach()[:1])).requires_grad_()
    logits = arcface(embedding, torch.tensor([0]))
    logits.sum().backward()
    assert logits.isfinite().all() and embedding.grad.isfinite().all() and arcface.centres.grad.isfinite().all()


def test_arcface_falls_with_the_angle_all_the_way_to_pi():
    theta = torch.linspace(0, math.pi, 1000, dtype=torch.float64)
    arcface = ArcFace(2, 2, 30.0, 0.5).double()
    arcface.centres.data.copy_(torch.eye(2))
    logits = arcface(torch.stack([theta.cos(), theta.sin()], dim=1), torch.zeros(1000, dtype=torch.int64))[:, 0]
    assert (logits.diff() < 0).all()


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


def test_an_epoch_has_every_clip_once_in_an_order_of_its_own():
    lengths = [160000] * 10 + [192000] * 11
    one, two = draw_batches(lengths, 8, seed=1), draw_batches(lengths, 8, seed=2)
    assert [len(batch) for batch in one] == [8, 8, 5]
    for epoch in (one, two):
        assert sorted(i for batch in epoch for i, _ in batch) == list(range(21))
    assert one != two and one == draw_batches(lengths, 8, seed=1)


def test_windows_of_long_clips_are_drawn_from_all_places_on_the_hop():
    """12 s are 1198 frames: the first frame is uniform on {0..174}; a 10 s clip has no choice."""
    starts = [start for seed in range(400) for batch in draw_batches([192000], 1, seed) for _, start in batch]
    assert all(start % HOP == 0 and 0 <= start <= 174 * HOP for start in starts)
    assert len(set(starts)) > 140 and np.mean(starts) / HOP == pytest.approx(87, abs=4 * 50.5 / 20)
    assert all(start == 0 for batch in draw_batches([160000] * 9, 4, 0) for _, start in batch)


# ---------------------------------------------------------------- runs


def run(*flags: str) -> Path:
    """Train on the small demo in this process."""
    train.main(["--machine", "fan", "--demo", "--epochs", "2", *flags])
    return Path("runs/demo-fan")


def error_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and err.startswith("train.py: error: ")
    return err


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter.pt", "log.csv")}


def test_training_learns_to_tell_the_classes_apart(small):
    small_demo("fan", n_train=14)
    run("--epochs", "14", "--time-mask", "0", "--freq-mask", "0")
    with open("runs/demo-fan/log.csv") as file:
        log = list(csv.DictReader(file))
    assert len(log) == 14 and float(log[-1]["loss"]) < 0.6 * float(log[0]["loss"])
    assert float(log[-1]["accuracy"]) >= 0.7


@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_each_tuning_changes_exactly_what_it_says(small, tuning, capsys):
    small_demo("fan")
    model, args = load_run(run("--tuning", tuning, "--lr", "0.01"))
    public = train.load_ast(args.weights).state_dict()
    base = {name.replace(".base.", "."): tensor for name, tensor in model.ast.state_dict().items()}
    unchanged = all(torch.equal(base[name], tensor) for name, tensor in public.items())
    assert unchanged == (tuning != "full")
    adapters = [name for name in base if name[-2:] in (".A", ".B")]
    assert len(adapters) == (2 * 2 * 12 if tuning == "lora" else 0)
    assert all(base[name].abs().sum() > 0 for name in adapters), "every B has moved away from zero"
    count = {"lora": 24 * 64 * 128, "full": sum(t.numel() for t in public.values()), "frozen": 0}[tuning]
    # on top: pooling 64·128 + 128 + 128·128 + 128·64 + 64, linear 128·256 + 256, four class centres of 256
    assert f"{count + 32_960 + 33_024 + 1_024:,} trainable parameters" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(small):
    small_demo("fan")
    first = results(run())
    assert results(run("--overwrite")) == first
    assert results(run("--overwrite", "--seed", "1"))["adapter.pt"] != first["adapter.pt"]


def test_workers_do_not_change_the_result(small):
    small_demo("fan")
    first = results(run())
    assert results(run("--overwrite", "--workers", "2")) == first


def test_accumulated_batches_make_the_step_of_one_large_batch(small, monkeypatch):
    """One step of 6 clips or of 3 x 2: the same gradient, seen through one step of plain gradient descent."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    small_demo("fan", n_train=6)
    once = ["--epochs", "1", "--time-mask", "0", "--freq-mask", "0", "--warmup", "0"]  # no randomness between batches
    large, _ = load_run(run("--batch-size", "6", *once))
    small_, _ = load_run(run("--batch-size", "2", "--accumulate", "3", "--overwrite", *once))
    for a, b in zip(large.parameters(), small_.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    with open("runs/demo-fan/log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1"]


def test_warm_up_is_linear_and_then_constant(small):
    small_demo("fan")
    run("--warmup", "6", "--lr", "0.006", "--batch-size", "4", "--epochs", "4")
    with open("runs/demo-fan/log.csv") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([0.002, 0.004, 0.006, 0.006])


def test_the_record_of_a_run_tells_how_it_was_made(small):
    small_demo("fan")
    record = json.loads((run() / "args.json").read_text())
    assert record["args"]["rank"] == 64 and record["args"]["alpha"] == 64.0 and record["args"]["seed"] == 0
    assert record["classes"] == ["fan/spd_1", "fan/spd_2", "fan/spd_3", "fan/spd_4"] and record["clips"] == {"fan": 7}
    assert record["versions"]["torch"] == torch.__version__ and len(record["weights_sha256"]) == 64


def test_one_class_alone_is_refused_with_the_ways_out(small, capsys):
    small_demo("fan")
    for i, clip in enumerate(list_clips("data/demo", "fan", "train")):
        clip.path.rename(clip.path.with_name(f"recording {i}.wav"))
    assert "train jointly with other machines" in (message := error_of(capsys)) and "--pretrained" in message
    assert not Path("runs").exists()


def test_missing_data_and_weights_are_fetched_first(small, server, monkeypatch, capsys):
    """Both from the loopback address, with their checksums; then the run goes to its end."""
    small_demo("fan")
    train.prepare_demo(["fan"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in Path("data/demo/fan").rglob("*.wav"):
            file.write(path, path.relative_to("data/demo"))
    serve(server, monkeypatch, 7882613, "dev_fan", buffer.getvalue())
    server.files["/model.safetensors"] = content = Path("data/demo/ast.pth").read_bytes()
    for module in (backbone, train):
        monkeypatch.setattr(module, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    train.main(["--machine", "fan", "--epochs", "1", "--device", "cpu"])
    assert Path("runs/fan/adapter.pt").exists() and len(server.requests) == 2
    assert "weights/ast.safetensors: the public AudioSet AST" in capsys.readouterr().out


# ---------------------------------------------------------------- interruptions


def test_a_finished_run_is_not_overwritten_unasked(small, capsys):
    small_demo("fan")
    before = results(run())
    assert "holds a finished run; --overwrite replaces it" in error_of(capsys)
    run("--resume")
    assert "finished already" in capsys.readouterr().out
    assert results(Path("runs/demo-fan")) == before


def test_results_without_a_run_are_not_overwritten_either(small, capsys):
    small_demo("fan")
    Path("runs/demo-fan").mkdir(parents=True)
    Path("runs/demo-fan/anomaly_score_fan_section_00_test.csv").write_text("a.wav,1\n")
    assert "holds results of no known run" in error_of(capsys)
    assert "holds results of no known run" in error_of(capsys, "--resume")


def interrupt_after_epoch(monkeypatch, epoch: int) -> None:
    """As if the power went right after that epoch's checkpoint."""
    write_log = train.write_log

    def stop(path, rows):
        write_log(path, rows)
        if len(rows) == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "write_log", stop)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_resumed_run_ends_with_the_same_bytes(small, monkeypatch, capsys, tuning):
    small_demo("fan")
    flags = ["--epochs", "3", "--tuning", tuning, "--dropout", "0.1"]
    whole = results(run(*flags))
    shutil.rmtree("runs")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt_after_epoch(patch, 1)
        run(*flags)
    assert stop.value.code == 130
    assert (
        f"python train.py --machine fan --demo --epochs 2 {' '.join(flags)} --resume goes on" in capsys.readouterr().err
    )
    assert "holds an unfinished run; --resume goes on" in error_of(capsys, *flags)
    assert results(run(*flags, "--resume")) == whole


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--lr", "0.5"], "lr was 0.001, is 0.5"),
        (["--rank", "8"], "alpha was 64.0, is 8.0; rank was 64, is 8"),
        (["--layers", "8-11"], r"layers was None, is [8, 9, 10, 11]"),
        (["--seed", "3"], "seed was 0, is 3"),
        (["--epochs", "9"], "epochs was 2, is 9"),
    ],
)
def test_resuming_with_other_arguments_is_refused(small, monkeypatch, capsys, flags, difference):
    small_demo("fan")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 1)
        run()
    assert f"cannot resume runs/demo-fan: {difference}" in error_of(capsys, "--resume", *flags)


def test_resuming_with_other_clips_or_weights_is_refused(small, monkeypatch, capsys):
    small_demo("fan")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 1)
        run()
    for clip in list_clips("data/demo", "fan", "train")[-3:]:
        clip.path.unlink()
    message = error_of(capsys, "--resume")
    assert "clips was {'fan': 7}, is {'fan': 4}" in message and "classes was" in message
    torch.manual_seed(5)
    train.save(Path("data/demo/ast.pth"), train.AST(64, 12, 1).state_dict())
    assert "weights_sha256 was" in error_of(capsys, "--resume")


@pytest.mark.parametrize(
    ("flags", "step"),
    [  # batches of 4 and 3 clips, the fourth one fails: that is in the second epoch
        (["--batch-size", "4"], "step 4 (learning rate 0.0008)"),
        (["--batch-size", "4", "--accumulate", "3"], "step 2 (learning rate 0.0004)"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(small, monkeypatch, capsys, flags, step):
    small_demo("fan")
    forward, calls = ArcFace.forward, []

    def explode(self, embedding, labels):
        calls.append(1)
        return forward(self, embedding, labels) * (math.nan if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(ArcFace, "forward", explode)
        message = error_of(capsys, *flags, "--epochs", "3")
    assert f"the loss is not finite at {step}; runs/demo-fan/last.pt holds epoch 1" in message
    assert train.load_file("runs/demo-fan/last.pt")["epoch"] == 1 and not Path("runs/demo-fan/adapter.pt").exists()


def test_a_write_that_fails_leaves_the_last_good_checkpoint(small, monkeypatch, capsys):
    small_demo("fan")
    whole = results(run("--epochs", "3"))
    shutil.rmtree("runs")
    write_file, calls = train.write_file, []

    def fail(path, content):
        calls.append(path.name)
        if calls.count("last.pt") == 2:
            raise OSError(f"cannot write {path}: No space left on device; the file is as it was before")
        write_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_file", fail)
        assert "No space left on device" in error_of(capsys, "--epochs", "3")
    assert train.load_file("runs/demo-fan/last.pt")["epoch"] == 1
    assert results(run("--epochs", "3", "--resume")) == whole


def test_training_and_scoring_killed_at_random_moments_end_with_the_same_bytes(small):
    """kill -9, five times in training and three times in scoring, each time going on with the same command."""
    small_demo("fan", n_train=14, n_test=8)
    rng, folder = random.Random(0), Path("runs/demo-fan")
    training = (train.main, ["--machine", "fan", "--demo", "--epochs", "6"])
    resuming = (train.main, [*training[1], "--resume"])
    scoring = (score.main, ["--machine", "fan", "--demo"])

    assert [in_a_process(*command) for command in (training, scoring)] == [0, 0]
    names = ["adapter.pt", "log.csv", "embeddings_fan.npz", "nearest_fan.csv"]
    names += [f"{kind}_fan_section_00_test.csv" for kind in ("anomaly_score", "decision_result")]
    whole = {name: (folder / name).read_bytes() for name in names}
    shutil.rmtree("runs")
    ends = [in_a_process(*resuming, kill_after=rng.uniform(0.05, 1)) for _ in range(5)]
    assert in_a_process(*resuming) == 0
    ends += [in_a_process(*scoring, kill_after=rng.uniform(0.05, 0.4)) for _ in range(3)]
    assert in_a_process(*scoring) == 0
    assert ends.count(-signal.SIGKILL) >= 6
    assert {name: (folder / name).read_bytes() for name in names} == whole


CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
import backbone, data, train
data.N_FRAMES = train.N_FRAMES = backbone.N_FRAMES = 96
data.WINDOW, data.fit_frames.__defaults__ = data.FRAME + 95 * data.HOP, (96,)
train.main(sys.argv[2:])
"""


def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(small):
    small_demo("fan", n_train=14)
    command = [sys.executable, "-c", CHILD, str(ROOT), "--machine", "fan", "--demo", "--epochs", "500"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (Path("runs/demo-fan/last.pt")).exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    command = "python train.py --machine fan --demo --epochs 500 --resume"
    assert err.splitlines()[-1] == f"train.py: interrupted; {command} goes on after the last whole epoch"
    assert "Traceback" not in err


# ---------------------------------------------------------------- loading


def test_a_run_is_loaded_as_it_was_trained(small):
    small_demo("fan")
    model, args = load_run(run("--rank", "4", "--alpha", "6", "--targets", "v", "fc1", "--layers", "8-11"))
    state = train.load_file("runs/demo-fan/adapter.pt")
    assert args.layers == [8, 9, 10, 11] and len(state["lora"]) == 2 * 2 * 4
    assert all(torch.equal(model.ast.state_dict()[name], tensor) for name, tensor in state["lora"].items())
    assert model.ast.blocks[8].attn.v.scaling == 1.5


def change_args(**changes) -> None:
    path = Path("runs/demo-fan/args.json")
    record = json.loads(path.read_text())
    record["args"] |= changes
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "adapter of another rank"),
        ({"targets": ["q", "k"]}, "adapter of other layers or targets"),
        ({"layers": [0, 1]}, "adapter of other layers or targets"),
        ({"tuning": "full"}, "another --tuning"),
        ({"embedding": 100}, "another --pooling or size"),
        ({"pooling": "cls"}, "another --pooling or size"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(small, changes, message):
    small_demo("fan")
    folder = run()
    change_args(**changes)
    with pytest.raises(ValueError, match=message) as error:
        load_run(folder)
    assert "\n" not in str(error.value)


def test_other_weights_than_trained_on_are_refused(small):
    small_demo("fan")
    folder = run()
    train.save(Path("other.pth"), train.AST(64, 12, 1).state_dict())
    with pytest.raises(ValueError, match=r"was trained on weights [0-9a-f]{12}, other.pth is [0-9a-f]{12}"):
        load_run(folder, "other.pth")
    Path("data/demo/ast.pth").rename("moved.pth")
    assert load_run(folder, "moved.pth")[1].weights == "moved.pth", "the place may differ, the content may not"


def test_a_damaged_or_hostile_adapter_is_refused(small):
    small_demo("fan")
    folder = run()
    content = (folder / "adapter.pt").read_bytes()
    (folder / "adapter.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"adapter\.pt.*cannot be loaded"):
        load_run(folder)
    torch.save({"head": Path("x")}, folder / "adapter.pt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_run(folder)


# ---------------------------------------------------------------- on a GPU


@needs_cuda
def test_training_on_a_gpu_agrees_with_the_cpu(small):
    """bf16 against float32: the first losses agree within 2 %."""
    small_demo("fan")
    losses = {}
    for device in ("cpu", "cuda"):
        run("--overwrite", "--device", device, "--time-mask", "0", "--freq-mask", "0")
        with open("runs/demo-fan/log.csv") as file:
            losses[device] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


@needs_cuda
def test_bf16_embeddings_point_where_float32_ones_do(small):
    small_demo("fan")
    model, _ = load_run(run())
    wave = read_wav(list_clips("data/demo", "fan", "test")[0].path)[None]
    x = train.spectrogram(wave, torch.tensor([wave.shape[1]]))
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cuda", torch.bfloat16):
            embedding = model.cuda()(x.cuda()).cpu()
    assert F.cosine_similarity(embedding, expected).min() >= 0.999


@needs_cuda
def test_a_run_resumes_on_a_gpu(small, monkeypatch):
    small_demo("fan")

    def losses(*flags):
        run("--device", "cuda", *flags)
        with open("runs/demo-fan/log.csv") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    whole = losses()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after_epoch(patch, 1)
        run("--device", "cuda", "--overwrite")
    assert losses("--resume") == pytest.approx(whole, rel=0.01)


@needs_cuda
def test_scoring_on_a_gpu_agrees_with_the_cpu(small):
    small_demo("fan")
    model, _ = load_run(run())
    clips = list_clips("data/demo", "fan", "test")
    expected = torch.from_numpy(score.embed(model.eval(), clips, batch_size=4))
    found = torch.from_numpy(score.embed(model.cuda(), clips, batch_size=4))
    assert F.cosine_similarity(found, expected).min() >= 0.999
