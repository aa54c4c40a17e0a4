"""csrc's ops on CUDA against the same ops on the CPU: one source, two compilers."""

import pytest
import torch

from fastrnn.backends import extension

MISSING = extension.load("cuda") if torch.cuda.is_available() else "no CUDA GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

ops = torch.ops.fastrnn_c
PLANES = {"lstm": (4, 4), "gru": (3, 4)}  # gates, saved


def outputs(cell, device, B, H, dtype, ln):
    rng = torch.Generator().manual_seed(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    gates, planes = PLANES.get(cell, (1, 1))

    def draw(*shape, dtype=acc):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).to(device)

    gx, gh, saved = draw(B, gates * H, dtype=dtype), draw(B, gates * H), draw(B, planes * H, dtype=dtype)
    h_prev, c_prev, dh, dc = (draw(B, H) for _ in range(4))
    norm = (draw(H), draw(H)) if ln else (None, None)
    results = [*ops.cell_forward(cell, gx, gh, h_prev, c_prev, *norm), ops.row_norm(dh)]
    if cell == "lstm":
        results.append(ops.cell_total(cell, saved, c_prev, dh, dc, *norm))
    return [*results, *ops.cell_backward(cell, saved, h_prev, c_prev, dh, dc, *norm)]


@pytest.mark.parametrize("size", ((1, 1), (3, 17), (65, 257), (2, 3000), (0, 5)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    ("cell", "ln"),
    [(cell, False) for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_leaky_relu", "rnn_elu")] + [("lstm", True)],
)
def test_cuda_is_cpu(cell, ln, dtype, size):
    expected, actual, again = (outputs(cell, device, *size, dtype, ln) for device in ("cpu", "cuda", "cuda"))
    for want, got, repeated in zip(expected, actual, again, strict=True):
        assert torch.equal(got, repeated)
        # 64 units: some 20 roundings on each side, which the layer norm's 1/std can magnify; one of the storage's
        # where rounding falls to the other side.
        tolerance = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        tolerance = max(tolerance, torch.finfo(want.dtype).eps) * max(1.0, *want.abs().flatten().tolist())
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=tolerance)
