"""score.py: nearest neighbours with hand-computed numbers, the whole path against a plain one, and
re-scoring."""

import csv
import math
import os
import shutil
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import FLAGS, REAL, assert_equal_within, needs_real, small_machines
from scipy.io import wavfile
from sklearn.neighbors import NearestNeighbors

import data
import evaluate
import score
import train
from backbone import Embedder
from lora import merge_lora
from score import anomaly_scores, decide, nearest, smote


def embed(model: Embedder, clips: list[data.Clip], batch_size: int = 4) -> np.ndarray:
    return score.embed(model.eval(), clips, data.check_clips(clips), batch_size)


def at(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles: their cosine distance is 1 - cos of the difference."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def d(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


def all_but_itself(n: int) -> np.ndarray:
    return np.arange(n)


# ---------------------------------------------------------------- neighbours


def test_the_score_is_the_smallest_cosine_distance():
    """Training clips at 0°, 40°, 100°; test clips at 10° (10° from the first) and 90° (10° from the
    last)."""
    distance = nearest(at(10, 90), at(0, 40, 100))
    assert distance == pytest.approx([d(10), d(10)], abs=1e-6) and distance.dtype == np.float32


def test_k_neighbours_are_averaged():
    assert nearest(at(10), at(0, 40, 100), k=2) == pytest.approx([(d(10) + d(30)) / 2], abs=1e-6)


def test_a_training_clip_is_not_its_own_neighbour():
    """All rows leave themselves out; a row with -1 does not."""
    bank = at(0, 40, 100)
    assert nearest(bank, bank, own=all_but_itself(3)) == pytest.approx(
        [d(40), d(40), d(60)], abs=1e-6
    )
    assert nearest(bank, bank, own=np.array([-1, 1, -1])) == pytest.approx([0, d(40), 0], abs=1e-6)


def test_a_distance_is_never_negative():
    rows = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert (1 - rows @ rows.T).min() < 0, "rounding passes 0"
    assert nearest(rows, rows).min() >= 0


def test_too_few_clips_for_k_are_refused():
    with pytest.raises(
        ValueError, match="3 nearest neighbours need at least 3 training clips, not 2"
    ):
        nearest(at(0), at(0, 1), k=3)
    with pytest.raises(ValueError, match="at least 2 training clips, not 1"):
        nearest(at(0), at(0), own=all_but_itself(1))


def test_neighbours_equal_scikit_learns_over_many_chunks():
    rng = np.random.default_rng(0)
    queries, bank = (
        F.normalize(torch.from_numpy(rng.normal(size=(n, 16)).astype(np.float32))).numpy()
        for n in (50, 2300)
    )
    theirs = NearestNeighbors(n_neighbors=3, metric="cosine", algorithm="brute").fit(bank)
    np.testing.assert_allclose(
        nearest(queries, bank, 3), theirs.kneighbors(queries)[0].mean(axis=1), atol=1e-6
    )
    own = nearest(bank, bank, 3, own=all_but_itself(2300))
    np.testing.assert_allclose(own, theirs.kneighbors()[0].mean(axis=1), atol=1e-6)


# Source clips at 0°, 2°, 6°; target clips at 90°, 120°, 160°; test clips at 3° and 130°.
TRAIN, DOMAINS, TEST = at(0, 2, 6, 90, 120, 160), ["source"] * 3 + ["target"] * 3, at(3, 130)
# Leave-one-out distances within each bank: 2°, 2°, 4°; 30°, 30°, 40°.
SOURCE, TARGET = np.array([d(2), d(2), d(4)]), np.array([d(30), d(30), d(40)])


def test_none_uses_one_bank_of_both_domains():
    scores, train_scores = anomaly_scores(
        TRAIN, TEST, DOMAINS, k=1, normalize="none", smote_ratio=0
    )
    assert scores == pytest.approx([d(1), d(10)], abs=1e-6)
    assert train_scores == pytest.approx([*SOURCE, *TARGET], abs=1e-6)


def test_train_standardises_each_bank_by_its_leave_one_out_scores():
    """Test clip 3°: source (d(1°) - mean) / std is the smaller; 130°: target (d(10°) - mean) /
    std."""
    scores, train_scores = anomaly_scores(
        TRAIN, TEST, DOMAINS, k=1, normalize="train", smote_ratio=0
    )
    expected = [(d(1) - SOURCE.mean()) / SOURCE.std(), (d(10) - TARGET.mean()) / TARGET.std()]
    # each is also compared with the other bank: 3° is 87° from the target clips, 130° is 124° from
    # the source clips
    expected[0] = min(expected[0], (d(87) - TARGET.mean()) / TARGET.std())
    expected[1] = min(expected[1], (d(124) - SOURCE.mean()) / SOURCE.std())
    assert scores == pytest.approx(expected, rel=1e-3)
    assert train_scores[:3] == pytest.approx((SOURCE - SOURCE.mean()) / SOURCE.std(), rel=1e-3)


def test_test_standardises_each_bank_by_the_test_scores_themselves():
    """Source distances of the test clips: d(1°), d(124°); target: d(87°), d(10°). Two values
    standardise to ±1."""
    scores, _ = anomaly_scores(TRAIN, TEST, DOMAINS, k=1, normalize="test", smote_ratio=0)
    assert scores == pytest.approx([-1, -1], abs=1e-5)
    alone, _ = anomaly_scores(TRAIN, at(3, 130, 10), DOMAINS, k=1, normalize="test", smote_ratio=0)
    assert abs(alone[0] - scores[0]) > 0.1, (
        "transductive: another test clip changes this one's score"
    )


def test_density_divides_by_the_neighbours_own_distance():
    """ρ is the mean distance to the 4 nearest of the 5 others: all but the farthest. 3°: d(1°) /
    ρ(2°)."""
    angles = np.array([0, 2, 6, 90, 120, 160])
    between = np.array([[d(a - b) for b in angles] for a in angles])
    rho = np.array([(row.sum() - row.max()) / 4 for row in between])
    scores, train_scores = anomaly_scores(
        TRAIN, TEST, DOMAINS, k=1, normalize="density", smote_ratio=0
    )
    for query, found in zip((3, 130), scores, strict=True):
        assert found == pytest.approx(
            (np.array([d(query - a) for a in angles]) / rho).min(), rel=1e-4
        )
    expected = (between / rho + np.diag([np.inf] * 6)).min(axis=1)
    assert train_scores == pytest.approx(expected, rel=1e-4)
    assert scores == pytest.approx(
        anomaly_scores(TRAIN, TEST, DOMAINS, 2, "density", 0)[0], rel=9
    )  # k is another number
    assert score.DENSITY_K == 4


def test_density_stays_finite_where_training_clips_are_equal():
    """Copies of a clip have no distance to each other, and SMOTE between them makes more of
    them."""
    rows, domains = at(*[0] * 6, 30, 60, *[90] * 6), ["source"] * 8 + ["target"] * 6
    for ratio in (0.0, 2.0):
        scores, _ = anomaly_scores(rows, at(1, 75), domains, 1, "density", ratio)
        assert np.isfinite(scores).all() and (scores > 0).all()


@pytest.mark.parametrize("normalize", ["none", "train", "test", "density"])
def test_a_domain_without_clips_has_no_bank(normalize):
    bank = at(0, 2, 6, 11, 17)
    both = anomaly_scores(bank, TEST, ["source"] * 5, 1, normalize, 0)
    unlabelled = anomaly_scores(bank, TEST, [None] * 5, 1, normalize, 0)
    for a, b in zip(both, unlabelled, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(both[0]).all()


@pytest.mark.parametrize(
    ("angles", "domains", "normalize", "smote_ratio", "message"),
    [
        ([0, 10], ["source"] * 2, "train", 0, "2 scores of a domain do not vary"),
        (
            [0, 10, 30, 90],
            ["source"] * 3 + ["target"],
            "train",
            0,
            "at least 2 training clips, not 1",
        ),
        (
            [0, 10, 20],
            ["source"] * 3,
            "density",
            0,
            "4 nearest neighbours need at least 5 training clips, not 3",
        ),
        (
            [0, 10, 30, 90, 95],
            ["source"] * 3 + ["target"] * 2,
            "none",
            0.5,
            "at least 3 target training clips, not 2",
        ),
        ([0], ["source"], "none", 0, "at least 2 training clips, not 1"),
    ],
)
def test_too_few_clips_for_a_back_end_are_refused(angles, domains, normalize, smote_ratio, message):
    with pytest.raises(ValueError, match=message):
        anomaly_scores(at(*angles), TEST, domains, 1, normalize, smote_ratio)


def test_the_threshold_is_the_90th_percentile_of_the_training_scores_and_itself_no_anomaly():
    decisions, threshold = decide(np.array([9.0, 9.1, 1.0]), np.arange(11.0))
    assert threshold == 9.0 and decisions.tolist() == [False, True, False]


# ---------------------------------------------------------------- SMOTE


def test_smote_rows_lie_between_a_clip_and_one_of_its_two_nearest():
    """Four clips at 0°, 10°, 30°, 90°: a row's direction lies between a clip and one of its two
    nearest."""
    angles = [0, 10, 30, 90]
    rows = smote(at(*angles), 4000)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-6)
    found = np.degrees(np.arctan2(rows[:, 1], rows[:, 0]))
    # pairs (0, 10), (0, 30), (10, 0), (10, 30), (30, 10), (30, 0), (90, 30), (90, 10), drawn
    # equally often
    inside = {
        bound: ((found > bound[0]) & (found < bound[1])).mean()
        for bound in ((0, 10), (10, 30), (30, 90))
    }

    def share(a: float, b: float, low: float, high: float) -> float:
        """Of the line between two clips, the part whose direction lies between low and high
        degrees."""
        u = np.linspace(0, 1, 100_001)[:, None]
        line = at(a)[0] + u * (at(b)[0] - at(a)[0])
        direction = np.degrees(np.arctan2(line[:, 1], line[:, 0]))
        return ((direction > low) & (direction < high)).mean()

    pairs = [(0, 10), (0, 30), (10, 0), (10, 30), (30, 10), (30, 0), (90, 30), (90, 10)]
    for bound, part in inside.items():
        assert part == pytest.approx(
            np.mean([share(a, b, *bound) for a, b in pairs]), abs=4 * 0.5 / 4000**0.5
        )
    np.testing.assert_array_equal(smote(at(*angles), 4000), rows)


def test_smote_fills_the_target_bank_up_to_the_share_of_the_source_bank(monkeypatch):
    """990 source and 10 target clips, ratio 0.2: 198 - 10 = 188 new rows, as in ASDKit."""
    counts = []
    original = score.smote
    monkeypatch.setattr(
        score, "smote", lambda target, count: counts.append(count) or original(target, count)
    )
    rng = np.random.default_rng(0)
    bank = F.normalize(torch.from_numpy(rng.normal(size=(1000, 8)).astype(np.float32))).numpy()
    between = F.normalize(torch.from_numpy(bank[-5:] * 0.7 + bank[-6:-1] * 0.3)).numpy()
    domains = ["source"] * 990 + ["target"] * 10
    plain_ = anomaly_scores(bank, between, domains, 1, "none", 0.0)
    filled = anomaly_scores(bank, between, domains, 1, "none", 0.2)
    anomaly_scores(bank, between, domains, 1, "none", 0.001)
    assert counts == [188, 0]
    assert (filled[0] <= plain_[0] + 1e-6).all() and (filled[0] < plain_[0] - 1e-6).any()
    np.testing.assert_array_equal(plain_[1], filled[1])  # the threshold comes from real clips only


# ---------------------------------------------------------------- from WAV files to CSV files, against tests/plain.py


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A trained run of one machine with 6, 10 and 12 s clips in both domains, and plain embeddings
    of its clips."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    for split, domain, count in (
        ("train", "source", 12),
        ("train", "target", 6),
        ("test", "source", 3),
        ("test", "target", 3),
    ):
        (folder / "data" / "fan" / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            t = np.arange((6, 10, 12)[i % 3] * 16000) / 16000
            hum = np.sin(2 * np.pi * rng.uniform(100, 300) * t) * (
                1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.05, 3) * t)
            )
            wave = 0.1 * hum + rng.uniform(0.005, 0.05) * rng.normal(size=len(t)) * np.linspace(
                0.2, 1, len(t)
            )
            name = f"section_00_{domain}_{split}_normal_{i:04}_spd_{i % 2}.wav"
            wavfile.write(
                folder / "data" / "fan" / split / name,
                16000,
                (32767 * np.clip(wave, -1, 1)).astype(np.int16),
            )
    torch.manual_seed(1)
    ast = train.backbone.AST(dim=64, depth=2, heads=1)
    for name, parameter in ast.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save(ast.state_dict(), folder / "ast.pth")
    places = ["--data", str(folder / "data"), "--run", str(folder / "run")]
    flags = ["--weights", str(folder / "ast.pth"), "--device", "cpu", "--rank", "4", "--alpha", "6"]
    train.main(
        ["--machine", "fan", *places, *flags, "--epochs", "1", "--batch-size", "4", "--lr", "0.02"]
    )
    state = train.backbone.load_file(folder / "run" / "adapter.pt")
    w = ast.state_dict() | {
        name.removeprefix("ast."): t for name, t in state.items() if name.startswith("ast.")
    }
    head = {name: tensor for name, tensor in state.items() if not name.startswith("ast.")}
    rows = {}
    for split in ("train", "test"):
        paths = sorted((folder / "data" / "fan" / split).iterdir())
        rows[split] = np.stack([plain.embed(w, head, plain.read(path), 6 / 4) for path in paths])
        rows[split + " untouched"] = np.stack(
            [plain.embed(ast.state_dict(), {}, plain.read(path)) for path in paths]
        )
    return folder, rows


