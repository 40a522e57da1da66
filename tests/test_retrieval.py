"""Alignment finds places again, and masked autoencoding alone does not learn to."""

import pytest
from conftest import PRIMUS

from benchmarks.retrieval import ONLY, curve

STEPS = 60
SHORT = [  # of a small Primus: the demo's own network comes out too differently from seed to seed
    *PRIMUS,
    "views.crop_size=[48,48,48]",
    f"train.steps={STEPS}",
    "train.warmup_steps=5",
    "optimizer.learning_rate=1e-3",
]


@pytest.mark.slow
def test_alignment_finds_the_same_place_in_the_other_view(tmp_path):
    """Top-1 retrieval by the encoder's own features, on held-out pairs of views of the demo volume."""
    aligned, alone = (
        curve([*SHORT, *ONLY[name]], every=STEPS, samples=24, prepared=tmp_path)
        for name in ("MAE + consistency", "MAE")
    )
    assert aligned[0] == alone[0]
    assert aligned[STEPS] > 20 / 125  # chance is 1 of 125 cells
    assert aligned[STEPS] > aligned[0] + 0.02
    assert aligned[STEPS] > alone[STEPS] + 0.02
