"""Evaluate: the official metric of DCASE2023 Task 2, on the score files that score.py wrote.

    AUC source = ROC AUC of the source domain's normal clips against the anomalies of BOTH domains
    AUC target = the same with the target domain's normal clips
    pAUC       = ROC AUC of all clips up to a false-positive rate of 0.1, rescaled so that chance
                 is 1/2 (McClish)
    official score = harmonic mean of these three over all machines: 21 values for 7 machines

AUC is the probability that an anomaly has a higher score than a normal clip: 1/2 is chance. The
anomalies of both domains count, as in the official code; several public implementations take only
those of the same domain. Source: nttcslab/dcase2023_task2_evaluator, 3aa8a9f.

    python evaluate.py --machine fan
    python evaluate.py --machine dev --run runs/lora-seed0 runs/lora-seed1     # mean ± deviation

Reads no audio. The labels come from the clips' names. If any name of a machine lacks its label, all
of them come from <data>/<machine>/labels.csv and domains.csv.
"""

import argparse
import codecs
import csv
import io
import json
import math
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

import data
from data import InputError

# The three numbers of a machine that the official score averages.
METRICS = {"auc_source": "AUC source", "auc_target": "AUC target", "pauc": "pAUC"}
EPS = sys.float_info.epsilon  # the official code's guard against a mean with a zero in it


def machine_metrics(scores, is_anomaly, is_target) -> dict[str, float]:
    """auc_source, auc_target and pauc of one machine, from 0 to 1. The arguments are (n,), with an
    entry for each clip. An AUC is NaN without normal clips or without anomalies.
    """
    scores = np.asarray(scores)
    is_anomaly, is_target = np.asarray(is_anomaly, bool), np.asarray(is_target, bool)
    for_source = ~is_target | is_anomaly  # the normal clips of source, and all anomalies
    for_target = is_target | is_anomaly
    return {
        "auc_source": auc(is_anomaly[for_source], scores[for_source]),
        "auc_target": auc(is_anomaly[for_target], scores[for_target]),
        "pauc": auc(is_anomaly, scores, max_fpr=0.1),
    }


def auc(is_anomaly: np.ndarray, scores: np.ndarray, max_fpr: float | None = None) -> float:
    """ROC AUC; NaN without a normal clip or without an anomaly."""
    if is_anomaly.all() or not is_anomaly.any():
        return math.nan
    return float(roc_auc_score(is_anomaly, scores, max_fpr=max_fpr))


def official_score(machines: list[dict[str, float]]) -> float:
    """Harmonic mean of the three numbers over all machines; undefined ones are left out."""
    values = []
    for metrics in machines:
        values += [metrics[name] for name in METRICS if not math.isnan(metrics[name])]
    return float(hmean(np.maximum(values, EPS))) if values else math.nan


# ---------------------------------------------- plumbing: not needed to follow the method


class Trial(NamedTuple):
    """One run, evaluated. Trials of the same `setting` differ only in their seed."""

    run: Path
    seed: int | str  # "" if unknown
    setting: str  # everything that changes a score but the seed: clips, model, back-end
    title: str  # the same in a few words
    rows: list[dict]  # for each machine its name, its set (dev, eval or own) and its metrics


def files_of(machine: str, run: Path) -> tuple[Path, Path, Path]:
    """Scores and decisions, under the challenge's names, and the record of how they were made."""
    scores = run / f"anomaly_score_{machine}_section_00_test.csv"
    decisions = run / f"decision_result_{machine}_section_00_test.csv"
    return scores, decisions, run / f"scoring_{machine}.json"


# Labels and scores. Names are compared in Unicode's form NFC, since macOS decomposes letters.


def read_two_columns(path: Path, to_value: Callable, right: str) -> dict:
    """{name: value} from lines such as a.wav,0.5, as the challenge or a spreadsheet writes them.

    The separator is a comma, semicolon or tab. A header and blank lines are skipped, and any other
    line is refused: it should be `right`.
    """
    content = path.read_bytes()
    text = content.decode("utf-8-sig", "surrogateescape")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", "replace")
    squeezed, values = text.lower().replace('"', "").replace(" ", ""), {}
    separator = max(",;\t", key=lambda character: squeezed.count(f".wav{character}"))
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
            raise InputError(f"{line}: {separator.join(row)!r} should be {right}") from error
        name = unicodedata.normalize("NFC", name)
        if name in values:
            raise InputError(f"{line}: {name} appears twice")
        values[name] = value
    return values


def to_label(text: str) -> bool:
    return {0: False, 1: True}[float(text)]