BACK_ENDS = [[], ["--k", "2"], ["--smote", "0.7"], ["--normalize", "train"], ["--normalize", "test"],
             ["--normalize", "density"], ["--normalize", "train", "--k", "2", "--smote", "2.5"],
             ["--normalize", "density", "--k", "2", "--smote", "0.7"], ["--pretrained"]]  # fmt: skip


@pytest.mark.parametrize("flags", BACK_ENDS, ids=" ".join)
def test_scoring_equals_a_plain_path(own_run, flags, tmp_path):
    folder, embeddings = own_run
    run, untouched = folder / "run", ""
    if "--pretrained" in flags:
        run, untouched = folder / "pretrained", " untouched"
        flags = [*flags, "--weights", str(folder / "ast.pth")]
    score.main(
        [
            "--machine",
            "fan",
            "--data",
            str(folder / "data"),
            "--run",
            str(run),
            "--device",
            "cpu",
            *flags,
        ]
    )
    options = dict(zip(flags[::2], flags[1::2], strict=False)) if not untouched else {}
    bank, queries = embeddings["train" + untouched], embeddings["test" + untouched]
    names = {
        split: sorted(p.name for p in (folder / "data" / "fan" / split).iterdir())
        for split in ("train", "test")
    }
    expected, threshold = plain.score(
        bank, queries, ["target" in name for name in names["train"]], options.get("--normalize", "none"),
        int(options.get("--k", 1)), float(options.get("--smote", 0)),
    )  # fmt: skip
    found = rows(run / "anomaly_score_fan_section_00_test.csv")
    assert [name for name, _ in found] == names["test"]
    assert [float(value) for _, value in found] == pytest.approx(
        expected.tolist(), rel=2e-3, abs=1e-6
    )
    decided = rows(run / "decision_result_fan_section_00_test.csv")
    assert np.abs(expected - threshold).min() > 1e-6 * np.abs(expected).max(), (
        "no score at the threshold"
    )
    assert decided == [
        [name, str(int(value > threshold))]
        for name, value in zip(names["test"], expected, strict=True)
    ]
    near = rows(run / "nearest_fan.csv")[1:]
    assert [row[:2] for row in near] == [
        [name, names["train"][i]]
        for name, i in zip(names["test"], (queries @ bank.T).argmax(axis=1), strict=True)
    ]
    assert [float(row[2]) for row in near] == pytest.approx(
        (1 - (queries @ bank.T).max(axis=1)).tolist(), abs=1e-6
    )


