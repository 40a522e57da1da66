"""The optimisers of the recipes on weights that FSDP2 has cut, and steps that they leave out there."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train_cva import CVARecipe
from training.guards import skip_if_not_finite
from training.optimizer import build_optimizer
from training.recipe import load_recipe


def weights_after(recipe_name, norms, shards):
    """Of a small network after a step for each norm of its gradients."""
    recipe = load_recipe(ROOT / "recipes" / f"{recipe_name}.yaml", [], CVARecipe)
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    if shards:
        fully_shard(model)
    optimizer = build_optimizer([{"params": list(model.parameters())}], recipe)
    for step, norm in enumerate(norms):
        model(torch.arange(12.0).view(2, 6) * step).square().sum().backward()
        skip_if_not_finite(optimizer, torch.tensor(norm))
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def worker(rank, folder, recipe_name, norms):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = weights_after(recipe_name, norms, shards=True)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe_name", ["primus_m", "resenc_l"])  # AdamW and SGD
def test_shards_are_updated_as_whole_weights_are(tmp_path, recipe_name):
    norms = [1.0, 1.0, float("inf"), 1.0]
    mp.spawn(worker, (tmp_path, recipe_name, norms), nprocs=2)
    expected = weights_after(recipe_name, norms, shards=False)
    for found, weight in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-7)
