"""What the scripts do before anything else."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, config, launch

SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, which torch has on Linux")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_the_user_has_said_otherwise(script, policy):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    asked = subprocess.run([sys.executable, ROOT / script, "--help"], env=environment, capture_output=True, text=True)
    assert f"OMP_WAIT_POLICY = '{policy or 'PASSIVE'}'" in asked.stderr


def test_a_network_that_gloo_does_not_find_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    done = launch("--config", config("ddp"), "--output", tmp_path / "run", *TINY, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train_cva.py: "))
    assert "nowhere0" in line
    assert "set GLOO_SOCKET_IFNAME" in line