# ---------------------------------------------------------------- files


def trained(*flags: str) -> Path:
    train.main(["--machine", "fan", *FLAGS, "--epochs", "1", "--batch-size", "4", *flags])
    return Path("runs/fan")


def scored(*flags: str, machine: str = "fan") -> None:
    more = ["--weights", "ast.pth"] if "--pretrained" in flags else []
    score.main(["--machine", machine, "--device", "cpu", *more, *flags])


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def error_of(capsys, *flags: str, machine: str = "fan") -> str:
    with pytest.raises(SystemExit) as stop:
        scored(*flags, machine=machine)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_files_are_the_challenges(small):
    """No header, one row per test clip in order of name, base names, full float precision, \\n
    ends, 0 or 1."""
    small_machines("fan", n_test=3)
    folder = trained()
    scored()
    names = [clip.path.name for clip in data.list_clips("data", "fan", "test")]
    content = (folder / "anomaly_score_fan_section_00_test.csv").read_bytes()
    assert content.endswith(b"\n") and b"\r" not in content
    scores = rows(folder / "anomaly_score_fan_section_00_test.csv")
    decisions = rows(folder / "decision_result_fan_section_00_test.csv")
    near = rows(folder / "nearest_fan.csv")
    assert (
        [row[0] for row in scores]
        == [row[0] for row in decisions]
        == [row[0] for row in near[1:]]
        == names
    )
    assert all(repr(float(value)) == value for _, value in scores) and {
        value for _, value in decisions
    } <= {"0", "1"}


