"""score.py: nearest neighbours with hand-computed numbers, the whole path against a plain one, its
files, and what it keeps.
"""

import datetime
import html.parser
import json
import math
import os
import shutil
import urllib.parse
from pathlib import Path

import demo
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
from data import InputError
from score import anomaly_scores, distances, most_anomalous, nearest


def at(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles: their cosine distance is 1 - cos of the difference."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def d(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


def one_window_each(
    train: np.ndarray, test: np.ndarray, domains: list[str], k: int, normalize: str
) -> tuple[np.ndarray, np.ndarray]:
    d_train = distances(train, train)
    np.fill_diagonal(d_train, np.inf)
    return anomaly_scores(distances(test, train), d_train, np.array(domains), k, normalize)


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
    with pytest.raises(InputError, match=r"has only 3 windows of other clips as neighbours, not 4"):
        nearest(found, 4)


def test_a_clips_score_is_that_of_its_most_anomalous_window():
    scores = np.array([0.1, 0.7, 0.3, 0.2, 0.9, 0.9])
    assert most_anomalous(scores, np.array([0, 0, 0, 1, 2, 2])).tolist() == [1, 3, 4]


def scored_vectors(monkeypatch, train: list, test: list, *flags: str) -> tuple[list, np.ndarray]:
    """Score the machine pump, whose clips have these windows' embeddings; -> the rows of its test
    clips, and the training clips' own scores.
    """
    for split, clips in (("train", train), ("test", test)):
        for i in range(len(clips)):
            noise(f"data/pump/{split}/{i}.wav", 0.1, seed=i + 50 * (split == "test"))
    found, size = [], len(train)
    vectors = [(torch.from_numpy(e), [0] * len(e)) for e in [*train, *test]]
    parts = iter([vectors[:size], vectors[size:]])
    monkeypatch.setattr(score, "embed", lambda *args: iter(next(parts)))
    monkeypatch.setattr(score, "write_results", lambda *args: found.append((args[1], args[3])))
    small_machines()
    scored("--pretrained", *flags, machine="pump")
    return found[0]


def test_a_training_clip_leaves_out_all_of_its_own_windows(small, monkeypatch):
    """Clip 0 at 0° and 1°, clip 1 at 40°, clip 2 at 100°: 0° is nearest to 40°, not to 1°. The
    threshold is a percentile of the clips' scores, 60°, 40° and 39°.
    """
    train, test = [at(0, 1), at(40), at(100)], [at(2), at(90)]
    rows, own = scored_vectors(monkeypatch, train, test, "--percentile", "50")
    assert [row["score"] for row in rows] == pytest.approx([d(1), d(10)], abs=1e-6)
    assert own == pytest.approx([d(40), d(39), d(60)], abs=1e-6)
    assert rows[0]["threshold"] == pytest.approx(d(40), abs=1e-6)


def test_a_copy_is_no_neighbour_in_whatever_bytes_it_was_saved(small, monkeypatch, capsys):
    """Clips 0 and 1 are the same sound; 2 is 10° away and 3 another 20°. Test clip 1 is a copy."""
    train, test = [at(0), at(0), at(10), at(30)], [at(33), at(10)]
    rows, own = scored_vectors(monkeypatch, train, test)
    assert own == pytest.approx([d(10), d(10), d(10), d(20)], abs=1e-6)
    assert [row["score"] for row in rows] == pytest.approx([d(3), 0], abs=1e-6)
    assert "copies among the training clips: 1\n" in capsys.readouterr().out


def test_a_score_at_the_threshold_is_no_alarm(small, monkeypatch):
    """Training clips at right angles have the distance 1, as has a test clip opposite to one."""
    east, north = np.eye(2, dtype=np.float32)
    rows, own = scored_vectors(monkeypatch, [east[None], north[None]], [-east[None], east[None]])
    assert own.tolist() == [1, 1] and rows[0]["threshold"] == rows[0]["score"] == 1
    assert [row["alarm"] for row in rows] == [0, 0]


# Source clips at 0°, 2°, 6°; target clips at 90°, 120°, 160°; test clips at 3° and 130°.
TRAIN, DOMAINS, TEST = at(0, 2, 6, 90, 120, 160), ["source"] * 3 + ["target"] * 3, at(3, 130)


def test_density_stays_finite_where_training_clips_are_equal():
    scores, _ = one_window_each(at(*[0] * 6), at(0, 1), [""] * 6, 1, "density")
    assert scores == pytest.approx([0, d(1) / 1e-6], rel=1e-2)


@pytest.mark.parametrize("normalize", ["none", "test", "density"])
def test_a_domain_without_clips_has_no_bank(normalize):
    bank = at(0, 2, 6, 11, 17)
    both = one_window_each(bank, TEST, ["source"] * 5, 1, normalize)
    unlabelled = one_window_each(bank, TEST, [""] * 5, 1, normalize)
    for a, b in zip(both, unlabelled):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(both[0]).all()


@pytest.mark.parametrize(
    ("angles", "domains", "normalize"),
    [([0], "s", "none"), ([0, 10, 20], "sss", "density"), ([0, 10, 90], "sst", "test")],
)
def test_too_few_clips_for_a_back_end_are_refused(angles, domains, normalize):
    domains = [{"s": "source", "t": "target"}[letter] for letter in domains]
    with pytest.raises(InputError, match=r"too few training clips: .*density: 4"):
        one_window_each(at(*angles), TEST, domains, 1, normalize)


def test_test_clips_that_are_all_alike_cannot_be_standardised():
    with pytest.raises(InputError, match="needs test clips whose scores vary"):
        one_window_each(at(0, 10), at(5, 5), ["source"] * 2, 1, "test")


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
    state = data.load(folder / "run" / "adapter.pt")["weights"]
    public = lively_ast().state_dict()
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

    starts, columns = {1: [0.0], 2: [0.0, 2.0]}, []
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


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_windows_than_a_batch_are_in_the_network(full_size_fan, workers):
    """A clip of 65 s (7 windows) and four of 1 s, read 3 clips at a time: 9 windows, then 2."""
    noise("data/fan/test/long.wav", 65)
    clips, sizes = data.list_clips("data", "fan", "test"), []
    model = backbone.Embedder(backbone.load_ast("ast.safetensors"), "cls", None)
    model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    found = list(score.embed(model, clips, 3, workers))
    assert sizes == [3, 3, 3, 2]
    starts = [(len(e), starts) for e, starts in found]
    assert starts == [(7, data.window_starts(65 * 16000))] + [(1, [0])] * 4


def test_what_is_read_is_said(small, capsys):
    pump()
    for i in range(14):
        noise(f"data/pump/train/more {i}.wav", 1, seed=100 + i)
    shutil.copy("data/pump/train/5.wav", "data/pump/test/old.wav")
    Path("data/pump/test/a.flac").touch()
    Path("data/pump/test/M1").mkdir()
    Path("data/pump/train/.hidden").touch()
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    first = "device: cpu\npump: test clips 2, training clips 20 (not read: M1, a.flac)\n"
    assert out.startswith(first)
    assert "copies of training clips among the test clips: old.wav\n" in out
    found = report_of("runs/pretrained-pump")
    assert float(found["old.wav"]["score"]) == pytest.approx(0, abs=1e-6)
    alarms = sum(row["alarm"] == "1" for row in found.values())
    threshold = float(found["old.wav"]["threshold"])
    below = f"{threshold:.4g}, which 90 % of the training clips stay below"
    assert f"\n{alarms} of 2 test clips are above the threshold ({below})\n" in out
    assert "So few training clips" not in out


def test_when_most_clips_are_alarms_one_line_says_what_that_usually_means(
    small, monkeypatch, capsys
):
    pump()
    for name in ("louder", "another"):
        noise(f"data/pump/test/{name}.wav", 1, seed=70, level=20)
    scored("--pretrained", "--percentile", "1", machine="pump")
    out = capsys.readouterr().out
    assert "So many usually mean that the day, gain or microphone" in out
    assert "So few training clips make the threshold a guess" in out


def test_damaged_files_are_all_named_before_anything_is_embedded(small, monkeypatch, capsys):
    pump()
    for i in range(12):
        whole = noise(f"data/pump/{'train' if i % 2 else 'test'}/bad{i:02}.wav", 1, seed=200 + i)
        whole.write_bytes(whole.read_bytes()[:-100])
    nan = np.full(16000, np.nan, np.float32)
    wavfile.write("data/pump/test/a nan.wav", 16000, nan)
    monkeypatch.setattr(score, "embed", None)
    message = error_of(score.main, ["--machine", "pump", *FLAGS, "--pretrained"], capsys)
    assert (
        "bad01.wav is cut off: 100 bytes of samples are missing, data/pump/train/bad03" in message
    )
    assert "a nan.wav has samples that are not finite" in message
    assert message.endswith("and 3 more")


def test_without_test_clips_the_training_clips_are_looked_at(small, capsys):
    pump()
    shutil.rmtree("data/pump/test")
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    assert "pump: test clips 0, training clips 6\n" in out and out.count(".wav\n") == 3
    noise("data/pump/test/new.m4a", 1)
    message = error_of(score.main, ["--machine", "pump", *FLAGS, "--pretrained"], capsys)
    assert "no WAV files in data/pump/test: data/pump/test has new.m4a" in message


def test_the_training_clips_that_stand_out_are_named():
    """Sixteen clips of another machine among a hundred; the last has a second window, which is of
    the usual kind, and one far from all.
    """
    angles = np.concatenate([np.linspace(-4, 4, 100), np.linspace(89, 91, 15), [93, 1, 200]])
    index = np.array([*range(115), 115, 115, 115])
    train = score.Windows(at(*angles), index, 160 * np.arange(118))
    d_train = distances(train.embedding, train.embedding)
    d_train[index[:, None] == index] = np.inf
    clips = [data.parse_clip(f"data/pump/train/{i}.wav") for i in range(116)]
    found = score.suspicious_training_clips(d_train, train, clips)
    assert {row["clip"] for row in found} == {f"{i}.wav" for i in range(100, 116)}
    first = found[0]
    assert (first["clip"], first["at_seconds"]) == ("115.wav", 117 * 160 / 16000)
    nearest_20 = np.sort(d_train[117])[:20].mean()
    others = [np.sort(d_train[i])[:20].mean() for i in range(115)]
    assert first["times_median"] == pytest.approx(nearest_20 / np.median([*others, nearest_20]))
    usual = score.Windows(*(x[:90] for x in train))
    assert len(score.suspicious_training_clips(d_train[:90, :90], usual, clips[:90])) == 3


def test_with_few_clips_those_that_stand_out_are_found_among_fewer_neighbours(small, capsys):
    pump(n=2)
    scored("--pretrained", machine="pump")
    _, after = capsys.readouterr().out.split("Training clips that stand out")
    assert after.count(".wav") == 2
    Path("data/pump/train/0.wav").unlink()
    argv = ["--machine", "pump", *FLAGS, "--pretrained"]
    assert "too few training clips" in error_of(score.main, argv, capsys)


class Players(html.parser.HTMLParser):
    """Collects what a page shows and points to."""

    def __init__(self, page: Path):
        super().__init__()
        self.sources, self.links, self.tags, self.text = [], [], [], ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name == "src"]
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, text):
        self.text += text


