"""What a monitor and `prescribe` refuse, also where the call is compiled."""

import pytest
import torch
from torch import nn

import fastrnn


@pytest.mark.parametrize("model", [None, "lstm", fastrnn.LSTM])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match="GradientMonitor takes a module"):
        fastrnn.GradientMonitor(model)


@pytest.mark.parametrize("scale", [None, "2", 0, -1.0, float("nan"), float("inf")])
def test_a_loss_scale_is_a_positive_number(scale):
    with pytest.raises(ValueError, match="loss_scale should be a positive number or a GradScaler"):
        fastrnn.GradientMonitor(fastrnn.GRU(2, 3), loss_scale=scale)


def test_prescribe_takes_a_report_alone():
    monitor = fastrnn.GradientMonitor(fastrnn.GRU(2, 3))
    for other in (monitor, [], None):
        with pytest.raises(TypeError, match=r"prescribe takes what GradientMonitor\.report\(\) returns"):
            fastrnn.prescribe(other)
    assert fastrnn.prescribe(monitor.report()) == []


@pytest.mark.parametrize("shape", [(5, 2), (4, 3)])
def test_a_compiled_call_without_room_for_its_norms_raises(shape):
    """And does not run without them: the compiler gives up on an error, and runs the rest as it can."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fastrnn.GRU(2, 3)

        def forward(self, x):
            return self.rnn(x)[0]

    torch.compiler.reset()
    model = torch.compile(Model(), backend="eager")
    with fastrnn.GradientMonitor(model, max_steps=4, batch=2) as monitor:
        with pytest.raises(ValueError, match=f"room for T = 4, B = 2; this call has {shape[0]}, {shape[1]}"):
            model(torch.ones(*shape, 2))
        model(torch.ones(4, 2, 2)).sum().backward()
    assert len(monitor.report()) == 1
