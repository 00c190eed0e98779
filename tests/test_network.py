"""The first thing to run on a machine with a network: what the other tests cannot show.

    ASD_NETWORK=1 python -m pytest tests/test_network.py -rP

Every address answers with what is expected there; the public weights give the hub's own published
numbers; fan unpacks to the challenge's clips; `score.py --machine fan --pretrained` ends with a
table, the first row of the README's. Without ASD_NETWORK the same functions go through a loopback
server that offers made-up weights and clips.
"""

import contextlib
import hashlib
import io
import os
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FLAGS, serve, small_machines
from scipy.io import wavfile

import backbone
import data
import evaluate
import score

needs_network = pytest.mark.skipif("ASD_NETWORK" not in os.environ, reason="ASD_NETWORK is not set")
SAMPLE = "https://huggingface.co/datasets/nielsr/audio-spectogram-transformer-checkpoint/resolve/main/sample_audio.flac"
LOGITS = [-0.8760, -7.0042, -8.6602]  # of the first three AudioSet classes, from the hub's own test


def check_sizes(addresses: dict[str, tuple[int, int]]) -> None:
    """address -> (fewest, most bytes); HEAD requests with our own agent."""
    for url, (least, most) in addresses.items():
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": data.AGENT})
        with urllib.request.urlopen(request, timeout=60) as response:
            size = int(response.headers["Content-Length"])
        print(f"{size:12,} bytes  {url}")
        assert least <= size <= most, url


def public_logits(weights: Path, wave: torch.Tensor) -> torch.Tensor:
    """(527,) AudioSet logits: our AST, the classifier from the same file, as the hub's model has
    it."""
    ast, tensors = backbone.load_ast(weights).eval(), backbone.read_tensors(weights)
    x = data.normalise(data.fit_frames(data.log_mel(wave[None])))
    with torch.no_grad():
        pooled = backbone.ClassTokenPooling()(ast(x))
        norm = [tensors[f"classifier.layernorm.{name}"] for name in ("weight", "bias")]
        h = F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-12)
        return F.linear(h, tensors["classifier.dense.weight"], tensors["classifier.dense.bias"])[0]


def check_fan(n_train: int, n_test: int) -> None:
    """fan is fetched, has the clips of the official table, and is scored by the untouched AST."""
    data.prepare(["fan"], "data", ["train"])
    clips = {split: data.list_clips("data", "fan", split) for split in ("train", "test")}
    assert (len(clips["train"]), len(clips["test"])) == (n_train, n_test)
    assert all(clip.domain and clip.attributes for clip in clips["train"] + clips["test"])
    score.main(["--machine", "fan", "--pretrained"])
    evaluate.main(["--machine", "fan", "--run", "runs/pretrained-fan"])


@needs_network
def test_every_address_answers_with_the_expected_size():
    million = 1_000_000
    addresses = {backbone.WEIGHTS_URL: (346_404_948, 346_404_948)}
    for record, name, _ in (archive for archives in data.ARCHIVES.values() for archive in archives):
        addresses[f"{data.ZENODO}/{record}/files/{name}.zip?download=1"] = (
            10 * million,
            1000 * million,
        )
    for machine in data.EVAL:
        for kind in ("data", "domain"):  # 200 rows of section_00_0000.wav,0
            file = f"ground_truth_{kind}/ground_truth_{machine}_section_00_test.csv"
            addresses[f"{data.GROUND_TRUTH}/{file}"] = (200 * 22, 200 * 24)
    check_sizes(addresses)


@needs_network
def test_the_public_weights_give_the_hubs_own_numbers():
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    backbone.fetch_weights()
    path = Path("data/sample_audio.flac")
    data.download(SAMPLE, path)
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = torch.from_numpy(samples.mean(axis=1))
    assert rate == 16000
    logits = public_logits(Path(backbone.WEIGHTS), wave)
    print("AudioSet logits:", [round(value, 4) for value in logits[:3].tolist()])
    assert logits[:3].tolist() == pytest.approx(LOGITS, abs=1e-3)


@needs_network
def test_fan_is_the_challenges_and_ends_with_a_table():
    check_fan(990 + 10, 200)


# ------------------------------------------------- the same functions, against a loopback server


def test_the_checks_themselves_against_a_loopback_server(small, server, monkeypatch, capsys):
    """Sizes right and wrong; logits by transformers where it is installed; fan fetched, scored and
    evaluated."""
    small_machines("fan", n_test=2)
    monkeypatch.setattr(backbone, "WEIGHTS", "ast.pth")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in Path("data/fan").rglob("*.wav"):
            file.write(path, path.relative_to("data"))
            path.unlink()
    Path("data/fan").rename("elsewhere")
    serve(server, monkeypatch, 7882613, "dev_fan", buffer.getvalue())
    url = f"{data.ZENODO}/7882613/files/dev_fan.zip?download=1"
    size = len(buffer.getvalue())
    check_sizes({url: (size, size)})
    with pytest.raises(AssertionError):
        check_sizes({url: (size + 1, 10**9)})
    content = Path("ast.pth").read_bytes()
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    with contextlib.suppress(SystemExit):
        check_fan(7, 8)
    assert "official score: **" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        check_fan(990, 200)
    assert FLAGS


def test_logits_are_those_of_the_hubs_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 256,
    }
    theirs = transformers.ASTForAudioClassification(
        transformers.ASTConfig(**sizes, num_labels=7)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "model.bin")
    samples = np.random.default_rng(0).normal(0, 0.1, 100_000).astype(np.float32)
    wavfile.write(tmp_path / "clip.wav", 16000, samples)
    wave = data.read_wav(tmp_path / "clip.wav")
    x = data.normalise(data.fit_frames(data.log_mel(wave[None])))
    with torch.no_grad():
        expected = theirs(x).logits[0]
    torch.testing.assert_close(
        public_logits(tmp_path / "model.bin", wave), expected, atol=1e-5, rtol=0
    )