def test_the_page_plays_the_recordings_from_their_suspicious_second(small):
    small_machines()
    names = ["a b.wav", "a#1.wav", "<i>&amp;.wav", 'the "bad" %20 one.wav', "ö$_{$x.wav"]
    names += ["x" * 120 + ".wav", "{}.wav", "日本.wav"]
    for i in range(3):
        noise(f"my data/p<u>mp/train/{i}?.wav", 1, seed=i)
    for i, name in enumerate(names):
        noise(f"my data/p<u>mp/test/{name}", 2, seed=i + 10)
    latin = os.fsdecode(b"latin-1 \xf6.wav")
    os.rename(noise("my data/p<u>mp/test/new.wav", 1, seed=50), f"my data/p<u>mp/test/{latin}")
    scored("--pretrained", "--data", "my data", "--run", "my runs/1", machine="p<u>mp")
    page = Players(Path("my runs/1/report_p<u>mp.html"))
    report = report_of("my runs/1", "p<u>mp")
    assert len(page.sources) == 2 * 9 + 3 and page.tags.count("audio") == 2 * 9 + 3
    assert set(page.tags) & {"script", "i", "u", "link", "iframe"} == set()
    assert page.links == [source.split("#")[0] for source in page.sources]
    assert page.text.count("p<u>mp: 9 clips, ") == page.text.count("p<u>mp: what sounds") == 1
    assert "score " in page.text and "The players start at the most unusual 10 s." in page.text
    assert "training clips 3" in page.text and str(datetime.date.today()) in page.text
    for row, test, train_ in zip(report.values(), page.sources[:18:2], page.sources[1:18:2]):
        at, near_at = float(row["at_seconds"]), float(row["nearest_at_seconds"])
        for source, name, start in (
            (test, row["test_clip"], at),
            (train_, row["nearest_training_clip"], near_at),
        ):
            path, fragment = source.split("#")
            assert Path("my runs/1", os.fsdecode(urllib.parse.unquote_to_bytes(path))).name == name
            assert fragment == f"t={start:.2f},{start + 15000 / 16000:.2f}"
    for source in page.sources:
        path = os.fsdecode(urllib.parse.unquote_to_bytes(source.split("#")[0]))
        assert path.startswith("../../my data/p<u>mp/") and Path("my runs/1", path).is_file()
    for name in [*names, "latin-1 \\udcf6.wav", "p<u>mp"]:
        assert name in page.text


