"""train.py: ArcFace, the whole loop against a plain one, and runs that are interrupted or moved."""

import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CHILD,
    FLAGS,
    ROOT,
    assert_equal_within,
    embed_all,
    error_of,
    lively_ast,
    needs_cuda,
    rows_of,
    small_machines,
    write_ast,
    write_hums,
)

import backbone
import data
import evaluate
import score
import train
from data import InputError, list_clips
from train import ArcFace, load_run


def test_arcface_worked_example():
    """Two class centres at right angles, an embedding at 60° to the first (the true one): cos θ =
    (0.5, 0.866). With m = 30° the true class gets cos 90° = 0, the other keeps 0.866; s = 2 gives
    the logits (0, 1.732), and the loss is ln(1 + e^1.732) = 1.8950.
    """
    arcface = ArcFace(dim=2, classes=2, scale=2.0, margin=math.pi / 6)
    with torch.no_grad():
        arcface.centres.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))  # only their directions count
    embedding = torch.tensor([[0.5, math.sqrt(3) / 2]])
    logits = arcface(embedding, torch.tensor([0]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, math.sqrt(3)]]), atol=1e-6, rtol=0)
    assert F.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(1.8950, abs=1e-4)


ANGLES = [0.0, 1e-4, 1e-3, 0.01, 0.3, 1.0, math.pi / 2, 2.5]
ANGLES += [math.pi - theta for theta in (0.21, 0.19, 0.01, 1e-3, 1e-4, 0.0)]


@pytest.mark.parametrize("theta", ANGLES)
def test_arcface_equals_an_independent_float64_computation_with_its_gradients(theta):
    """cos(θ + m) by way of the angle itself; beyond π - m the straight line cos θ - m sin m."""
    margin, scale, other = 0.2, 30.0, 1.1  # the angle to the second centre
    raw = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float32)
    centres = torch.tensor([[1.0, 0.0], [math.cos(theta - other), math.sin(theta - other)]])
    arcface = ArcFace(2, 2, scale, margin)
    arcface.centres.data.copy_(centres)
    ours = raw.clone().requires_grad_()
    logits = arcface(F.normalize(ours), torch.tensor([0]))
    F.cross_entropy(logits, torch.tensor([0])).backward()

    x, w = raw.double().requires_grad_(), centres.double().requires_grad_()
    e, c = x / x.norm(), w / w.norm(dim=1, keepdim=True)
    angle = torch.atan2(e[0, 1] * c[0, 0] - e[0, 0] * c[0, 1], (e[0] * c[0]).sum())
    easy = angle + margin <= math.pi
    true = torch.cos(angle + margin) if easy else torch.cos(angle) - margin * math.sin(margin)
    expected = scale * torch.stack([true, (e[0] * c[1]).sum()])
    (torch.logsumexp(expected, 0) - expected[0]).backward()

    what = f"ArcFace logits (±30) at {theta:.4g} rad against float64"
    assert_equal_within(2e-3, what, logits[0], expected)
    assert ours.grad.isfinite().all() and arcface.centres.grad.isfinite().all()
    if 1e-3 <= theta <= math.pi - 1e-3:  # at 0 and π the slope along the circle is cut off
        torch.testing.assert_close(ours.grad.double(), x.grad, atol=2e-2, rtol=2e-3)
        torch.testing.assert_close(arcface.centres.grad.double(), w.grad, atol=2e-2, rtol=2e-3)


