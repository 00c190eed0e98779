"""evaluate.py: the official metric, labels joined by name, and the tables."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL, assert_equal_within, error_of, needs_real

import data
import evaluate
from data import InputError
from evaluate import METRICS, evaluate_machine, machine_metrics, official_score, read_labels


def test_the_evaluators_21_numbers_give_its_total():
    """The values that the official evaluator's README prints for the MSE baseline."""
    source = [0.6667348190554078, 0.706837186424004, 0.69428983714698, 0.7968000000000001, 0.77,
              0.7212000000000001, 0.8816]  # fmt: skip
    target = [0.48287671232876717, 0.5516569200779727, 0.5604118104118104, 0.561, 0.4716, 0.6468,
              0.45320000000000005]  # fmt: skip
    pauc = [0.5091087658743451, 0.5846166760294185, 0.5491654428600755, 0.5368421052631579,
            0.5178947368421053, 0.5826315789473684, 0.5947368421052631]  # fmt: skip
    machines = [dict(zip(METRICS, values)) for values in zip(source, target, pauc)]
    what = "total of the evaluator's 21 numbers"
    assert_equal_within(1e-15, what, official_score(machines), 0.5925469043549957)


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_undefined_are_nan_and_left_out():
    only_target = machine_metrics([1, 2, 3], [0, 0, 1], [1, 1, 1])
    assert math.isnan(only_target["auc_source"]) and only_target["auc_target"] == 1
    no_anomaly = machine_metrics([1, 2], [0, 0], [0, 1])
    assert all(math.isnan(no_anomaly[key]) for key in ("auc_source", "auc_target", "pauc"))
    assert math.isnan(official_score([no_anomaly])) and math.isnan(official_score([]))
    assert official_score([only_target, no_anomaly]) == pytest.approx(1)


def test_an_auc_of_zero_gives_a_total_near_zero_and_no_error():
    assert official_score([machine_metrics([3, 1], [0, 1], [0, 0])]) < 1e-9


@needs_real
@pytest.mark.parametrize("system", ["MSE", "MAHALA"])
def test_real_systems_have_the_numbers_that_their_authors_printed(system):
    expected = json.loads((REAL / "scores" / "expected_dev.json").read_text())[system]
    rows = {m: evaluate_machine(m, REAL / "scores" / f"dev_{system}", "data") for m in data.DEV}
    keys = [(machine, key) for machine in data.DEV for key in METRICS]
    ours, theirs = [rows[m][key] for m, key in keys], [expected[m][key] for m, key in keys]
    ours.append(official_score(list(rows.values())))
    what = f"AUC and pAUC of {system}, 7 machines, and total, against their authors' evaluation"
    assert_equal_within(1e-12, what, ours, [*theirs, expected["official_score"]])


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_csv(path, rows)
    return path


def scored(run: Path, machine: str, scores: dict[str, float], setting: dict | None = None) -> Path:
    """What score.py leaves in a run folder; without a setting, no word on how it was scored."""
    path = write(run / f"anomaly_score_{machine}_section_00_test.csv", scores.items())
    if setting is not None:
        made = {"tuning": "lora", "epochs": 25, "precision": "float32", "rank": 64, "seed": 0}
        how = {"k": 1, "normalize": "none", "model": "trained", "clips": "0a1b", "setting": made}
        for name, value in setting.items():
            (how if name in how else made)[name] = value
        record = {"scored_with": how, "scores_sha256": data.file_digest(path), "percentile": 90.0}
        record["data"] = str(run.parent / "data")
        (run / f"scoring_{machine}.json").write_text(json.dumps(record))
    return run


def made_up(seed: int) -> dict[str, float]:
    rng, scores = np.random.default_rng(seed), {}
    for domain in ("source", "target"):
        for label in ("normal", "anomaly"):
            for i in range(5):
                name = f"section_00_{domain}_test_{label}_{i:04}_x.wav"
                scores[name] = float(rng.normal() + (label == "anomaly"))
    return scores