def test_names_with_commas_quotes_and_other_letters_survive(small):
    names = ["a b.wav", "ölpumpe, links.wav", 'the "bad" one.wav', "日本.wav"]
    for split in ("train", "test"):
        Path("data/pump", split).mkdir(parents=True)
        for i, name in enumerate(names):
            samples = np.random.default_rng(i + 10 * (split == "test")).integers(
                -9999, 9999, 8000 + 999 * i
            )
            wavfile.write(Path("data/pump", split, name), 8000, samples.astype(np.int16))
    raw = os.fsencode("data/pump/test/") + b"latin-1 \xf6.wav"
    shutil.copy("data/pump/test/a b.wav", raw)
    small_machines()
    score.main(["--machine", "pump", "--pretrained", "--weights", "ast.pth", "--device", "cpu"])
    found = [
        row[0] for row in rows(Path("runs/pretrained-pump/anomaly_score_pump_section_00_test.csv"))
    ]
    assert found == sorted([*names, "latin-1 \udcf6.wav"])
    data.write_file("data/pump/labels.csv", b"".join(
        b'"%s",%d\n' % (os.fsencode(name.replace('"', '""')), i % 2) for i, name in enumerate(found)))  # fmt: skip
    evaluate.main(["--machine", "pump", "--run", "runs/pretrained-pump"])
    assert Path("runs/pretrained-pump/metrics.csv").exists()


