"""score.py: nearest neighbours with hand-computed numbers, the files, and re-scoring."""

import csv
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, assert_equal_within, needs_real, small_demo
from scipy.io import wavfile
from sklearn.neighbors import NearestNeighbors

import data
import evaluate
import score
import train
from backbone import Embedder
from lora import merge_lora
from score import anomaly_scores, embed, nearest, smote


def at(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles: their cosine distance is 1 - cos of the difference."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def d(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


# ---------------------------------------------------------------- neighbours


def test_the_score_is_the_smallest_cosine_distance():
    """Training clips at 0°, 40°, 100°; test clips at 10° (10° from the first) and 90° (10° from the last)."""
    distance, index = nearest(at(10, 90), at(0, 40, 100))
    assert distance == pytest.approx([d(10), d(10)], abs=1e-6) and index.tolist() == [0, 2]
    assert distance.dtype == np.float32


def test_k_neighbours_are_averaged():
    distance, index = nearest(at(10), at(0, 40, 100), k=2)
    assert distance == pytest.approx([(d(10) + d(30)) / 2], abs=1e-6) and index.tolist() == [0]


def test_a_training_clip_is_not_its_own_neighbour():
    distance, index = nearest(at(0, 40, 100), at(0, 40, 100), leave_one_out=True)
    assert distance == pytest.approx([d(40), d(40), d(60)], abs=1e-6) and index.tolist() == [1, 0, 1]


def test_too_few_clips_for_k_are_refused():
    with pytest.raises(ValueError, match="3 nearest neighbours need at least 3 training clips, not 2"):
        nearest(at(0), at(0, 1), k=3)
    with pytest.raises(ValueError, match="at least 2 training clips, not 1"):
        nearest(at(0), at(0), leave_one_out=True)


def test_neighbours_equal_scikit_learns_in_chunks_too(monkeypatch):
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(300, 16)).astype(np.float32)
    theirs = NearestNeighbors(n_neighbors=3, metric="cosine", algorithm="brute").fit(bank)
    import sklearn

    for megabytes in (1024, 0.01):  # the second makes many chunks
        with sklearn.config_context(working_memory=megabytes):
            distance, index = nearest(queries, bank, k=3)
            own, _ = nearest(bank, bank, k=3, leave_one_out=True)
        expected, neighbours = theirs.kneighbors(queries)
        np.testing.assert_allclose(distance, expected.mean(axis=1), atol=1e-6)
        assert index.tolist() == neighbours[:, 0].tolist()
        np.testing.assert_allclose(own, theirs.kneighbors()[0].mean(axis=1), atol=1e-6)


# Source clips at 0°, 2°, 6°; target clips at 90°, 120°, 160°; test clips at 3° and 130°.
TRAIN, DOMAINS, TEST = at(0, 2, 6, 90, 120, 160), ["source"] * 3 + ["target"] * 3, at(3, 130)
# Leave-one-out distances within each bank: 2°, 2°, 4°; 30°, 30°, 40°.
SOURCE, TARGET = np.array([d(2), d(2), d(4)]), np.array([d(30), d(30), d(40)])


def test_none_uses_one_bank_of_both_domains():
    scores, train_scores, index = anomaly_scores(TRAIN, TEST, DOMAINS, k=1, normalize="none", smote_ratio=0)
    assert scores == pytest.approx([d(1), d(10)], abs=1e-6) and index.tolist() == [1, 4]
    assert train_scores == pytest.approx([*SOURCE, *TARGET], abs=1e-6)


def test_train_standardises_each_bank_by_its_leave_one_out_scores():
    """Test clip 3°: source (d(1°) - mean) / std is the smaller; 130°: target (d(10°) - mean) / std."""
    scores, train_scores, index = anomaly_scores(TRAIN, TEST, DOMAINS, k=1, normalize="train", smote_ratio=0)
    expected = [(d(1) - SOURCE.mean()) / SOURCE.std(), (d(10) - TARGET.mean()) / TARGET.std()]
    # each is also compared with the other bank: 3° is 87° from the target clips, 130° is 124° from the source clips
    expected[0] = min(expected[0], (d(87) - TARGET.mean()) / TARGET.std())
    expected[1] = min(expected[1], (d(124) - SOURCE.mean()) / SOURCE.std())
    assert scores == pytest.approx(expected, rel=1e-3) and index.tolist() == [1, 4]
    own = (SOURCE - SOURCE.mean()) / SOURCE.std()
    assert train_scores[:3] == pytest.approx(own, rel=1e-3)