def metrics_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_evaluation_machine_from_its_files_to_every_number(tmp_path, capsys):
    """Worked by hand; source and target differ in every number, so a swap of either file shows, and
    the files are in another order than the scores.

    name   0    1    2    3    4    5    6    7
    score  .1   .45  .6   .9   .48  .7   .8   .75
    domain s    s    s    s    s    t    t    t
    label  n    n    n    a    a    n    a    a

    AUC source: normals .1 .45 .6 against anomalies .9 .48 .8 .75: of 12 pairs all but (.6, .48) are
    ordered right: 11/12. (With anomalies of the same domain only it would be 5/6, the mistake that
    some implementations make.) Target: normal .7 against the same: 3/4. pAUC: above the highest
    normal, .7, lie 3 of 4 anomalies, so the area up to a false-positive rate of 0.1 is 0.1 · 3/4;
    McClish: 1/2 (1 + (0.075 - 0.005) / (0.1 - 0.005)) = 0.8684211.
    """
    names = [f"section_00_{i:04}.wav" for i in range(8)]
    scores = dict(zip(names, [0.1, 0.45, 0.6, 0.9, 0.48, 0.7, 0.8, 0.75]))
    run, folder = scored(tmp_path / "run", "bandsaw", scores, {}), tmp_path / "data" / "bandsaw"
    write(folder / "labels.csv", list(zip(names, [0, 0, 0, 1, 1, 0, 1, 1]))[::-1])
    write(folder / "domains.csv", list(zip(names, [0, 0, 0, 0, 0, 1, 1, 1]))[::-1])
    evaluate.main(["--machine", "bandsaw", "--run", str(run)])
    (row,) = metrics_of(run)
    expected = {"auc_source": 11 / 12, "auc_target": 3 / 4, "pauc": 0.8684211}
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected)
    total = 3 / (12 / 11 + 4 / 3 + 1 / expected["pauc"])
    assert float(row["official_score"]) == pytest.approx(total) and row["set"] == "eval"
    out = capsys.readouterr().out
    assert f"eval, official score: **{100 * total:.2f}** (n = 1), partial (1/7)" in out


OWN = ["a 1.wav", "a 2.wav", "c,4.wav", "ö.wav"]