def test_a_long_clip_is_the_mean_of_its_windows_and_batches_do_not_matter(small):
    """1 s has 98 frames, two windows of 96 here: frames 0-95 and 2-97."""
    small_machines("fan", n_test=2)
    model, _ = train.load_run(trained())
    clips = data.list_clips("data", "fan", "test")
    one, many = embed(model, clips, batch_size=1), embed(model, clips, batch_size=5)
    np.testing.assert_allclose(one, many, atol=1e-6)
    x = data.normalise(data.log_mel(data.read_wav(clips[3].path)[None]))
    with torch.no_grad():
        expected = F.normalize(model(x[:, :96]) + model(x[:, 2:98]))
    np.testing.assert_allclose(one[3], expected[0], atol=1e-6)


def test_a_merged_and_saved_model_scores_as_the_trained_one(small):
    """The adapters of a trained run are merged, the plain AST is saved, loaded as public weights
    are, and scored."""
    small_machines("fan", n_test=2)
    folder = trained("--alpha", "16", "--lr", "0.01")
    scored()
    model, _ = train.load_run(folder)
    clips = {split: data.list_clips("data", "fan", split) for split in ("train", "test")}
    unmerged = {split: embed(model, clips[split]) for split in clips}
    public = train.load_ast("ast.pth").state_dict()
    merge_lora(model.ast)
    train.save(Path("merged.pth"), model.ast.state_dict())
    model.ast = train.load_ast("merged.pth")
    assert (model.ast.blocks[0].attn.q.weight - public["blocks.0.attn.q.weight"]).abs().max() > 1e-3
    merged = {split: embed(model, clips[split]) for split in clips}
    assert_equal_within(
        1e-5, "embeddings, merged and saved against unmerged", merged["test"], unmerged["test"]
    )
    domains = [clip.domain for clip in clips["train"]]
    scores = [
        anomaly_scores(e["train"], e["test"], domains, 1, "none", 0)[0] for e in (merged, unmerged)
    ]
    assert_equal_within(1e-5, "scores, merged and saved against unmerged", *scores)
    stored = [float(value) for _, value in rows(folder / "anomaly_score_fan_section_00_test.csv")]
    assert_equal_within(1e-5, "score.py's file against unmerged", stored, scores[1])


