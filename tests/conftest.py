"""What the tests share: the scripts on the path, real clips where there are some, a small geometry.

ASD_REAL names a folder with real/<machine>/{train,test}/*.wav (DCASE2023 clips under their official
names), scores/ (score files of real systems), wav_cases/ (awkward WAV files) and golden/ (numbers
that the official AST code printed). Tests that need it are skipped without it.
"""

import csv
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402

import backbone  # noqa: E402
import data  # noqa: E402
import score  # noqa: E402

REAL = Path(os.environ["ASD_REAL"]).resolve() if "ASD_REAL" in os.environ else None
needs_real = pytest.mark.skipif(REAL is None, reason="ASD_REAL is not set")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FLAGS = ["--weights", "ast.safetensors", "--device", "cpu"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty working folder, and spectrograms of 96 frames instead of 1024: every line runs, in a
    tenth of the time. A window is 15,000 samples then, so a clip of 1 s is longer than one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "N_FRAMES", 96)
    monkeypatch.setattr(data, "WINDOW", 15000)
    monkeypatch.setattr(backbone, "N_FRAMES", 96)
    return tmp_path


def small_machines(*names: str, n_train: int = 7, n_test: int = 1) -> None:
    """In the `small` fixture's folder: machines of a few short made-up clips in data/, and a tiny
    random AST in ast.safetensors.
    """
    for name in names:
        demo.make_machine("data", name, n_train, n_test, seconds=1.0)
    torch.manual_seed(0)
    write_ast("ast.safetensors", backbone.AST(dim=64, depth=2, heads=1))


@pytest.fixture
def fan(small):
    """In the `small` fixture's folder: the machine fan."""
    small_machines("fan")


@pytest.fixture
def full_size_fan(tmp_path, monkeypatch):
    """The same without the small geometry, for tests with reading processes: a process that is not
    forked would not have it.
    """
    monkeypatch.chdir(tmp_path)
    small_machines("fan")


def lively_ast() -> backbone.AST:
    """Its tokens differ and attend, so that gradients are more than noise."""
    torch.manual_seed(1)
    ast = backbone.AST(dim=64, depth=2, heads=1)
    for name, parameter in ast.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return ast


# Our names, and those of the Hugging Face hub's file.
HUB_NAMES = {
    r"^blocks": "encoder.layer",
    r"attn\.q": "attention.attention.query",
    r"attn\.k": "attention.attention.key",
    r"attn\.v": "attention.attention.value",
    r"attn\.proj": "attention.output.dense",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
    r"^norm": "layernorm",
    r"^cls_token": "embeddings.cls_token",
    r"^dist_token": "embeddings.distillation_token",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed": "embeddings.patch_embeddings.projection",
}


def hub_state(ast: backbone.AST) -> dict[str, torch.Tensor]:
    """As the hub publishes it, with a classifier."""
    tensors = {"classifier.dense.weight": torch.zeros(5, 64)}
    for name, tensor in ast.state_dict().items():
        for ours, theirs in HUB_NAMES.items():
            name = re.sub(ours, theirs, name)
        tensors[f"audio_spectrogram_transformer.{name}"] = tensor
    return tensors


def write_ast(path: str | Path, ast: backbone.AST) -> None:
    write_safetensors(path, hub_state(ast))


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.numpy().astype("<f4").tobytes()
        offsets = [len(body), len(body) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        body += content
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + body)


def noise(path: str, seconds: float, seed: int = 0, level: float = 900, rate=16000) -> Path:
    """A WAV file of white noise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, level, int(seconds * rate))
    wavfile.write(path, rate, samples.clip(-32768, 32767).astype(np.int16))
    return Path(path)


def write_hums(root: Path, **counts: int) -> None:
    """root/fan, for train_source=12 and the like: clips of 6, 10 and 12 s in two classes, a hum
    that swells, in noise. The fourth of each kind has float samples.
    """
    rng = np.random.default_rng(0)
    for kind, count in counts.items():
        split, domain = kind.split("_")
        (root / "fan" / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            t = np.arange((6, 10, 12)[i % 3] * 16000) / 16000
            hum = np.sin(2 * np.pi * rng.uniform(100, 300) * t)
            hum *= 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.05, 3) * t)
            background = rng.uniform(0.005, 0.05) * rng.normal(size=len(t))
            wave = (0.1 * hum + background * np.linspace(0.2, 1, len(t))).clip(-1, 1)
            samples = wave.astype(np.float32) if i == 3 else (32767 * wave).astype(np.int16)
            name = f"section_00_{domain}_{split}_normal_{i:04}_spd_{i % 2}.wav"
            wavfile.write(root / "fan" / split / name, 16000, samples)


def embed_all(model, clips: list[data.Clip], batch_size: int = 4) -> np.ndarray:
    """The embeddings (m, D) of all windows of the clips."""
    return torch.cat([e for e, _ in score.embed(model, clips, batch_size, 0)]).numpy()


def rows_of(path: str | Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def error_of(main, argv: list[str], capsys) -> str:
    """The one line in which a script's main ends."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    if isinstance(stop.value.code, str):
        assert "\n" not in stop.value.code.strip()
        return stop.value.code
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]  # argparse's own


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files by path; with a fault, where a test says so."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.requests.append(path)
        self.close_connection = True
        if self.headers.get("User-Agent", "").startswith("Python-"):
            return self.send_error(403)  # as Zenodo has done since January 2026
        if path not in server.files:
            return self.send_error(404)
        content = server.files[path]
        if server.fault == "no answer":
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.fault == "cut":
            content = content[:-5]
        if server.fault == "nothing":
            content = b""
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Stands for Zenodo, GitHub and Hugging Face."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.fault = {}, [], None
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(data, "ZENODO", f"{url}/zenodo")
        monkeypatch.setattr(data, "GROUND_TRUTH", f"{url}/truth")
        monkeypatch.setattr(backbone, "WEIGHTS_URL", f"{url}/model.safetensors")
        yield server
        server.shutdown()


def serve(server, monkeypatch, record: int, name: str, content: bytes) -> None:
    """Offer a zip file as one of Zenodo's, with its own checksum in place of the real one."""
    server.files[f"/zenodo/{record}/files/{name}.zip"] = content
    monkeypatch.setitem(data.ARCHIVE_MD5, name, hashlib.md5(content).hexdigest())


# A process of its own with the small geometry; its arguments are ROOT and train.py's.
CHILD = """
import signal, sys; sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
import backbone, data, train
data.N_FRAMES, backbone.N_FRAMES, data.WINDOW = 96, 96, 15000
train.main(sys.argv[2:])
"""


def script(name: str, *args: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Run a script as a user does."""
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **more)


def assert_equal_within(tolerance: float, what: str, ours, theirs) -> None:
    """Compare, and print the largest difference: `python -m pytest -rP | grep "largest difference"`
    lists them all.
    """
    ours, theirs = (torch.as_tensor(values).detach().double() for values in (ours, theirs))
    difference = (ours - theirs).abs().max().item()
    print(f"{what}: largest difference {difference:.1e}")
    assert ours.shape == theirs.shape and difference <= tolerance
