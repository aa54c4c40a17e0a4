"""What an installed fastrnn must do, whatever torch it has: `python smoke.py`, outside the repository."""

import sys
import warnings

import torch

import fastrnn
from fastrnn.backends import cpu

warnings.simplefilter("error")  # a slow way is warned of
assert cpu.MISSING is None, cpu.MISSING
x = torch.randn(64, 3, 5, dtype=torch.float64)
for module, rows in ((fastrnn.LSTM(5, 7), (1, 2, 2)), (fastrnn.GRU(5, 7, bidirectional=True), (2, 2, 1))):
    module.double()
    tap = torch.zeros(*rows, 64, 3, dtype=torch.float64, requires_grad=True)
    results = {}
    for backend in (None, "reference"):
        module.backend, tap.grad = backend, None
        output, _ = module(x, tap=tap)
        output.square().sum().backward()
        results[backend] = output.detach(), tap.grad
    module.backend = None
    assert fastrnn.explain(module, x, tap=tap).chosen == "cpu"
    for ours, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)  # float64 in another order
assert fastrnn.explain(fastrnn.GRU(5, 7), x.float()).chosen == "cpu"
print(f"fastrnn {fastrnn.__version__} with its C++ library, torch {torch.__version__}, Python {sys.version.split()[0]}")