def test_scoring_again_does_not_embed_again(small, monkeypatch, capsys):
    small_machines("fan", n_train=21, n_test=2)
    folder = trained()
    scored()
    first = (folder / "anomaly_score_fan_section_00_test.csv").read_bytes()
    monkeypatch.setattr(score, "embed", None)
    for flags in (
        ["--normalize", "train"],
        ["--normalize", "test"],
        ["--normalize", "density"],
        ["--k", "2"],
    ):
        scored(*flags)
        assert (folder / "anomaly_score_fan_section_00_test.csv").read_bytes() != first
    scored("--smote", "0.5")
    scored()
    assert (folder / "anomaly_score_fan_section_00_test.csv").read_bytes() == first
    assert capsys.readouterr().out.count("transductive") == 1


def test_a_bad_clip_of_the_last_machine_is_told_before_the_first_is_embedded(
    small, monkeypatch, capsys
):
    small_machines("fan", "valve")
    data.list_clips("data", "valve", "test")[-1].path.write_text("no sound")
    monkeypatch.setattr(score, "embed", None)
    with pytest.raises(SystemExit):
        score.main(["--machine", "fan", "valve", *FLAGS, "--pretrained"])
    assert "1 of 22 clips cannot be used" in capsys.readouterr().err


def embedded(monkeypatch) -> list[str]:
    """Fills with the names of the clips that go through the network."""
    names, original = [], score.embed
    monkeypatch.setattr(score, "embed", lambda model, clips, *more: (
        names.extend(f"{clip.split}/{clip.path.name}" for clip in clips) or original(model, clips, *more)))  # fmt: skip
    return names


def test_a_first_scoring_decodes_each_clip_twice_and_the_next_none(small, monkeypatch):
    small_machines("fan", "valve")
    decoded, original = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path: decoded.append(path) or original(path))
    score.main(["--machine", "fan", "valve", *FLAGS, "--pretrained", "--run", "runs/both"])
    clips = [
        c.path
        for m in ("fan", "valve")
        for s in ("train", "test")
        for c in data.list_clips("data", m, s)
    ]
    # once to be checked, once to be embedded, although a clip of 1 s has two windows of 96 frames
    # here
    assert sorted(decoded) == sorted(clips * 2)
    decoded.clear()
    score.main(
        ["--machine", "fan", "valve", *FLAGS, "--pretrained", "--run", "runs/both", "--k", "2"]
    )
    assert decoded == []


