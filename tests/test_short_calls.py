"""What a short call leaves out, to be short, makes no difference: the dispatch of an op, the check of known options."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn


class Names(TorchDispatchMode):
    """The ops that ran, by name."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", ()), str(op)]
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"num_heads": 2}, {}], ids=str)
def test_a_mode_sees_the_ops_of_a_call(options):
    torch.manual_seed(0)
    model, x = fastrnn.LSTM(3, 4, layer_norm=True, **options), torch.randn(2, 1, 3)
    expected, _ = model(x)
    with Names() as names:
        y, _ = model(x)
        y.sum().backward()
    if options:  # these ops in both calls
        assert torch.equal(y, expected)
    else:  # the whole network in one, which rounds in another order
        torch.testing.assert_close(y, expected)
    for name in ("scan_forward", "scan_backward"):
        assert f"fastrnn.{name}.default" in names.seen


def test_a_function_mode_sees_the_op_of_a_call():
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen, model = [], fastrnn.LSTM(3, 4, layer_norm=True)
    with torch.no_grad(), Functions():
        model(torch.randn(2, 1, 3))
    assert "fastrnn.scan_forward.default" in seen


@pytest.mark.parametrize("backend", (None, "reference"))
def test_tensors_without_values_get_their_shapes_from_the_op(backend):
    model = fastrnn.GRU(3, 4, layer_norm=True, device="meta", backend=backend)
    y, h = model(torch.empty(5, 2, 3, device="meta"))
    assert (y.shape, h.shape, y.device.type) == ((5, 2, 4), (1, 2, 4), "meta")
    y.sum().backward()
    assert model.weight_hh_l0.grad.is_meta


def test_known_options_are_checked_where_they_changed():
    x, h = torch.randn(2, 1, 3), torch.zeros(1, 1, 4)
    bound = torch.tensor(1.0)
    model = fastrnn.GRU(3, 4, clip_state_grad_norm=bound)
    model(x, h)
    bound.fill_(-1.0)
    with pytest.raises(ValueError, match="clip_state_grad_norm should be positive"):
        model(x, h)
    params = dict(fastrnn.GRU(3, 4).named_parameters())
    for known, wrong in ((1.0, True), (0.5, [0.5])):
        fastrnn.functional.gru(x, h, params, dropout=known)
        for _ in range(2):
            with pytest.raises(ValueError, match="dropout should be a number"):
                fastrnn.functional.gru(x, h, params, dropout=wrong)
