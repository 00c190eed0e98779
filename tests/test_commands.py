"""The command lines: the demo as a user runs it, every command of the README, and what wrong uses are told."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script, small_demo
from scipy.io import wavfile

import backbone
import data
import evaluate
import score
import train

SCRIPTS = {"data.py": data, "backbone.py": backbone, "train.py": train, "score.py": score, "evaluate.py": evaluate}
README = (ROOT / "README.md").read_text()


def test_the_demo_goes_from_nothing_to_the_table(tmp_path):
    """The three commands in three processes, at the real size of the spectrogram."""
    outputs = {}
    for name in ("train.py", "score.py", "evaluate.py"):
        result = script(name, "--machine", "fan", "--demo", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        outputs[name] = result.stdout
        assert "demo: made-up" in result.stdout
    assert "next: python score.py --machine fan --demo" in outputs["train.py"]
    assert "next: python evaluate.py --machine fan --demo" in outputs["score.py"]
    assert re.search(r"\| AUC source \| \d+\.\d\d \|", outputs["evaluate.py"])
    files = {path.name for path in (tmp_path / "runs" / "demo-fan").iterdir()}
    assert files == {
        "args.json", "log.csv", "last.pt", "adapter.pt", "embeddings_fan.npz", "nearest_fan.csv", "scoring_fan.json",
        "anomaly_score_fan_section_00_test.csv", "decision_result_fan_section_00_test.csv", "metrics.csv",
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_a_line_for_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in re.findall(r"^  (--[\w-]+)(.*(?:\n {6,}.*)*)", out, re.MULTILINE):
        assert re.search(r"[a-z]{3}|\(.*\)", flag[1]), f"{flag[0]} has no help"


def test_every_training_default_tells_where_it_comes_from(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    parameters = "tuning rank alpha dropout targets layers pooling embedding epochs batch-size lr warmup weight-decay"
    for name in [*parameters.split(), "time-mask", "freq-mask", "margin", "scale"]:
        line = text[text.rindex(f" --{name} ") :].split(" --")[1]
        assert re.search(r"\[(paper|same lab|ASDKit|our choice)", line), f"--{name} does not say where it comes from"


# ---------------------------------------------------------------- every command of the README


# The README's shell blocks are run by a real bash, in which `python` is a function: it hands its arguments to this
# process, which runs the script's main() on them, and waits for the exit status. Loops, globs, cp and && are bash's.
SHELL = """
python() { (flock 9; printf '%q ' "$@" >&$REQUEST; echo >&$REQUEST; read -r status <&$REPLY; exit $status) 9>lock; }
pip() { :; }
sbatch() { SLURM_ARRAY_TASK_ID=0; eval "${@: -1}"; }
set -e
"""


def test_every_command_of_the_readme_runs(small, monkeypatch, capsys):
    """In order and to the letter, with one epoch and one seed, on short made-up clips and a random AST.

    dev and eval stand for two machines and one, so that the whole table takes a minute.
    """
    small_demo("fan", "valve", "bandsaw", "pump", n_train=6)
    train.prepare_demo([])
    for machine in ("fan", "valve", "bandsaw"):
        shutil.copytree(f"data/demo/{machine}", f"data/{machine}")
    for split in ("train", "test"):
        for i, clip in enumerate(data.list_clips("data/demo", "pump", split)):
            wav(f"data/pump/{split}/recording {i}.wav", 9000 + i)
            with open("data/pump/labels.csv", "a" if i else "w") as file:  # of the test clips: it is written last
                file.write(f"recording {i}.wav,{clip.is_anomaly:d}\n")
    for kind in ("data", "domain"):
        truth = Path(f"data/ground_truth/ground_truth_{kind}/ground_truth_bandsaw_section_00_test.csv")
        truth.parent.mkdir(parents=True)
        truth.touch()
    Path("weights").mkdir()
    shutil.copy("data/demo/ast.pth", "weights/ast.safetensors")
    monkeypatch.setattr(data, "DEV", ["fan", "valve"])
    monkeypatch.setattr(data, "EVAL", ["bandsaw"])
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    blocks = blocks.replace("in 0 1 2 3;", "in 0;").replace("{0,1,2,3}", "0")
    blocks = re.sub(r"ToyCar ToyTrain.*?shaker", "fan valve bandsaw", blocks, flags=re.DOTALL)

    (request, to_us), (from_us, reply) = os.pipe(), os.pipe()
    variables = os.environ | {"REQUEST": str(to_us), "REPLY": str(from_us)}
    shell = subprocess.Popen(["bash", "-c", SHELL + blocks], env=variables, pass_fds=(to_us, from_us))
    os.close(to_us)
    ran = []
    for line in os.fdopen(request):
        name, *argv = shlex.split(line)
        argv += ["--epochs", "1", "--device", "cpu"] if name == "train.py" else []
        try:
            if name != "tests/bench.py":  # ten minutes, and no part of the method
                SCRIPTS[name].main(argv)
            status = 0
        except SystemExit as stop:
            status = stop.code
        ran.append((line, status, capsys.readouterr().err.splitlines()[-1:] if status else ""))
        os.write(reply, f"{status}\n".encode())
    assert shell.wait() == 0 and not [failed for failed in ran if failed[1]], ran[-1]
    assert len(ran) > 60


def test_the_readme_names_every_flag_of_the_method():
    flags = set(re.findall(r"--[a-z][a-z-]*", README))
    for module in (train, score):
        for flag in re.findall(r'add\("(--[a-z-]+)"', Path(module.__file__).read_text()):
            if flag not in ("--workers", "--help"):
                assert flag in flags, f"{flag} is not in the README"


# ---------------------------------------------------------------- messages


def wav(path: str, n_samples: int = 8000) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, 16000, np.random.default_rng(n_samples).integers(-999, 999, n_samples).astype(np.int16))


def own_machine() -> None:
    for i in range(3):
        wav(f"data/pump/train/{i}.wav", 8000 + i)
        wav(f"data/pump/test/{i}.wav", 9000 + i)


def empty_folder() -> None:
    Path("data/pump/train").mkdir(parents=True)


def nested() -> None:
    wav("data/fan/fan/train/a.wav")


def a_file_for_a_folder() -> None:
    Path("runs").write_text("")


def damaged_clips() -> None:
    own_machine()
    Path("data/pump/train/b.wav").write_text("no sound")


def damaged_record() -> None:
    Path("runs/demo-fan").mkdir(parents=True)
    Path("runs/demo-fan/args.json").write_text("")


def copy_fan() -> None:
    shutil.copytree("data/demo/fan", "data/fan")


def web_page() -> None:
    Path("weights").mkdir()
    Path("weights/ast.safetensors").write_text("<html>")


def scored_pump() -> None:
    own_machine()
    score.main(["--machine", "pump", "--pretrained", "--weights", "data/demo/ast.pth", "--device", "cpu"])


DEMO = ["--machine", "fan", "--demo"]
PUMP = ["--machine", "pump", "--weights", "data/demo/ast.pth", "--device", "cpu"]
MESSAGES = [
    # script, arguments, what is there first, the message
    ("train.py", [], None, "the following arguments are required: --machine"),
    ("train.py", [*DEMO, "--rank", "0"], None, "argument --rank: must be at least 1, got 0"),
    ("train.py", [*DEMO, "--rank", "many"], None, "argument --rank: invalid int value: 'many'"),
    ("train.py", [*DEMO, "--lr", "nan"], None, "argument --lr: must be at least"),
    ("train.py", [*DEMO, "--epochs", "0"], None, "argument --epochs: must be at least 1"),
    ("train.py", [*DEMO, "--targets", "qkv"], None, "argument --targets: invalid choice: 'qkv'"),
    ("train.py", [*DEMO, "--layers", "12"], None, "LoRA layer 12 does not exist: this model has layers 0-11"),
    ("train.py", [*DEMO, "--layers", "last"], None, "argument --layers: all, 8-11 or 0,5, got 'last'"),
    ("train.py", [*DEMO, "--layers", "11-8"], None, "argument --layers: '11-8' runs backwards"),
    ("train.py", [*DEMO, "--dropout", "1"], None, "LoRA dropout must be in [0, 1), got 1.0"),
    ("train.py", [*DEMO, "--margin", "2"], None, "--margin 2.0: radians, below π/2 = 1.57"),
    ("train.py", [*DEMO, "--freq-mask", "129"], None, "SpecAug masks must be 0 to 96 frames and 0 to 128 mel bins"),
    ("train.py", [*DEMO, "--device", "cuda"], None, "--device cuda: no such GPU here (0 found); --device cpu is slow"),
    ("train.py", [*DEMO, "--device", "tpu"], None, "--device tpu: cpu, cuda or cuda:N"),
    ("train.py", [*DEMO, "--resume", "--overwrite"], None, "--resume goes on, --overwrite starts again: give one"),
    ("train.py", [*DEMO, "--ran", "4"], None, "unrecognized arguments: --ran 4"),
    ("train.py", [*DEMO, "--run", "runs/x"], a_file_for_a_folder,
     "cannot use runs/x as a run folder (Not a directory); name another with --run"),
    ("score.py", DEMO, damaged_record, "runs/demo-fan/args.json is damaged (Expecting value"),
    ("train.py", ["--machine", "../fan"], None, "--machine '../fan': a machine is the name of a folder in --data"),
    ("train.py", ["--machine", "valve", "fna"], None, "data/fna/train is missing; did you mean 'fan'?"),
    ("score.py", ["--machine", "fna", "--pretrained"], None, "data/fna/train is missing; did you mean 'fan'?"),
    ("train.py", ["--machine", "pmup", "--weights", "data/demo/ast.pth"], own_machine,
     "data/pmup/train is missing; did you mean 'pump'?"),
    ("train.py", ["--machine", "compressor", "--weights", "data/demo/ast.pth"], None,
     "data/compressor/train is missing; put train clips (WAV) there"),
    ("train.py", PUMP, empty_folder, "data/pump/train has no WAV file; put this machine's train clips there"),
    ("train.py", ["--machine", "fan", "--weights", "data/demo/ast.pth"], nested,
     "data/fan/fan/train is nested one folder too deep; move it to data/fan/train"),
    ("train.py", ["--machine", "fan"], None, "put the file at data/dev_fan.zip yourself; --demo needs no download"),
    ("train.py", ["--machine", "pump"], own_machine,
     "put the file at weights/ast.safetensors yourself; --demo needs no download"),
    ("train.py", PUMP, own_machine, "all 3 clips are of one class (pump/), so there is nothing to tell apart; train "
     "jointly with other machines (--machine pump fan valve), or skip training: score.py --pretrained"),
    ("train.py", ["--machine", "pump", "fan", *PUMP[2:]], lambda: (damaged_clips(), copy_fan()),
     "1 of 11 clips cannot be used (mend or remove them): data/pump/train/b.wav: File format"),
    ("train.py", [*DEMO, "--data", "my-data"], None, "--demo brings its own data and weights: leave out --data and"),
    ("score.py", [*DEMO, "--weights", "x.pth"], None, "--demo brings its own data and weights: leave out --data and"),
    ("train.py", ["--machine", "pump", "--weights", "my.pth"], own_machine,
     "my.pth is missing; `python backbone.py` fetches the public weights to weights/ast.safetensors"),
    ("train.py", [*DEMO, "--run", "/proc/1/run"], None,
     "cannot use /proc/1/run as a run folder (No such file or directory); name another with --run"),
    ("train.py", ["--machine", "fan", "--data", "data/demo"], web_page,
     "weights/ast.safetensors cannot be loaded: a web page; delete it and fetch or make it again"),
    ("score.py", DEMO, None, "runs/demo-fan is not a run of train.py; train one, or name its folder with --run"),
    ("score.py", [*DEMO, "--k", "0"], None, "argument --k: must be at least 1"),
    ("score.py", [*DEMO, "--normalize", "mean"], None, "argument --normalize: invalid choice: 'mean'"),
    ("score.py", [*DEMO, "--pretrained", "--k", "40"], None,
     "fan: 40 nearest neighbours need at least 40 training clips, not 7"),
    ("score.py", [*PUMP, "--pretrained", "--smote", "0.2"], own_machine,
     "pump: --smote needs at least 3 target training clips, not 0"),
    ("score.py", [*PUMP, "--pretrained", "--normalize", "train", "--k", "2"], own_machine, None),
    ("score.py", ["--machine", "pump", "--pretrained"], own_machine,
     "put the file at weights/ast.safetensors yourself"),
    ("evaluate.py", DEMO, None, "runs/demo-fan/anomaly_score_fan_section_00_test.csv is missing; run score.py"),
    ("evaluate.py", [*DEMO, "--run", "runs", "runs/../runs"], None, "--run names a folder twice"),
    ("evaluate.py", ["--machine", "pump", "--run", "runs/pretrained-pump"], scored_pump,
     "the names of pump's clips tell no labels; write them to data/pump/labels.csv, a line `file,0` or `file,1` each"),
    ("data.py", ["--machine", "fna"], None, "no machine 'fna'; did you mean 'fan'?"),
    ("data.py", ["--machine", "fan"], None, "put the file at data/dev_fan.zip yourself"),
    ("backbone.py", [], web_page, "weights/ast.safetensors cannot be loaded: a web page"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argv", "prepare", "message"), MESSAGES)
def test_a_wrong_use_ends_in_one_line_that_says_what_to_do(small, monkeypatch, capsys, name, argv, prepare, message):
    monkeypatch.setattr(data, "ZENODO", "http://127.0.0.1:9")
    monkeypatch.setattr(backbone, "WEIGHTS_URL", "http://127.0.0.1:9/model.safetensors")
    if "--device" in argv:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    small_demo("fan")
    train.prepare_demo([])
    if prepare:
        prepare()
    before = {path for path in Path().rglob("*") if path.is_file()}
    capsys.readouterr()
    if message is None:  # a right use beside the wrong ones
        return SCRIPTS[name].main(argv)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main(argv)
    err = [line for line in capsys.readouterr().err.splitlines() if line and "\r" not in line]
    assert stop.value.code == 2 and len(err) == 1 and err[0].startswith(f"{name}: error: "), err
    assert message in err[0]
    left = {path for path in Path().rglob("*") if path.is_file()} - before
    assert not [path for path in left if path.suffix not in (".npz", ".wav")], "nothing half-written is left behind"


def test_an_error_has_no_traceback_in_a_real_process(tmp_path):
    result = script("score.py", "--machine", "fan", "--run", "nothing", cwd=tmp_path)
    message = "nothing is not a run of train.py; train one, or name its folder with --run"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"score.py: error: {message}\n")


def test_the_file_tour_counts_right():
    for name, count in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        assert len((ROOT / name).read_text().splitlines()) == int(count), name


def test_the_scripts_are_flat():
    """data, lora and backbone import none of our files; the others only what stands before them in the flow."""
    allowed = {"data.py": (), "lora.py": (), "backbone.py": (), "train.py": ("data", "lora", "backbone"),
               "score.py": ("data", "lora", "backbone", "train"), "evaluate.py": ("data",)}  # fmt: skip
    for name, modules in allowed.items():
        imported = set(
            re.findall(r"^(?:from|import) (data|lora|backbone|train|score|evaluate)\b", (ROOT / name).read_text(), re.M)
        )
        assert imported <= set(modules), name
    assert sys.version_info >= (3, 11)
