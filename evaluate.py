"""Evaluate: the official metric of DCASE2023 Task 2 on the CSV files that score.py wrote.

    AUC source = ROC AUC of the source domain's normal clips against the anomalies of BOTH domains
    AUC target = the same with the target domain's normal clips
    pAUC       = ROC AUC of all clips up to a false-positive rate of 0.1, rescaled so that chance
                 is 1/2 (McClish)
    official score = harmonic mean of these three over all machines: 21 values for 7 machines

AUC is the probability that an anomaly has a higher score than a normal clip: 1/2 is chance. The
anomalies of both domains count, as in the official code; several public implementations take only
those of the same domain. Precision, recall and F1 (metrics.csv) are about the decisions in a domain
and no part of the score. Source: github.com/nttcslab/dcase2023_task2_evaluator, 3aa8a9f.

    python evaluate.py --machine fan
    python evaluate.py --machine dev --run runs/lora-seed0 runs/lora-seed1     # mean ± deviation

Reads no audio. Labels come from the clips' names; if one name of a machine does not tell, all its
labels come from <data>/<machine>/labels.csv and domains.csv.
"""

import math
import sys

import numpy as np
from scipy.stats import hmean
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

# The three numbers of a machine that the official score averages.
METRICS = {"auc_source": "AUC source", "auc_target": "AUC target", "pauc": "pAUC"}
EPS = sys.float_info.epsilon  # the official code's guard against a mean with a zero in it


def machine_metrics(
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    is_target: np.ndarray,
    decisions: np.ndarray | None = None,
) -> dict[str, float]:
    """The metrics of one machine, from 0 to 1. The arguments are (n,), with an entry for each clip.

    Returns auc_source, auc_target, pauc and, if there are decisions, precision, recall and f1 of
    each domain. An AUC is NaN without normal clips or without anomalies.
    """
    scores = np.asarray(scores)
    is_anomaly, is_target = np.asarray(is_anomaly, bool), np.asarray(is_target, bool)
    source = ~is_target | is_anomaly  # anomalies of both domains
    target = is_target | is_anomaly
    metrics = {
        "auc_source": auc(is_anomaly[source], scores[source]),
        "auc_target": auc(is_anomaly[target], scores[target]),
        "pauc": auc(is_anomaly, scores, max_fpr=0.1),
    }
    if decisions is not None:
        decisions = np.asarray(decisions, bool)
        metrics |= decision_metrics("source", is_anomaly[~is_target], decisions[~is_target])
        metrics |= decision_metrics("target", is_anomaly[is_target], decisions[is_target])
    return metrics


def auc(is_anomaly: np.ndarray, scores: np.ndarray, max_fpr: float | None = None) -> float:
    """ROC AUC; NaN without a normal clip or without an anomaly."""
    if is_anomaly.all() or not is_anomaly.any():
        return math.nan
    return float(roc_auc_score(is_anomaly, scores, max_fpr=max_fpr))


def decision_metrics(domain: str, is_anomaly: np.ndarray, decisions: np.ndarray) -> dict:
    """Precision, recall and F1 within a domain: 0 where 0/0, NaN without clips."""
    values = [math.nan] * 3
    if len(is_anomaly):
        options = {"average": "binary", "zero_division": 0}
        *values, _ = precision_recall_fscore_support(is_anomaly, decisions, **options)
    return {f"{what}_{domain}": float(v) for what, v in zip(("precision", "recall", "f1"), values)}


def official_score(machines: list[dict[str, float]]) -> float:
    """Harmonic mean of the three numbers over all machines; undefined ones are left out."""
    values = []
    for metrics in machines:
        values += [metrics[name] for name in METRICS if not math.isnan(metrics[name])]
    return float(hmean(np.maximum(values, EPS))) if values else math.nan


# ---------------------------------------------- plumbing: not needed to follow the method

import argparse
import json
import re
from pathlib import Path

import data

# CSV files, joined by the clips' names


