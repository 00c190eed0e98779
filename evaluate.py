"""Evaluate: the official metric of DCASE2023 Task 2 on the CSV files that score.py wrote.

    AUC source = ROC AUC of the source domain's normal clips against the anomalies of BOTH domains
    AUC target = the same with the target domain's normal clips
    pAUC       = ROC AUC of all clips up to a false-positive rate of 0.1 (McClish's standardised)
    official score = harmonic mean of these three over all machines: 21 values for 7 machines

AUC is the probability that an anomaly scores above a normal clip: 1/2 is chance. The anomalies of
both domains count, as in the official code; several public implementations take only those of the
same domain. Precision, recall and F1 (metrics.csv) are of the decisions, within each domain, and no
part of the score. Source: github.com/nttcslab/dcase2023_task2_evaluator, 3aa8a9f.

    python evaluate.py --machine fan
    python evaluate.py --machine dev --run runs/lora-seed0 runs/lora-seed1     # mean ± deviation

Reads no audio. Labels come from the file names in the CSV files; for the evaluation machines, whose
names tell nothing, from <data>/ground_truth; for one's own, from <data>/<machine>/labels.csv.
"""

import math
import sys

import numpy as np
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

# The three figures of a machine in the official score.
FIGURES = {"auc_source": "AUC source", "auc_target": "AUC target", "pauc": "pAUC"}
EPS = sys.float_info.epsilon  # the official code's guard against zeros


def machine_metrics(
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    is_target: np.ndarray,
    decisions: np.ndarray | None = None,
) -> dict[str, float]:
    """All metrics of one machine. The arguments are (n,), with an entry for each test clip.

    Returns auc_source, auc_target, pauc, and precision, recall and f1 of each domain, from 0 to 1.
    NaN where one is undefined: AUC and pAUC without normal clips or without anomalies; precision,
    recall and F1 without decisions or without clips of the domain.
    """
    scores = np.asarray(scores)
    is_anomaly, is_target = np.asarray(is_anomaly, bool), np.asarray(is_target, bool)
    metrics = {"pauc": auc(is_anomaly, scores, max_fpr=0.1)}
    for domain, in_domain in (("source", ~is_target), ("target", is_target)):
        chosen = in_domain | is_anomaly  # the domain's normal clips, and the anomalies of both
        metrics[f"auc_{domain}"] = auc(is_anomaly[chosen], scores[chosen])

        precision = recall = f1 = math.nan
        if decisions is not None and in_domain.any():
            truth, decided = is_anomaly[in_domain], np.asarray(decisions)[in_domain]
            hits = (truth & decided).sum()
            precision, recall = hits / max(decided.sum(), EPS), hits / max(truth.sum(), EPS)
            f1 = 2 * precision * recall / max(precision + recall, EPS)
        metrics |= {
            f"precision_{domain}": precision,
            f"recall_{domain}": recall,
            f"f1_{domain}": f1,
        }
    return {name: float(value) for name, value in metrics.items()}


def auc(is_anomaly: np.ndarray, scores: np.ndarray, max_fpr: float | None = None) -> float:
    """ROC AUC; NaN without a normal clip or without an anomaly."""
    if is_anomaly.all() or not is_anomaly.any():
        return math.nan
    return roc_auc_score(is_anomaly, scores, max_fpr=max_fpr)


def official_score(machines: list[dict[str, float]]) -> float:
    """Harmonic mean of the three over all machines; undefined ones are left out."""
    values = []
    for metrics in machines:
        values += [metrics[name] for name in FIGURES if not math.isnan(metrics[name])]
    return float(hmean(np.maximum(values, EPS))) if values else math.nan


# ---------------------------------------------- plumbing: not needed to follow the method

import json
import re
from pathlib import Path

import data

# Scores and labels, joined by file name