SPREADSHEETS = [
    "\ufefffile;label\r\na 1.wav;1\r\na 2.wav;0\r\nc,4.wav;1\r\nö.wav;0\r\n;\r\n\r\n",
    'name\tlabel\na 1.wav\t1\nc,4.wav\t1\n"ö.wav"\t0\na 2.wav\t0\n',
    'name, label\nö.wav , 0.0\na 2.wav, 0\n"c,4.wav" , 1 \na 1.wav,1.0,\nold.wav,1\n\n',
    'a 1.wav,1\na 2.wav,0\n"c,4.wav",1\no\u0308.wav,0\n',
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", SPREADSHEETS)
def test_labels_are_read_as_a_spreadsheet_saves_them(tmp_path, text, encoding):
    """A BOM, a header, semicolons, tabs, spaces, blank lines and cells, a comma in a name, another
    order, pandas' 1.0, a decomposed ö.
    """
    (tmp_path / "labels.csv").write_bytes(
        text.lstrip("\ufeff" * (encoding != "utf-8")).encode(encoding)
    )
    labels = read_labels(tmp_path / "labels.csv", OWN, complete=True)
    assert labels == dict(zip(OWN, [True, False, True, False]))


def test_line_separators_and_semicolons_inside_names_do_not_split_them(tmp_path):
    names = ["a\u2028b.wav", "a\u0085b.wav", "a;b.wav", 'a"b.wav', "a\x0bb.wav"]
    values = {name: float(i) for i, name in enumerate(names)}
    path = write(tmp_path / "x.csv", values.items())
    assert evaluate.read_two_columns(path, evaluate.to_score, "") == values
    path = write(tmp_path / "x.csv", [("a;b.wav", 0.5)])
    assert evaluate.read_two_columns(path, evaluate.to_score, "") == {"a;b.wav": 0.5}


WRONG_LABELS = {
    "a 1.wav,1\na 2.wav,normal\n": r"line 2: 'a 2.wav,normal' should be name.wav and 0 or 1",
    "a 1.wav,1\n\na 2.wav\n": r"labels\.csv, line 3: 'a 2.wav'",
    "a 1.wav,1\na 2.wav,2\n": r"labels\.csv, line 2: 'a 2.wav,2'",
    "a 1.wav,1,0\n": r"labels\.csv, line 1: 'a 1.wav,1,0'",
    "name,label\nname,label\n": r"labels\.csv, line 2: 'name,label'",
    "a 1.wav,1\na 1.wav,0\n": r"labels\.csv, line 2: a 1.wav appears twice",
    "a 1.wav,1\n": r"labels\.csv has no line for a 2.wav \(missing clips: 3\)",
    "a 1.wav,1\na 2.wav,1\nö.wav,1": "not in UTF-8, and lacks c,4.wav: save it as CSV UTF-8",
}


@pytest.mark.parametrize("text", WRONG_LABELS)
def test_labels_that_cannot_be_understood_are_refused_with_file_and_line(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text, encoding="cp1252")
    with pytest.raises(InputError, match=WRONG_LABELS[text]):
        read_labels(tmp_path / "labels.csv", OWN, complete=True)


def test_ones_own_machine_needs_only_a_labels_file(tmp_path, capsys):
    """0.95 beats both normals, 0.2 beats one of two: 3 of 4 pairs. Without domains all is source:
    there is no column for the target. An official score of one's own machine would mean nothing.
    """
    run = scored(tmp_path / "run", "fan", dict(zip(OWN, [0.2, 0.9, 0.95, 0.1])), {})
    argv = ["--machine", "fan", "--run", str(run)]
    message = error_of(evaluate.main, argv, capsys)
    assert f"{tmp_path}/data/fan/labels.csv is missing; its lines look like a 1.wav,1" in message
    labels = write(tmp_path / "data" / "fan" / "labels.csv", zip(OWN, [1, 0, 1, 0]))
    evaluate.main(argv)
    out = capsys.readouterr().out
    header = (
        "| % | AUC source | pAUC | harmonic mean |\n| --- | ---: | ---: | ---: |\n| fan | 75.00 |"
    )
    assert header in out and "official" not in out and "n/a" not in out
    assert metrics_of(run)[0]["official_score"] == ""

    write(labels, [("a 1.wav", 1), ("c,4.wav", 1), ("a 2.wav", 0)])
    assert "fan: left out, for want of a label: ö.wav" in table(capsys, *argv)
    write(labels, [(name, 1) for name in OWN])
    assert "fan: no AUC, since all labels are 1" in table(capsys, *argv)


def test_the_challenges_labels_must_be_complete(tmp_path):
    names = [f"section_00_{i:04}.wav" for i in range(3)]
    run = scored(tmp_path / "run", "bandsaw", dict.fromkeys(names, 0.5))
    write(tmp_path / "bandsaw" / "labels.csv", [(name, 1) for name in names[:2]])
    with pytest.raises(InputError, match=r"no line for section_00_0002.wav \(missing clips: 1\)"):
        evaluate_machine("bandsaw", run, tmp_path)


@pytest.mark.parametrize("text", ["1.5e-07", "1.5E-05", ".5", "-2.25", "3e+16", " 0.0 ", "+1."])
def test_scores_are_numbers_as_programs_and_spreadsheets_write_them(tmp_path, text):
    for separator in ",;\t":
        (tmp_path / "x.csv").write_text(f"a.wav{separator}{text}\n")
        found = evaluate.read_two_columns(tmp_path / "x.csv", evaluate.to_score, "")
        assert found == {"a.wav": float(text)}


@pytest.mark.parametrize("line", ["a.wav,0,9", "a.wav;0,9", 'a.wav,"0,9"', "a.wav,nan", "a.wav,"])
def test_a_decimal_comma_is_refused_and_never_read_as_another_number(tmp_path, line):
    run = tmp_path / "anomaly_score_fan_section_00_test.csv"
    run.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"test\.csv, line 1: .* \(with a point, no comma\)"):
        evaluate_machine("fan", tmp_path, "data")


def run_folder(path: Path, machines=("fan",), seed=0, setting: dict | None = None) -> str:
    path.mkdir(parents=True)
    for i, machine in enumerate(machines):
        made = None if setting is None else setting | {"seed": seed}
        scored(path, machine, made_up(100 * seed + i), made)
    return str(path)