def test_test_standardises_each_bank_by_the_test_scores_themselves():
    """Source distances of the test clips: d(1°), d(124°); target: d(87°), d(10°). Two values standardise to ±1."""
    scores, _, index = anomaly_scores(TRAIN, TEST, DOMAINS, k=1, normalize="test", smote_ratio=0)
    assert scores == pytest.approx([-1, -1], abs=1e-5) and index.tolist() == [1, 4]
    alone, _, _ = anomaly_scores(TRAIN, at(3, 130, 10), DOMAINS, k=1, normalize="test", smote_ratio=0)
    assert abs(alone[0] - scores[0]) > 0.1, "transductive: another test clip changes this one's score"


def test_density_divides_by_the_neighbours_own_distance():
    """ρ is the leave-one-out distance. 3°: d(1°)/d(2°) beats d(3°)/d(2°) and d(3°)/d(4°)... by the numbers."""
    rho = np.array([*SOURCE, *TARGET])
    scores, train_scores, index = anomaly_scores(TRAIN, TEST, DOMAINS, k=1, normalize="density", smote_ratio=0)
    angles = np.array([0, 2, 6, 90, 120, 160])
    for query, found, i in zip((3, 130), scores, index, strict=True):
        ratios = np.array([d(query - a) for a in angles]) / rho
        assert found == pytest.approx(ratios.min(), rel=1e-4) and i == ratios.argmin()
    assert scores == pytest.approx([d(1) / d(2), d(10) / d(30)], rel=1e-4)
    between = np.array([[d(a - b) for b in angles] for a in angles]) / rho + np.diag([np.inf] * 6)
    assert train_scores == pytest.approx(between.min(axis=1), rel=1e-4)