def evaluate_machine(machine: str, run: Path, root: Path | None = None, remarks=None) -> dict:
    """One row of metrics.csv: what was evaluated, how it was scored, and the figures.

    root     where labels are that names do not tell; None: where the clips were that were scored
    remarks  a list, to which lines are added: clips left out, misses and false alarms by file
    FileNotFoundError: no scores. ValueError: wrong rows in one of the files, or no labels.
    """
    path = run / f"anomaly_score_{machine}_section_00_test.csv"
    if not path.exists():
        first = f"run score.py --machine {machine} --run {run} first"
        pretrained = run.with_name(f"pretrained-{run.name}")
        there = f"--run {pretrained} is there" if pretrained.is_dir() else first
        raise FileNotFoundError(f"{path} is missing; {there}")
    scores = data.read_csv(path, float)
    names = list(scores)
    how = data.read_json(run / f"scoring_{machine}.json")
    root = root or Path(how.get("data", "data"))
    labels, is_target = data.labels_of(machine, names, root)
    known = np.array([label is not None for label in labels])
    if not known.any():
        raise ValueError(no_labels(machine, names, root))
    remarks = [] if remarks is None else remarks
    if not known.all():
        left_out = [name for name, label in zip(names, labels) if label is None]
        without = f"{len(left_out)} clips without a label are left out"
        remarks.append(f"{machine}: {without}: {data.first_ten(left_out)}")

    names, is_target = np.array(names)[known], np.array(is_target)[known]
    is_anomaly = np.array(labels, object)[known].astype(bool)
    decisions = run / f"decision_result_{machine}_section_00_test.csv"
    decided = None
    if decisions.exists():
        decided = np.array(data.read_01(decisions, list(scores)))[known]
        wrongs = {"misses": is_anomaly & ~decided, "false alarms": ~is_anomaly & decided}
        for what, wrong in wrongs.items():
            listed = f": {data.first_ten(names[wrong].tolist())}" if wrong.any() else ""
            remarks.append(f"{machine}: {wrong.sum()} {what}{listed}")
    values = np.array(list(scores.values()))[known]
    metrics = machine_metrics(values, is_anomaly, is_target, decided)

    args = data.read_json(run / "args.json").get("args", {})
    which = "dev" if machine in data.DEV else "eval" if machine in data.EVAL else "own"
    if not data.are_the_challenges(list(scores)):
        which = "own"
    row = {"run": str(run), "seed": args.get("seed", ""), "machine": machine, "set": which}
    row |= {key: how.get(key, "") for key in ("model", "normalize", "k", "percentile")}
    row["precision"] = args.get("precision", "")
    return row | metrics | {"harmonic_mean": official_score([metrics])}


def no_labels(machine: str, names: list[str], root: Path) -> str:
    if machine in data.EVAL and data.are_the_challenges(names):
        fetch = f"`python data.py --machine {machine} --data {root}` fetches it"
        return f"{root}/ground_truth has nothing of {machine}; {fetch}"
    example = f"a line such as {names[0]},1 for an anomaly, {names[-1]},0 for a normal clip"
    write = f"write {root}/{machine}/labels.csv, {example}"
    return f"the names of {machine}'s clips tell no labels; {write}"


# Tables


def scored_with(row: dict) -> tuple:
    return tuple(row[key] for key in ("model", "normalize", "k", "percentile", "precision"))


def setting_of(run: Path, rows: list[dict]) -> str:
    """Two runs with the same setting are trials of one thing: all is equal but the seed."""
    record = data.read_json(run / "args.json")
    args = record.get("args", {"run": str(run)})  # without args.json, a setting of its own
    irrelevant = {*data.PLACES, "seed"} if "seed" in args else ()
    args = {key: value for key, value in args.items() if key not in irrelevant}
    how = [scored_with(row) for row in rows]
    return json.dumps([args, record.get("weights_sha256"), how], sort_keys=True)


def backend_of(rows: list[dict]) -> str:
    """How the scores were made, in words; the transductive back-end is always called so."""
    kinds = {scored_with(row) for row in rows}
    if len(kinds) > 1:
        transductive = " (some transductive)" * any(kind[1] == "test" for kind in kinds)
        return f"machines scored in different ways{transductive}"
    model, normalize, k, percentile, precision = kinds.pop()
    if not normalize:
        return "not known"
    words = [model] if model.startswith("pretrained") else []
    words += [f"k={k}", f"normalize {normalize}" + " (transductive)" * (normalize == "test")]
    words += [f"percentile {percentile:g}"] if percentile not in (90, "") else []
    words += [f"trained in {precision}"] if precision else []
    return ", ".join(words)


def percent(values: list[float]) -> str:
    """'61.23', over several runs '61.23 ± 0.45' (sample standard deviation), 'n/a' if undefined."""
    if any(math.isnan(value) for value in values):
        return "n/a"
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def completeness(which: str, trial: list[dict]) -> str:
    """'' for a full set, or what is missing from it."""
    undefined = sum(math.isnan(row[key]) for row in trial for key in FIGURES)
    notes = [f"{len(trial)}/7"] if which != "own" and len(trial) < 7 else []
    notes += [f"{undefined} of {3 * len(trial)} values undefined"] if undefined else []
    return f"partial ({'; '.join(notes)})" if notes else ""


