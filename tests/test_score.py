"""score.py: nearest neighbours with hand-computed numbers, the whole path against a plain one, its
files, and what it keeps.
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from conftest import (
    FLAGS,
    REAL,
    assert_equal_within,
    error_of,
    lively_ast,
    needs_real,
    noise,
    rows_of,
    small_machines,
    write_ast,
    write_hums,
)
from scipy.io import wavfile

import backbone
import data
import evaluate
import score
import train
from score import anomaly_scores, decide, distances, most_anomalous, nearest


def at(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles: their cosine distance is 1 - cos of the difference."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def d(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


def one_window_each(
    train: np.ndarray, test: np.ndarray, domains: list[str | None], k: int, normalize: str
) -> tuple[np.ndarray, np.ndarray]:
    domain = np.array(domains, object)
    return anomaly_scores(test, train, np.arange(len(train)), domain, k, normalize)


def test_a_distance_is_never_negative():
    rows = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert (1 - rows @ rows.T).min() < 0, "rounding passes 0"
    assert distances(rows, rows).min() == 0


def test_the_k_nearest_are_averaged():
    found = np.array([[0.5, 0.1, np.inf, 0.3]], np.float32)
    assert nearest(found, 1) == pytest.approx([0.1])
    assert nearest(found, 2) == pytest.approx([0.2])
    assert nearest(found, 3) == pytest.approx([0.3])
    many = np.random.default_rng(0).random((50, 2000))
    for k in (1, 2, 3):
        assert nearest(many, k) == pytest.approx(np.sort(many)[:, :k].mean(axis=1))
    with pytest.raises(ValueError, match="the 4 nearest of 3 distances to other clips"):
        nearest(found, 4)


def test_a_clips_score_is_that_of_its_most_anomalous_window():
    scores = np.array([0.1, 0.7, 0.3, 0.2, 0.9, 0.9])
    assert most_anomalous(scores, np.array([0, 0, 0, 1, 2, 2])).tolist() == [1, 3, 4]


def test_a_training_clip_leaves_out_all_of_its_own_windows():
    """Clip 0 at 0° and 1°, clip 1 at 40°, clip 2 at 100°: 0° is nearest to 40°, not to 1°."""
    clip, domain = np.array([0, 0, 1, 2]), np.array([None] * 4, object)
    of_test, of_train = anomaly_scores(at(2, 90), at(0, 1, 40, 100), clip, domain, 1, "none")
    assert of_test == pytest.approx([d(1), d(10)], abs=1e-6)
    assert of_train == pytest.approx([d(40), d(39), d(39), d(60)], abs=1e-6)


# Source clips at 0°, 2°, 6°; target clips at 90°, 120°, 160°; test clips at 3° and 130°.
TRAIN, DOMAINS, TEST = at(0, 2, 6, 90, 120, 160), ["source"] * 3 + ["target"] * 3, at(3, 130)


def test_density_stays_finite_where_training_clips_are_equal():
    scores, _ = one_window_each(at(*[0] * 6), at(0, 1), [None] * 6, 1, "density")
    assert scores == pytest.approx([0, d(1) / 1e-6], rel=1e-2)


@pytest.mark.parametrize("normalize", ["none", "test", "density"])
def test_a_domain_without_clips_has_no_bank(normalize):
    bank = at(0, 2, 6, 11, 17)
    both = one_window_each(bank, TEST, ["source"] * 5, 1, normalize)
    unlabelled = one_window_each(bank, TEST, [None] * 5, 1, normalize)
    for a, b in zip(both, unlabelled):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(both[0]).all()


@pytest.mark.parametrize(
    ("angles", "domains", "normalize"),
    [([0], "s", "none"), ([0, 10, 20], "sss", "density"), ([0, 10, 90], "sst", "test")],
)
def test_too_few_clips_for_a_back_end_are_refused(angles, domains, normalize):
    domains = [{"s": "source", "t": "target"}[letter] for letter in domains]
    with pytest.raises(ValueError, match="too few training clips"):
        one_window_each(at(*angles), TEST, domains, 1, normalize)


def test_test_clips_that_are_all_alike_cannot_be_standardised():
    with pytest.raises(ValueError, match="needs test clips whose scores vary"):
        one_window_each(at(0, 10), at(5, 5), ["source"] * 2, 1, "test")


def test_the_threshold_is_a_percentile_of_the_training_scores_and_itself_no_anomaly():
    decisions, threshold = decide(np.array([9.0, 9.1, 1.0]), np.arange(11.0))
    assert threshold == 9.0 and decisions.tolist() == [False, True, False]
    assert decide(np.array([9.0]), np.arange(11.0), 50)[1] == 5.0
    for right in (1, 100):
        decide(np.array([9.0]), np.arange(11.0), right)
    for wrong in (0.9, 101):
        with pytest.raises(ValueError, match="from 1 to 100"):
            decide(np.array([9.0]), np.arange(11.0), wrong)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A trained run of one machine with 6, 10 and 12 s clips in both domains, and the embeddings
    that tests/plain.py computes of its clips, for the run and for the untouched AST.
    """
    folder = tmp_path_factory.mktemp("scored")
    write_hums(folder / "data", train_source=12, train_target=6, test_source=3, test_target=3)
    write_ast(folder / "ast", lively_ast())
    flags = ["--data", str(folder / "data"), "--weights", str(folder / "ast"), "--device", "cpu"]
    flags += ["--rank", "4", "--alpha", "6", "--epochs", "1", "--batch-size", "4", "--lr", "0.02"]
    train.main(["--machine", "fan", "--run", str(folder / "run"), *flags])
    state, public = train.load(folder / "run" / "adapter.pt"), lively_ast().state_dict()
    adapters = {name.removeprefix("ast."): tensor for name, tensor in state.items()}
    rows = {}
    for split in ("train", "test"):
        waves = [plain.read(path) for path in sorted((folder / "data" / "fan" / split).iterdir())]
        rows[split, "run"] = [plain.embed(public | adapters, state, wave, 6 / 4) for wave in waves]
        rows[split, "cls"] = [plain.embed(public, {}, wave) for wave in waves]
        rows[split, "mean"] = [plain.embed(public, None, wave) for wave in waves]
    return folder, rows


