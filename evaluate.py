"""Evaluate: the official metric of DCASE2023 Task 2, on the score files that score.py wrote.

    AUC source = ROC AUC of the source domain's normal clips against the anomalies of BOTH domains
    AUC target = the same with the target domain's normal clips
    pAUC       = ROC AUC of all clips up to a false-positive rate of 0.1, rescaled so that chance
                 is 1/2 (McClish)
    official score = harmonic mean of these three over all machines: 21 values for 7 machines

AUC is the probability that an anomaly has a higher score than a normal clip: 1/2 is chance. The
anomalies of both domains count, as in the official code; several public implementations take only
those of the same domain. Precision, recall and F1 (in metrics.csv) are about the decisions within a
domain and are not part of the score. Source: nttcslab/dcase2023_task2_evaluator, 3aa8a9f.

    python evaluate.py --machine fan
    python evaluate.py --machine dev --run runs/lora-seed0 runs/lora-seed1     # mean ± deviation

Reads no audio. The labels come from the clips' names. If any name of a machine lacks its label, all
of them come from <data>/<machine>/labels.csv and domains.csv.
"""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import hmean
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

import data

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
    for_source = ~is_target | is_anomaly  # the normal clips of source, and all anomalies
    for_target = is_target | is_anomaly
    metrics = {
        "auc_source": auc(is_anomaly[for_source], scores[for_source]),
        "auc_target": auc(is_anomaly[for_target], scores[for_target]),
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
    """Precision, recall and F1 within a domain: 0 where they are 0/0, NaN without clips."""
    precision = recall = f1 = math.nan
    if len(is_anomaly):
        precision, recall, f1, _ = precision_recall_fscore_support(
            is_anomaly, decisions, average="binary", zero_division=0
        )
    values = {"precision": precision, "recall": recall, "f1": f1}
    return {f"{name}_{domain}": float(value) for name, value in values.items()}


def official_score(machines: list[dict[str, float]]) -> float:
    """Harmonic mean of the three numbers over all machines; undefined ones are left out."""
    values = []
    for metrics in machines:
        values += [metrics[name] for name in METRICS if not math.isnan(metrics[name])]
    return float(hmean(np.maximum(values, EPS))) if values else math.nan


# ---------------------------------------------- plumbing: not needed to follow the method


def read_two_columns(path: Path, to_value: Callable) -> dict:
    """{name: value} from lines such as a.wav,0.5, as the challenge or a spreadsheet writes them.

    The separator is a comma, semicolon or tab. A header and blank lines are skipped, and any other
    line is refused.
    """
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    squeezed = text.lower().replace('"', "").replace(" ", "")
    separator = ","
    if ".wav;" in squeezed:
        separator = ";"
    if ".wav\t" in squeezed:
        separator = "\t"
    values = {}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    for row in reader:
        cells = [cell.strip() for cell in row if cell.strip()]
        if not cells:
            continue
        line = f"{path}, line {reader.line_num}"
        try:
            name, value = cells
            value = to_value(value)
        except (ValueError, KeyError) as error:
            if reader.line_num == 1 and not cells[0].lower().endswith(".wav"):
                continue  # a header
            right = "name.wav and a number (with a point, no comma), or 0 or 1 for a label"
            raise ValueError(f"{line}: {separator.join(row)!r} should be {right}") from error
        if name in values:
            raise ValueError(f"{line}: {name} appears twice")
        values[name] = value
    return values


def to_label(text: str) -> bool:
    return {"0": False, "1": True}[text]


def to_score(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def read_labels(path: Path, names: list[str]) -> np.ndarray:
    """0 or 1 for each of the names, as bool."""
    labels = read_two_columns(path, to_label)
    missing = [name for name in names if name not in labels]
    if missing:
        raise ValueError(f"{path} has no line for {missing[0]} (missing clips: {len(missing)})")
    return np.array([labels[name] for name in names])


def labels_of(machine: str, names: list[str], root: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """is_anomaly and is_target of the test clips called `names`.

    They come from the names, or all from root/machine/labels.csv and domains.csv if any name lacks
    its label. A clip without a domain counts as source. Raises FileNotFoundError without labels.
    """
    clips = [data.parse_clip(Path(machine, "test", name)) for name in names]
    is_target = np.array([clip.domain == "target" for clip in clips])
    if all(clip.is_anomaly is not None for clip in clips):
        return np.array([clip.is_anomaly for clip in clips]), is_target
    labels, domains = Path(root, machine, "labels.csv"), Path(root, machine, "domains.csv")
    if not labels.exists():
        example = f"{names[0]},1 for an anomaly or {names[0]},0 for a normal clip"
        raise FileNotFoundError(f"{labels} is missing; it needs a line for each clip: {example}")
    if domains.exists():
        is_target = read_labels(domains, names)
    return read_labels(labels, names), is_target


def known_labels(machine: str, names: list[str], root: str | Path) -> np.ndarray | None:
    """is_anomaly of the clips, or None where nobody has labelled them."""
    try:
        return labels_of(machine, names, root)[0]
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"note: no labels are used: {error}")
        return None


def words(scored_with: dict) -> str:
    """How the scores were made, in a few words."""
    if not scored_with:
        return "not known"
    setting = scored_with["setting"]
    if scored_with["model"] == "pretrained":
        model = f"pre-trained AST, {setting['pooling']}"
    else:
        model = f"{setting['tuning']}, {setting['precision']}"
    text = f"{model}, normalize {scored_with['normalize']}, k {scored_with['k']}"
    if scored_with["normalize"] == "test":
        text += ", TRANSDUCTIVE"
    return text


def evaluate_machine(machine: str, run: Path, root: str | None = None) -> dict:
    """A row of metrics.csv, and under "setting" what two runs must share to be averaged."""
    suffix = f"{machine}_section_00_test.csv"
    score_file, decision_file = run / f"anomaly_score_{suffix}", run / f"decision_result_{suffix}"
    if not score_file.exists():
        raise FileNotFoundError(f"{run} has no scores of {machine}: run score.py, or set --run")
    scoring, how, adapter = {}, run / f"scoring_{machine}.json", run / "adapter.pt"
    if how.exists():
        scoring = json.loads(how.read_text())
    if "adapter_sha256" in scoring and adapter.exists():
        if data.file_digest(adapter) != scoring["adapter_sha256"]:
            raise ValueError(f"{run} was trained after {machine} was scored: score again")

    scores = read_two_columns(score_file, to_score)
    names = list(scores)
    is_anomaly, is_target = labels_of(machine, names, root or scoring.get("data", "data"))
    decisions = read_labels(decision_file, names) if decision_file.exists() else None
    metrics = machine_metrics(list(scores.values()), is_anomaly, is_target, decisions)

    scored_with = scoring.get("scored_with", {})
    setting = dict(scored_with.get("setting", {}))
    seed = setting.pop("seed", "")
    shared = scored_with | {"setting": setting}
    if not scored_with:
        shared = str(run)  # without a record, a run is never averaged with another
    which = "own"
    if machine in data.DEV + data.EVAL:
        which = "dev" if machine in data.DEV else "eval"
    return {
        "run": str(run),
        "machine": machine,
        "set": which,
        "seed": seed,
        "scored_with": words(scored_with),
        **metrics,
        "harmonic_mean": official_score([metrics]),
        "setting": [shared, names],
    }


# Tables. A trial is the list of one run's rows. Trials of one setting differ only in their seed.


def same_setting(trials: list[list[dict]]) -> list[list[list[dict]]]:
    """Group the trials by setting. Raises ValueError if a seed appears twice."""
    groups = {}
    for trial in trials:
        setting = str([row["setting"] for row in trial])
        group = groups.setdefault(setting, {})
        seed = trial[0]["seed"]
        if seed in group:
            other = group[seed][0]["run"]
            raise ValueError(f"{trial[0]['run']} has the same setting and seed as {other}")
        group[seed] = trial
    return [list(group.values()) for group in groups.values()]


def percent(values: list[float]) -> str:
    """'61.23', over trials '61.23 ± 0.45' (sample standard deviation), 'n/a' if undefined."""
    if any(math.isnan(value) for value in values):
        return "n/a"
    text = f"{100 * np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {100 * np.std(values, ddof=1):.2f}"
    return text


def official(which: str, group: list[list[dict]]) -> str:
    """The official score of dev or eval; partial, unless all seven machines have all three numbers
    in every trial.
    """
    trials = [[row for row in trial if row["set"] == which] for trial in group]
    text = f"**{percent([official_score(rows) for rows in trials])}** (n = {len(group)})"
    complete = 7
    for rows in trials:
        whole = [row for row in rows if not any(math.isnan(row[key]) for key in METRICS)]
        complete = min(complete, len(whole))
    if which != "own" and complete < 7:
        text += f", partial ({complete}/7)"
    return text


def scored_with(group: list[list[dict]]) -> str:
    """The same for all trials, but maybe not for all machines."""
    return " / ".join(dict.fromkeys(row["scored_with"] for row in group[0]))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_machines(group: list[list[dict]]) -> str:
    """A line for each machine, as mean ± deviation over the trials, and the official scores."""
    every_row = [row for trial in group for row in trial]
    columns = METRICS | {"harmonic_mean": "harmonic mean"}
    for key in METRICS:
        if all(math.isnan(row[key]) for row in every_row):
            del columns[key]  # such as AUC target of a machine of one's own
    rows = []
    for of_machine in zip(*group):
        cells = [percent([row[key] for row in of_machine]) for key in columns]
        rows.append([of_machine[0]["machine"], *cells])
    text = f"### {scored_with(group)}\n\n{markdown(['%', *columns.values()], rows)}\n"
    for which in ("dev", "eval"):
        if any(row["set"] == which for row in every_row):
            text += f"\n{which}, official score: {official(which, group)}"
    return text


def table_of_settings(groups: list[list[list[dict]]]) -> str:
    """A line for each setting: the official scores, and how it was scored."""
    sets = list(dict.fromkeys(row["set"] for row in groups[0][0]))
    rows = []
    for group in groups:
        first = group[0][0]
        name = first["run"].removesuffix(f"seed{first['seed']}").rstrip("-_")
        rows.append([name, *[official(which, group) for which in sets], scored_with(group)])
    return markdown(["setting", *sets, "scored with"], rows)


def main(argv: list[str] | None = None) -> None:
    about = "Print the official metric of scored machines, and write it into the run's metrics.csv."
    parser = argparse.ArgumentParser(description=about)
    data.add_machine(parser)
    add = parser.add_argument
    add("--run", nargs="+", action="extend", metavar="DIR", help="run folders (runs/<names>)")
    add("--data", metavar="DIR", help="with <machine>/labels.csv (where the scored clips were)")
    args = parser.parse_args(argv)
    runs = args.run or [f"runs/{'+'.join(args.machine)}"]
    machines = data.machine_names(args.machine)
    with data.one_line_errors():
        trials = []
        for run in map(Path, runs):
            trial = [evaluate_machine(machine, run, args.data) for machine in machines]
            for row in trial:
                of_set = [other for other in trial if other["set"] == row["set"]]
                row["official_score"] = official_score(of_set)
            trials.append(trial)
        groups = same_setting(trials)
        for trial in trials:
            names = [name for name in trial[0] if name != "setting"]
            rows = [[row[name] for name in names] for row in trial]
            data.write_csv(Path(trial[0]["run"]) / "metrics.csv", [names, *rows])
        print(table_of_machines(groups[0]) if len(groups) == 1 else table_of_settings(groups))


if __name__ == "__main__":
    main()