@pytest.mark.parametrize("normalize", ["none", "train", "test", "density"])
def test_a_domain_without_clips_has_no_bank(normalize):
    both = anomaly_scores(TRAIN[:3], TEST, ["source"] * 3, 1, normalize, 0)
    unlabelled = anomaly_scores(TRAIN[:3], TEST, [None] * 3, 1, normalize, 0)
    for a, b in zip(both, unlabelled, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(both[0]).all()


@pytest.mark.parametrize(
    ("angles", "domains", "normalize", "smote_ratio", "message"),
    [
        ([0, 10], ["source"] * 2, "train", 0, "2 scores of a domain do not vary"),
        ([0, 10, 30, 90], ["source"] * 3 + ["target"], "train", 0, "at least 2 training clips, not 1"),
        ([0, 10, 10], ["source"] * 3, "density", 0, "two training clips are the same"),
        ([0, 10, 30, 90, 95], ["source"] * 3 + ["target"] * 2, "none", 0.5, "at least 3 target training clips, not 2"),
        ([0], ["source"], "none", 0, "at least 2 training clips, not 1"),
    ],
)
def test_too_few_clips_for_a_back_end_are_refused(angles, domains, normalize, smote_ratio, message):
    with pytest.raises(ValueError, match=message):
        anomaly_scores(at(*angles), TEST, domains, 1, normalize, smote_ratio)


# ---------------------------------------------------------------- SMOTE


def test_smote_rows_lie_between_a_clip_and_one_of_its_two_nearest():
    """On the number line 0, 1, 3, 10 in two dimensions (far from the origin, so that order of distance is kept)."""
    target = at(0, 1, 3, 10)
    rows, base = smote(target, 500)
    near = {0: (1, 2), 1: (0, 2), 2: (1, 0), 3: (2, 1)}
    shares = []
    for row, i in zip(rows, base, strict=True):
        fits = []
        for j in near[i]:
            u = np.dot(row - target[i], target[j] - target[i]) / np.sum((target[j] - target[i]) ** 2)
            fits.append((np.abs(target[i] + u * (target[j] - target[i]) - row).max(), u))
        error, u = min(fits)
        assert error < 1e-6 and -1e-6 <= u <= 1
        shares.append(u)
    assert np.bincount(base).min() > 80 and np.mean(shares) == pytest.approx(0.5, abs=4 * 0.29 / 500**0.5)
    np.testing.assert_array_equal(smote(target, 500)[0], rows)


def test_smote_fills_the_target_bank_up_to_the_share_of_the_source_bank(monkeypatch):
    """990 source and 10 target clips, ratio 0.2: 198 - 10 = 188 new rows, as in ASDKit."""
    counts = []
    original = score.smote
    monkeypatch.setattr(score, "smote", lambda target, count: counts.append(count) or original(target, count))
    rng = np.random.default_rng(0)
    train_ = rng.normal(size=(1000, 8)).astype(np.float32)
    domains = ["source"] * 990 + ["target"] * 10
    plain = anomaly_scores(train_, train_[:5] + 0.1, domains, 1, "none", 0.0)
    filled = anomaly_scores(train_, train_[-5:] * 0.9 + train_[-6:-1] * 0.1, domains, 1, "none", 0.2)
    anomaly_scores(train_, train_[:5], domains, 1, "none", 0.001)
    assert counts == [188, 0]
    assert (
        filled[0] <= anomaly_scores(train_, train_[-5:] * 0.9 + train_[-6:-1] * 0.1, domains, 1, "none", 0.0)[0]
    ).all()
    np.testing.assert_array_equal(plain[1], filled[1])  # the threshold comes from real clips only
    assert set(filled[2]) <= set(range(1000)), "a synthetic neighbour is reported as the clip it was made from"


# ---------------------------------------------------------------- files


def trained(*flags: str) -> Path:
    train.main(["--machine", "fan", "--demo", "--epochs", "1", *flags])
    return Path("runs/demo-fan")


def scored(*flags: str, machine: str = "fan") -> None:
    score.main(["--machine", machine, "--demo", *flags])


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def error_of(capsys, *flags: str, machine: str = "fan") -> str:
    with pytest.raises(SystemExit) as stop:
        scored(*flags, machine=machine)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_files_are_the_challenges(small):
    """No header, one row per test clip in order of name, base names, full float precision, \\n ends, 0 or 1."""
    small_demo("fan", n_test=3)
    folder = trained()
    scored()
    names = [clip.path.name for clip in data.list_clips("data/demo", "fan", "test")]
    content = (folder / "anomaly_score_fan_section_00_test.csv").read_bytes()
    assert content.endswith(b"\n") and b"\r" not in content
    scores = rows(folder / "anomaly_score_fan_section_00_test.csv")
    decisions = rows(folder / "decision_result_fan_section_00_test.csv")
    near = rows(folder / "nearest_fan.csv")
    assert [row[0] for row in scores] == [row[0] for row in decisions] == [row[0] for row in near[1:]] == names
    assert all(repr(float(value)) == value for _, value in scores) and {value for _, value in decisions} <= {"0", "1"}

    stored = np.load(folder / "embeddings_fan.npz")
    distances = 1 - stored["test"].astype(float) @ stored["train"].T.astype(float)
    assert [float(value) for _, value in scores] == pytest.approx(distances.min(axis=1).tolist(), abs=1e-6)
    training = [clip.path.name for clip in data.list_clips("data/demo", "fan", "train")]
    assert [row[1] for row in near[1:]] == [training[i] for i in distances.argmin(axis=1)]
    own = 1 - stored["train"] @ stored["train"].T + 9 * np.eye(len(training))
    threshold = np.percentile(own.min(axis=1), 90)
    assert [int(value) for _, value in decisions] == (distances.min(axis=1) > threshold).astype(int).tolist()


def test_names_with_commas_quotes_and_other_letters_survive(small):
    names = ["a b.wav", "ölpumpe, links.wav", 'the "bad" one.wav', "日本.wav"]
    for split in ("train", "test"):
        Path("data/pump", split).mkdir(parents=True)
        for i, name in enumerate(names):
            samples = np.random.default_rng(i + 10 * (split == "test")).integers(-9999, 9999, 8000 + 999 * i)
            wavfile.write(Path("data/pump", split, name), 8000, samples.astype(np.int16))
    raw = os.fsencode("data/pump/test/") + b"latin-1 \xf6.wav"
    shutil.copy("data/pump/test/a b.wav", raw)
    train.prepare_demo([])
    score.main(["--machine", "pump", "--pretrained", "--weights", "data/demo/ast.pth", "--device", "cpu"])
    found = [row[0] for row in rows(Path("runs/pretrained-pump/anomaly_score_pump_section_00_test.csv"))]
    assert found == sorted([*names, "latin-1 \udcf6.wav"])
    data.write_file("data/pump/labels.csv", b"".join(
        b'"%s",%d\n' % (os.fsencode(name.replace('"', '""')), i % 2) for i, name in enumerate(found)))  # fmt: skip
    evaluate.main(["--machine", "pump", "--run", "runs/pretrained-pump"])
    assert Path("runs/pretrained-pump/metrics.csv").exists()


def test_a_long_clip_is_the_mean_of_its_windows_and_batches_do_not_matter(small):
    """1 s has 98 frames, two windows of 96 here: frames 0-95 and 2-97."""
    small_demo("fan", n_test=2)
    model, _ = train.load_run(trained())
    clips = data.list_clips("data/demo", "fan", "test")
    one, many = embed(model.eval(), clips, batch_size=1), embed(model, clips, batch_size=5)
    np.testing.assert_allclose(one, many, atol=1e-6)
    x = data.normalise(data.log_mel(data.read_wav(clips[3].path)[None]))
    with torch.no_grad():
        expected = F.normalize(model(x[:, :96]) + model(x[:, 2:98]))
    np.testing.assert_allclose(one[3], expected[0], atol=1e-6)


def test_a_merged_and_saved_model_scores_as_the_trained_one(small):
    """The adapters of a trained run are merged, the plain AST is saved, loaded as public weights are, and scored."""
    small_demo("fan", n_test=2)
    folder = trained("--alpha", "16", "--lr", "0.01")
    scored()
    model, _ = train.load_run(folder)
    clips = {split: data.list_clips("data/demo", "fan", split) for split in ("train", "test")}
    unmerged = {split: embed(model.eval(), clips[split], batch_size=4) for split in clips}
    public = train.load_ast("data/demo/ast.pth").state_dict()
    merge_lora(model.ast)
    train.save(Path("merged.pth"), model.ast.state_dict())
    model.ast = train.load_ast("merged.pth")
    assert (model.ast.blocks[0].attn.q.weight - public["blocks.0.attn.q.weight"]).abs().max() > 1e-3
    merged = {split: embed(model, clips[split], batch_size=4) for split in clips}
    assert_equal_within(1e-5, "embeddings, merged and saved against unmerged", merged["test"], unmerged["test"])
    domains = [clip.domain for clip in clips["train"]]
    scores = [anomaly_scores(e["train"], e["test"], domains, 1, "none", 0)[0] for e in (merged, unmerged)]
    assert_equal_within(1e-5, "scores, merged and saved against unmerged", *scores)
    stored = [float(value) for _, value in rows(folder / "anomaly_score_fan_section_00_test.csv")]
    assert_equal_within(1e-5, "score.py's file against unmerged", stored, scores[1])


def test_scoring_again_does_not_embed_again(small, monkeypatch, capsys):
    small_demo("fan", n_train=21, n_test=2)
    folder = trained()
    scored()
    first = (folder / "anomaly_score_fan_section_00_test.csv").read_bytes()
    monkeypatch.setattr(score, "embed", None)
    for flags in (["--normalize", "train"], ["--normalize", "test"], ["--normalize", "density"], ["--k", "2"]):
        scored(*flags)
        assert (folder / "anomaly_score_fan_section_00_test.csv").read_bytes() != first
    scored("--smote", "0.5")
    scored()
    assert (folder / "anomaly_score_fan_section_00_test.csv").read_bytes() == first
    assert capsys.readouterr().out.count("transductive") == 1


def test_a_bad_clip_of_the_last_machine_is_told_before_the_first_is_embedded(small, monkeypatch, capsys):
    small_demo("fan", "valve")
    data.list_clips("data/demo", "valve", "test")[-1].path.write_text("no sound")
    monkeypatch.setattr(score, "embed", None)
    with pytest.raises(SystemExit):
        score.main(["--machine", "fan", "valve", "--demo", "--pretrained"])
    assert "1 of 22 clips cannot be used" in capsys.readouterr().err


def test_a_clip_moved_from_train_to_test_is_noticed(small, capsys):
    """The sorted names of all clips stay the same list; only the split of one changes."""
    small_demo("fan")
    scored("--pretrained")
    last = data.list_clips("data/demo", "fan", "train")[-1].path
    last.rename(Path("data/demo/fan/test", "a" + last.name))
    last = Path("data/demo/fan/test", "a" + last.name)
    scored("--pretrained")
    assert "is stale" in capsys.readouterr().out


def test_stale_embeddings_are_noticed(small, capsys):
    small_demo("fan", n_test=2)
    folder = trained()
    scored()
    data.list_clips("data/demo", "fan", "test")[0].path.unlink()
    scored()
    assert "embeddings_fan.npz is stale" in capsys.readouterr().out
    assert len(rows(folder / "anomaly_score_fan_section_00_test.csv")) == 7


def test_embeddings_of_another_model_are_refused(small, capsys):
    small_demo("fan")
    folder = trained()
    scored()
    os.rename(folder / "embeddings_fan.npz", "kept")
    trained("--overwrite", "--seed", "1")
    assert not (folder / "embeddings_fan.npz").exists(), "a new training removes what the old one scored"
    os.rename("kept", folder / "embeddings_fan.npz")
    assert "comes from another model" in error_of(capsys)
    (folder / "embeddings_fan.npz").write_bytes(b"PK damaged")
    assert "is damaged; delete it" in error_of(capsys)


def test_one_joint_run_scores_each_of_its_machines_and_no_other(small, capsys):
    small_demo("fan", "valve", "pump")
    train.main(["--machine", "fan", "valve", "--demo", "--epochs", "1", "--run", "runs/joint"])
    scored("--run", "runs/joint", machine="valve")
    assert Path("runs/joint/nearest_valve.csv").exists() and not Path("runs/joint/nearest_fan.csv").exists()
    assert "was not trained on pump, only on fan valve" in error_of(capsys, "--run", "runs/joint", machine="pump")


def test_pretrained_is_the_untouched_ast_with_its_class_tokens(small):
    small_demo("fan")
    scored("--pretrained")
    model = Embedder(train.load_ast("data/demo/ast.pth"), "cls", None).eval()
    with torch.no_grad():
        expected = embed(model, data.list_clips("data/demo", "fan", "train"), 4)
    np.testing.assert_allclose(np.load("runs/demo-pretrained-fan/embeddings_fan.npz")["train"], expected, atol=1e-6)


def test_scoring_an_unfinished_run_is_refused(small, capsys):
    small_demo("fan")
    (trained() / "adapter.pt").unlink()
    assert "is not finished; repeat its train.py command with --resume" in error_of(capsys)


@needs_real
def test_the_real_clips_go_through_all_three_scripts(small, capsys):
    """Seven machines jointly: 10 s and 12 s, no target training clips, classes of one clip, undefined figures."""
    train.prepare_demo([])
    real = ["--data", str(REAL / "real")]
    train.main(["--machine", "dev", *real, "--weights", "data/demo/ast.pth", "--epochs", "1", "--device", "cpu"])
    assert "14 clips of 7 machines, 12 classes" in capsys.readouterr().out
    score.main(["--machine", "dev", "--device", "cpu"])
    evaluate.main(["--machine", "dev"])
    out = capsys.readouterr().out
    assert "fan: 2 test clips against 2 training clips (2 source)" in out
    assert "| AUC source | n/a | n/a | " in out and "partial (11 of 21 values undefined)" in out
    for machine in data.DEV:
        assert len(rows(Path(f"runs/dev/anomaly_score_{machine}_section_00_test.csv"))) == 2
