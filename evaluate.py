"""Evaluate: the official metric of DCASE2023 Task 2 on the CSV files that score.py wrote.

    AUC source = ROC AUC of the source domain's normal clips against the anomalies of BOTH domains
    AUC target = the same with the target domain's normal clips
    pAUC       = ROC AUC of all clips up to a false-positive rate of p = 0.1 (McClish's standardised one)
    official score = harmonic mean of these three over all machines: 21 values for 7 machines

Anomalies are pooled over the domains since the domain of a test clip is not known in use; several
public implementations take only the same domain's. Precision, recall and F1 (metrics.csv) are of
the decisions, within each domain, and no part of the score. Source:
github.com/nttcslab/dcase2023_task2_evaluator, 3aa8a9f.

    python evaluate.py --machine fan
    python evaluate.py --machine dev --run runs/lora-seed0 runs/lora-seed1     # mean ± standard deviation

Reads no audio. Labels come from the file names in the CSV files; for the evaluation machines, whose
names tell nothing, from <data>/ground_truth; for one's own, from <data>/<machine>/labels.csv
(file,0|1).
"""

import math
import sys

import numpy as np
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

ROWS = {
    "auc_source": "AUC source",
    "auc_target": "AUC target",
    "pauc": "pAUC",
}  # of the official score
EPS = sys.float_info.epsilon  # the official code's guard: 0 / 0 is then 0


def machine_metrics(
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    is_target: np.ndarray,
    decisions: np.ndarray | None = None,
) -> dict[str, float]:
    """One machine's test clips, arrays (n,) -> auc_source, auc_target, pauc, precision_source, ...,
    f1_target, 0 to 1.

    NaN where one is undefined: an AUC without normal clips or anomalies, the others without clips
    or decisions.
    """
    scores = np.asarray(scores, float)
    is_anomaly, is_target = np.asarray(is_anomaly, bool), np.asarray(is_target, bool)
    metrics = {"pauc": auc(is_anomaly, scores, max_fpr=0.1)}
    for domain, in_domain in (("source", ~is_target), ("target", is_target)):
        chosen = in_domain | is_anomaly  # the domain's normal clips, and the anomalies of both
        metrics[f"auc_{domain}"] = auc(is_anomaly[chosen], scores[chosen])
        precision = recall = f1 = math.nan
        if decisions is not None and in_domain.any():
            truth, decided = is_anomaly[in_domain], np.asarray(decisions, bool)[in_domain]
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
    """NaN where it is undefined: without a normal clip or without an anomaly."""
    if is_anomaly.all() or not is_anomaly.any():
        return math.nan
    return roc_auc_score(is_anomaly, scores, max_fpr=max_fpr)


def official_score(machines: list[dict[str, float]]) -> float:
    """Harmonic mean of auc_source, auc_target and pauc over machines; undefined ones are left
    out."""
    values = [metrics[row] for metrics in machines for row in ROWS if not math.isnan(metrics[row])]
    return float(hmean(np.maximum(values, EPS))) if values else math.nan


# -------------------------------------------- plumbing: nothing below is in the paper

import csv
import json
import re
from pathlib import Path

import data

# Scores and labels, joined by file name


def read_csv(path: Path, number: type) -> dict[str, float]:
    """A two-column CSV file without header -> {name: number}. ValueError: a malformed or doubled
    row."""
    rows = {}
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, row in enumerate(csv.reader(file), 1):
            try:
                name, text = row
                value = number(text)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {line}: {','.join(row)!r} is not name,{number.__name__}"
                ) from error
            if name in rows or not math.isfinite(value):
                what = "stands there twice" if name in rows else f"has the value {value}"
                raise ValueError(f"{path}, line {line}: {name} {what}")
            rows[name] = value
    return rows


def read_01(path: Path, names: list[str]) -> np.ndarray:
    """0 or 1 for each of `names`, from a CSV file that has exactly these names, in any order."""
    table = read_csv(path, int)
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"{path} has no row for {', '.join(missing[:3])} ({len(missing)} missing)")
    if unknown := sorted(table.keys() - set(names)):
        raise ValueError(
            f"{path} has rows that were not scored: {', '.join(unknown[:3])} ({len(unknown)} of them)"
        )
    if wrong := [name for name in names if table[name] not in (0, 1)]:
        raise ValueError(f"{path}: {wrong[0]} is {table[wrong[0]]}, not 0 or 1")
    return np.array([table[name] for name in names], bool)


