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
from conftest import FLAGS, REAL, assert_equal_within, embed_all, needs_real, small_machines
from scipy.io import wavfile
from sklearn.neighbors import NearestNeighbors

import data
import evaluate
import score
import train
from backbone import Embedder
from lora import merge_lora
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
    return anomaly_scores(
        train, test, np.arange(len(train)), np.array(domains, object), k, normalize
    )


# ---------------------------------------------------------------- neighbours


def test_distances_are_those_of_the_cosine():
    """Test windows at 10° and 90°, training windows at 0°, 40°, 100°."""
    found = distances(at(10, 90), at(0, 40, 100))
    expected = [[d(10), d(30), d(90)], [d(90), d(50), d(10)]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_distance_is_never_negative():
    rows = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert (1 - rows @ rows.T).min() < 0, "rounding passes 0"
    assert distances(rows, rows).min() == 0


def test_the_k_nearest_are_averaged():
    found = np.array([[0.5, 0.1, np.inf, 0.3]], np.float32)
    assert nearest(found) == pytest.approx([0.1])
    assert nearest(found, 2) == pytest.approx([0.2])
    assert nearest(found, 3) == pytest.approx([0.3])
    with pytest.raises(
        ValueError, match="4 neighbours need 4 windows of other training clips, not 3"
    ):
        nearest(found, 4)


def test_neighbours_equal_scikit_learns():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(700, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bank, queries = rows[:650], rows[650:]
    theirs = NearestNeighbors(n_neighbors=3, metric="cosine", algorithm="brute").fit(bank)
    of_test, of_train = one_window_each(bank, queries, [None] * 650, 3, "none")
    np.testing.assert_allclose(of_test, theirs.kneighbors(queries)[0].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(of_train, theirs.kneighbors()[0].mean(axis=1), atol=1e-6)


def test_a_clips_score_is_that_of_its_most_anomalous_window():
    scores = np.array([0.1, 0.7, 0.3, 0.2, 0.9, 0.9])
    assert most_anomalous(scores, np.array([0, 0, 0, 1, 2, 2])).tolist() == [1, 3, 4]


def test_a_training_clip_leaves_out_all_of_its_own_windows():
    """Clip 0 at 0° and 1°, clip 1 at 40°, clip 2 at 100°: 0° is nearest to 40°, not to 1°."""
    clip, domain = np.array([0, 0, 1, 2]), np.array([None] * 4, object)
    rows = at(0, 1, 40, 100)
    of_test, of_train = anomaly_scores(rows, at(2, 90), clip, domain, 1, "none")
    assert of_test == pytest.approx([d(1), d(10)], abs=1e-6)
    assert of_train == pytest.approx([d(40), d(39), d(39), d(60)], abs=1e-6)


# Source clips at 0°, 2°, 6°; target clips at 90°, 120°, 160°; test clips at 3° and 130°.
TRAIN, DOMAINS, TEST = at(0, 2, 6, 90, 120, 160), ["source"] * 3 + ["target"] * 3, at(3, 130)
# Leave-one-out distances within each bank: 2°, 2°, 4°; 30°, 30°, 40°.
SOURCE, TARGET = np.array([d(2), d(2), d(4)]), np.array([d(30), d(30), d(40)])


def test_none_uses_one_bank_of_both_domains():
    scores, train_scores = one_window_each(TRAIN, TEST, DOMAINS, 1, "none")
    assert scores == pytest.approx([d(1), d(10)], abs=1e-6)
    assert train_scores == pytest.approx([*SOURCE, *TARGET], abs=1e-6)


def test_train_standardises_each_bank_by_its_leave_one_out_scores():
    """3°: source (d(1°) - mean) / std is the smaller; 130°: target (d(10°) - mean) / std."""
    scores, train_scores = one_window_each(TRAIN, TEST, DOMAINS, 1, "train")
    expected = [(d(1) - SOURCE.mean()) / SOURCE.std(), (d(10) - TARGET.mean()) / TARGET.std()]
    # each is also compared with the other bank: 3° is 87° from the target clips, 130° is 124°
    # from the source clips
    expected[0] = min(expected[0], (d(87) - TARGET.mean()) / TARGET.std())
    expected[1] = min(expected[1], (d(124) - SOURCE.mean()) / SOURCE.std())
    assert scores == pytest.approx(expected, rel=1e-3)
    assert train_scores[:3] == pytest.approx((SOURCE - SOURCE.mean()) / SOURCE.std(), rel=1e-3)


def test_test_standardises_each_bank_by_the_test_scores_themselves():
    """Source distances of the test clips: d(1°), d(124°); target: d(87°), d(10°). Two values
    standardise to ±1."""
    scores, _ = one_window_each(TRAIN, TEST, DOMAINS, 1, "test")
    assert scores == pytest.approx([-1, -1], abs=1e-5)
    alone, _ = one_window_each(TRAIN, at(3, 130, 10), DOMAINS, 1, "test")
    assert abs(alone[0] - scores[0]) > 0.1, "transductive: another test clip changes this score"


def test_density_divides_by_the_neighbours_own_distance():
    """ρ is the mean distance to the 4 nearest of the 5 others: all but the farthest."""
    angles = np.array([0, 2, 6, 90, 120, 160])
    between = np.array([[d(a - b) for b in angles] for a in angles])
    rho = np.array([(row.sum() - row.max()) / 4 for row in between])
    scores, train_scores = one_window_each(TRAIN, TEST, DOMAINS, 1, "density")
    for query, found in zip((3, 130), scores):
        expected = np.array([d(query - a) for a in angles]) / rho
        assert found == pytest.approx(expected.min(), rel=1e-4)
    expected = (between / rho + np.diag([np.inf] * 6)).min(axis=1)
    assert train_scores == pytest.approx(expected, rel=1e-4)
    assert score.DENSITY_K == 4


def test_density_stays_finite_where_training_clips_are_equal():
    """Five silent clips of different lengths may have equal embeddings: ρ is held at 1e-6."""
    scores, _ = one_window_each(at(*[0] * 6), at(0, 1), [None] * 6, 1, "density")
    assert scores == pytest.approx([0, d(1) / 1e-6], rel=1e-2)


@pytest.mark.parametrize("normalize", ["none", "train", "test", "density"])
def test_a_domain_without_clips_has_no_bank(normalize):
    bank = at(0, 2, 6, 11, 17)
    both = one_window_each(bank, TEST, ["source"] * 5, 1, normalize)
    unlabelled = one_window_each(bank, TEST, [None] * 5, 1, normalize)
    for a, b in zip(both, unlabelled):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(both[0]).all()


FIVE = "4 neighbours need 4 windows of other training clips, not 2"


@pytest.mark.parametrize(
    ("angles", "domains", "normalize", "message"),
    [
        ([0, 10], ["source"] * 2, "train", "2 scores of a domain do not vary"),
        (
            [0, 10, 30, 90],
            ["source"] * 3 + ["target"],
            "train",
            "1 neighbours need 1 windows of other training clips, not 0",
        ),
        ([0, 10, 20], ["source"] * 3, "density", FIVE),
        ([0], ["source"], "none", "1 neighbours need 1 windows of other training clips, not 0"),
    ],
)
def test_too_few_clips_for_a_back_end_are_refused(angles, domains, normalize, message):
    with pytest.raises(ValueError, match=message):
        one_window_each(at(*angles), TEST, domains, 1, normalize)


def test_the_threshold_is_a_percentile_of_the_training_scores_and_itself_no_anomaly():
    decisions, threshold = decide(np.array([9.0, 9.1, 1.0]), np.arange(11.0))
    assert threshold == 9.0 and decisions.tolist() == [False, True, False]
    assert decide(np.array([9.0]), np.arange(11.0), 50)[1] == 5.0


# ------------------------------------------ from WAV files to CSV files, against tests/plain.py


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
        rows[split] = [plain.embed(w, head, plain.read(path), 6 / 4) for path in paths]
        untouched = [plain.embed(ast.state_dict(), {}, plain.read(path)) for path in paths]
        rows[split + " untouched"] = untouched
        means = [plain.embed(ast.state_dict(), None, plain.read(path)) for path in paths]
        rows[split + " mean"] = means
    return folder, rows


BACK_ENDS = [[], ["--k", "2"], ["--normalize", "train"], ["--normalize", "test"],
             ["--normalize", "density"], ["--normalize", "train", "--k", "2"],
             ["--normalize", "density", "--k", "2"], ["--pretrained"],
             ["--pretrained", "--pooling", "mean"]]  # fmt: skip


@pytest.mark.parametrize("flags", BACK_ENDS, ids=" ".join)
def test_scoring_equals_a_plain_path(own_run, flags):
    folder, embeddings = own_run
    run, kind = folder / "run", ""
    if "--pretrained" in flags:
        run, kind = folder / f"pretrained{len(flags)}", " mean" if "mean" in flags else " untouched"
        flags = [*flags, "--weights", str(folder / "ast.pth")]
    places = ["--data", str(folder / "data"), "--run", str(run), "--device", "cpu"]
    score.main(["--machine", "fan", *places, *flags])
    options = {} if kind else dict(zip(flags[::2], flags[1::2]))
    bank, queries = embeddings["train" + kind], embeddings["test" + kind]
    names = {}
    for split in ("train", "test"):
        names[split] = sorted(p.name for p in (folder / "data" / "fan" / split).iterdir())
    is_target = ["target" in name for name in names["train"]]
    normalize, k = options.get("--normalize", "none"), int(options.get("--k", 1))
    expected, threshold, window = plain.score(bank, queries, is_target, normalize, k)

    found = rows(run / "anomaly_score_fan_section_00_test.csv")
    assert [name for name, _ in found] == names["test"]
    values = [float(value) for _, value in found]
    # Distances agree to 2e-6; the normalised ones are divided by small numbers.
    tolerance = 2e-6 if normalize == "none" else 1e-3
    assert_equal_within(tolerance, f"scores, {flags}, against a plain path", values, expected)
    decided = rows(run / "decision_result_fan_section_00_test.csv")
    assert np.abs(expected - threshold).min() > 1e-6 * np.abs(expected).max(), "none at threshold"
    assert [int(value) for _, value in decided] == (expected > threshold).astype(int).tolist()

    report = {row[0]: row[1:] for row in rows(run / "report_fan.csv")[1:]}
    columns = [(i, w) for i, windows in enumerate(bank) for w in range(len(windows))]
    rows_of_bank = np.concatenate(bank)
    starts = {1: [0.0], 2: [0.0, 1.74]}
    for name, windows, at_window, value in zip(names["test"], queries, window, values):
        distance = 1 - rows_of_bank @ windows[at_window]
        near = names["train"][columns[distance.argmin()][0]]
        found = report[name]
        assert [float(x) for x in found[:2]] == [
            value,
            pytest.approx(threshold, abs=tolerance),
        ]
        assert found[2:4] == [str(int(value > float(found[1]))), near]
        assert float(found[4]) == pytest.approx(distance.min(), abs=2e-6)
        assert float(found[5]) == starts[len(windows)][at_window]
    order = [float(row[1]) for row in rows(run / "report_fan.csv")[1:]]
    assert order == sorted(order, reverse=True)


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
    assert [row[0] for row in scores] == [row[0] for row in decisions] == names
    report = rows(folder / "report_fan.csv")
    header = "test_clip,score,threshold,alarm,nearest_training_clip,distance,at_seconds"
    assert ",".join(report[0]) == header and sorted(row[0] for row in report[1:]) == names
    assert all(repr(float(value)) == value for _, value in scores) and {
        value for _, value in decisions
    } <= {"0", "1"}


def test_names_with_commas_quotes_and_other_letters_survive(small):
    names = ["a b.wav", "ölpumpe, links.wav", 'the "bad" one.wav', "日本.wav", "a\rb\nc\td.wav"]
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
    data.write_file(
        "data/pump/labels.csv",
        b"".join(
            b'"%s",%d\n' % (os.fsencode(name.replace('"', '""')), i % 2)
            for i, name in enumerate(found)
        ),
    )
    evaluate.main(["--machine", "pump", "--run", "runs/pretrained-pump"])
    assert Path("runs/pretrained-pump/metrics.csv").exists()


def test_every_window_of_a_long_clip_is_embedded_and_batches_do_not_matter(small):
    """1 s has 98 frames, two windows of 96 here: frames 0-95 and 2-97."""
    small_machines("fan", n_test=2)
    model, _ = train.load_run(trained())
    clips = data.list_clips("data", "fan", "test")
    one, many = embed_all(model, clips, batch_size=1), embed_all(model, clips, batch_size=5)
    np.testing.assert_allclose(one, many, atol=1e-6)
    x = data.normalise(data.log_mel(data.read_wav(clips[3].path)[None]))
    with torch.no_grad():
        expected = [model(x[:, :96])[0].numpy(), model(x[:, 2:98])[0].numpy()]
    np.testing.assert_allclose(one[6:8], expected, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_full_and_a_clip_is_decoded_once_a_batch_at_most(small, monkeypatch, workers):
    """Four clips of 1 s (two windows) and one of 20 s (21 windows): 29 windows, 3 batches of 12."""
    small_machines("fan", n_test=1)
    long = Path("data/fan/test/long.wav")
    wavfile.write(long, 16000, np.random.default_rng(0).normal(0, 900, 20 * 16000).astype(np.int16))
    clips = data.list_clips("data", "fan", "test")
    lengths = [recording.n_samples for recording in data.check_clips(clips)]
    original, decoded = data.read_wav, torch.zeros(1, dtype=torch.int64).share_memory_()

    def counted(path):
        decoded.add_(1)
        return original(path)

    monkeypatch.setattr(data, "read_wav", counted)
    sizes, index = [], []
    model = Embedder(train.load_ast("ast.pth"), "cls", None)
    for of_batch, rows in score.embed(model, clips, lengths, 12, workers):
        assert len(of_batch) == len(rows)
        sizes.append(len(rows))
        index += of_batch.tolist()
    assert sizes == [12, 12, 5] and index == sorted(index)
    assert decoded.item() <= 5 + 2, "each once, and again where its windows go on in another batch"
    assert workers or decoded.item() == 5


def noise(path: str, seconds: float, seed: int = 0, level: float = 900) -> Path:
    """A WAV file of white noise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, level, int(seconds * 16000))
    wavfile.write(path, 16000, samples.clip(-32768, 32767).astype(np.int16))
    return Path(path)


def report_of(run: str, machine: str = "pump") -> list[dict[str, str]]:
    with open(f"{run}/report_{machine}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_fault_in_a_long_recording_is_found_with_its_place(small, capsys):
    """30 s of noise with one second of a hum inside score as that second alone does."""
    small_machines()
    for i in range(6):
        noise(f"data/pump/train/{i}.wav", 10, seed=i)
    _, healthy = wavfile.read(noise("data/pump/test/healthy.wav", 30, seed=99))
    hum = (9000 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)).astype(np.int16)
    wavfile.write("data/pump/test/alone.wav", 16000, hum)
    start = 17 * 16000
    wavfile.write("data/pump/test/inside.wav", 16000,
                  np.concatenate([healthy[:start], hum, healthy[start + 16000 :]]))  # fmt: skip
    scored("--pretrained", machine="pump")
    found = {row["test_clip"]: row for row in report_of("runs/pretrained-pump")}
    values = {name: float(row["score"]) for name, row in found.items()}
    assert values["inside.wav"] > 0.8 * values["alone.wav"] > 2 * values["healthy.wav"]
    assert 16 <= float(found["inside.wav"]["at_seconds"]) <= 18
    assert found["inside.wav"]["alarm"] == "1"
    assert "inside.wav" in capsys.readouterr().out, "the ten highest are printed"


def test_copies_of_a_training_clip_are_said_and_count_once(small, capsys):
    small_machines()
    for i in range(6):
        noise(f"data/pump/train/{i}.wav", 1, seed=i)
    noise("data/pump/test/new.wav", 1, seed=50)
    scored("--pretrained", machine="pump")
    before, out = report_of("runs/pretrained-pump"), capsys.readouterr().out
    assert "copies" not in out
    for i in range(6):
        shutil.copy(f"data/pump/train/{i}.wav", f"data/pump/train/copy of {i}.wav")
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    assert "6 training clips are copies of others and count once: copy of 0.wav = 0.wav" in out
    assert report_of("runs/pretrained-pump") == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("short.wav", lambda x: x[:8000], "length up to a window's, in s"),
        ("loud.wav", lambda x: x * 4, "level in dB"),
        (
            "clipped.wav",
            lambda x: np.where(np.arange(len(x)) % 50, x, 32767),
            "% of clipped samples",
        ),
        ("gap.wav", lambda x: np.where(np.arange(len(x)) < 4000, 0, x), "% of silence"),
    ],
)
def test_clips_unlike_the_training_clips_are_said(
    small, monkeypatch, capsys, name, change, message
):
    small_machines()
    monkeypatch.setattr(data, "WINDOW", 16400)  # a window of 1.025 s
    for i in range(5):
        noise(f"data/pump/train/{i}.wav", 1, seed=i)
    noise("data/pump/test/alike.wav", 1, seed=7)
    _, samples = wavfile.read("data/pump/train/0.wav")
    wavfile.write(f"data/pump/test/{name}", 16000, change(samples.astype(int)).astype(np.int16))
    scored("--pretrained", machine="pump")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    said = [
        line for line in notes if f"1 test clips are unlike the training clips in {message}" in line
    ]
    assert len(said) == 1 and name in said[0] and "alike.wav" not in " ".join(notes)


def test_few_training_clips_and_test_clips_that_are_copies_are_said(small, capsys):
    small_machines()
    for i in range(4):
        noise(f"data/pump/train/{i}.wav", 1, seed=i)
    noise("data/pump/test/x.wav", 1, seed=7)
    shutil.copy("data/pump/train/2.wav", "data/pump/test/same.wav")
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    assert "note: pump: only 4 training clips; the threshold says little" in out
    assert "1 test clips are copies of training clips, so their score is 0: same.wav" in out
    message = error_of(capsys, "--run", "runs/pretrained-pump", machine="pump")
    assert "but scores of the untouched AST: add --pretrained" in message


def test_training_clips_of_unequal_length_or_level_are_said(small, capsys):
    small_machines()
    for i in range(4):
        noise(f"data/pump/train/{i}.wav", 0.5 + 0.1 * i, seed=i, level=10 * 5**i)
    noise("data/pump/test/x.wav", 0.6, seed=7)
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    assert "training clips differ in length up to a window's, in s: 0.wav (0.5), 3.wav (0.8)" in out
    assert "training clips differ in level in dB: 0.wav" in out


def test_a_merged_and_saved_model_scores_as_the_trained_one(small):
    """The adapters of a trained run are merged, the plain AST is saved, loaded as public weights
    are, and scored."""
    small_machines("fan", n_test=2)
    folder = trained("--alpha", "16", "--lr", "0.01")
    scored()
    model, _ = train.load_run(folder)
    clips = {split: data.list_clips("data", "fan", split) for split in ("train", "test")}
    unmerged = {split: embed_all(model, clips[split]) for split in clips}
    public = train.load_ast("ast.pth").state_dict()
    merge_lora(model.ast)
    train.save(Path("merged.pth"), model.ast.state_dict())
    model.ast = train.load_ast("merged.pth")
    assert (model.ast.blocks[0].attn.q.weight - public["blocks.0.attn.q.weight"]).abs().max() > 1e-3
    merged = {split: embed_all(model, clips[split]) for split in clips}
    what = "embeddings, merged and saved against unmerged"
    assert_equal_within(1e-5, what, merged["test"], unmerged["test"])
    clip, domain = np.repeat(np.arange(7), 2), np.array([None] * 14, object)  # two windows each
    scores = []
    for e in (merged, unmerged):
        of_windows, _ = anomaly_scores(e["train"], e["test"], clip, domain, 1, "none")
        scores.append(of_windows.reshape(-1, 2).max(axis=1))
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

    def counted(model, clips, *more):
        names.extend(f"{clip.split}/{clip.path.name}" for clip in clips)
        return original(model, clips, *more)

    monkeypatch.setattr(score, "embed", counted)
    return names


def test_a_first_scoring_decodes_each_clip_twice_and_the_next_none(small, monkeypatch):
    small_machines("fan", "valve")
    decoded, original = [], data.read_wav
    monkeypatch.setattr(data, "read_wav", lambda path: decoded.append(path) or original(path))
    both = ["--machine", "fan", "valve", *FLAGS, "--pretrained", "--run", "runs/both"]
    score.main(both)
    clips = []
    for machine in ("fan", "valve"):
        for split in ("train", "test"):
            clips += [clip.path for clip in data.list_clips("data", machine, split)]
    # once to be checked, once to be embedded, although a clip of 1 s has two windows here
    assert sorted(decoded) == sorted(clips * 2)
    decoded.clear()
    score.main([*both, "--k", "2"])
    assert decoded == []


def test_only_new_contents_go_through_the_network(small, monkeypatch):
    """By checksum: a file that was overwritten within the same second and of the same size is new,
    one that was renamed, moved or copied is not."""
    small_machines("fan", n_test=2)
    names = embedded(monkeypatch)
    scored("--pretrained")
    assert len(names) == 7 + 8
    before = {row["test_clip"]: row["score"] for row in report_of("runs/pretrained-fan", "fan")}

    names.clear()
    tests = [clip.path for clip in data.list_clips("data", "fan", "test")]
    train_ = [clip.path for clip in data.list_clips("data", "fan", "train")]
    stat = tests[1].stat()
    _, samples = wavfile.read(tests[1])
    wavfile.write(tests[1], 16000, samples[::-1].copy())
    os.utime(tests[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert tests[1].stat().st_size == stat.st_size
    tests[0].unlink()
    tests[2].rename("data/fan/test/renamed.wav")
    shutil.copy(tests[3], "data/fan/test/copy.wav")
    train_[-1].rename("data/fan/test/moved.wav")
    scored("--pretrained")
    assert names == [f"test/{tests[1].name}"]
    found = {row["test_clip"]: row for row in report_of("runs/pretrained-fan", "fan")}
    assert len(found) == 8 + 1 and found["copy.wav"]["score"] == found[tests[3].name]["score"]
    assert float(found[tests[4].name]["score"]) >= float(before[tests[4].name])
    stored = np.load("runs/pretrained-fan/embeddings_fan.npz")
    assert len(stored["digests"]) == 6 + 8, "what is gone is gone, and a copy is kept once"
    names.clear()
    scored("--pretrained")
    assert names == []


def test_embeddings_are_kept_as_they_come(small, monkeypatch, capsys):
    """Ctrl-C after the third batch of 4 windows: two clips of each batch are whole, and kept."""
    small_machines("fan", n_test=2)
    monkeypatch.setattr(score, "KEEP_WINDOWS", 4)
    original = score.embed

    def interrupted(*arguments):
        for number, batch in enumerate(original(*arguments), 1):
            if number == 4:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(score, "embed", interrupted)
        scored("--pretrained", "--batch-size", "4")
    assert stop.value.code == 130 and "continues" in capsys.readouterr().err
    assert len(np.load("runs/pretrained-fan/embeddings_fan.npz")["digests"]) == 6
    names = embedded(monkeypatch)
    scored("--pretrained", "--batch-size", "4")
    assert len(names) == 15 - 6
    first = report_of("runs/pretrained-fan", "fan")
    shutil.rmtree("runs")
    scored("--pretrained")
    for row, whole in zip(first, report_of("runs/pretrained-fan", "fan")):
        assert row["test_clip"] == whole["test_clip"]
        assert float(row["score"]) == pytest.approx(float(whole["score"]), abs=1e-6)


def test_a_disk_that_fills_while_embedding_keeps_what_there_was(small, monkeypatch, capsys):
    small_machines("fan", n_test=2)
    monkeypatch.setattr(score, "KEEP_WINDOWS", 4)
    savez, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        message = error_of(capsys, "--pretrained", "--batch-size", "4")
    assert "cannot write runs/pretrained-fan/embeddings_fan.npz: No space left" in message
    assert len(np.load("runs/pretrained-fan/embeddings_fan.npz")["digests"]) == 4
    assert not list(Path("runs/pretrained-fan").glob("*.part"))


def test_a_large_machine_is_scored_in_seconds(tmp_path):
    """2,000 training clips x 500 test clips, embeddings made up; tests/bench.py has 20,000."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2500, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    of_test, of_train = one_window_each(rows[:2000], rows[2000:], [None] * 2000, 1, "none")
    expected = 1 - (rows[2000:].astype(float) @ rows[:2000].T).max(axis=1)
    np.testing.assert_allclose(of_test, expected, atol=1e-5)
    own = rows[:2000].astype(float) @ rows[:2000].T
    np.fill_diagonal(own, -2)
    np.testing.assert_allclose(of_train, 1 - own.max(axis=1), atol=1e-5)


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
        Path("runs/joint/report_valve.csv").exists()
        and not Path("runs/joint/report_fan.csv").exists()
    )
    assert "was not trained on pump, only on fan valve" in error_of(
        capsys, "--run", "runs/joint", machine="pump"
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pretrained_is_the_untouched_ast(small, pooling):
    small_machines("fan")
    scored("--pretrained", "--pooling", pooling)
    run = Path("runs/pretrained-fan" if pooling == "cls" else "runs/pretrained-mean-fan")
    ast = train.load_ast("ast.pth")
    wave = data.read_wav(data.list_clips("data", "fan", "train")[0].path)
    with torch.no_grad():
        tokens = ast(data.normalise(data.log_mel(wave[None]))[:, :96])[0]
    pooled = tokens[:2].mean(dim=0) if pooling == "cls" else tokens[2:].mean(dim=0)
    found = np.load(run / "embeddings_fan.npz")["rows"][0]
    np.testing.assert_allclose(found, F.normalize(pooled, dim=0), atol=1e-6)


def test_pooling_of_a_trained_run_is_its_own(small, capsys):
    small_machines("fan")
    trained()
    assert "--pooling goes with --pretrained" in error_of(capsys, "--pooling", "mean")


def test_scoring_an_unfinished_run_is_refused(small, capsys):
    small_machines("fan")
    (trained() / "adapter.pt").unlink()
    assert "is not finished; the same train.py command again continues it" in error_of(capsys)


def test_a_missing_run_beside_a_pretrained_one_says_the_flag(small, capsys):
    small_machines("fan")
    scored("--pretrained")
    assert "runs/pretrained-fan is there: add --pretrained" in error_of(capsys)
    with pytest.raises(SystemExit):
        evaluate.main(["--machine", "fan"])
    assert "--run runs/pretrained-fan is there" in capsys.readouterr().err


def test_rescoring_removes_what_it_does_not_make_anew(small):
    small_machines("fan")
    scored("--pretrained")
    for name in ("fan.png", "metrics.csv"):
        Path("runs/pretrained-fan", name).touch()
    scored("--pretrained", "--percentile", "50")
    assert not list(Path("runs/pretrained-fan").glob("*.png"))
    assert not Path("runs/pretrained-fan/metrics.csv").exists()


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