BACK_ENDS = ["", "--k 2", "--normalize test", "--normalize density", "--normalize density --k 2",
             "--pretrained --pooling cls", "--pretrained --pooling mean"]  # fmt: skip


@pytest.mark.parametrize("flags", BACK_ENDS)
def test_scoring_equals_a_plain_path(own_run, flags):
    folder, embeddings = own_run
    run, kind, flags = folder / "run", "run", flags.split()
    if "--pretrained" in flags:
        kind = flags[-1]
        run, flags = folder / f"pretrained {kind}", [*flags, "--weights", str(folder / "ast")]
    places = ["--data", str(folder / "data"), "--run", str(run), "--device", "cpu"]
    score.main(["--machine", "fan", *places, *flags])
    options = {} if kind != "run" else dict(zip(flags[::2], flags[1::2]))
    normalize, k = options.get("--normalize", "none"), int(options.get("--k", 1))
    bank, queries = embeddings["train", kind], embeddings["test", kind]
    train_names, test_names = (
        [clip.path.name for clip in data.list_clips(folder / "data", "fan", split)]
        for split in ("train", "test")
    )
    is_target = ["target" in name for name in train_names]
    expected, threshold, window = plain.score(bank, queries, is_target, normalize, k)
    assert np.abs(expected - threshold).min() > 1e-6 * np.abs(expected).max(), "none at threshold"

    found = rows_of(run / "anomaly_score_fan_section_00_test.csv")
    assert [name for name, _ in found] == test_names
    values = [float(value) for _, value in found]
    tolerance = 2e-6 if normalize == "none" else 3e-3  # these are divided by small numbers
    assert_equal_within(tolerance, f"scores, {flags}, against a plain path", values, expected)
    alarms = [str(int(alarm)) for alarm in expected > threshold]
    assert [row[1] for row in rows_of(run / "decision_result_fan_section_00_test.csv")] == alarms

    starts, columns = {1: [0.0], 2: [0.0, 1.74]}, []
    for name, windows in zip(train_names, bank):
        columns += [(name, start) for start in starts[len(windows)]]
    report = report_of(run, "fan")
    order = [float(row["score"]) for row in report.values()]
    assert order == sorted(order, reverse=True)
    for i, name in enumerate(test_names):
        row, plainly = report[name], 1 - np.concatenate(bank) @ queries[i][window[i]]
        near = (row["nearest_training_clip"], float(row["nearest_at_seconds"]))
        assert (float(row["score"]), row["alarm"]) == (values[i], alarms[i])
        assert float(row["threshold"]) == pytest.approx(threshold, abs=tolerance)
        assert near == columns[plainly.argmin()]
        assert float(row["distance"]) == pytest.approx(plainly.min(), abs=2e-6)
        assert float(row["at_seconds"]) == starts[len(queries[i])][window[i]]