def labels_of(machine: str, names: list[str], root: Path) -> tuple[np.ndarray, np.ndarray]:
    """(is_anomaly, is_target) of the test clips; a clip without a domain counts as source."""
    clips = [data.parse_clip(Path(machine, "test", name)) for name in names]
    is_target = np.array([clip.domain == "target" for clip in clips])
    if all(clip.is_anomaly is not None for clip in clips):
        return np.array([clip.is_anomaly for clip in clips]), is_target
    own = root / machine / "labels.csv"
    if own.exists():
        return read_01(own, names), is_target
    if machine in data.EVAL:
        file = f"ground_truth_{machine}_section_00_test.csv"
        paths = [
            root / "ground_truth" / f"ground_truth_{kind}" / file for kind in ("data", "domain")
        ]
        if not all(path.exists() for path in paths):
            raise ValueError(
                f"{paths[0]} is missing; `python data.py --machine {machine} --data {root}` fetches it"
            )
        return read_01(paths[0], names), read_01(paths[1], names)
    unknown = f"the names of {machine}'s clips tell no labels"
    raise ValueError(f"{unknown}; write them to {own}, a line `file,0` or `file,1` each")


def evaluate_machine(machine: str, run: Path, root: Path | None = None) -> dict:
    """One row of metrics.csv: what was evaluated, how it was scored, and the figures.

    root  where labels are that the names do not tell; None: where the clips were that score.py
    scored FileNotFoundError: no scores. ValueError: wrong rows in one of the files, or no labels.
    """
    path = run / f"anomaly_score_{machine}_section_00_test.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; run score.py --machine {machine} --run {run} first"
        )
    scores = read_csv(path, float)
    names = list(scores)
    how = data.read_json(run / f"scoring_{machine}.json")
    is_anomaly, is_target = labels_of(machine, names, root or Path(how.get("data", "data")))
    decisions = run / f"decision_result_{machine}_section_00_test.csv"
    decided = read_01(decisions, names) if decisions.exists() else None
    metrics = machine_metrics(list(scores.values()), is_anomaly, is_target, decided)
    seed = data.read_json(run / "args.json").get("args", {}).get("seed", "")
    which = "dev" if machine in data.DEV else "eval" if machine in data.EVAL else "own"
    row = {"run": str(run), "seed": seed, "machine": machine, "set": which}
    row |= {key: how.get(key, "") for key in ("model", "normalize", "k", "smote")}
    return row | metrics | {"harmonic_mean": official_score([metrics])}


# Tables


def setting_of(run: Path, rows: list[dict]) -> str:
    """Two runs with the same setting are trials of one thing: all arguments equal but the seed,
    scored alike."""
    record = data.read_json(run / "args.json")
    args = record.get("args", {"run": str(run)})  # without args.json, a setting of its own
    irrelevant = {*data.PLACES, "seed"} if "seed" in args else ()
    args = {key: value for key, value in args.items() if key not in irrelevant}
    how = [(row["model"], row["normalize"], row["k"], row["smote"]) for row in rows]
    return json.dumps([args, record.get("weights_sha256"), how], sort_keys=True)


def backend_of(rows: list[dict]) -> str:
    """How the scores were made, in words; the transductive back-end is always called so."""
    kinds = {(row["model"], row["normalize"], row["k"], row["smote"]) for row in rows}
    if len(kinds) > 1:
        return "machines scored in different ways" + " (some transductive)" * any(
            kind[1] == "test" for kind in kinds
        )
    model, normalize, k, smote = kinds.pop()
    if not normalize:
        return "not known"
    words = [f"k={k}", f"normalize {normalize}" + " (transductive)" * (normalize == "test")]
    return ", ".join(
        (["pretrained"] if model == "pretrained" else [])
        + words
        + ([f"smote {smote}"] if smote else [])
    )


def percent(values: list[float]) -> str:
    """'61.23', over several runs '61.23 ± 0.45' (sample standard deviation), 'n/a' where one is
    undefined."""
    if any(math.isnan(value) for value in values):
        return "n/a"
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def completeness(which: str, trial: list[dict]) -> str:
    """'' for a full set, or what is missing from it."""
    undefined = sum(math.isnan(row[key]) for row in trial for key in ROWS)
    notes = [f"{len(trial)}/7"] if which != "own" and len(trial) < 7 else []
    notes += [f"{undefined} of {3 * len(trial)} values undefined"] if undefined else []
    return f"partial ({'; '.join(notes)})" if notes else ""