def test_a_margin_that_is_no_angle_below_a_right_one_is_refused():
    for margin in (0.0, 1.5):
        ArcFace(2, 2, 30.0, margin)
    for margin in (-0.1, math.pi / 2, 2.0):
        with pytest.raises(InputError, match="ArcFace margin must be in"):
            ArcFace(2, 2, 30.0, margin)


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
def test_training_equals_a_plain_loop(tmp_path, monkeypatch, tuning, micro_batch):
    """Five epochs of two steps, every tensor and the log. All but the keys' biases, which the
    softmax cancels: their gradient is rounding noise, of which Adam makes whole steps.
    """
    monkeypatch.chdir(tmp_path)
    write_hums(Path("data"), train_source=7)
    waves = [plain.read(path) for path in sorted(Path("data/fan/train").iterdir())]
    write_ast("ast.safetensors", lively_ast())
    public = lively_ast().state_dict()
    numbers = {"epochs": 5, "lr": 1e-5, "ast_lr": 3e-6, "warmup": 2, "rank": 4, "alpha": 6.0,
               "seed": 3, "scale": 20.0, "margin": 0.3, "weight_decay": 1.0}  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    flags += ["--time-mask=300", "--freq-mask=50", "--batch-size=4", "--tuning", tuning]
    train.main(["--machine", "fan", *FLAGS, *flags, f"--micro-batch={micro_batch}"])
    w, head, centres, log = plain.train(
        waves, [0, 1, 0, 1, 0, 1, 0], public, tuning=tuning, batch=4, masks=(300, 50), **numbers
    )
    expected = w | head | {"centres": centres}
    found = {"centres": data.load("runs/fan/last.pt")["arcface"]["centres"]}
    for name, tensor in load_run("runs/fan").model.state_dict().items():
        found[name.removeprefix("ast.").replace(".base.", ".")] = tensor
    assert found.keys() == expected.keys()
    names = [name for name in expected if not name.endswith("attn.k.bias")]
    ours, theirs = (torch.cat([x[name].flatten() for name in names]) for x in (found, expected))
    what = f"training, {tuning}, {micro_batch} of 4 at once, against a plain loop"
    assert_equal_within(1e-6, what, ours, theirs)
    moved = [name for name in public if not torch.equal(found[name], public[name])]
    assert moved == (list(public) if tuning == "full" else [])
    rows = [[float(value) for value in row] for row in rows_of("runs/fan/log.csv")[1:]]
    assert rows == [pytest.approx(line, rel=1e-5) for line in log]


COMMAND = ["--machine", "fan", *FLAGS, "--epochs", "2", "--batch-size", "4", "--lr", "1e-3"]


def run(*flags: str) -> Path:
    """Train on the small fan in this process; the last --run counts."""
    train.main([*COMMAND, "--run", "runs/fan", *flags])
    return Path(flags[flags.index("--run") + 1] if "--run" in flags else "runs/fan")


def refusal(capsys, *flags: str) -> str:
    return error_of(train.main, [*COMMAND, *flags], capsys)


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter.pt", "log.csv")}


def column(folder: Path, name: str) -> list[float]:
    header, *rows = rows_of(folder / "log.csv")
    return [float(row[header.index(name)]) for row in rows]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(full_size_fan):
    """With dropout, whose draws come between those of SpecAug; and whoever reads the clips."""
    first = results(run("--dropout", "0.1"))
    assert results(run("--dropout", "0.1", "--run", "runs/again", "--workers", "2")) == first
    assert results(run("--dropout", "0.1", "--run", "runs/other", "--seed", "1")) != first
    assert results(run("--run", "runs/without"))["adapter.pt"] != first["adapter.pt"]


def test_dropout_is_off_in_scoring(fan):
    model = load_run(run("--dropout", "0.5")).model
    clips = list_clips("data", "fan", "test")
    rows = [embed_all(model.train(), clips) for _ in range(2)]
    np.testing.assert_array_equal(*rows)