def test_a_normal_clip_that_is_a_little_longer_or_short_is_no_alarm(tmp_path, monkeypatch):
    """AST knows only 10 s. Clips cut from one recording of a normal machine: once every clip of
    10.1 s was an alarm, and every clip of 5 s.
    """
    monkeypatch.chdir(tmp_path)
    rng, lengths = np.random.default_rng(0), (10.0, 10.1, 10.4, 7.0, 5.0)
    recording = demo.synthesise(rng, demo.any_machine(rng), 600)
    names = [f"train/{i}" for i in range(40)]
    names += [f"test/{seconds} {i}" for seconds in lengths for i in range(25)]
    for name in names:
        seconds = float(name[5:].split()[0]) if "test" in name else 10
        start = rng.integers(len(recording) - 11 * 16000)
        path = Path("data/pump", f"{name}.wav")
        path.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(path, 16000, recording[start : start + int(16000 * seconds)])
    weights = ["--weights", str(demo.WEIGHTS), "--device", "cpu"]
    score.main(["--machine", "pump", "--pretrained", *weights])
    rows = rows_of("runs/pretrained-pump/decision_result_pump_section_00_test.csv")
    shares = [np.mean([int(x) for name, x in rows if name.startswith(f"{s} ")]) for s in lengths]
    assert max(shares[:3]) - shares[0] < 0.2 and max(shares) < 0.5, shares


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
    one that was renamed, moved or copied is not.
    """
    small_machines("fan", n_test=2)
    names = embedded(monkeypatch)
    scored("--pretrained")
    assert len(names) == 7 + 8
    names.clear()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_wav", None)  # what is kept is not even decoded
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


def test_embeddings_are_kept_whatever_ends_the_command(small, monkeypatch, capsys):
    """Seven training clips, and eight of two windows, four at a time: the eighth pass is the last
    for the test clips. What is kept is small: a window has 64 numbers of 4 bytes.
    """
    small_machines("fan", n_test=2)
    names, forward, calls = embedded(monkeypatch), backbone.Embedder.forward, []

    def stop(self, x):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(backbone.Embedder, "forward", stop)
        argv = ["--machine", "fan", "--pretrained", *FLAGS, "--batch-size", "4"]
        assert "interrupted" in error_of(score.main, argv, capsys)
    kept = Path("runs/pretrained-fan/embeddings_fan.pt")
    assert len(data.load(kept)["clips"]) == 7 + 4
    names.clear()
    scored("--pretrained")
    assert len(names) == 15 - 11
    assert kept.stat().st_size < 15 * 2500


def test_embeddings_that_are_not_finite_are_refused_with_a_cause(fan, capsys):
    folder = trained()
    adapter = data.load(folder / "adapter.pt")
    adapter["weights"]["linear.weight"][:] = math.nan
    data.save(folder / "adapter.pt", adapter)
    message = error_of(score.main, ["--machine", "fan", "--device", "cpu"], capsys)
    cause = "the weights are not finite, or too large: train again with a smaller --lr"
    assert message.endswith(f"error: {cause}")


def test_tf32_is_off_after_embedding(fan):
    """It keeps 10 of 23 bits of a number."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    scored("--pretrained")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("changed", ["adapter", "data.py", "lora.py", "backbone.py"])
