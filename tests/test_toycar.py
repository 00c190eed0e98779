"""The whole chain on one real machine of the challenge, from WAV files to the official score.

python data.py --machine ToyCar
ASD_TOYCAR=data/ToyCar python -m pytest tests/test_toycar.py       # a minute on two cores
"""

import os
from pathlib import Path

import demo
import pytest
from conftest import rows_of

import data
import evaluate
import score

TOYCAR = Path(os.environ.get("ASD_TOYCAR", "")).resolve()
OFFICIAL = {"none": 0.52027, "density": 0.52966}  # of the demo's tiny AST as it is


@pytest.mark.skipif("ASD_TOYCAR" not in os.environ, reason="ASD_TOYCAR is not set")
def test_the_untouched_tiny_ast_has_these_official_scores(tmp_path):
    clips = data.list_clips(TOYCAR.parent, TOYCAR.name, "train")
    assert len(clips) == 1000 and len({clip.attributes for clip in clips}) == 26
    assert sum(clip.domain == "target" for clip in clips) == 10
    for how, expected in OFFICIAL.items():
        where = f"--machine {TOYCAR.name} --data {TOYCAR.parent} --run {tmp_path}"
        flags = f"--pretrained --weights {demo.WEIGHTS} --device cpu --normalize {how}"
        score.main(f"{where} {flags}".split())
        evaluate.main(where.split())
        row = dict(zip(*rows_of(tmp_path / "metrics.csv")))
        assert float(row["official_score"]) == pytest.approx(expected, abs=1e-4)
