"""What the tests share: the scripts on the path, real clips where there are some, and a small
geometry.

ASD_REAL names a folder with real/<machine>/{train,test}/*.wav (DCASE2023 clips under their official
names), scores/ (score files of real systems), wav_cases/ (awkward WAV files) and golden/ (numbers
that the official AST code printed). Tests that need it are skipped without it.
"""

import hashlib
import http.server
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402

import backbone  # noqa: E402
import data  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402

REAL = Path(os.environ["ASD_REAL"]).resolve() if "ASD_REAL" in os.environ else None
needs_real = pytest.mark.skipif(REAL is None, reason="ASD_REAL is not set")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty working folder, and spectrograms of 96 frames instead of 1024: every line runs, in a
    tenth of the time.

    A clip of 1 s has 98 frames then, so it is longer than one window.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "N_FRAMES", 96)
    monkeypatch.setattr(data, "WINDOW", data.FRAME + 95 * data.HOP)
    monkeypatch.setattr(data.fit_frames, "__defaults__", (96,))
    monkeypatch.setattr(backbone, "N_FRAMES", 96)
    return tmp_path


FLAGS = ["--weights", "ast.pth", "--device", "cpu"]


def small_machines(*names: str, n_train: int = 7, n_test: int = 1) -> None:
    """In the `small` fixture's folder: machines of a few short made-up clips in data/, and a tiny
    random AST."""
    for name in names:
        demo.make_machine("data", name, n_train, n_test, seconds=1.0)
    torch.manual_seed(0)
    train.save(Path("ast.pth"), backbone.AST(dim=64, depth=2, heads=1).state_dict())


def embed_all(model, clips: list[data.Clip], batch_size: int = 4) -> np.ndarray:
    """The embeddings (m, D) of all windows of the clips."""
    lengths = [recording.n_samples for recording in data.check_clips(clips)]
    return np.concatenate([rows for _, rows in score.embed(model, clips, lengths, batch_size, 0)])


class Server(http.server.ThreadingHTTPServer):
    """Files by path on the loopback address, with Range, and with the faults that a test switches
    on."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.ignore_range, self.cut_at, self.delay = False, None, 0.0
        self.refused_agents, self.answers = (
            None,
            [],
        )  # answers: (status, headers) of the next requests
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        wanted = self.headers.get("Range")
        server.requests.append((path, wanted))
        agent = self.headers.get("User-Agent", "")
        if server.refused_agents and (not agent or agent.lower().startswith(server.refused_agents)):
            return self.send_error(403)
        if server.answers:
            status, headers = server.answers.pop(0)
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            return self.end_headers()
        if path not in server.files:
            return self.send_error(404)
        content, start = server.files[path], 0
        if wanted and not server.ignore_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = b"" if self.command == "HEAD" else content[start : server.cut_at]
        try:
            for i in range(0, len(body), 1 << 14):
                self.wfile.write(body[i : i + (1 << 14)])
                time.sleep(server.delay)
        except OSError:
            pass  # the client was killed

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Stands for Zenodo, GitHub and Hugging Face: what a test puts into server.files is what can be
    fetched."""
    with Server() as server:
        monkeypatch.setattr(data, "ZENODO", f"{server.url}/zenodo")
        monkeypatch.setattr(data, "GROUND_TRUTH", f"{server.url}/truth")
        monkeypatch.setattr(backbone, "WEIGHTS_URL", f"{server.url}/model.safetensors")
        yield server
        server.shutdown()


def serve(server, monkeypatch, record: int, name: str, content: bytes) -> None:
    """Offer a zip file as one of Zenodo's, with its own checksum in place of the real one."""
    server.files[f"/zenodo/{record}/files/{name}.zip"] = content
    monkeypatch.setitem(data.ARCHIVE_MD5, name, hashlib.md5(content).hexdigest())


def in_a_process(main, argv: list[str], kill_after: float | None = None) -> int:
    """Run a script's main in a process forked from this one, which has the libraries loaded; -> its
    exit status.

    kill_after  seconds until it is sent SIGKILL; the status is then -9, unless it had ended by
    itself
    """

    def run():
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        main(argv)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    return process.exitcode


def script(name: str, *args: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Run a script as a user does."""
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **more)


def assert_equal_within(tolerance: float, what: str, ours, theirs) -> None:
    """Compare, and print the largest difference: `python -m pytest -rP | grep "largest difference"`
    lists them all."""
    ours, theirs = (torch.as_tensor(values).detach().double() for values in (ours, theirs))
    difference = (ours - theirs).abs().max().item()
    print(f"{what}: largest difference {difference:.1e}")
    assert ours.shape == theirs.shape and difference <= tolerance
