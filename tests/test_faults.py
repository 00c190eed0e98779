"""faults.py, on two small scripts with tests of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest

DIVIDER = "# ---- plumbing"
TESTS_OF_TWO = "import two\n\ndef test_limit():\n    while two.LIMIT == 8: pass\n"
METHOD = """'''Docstrings and annotations: 1.'''
SCALE = -2.0

def scaled(x: "list[1]", strict=True) -> "1 + 1":
    '''Not 1 - 1.'''
    if not x and strict:
        raise ValueError(f"empty: {1 + 1}")
    return [SCALE * y for y in x if y < 3]
"""
# All of it, and nothing else.
BROKEN = """pass  # SCALE = -2.0
SCALE = 2.0
SCALE = -4.0
def scaled(x: "list[1]", strict=False) -> "1 + 1":
if not (not x and strict):
if x and strict:
if not x or strict:
pass  # raise ValueError(f"empty: {1 + 1}")
pass  # return [SCALE * y for y in x if y < 3]
return [SCALE / y for y in x if y < 3]
return [SCALE * y for y in x if not (y < 3)]
return [SCALE * y for y in x if y <= 3]
return [SCALE * y for y in x if y < 4]"""


def broken(text: str) -> list[str]:
    found = faults.Finder("one.py", text.encode()).faults.values()
    return [fault.broken for fault in sorted(found, key=lambda fault: fault.start)]


def test_every_place_is_found():
    assert sorted(broken(METHOD)) == sorted(BROKEN.splitlines())


@pytest.mark.parametrize(
    "line, expected",
    [
        ("f(x, *y, a=1)", ["f(*y, a=1)", "f(x, a=1)", "f(x, *y)", "f(x, *y, a=2)"]),
        ("f(µ, sum(y for y in z))", ["f(sum(y for y in z))", "f(µ)", "f(µ, sum())"]),
        ("x += (a // b)", ["x -= (a // b)", "x += (a / b)"]),
        ("((a)  # *\n+ b)", ["- b)"]),
        ("0 <= a < n", ["1 <= a < n", "0 < a < n", "0 <= a <= n"]),
        ("a is not b", ["a is b"]),
        ("x if a in b else y", ["x if a not in b else y"]),
        ("x if not a else y", ["x if a else y"]),
        ("x if a else y", ["x if not (a) else y"]),
        ("x[:, 0]", ["x[:, 1]"]),
        ("~a | 0.0", ["a | 0.0", "~a & 0.0", "~a | 1.0"]),
        ("g(\n    a,\n    b,\n)", ["b,  # without a", "a,  # without b"]),
    ],
)  # fmt: skip
def test_a_line_is_broken_in_each_place(line, expected):
    assert sorted(broken(line)[1:]) == sorted(expected)  # the first leaves it out


@pytest.fixture
def tree(tmp_path):
    files = {
        "one.py": f"import two\nN = 3\n\n{DIVIDER}\nM = 4\nassert two.LIMIT\n",
        "two.py": f"LIMIT = 7\nUNUSED = 8\n\n{DIVIDER}\n",
        "tests/conftest.py": "import os, sys\nsys.path.insert(0, os.getcwd())\n",
        "tests/test_one.py": "import one\n\ndef test_n():\n    assert one.N == 3\n",
        "tests/test_two.py": TESTS_OF_TWO,
        "left_out.txt": "",
        ".gitignore": "left_out.txt\n",
    }
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "tmp").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "tree", check=True)
    before = contents(tmp_path)
    yield tmp_path / "tree"
    assert contents(tmp_path) == before  # also nothing new, in the tree or in /tmp


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(tree: Path, *args: str, known: dict | None = None) -> subprocess.Popen:
    """faults.py for another tree, where a test that hangs is ended after 3 s."""
    code = f"""
import pathlib, signal, sys
alarm, signal.alarm = signal.alarm, lambda seconds: alarm(seconds // 10)
sys.path.insert(0, {str(Path(faults.__file__).parent)!r})
import faults
faults.ROOT, faults.FILES = pathlib.Path({str(tree)!r}), ["one.py", "two.py"]
faults.LIBRARIES, faults.KNOWN = "", {known or {}!r}
sys.exit(faults.main())"""
    environment = os.environ | {"TMPDIR": str(tree.parent / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_run_names_what_no_test_notices_and_counts_the_rest(tree):
    run = start(tree, known={("two.py", "UNUSED = 9"): "nothing uses it"})
    lines = run.communicate()[0].splitlines()
    assert lines[0].startswith("2 tests pass in ") and lines[2].endswith(" min")
    assert lines[1] == "two.py:2: pass  # UNUSED = 8"
    assert lines[3:] == ["6 faults: 4 noticed, 1 known to change nothing, 1 not noticed"]
    assert run.returncode == 1


def test_one_file_and_a_sample_that_can_be_repeated(tree):
    run = start(tree, "--file", "one.py", "--sample", "1", "--seed", "5")
    lines = run.communicate()[0].splitlines()
    assert lines[0] == "of 2 faults: --sample 1 --seed 5"
    assert lines[-1] == "1 faults: 1 noticed, 0 known to change nothing, 0 not noticed"
    assert run.returncode == 0


def test_a_known_fault_that_no_longer_exists_is_an_error(tree):
    run = start(tree, known={("two.py", "UNUSED = 10"): "nothing uses it"})
    expected = "faults.py: error: this known fault does not exist: two.py: UNUSED = 10\n"
    assert run.communicate()[0] == expected and run.returncode == 2


def test_tests_that_fail_without_a_fault_are_an_error(tree):
    (tree / "tests" / "test_two.py").write_text("def test_it():\n    assert False\n")
    run = start(tree)
    expected = "faults.py: error: fails without a fault: ['tests/test_two.py::test_it']\n"
    assert run.communicate()[0] == expected and run.returncode == 2
    (tree / "tests" / "test_two.py").write_text(TESTS_OF_TWO)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tree, number):
    run = start(tree)
    while not list(tree.parent.glob("tmp/*/0/tmp")):
        time.sleep(0.01)
    run.send_signal(number)
    run.communicate()
    assert run.returncode == 130


def test_the_likeliest_test_to_notice_comes_first():
    usual = {"tests/test_b.py::slow": 5.0}
    tests = ["tests/test_a.py::1", *usual, "tests/test_b.py::1", "tests/test_b.py::2"]
    order = faults.likeliest_first("b.py", ["tests/test_b.py::2"], usual)
    items = order([SimpleNamespace(nodeid=test) for test in tests])
    assert [tests.index(item.nodeid) for item in items] == [3, 2, 0, 1]