def table(which: str, trials: list[list[dict]]) -> str:
    """Markdown: the machines of one set in columns, over one or more trials of the same setting."""
    machines = [row["machine"] for row in trials[0]]
    lines = [
        f"### {which}: {len(trials)} run{'s' * (len(trials) > 1)}; {backend_of(trials[0])}",
        "",
    ]
    lines += ["| % | " + " | ".join(machines) + " |", "| --- |" + " ---: |" * len(machines)]
    for key, title in (ROWS | {"harmonic_mean": "harmonic mean"}).items():
        cells = [
            percent([trial[column][key] for trial in trials]) for column in range(len(machines))
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    total = percent([official_score(trial) for trial in trials])
    note = completeness(which, trials[0])
    return "\n".join(
        [
            *lines,
            "",
            f"official score: **{total}** (n = {len(trials)})" + (f", {note}" if note else ""),
        ]
    )


def ablation(settings: list[list[list[dict]]]) -> str:
    """Markdown: one line a setting, its trials averaged."""
    sets = [
        which
        for which in ("dev", "eval", "own")
        if any(row["set"] == which for row in settings[0][0])
    ]
    lines = [
        "### official score by setting, %",
        "",
        "| setting | " + " | ".join(sets) + " | n | scored with |",
    ]
    lines += ["| --- |" + " ---: |" * len(sets) + " ---: | --- |"]
    for trials in settings:
        name = re.sub(r"[-_]?seed\d+$", "", trials[0][0]["run"])
        cells = []
        for which in sets:
            chosen = [[row for row in trial if row["set"] == which] for trial in trials]
            cells.append(
                f"{percent([official_score(t) for t in chosen])} {completeness(which, chosen[0])}".strip()
            )
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {len(trials)} | {backend_of(trials[0])} |"
        )
    return "\n".join(lines)


def write_metrics(run: Path, rows: list[dict]) -> None:
    """The same as the tables, a row a machine; official_score is that of the row's set."""
    totals = {
        which: official_score([row for row in rows if row["set"] == which])
        for which in {r["set"] for r in rows}
    }
    rows = [row | {"official_score": totals[row["set"]]} for row in rows]
    values = [
        ["" if isinstance(v, float) and math.isnan(v) else v for v in row.values()] for row in rows
    ]
    data.write_csv(run / "metrics.csv", [list(rows[0]), *values])


def main(argv: list[str] | None = None) -> None:
    about = """Print the official metric of scored machines, and write metrics.csv into the run folder.

  python evaluate.py --machine fan
  python evaluate.py --machine all --run runs/lora-seed0 runs/lora-seed1     mean ± standard deviation"""
    parser = data.make_parser("evaluate.py", about)
    # fmt: off
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--run", nargs="+", metavar="DIR", help="run folders, averaged over seeds (runs/<names>)")
    add("--data", metavar="DIR", help="holds labels that names do not tell (where it was scored)")
    # fmt: on
    args = parser.parse_args(argv)
    with data.one_line_errors(parser):
        machines = data.machine_names(args.machine)
        runs = [Path(run) for run in args.run or [data.default_run(args.machine)]]
        if len({run.resolve() for run in runs}) < len(runs):
            raise ValueError("--run names a folder twice")
        settings = {}  # what a run's result depends on, but for its seed -> its trials, the rows of each
        for run in runs:
            rows = [
                evaluate_machine(machine, run, Path(args.data) if args.data else None)
                for machine in machines
            ]
            trials = settings.setdefault(setting_of(run, rows), [])
            if any(trial[0]["seed"] == rows[0]["seed"] for trial in trials):
                raise ValueError(
                    f"{run} has the setting and the seed of another --run; trials need seeds of their own"
                )
            trials.append(rows)
        for rows in (rows for trials in settings.values() for rows in trials):
            write_metrics(Path(rows[0]["run"]), rows)
    if len(settings) > 1:
        print(ablation(list(settings.values())))
        return
    trials = settings.popitem()[1]
    for name in dict.fromkeys(row["set"] for row in trials[0]):
        print(
            table(name, [[row for row in trial if row["set"] == name] for trial in trials]),
            end="\n\n",
        )


if __name__ == "__main__":
    main()