def table(which: str, trials: list[list[dict]]) -> str:
    """Markdown: the machines of one set in columns, over one or more trials of the same setting."""
    machines = [row["machine"] for row in trials[0]]
    runs = f"{len(trials)} run{'s' * (len(trials) > 1)}"
    lines = [f"### {which}: {runs}; {backend_of(trials[0])}", ""]
    lines += ["| % | " + " | ".join(machines) + " |", "| --- |" + " ---: |" * len(machines)]
    for key, title in (FIGURES | {"harmonic_mean": "harmonic mean"}).items():
        cells = []
        for column in range(len(machines)):
            cells.append(percent([trial[column][key] for trial in trials]))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    total = percent([official_score(trial) for trial in trials])
    note = completeness(which, trials[0])
    last = f"official score: **{total}** (n = {len(trials)})" + (f", {note}" if note else "")
    return "\n".join([*lines, "", last])


def ablation(settings: list[list[list[dict]]]) -> str:
    """Markdown: one line a setting, its trials averaged."""
    present = {row["set"] for row in settings[0][0]}
    sets = [which for which in ("dev", "eval", "own") if which in present]
    head = "| setting | " + " | ".join(sets) + " | n | scored with |"
    lines = ["### official score by setting, %", "", head]
    lines += ["| --- |" + " ---: |" * len(sets) + " ---: | --- |"]
    for trials in settings:
        name = re.sub(r"[-_]?seed\d+$", "", trials[0][0]["run"])
        cells = []
        for which in sets:
            chosen = [[row for row in trial if row["set"] == which] for trial in trials]
            total = percent([official_score(trial) for trial in chosen])
            cells.append(f"{total} {completeness(which, chosen[0])}".strip())
        cells += [str(len(trials)), backend_of(trials[0])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_metrics(run: Path, rows: list[dict]) -> None:
    """The same as the tables, a row a machine; official_score is that of the row's set."""
    lines = [[*rows[0], "official_score"]]
    for row in rows:
        total = official_score([other for other in rows if other["set"] == row["set"]])
        values = [*row.values(), total]
        lines.append(["" if isinstance(v, float) and math.isnan(v) else v for v in values])
    data.write_csv(run / "metrics.csv", lines)


def main(argv: list[str] | None = None) -> None:
    about = """Print the official metric of scored machines; write metrics.csv into the run folder.

  python evaluate.py --machine fan
  python evaluate.py --machine all --run runs/lora-seed0 runs/lora-seed1     mean ± deviation"""
    parser = data.Parser("evaluate.py", about)
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--run", nargs="+", metavar="DIR", help="run folders, averaged over seeds (runs/<names>)")
    add("--data", metavar="DIR", help="holds labels that names do not tell (where it was scored)")
    args = parser.parse_args(argv)
    with data.one_line_errors(parser):
        machines = data.machine_names(args.machine)
        runs = [Path(run) for run in args.run or [data.default_run(args.machine)]]
        if len({run.resolve() for run in runs}) < len(runs):
            raise ValueError("--run names a folder twice")
        settings = {}  # what a result depends on, but for the seed -> its trials, of rows each
        remarks = []
        for run in runs:
            root = Path(args.data) if args.data else None
            rows = [evaluate_machine(machine, run, root, remarks) for machine in machines]
            trials = settings.setdefault(setting_of(run, rows), [])
            if any(trial[0]["seed"] == rows[0]["seed"] for trial in trials):
                same = f"{run} has the setting and the seed of another --run"
                raise ValueError(f"{same}; trials need seeds of their own")
            trials.append(rows)
        for trials in settings.values():
            for rows in trials:
                write_metrics(Path(rows[0]["run"]), rows)
    if len(settings) > 1:
        print(ablation(list(settings.values())))
        return
    trials = settings.popitem()[1]
    for name in dict.fromkeys(row["set"] for row in trials[0]):
        chosen = [[row for row in trial if row["set"] == name] for trial in trials]
        print(table(name, chosen), end="\n\n")
    if len(runs) == 1:
        print(*remarks, sep="\n")


if __name__ == "__main__":
    main()
