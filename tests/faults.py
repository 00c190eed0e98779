"""Does every token of the method carry weight? Break it in one place at a time, and run the tests.

    python tests/faults.py                               # all of them
    python tests/faults.py --file lora.py --file data.py
    python tests/faults.py --sample 20                   # with the day's seed, or --seed N

Above the divider of each script every number, sign, operator, comparison, condition and truth
value is changed; every simple statement, call argument and keyword is left out. Strings,
annotations and the messages of errors stay. Each fault is tried in a temporary copy of the tree, in
a process forked from this one, which has loaded the libraries but none of the scripts. The first
failing test ends it, and so does a test that takes far longer than without a fault.

Prints a line for each fault that no test notices. Exit status: 0 if there is none, 1 if there are
some, 2 if a test fails without a fault or a known fault no longer exists.
"""

import argparse
import ast
import collections
import compileall
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NamedTuple

import pytest

# Faults that change no result: (file, the line as broken): why. They are not tried.
VTLN = "no vocal tract length is normalised, so its range is not used"
GPU = "only a GPU shows that something stays on the CPU"
TINY = "both are far below what matters, and far above rounding"
MEL = "filters, _ = get_mel_banks(N_MELS, FFT, SAMPLE_RATE, 20, 0, {}, 1.0)  # (128, 256)"
KNOWN: dict[tuple[str, str], str] = {
    ("data.py", MEL.format("101, -500")): VTLN,
    ("data.py", MEL.format("100, 500")): VTLN,
    ("data.py", MEL.format("100, -501")): VTLN,
    ("data.py", "frames *= torch.hann_window(FRAME, periodic=False)"): GPU,
    ("data.py", "return mel.clamp_(min=torch.finfo().eps).log_()"): "float32 is the default",
    ("train.py", "sin_y = ((1 - cos_y) * (1 + cos_y)).clamp(min=2e-12).sqrt()"): TINY,
    ("train.py", "labels = torch.tensor([class_index[name] for name in class_of_clip])"): GPU,
    ("train.py", "model = make_model(args).to()"): GPU,
    (
        "train.py",
        "arcface = ArcFace(args.embedding, len(classes), args.scale, args.margin).to()",
    ): GPU,
    ("score.py", "if std <= 1e-9:"): TINY,
    ("score.py", "if std < 2e-09:"): TINY,
}

ROOT = Path(__file__).resolve().parent.parent
FILES = ["data.py", "lora.py", "backbone.py", "train.py", "score.py", "evaluate.py"]
LIBRARIES = """torch torch._dynamo torchaudio.compliance.kaldi numpy scipy.io.wavfile scipy.stats
    sklearn.metrics sklearn.neighbors tqdm safetensors.torch transformers peft matplotlib.pyplot"""
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

DIVIDER = re.compile(rb"^# ---.*plumbing", re.MULTILINE)
SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return, ast.Raise, ast.Assert,
          ast.Delete, ast.Break, ast.Continue)  # fmt: skip
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "**": "*", "%": "//", "@": "*",
             "|": "&", "&": "|", "^": "|", "<<": ">>", ">>": "<<", "and": "or", "or": "and",
             "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
             "is": "is not", "is not": "is", "in": "not in", "not in": "in"}  # fmt: skip
# Between two operands: closing brackets and comments, the operator.
BETWEEN = re.compile(rb"(?:[\s)\\]|#.*)*(is not|not in|\w+|[^\w\s(#]+)")


# What can be broken


class Fault(NamedTuple):
    """The bytes from `start` to `end` become `new`; `broken` is what the line says then."""

    file: str
    line: int
    broken: str
    start: int
    end: int
    new: bytes