def test_only_new_changed_and_moved_clips_go_through_the_network(small, monkeypatch):
    small_machines("fan", n_test=2)
    names = embedded(monkeypatch)
    scored("--pretrained")
    clips = {split: data.list_clips("data", "fan", split) for split in ("train", "test")}
    assert len(names) == 7 + 8
    kept = np.load("runs/pretrained-fan/embeddings_fan.npz")

    names.clear()
    gone, changed, moved = clips["test"][0].path, clips["test"][1].path, clips["train"][-1].path
    gone.unlink()
    shutil.copy(clips["test"][2].path, changed)  # another content under the same name
    moved.rename(Path("data/fan/test/a.wav"))
    shutil.copy(clips["test"][3].path, "data/fan/test/new.wav")
    scored("--pretrained")
    assert sorted(names) == sorted([f"test/{changed.name}", "test/a.wav", "test/new.wav"])
    stored = np.load("runs/pretrained-fan/embeddings_fan.npz")
    order = [
        f"{c.split}/{c.path.name}"
        for s in ("train", "test")
        for c in data.list_clips("data", "fan", s)
    ]
    assert [file.split()[0] for file in stored["files"]] == order and len(order) == 6 + 9, (
        "what is gone is gone"
    )
    old, now = kept["embeddings"], stored["embeddings"]  # 7 training clips, then 8 test clips
    np.testing.assert_array_equal(now[:6], old[:6])
    np.testing.assert_array_equal(
        now[order.index(f"test/{clips['test'][2].path.name}")], old[7 + 2]
    )
    np.testing.assert_allclose(now[order.index(f"test/{changed.name}")], old[7 + 2], atol=1e-6)
    np.testing.assert_allclose(now[order.index("test/a.wav")], old[6], atol=1e-6)
    names.clear()
    scored("--pretrained")
    assert names == []


def test_embeddings_of_another_model_are_refused(small, capsys):
    small_machines("fan")
    folder = trained()
    scored()
    shutil.copy(folder / "embeddings_fan.npz", "kept")
    trained("--overwrite", "--seed", "1")
    assert not (folder / "embeddings_fan.npz").exists(), (
        "a new training removes what the old one scored"
    )
    os.rename("kept", folder / "embeddings_fan.npz")
    assert "comes from another model" in error_of(capsys)
    (folder / "embeddings_fan.npz").write_bytes(b"PK damaged")
    assert "is damaged; delete it" in error_of(capsys)


def test_one_joint_run_scores_each_of_its_machines_and_no_other(small, capsys):
    small_machines("fan", "valve", "pump")
    train.main(["--machine", "fan", "valve", *FLAGS, "--epochs", "1", "--run", "runs/joint"])
    scored("--run", "runs/joint", machine="valve")
    assert (
        Path("runs/joint/nearest_valve.csv").exists()
        and not Path("runs/joint/nearest_fan.csv").exists()
    )
    assert "was not trained on pump, only on fan valve" in error_of(
        capsys, "--run", "runs/joint", machine="pump"
    )


def test_pretrained_is_the_untouched_ast_with_its_class_tokens(small):
    small_machines("fan")
    scored("--pretrained")
    model = Embedder(train.load_ast("ast.pth"), "cls", None).eval()
    with torch.no_grad():
        expected = embed(model, data.list_clips("data", "fan", "train"))
    np.testing.assert_allclose(
        np.load("runs/pretrained-fan/embeddings_fan.npz")["embeddings"][:7], expected, atol=1e-6
    )


def test_scoring_an_unfinished_run_is_refused(small, capsys):
    small_machines("fan")
    (trained() / "adapter.pt").unlink()
    assert "is not finished; repeat its train.py command with --resume" in error_of(capsys)


@needs_real
def test_the_real_clips_go_through_all_three_scripts(small, capsys):
    """Seven machines jointly: 10 s and 12 s, no target training clips, classes of one clip,
    undefined figures."""
    small_machines()
    real = ["--data", str(REAL / "real")]
    train.main(
        ["--machine", "dev", *real, "--weights", "ast.pth", "--epochs", "1", "--device", "cpu"]
    )
    assert "14 clips, 12 classes" in capsys.readouterr().out
    score.main(["--machine", "dev", "--device", "cpu"])
    evaluate.main(["--machine", "dev"])
    out = capsys.readouterr().out
    assert "fan: 2 test clips against 2 training clips (2 source)" in out
    assert "| AUC source | n/a | n/a | " in out and "partial (11 of 21 values undefined)" in out
    for machine in data.DEV:
        assert len(rows(Path(f"runs/dev/anomaly_score_{machine}_section_00_test.csv"))) == 2
