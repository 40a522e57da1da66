"""Alignment finds places again, and masked autoencoding alone does not learn to."""

import pytest

from benchmarks.retrieval import ONLY, curve

SHORT = ["train.steps=60", "train.warmup_steps=5", "train.batch_size=4", "optimizer.learning_rate=1e-3"]


@pytest.mark.slow
def test_alignment_finds_the_same_place_in_the_other_view(tmp_path):
    """Top-1 retrieval by the encoder's own features, on held-out pairs of views of the demo volume."""
    aligned, alone = (
        curve([*SHORT, *ONLY[name]], every=60, samples=24, prepared=tmp_path) for name in ("MAE + consistency", "MAE")
    )
    assert aligned[0] == alone[0]
    assert aligned[60] > 20 / 125  # chance is 1 of 125 cells
    assert aligned[60] > aligned[0] + 0.02
    assert aligned[60] > alone[60] + 0.02