class Finder(ast.NodeVisitor):
    """All faults of a file, of which `text` stands above the divider."""

    def __init__(self, file: str, text: bytes):
        self.file, self.text, self.faults = file, text, {}
        self.lines = [0, *(newline.end() for newline in re.finditer(b"\n", text))]
        self.visit(ast.parse(text))

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def replace(self, start: int, end: int, new: str) -> None:
        """Add a fault, if Python can read the file then."""
        text = self.text[:start] + new.encode() + self.text[end:]
        with contextlib.suppress(SyntaxError), warnings.catch_warnings(action="ignore"):
            compile(text, self.file, "exec")
            line = text.count(b"\n", 0, start)
            broken = text.splitlines()[line].decode().strip()
            old = self.text[start:end].decode()
            if not new and "\n" in old:  # the line alone would not show it
                broken += f"  # without {' '.join(old.split()).strip(', ')}"
            self.faults[text] = Fault(self.file, line + 1, broken, start, end, new.encode())

    def visit(self, node: ast.AST) -> None:
        """Leave the statement out; then break its parts."""
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, SIMPLE) and not docstring:
            start, end = self.span(node)
            self.replace(start, end, f"pass  # {self.text[start:end].decode().splitlines()[0]}")
        super().visit(node)

    def leave(self, node: ast.AST) -> None:
        """Its parts stay as they are."""

    visit_Import = visit_ImportFrom = visit_Raise = visit_JoinedStr = visit_arg = leave

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, node.args, *node.body):  # not the annotation
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.replace(*self.span(node), str(not node.value))
        elif isinstance(node.value, int):
            self.replace(*self.span(node), str(node.value + 1))
        elif isinstance(node.value, float):
            self.replace(*self.span(node), str(2 * node.value or 1.0))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start = self.span(node)[0]
        self.replace(start, start + (4 if isinstance(node.op, ast.Not) else 1), "")
        self.generic_visit(node)

    def visit_operators(self, node: ast.BinOp | ast.AugAssign | ast.BoolOp | ast.Compare) -> None:
        operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        for left, right in itertools.pairwise(operands):
            found = BETWEEN.match(self.text, self.span(left)[1], self.span(right)[0])
            old = found[1].decode()
            new = OPERATORS.get(old) or OPERATORS[old.removesuffix("=")] + "="  # += and the like
            self.replace(*found.span(1), new)
        self.generic_visit(node)

    visit_BinOp = visit_AugAssign = visit_BoolOp = visit_Compare = visit_operators

    def visit_condition(self, node: ast.If | ast.IfExp | ast.While | ast.comprehension) -> None:
        for test in node.ifs if isinstance(node, ast.comprehension) else [node.test]:
            start, end = self.span(test)
            if not is_negated_elsewhere(test):
                self.replace(start, end, f"not ({self.text[start:end].decode()})")
        self.generic_visit(node)

    visit_If = visit_IfExp = visit_While = visit_comprehension = visit_condition

    def visit_Call(self, node: ast.Call) -> None:
        spans = sorted(self.span(argument) for argument in [*node.args, *node.keywords])
        for (start, _), (following, _) in itertools.pairwise(spans):
            self.replace(start, following, "")
        if len(spans) == 1:
            self.replace(self.span(node.func)[1], self.span(node)[1], "()")
        elif spans:
            self.replace(spans[-2][1], spans[-1][1], "")
        self.generic_visit(node)


def is_negated_elsewhere(test: ast.expr) -> bool:
    """`not x` becomes `x`, `a == b` becomes `a != b`."""
    opposites = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and isinstance(test.ops[0], opposites)
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def find_faults(file: str) -> list[Fault]:
    text = (ROOT / file).read_bytes()
    above = text[: DIVIDER.search(text).start()]
    return sorted(Finder(file, above).faults.values(), key=lambda fault: fault.start)


# The tests in forked processes


