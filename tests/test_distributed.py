"""World size does not change the result: two real gloo ranks against one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_models import batch, tiny_cva

from models.heads import GlobalBatchNorm


def share(data, rank, ranks):
    """One rank's slice of a view-major batch."""
    return {
        k: v.unflatten(0, (2, -1)).chunk(ranks, dim=1)[rank].flatten(0, 1).contiguous() if torch.is_tensor(v) else v
        for k, v in data.items()
    }


def losses_and_gradients(architecture, rank=0, ranks=1):
    model = tiny_cva(architecture)
    losses = model(**share(batch(4), rank, ranks))
    losses["loss"].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    parts = torch.stack([losses[k].detach() for k in ("loss", "reconstruction", "consistency", "contrastive")])
    return parts, gradients


def worker(rank, ranks, architecture, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    parts, gradients = losses_and_gradients(architecture, rank, ranks)
    for tensor in (parts, *gradients.values()):  # what data parallel training does
        dist.all_reduce(tensor)
        tensor /= ranks
    if rank == 0:
        torch.save((parts, gradients), Path(folder) / "result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_two_ranks_equal_one(architecture, tmp_path):
    mp.spawn(worker, args=(2, architecture, str(tmp_path)), nprocs=2)
    parts, gradients = torch.load(tmp_path / "result.pt")
    expected_parts, expected = losses_and_gradients(architecture)
    torch.testing.assert_close(parts, expected_parts, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    scale = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-5 * scale, name


def test_batch_norm_uses_the_batch_alone():
    rows = torch.randn(50, 8) * 3 + 5
    out = GlobalBatchNorm()(rows)
    torch.testing.assert_close(out.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(8), atol=1e-4, rtol=0)
    assert not list(GlobalBatchNorm().parameters())
    assert not list(GlobalBatchNorm().buffers())