def read_csv(path: Path, number: str = r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?") -> dict[str, float]:
    """Lines of name,number as the challenge writes them, or a spreadsheet: comma or semicolon,
    with a BOM, a header, blank lines. ValueError, naming file and line: another line, or a name
    that stands twice.
    """
    values = {}
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for i, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(rf'"?(.+?)"?\s*[,;]\s*"?({number})"?', line.strip())
        if match:
            name = match[1].replace('""', '"')  # as CSV writes quotes
            if name in values:
                raise ValueError(f"{path}, line {i}: {name} stands there twice")
            values[name] = float(match[2])
        elif line.strip(" \t,;") and (i > 1 or ".wav" in line.lower()):  # not blank, no header
            right = "a right one is a clip's name and a number, for labels name.wav,0 or name.wav,1"
            raise ValueError(f"{path}, line {i}: {line!r}; {right}")
    return values


def read_labels(path: Path, names: list[str]) -> list[bool]:
    """0 or 1 for each of the names. ValueError: see read_csv, or no line for a name."""
    labels = read_csv(path, number="[01]")
    if missing := [name for name in names if name not in labels]:
        raise ValueError(f"{path} has no line for {len(missing)} clips, such as {missing[0]}")
    return [bool(labels[name]) for name in names]


def labels_of(machine: str, names: list[str], root: str) -> tuple[list, list]:
    """(is_anomaly, is_target) of the test clips called `names`.

    If one name does not tell, all from root/machine/labels.csv and domains.csv; a clip without a
    domain counts as source. ValueError: no labels, or something is wrong in these files.
    """
    clips = [data.parse_clip(Path(machine, "test", name)) for name in names]
    is_anomaly = [clip.is_anomaly for clip in clips]
    is_target = [clip.domain == "target" for clip in clips]
    labels, domains = Path(root, machine, "labels.csv"), Path(root, machine, "domains.csv")
    if None in is_anomaly:
        if not labels.exists():
            line = f"{names[0]},1 for an anomaly or {names[0]},0 for a normal clip"
            raise ValueError(f"{labels} is missing; a line for each clip: {line}")
        is_anomaly = read_labels(labels, names)
        if domains.exists():
            is_target = read_labels(domains, names)
    return is_anomaly, is_target


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def evaluate_machine(machine: str, run: Path, root: str | None = None) -> tuple[dict, list[str]]:
    """A row of metrics.csv and the clips' names. Errors: no scores; see read_csv, labels_of."""
    end = f"{machine}_section_00_test.csv"
    if not (run / f"anomaly_score_{end}").exists():
        raise FileNotFoundError(f"{run} has no scores of {machine}: run score.py, or set --run")
    scores = read_csv(run / f"anomaly_score_{end}")
    names, how = list(scores), read_json(run / f"scoring_{machine}.json")
    is_anomaly, is_target = np.array(labels_of(machine, names, root or how.get("data", "data")))
    decisions, wrong = None, {}
    if (run / f"decision_result_{end}").exists():
        decisions = np.array(read_labels(run / f"decision_result_{end}", names))
        wrong = {"anomalies": sum(is_anomaly), "missed": sum(is_anomaly & ~decisions)}
        wrong |= {"normal": sum(~is_anomaly), "false_alarms": sum(~is_anomaly & decisions)}
    metrics = machine_metrics(list(scores.values()), is_anomaly, is_target, decisions)

    which = "dev" if machine in data.DEV else "eval" if machine in data.EVAL else "own"
    row = {"run": str(run), "machine": machine, "set": which}
    row["scored_with"] = how.get("scored_with", "not known")
    return row | metrics | {"harmonic_mean": official_score([metrics])} | wrong, names


# Tables. A trial is the rows of one run; the trials of a setting differ in nothing but the seed.


def percent(values: list[float]) -> str:
    """'61.23', over trials '61.23 ± 0.45' (sample standard deviation), 'n/a' if undefined."""
    if any(math.isnan(value) for value in values):
        return "n/a"
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def official(which: str, trials: list[list[dict]]) -> str:
    """The official score of a set of machines; partial, if not all seven have all three values."""
    trials = [[row for row in rows if row["set"] == which] for rows in trials]
    whole = sum(not any(math.isnan(row[key]) for key in METRICS) for row in trials[0])
    note = f", partial ({whole}/7)" if whole < 7 and which != "own" else ""
    return f"**{percent([official_score(rows) for rows in trials])}** (n = {len(trials)}){note}"


def scored_with(rows: list[dict]) -> str:
    return " / ".join(dict.fromkeys(row["scored_with"] for row in rows))


def table(trials: list[list[dict]]) -> str:
    """Markdown: a line for each machine, over the trials of one setting."""
    columns = METRICS | {"harmonic_mean": "harmonic mean"}
    lines = [f"### {scored_with(trials[0])}", "", f"| % | {' | '.join(columns.values())} |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for rows in zip(*trials):  # of one machine
        cells = [percent([row[key] for row in rows]) for key in columns]
        lines.append(f"| {rows[0]['machine']} | {' | '.join(cells)} |")
    lines.append("")
    for which in dict.fromkeys(row["set"] for row in trials[0] if row["set"] != "own"):
        lines.append(f"{which}, official score: {official(which, trials)}")
    for row in trials[0] if len(trials) == 1 else []:
        if "missed" in row:
            missed = f"{row['missed']} of {row['anomalies']} anomalies missed"
            false = f"{row['false_alarms']} false alarms of {row['normal']} normal clips"
            lines.append(f"{row['machine']}: {missed}, {false}")
    return "\n".join(lines)


def ablation(settings: list[list[list[dict]]]) -> str:
    """Markdown: the official scores of each setting in a line."""
    sets = list(dict.fromkeys(row["set"] for row in settings[0][0]))
    lines = [f"| setting | {' | '.join(sets)} | scored with |"]
    lines += ["| --- |" + " ---: |" * len(sets) + " --- |"]
    for trials in settings:
        name = re.sub(r"[-_]?seed\d+$", "", trials[0][0]["run"])
        cells = [official(which, trials) for which in sets]
        lines.append(f"| {name} | {' | '.join(cells)} | {scored_with(trials[0])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    about = "Print the official metric of scored machines; write metrics.csv into the run folder."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--machine", nargs="+", required=True, metavar="NAME", help="names, or dev, eval, all")
    add("--run", nargs="+", action="extend", metavar="DIR", help="one or several (runs/<names>)")
    add("--data", metavar="DIR", help="holds <machine>/labels.csv (where the clips were scored)")
    args = parser.parse_args(argv)
    with data.one_line_errors():
        settings = {}  # setting -> seed -> trial
        for run in map(Path, args.run or [f"runs/{'+'.join(args.machine)}"]):
            machines = data.machine_names(args.machine)
            rows, clips = zip(*(evaluate_machine(machine, run, args.data) for machine in machines))
            record = read_json(run / "args.json")
            seed = record["args"]["seed"] if record else ""
            # All that a result depends on but the seed. Without a record, a run is its own setting.
            setting = data.setting(record) | {"seed": ""} if record else str(run)
            how = [row["scored_with"] for row in rows]
            trials = settings.setdefault(json.dumps([setting, how, clips], sort_keys=True), {})
            if seed in trials:
                raise ValueError(f"{run} has the setting and the seed of {trials[seed][0]['run']}")
            trials[seed] = rows
            for row in rows:
                of_set = [other for other in rows if other["set"] == row["set"]]
                row |= {"seed": seed, "official_score": official_score(of_set)}
            header = dict.fromkeys(key for row in rows for key in row)
            lines = [[row.get(key, "") for key in header] for row in rows]
            data.write_csv(run / "metrics.csv", [header, *lines])
    found = [list(trials.values()) for trials in settings.values()]
    print(table(found[0]) if len(found) == 1 else ablation(found))


if __name__ == "__main__":
    main()