class Watch:
    """A plugin for pytest, which keeps what the tests came to.

    pick    which tests run, in which order
    usual   seconds that each takes without a fault; after five times as long and 30 s the process
            ends
    """

    def __init__(self, pick: Callable[[list], list], usual: dict[str, float]):
        self.pick, self.usual = pick, usual
        self.failed, self.seconds = [], collections.Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = self.pick(items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(int(30 + 5 * self.usual.get(nodeid, 100)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def start(tree: Path, slot: Path, fault: Fault | None, watch: Watch) -> int:
    """Start the tests on a fresh copy of `tree`, with its fault; -> the process."""
    shutil.rmtree(slot, ignore_errors=True)
    copy = shutil.copytree(tree, slot / "tree")
    (slot / "tmp").mkdir()
    if fault:
        text = (copy / fault.file).read_bytes()
        (copy / fault.file).write_bytes(text[: fault.start] + fault.new + text[fault.end :])
    if process := os.fork():
        return process
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        signal.alarm(100)  # for collecting the tests
        os.chdir(copy)
        os.environ["TMPDIR"] = str(slot / "tmp")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        options = "tests -x -p no:cacheprovider --assert=plain --ignore=tests/test_faults.py"
        status = pytest.main([*options.split(), f"--rootdir={copy}"], plugins=[watch])
        (slot / "report").write_text(json.dumps([watch.failed, watch.seconds]))
        os._exit(status)
    finally:
        os._exit(99)


def kill_children(process: int) -> None:
    """All that it has started and, if it still runs, itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def try_each(
    tree: Path, jobs: int, trials: Iterable[tuple[Fault | None, Watch]]
) -> Iterator[tuple[Fault | None, bool, list[str], dict[str, float]]]:
    """`jobs` at a time; -> (fault, whether all tests passed, which failed, seconds of each)."""
    trials, running = iter(trials), {}
    free = [tree.parent / str(job) for job in range(jobs)]
    try:
        while True:
            signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)  # a fork would swallow them
            for fault, watch in itertools.islice(trials, len(free)):
                slot = free.pop()
                running[start(tree, slot, fault, watch)] = fault, slot
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
            if not running:
                return
            process, status = os.wait()
            kill_children(process)
            fault, slot = running.pop(process)
            free.append(slot)
            report = slot / "report"
            failed, seconds = json.loads(report.read_text()) if report.exists() else ([], {})
            yield fault, status == 0, failed, seconds
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            kill_children(process)
            os.waitpid(process, 0)


def run_without_fault(tree: Path, picks: list[Callable[[list], list]]) -> dict[str, float]:
    """-> seconds of each test. SystemExit: one of them fails."""
    usual = {}
    trials = [(None, Watch(pick, {})) for pick in picks]
    with contextlib.closing(try_each(tree, len(picks), trials)) as results:
        for _, passed, failed, seconds in results:
            if not passed:
                print(f"faults.py: error: fails without a fault: {failed or 'a test that hangs'}")
                raise SystemExit(2)
            usual |= seconds
    return usual


# All of it


def load_libraries() -> None:
    """For all forked processes, which find the scripts in their copy only and leave no bytecode."""
    if "ASD_REAL" in os.environ:
        os.environ["ASD_REAL"] = os.path.abspath(os.environ["ASD_REAL"])
    os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP's threads do not survive a fork
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT)]
    for library in LIBRARIES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(library)


def copy_tree(to: Path) -> None:
    """What git tracks or would track, with bytecode that is valid for its own source only."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in os.fsdecode(names).split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    compileall.compile_dir(to, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def likeliest_first(file: str, noticed_by: list[str], usual: dict[str, float]) -> Callable:
    """Sort tests: those that noticed a fault of the file, the latest first; its own; the others.

    Those of more than a second come after all these, in the same order.
    """

    def rank(item: pytest.Item) -> tuple[bool, int, bool]:
        test = item.nodeid
        since = noticed_by.index(test) if test in noticed_by else len(noticed_by)
        return usual.get(test, 0) > 1, since, not test.startswith(f"tests/test_{file}")

    return lambda items: sorted(items, key=rank)


def show_progress(done: int, total: int, begun: float) -> None:
    left = (time.monotonic() - begun) / done * (total - done) / 60
    line = f"{done} of {total} faults, {left:.0f} min left"
    if sys.stderr.isatty():
        print(f"\r{line} \r", end="", file=sys.stderr, flush=True)
    elif done % 20 == 0:
        print(line, file=sys.stderr)


def try_faults(tree: Path, faults: list[Fault], jobs: int) -> int:
    """Print those that no test notices; -> their number."""
    shares = [lambda items, job=job: items[job::jobs] for job in range(jobs)]
    usual = run_without_fault(tree, shares)
    print(f"{len(usual)} tests pass in {sum(usual.values()):.0f} s without a fault", flush=True)
    noticed_by = {file: [] for file in FILES}
    trials = (
        (fault, Watch(likeliest_first(fault.file, noticed_by[fault.file], usual), usual))
        for fault in faults
    )
    unnoticed, begun = 0, time.monotonic()
    with contextlib.closing(try_each(tree, jobs, trials)) as results:
        for done, (fault, passed, failed, _) in enumerate(results, 1):
            if passed:
                unnoticed += 1
                print(f"{fault.file}:{fault.line}: {fault.broken}", flush=True)
            others = [test for test in noticed_by[fault.file] if test not in failed]
            noticed_by[fault.file] = failed + others
            show_progress(done, len(faults), begun)

    # It was the fault: in about that order, the same tests pass without one.
    used = list(dict.fromkeys(itertools.chain(*noticed_by.values())))
    if used:
        run_without_fault(tree, [lambda items: likeliest_first("", used, {})(items)[: len(used)]])
    return unnoticed


def run(args: argparse.Namespace) -> int:
    """-> the exit status."""
    begun = time.monotonic()
    faults = [fault for file in FILES for fault in find_faults(file)]
    stale = sorted(KNOWN.keys() - {(fault.file, fault.broken) for fault in faults})
    for file, broken in stale:
        print(f"faults.py: error: this known fault does not exist: {file}: {broken}")
    if stale:
        return 2
    faults = [fault for fault in faults if fault.file in (args.file or FILES)]
    if args.sample is not None:
        print(f"of {len(faults)} faults: --sample {args.sample} --seed {args.seed}")
        faults = random.Random(args.seed).sample(faults, min(args.sample, len(faults)))
    to_try = [fault for fault in faults if (fault.file, fault.broken) not in KNOWN]

    load_libraries()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = Path(folder).resolve() / "tree"
        copy_tree(tree)
        unnoticed = try_faults(tree, to_try, args.jobs)
    print(f"in {(time.monotonic() - begun) / 60:.1f} min")
    print(
        f"{len(faults)} faults: {len(to_try) - unnoticed} noticed, "
        f"{len(faults) - len(to_try)} known to change nothing, {unnoticed} not noticed"
    )
    return 1 if unnoticed else 0


def main(argv: list[str] | None = None) -> int:
    today = int(time.time()) // 86400
    parser = argparse.ArgumentParser("faults.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--file", action="append", choices=FILES, help="only this one's (all)")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=today, help="of the sample (the day's number)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    for number in INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        return run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
