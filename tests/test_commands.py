"""The command lines: help, every command of the README, the demo, the picture, and wrong uses."""

import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import pytest
from conftest import CHILD, FLAGS, ROOT, error_of, noise, rows_of, script, small_machines

import backbone
import data
import evaluate
import score
import train

SCRIPTS = {f"{script.__name__}.py": script for script in (data, backbone, train, score, evaluate)}
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_tells_every_flag_and_no_none(name, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "None" not in out
    for flag, text in re.findall(r"^  (--[\w-]+)(.*(?:\n {6,}.*)*)", out, re.MULTILINE):
        assert re.search(r"[a-z]{3}", text.replace(flag, "")), f"{flag} has no help"


def test_the_readmes_settings_are_those_of_the_parsers():
    """A row each: setting, default, where the default comes from. No setting is missing."""
    machine, found = ["--machine", "fan", "--device", "cpu"], {}
    section = README.split("<summary>Settings")[1].split("</details>")[0]
    for flag, value, source in re.findall(r"^\| `(--[\w-]+)` \| (.*?) \| (.*?) \|$", section, re.M):
        module = score if flag in ("--k", "--normalize", "--percentile") else train
        default = [flag, *value.strip("`").split()]
        if value not in ("the rank", "all"):
            assert module.parse_args(machine + default) == module.parse_args(machine), flag
        assert re.match(r"(paper|same lab|field|our choice)\b", source), flag
        found[flag] = source
    settings = set(vars(train.parse_args(machine))) - set(train.WHERE) - {"machine"}
    settings |= {"k", "normalize", "percentile"}
    assert {flag[2:].replace("-", "_") for flag in found} == settings
    assert train.parse_args(machine).alpha == train.parse_args(machine).rank


# The README's shell blocks are run by a real bash, in which `python` only prints its arguments. The
# scripts' main() then runs on them in this process.
SHELL = """
python() { printf '%q ' "$@"; echo; }
bash() { source "$ROOT/$1"; }
git() { :; }; cd() { :; }; pip() { :; }; python3() { :; }; command() { [ "$SLURM" ]; }
sbatch() { for SLURM_ARRAY_TASK_ID in $(seq $(wc -l < runs.txt)); do eval "${@: -1}"; done; }
set -e
"""


@pytest.mark.parametrize("slurm", ["", "yes"])
def test_every_command_of_the_readme_runs(small, monkeypatch, slurm):
    """In order and to the letter, with one epoch and one seed, on short made-up clips and a random
    AST; once with Slurm, once without. dev and eval stand for two machines and one. What has a test
    of its own is passed over: the demo, the benchmark, the tests themselves.
    """
    small_machines("fan", "valve", "bandsaw", "pump", "ToyCar", n_train=6)
    for split in ("train", "test"):
        for i, clip in enumerate(data.list_clips("data", "pump", split)):
            clip.path.rename(clip.path.with_name(f"recording {i}.wav"))
    data.write_csv(Path("data/pump/labels.csv"), [(f"recording {i}.wav", i % 2) for i in range(4)])
    Path("weights").mkdir()
    shutil.copy("ast.safetensors", "weights/ast.safetensors")
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", data.file_digest("ast.safetensors"))
    monkeypatch.setattr(data, "DEV", ["fan", "valve"])
    monkeypatch.setattr(data, "EVAL", ["bandsaw"])
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    all_runs = (ROOT / "tests" / "all_runs.sh").read_text().split("set -euo pipefail\n")[1]
    for long, short in {"8 9 10 11": "1", "0 1 2 3\n": "0\n", "bash -e": "source"}.items():
        all_runs = all_runs.replace(long, short)
    Path("tests").mkdir()
    Path("tests/all_runs.sh").write_text(all_runs)

    environment = os.environ | {"SLURM": slurm, "SEEDS": "0", "ROOT": str(small)}
    blocks = blocks.replace("source .venv", "# source .venv")
    shell = ["bash", "-c", SHELL + blocks]
    found = subprocess.run(shell, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    commands = found.stdout.splitlines()
    if slurm:  # the same commands, but for their order
        assert sum("--seed 0" in command for command in commands) == 12
        return
    for command in commands:
        name, *words = shlex.split(command)
        argv = [path for word in words for path in sorted(glob.glob(word)) or [word]]
        argv += ["--epochs", "1", "--device", "cpu"] if name == "train.py" else []
        if importlib.util.find_spec("matplotlib") is None:  # optional
            argv = [flag for flag in argv if flag != "--plot"]
        if name in SCRIPTS:
            SCRIPTS[name].main(argv)
        else:
            assert name == "-m" or (ROOT / name).exists(), name
    assert len(commands) > 30
    shutil.copy("ast.safetensors", "tests/tiny_ast.safetensors")
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})


