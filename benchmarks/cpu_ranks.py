"""What CPU ranks need that GPUs do not, for tests and benchmarks."""

from accelerate import DistributedType, PartialState

from training.runtime import stand_alone


def offer_fsdp() -> None:
    """Accelerate offers FSDP to GPUs only; with this, before the run starts, a CPU has it too."""
    stand_alone()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
