"""The command lines: help, every command of the README, the demo, the picture, and wrong uses."""

import glob
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import demo
import pytest
from conftest import FLAGS, ROOT, error_of, noise, rows_of, script, small_machines

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
    """Each default, and who chose it, as -h says."""
    found, machine = {}, ["--machine", "fan"]
    section = README.split("who chose it</summary>")[1].split("**Cost.**")[0]
    for source, text in re.findall(r"- \*\*([\w' ]+)\*\*(.*?)(?=\n-|\n\n)", section, re.DOTALL):
        for flag, value in re.findall(r"`(--[\w-]+) ?([^`]*)`", text):
            module = score if flag in ("--k", "--normalize", "--percentile") else train
            parser = module.make_parser()
            same = [flag, *value.split()] if value else []
            assert parser.parse_args(machine + same) == parser.parse_args(machine), flag
            help_ = re.sub(r"\s+", " ", parser.format_help())
            assert re.search(rf" {flag} (?:(?!--).)*?\[([\w' ]+)\]", help_)[1] == source, flag
            found[flag] = source
    assert len(found) == 22


# The README's shell blocks are run by a real bash, in which `python` only prints its arguments. The
# scripts' main() then runs on them in this process.
SHELL = """
python() { printf '%q ' "$@"; echo; }
git() { :; }; cd() { :; }; pip() { :; }; source() { :; }; python3() { :; }; command() { :; }
sbatch() { for SLURM_ARRAY_TASK_ID in $(seq $(wc -l < runs.txt)); do eval "${@: -1}"; done; }
set -e
"""


def test_every_command_of_the_readme_runs(small, monkeypatch, capsys):
    """In order and to the letter, with one epoch and one seed, on short made-up clips and a random
    AST. dev and eval stand for two machines and one. What has a test of its own is passed over: the
    demo, the benchmark, the tests themselves.
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
    shorter = {"in 0 1 2 3;": "in 0;", "{0,1,2,3}": "0", "8 9 10 11": "1", "0 1 2 3\n": "0\n"}
    for long, short in shorter.items():
        blocks = blocks.replace(long, short)

    shell = ["bash", "-c", SHELL + blocks]
    printed = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    commands = printed.splitlines()
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
    rows = out.strip().splitlines()[-3:]
    for row, name in zip(rows, ("as it is", "frozen", "LoRA")):
        assert re.match(rf"\| {name} \| \d+\.\d \|", row)
    assert "Made-up sounds and a tiny AST: no numbers of the paper's method" in out
    drawn = [path.parent.name for path in Path("runs").rglob("*.png")]
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert drawn == ["a mill-LoRA-seed0"] * has_matplotlib


def test_the_demo_compares_four_rows_and_says_what_lora_is_worth(small_demo, monkeypatch, capsys):
    """Over two seeds LoRA has 66 and 67 on the two machines, as it is 50 and 56: 16 and 11 more."""
    numbers = {"as it is": [50, 56], "frozen": [61, 64], "full": [71, 64], "LoRA": [66, 67]}

    def made_up(root, machine, row, seed, how):
        spread = (2 * seed - 1) * (row != "as it is")
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


@pytest.mark.parametrize("n_test", [2, 8])
@pytest.mark.parametrize("labelled", [0, 1, 99])
def test_the_picture_shows_scores_and_the_three_highest_beside_their_nearest(
    small, monkeypatch, n_test, labelled
):
    """Without a screen; names with a $; without labels, with labels for one clip, with all."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure

    monkeypatch.delenv("DISPLAY", raising=False)
    figures, savefig = [], Figure.savefig
    kept = lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", kept)
    small_machines()
    own_machine(n_test)
    if labelled:
        labels = [(f"{i}$.wav", i % 2) for i in range(min(labelled, n_test))]
        data.write_csv(Path("data/pump/labels.csv"), labels)
    score.main(["--machine", "pump", *FLAGS, "--pretrained", "--plot"])
    assert Path("runs/pretrained-pump/pump.png").read_bytes()[:4] == b"\x89PNG"
    top, *panels = figures[-1].axes
    report = rows_of("runs/pretrained-pump/report_pump.csv")[1:]
    points = top.collections[0]
    assert points.get_offsets()[:, 1].tolist() == [float(row[1]) for row in report]
    assert len(set(map(tuple, points.get_facecolors().tolist()))) == 1 + (labelled > 1)
    assert len(top.lines[0].get_ydata()) == 3, "the training clips' own scores"
    assert top.lines[1].get_ydata()[0] == float(report[0][2])
    titles = [name for row in report[:3] for name in (row[0], row[4])]
    assert [panel.get_title().split("\n")[1] for panel in panels] == titles


