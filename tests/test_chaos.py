"""Kills at random moments change nothing; benchmarks/chaos.py does more of them."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_killed_and_resumed_runs_end_as_undisturbed_ones(tmp_path):
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "5", "--strategies", "zero2", "fsdp2"]
    done = subprocess.run(
        [*command, "--keep", tmp_path / "runs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills survived, nothing differs" in done.stdout