def test_all_runs_stops_where_a_training_fails(tmp_path):
    """A `python` that fails in train.py: nothing is scored, trained next or evaluated."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "all_runs.sh", tmp_path / "tests")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$1" >> calls; [ "$1" != train.py ]\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    found = subprocess.run(["bash", "tests/all_runs.sh"], cwd=tmp_path, env=environment)
    assert found.returncode != 0
    assert (tmp_path / "calls").read_text().split() == ["data.py", "backbone.py", "train.py"]


@pytest.fixture
def small_demo(small, monkeypatch):
    """The demo's commands with fewer and shorter clips, one epoch and a random AST."""
    small_machines()
    make = demo.make_machine
    monkeypatch.setattr(demo, "WEIGHTS", Path("ast.safetensors"))
    monkeypatch.setattr(demo, "TRAINING", "--epochs 1 --batch-size 8")
    monkeypatch.setattr(demo, "make_machine", lambda root, name: make(root, name, 8, 4, 1.0))


def test_the_demo_ends_with_its_table_and_says_what_it_is(small_demo, capsys):
    demo.main(["--machine", "a mill"])
    out = capsys.readouterr().out
    for name in ("score.py", "train.py", "evaluate.py"):
        assert f"$ python {name} --machine 'a mill'" in out
    *_, first, second, third, fourth, _, last = out.strip().splitlines()
    rows = zip((first, second, third, fourth), ("no network", "as it is", "frozen", "LoRA"))
    for row, name in rows:
        assert re.match(rf"\| {name} \| \d+\.\d \|", row)
    assert "Made-up sounds, and a tiny AST taught on made-up ones: no numbers of the paper's" in out
    page = "runs/demo/a mill-LoRA-seed0/report_a mill.html"
    assert last == f"to look and listen, open {page} in a browser" and Path(page).exists()
    drawn = [path.parent.name for path in Path("runs").rglob("*.png")]
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert drawn == ["a mill-LoRA-seed0"] * has_matplotlib


def test_the_demo_compares_four_rows_and_says_what_lora_is_worth(small_demo, monkeypatch, capsys):
    """Over two seeds LoRA has 66 and 67 on the two machines, as it is 50 and 56: 16 and 11 more."""
    numbers = {
        "no network": [40, 40],
        "as it is": [50, 56],
        "frozen": [61, 64],
        "full": [71, 64],
        "LoRA": [66, 67],
    }

    def made_up(root, machine, row, seed, how):
        spread = (2 * seed - 1) * (row not in demo.UNTRAINED)
        return [numbers[row][machine == "fan"] + spread + 10 * (how == "density")] * 4

    monkeypatch.setattr(demo, "SEEDS", [0, 1])
    monkeypatch.setattr(demo, "numbers_of", made_up)
    demo.main(["--all", "--machine", "mill", "fan"])
    lines = capsys.readouterr().out.splitlines()
    for how in ("none", "density"):
        assert f"LoRA minus as it is, {how}: 13.5 ± 2.5 (standard error)" in lines
        assert f"LoRA minus frozen, {how}: 4.0 ± 1.0 (standard error)" in lines
        assert f"LoRA minus full, {how}: -1.0 ± 4.0 (standard error)" in lines
    assert "| as it is, none | 53.0 ± 4.2 | 53.0 ± 4.2 | 53.0 ± 4.2 | 53.0 ± 4.2 |" in lines
    assert lines[-1].startswith("| LoRA, density | 76.5 ± 1.3 |")