def test_another_model_or_source_embeds_anew(fan, monkeypatch, changed):
    """A reader who changes the front end sees the change in the next scoring."""
    trained()
    scored()
    names = embedded(monkeypatch)
    if changed == "adapter":
        trained("--epochs", "2")
    else:
        module = {"data.py": data, "lora.py": score.lora, "backbone.py": backbone}[changed]
        source = Path(module.__file__).read_bytes()
        Path("changed.py").write_bytes(source + b"# changed")
        monkeypatch.setattr(module, "__file__", "changed.py")
    scored()
    assert len(names) == 7 + 4


@pytest.mark.parametrize(
    "last", [f"{name}_fan" for name in ("anomaly_score", "decision_result", "scoring", "report")]
)
def test_a_scoring_that_dies_between_two_files_is_never_evaluated_as_another(
    fan, monkeypatch, capsys, last
):
    """After the file called `last`, with k 2 where k 1 was: evaluate.py says k 2, or refuses."""
    argv = ["--machine", "fan", "--run", "runs/pretrained-fan"]
    expected = {}
    for k in ("2", "1"):
        scored("--pretrained", "--k", k)
        expected[k] = rows_of("runs/pretrained-fan/anomaly_score_fan_section_00_test.csv")
    write = data.write

    def killed(path, content):
        write(path, content)
        if path.name.startswith(last):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(data, "write", killed)
        scored("--pretrained", "--k", "2")
    capsys.readouterr()
    if last in ("anomaly_score_fan", "decision_result_fan"):
        assert error_of(evaluate.main, argv, capsys).endswith("score again")
    else:
        evaluate.main(argv)
        assert "k 2\n" in capsys.readouterr().out
        found = rows_of("runs/pretrained-fan/anomaly_score_fan_section_00_test.csv")
        assert found == expected["2"]
    scored("--pretrained", "--k", "2")
    evaluate.main(argv)


