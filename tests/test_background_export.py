"""What a run gives away is written while it trains on; what goes wrong there ends no run."""

import io
import threading
from contextlib import redirect_stderr

import pytest
from conftest import TINY, config

import train_cva
import training.export
from benchmarks.script_runs import in_new_process, train

CHECKPOINTS = [*TINY, "train.steps=8", "run.checkpoint_every=2"]


def run_with(output, volumes, fails_at, *numbers) -> tuple[list[int], str, str | None]:
    """Steps whose files were written, what was said, and the error of the run; in a process of its own.

    Args:
        fails_at: steps whose files meet a full disk.
    """
    write, steps, threads = training.export.write_run, [], set()

    def write_or_fail(student, weights, facts, terms, step, folder):
        threads.add(threading.current_thread() is threading.main_thread())
        if step in fails_at:
            raise OSError(28, "No space left on device", str(folder.encoder))
        write(student, weights, facts, terms, step, folder)
        steps.append(step)

    def wait_for_it(run, recipe, step):  # so that none is left out because the one before is not done
        train_cva.write_results(run, recipe, step)
        if pending := run.background.pending:
            pending.exception()

    training.export.write_run, training.export.draw_report = write_or_fail, lambda *_: None
    said, error = io.StringIO(), None
    with redirect_stderr(said):
        try:
            train(
                ["--config", config("ddp"), "--data", volumes, "--output", output, *CHECKPOINTS, *numbers], wait_for_it
            )
        except OSError as failed:
            error = str(failed)
    assert threads == {False}
    return steps, said.getvalue(), error


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 4, 6, 8]), (2, [4, 8]), (5, [8])])
def test_every_so_many_checkpoints_and_at_the_end(every, steps, tmp_path, volumes):
    found, _, error = in_new_process(run_with, tmp_path / "run", volumes, [], f"run.export_every={every}")
    assert (found, error) == (steps, None)


def test_a_failed_one_is_named_and_the_run_goes_on(tmp_path, volumes):
    steps, said, error = in_new_process(run_with, tmp_path / "run", volumes, [4])
    assert (steps, error) == ([2, 6, 8], None)
    (line,) = (line for line in said.splitlines() if "export      failed" in line)
    assert "No space left on device" in line
    assert "encoder" in line


def test_at_the_end_there_is_nothing_to_go_on_with(tmp_path, volumes):
    steps, said, error = in_new_process(run_with, tmp_path / "run", volumes, [8])
    assert steps == [2, 4, 6]
    assert "No space left on device" in error
    assert "export      failed" in said
