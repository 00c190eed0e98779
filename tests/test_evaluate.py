"""evaluate.py: the official metric, labels joined by name, and the tables."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL, assert_equal_within, needs_real

import data
import evaluate
from evaluate import machine_metrics, official_score

# ---------------------------------------------------------------- the metric


def test_a_six_clip_example():
    """Three clips a domain: source normals 1, 4, anomaly 3; target normal 2, anomalies 5, 6 (the
    scores).

    AUC source: normals 1, 4 against anomalies 3, 5, 6: of 6 pairs all but (4, 3) are ordered right:
    5/6. (With anomalies of the same domain only it would be 1/2: the mistake that some
    implementations make.) AUC target: normal 2 against 3, 5, 6: 3/3 = 1. pAUC: normals 1, 2, 4; up
    to a false-positive rate of 0.1 the ROC curve is at the share of anomalies above the highest
    normal, 2/3. Area 0.1 · 2/3; McClish: 1/2 (1 + (area - 0.005) / (0.1 - 0.005)) = 0.8245614.
    Decisions: above 2.5. Source: 3 and 4 are called anomalies, one is: precision 1/2, recall 1/1,
    F1 2/3. Target: 5 and 6 are, both right: 1, 1, 1.
    """
    metrics = machine_metrics(
        scores=[1, 4, 3, 2, 5, 6],
        is_anomaly=[0, 0, 1, 0, 1, 1],
        is_target=[0, 0, 0, 1, 1, 1],
        decisions=[0, 1, 1, 0, 1, 1],
    )
    assert metrics == pytest.approx(
        {
            "auc_source": 5 / 6, "auc_target": 1.0, "pauc": 0.5 * (1 + (0.2 / 3 - 0.005) / 0.095),
            "precision_source": 1 / 2, "recall_source": 1.0, "f1_source": 2 / 3,
            "precision_target": 1.0, "recall_target": 1.0, "f1_target": 1.0,
        }
    )  # fmt: skip
    assert metrics["pauc"] == pytest.approx(0.8245614)


# The 21 values that the official evaluator's README prints for the MSE baseline, and their total.
EVALUATOR = {
    "auc_source": [
        0.6667348190554078,
        0.706837186424004,
        0.69428983714698,
        0.7968000000000001,
        0.77,
        0.7212000000000001,
        0.8816,
    ],
    "auc_target": [
        0.48287671232876717,
        0.5516569200779727,
        0.5604118104118104,
        0.561,
        0.4716,
        0.6468,
        0.45320000000000005,
    ],
    "pauc": [
        0.5091087658743451,
        0.5846166760294185,
        0.5491654428600755,
        0.5368421052631579,
        0.5178947368421053,
        0.5826315789473684,
        0.5947368421052631,
    ],
}


def test_the_evaluators_21_numbers_give_its_total():
    machines = [
        dict(zip(EVALUATOR, values, strict=True))
        for values in zip(*EVALUATOR.values(), strict=True)
    ]
    assert_equal_within(
        1e-15, "total of the evaluator's 21 numbers", official_score(machines), 0.5925469043549957
    )


@pytest.mark.filterwarnings("error")
def test_figures_that_are_undefined_are_nan_and_left_out():
    only_target = machine_metrics([1, 2, 3], [0, 0, 1], [1, 1, 1])
    assert math.isnan(only_target["auc_source"]) and only_target["auc_target"] == 1
    assert math.isnan(only_target["precision_source"]) and math.isnan(
        only_target["precision_target"]
    )
    no_anomaly = machine_metrics([1, 2], [0, 0], [0, 1])
    assert all(math.isnan(no_anomaly[key]) for key in ("auc_source", "auc_target", "pauc"))
    assert math.isnan(official_score([no_anomaly])) and math.isnan(official_score([]))
    assert official_score([only_target, no_anomaly]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("decision", "precision", "recall", "f1"), [(0, 0, 0, 0), (1, 1 / 3, 1, 1 / 2)]
)
def test_decisions_that_are_all_equal_have_the_official_values(decision, precision, recall, f1):
    """Never: 0/ε = 0. Always: one of three is right. A domain without anomalies: recall 0/ε = 0."""
    metrics = machine_metrics([1, 2, 3, 1, 2], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1], [decision] * 5)
    assert [metrics[f"{name}_source"] for name in ("precision", "recall", "f1")] == pytest.approx(
        [precision, recall, f1]
    )
    assert [metrics[f"{name}_target"] for name in ("precision", "recall", "f1")] == [0, 0, 0]


def test_an_auc_of_zero_gives_a_total_near_zero_and_no_error():
    assert official_score([machine_metrics([3, 1], [0, 1], [0, 0])]) < 1e-9


@needs_real
@pytest.mark.parametrize("system", ["MSE", "MAHALA"])
def test_real_systems_have_the_figures_that_their_authors_printed(system):
    expected = json.loads((REAL / "scores" / "expected_dev.json").read_text())[system]
    rows = {
        m: evaluate.evaluate_machine(m, REAL / "scores" / f"dev_{system}", Path("data"))
        for m in data.DEV
    }
    keys = [(machine, key) for machine in data.DEV for key in evaluate.FIGURES]
    ours, theirs = [rows[m][key] for m, key in keys], [expected[m][key] for m, key in keys]
    what = f"AUC and pAUC of {system}, 7 machines, and total, against their authors' evaluation"
    assert_equal_within(
        1e-12,
        what,
        [*ours, official_score(list(rows.values()))],
        [*theirs, expected["official_score"]],
    )


@needs_real
def test_real_decisions_have_sklearns_precision_and_recall():
    from sklearn.metrics import precision_recall_fscore_support

    run = REAL / "scores" / "dev_MSE"
    for machine in data.DEV:
        row = evaluate.evaluate_machine(machine, run, Path("data"))
        decisions = data.read_csv(run / f"decision_result_{machine}_section_00_test.csv", int)
        for domain in ("source", "target"):
            chosen = [name for name in decisions if f"_{domain}_" in name]
            truth = ["anomaly" in name for name in chosen]
            found = precision_recall_fscore_support(
                truth, [decisions[n] for n in chosen], average="binary", zero_division=0
            )
            assert [
                row[f"{key}_{domain}"] for key in ("precision", "recall", "f1")
            ] == pytest.approx(list(found[:3]))


# ---------------------------------------------------------------- files and labels


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def scored(
    run: Path, machine: str, scores: dict[str, float], decisions: bool = True, **how
) -> Path:
    write(run / f"anomaly_score_{machine}_section_00_test.csv", scores.items())
    if decisions:
        write(
            run / f"decision_result_{machine}_section_00_test.csv",
            [(n, int(s > 0.5)) for n, s in scores.items()],
        )
    how = {"model": "adapter", "normalize": "none", "k": 1, "percentile": 90.0} | how
    (run / f"scoring_{machine}.json").write_text(json.dumps(how))
    return run


def dcase_names(per_cell: int = 5) -> list[str]:
    cells = [(d, label) for d in ("source", "target") for label in ("normal", "anomaly")]
    return [
        f"section_00_{d}_test_{label}_{i:04}_x.wav" for d, label in cells for i in range(per_cell)
    ]


def made_up(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {name: float(rng.normal() + ("anomaly" in name)) for name in dcase_names()}


def truth(tmp_path: Path, machine: str, anomaly: list, target: list) -> None:
    for kind, rows in (("data", anomaly), ("domain", target)):
        file = f"ground_truth_{machine}_section_00_test.csv"
        write(tmp_path / "data" / "ground_truth" / f"ground_truth_{kind}" / file, rows)


@pytest.fixture
def bandsaw(tmp_path):
    """Four evaluation clips whose names tell nothing; the ground truth in another order than the
    scores."""
    scores = {f"section_00_{i:04}.wav": score for i, score in enumerate([0.1, 0.9, 0.2, 0.8])}
    scored(tmp_path / "run", "bandsaw", scores)
    labels = {
        "section_00_0003.wav": 1,
        "section_00_0001.wav": 1,
        "section_00_0002.wav": 0,
        "section_00_0000.wav": 0,
    }
    domains = {
        "section_00_0000.wav": 0,
        "section_00_0002.wav": 1,
        "section_00_0001.wav": 0,
        "section_00_0003.wav": 1,
    }
    truth(tmp_path, "bandsaw", list(labels.items()), list(domains.items()))
    return labels, domains


def test_an_unbalanced_evaluation_machine_from_ground_truth_files_to_every_figure(tmp_path, capsys):
    """Worked by hand; source and target differ in every figure, so a swap of either file's columns
    shows.

    name   0    1    2    3    4    5    6    7
    score  .1   .2   .6   .9   .3   .7   .8   .4
    domain s    s    s    s    s    t    t    t
    label  n    n    n    a    a    n    a    a

    Source: normals .1 .2 .6 against anomalies .9 .3 .8 .4: 4 + 4 + 2 of 12 pairs are ordered right
    = 10/12. Target: normal .7 against the same: 2 of 4. pAUC: the normals are .7 .6 .2 .1; above .7
    lie 2 of 4 anomalies, so the area up to 0.1 is 0.1 · 1/2; McClish: 1/2 (1 + (0.05 - 0.005) /
    0.095) = 0.7368421. Decisions, source: .6 and .9 are called anomalies, .9 and .3 are: precision
    1/2, recall 1/2, F1 1/2. Target: all three are called, .8 and .4 are: precision 2/3, recall 1,
    F1 4/5.
    """
    scores = [0.1, 0.2, 0.6, 0.9, 0.3, 0.7, 0.8, 0.4]
    names = [f"section_00_{i:04}.wav" for i in range(8)]
    run = scored(tmp_path / "run", "bandsaw", dict(zip(names, scores, strict=True)))
    decisions = [0, 0, 1, 1, 0, 1, 1, 1]
    write(
        run / "decision_result_bandsaw_section_00_test.csv",
        list(zip(names, decisions, strict=True)),
    )
    truth(tmp_path, "bandsaw", list(zip(names, [0, 0, 0, 1, 1, 0, 1, 1], strict=True))[::-1],
          list(zip(names, [0, 0, 0, 0, 0, 1, 1, 1], strict=True)))  # fmt: skip
    evaluate.main(["--machine", "bandsaw", "--run", str(run), "--data", str(tmp_path / "data")])
    with (run / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    expected = {
        "auc_source": 10 / 12, "auc_target": 2 / 4, "pauc": 0.5 * (1 + 0.045 / 0.095),
        "precision_source": 1 / 2, "recall_source": 1 / 2, "f1_source": 1 / 2,
        "precision_target": 2 / 3, "recall_target": 1.0, "f1_target": 4 / 5,
    }  # fmt: skip
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected)
    total = 3 / (12 / 10 + 2 + 1 / expected["pauc"])
    assert float(row["official_score"]) == pytest.approx(total) and row["set"] == "eval"
    assert (
        f"official score: **{100 * total:.2f}** (n = 1), partial (1/7)" in capsys.readouterr().out
    )


def test_ground_truth_is_joined_by_name_not_by_row(bandsaw, tmp_path):
    row = evaluate.evaluate_machine("bandsaw", tmp_path / "run", tmp_path / "data")
    assert (row["auc_source"], row["auc_target"], row["pauc"], row["set"]) == (1, 1, 1, "eval")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "has no row for 1 clips: section_00_0000.wav"),
        (lambda rows: [*rows, rows[1]], "section_00_0001.wav stands there twice"),
        (
            lambda rows: [*rows, ("section_00_0009.wav", 1)],
            "rows that were not scored: section_00_0009.wav",
        ),
        (lambda rows: [*rows[:-1], (rows[-1][0], 2)], "section_00_0000.wav is 2, not 0 or 1"),
        (
            lambda rows: [*rows[:-1], (rows[-1][0], "normal")],
            "line 4: 'section_00_0000.wav,normal' is not name,int",
        ),
        (
            lambda rows: [*rows[:-1], (rows[-1][0],)],
            "line 4: 'section_00_0000.wav' is not name,int",
        ),
    ],
)
def test_wrong_ground_truth_is_an_error_that_names_the_row(bandsaw, tmp_path, change, message):
    labels, domains = bandsaw
    truth(tmp_path, "bandsaw", change(list(labels.items())), list(domains.items()))
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate_machine("bandsaw", tmp_path / "run", tmp_path / "data")


def test_missing_ground_truth_says_how_to_fetch_it(tmp_path):
    scored(tmp_path / "run", "bandsaw", {"section_00_0000.wav": 0.5})
    with pytest.raises(ValueError, match=r"python data\.py --machine bandsaw"):
        evaluate.evaluate_machine("bandsaw", tmp_path / "run", tmp_path / "data")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.wav", "nan"), ("b.wav", 1)], "a.wav has the value nan"),
        ([("a.wav", 1), ("a.wav", 2)], "a.wav stands there twice"),
        ([("a.wav", "x")], "line 1"),
        ([("a.wav", 1, 2)], "line 1"),
    ],
)
def test_wrong_score_files_are_refused(tmp_path, rows, message):
    write(tmp_path / "anomaly_score_fan_section_00_test.csv", rows)
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate_machine("fan", tmp_path, tmp_path)


def test_decisions_must_be_of_the_same_clips(tmp_path):
    run = scored(tmp_path / "run", "fan", made_up(0))
    write(
        run / "decision_result_fan_section_00_test.csv", [(name, 1) for name in dcase_names()[1:]]
    )
    with pytest.raises(
        ValueError,
        match=r"decision_result_fan.*has no row for 1 clips: section_00_source_test_normal_0000_x",
    ):
        evaluate.evaluate_machine("fan", run, tmp_path)


def test_without_a_decision_file_the_score_is_still_there(tmp_path):
    row = evaluate.evaluate_machine(
        "fan", scored(tmp_path / "run", "fan", made_up(0), decisions=False), tmp_path
    )
    assert row["auc_source"] > 0 and math.isnan(row["f1_source"])


NAMES = ["Pumpe 3, links.wav", 'the "bad" one.wav', "ölpumpe.wav", "latin-1 \udcf6.wav", " .wav"]


def test_ones_own_machine_needs_only_a_labels_file_whatever_the_names(tmp_path):
    """Commas, quotes, spaces, non-ASCII letters, and bytes that are no UTF-8. Without domains, all
    is source."""
    run = scored(tmp_path / "run", "pump", dict(zip(NAMES, [1.0, 5.0, 2.0, 4.0, 3.0], strict=True)))
    write(
        tmp_path / "data" / "pump" / "labels.csv",
        list(zip(reversed(NAMES), [0, 1, 0, 1, 0], strict=True)),
    )
    labels = tmp_path / "data" / "pump" / "labels.csv"
    labels.write_bytes(b"\xef\xbb\xbf" + labels.read_bytes())  # as spreadsheets save it
    row = evaluate.evaluate_machine("pump", run, tmp_path / "data")
    assert row["auc_source"] == 1 and math.isnan(row["auc_target"]) and row["set"] == "own"
    (tmp_path / "data" / "pump" / "labels.csv").unlink()
    with pytest.raises(ValueError, match=r"tell no labels; write .*pump/labels\.csv"):
        evaluate.evaluate_machine("pump", run, tmp_path / "data")


# ---------------------------------------------------------------- tables


def run_folder(path: Path, machines=("fan",), seed=0, args=None, **how) -> Path:
    path.mkdir(parents=True)
    for i, machine in enumerate(machines):
        scored(path, machine, made_up(100 * seed + i), **how)
    if args is not None:
        (path / "args.json").write_text(
            json.dumps({"args": {"seed": seed, "run": str(path), "rank": 64} | args})
        )
    return path


def table(capsys, *argv: str) -> str:
    evaluate.main(list(argv))
    return capsys.readouterr().out


def test_the_table_of_one_run(tmp_path, capsys):
    run = run_folder(tmp_path / "run", ("fan", "valve", "pump"), args={})
    out = table(capsys, "--machine", "fan", "valve", "pump", "--run", str(run))
    rows = {m: evaluate.evaluate_machine(m, run, Path("data")) for m in ("fan", "valve", "pump")}
    assert "| % | fan | valve |\n" in out and "| % | pump |\n" in out
    fan, valve = (100 * rows[machine]["auc_target"] for machine in ("fan", "valve"))
    line = f"| AUC target | {fan:.2f} | {valve:.2f} |"
    assert line in out
    total = official_score([rows["fan"], rows["valve"]])
    assert f"official score: **{100 * total:.2f}** (n = 1), partial (2/7)" in out
    with (run / "metrics.csv").open() as file:
        stored = {row["machine"]: row for row in csv.DictReader(file)}
    assert (
        float(stored["valve"]["pauc"]) == rows["valve"]["pauc"] and stored["pump"]["set"] == "own"
    )


def test_a_full_set_is_not_called_partial(tmp_path, capsys):
    run = run_folder(tmp_path / "run", data.DEV)
    assert "partial" not in table(capsys, "--machine", "dev", "--run", str(run)).split("###")[1]


def test_seeds_of_one_setting_give_mean_and_sample_standard_deviation(tmp_path, capsys):
    hardware = [
        {},
        {"compile": True, "workers": 0},
        {"device": "cpu", "data": "d", "weights": "w", "run": "r"},
    ]
    runs = [
        run_folder(tmp_path / f"lora-seed{seed}", args=hardware[seed], seed=seed)
        for seed in range(3)
    ]
    out = table(capsys, "--machine", "fan", "--run", *map(str, runs))
    totals = [
        100 * official_score([evaluate.evaluate_machine("fan", run, Path("data"))]) for run in runs
    ]
    assert (
        f"official score: **{np.mean(totals):.2f} ± {np.std(totals, ddof=1):.2f}** (n = 3)" in out
    )
    assert all((run / "metrics.csv").exists() for run in runs)


def test_runs_of_different_settings_give_a_line_each(tmp_path, capsys):
    runs = [
        run_folder(tmp_path / f"rank{r}-seed{s}", args={"rank": r}, seed=s)
        for r in (4, 8)
        for s in (0, 1)
    ]
    runs.append(
        run_folder(tmp_path / "test-normalised", args={"rank": 8}, normalize="test", percentile=80)
    )
    runs.append(run_folder(tmp_path / "no-args"))
    out = table(capsys, "--machine", "fan", "--run", *map(str, runs))
    lines = [line for line in out.splitlines() if str(tmp_path) in line]
    assert [line.split("|")[1].split("/")[-1].strip() for line in lines] == [
        "rank4",
        "rank8",
        "test-normalised",
        "no-args",
    ]
    assert [line.split("|")[3].strip() for line in lines] == ["2", "2", "1", "1"]
    assert "±" in lines[0] and "±" not in lines[2]
    assert (
        "normalize test (transductive), percentile 80" in lines[2]
        and "transductive" not in lines[0]
    )


def test_transductive_scores_are_called_so_in_the_single_table(tmp_path, capsys):
    run = run_folder(tmp_path / "run", normalize="test")
    assert "(transductive)" in table(capsys, "--machine", "fan", "--run", str(run)).splitlines()[0]


def test_undefined_figures_print_n_a_and_make_the_total_partial(tmp_path, capsys):
    run = scored(
        tmp_path,
        "fan",
        {
            "section_00_source_test_normal_0000_x.wav": 1,
            "section_00_source_test_anomaly_0000_x.wav": 2,
        },
    )
    out = table(capsys, "--machine", "fan", "--run", str(run))
    assert (
        "| AUC target | n/a |" in out
        and "official score: **100.00** (n = 1), partial (1/7; 1 of 3 values undefined)" in out
    )
    assert ",,1.0," in (run / "metrics.csv").read_text()


# ---------------------------------------------------------------- one's own labels

OWN = ["a 1.wav", "a 2.wav", "b;3.wav", "c,4.wav"]
RIGHT = {"a 1.wav": True, "a 2.wav": False, "b;3.wav": True, "c,4.wav": False}


@pytest.mark.parametrize(
    "text",
    [
        'a 1.wav,1\na 2.wav,0\nb;3.wav,1\n"c,4.wav",0\n',
        '\ufefffile;label\r\na 1.wav;1\r\na 2.wav;0\r\n"b;3.wav";1\r\nc,4.wav;0\r\n',
        "name, label\n a 1.wav , 1\na 2 ,0\nb;3, 1 \nc,4,0\n\n",
    ],
)
def test_labels_are_read_as_people_write_them(tmp_path, text):
    """A header, semicolons, spaces, names without .wav, a name with the delimiter unquoted."""
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode())
    assert dict(zip(OWN, data.read_own_labels(path, OWN))) == RIGHT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1.wav,1\na 2.wav,normal\n", "line 2: 'a 2.wav,normal' is no label; a right line is "
         "a 1.wav,1 for an anomaly, 0 for a normal clip"),
        ("a 1.wav,yes\n", "line 1: 'a 1.wav,yes' is no label"),
        ("a 1.wav,1\na 1,0\n", "line 2: a 1.wav stands there twice"),
        ("x.wav,1\n", "names none of the test clips; a right line is a 1.wav,1"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_understood_are_told_with_an_example(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        data.read_own_labels(path, OWN)
    assert message in str(error.value)


def test_labels_of_files_that_are_no_test_clips_are_said(tmp_path, capsys):
    """And umlauts match however a Mac or a spreadsheet has written them."""
    names = ["ölpumpe.wav", "u\u0308ber.wav", "a.wav"]
    path = tmp_path / "labels.csv"
    path.write_bytes("ölpumpe;1\nüber;0\nlnog;1\n".encode("cp1252"))
    assert data.read_own_labels(path, names) == [True, False, None]
    assert "names 1 that are no test clips: lnog" in capsys.readouterr().out


def test_misses_and_false_alarms_are_listed_by_file_and_the_unlabelled_left_out(tmp_path, capsys):
    scores = {"a 1.wav": 0.2, "a 2.wav": 0.9, "b;3.wav": 0.8, "c,4.wav": 0.1, "new.wav": 0.5}
    scored(tmp_path / "run", "pump", scores, data=str(tmp_path))
    write(tmp_path / "pump" / "labels.csv", [(n, int(a)) for n, a in RIGHT.items()])
    evaluate.main(["--machine", "pump", "--run", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "pump: 1 clips without a label are left out: new.wav" in out
    assert "pump: 1 misses: a 1.wav" in out and "pump: 1 false alarms: a 2.wav" in out
    row = evaluate.evaluate_machine("pump", tmp_path / "run")
    # 0.8 beats both normals, 0.2 beats one: 3 of 4 pairs
    assert row["auc_source"] == 0.5 * (1 / 2 + 1 / 2) and row["set"] == "own"


def test_an_own_machine_under_a_dcase_name_is_ones_own(tmp_path):
    """Its labels.csv counts, no ground truth is asked for, and it is no part of eval."""
    names = {"Aufnahme 1.wav": 0.9, "Aufnahme 2.wav": 0.1}
    scored(tmp_path / "run", "Vacuum", names, data=str(tmp_path))
    write(tmp_path / "Vacuum" / "labels.csv", [("Aufnahme 1", 1), ("Aufnahme 2", 0)])
    for kind in ("data", "domain"):
        truth = tmp_path / "ground_truth" / f"ground_truth_{kind}"
        truth.mkdir(parents=True)
        write(truth / "ground_truth_Vacuum_section_00_test.csv", [("section_00_0000.wav", 1)])
    row = evaluate.evaluate_machine("Vacuum", tmp_path / "run")
    assert row["set"] == "own" and row["auc_source"] == 1.0


def test_float32_and_bfloat16_are_two_settings(tmp_path, capsys):
    runs = [
        run_folder(tmp_path / "a", args={"precision": "float32"}, seed=0),
        run_folder(tmp_path / "b", args={"precision": "bfloat16"}, seed=1),
    ]
    out = table(capsys, "--machine", "fan", "--run", *map(str, runs))
    lines = [line for line in out.splitlines() if str(tmp_path) in line]
    assert len(lines) == 2 and "trained in float32" in lines[0] and "bfloat16" in lines[1]
