"""Backend `triton` for a module, and what it refuses. `test_kernels.py` has its kernels."""

import pytest
import torch

import fastrnn
from fastrnn.arguments import IncomingGradients, Kept, ScanInputs
from fastrnn.backends import triton as launcher
from fastrnn.dispatch import FEATURES, Request
from problems import FLOAT32, check

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_module_forced_to_this_backend_equals_torch(name, device):
    module = getattr(fastrnn, name)(5, 9, bidirectional=True, backend="triton", device=device)
    twin = getattr(torch.nn, name)(5, 9, bidirectional=True, device=device)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(device)
    outputs = []
    for m in (module, twin):
        y, _ = m(x)
        y.square().sum().backward()
        outputs.append((y, *(p.grad for p in m.parameters())))
    for got, want in zip(*outputs, strict=True):
        check((got,), (want,), FLOAT32)


def test_what_the_backend_refuses(monkeypatch):
    def why_not(device="cuda", dtype=torch.float32, features=()):
        return launcher.why_not(Request("lstm", device, dtype, 4, 8, features=frozenset(features)))

    assert why_not() is None
    assert why_not(dtype=torch.bfloat16, features=FEATURES) is None
    assert "float64" in why_not(dtype=torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on cpu" in why_not("cpu")
    x = torch.ones(1, 1, 1)
    with pytest.raises(NotImplementedError, match="dsaved"):
        launcher.backward(IncomingGradients(dsaved=x), Kept(x, None, x), ScanInputs(None, x, x), None, False)
