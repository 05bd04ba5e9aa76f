import warnings
import torch
from inbatch import collectives
from inbatch.collectives import agree, all_gather, ring_shift

from tests.helpers import device


def _gather_body(rank, rows, dtype):
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(rows[rank], 3, generator=g).to(dtype).to(device()).requires_grad_()
    y = all_gather(x)
    w = torch.arange(y.numel(), dtype=torch.float32).view(y.shape).to(y)
    ((rank + 1) * (y * w)).sum().backward()
    return x.detach().cpu(), y.detach().cpu(), x.grad.cpu()


def test_gather(pool):
    for rows in ([2, 2], [2, 0, 3], [0, 0]):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            out = pool.run(_gather_body, len(rows), rows, dtype)
            full = torch.cat([x for x, _, _ in out])
            w = torch.arange(full.numel(), dtype=torch.float32).view(full.shape)
            factor = sum(range(1, len(rows) + 1))
            for (_, y, g), ww in zip(out, w.split(rows)):
                assert torch.equal(y, full)
                torch.testing.assert_close(g.double(), (factor * ww).double(), rtol=1e-2, atol=0)
