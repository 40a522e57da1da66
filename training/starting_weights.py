"""The weights that a run starts from: those of --init-from, once; a resumed run has its checkpoint's."""

from collections.abc import Callable

from models.pretraining import Pretraining
from models.warm_start import find, load_pretrained, origin

from .checkpoints import Checkpoint
from .launch import Launch


def load_starting_weights(
    launch: Launch, newest: Checkpoint | None, model: Pretraining, say: Callable[[str], None]
) -> tuple[str | None, str | None]:
    """Load what --init-from names into student and teacher, unless there is a checkpoint to go on from.

    Returns:
        `init_from` and `origin` of `RunFacts`.

    Raises:
        ValueError: if they cannot be read, or the run that is resumed started from others.
    """
    if newest:
        init_from = newest.meta["init_from"]
        if launch.init_from not in (None, init_from):
            raise ValueError(f"--init-from {launch.init_from}: the run to resume started from {init_from}")
        return init_from, newest.meta["origin"]
    if not launch.init_from:
        return None, None
    weights = find(launch.init_from)
    report = load_pretrained(model.student, str(weights), launch.token_order)
    model.update_teacher(momentum=0.0)  # the teacher starts as the student
    say(f"init        {report}")
    return launch.init_from, origin(launch.init_from, weights)