def own_machine(n_test: int = 3) -> None:
    for split, count, seed in (("train", 3, 0), ("test", n_test, 10)):
        for i in range(count):
            noise(f"data/pump/{split}/{i}$.wav", 17 / 16, seed + i)


@pytest.mark.parametrize("labelled", [0, 1, 8])
def test_the_picture_shows_scores_and_the_three_highest_beside_their_nearest(
    small, monkeypatch, labelled
):
    """A machine called p$_{$x, with a notebook's backend; no labels, one label, all. The mel bin of
    1 kHz, 999.99 mel, is at 128 · (999.99 - 31.75) / (2840.02 - 31.75).
    """
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure

    monkeypatch.setenv("MPLBACKEND", "module://no_such_notebook.backend_inline")
    figures, savefig = [], Figure.savefig
    kept = lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", kept)
    small_machines()
    own_machine(n_test=8)
    Path("data/pump").rename("data/p$_{$x")
    if labelled:
        labels = [(f"{i}$.wav", i % 2) for i in range(labelled)]
        data.write_csv(Path("data/p$_{$x/labels.csv"), labels)
    argv = ["--machine", "p$_{$x", *FLAGS, "--pretrained"]
    score.main([*argv, "--plot"])
    run = Path("runs/pretrained-p$_{$x")
    assert (run / "p$_{$x.png").read_bytes()[:4] == b"\x89PNG"
    assert 'src="p%24_%7B%24x.png"' in (run / "report_p$_{$x.html").read_text()
    top, *panels = figures[-1].axes
    report = rows_of(run / "report_p$_{$x.csv")[1:]
    *rows, threshold = top.lines
    assert threshold.get_xdata()[0] == float(report[0][2])
    names = [label.get_text().removesuffix("\nclips") for label in top.get_yticklabels()]
    assert names == [
        "training",
        *{0: ["test"], 1: ["normal", "test"], 8: ["normal", "anomalous"]}[labelled],
    ]
    scores = {name: sorted(map(float, row.get_xdata())) for name, row in zip(names, rows)}
    assert len(scores["training"]) == 3
    anomalous = [float(row[1]) for row in report if int(row[0][0]) % 2]
    assert scores.get("anomalous", sorted(anomalous)) == sorted(anomalous)
    assert sum(map(len, scores.values())) == 3 + 8
    for row, left, right in zip(report, panels[::2], panels[1::2]):
        assert right.get_title() == "its nearest training clip"
        for panel, start in ((left, float(row[6])), (right, float(row[7]))):
            image = panel.images[0]
            assert image.get_extent()[:2] == [start, start + 15000 / 16000]
            assert image.get_clim() == left.images[0].get_clim()
            assert abs(np.median(image.get_array().data)) < 1e-6
            assert panel.get_yticks()[1] == pytest.approx(44.13, abs=0.01)
    score.main(argv)
    assert "<img" not in (run / "report_p$_{$x.html").read_text(), (
        "what was not asked for this time"
    )


def web_page_for_a_clip() -> None:
    own_machine()
    Path("data/pump/train/b.wav").write_text("<!doctype html>")


def web_page_for_weights() -> None:
    Path("weights").mkdir()
    Path("weights/ast.safetensors").write_text("<html>")


def a_file_for_a_folder() -> None:
    own_machine()
    Path("runs").touch()


def no_matplotlib() -> None:
    importlib.util.find_spec = lambda name: None