def trained(*flags: str) -> Path:
    train.main(["--machine", "fan", *FLAGS, "--epochs", "1", "--batch-size", "4", *flags])
    return Path("runs/fan")


def scored(*flags: str, machine: str = "fan") -> None:
    weights = FLAGS if "--pretrained" in flags else FLAGS[2:]
    score.main(["--machine", machine, *weights, *flags])


def report_of(run: str | Path, machine: str = "pump") -> dict[str, dict[str, str]]:
    header, *rows = rows_of(Path(run) / f"report_{machine}.csv")
    return {row[0]: dict(zip(header, row)) for row in rows}


def test_the_files_are_the_challenges_and_the_highest_are_printed(small, capsys):
    """No header, a row for each test clip in order of name, full float precision, \\n, 0 or 1."""
    small_machines("fan", n_test=3)
    folder = trained()
    scored("--percentile", "50")
    out = capsys.readouterr().out
    names = [clip.path.name for clip in data.list_clips("data", "fan", "test")]
    content = (folder / "anomaly_score_fan_section_00_test.csv").read_bytes()
    assert content.endswith(b"\n") and b"\r" not in content
    scores = rows_of(folder / "anomaly_score_fan_section_00_test.csv")
    decisions = rows_of(folder / "decision_result_fan_section_00_test.csv")
    assert [row[0] for row in scores] == [row[0] for row in decisions] == names
    assert all(repr(float(value)) == value for _, value in scores)
    assert {value for _, value in decisions} == {"0", "1"}
    highest = list(report_of("runs/fan", "fan").values())[:10]  # of 12
    lines = [f"{row['test_clip']} | {row['nearest_training_clip']}" for row in highest]
    printed = [line for line in out.splitlines() if " | " in line]
    assert [line[-len(end) :] for line, end in zip(printed, lines)] == lines
    assert ["ALARM" in line for line in printed] == [row["alarm"] == "1" for row in highest]


def pump(n: int = 6, seconds: float = 1) -> None:
    """A machine of one's own, with one test clip."""
    small_machines()
    for i in range(n):
        noise(f"data/pump/train/{i}.wav", seconds, seed=i)
    noise("data/pump/test/new.wav", seconds, seed=50)