def test_warm_up_is_linear_over_its_epochs_and_then_constant(fan, monkeypatch):
    """7 clips in batches of 3: three steps an epoch. The log has the rate of each epoch's last."""
    rates, step = [], train.train_step

    def seen(model, arcface, optimizer, *more):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, arcface, optimizer, *more)

    monkeypatch.setattr(train, "train_step", seen)
    flags = ["--lr", "0.006", "--ast-lr", "0.0006", "--tuning", "full", "--batch-size", "3"]
    folder = run(*flags, "--epochs", "3", "--warmup", "2")
    assert [head for head, _ in rates] == pytest.approx(
        [0.001 * i for i in (1, 2, 3, 4, 5, 6)] + [0.006] * 3
    )
    assert [ast for _, ast in rates] == pytest.approx([head / 10 for head, _ in rates])
    assert column(folder, "lr") == pytest.approx([0.003, 0.006, 0.006])
    rates.clear()
    assert column(run(*flags, "--warmup", "0", "--run", "runs/0"), "lr") == [0.006] * 2
    assert rates == [[0.006, 0.0006]] * 6


def test_the_setting_of_a_run_stands_in_the_files_it_made(small):
    small_machines("fan", "valve")
    run("--machine", "valve", "fan", "--targets", "v", "q")
    setting = data.load("runs/fan/adapter.pt")["setting"]
    assert setting == data.load("runs/fan/last.pt")["setting"]
    assert (setting["rank"], setting["alpha"], setting["precision"]) == (64, 64.0, "float32")
    assert (setting["machine"], setting["targets"]) == (["fan", "valve"], ["q", "v"])
    assert setting["classes"][:7] == [f"fan/mode_{mode:02d}" for mode in range(7)]
    assert setting["clips"][0].startswith("fan: 7 clips, ") and len(setting["clips"]) == 2
    assert setting["weights_sha256"] == data.file_digest("ast.safetensors")
    assert not set(train.WHERE) & set(setting)
    made = [".lock", "adapter.pt", "last.pt", "log.csv"]
    assert sorted(path.name for path in Path("runs/fan").iterdir()) == made


def test_a_bad_clip_is_named_and_nothing_hinders_the_mended_run(full_size_fan, monkeypatch, capsys):
    clip = list_clips("data", "fan", "train")[3].path
    content = clip.read_bytes()
    clip.write_bytes(content[:-100])
    for workers in ("0", "2"):
        message = refusal(capsys, "--workers", workers)
        assert message.endswith(f" error: {clip} is cut off: 100 bytes of samples are missing")
    clip.unlink()
    list_all = data.list_clips
    monkeypatch.setattr(data, "list_clips", lambda *a: [data.parse_clip(clip), *list_all(*a)])
    message = refusal(capsys, "--workers", "2")  # as if the file had vanished since it was listed
    assert message.endswith(f" error: [Errno 2] No such file or directory: '{clip}'")
    monkeypatch.setattr(data, "list_clips", list_all)
    assert [path.name for path in Path("runs/fan").iterdir()] == [".lock"]
    clip.write_bytes(content)
    run("--lr", "0.01")


def interrupt(*args):
    raise KeyboardInterrupt


def interrupted_after(epoch: int, monkeypatch, *flags: str) -> None:
    """As if by Ctrl-C right after that epoch was saved."""
    save = data.save

    def stop(path, content):
        save(path, content)
        if len(content.get("log", [])) == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(data, "save", stop)
        run(*flags)
    assert "interrupted: run the same command again" in stopped.value.code


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_continued_run_ends_with_the_same_bytes(full_size_fan, monkeypatch, capsys, tuning):
    """Interrupted within the warm-up, three epochs of a step each; read by others than before."""
    flags = ["--epochs", "4", "--warmup", "3", "--tuning", tuning, "--dropout", "0.1"]
    flags += ["--batch-size", "7"]
    whole = results(run(*flags, "--run", "runs/whole"))
    interrupted_after(2, monkeypatch, *flags, "--workers", "2")
    assert results(run(*flags)) == whole
    assert "continuing after epoch 2" in capsys.readouterr().out


def test_a_finished_run_stays_as_it_is_and_says_what_comes_next(fan, capsys):
    before = results(run())
    assert results(run()) == before
    out = capsys.readouterr().out
    assert out.startswith("device: cpu\nclips: 7, classes: 7\n")
    assert "parameters: 222,400, of which 98,688 are trained" in out
    assert re.search(r"^epoch 2: loss \d", out, re.MULTILINE)
    end = "runs/fan is trained; next: python score.py --machine fan --run runs/fan\n"
    assert out.endswith(end)