FAN, PUMP = ["--machine", "fan", *FLAGS], ["--machine", "pump", *FLAGS]
PRETRAINED = [*PUMP, "--pretrained"]
WRONG = [
    # script, arguments, what is there first, the message
    ("train.py", [], None, "the following arguments are required: --machine"),
    ("train.py", [*FAN, "--layers", "99"], None, "layer 99 does not exist: there are layers 0-1"),
    ("train.py", [*FAN, "--layers", "1", "1"], None, "a LoRA target or layer is named twice"),
    ("train.py", [*FAN, "--device", "cdua"], None, "cdua cannot be used: Expected one of cpu"),
    ("score.py", [*FAN, "--device", "cuda:99"], None, "argument --device: cuda:99 cannot be used"),
    ("train.py", [*FAN, "--bach-size", "4"], None, "unrecognized arguments: --bach-size 4"),
    ("train.py", [*FAN, "--tuning", "loar"], None, "argument --tuning: invalid choice: 'loar'"),
    ("train.py", [*FAN, "--lr", "-1"], None, "argument --lr: invalid number >= 1e-12 value: '-1'"),
    ("train.py", [*FAN, "--scale", "-30"], None, "argument --scale: invalid number >= 1e-12 value"),
    ("train.py", [*FAN, "--warmup", "-3"], None, "argument --warmup: invalid number >= 0 value"),
    ("train.py", [*FAN, "--workers", "-1"], None, "argument --workers: invalid number >= 0 value"),
    ("train.py", [*FAN, "--alpha", "inf"], None, "argument --alpha: invalid number >= 1e-12 value"),
    ("train.py", [*FAN, "--margin", "2"], None, "ArcFace margin must be in [0, π/2) radians"),
    ("train.py", ["--machine", "a/b"], None, "write --data data/hall1 --machine pump2"),
    ("score.py", ["--machine", "./", "--pretrained"], None, "'./' is not a folder name"),
    ("score.py", ["--machine", "", "--pretrained"], None, "'' is not a folder name"),
    ("train.py", [*FAN, "--run", "runs/x"], a_file_for_a_folder, "Not a directory: 'runs/x'"),
    ("score.py", [*PRETRAINED, "--run", "runs"], a_file_for_a_folder, "File exists: 'runs'"),
    ("train.py", PUMP, None, "no WAV files in data/pump/train: data has fan/"),
    ("train.py", PUMP, own_machine, "nothing to learn, since all clips are one class: name"),
    ("train.py", ["--machine", "fan", *PUMP[1:]], web_page_for_a_clip, "b.wav is empty, or not a"),
    ("train.py", ["--machine", "fan"], web_page_for_weights, "fails its sha256 check: delete it"),
    ("train.py", ["--machine", "fan"], None, "put the file at weights/ast.safetensors"),
    ("train.py", ["--machine", "bearing"], None, "at data/bearing.part/dev_bearing.zip"),
    ("score.py", FAN, None, "runs/fan has no trained model: train first, or use --pretrained"),
    ("score.py", PRETRAINED, web_page_for_a_clip, "b.wav is empty, or not a WAV"),
    ("score.py", [*PRETRAINED, "--percentile", "0.9"], None, "--percentile must be from 1 to 100"),
    ("score.py", [*PRETRAINED, "--percentile", "nan"], None, "--percentile must be from 1 to 100"),
    ("score.py", [*FAN, "--pooling", "mean"], None, "--pooling goes with --pretrained"),
    ("score.py", [*PRETRAINED, "--plot"], no_matplotlib, "--plot needs matplotlib: pip install"),
    ("train.py", [*FAN, "--epochs", "0"], None, "argument --epochs: invalid number >= 1 value"),
    ("evaluate.py", FAN[:2], None, "runs/fan has no scores of fan: run score.py, or set --run"),
    ("data.py", ["--machine", "fna"], None, "no WAV files in data/fna/train"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argv", "prepare", "message"), WRONG)
def test_a_wrong_use_ends_in_one_line_and_leaves_nothing_half_written(
    fan, monkeypatch, capsys, name, argv, prepare, message
):
    monkeypatch.setattr(data, "ZENODO", "http://127.0.0.1:9")
    monkeypatch.setattr(backbone, "WEIGHTS_URL", "http://127.0.0.1:9/model.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", importlib.util.find_spec)  # put back later
    if prepare:
        prepare()
    before = {path for path in Path().rglob("*") if path.is_file()}
    found = error_of(SCRIPTS[name].main, argv, capsys)
    assert message in found
    left = {path.name for path in Path().rglob("*") if path.is_file()} - {p.name for p in before}
    assert left <= {".lock"}


def test_a_misspelt_machine_is_noticed_before_anything_is_fetched_or_written(small, server, capsys):
    small_machines("fan")
    for main in (train.main, lambda argv: score.main([*argv, "--pretrained"])):
        message = error_of(main, ["--machine", "bearing", "fna", "--device", "cpu"], capsys)
        assert message.endswith("no WAV files in data/fna/train: data has fan/")
    assert server.requests == [] and not Path("runs").exists() and not Path("weights").exists()


def test_a_process_that_starves_ends_in_an_error_that_names_the_cure(
    full_size_fan, monkeypatch, capsys
):
    """A clip is a named pipe into which nobody writes."""
    monkeypatch.setattr(backbone, "WORKER_TIMEOUT", 2)
    os.mkfifo("data/fan/train/pipe.wav")
    message = error_of(train.main, ["--machine", "fan", *FLAGS, "--workers", "1"], capsys)
    assert message.endswith("died or got stuck (memory?): try --workers 0")
    model = backbone.Embedder(backbone.load_ast("ast.safetensors"), "cls", None)
    clips = data.list_clips("data", "fan", "train")
    with pytest.raises(RuntimeError, match="DataLoader timed out"):
        list(score.embed(model, clips, 8, workers=1))


def test_a_readers_own_mistake_keeps_its_traceback(fan, monkeypatch):
    """Here numpy's ValueError; one line would not say where."""
    monkeypatch.setattr(score, "distances", lambda x, y: x @ y)
    with pytest.raises(ValueError, match="matmul"):
        score.main(["--machine", "fan", *FLAGS, "--pretrained"])


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_that_a_terminal_cannot_show_are_escaped_and_every_machine_is_scored(small, encoding):
    small_machines()
    for machine in ("pump", "motor"):
        for i in range(3):
            noise(f"data/{machine}/train/日本{i}.wav", 1, seed=i)
        for name in (b"latin-1 \xf6.wav", b"latin-1 \xe4.flac"):
            path = noise(f"data/{machine}/test/new.wav", 1, seed=9)
            os.rename(path, os.path.join(os.fsencode(path.parent), name))
    code = CHILD.replace("train", "score")
    argv = ["--machine", "pump", "motor", *FLAGS, "--pretrained"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", code, str(ROOT), *argv]
    found = subprocess.run(command, capture_output=True, env=environment)
    assert found.returncode == 0, found.stderr
    for shown in (rb"not read: latin-1 \udce4.flac", rb"latin-1 \udcf6.wav |"):
        assert found.stdout.count(shown) == 2
    assert (b"\\u65e5" in found.stdout) == (encoding == "ascii:strict")
    for machine in ("pump", "motor"):
        assert Path(f"runs/pretrained-pump+motor/report_{machine}.html").exists()


def test_an_error_has_no_traceback_in_a_real_process(tmp_path):
    result = script("score.py", "--machine", "fan", "--run", "nothing", cwd=tmp_path)
    message = "nothing has no trained model: train first, or use --pretrained"
    assert (result.returncode, result.stderr) == (1, f"score.py: error: {message}\n")
    assert list(tmp_path.iterdir()) == []