def test_how_it_was_scored_is_recorded(fan):
    folder = trained()
    scored("--k", "2", "--normalize", "density", "--percentile", "80")
    scoring = json.loads((folder / "scoring_fan.json").read_text())
    setting = data.load(folder / "adapter.pt")["setting"]
    how = {"k": 2, "normalize": "density", "model": "trained", "setting": setting}
    clips = scoring["scored_with"].pop("clips")
    assert scoring["scored_with"] == how
    scores = folder / "anomaly_score_fan_section_00_test.csv"
    assert scoring["scores_sha256"] == data.file_digest(scores)
    data.list_clips("data", "fan", "train")[0].path.unlink()
    scored()
    other = json.loads((folder / "scoring_fan.json").read_text())["scored_with"]["clips"]
    assert other != clips, "of the clips that were compared"
    assert scoring["adapter_sha256"] == data.file_digest(folder / "adapter.pt")
    assert (scoring["percentile"], scoring["data"]) == (80, "data")


def test_labels_that_are_known_lead_to_evaluate_and_wrong_ones_are_told(small, capsys):
    pump()
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    page = "to listen, open runs/pretrained-pump/report_pump.html in a browser\n"
    assert out.endswith(page)
    labels = Path("data/pump/labels.csv")
    labels.write_text("new.wav,yes\n")
    scored("--pretrained", machine="pump")
    out = capsys.readouterr().out
    assert "note: ignoring labels: data/pump/labels.csv, line 1" in out and out.endswith(page)
    labels.write_text("new.wav,1\n")
    scored("--pretrained", machine="pump")
    command = "python evaluate.py --machine pump --run runs/pretrained-pump"
    assert capsys.readouterr().out.endswith(f"{page}next: {command}\n")


def test_one_joint_run_scores_each_of_its_machines_and_no_other(small, capsys):
    small_machines("fan", "valve", "pump")
    train.main(["--machine", "fan", "valve", *FLAGS, "--epochs", "1", "--run", "runs/joint"])
    scored("--run", "runs/joint", machine="valve")
    assert [path.name for path in Path("runs/joint").glob("report_*.csv")] == ["report_valve.csv"]
    message = error_of(score.main, ["--machine", "pump", "--run", "runs/joint"], capsys)
    assert "runs/joint was not trained on pump" in message


@needs_real
def test_the_real_clips_go_through_all_three_scripts(small, capsys):
    """Seven machines jointly: 10 s and 12 s, no target training clips, classes of one clip."""
    small_machines()
    real = ["--data", str(REAL / "real")]
    train.main(["--machine", "dev", *real, *FLAGS, "--epochs", "1"])
    assert "clips: 14, classes: 12" in capsys.readouterr().out
    scored(machine="dev")
    evaluate.main(["--machine", "dev"])
    out = capsys.readouterr().out
    assert "fan: test clips 2, training clips 2\n" in out
    assert "| fan | n/a | " in out and "partial (0/7)" in out
    for machine in data.DEV:
        assert len(rows_of(f"runs/dev/anomaly_score_{machine}_section_00_test.csv")) == 2
