"""The first thing to run on a machine with a network: what the other tests cannot show.

    pip install soundfile && ASD_NETWORK=1 python -m pytest tests/test_network.py -rP

Every address answers with what is expected there; the public weights give the hub's own published
numbers; fan unpacks to the challenge's clips, which the untouched AST scores, up to a table.
"""

import os
import urllib.request
from pathlib import Path

import pytest
import torch
from test_backbone import public_logits

import backbone
import data
import evaluate
import score

needs_network = pytest.mark.skipif("ASD_NETWORK" not in os.environ, reason="ASD_NETWORK is not set")
HUB = "https://huggingface.co/datasets/nielsr/audio-spectogram-transformer-checkpoint/resolve/main"
LOGITS = [-0.8760, -7.0042, -8.6602]  # of the first three AudioSet classes, from the hub's own test


@needs_network
def test_every_address_answers_with_the_expected_size():
    addresses = [(backbone.WEIGHTS_URL, 346_404_948, 346_404_948)]
    for name in data.ARCHIVE_MD5:
        record = 7882613 if "dev" in name else 7830345 if "train" in name else 7860847
        url = f"{data.ZENODO}/{record}/files/{name}.zip?download=1"
        addresses.append((url, 10_000_000, 1_000_000_000))
    for machine in data.EVAL:
        for kind in ("data", "domain"):  # 200 rows of section_00_0000.wav,0
            file = f"ground_truth_{kind}/ground_truth_{machine}_section_00_test.csv"
            addresses.append((f"{data.GROUND_TRUTH}/{file}", 200 * 22, 200 * 24))
    for url, least, most in addresses:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": data.AGENT})
        with urllib.request.urlopen(request, timeout=60) as response:
            size = int(response.headers["Content-Length"])
        print(f"{size:12,} bytes  {url}")
        assert least <= size <= most, url


@needs_network
def test_the_public_weights_give_the_hubs_own_numbers():
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    backbone.fetch_weights(backbone.WEIGHTS)
    path = Path("data/sample_audio.flac")
    data.download(f"{HUB}/{path.name}", path)
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == 16000
    x = data.spectrogram(torch.from_numpy(samples.mean(axis=1)))
    logits = public_logits(Path(backbone.WEIGHTS), x[None])[0, :3].tolist()
    print("AudioSet logits:", [round(value, 4) for value in logits])
    assert logits == pytest.approx(LOGITS, abs=1e-3)


@needs_network
def test_fan_is_the_challenges_and_ends_with_a_table():
    data.fetch("fan", "data")
    clips = {split: data.list_clips("data", "fan", split) for split in ("train", "test")}
    assert (len(clips["train"]), len(clips["test"])) == (990 + 10, 200)
    assert all(clip.domain and clip.attributes for clip in clips["train"] + clips["test"])
    score.main(["--machine", "fan", "--pretrained"])
    evaluate.main(["--machine", "fan", "--run", "runs/pretrained-fan"])