def to_score(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def read_labels(path: Path, names: list[str], complete: bool) -> dict[str, bool]:
    """0 or 1 for each of the names, as bool. Unless they must be complete, some may be missing."""
    labels = read_two_columns(path, to_label, "name.wav and 0 or 1")
    found = {name: labels.get(unicodedata.normalize("NFC", name)) for name in names}
    missing = [name for name in names if found[name] is None]
    if missing and any("\udc80" <= letter <= "\udcff" for letter in "".join(labels)):
        raise InputError(f"{path} is not in UTF-8, and lacks {missing[0]}: save it as CSV UTF-8")
    if missing and (complete or len(missing) == len(names)):
        raise InputError(f"{path} has no line for {missing[0]} (missing clips: {len(missing)})")
    return {name: label for name, label in found.items() if label is not None}


def labels_of(
    machine: str, names: list[str], root: str | Path
) -> tuple[dict[str, bool], dict[str, bool]]:
    """is_anomaly and is_target of the test clips called `names`.

    They come from the names, or all from root/machine/labels.csv and domains.csv if any name lacks
    its label. A clip without a domain counts as source. For your own machines, unlabelled clips are
    left out. Without labels.csv, both are empty.
    """
    clips = {name: data.parse_clip(Path(machine, "test", name)) for name in names}
    is_anomaly = {name: clip.is_anomaly for name, clip in clips.items()}
    is_target = {name: clip.domain == "target" for name, clip in clips.items()}
    if None not in is_anomaly.values():
        return is_anomaly, is_target
    labels, domains = Path(root, machine, "labels.csv"), Path(root, machine, "domains.csv")
    if not labels.exists():
        return {}, {}
    is_anomaly = read_labels(labels, names, complete=set_of(machine, names) != "own")
    if domains.exists():
        is_target = read_labels(domains, list(is_anomaly), complete=True)
    return is_anomaly, is_target


def set_of(machine: str, names: list[str]) -> str:
    """dev or eval for the challenge's clips, own for all others."""
    if all(name.startswith("section_00_") for name in names):
        if machine in data.DEV:
            return "dev"
        if machine in data.EVAL:
            return "eval"
    return "own"


# Runs


def words(scored_with: dict) -> str:
    """How the scores were made, a few fields of it."""
    if not scored_with:
        return "not known"
    fields = scored_with | scored_with["setting"]
    names = ["model", "tuning", "epochs", "precision", "pooling", "normalize", "k"]
    text = ", ".join(f"{name} {fields[name]}" for name in names if name in fields)
    return text.replace("normalize test", "normalize test (TRANSDUCTIVE)")


def read_record(machine: str, run: Path) -> dict:
    """How the scores of a machine were made; {} if there is no record.

    Raises InputError if it is about other scores, or another adapter, than those in the folder.
    """
    scores, _, file = files_of(machine, run)
    adapter = run / "adapter.pt"
    if not scores.exists():
        raise InputError(f"{run} has no scores of {machine}: run score.py, or set --run")
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is damaged: score again") from error
    if record.get("scores_sha256") != data.file_digest(scores):
        raise InputError(f"{file} does not belong to {scores}: score again")
    if "adapter_sha256" in record and adapter.exists():
        if data.file_digest(adapter) != record["adapter_sha256"]:
            raise InputError(f"{run} was trained after {machine} was scored: score again")
    return record


def evaluate_machine(machine: str, run: Path, root: str | Path) -> dict:
    """A machine's metrics, and what they are of. root: the folder of its labels.csv."""
    right = "name.wav and a number (with a point, no comma)"
    scores = read_two_columns(files_of(machine, run)[0], to_score, right)
    names = list(scores)
    is_anomaly, is_target = labels_of(machine, names, root)
    if not is_anomaly:
        example = f"{names[0]},1 for an anomaly or {names[0]},0 for a normal clip"
        raise InputError(
            f"{Path(root, machine)}/labels.csv is missing; its lines look like {example}"
        )
    labelled = list(is_anomaly)
    if len(labelled) < len(names):
        unlabelled = [name for name in names if name not in is_anomaly]
        print(f"{machine}: left out, for want of a label: {data.shortened(unlabelled)}")
    if len(set(is_anomaly.values())) == 1:
        print(f"{machine}: no AUC, since all labels are {int(is_anomaly[labelled[0]])}")
    columns = [[of_clip[name] for name in labelled] for of_clip in (scores, is_anomaly, is_target)]
    metrics = machine_metrics(*columns)
    about = {"run": str(run), "machine": machine, "set": set_of(machine, names)}
    return about | metrics | {"harmonic_mean": official_score([metrics])}


def evaluate_run(run: Path, machines: list[str], root: str | None) -> Trial:
    """All machines of one run. root: the data folder, if not the one that was scored."""
    rows, settings, seed = [], [], ""
    for machine in machines:
        record = read_record(machine, run)
        row = evaluate_machine(machine, run, root or record.get("data", "data"))
        scored_with = record.get("scored_with", {})
        setting = dict(scored_with.get("setting", {}))
        seed = setting.pop("seed", "")
        # A run without a record is never averaged with another.
        settings.append(scored_with | {"setting": setting} if scored_with else str(run))
        rows.append(row | {"seed": seed, "scored_with": words(scored_with)})
    for row in rows:
        of_set = [other for other in rows if other["set"] == row["set"]]
        row["official_score"] = "" if row["set"] == "own" else official_score(of_set)
    title = " / ".join(dict.fromkeys(row["scored_with"] for row in rows))
    return Trial(run, seed, json.dumps([machines, settings], sort_keys=True), title, rows)


def group_by_setting(trials: list[Trial]) -> list[list[Trial]]:
    """Raises InputError if a seed appears twice in a group."""
    groups = {}
    for trial in trials:
        group = groups.setdefault(trial.setting, [])
        for other in group:
            if other.seed == trial.seed:
                raise InputError(f"{trial.run} has the same setting and seed as {other.run}")
        group.append(trial)
    return list(groups.values())


# Tables


def percent(values: list[float]) -> str:
    """'61.23', over trials '61.23 ± 0.45' (sample standard deviation), 'n/a' if undefined."""
    if any(math.isnan(value) for value in values):
        return "n/a"
    text = f"{100 * np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {100 * np.std(values, ddof=1):.2f}"
    return text


def total(which: str, group: list[Trial]) -> str:
    """The official score of dev or eval, or the same mean over one's own machines. It is partial,
    unless all seven machines have all three numbers in every trial.
    """
    values, complete = [], 7
    for trial in group:
        rows = [row for row in trial.rows if row["set"] == which]
        values.append(official_score(rows))
        whole = [row for row in rows if not any(math.isnan(row[key]) for key in METRICS)]
        complete = min(complete, len(whole))
    text = f"**{percent(values)}** (n = {len(group)})"
    if which != "own" and complete < 7:
        text += f", partial ({complete}/7)"
    return text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_machines(group: list[Trial]) -> str:
    """A line for each machine, as mean ± deviation over the trials, and the official scores."""
    columns = METRICS | {"harmonic_mean": "harmonic mean"}
    for key in METRICS:
        if all(math.isnan(row[key]) for trial in group for row in trial.rows):
            del columns[key]  # such as AUC target of your own machine
    lines = []
    for i, row in enumerate(group[0].rows):
        cells = [percent([trial.rows[i][key] for trial in group]) for key in columns]
        lines.append([row["machine"], *cells])
    text = f"### {group[0].title}\n\n{markdown(['%', *columns.values()], lines)}\n"
    for which in ("dev", "eval"):
        if any(row["set"] == which for row in group[0].rows):
            text += f"\n{which}, official score: {total(which, group)}"
    return text


def table_of_settings(groups: list[list[Trial]]) -> str:
    """A line for each setting, named by its first run."""
    sets = list(dict.fromkeys(row["set"] for row in groups[0][0].rows))
    lines = []
    for group in groups:
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        scores = [total(which, group) for which in sets]
        lines.append([f"{group[0].run}{more}", *scores, group[0].title])
    names = {"dev": "dev, official score", "eval": "eval, official score", "own": "harmonic mean"}
    return markdown(["setting", *[names[which] for which in sets], "scored with"], lines)


def main(argv: list[str] | None = None) -> None:
    about = "Print the official metric of scored machines, and write it into the run's metrics.csv."
    parser = argparse.ArgumentParser(description=about)
    data.add_machine(parser)
    add = parser.add_argument
    text = "run folders (runs/<machines>)"
    add("--run", nargs="+", action="extend", type=Path, metavar="DIR", help=text)
    add("--data", metavar="DIR", help="has <machine>/labels.csv (where the scored clips were)")
    args = parser.parse_args(argv)
    machines = data.machine_names(args.machine)
    with data.one_line_errors():
        runs = args.run or [data.default_run(args.machine)]
        trials = [evaluate_run(run, machines, args.data) for run in runs]
        groups = group_by_setting(trials)
        for trial in trials:
            lines = [trial.rows[0].keys(), *[row.values() for row in trial.rows]]
            data.write_csv(trial.run / "metrics.csv", lines)
        print(table_of_machines(groups[0]) if len(groups) == 1 else table_of_settings(groups))


if __name__ == "__main__":
    main()