def test_two_epochs_and_one_more_are_three_and_until_then_the_first_model_stays(fan, monkeypatch):
    """The run, the clips and the weights have moved."""
    whole = run("--epochs", "3", "--run", "runs/whole")
    before = results(run())["adapter.pt"]
    shutil.move("data", "moved-data")
    shutil.move("ast.safetensors", "moved-ast.safetensors")
    shutil.move("runs/fan", "moved-fan")
    places = ["--data", "moved-data", "--weights", "moved-ast.safetensors", "--run", "moved-fan"]

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", interrupt)
        run("--epochs", "3", *places)
    assert Path("moved-fan/adapter.pt").read_bytes() == before
    folder = run("--epochs", "3", *places)
    assert (folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    ours, theirs = (data.load(path / "adapter.pt") for path in (folder, whole))
    assert ours["paths"] == {"data": "moved-data", "weights": "moved-ast.safetensors"}
    assert ours["setting"] == theirs["setting"]
    for name, tensor in ours["weights"].items():
        assert torch.equal(tensor, theirs["weights"][name])


def test_two_trainings_never_share_a_folder(fan, capsys):
    with data.sole_use(Path("runs/fan")):
        assert "another command is working in runs/fan" in refusal(capsys, "--run", "runs/fan")
    run()


DIFFERENCES = {
    "--lr 0.5": "lr was 0.001, is 0.5",
    "--layers 1": "layers was None, is [1]",
    "--targets q": "targets was ['q', 'v'], is ['q']",
    "--seed 3 --rank 8": "rank was 64, is 8; alpha was 64.0, is 8.0; seed was 0, is 3",
}


@pytest.mark.parametrize("flags", DIFFERENCES)
def test_continuing_with_other_settings_is_refused(fan, capsys, flags):
    before = results(run())
    message = refusal(capsys, *flags.split())
    assert f"runs/fan was trained with other settings: {DIFFERENCES[flags]}; delete the" in message
    assert results(Path("runs/fan")) == before


def test_fewer_epochs_than_it_has_are_refused(fan, capsys):
    run()
    assert "runs/fan has been trained for 2 epochs already" in refusal(capsys, "--epochs", "1")


def test_what_is_equal_is_not_refused(small):
    small_machines("fan", "valve")
    both = ["--machine", "fan", "valve", "--run", "runs/fan", "--layers", "0", "1"]
    before = results(run(*both))
    same = ["--machine", "valve/", "fan", "--run", "runs/fan", "--layers", "1", "0"]
    assert results(run(*same, "--targets", "v", "q", "--alpha", "64")) == before


def test_continuing_with_other_clips_or_weights_is_refused(small, capsys):
    """Two clips have exchanged their attributes: as many clips, the same classes."""
    small_machines("fan", "valve")
    both = ["--machine", "fan", "valve", "--run", "runs/fan"]
    run(*both)
    first, second = (clip.path for clip in list_clips("data", "fan", "train")[:2])
    first.rename(first.with_name(first.name.replace("mode_00", "mode_01")))
    second.rename(second.with_name(second.name.replace("mode_01", "mode_00")))
    message = refusal(capsys, *both)
    assert "trained with other settings: other clips; delete" in message
    write_ast("ast.safetensors", backbone.AST(64, 2, 1))
    assert "weights_sha256 was" in refusal(capsys, *both)


def test_long_lists_that_differ_are_named_only(small, capsys):
    small_machines("fan", "valve", "pump")
    run("--machine", "fan", "valve")
    assert re.search(
        r"settings: machine was .*; other classes; other clips",
        refusal(capsys, "--run", "runs/fan", "--machine", "fan", "pump"),
    )


@pytest.mark.parametrize(("micro_batch", "epochs"), [("4", 2), ("3", 1)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(
    fan, monkeypatch, capsys, micro_batch, epochs
):
    """The fifth call of ArcFace is in the third epoch, or in the second."""
    forward, factors = ArcFace.forward, iter([1, 1, 1, 1, math.nan])
    monkeypatch.setattr(ArcFace, "forward", lambda *args: forward(*args) * next(factors))
    message = refusal(capsys, "--micro-batch", micro_batch, "--epochs", "3")
    assert "the loss is not finite: start a new run with a smaller --lr" in message
    assert len(data.load("runs/fan/last.pt")["log"]) == epochs
    assert not Path("runs/fan/adapter.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(fan, monkeypatch, capsys):
    step = train.train_step

    def broken(model, *more):
        loss = step(model, *more)
        model.linear.bias.data[0] = math.nan
        return loss

    monkeypatch.setattr(train, "train_step", broken)
    message = refusal(capsys, "--batch-size", "7")
    assert "the weights are not finite: start a new run with a smaller --lr" in message
    assert not Path("runs/fan/last.pt").exists()


def test_training_learns(tmp_path, monkeypatch):
    """Made-up sounds, the demo's tiny AST, 6 epochs: the loss falls to less than half. With 48
    normal clips and 48 anomalies, chance has an AUC of 0.5 ± 0.06, so 0.68 is three deviations up.
    """
    monkeypatch.chdir(tmp_path)
    demo.make_machine("data", "auger", n_train=72, n_test=24)
    flags = f"--machine auger --weights {demo.WEIGHTS} --device cpu {demo.ROWS['LoRA']}"
    train.main(f"{flags} {demo.TRAINING}".split())
    losses = column(Path("runs/auger"), "loss")
    assert losses[-1] < losses[0] / 2
    score.main(["--machine", "auger", "--device", "cpu"])
    evaluate.main(["--machine", "auger"])
    row = dict(zip(*rows_of("runs/auger/metrics.csv")))
    assert float(row["auc_source"]) > 0.68 and float(row["auc_target"]) > 0.68


def test_ctrl_c_ends_in_one_line(small):
    small_machines("fan", n_train=14)
    command = [sys.executable, "-c", CHILD, str(ROOT), *COMMAND, "--epochs", "500"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    while not Path("runs/fan/last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    message = "interrupted: run the same command again to continue"
    assert process.returncode == 1 and err.strip() == message


def test_a_run_is_loaded_as_it_was_trained(fan):
    flags = ["--rank", "4", "--alpha", "6", "--targets", "v", "fc1", "--layers", "1"]
    model, setting, digest, folder = load_run(run(*flags))
    state = data.load("runs/fan/adapter.pt")["weights"]
    assert setting["layers"] == [1] and sum(name.startswith("ast.") for name in state) == 2 * 2
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert model.ast.blocks[1].attn.v.scaling == 1.5
    assert (digest, folder) == (data.file_digest("runs/fan/adapter.pt"), "data")


def test_other_weights_than_trained_on_are_refused(fan):
    folder = run()
    write_ast("other", backbone.AST(64, 2, 1))
    with pytest.raises(InputError, match="other is not the AST that runs/fan was trained on"):
        load_run(folder, "other")
    Path("ast.safetensors").rename("moved")
    load_run(folder, "moved")


def test_a_damaged_or_hostile_adapter_is_refused(fan):
    path = run() / "adapter.pt"
    whole = path.read_bytes()
    torch.save({"setting": Path("x"), "weights": {}, "paths": {}}, path)
    hostile = path.read_bytes()
    torch.save({"linear.bias": torch.zeros(1)}, path)
    foreign = "was not written by this program"
    contents = {hostile: foreign, path.read_bytes(): foreign, b"<html>": foreign}
    contents |= {whole[:-1000]: "cannot be loaded: .*central directory", b"": "cannot be loaded"}
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"adapter\.pt {message}"):
            load_run("runs/fan")


def test_a_step_in_bfloat16_keeps_float32_where_it_matters(fan, monkeypatch):
    """The autocast that a GPU has, on the CPU: attention is in bfloat16, embeddings and logits are
    float32, and the loss is within 1 % of float32's.
    """
    in_float32 = column(run(), "loss")
    autocast, attention, forward = torch.autocast, F.scaled_dot_product_attention, ArcFace.forward
    inside, outside = set(), set()

    def always(device, dtype, enabled):
        assert (device, dtype, enabled) == ("cpu", torch.bfloat16, False)
        return autocast(device, dtype)

    def seen_attention(q, k, v):
        inside.update({q.dtype, k.dtype, v.dtype})
        return attention(q, k, v)

    def seen_forward(self, embedding, labels):
        logits = forward(self, embedding, labels)
        outside.update({embedding.dtype, logits.dtype})
        return logits

    monkeypatch.setattr(torch, "autocast", always)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen_attention)
    monkeypatch.setattr(ArcFace, "forward", seen_forward)
    losses = column(run("--run", "runs/bfloat16"), "loss")
    assert inside == {torch.bfloat16} and outside == {torch.float32}
    assert losses[0] != in_float32[0] and losses == pytest.approx(in_float32, rel=0.01)


def test_compile_keeps_a_static_graph_for_full_batches(small, monkeypatch):
    """Batches of 3, 3 and 2 clips in two epochs: one graph for 3, one for 2, and no other."""
    small_machines("fan", n_train=8)
    without = column(run("--batch-size", "3"), "loss")
    sizes, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        sizes.extend(len(x) for x in inputs if x.shape[1:] == (96, 128))
        return graph.forward

    counted = lambda self, **options: compile_(self, backend=backend, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    torch._dynamo.reset()
    losses = column(run("--batch-size", "3", "--compile", "--run", "runs/compiled"), "loss")
    assert sizes == [3, 2] and losses == pytest.approx(without, rel=1e-5)


def test_four_processes_read_for_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(backbone, "existing_device", torch.device)
    for available, defaults in ((True, (gpu, 4)), (False, (torch.device("cpu"), 0))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        for module in (train, score):
            args = module.parse_args(["--machine", "fan"])
            assert (args.device, args.workers) == defaults
    args = train.parse_args(["--machine", "fan", "--device", "cpu:0"])
    assert args.device.type == "cpu"


@needs_cuda
def test_training_on_a_gpu_agrees_with_the_cpu(fan):
    """bf16 against float32: the losses agree within 2 %."""
    losses = []
    for device in ("cpu", "cuda"):
        flags = ["--device", device, "--run", f"runs/{device}", "--time-mask", "0"]
        losses.append(column(run(*flags, "--freq-mask", "0"), "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@needs_cuda
@pytest.mark.parametrize(
    "flags",
    ["--tuning full", "--tuning frozen", "--compile", "--micro-batch 2", "--workers 0",
     "--device cuda:0"],
)  # fmt: skip
def test_every_way_to_train_runs_on_a_gpu(fan, flags):
    losses = column(run("--device", "cuda", *flags.split()), "loss")
    assert all(math.isfinite(loss) for loss in losses)


@needs_cuda
def test_a_run_resumes_on_a_gpu(fan, monkeypatch):
    whole = column(run("--device", "cuda", "--run", "runs/whole"), "loss")
    interrupted_after(1, monkeypatch, "--device", "cuda")
    assert column(run("--device", "cuda"), "loss") == pytest.approx(whole, rel=0.01)


@needs_cuda
def test_scoring_on_a_gpu_equals_the_cpu(fan):
    """Both in float32: embeddings to 1e-4, convolutions included (no TF32)."""
    model = load_run(run()).model
    clips = list_clips("data", "fan", "test")
    expected, found = embed_all(model, clips), embed_all(model.cuda(), clips)
    assert_equal_within(1e-4, "embeddings on a GPU against the CPU", found, expected)