def table(capsys, *argv: str) -> str:
    evaluate.main(list(argv))
    return capsys.readouterr().out


def test_the_table_of_one_run(tmp_path, capsys):
    machines = ("fan", "valve", "grinder")
    run = run_folder(tmp_path / "run", machines, setting={})
    write(tmp_path / "data" / "grinder" / "labels.csv", [])  # its names tell, for once
    out = table(capsys, "--machine", *machines, "--run", run)
    rows = {m: evaluate_machine(m, Path(run), tmp_path / "data") for m in machines}
    title = "### model trained, tuning lora, epochs 25, precision float32, normalize none, k 1\n"
    assert out.startswith(title)
    assert "| % | AUC source | AUC target | pAUC | harmonic mean |\n| --- | ---: |" in out
    cells = [f"{100 * rows['valve'][key]:.2f}" for key in (*METRICS, "harmonic_mean")]
    assert f"| valve | {' | '.join(cells)} |" in out
    total = official_score([rows["fan"], rows["valve"]])
    assert f"dev, official score: **{100 * total:.2f}** (n = 1), partial (2/7)" in out
    assert "eval, official score" in out
    stored = {row["machine"]: row for row in metrics_of(Path(run))}
    assert float(stored["valve"]["pauc"]) == rows["valve"]["pauc"]
    assert float(stored["valve"]["official_score"]) == total


def test_seeds_of_one_setting_give_mean_and_sample_standard_deviation(tmp_path, capsys):
    """The percentile changes no AUC, so it may differ."""
    runs = [run_folder(tmp_path / f"lora-seed{i}", setting={}, seed=i) for i in range(3)]
    scoring = tmp_path / "lora-seed1" / "scoring_fan.json"
    scoring.write_text(scoring.read_text().replace("90.0", "80.0"))
    out = table(capsys, "--machine", "fan", "--run", runs[0], "--run", *runs[1:])
    totals = [100 * official_score([evaluate_machine("fan", Path(run), "")]) for run in runs]
    mean, spread = np.mean(totals), np.std(totals, ddof=1)
    assert f"official score: **{mean:.2f} ± {spread:.2f}** (n = 3)" in out
    for seed, run in enumerate(runs):
        assert metrics_of(Path(run))[0]["seed"] == str(seed)


def test_runs_of_different_settings_give_a_line_each(tmp_path, capsys):
    """Two ranks with two seeds, another back-end, another precision, a folder without a record."""
    runs = []
    for rank in (4, 8):
        for seed in (0, 1):
            path = tmp_path / f"rank{rank}-seed{seed}"
            runs.append(run_folder(path, setting={"rank": rank}, seed=seed))
    runs.append(run_folder(tmp_path / "test", setting={"rank": 8, "normalize": "test"}))
    runs.append(run_folder(tmp_path / "k2", setting={"rank": 8, "k": 2}))
    runs.append(run_folder(tmp_path / "bf16", setting={"rank": 8, "precision": "bfloat16"}))
    runs.append(run_folder(tmp_path / "unknown"))
    out = table(capsys, "--machine", "fan", "--run", *runs)
    lines = [line.split("|") for line in out.splitlines() if str(tmp_path) in line]
    names = [line[1].split("/")[-1].strip() for line in lines]
    assert names == [
        "rank4-seed0 and 1 more",
        "rank8-seed0 and 1 more",
        "test",
        "k2",
        "bf16",
        "unknown",
    ]
    assert ["±" in line[2] for line in lines] == [True, True, False, False, False, False]
    assert ["TRANSDUCTIVE" in line[3] for line in lines] == [False] * 2 + [True] + [False] * 3
    assert "not known" in lines[-1][3] and "bfloat16" in lines[4][3] and "k 2" in lines[3][3]


def test_ones_own_machines_have_no_official_score_with_two_settings_either(tmp_path, capsys):
    runs = [scored(tmp_path / f"k{k}", "pump", made_up(k), {"k": k}) for k in (1, 2)]
    out = table(capsys, "--machine", "pump", "--run", *map(str, runs))
    assert "| setting | harmonic mean | scored with |" in out and "official" not in out