def web_page_for_a_clip() -> None:
    own_machine()
    Path("data/pump/train/b.wav").write_text("<!doctype html>")


def web_page_for_weights() -> None:
    Path("weights").mkdir()
    Path("weights/ast.safetensors").write_text("<html>")


def a_file_for_a_folder() -> None:
    Path("runs").touch()


FAN, PUMP = ["--machine", "fan", *FLAGS], ["--machine", "pump", *FLAGS]
WRONG = [
    # script, arguments, what is there first, the message
    ("train.py", [], None, "the following arguments are required: --machine"),
    ("train.py", [*FAN, "--layers", "99"], None, "layer 99 does not exist: there are layers 0-1"),
    ("train.py", [*FAN, "--device", "cdua"], None, "Expected one of cpu, cuda, "),
    ("train.py", [*FAN, "--bach-size", "4"], None, "unrecognized arguments: --bach-size 4"),
    ("train.py", [*FAN, "--tuning", "loar"], None, "argument --tuning: invalid choice: 'loar'"),
    ("train.py", [*FAN, "--run", "runs/x"], a_file_for_a_folder, "Not a directory: 'runs/x'"),
    ("train.py", PUMP, None, "no WAV file in data/pump/train"),
    ("train.py", PUMP, own_machine, "train jointly with other machines"),
    ("train.py", ["--machine", "fan", *PUMP[1:]], web_page_for_a_clip, "b.wav is no WAV file"),
    ("train.py", ["--machine", "fan"], web_page_for_weights, "has another sha256: delete it"),
    ("train.py", ["--machine", "fan"], None, "put the file at weights/ast.safetensors"),
    ("train.py", ["--machine", "bearing"], None, "at data/bearing.part/dev_bearing.zip"),
    ("score.py", FAN, None, "runs/fan is no finished run of train.py"),
    ("score.py", [*PUMP, "--pretrained"], web_page_for_a_clip, "b.wav is no WAV file"),
    ("train.py", [*FAN, "--epochs", "0"], None, "argument --epochs: invalid positive value: '0'"),
    ("evaluate.py", FAN[:2], None, "runs/fan has no scores of fan: run score.py, or set --run"),
    ("data.py", ["--machine", "fna"], None, "no WAV file in data/fna/train"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argv", "prepare", "message"), WRONG)
def test_a_wrong_use_ends_in_one_line_and_leaves_nothing_half_written(
    fan, monkeypatch, capsys, name, argv, prepare, message
):
    monkeypatch.setattr(data, "ZENODO", "http://127.0.0.1:9")
    monkeypatch.setattr(backbone, "WEIGHTS_URL", "http://127.0.0.1:9/model.safetensors")
    if prepare:
        prepare()
    before = {path for path in Path().rglob("*") if path.is_file()}
    found = error_of(SCRIPTS[name].main, argv, capsys)
    assert message in found
    left = {path.name for path in Path().rglob("*") if path.is_file()} - {p.name for p in before}
    assert left <= {"embeddings_pump.pt", "embeddings_fan.pt"}


def test_an_error_has_no_traceback_in_a_real_process(tmp_path):
    result = script("score.py", "--machine", "fan", "--run", "nothing", cwd=tmp_path)
    message = "nothing is no finished run of train.py (or is --pretrained missing?)"
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"score.py: error: {message}\n"