def test_names_with_commas_quotes_and_other_letters_survive(small):
    pump()
    names = ["a b.wav", "ölpumpe, links.wav", 'the "bad" one.wav', "日本.wav", "a;b.wav"]
    for name in names:
        noise(f"data/pump/test/{name}", 1, seed=60)
    os.rename("data/pump/test/new.wav", os.fsencode("data/pump/test/") + b"latin-1 \xf6.wav")
    scored("--pretrained", machine="pump")
    found = evaluate.read_csv(Path("runs/pretrained-pump/anomaly_score_pump_section_00_test.csv"))
    assert list(found) == sorted([*names, "latin-1 \udcf6.wav"])
    data.write_csv(Path("data/pump/labels.csv"), [(name, i % 2) for i, name in enumerate(found)])
    evaluate.main(["--machine", "pump", "--run", "runs/pretrained-pump"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_full_however_long_the_clips_are(small, workers):
    """Four clips of 1 s (two windows) and one of 20 s (21 windows): 29 windows, 12 + 12 + 5."""
    small_machines("fan", n_test=1)
    noise("data/fan/test/long.wav", 20)
    clips, sizes = data.list_clips("data", "fan", "test"), []
    model = backbone.Embedder(backbone.load_ast("ast.safetensors"), "cls", None)
    model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    index, starts, _ = zip(*score.embed(model, clips, 12, workers))
    assert sizes == [12, 12, 5]
    assert list(index) == [0] * 21 + [1, 1, 2, 2, 3, 3, 4, 4]
    assert list(starts[:21]) == data.window_starts(20 * 16000)


def test_what_is_judged_is_said(small, capsys):
    """And copies among the training clips count once."""
    pump()
    scored("--pretrained", machine="pump")
    before = report_of("runs/pretrained-pump")
    assert "pump: 1 test clips against 6 train clips\n" in capsys.readouterr().out
    for i in range(3):
        shutil.copy(f"data/pump/train/{i}.wav", f"data/pump/train/copy of {i}.wav")
    shutil.copy("data/pump/train/5.wav", "data/pump/test/old.wav")
    Path("data/pump/test/a.flac").touch()
    Path("data/pump/test/M1").mkdir()
    Path("data/pump/train/.hidden").touch()
    scored("--pretrained", machine="pump")
    said = "pump: 2 test clips (2 not read: M1, a.flac) (1 copies of train clips) against"
    assert f"{said} 9 train clips (3 copies)\n" in capsys.readouterr().out
    found = report_of("runs/pretrained-pump")
    assert float(found["old.wav"]["score"]) == pytest.approx(0, abs=1e-6)
    for key in ("score", "threshold"):
        same = pytest.approx(float(before["new.wav"][key]), abs=1e-6)
        assert float(found["new.wav"][key]) == same


# 20 log10(900 / 32768) is -31.2 dB; silence counts as 10 log10(1e-12).
UNLIKE = {
    "length (most training clips have 1 to 1 s): test/odd.wav (6)": {"seconds": 6},
    "level (most training clips have -31.3 to -31.2 dB): train/odd.wav (-120)": {"level": 0},
    "sample rate (most training clips have 16000 to 16000 Hz): test/odd.wav (8000)": {"rate": 8000},
}


@pytest.mark.parametrize("said", UNLIKE)
def test_clips_unlike_most_training_clips_are_said(small, capsys, said):
    pump(n=20)
    scored("--pretrained", machine="pump")
    assert "note:" not in capsys.readouterr().out
    split = "train" if "train/odd" in said else "test"
    noise(f"data/pump/{split}/odd.wav", **({"seconds": 1, "seed": 77} | UNLIKE[said]))
    scored("--pretrained", machine="pump")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: pump: 1 of unusual {said}"]


def test_the_adapters_are_merged_for_scoring(fan):
    args = score.make_parser().parse_args(["--machine", "fan", "--device", "cpu"])
    args.run = trained()
    model, _ = score.load_model(args, ["fan"])
    assert {type(block.attn.q) for block in model.ast.blocks} == {torch.nn.Linear}


def embedded(monkeypatch) -> list[str]:
    """Fills with the names of the clips that go through the network."""
    names, original = [], score.embed

    def counted(model, clips, *more):
        names.extend(f"{clip.split}/{clip.path.name}" for clip in clips)
        return original(model, clips, *more)

    monkeypatch.setattr(score, "embed", counted)
    return names


def test_only_new_contents_go_through_the_network(small, monkeypatch):
    """By checksum: a file that was overwritten within the same second and of the same size is new,
    one that was renamed, moved or copied is not. What is gone is gone.
    """
    small_machines("fan", n_test=2)
    names = embedded(monkeypatch)
    scored("--pretrained")
    assert len(names) == 7 + 8
    names.clear()
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", None)  # what is kept is not even decoded
        for flags in (["--normalize", "test"], ["--normalize", "density"], ["--k", "2"]):
            scored("--pretrained", *flags)
    assert names == []

    tests = [clip.path for clip in data.list_clips("data", "fan", "test")]
    stat = tests[1].stat()
    _, samples = wavfile.read(tests[1])
    wavfile.write(tests[1], 16000, samples[::-1].copy())
    os.utime(tests[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    tests[0].unlink()
    tests[2].rename("data/fan/test/renamed.wav")
    shutil.copy(tests[3], "data/fan/test/copy.wav")
    data.list_clips("data", "fan", "train")[-1].path.rename("data/fan/test/moved.wav")
    scored("--pretrained")
    assert names == [f"test/{tests[1].name}"]
    found = report_of("runs/pretrained-fan", "fan")
    assert len(found) == 8 + 1
    scores = [float(found[name]["score"]) for name in ("copy.wav", tests[3].name)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(train.load("runs/pretrained-fan/embeddings_fan.pt")) == 6 + 8


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError("fan/x.wav is bad")])
def test_embeddings_are_kept_whatever_ends_the_command(small, monkeypatch, capsys, end):
    """Six clips of two windows are through when the fourth batch of 4 windows comes. Five are kept:
    that the sixth is complete shows only when a seventh comes.
    """
    small_machines("fan", n_test=2)
    names, forward, calls = embedded(monkeypatch), backbone.Embedder.forward, []

    def stop(self, x):
        calls.append(1)
        if len(calls) == 4:
            raise end
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(backbone.Embedder, "forward", stop)
        argv = ["--machine", "fan", "--pretrained", *FLAGS, "--batch-size", "4"]
        message = error_of(score.main, argv, capsys)
    assert "interrupted" in message or "fan/x.wav is bad" in message
    assert len(train.load("runs/pretrained-fan/embeddings_fan.pt")) == 5
    names.clear()
    scored("--pretrained")
    assert len(names) == 15 - 5


def test_embeddings_are_saved_now_and_then(fan, monkeypatch):
    sizes, save = [], train.save
    monkeypatch.setattr(score, "SAVE_EVERY", 0)
    monkeypatch.setattr(train, "save", lambda path, e: sizes.append(len(e)) or save(path, e))
    scored("--pretrained")
    assert sizes == [*range(12), 11]


def test_a_run_that_was_trained_on_does_not_use_its_old_embeddings(fan, monkeypatch):
    trained()
    scored()
    names = embedded(monkeypatch)
    trained("--epochs", "2")
    scored()
    assert len(names) == 7 + 4


def test_one_joint_run_scores_each_of_its_machines_and_no_other(small, capsys):
    small_machines("fan", "valve", "pump")
    train.main(["--machine", "fan", "valve", *FLAGS, "--epochs", "1", "--run", "runs/joint"])
    scored("--run", "runs/joint", machine="valve")
    assert [path.name for path in Path("runs/joint").glob("report_*")] == ["report_valve.csv"]
    message = error_of(score.main, ["--machine", "pump", "--run", "runs/joint"], capsys)
    assert "runs/joint was trained on no other than fan valve" in message
    argv = ["--machine", "fan", "--run", "runs/joint", "--pooling", "mean"]
    assert "--pooling goes with --pretrained" in error_of(score.main, argv, capsys)


def test_rescoring_removes_what_it_does_not_make_anew(fan):
    scored("--pretrained")
    for name in ("fan.png", "metrics.csv"):
        Path("runs/pretrained-fan", name).touch()
    scored("--pretrained", "--percentile", "50")
    assert not list(Path("runs/pretrained-fan").glob("*.png"))
    assert not Path("runs/pretrained-fan/metrics.csv").exists()


@needs_real
def test_the_real_clips_go_through_all_three_scripts(small, capsys):
    """Seven machines jointly: 10 s and 12 s, no target training clips, classes of one clip."""
    small_machines()
    real = ["--data", str(REAL / "real")]
    train.main(["--machine", "dev", *real, *FLAGS, "--epochs", "1"])
    assert "14 clips of 12 classes" in capsys.readouterr().out
    scored(machine="dev")
    evaluate.main(["--machine", "dev"])
    out = capsys.readouterr().out
    assert "fan: 2 test clips against 2 train clips" in out
    assert "| fan | n/a | " in out and "partial (0/7)" in out
    for machine in data.DEV:
        assert len(rows_of(f"runs/dev/anomaly_score_{machine}_section_00_test.csv")) == 2
