"""benchmarks/gpu.sh: each part on a CPU, with tiny sizes; and that it hides no failure."""

import json
import os
import subprocess
import sys

import pytest
from conftest import BIN, ROOT

from benchmarks.tables import read

PARTS = ("tests", "steps", "compiled", "memory", "views", "encoders", "resume")
PRETENDED = f"""#!/bin/sh
case "$*" in
    *views.py*) echo "out of memory" >&2; exit 3 ;;
    *dynamic_network_architectures*) exit 1 ;;
    *tables.py*) exec {sys.executable} "$@" ;;
    *pytest*) echo "PASSED tests/test_gpu.py::one"; echo "SKIPPED [1] tests/test_gpu.py:1: needs a GPU" ;;
    *) printf 'a card\\n| s/step | GB |\\n|---|---|\\n| 1 | 2 |\\n' ;;
esac
"""


def gpu_script(output, *arguments, path=BIN):
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [ROOT / "benchmarks" / "gpu.sh", "--small", "--output", output, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_on_a_cpu(part, tmp_path):
    done = gpu_script(tmp_path, part)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"all passed: {part}; in {tmp_path}"
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert all(found["tables"])
    assert len(found["tables"]) == {"tests": 3, "encoders": 3}.get(part, 1)


def test_the_last_line_names_what_failed_and_the_others_run(tmp_path):
    (tmp_path / "python").write_text(PRETENDED)
    (tmp_path / "python").chmod(0o755)
    done = gpu_script(tmp_path / "output", path=tmp_path)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("failed: tests views encoders (of "), (
        done.stdout + done.stderr
    )  # a skipped test tells nothing
    assert "out of memory" in done.stderr
    assert "dynamic-network-architectures is missing: pip install" in done.stderr
    found = json.loads((tmp_path / "output" / "resume.json").read_text())
    assert found == {"said": ["a card"], "tables": [[{"s/step": "1", "GB": "2"}]]}
    assert {path.name for path in (tmp_path / "output").glob("*.json")} == {f"{part}.json" for part in PARTS}
    assert gpu_script(tmp_path / "output", "memory", "resume", path=tmp_path).returncode == 0
    assert gpu_script(tmp_path / "output", "memroy").returncode == 2


def test_tables_of_both_styles():
    found = read(["CPU, 2 threads", "", "|part|s|", "|-|-|", "|a|1|", "|b|2|", "of noise", "| x |", "|---|", "| - |"])
    assert found["said"] == ["CPU, 2 threads", "of noise"]
    assert found["tables"] == [[{"part": "a", "s": "1"}, {"part": "b", "s": "2"}], [{"x": "-"}]]