def test_machines_that_were_scored_in_different_ways_are_told(tmp_path, capsys):
    run = Path(run_folder(tmp_path / "run", setting={}))
    scored(run, "valve", made_up(1), {"normalize": "test"})
    out = table(capsys, "--machine", "fan", "valve", "--run", str(run))
    one, other = "normalize none, k 1", "normalize test (TRANSDUCTIVE), k 1"
    model = "model trained, tuning lora, epochs 25, precision float32"
    assert out.startswith(f"### {model}, {one} / {model}, {other}\n")


def test_one_seed_twice_or_one_folder_twice_is_no_mean(tmp_path, capsys):
    one = run_folder(tmp_path / "one", setting={})
    two = run_folder(tmp_path / "two", setting={})
    without = run_folder(tmp_path / "without")
    for pair in ((one, one), (one, two), (without, without), (without, f"{without}/")):
        message = error_of(evaluate.main, ["--machine", "fan", "--run", *pair], capsys)
        assert f"{pair[1].rstrip('/')} has the same setting and seed as {pair[0]}" in message
    assert not list(tmp_path.rglob("metrics.csv")), "what is refused leaves nothing behind"


@pytest.mark.parametrize("other", [{"clips": "ffff"}, {"epochs": 50}, {"rank": 8}])
def test_seeds_that_met_different_clips_or_epochs_are_not_averaged(tmp_path, capsys, other):
    runs = [run_folder(tmp_path / f"seed{seed}", setting={}, seed=seed) for seed in (0, 1)]
    assert "±" in table(capsys, "--machine", "fan", "--run", *runs)
    scored(tmp_path / "seed1", "fan", made_up(100), {"seed": 1} | other)
    assert "±" not in table(capsys, "--machine", "fan", "--run", *runs)


def test_a_mixture_of_scores_record_and_adapter_is_refused(tmp_path, capsys):
    """In whatever order files were written or a command was killed."""
    run = Path(run_folder(tmp_path / "run", setting={}))
    argv = ["--machine", "fan", "--run", str(run)]
    scores, record = run / "anomaly_score_fan_section_00_test.csv", run / "scoring_fan.json"
    (run / "adapter.pt").write_bytes(b"first")
    of_first = json.loads(record.read_text())
    of_first["adapter_sha256"] = data.file_digest(run / "adapter.pt")
    record.write_text(json.dumps(of_first))
    evaluate.main(argv)
    (run / "adapter.pt").write_bytes(b"trained on")
    message = error_of(evaluate.main, argv, capsys)
    assert f"{run} was trained after fan was scored: score again" in message
    (run / "adapter.pt").write_bytes(b"first")
    whole = scores.read_bytes()
    write(scores, made_up(7).items())
    message = error_of(evaluate.main, argv, capsys)
    assert f"{record} does not belong to {scores}: score again" in message
    scores.write_bytes(whole)
    record.write_text(record.read_text()[:50])
    assert f"{record} is damaged: score again" in error_of(evaluate.main, argv, capsys)


def test_partial_looks_at_every_trial(tmp_path, capsys, monkeypatch):
    """In the second trial, one machine's AUC is undefined."""
    monkeypatch.setattr(data, "DEV", [f"m{i}" for i in range(7)])
    runs = [run_folder(tmp_path / f"seed{i}", data.DEV, seed=i, setting={}) for i in (0, 1)]
    assert "partial" not in table(capsys, "--machine", *data.DEV, "--run", *runs)
    trials = [evaluate.evaluate_run(Path(run), data.DEV, None) for run in runs]
    trials[1].rows[3]["auc_target"] = math.nan
    assert "partial (6/7)" in evaluate.total("dev", trials)


def test_undefined_numbers_print_n_a_and_make_the_total_partial(tmp_path, capsys):
    names = [f"section_00_source_test_{label}_0000_x.wav" for label in ("normal", "anomaly")]
    run = scored(tmp_path / "run", "fan", dict(zip(names, [1, 2])))
    alone = table(capsys, "--machine", "fan", "--run", str(run))
    assert "**100.00** (n = 1), partial (0/7)" in alone
    scored(run, "valve", made_up(0))
    out = table(capsys, "--machine", "fan", "valve", "--run", str(run))
    assert "| fan | 100.00 | n/a | 100.00 | 100.00 |" in out and "partial (1/7)" in out
