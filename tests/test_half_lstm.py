"""An LSTM that autocast makes half runs also where torch.nn's fails, for oneDNN has no half LSTM on that processor."""

from contextlib import nullcontext

import pytest
import torch
from half_lstm import HALVES, supported, under_autocast
from setups import agree
from torch import nn
from torch.utils._pytree import tree_leaves

import fastrnn

every_half = pytest.mark.parametrize("half", HALVES, ids=str)


@every_half
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_it_has_torch_nns_dtypes_and_values(settings, gradients, half):
    torchs, x = nn.LSTM(3, 4, **settings), torch.randn(5, 2, 3)
    ours = fastrnn.convert(torchs)
    for source in (x, x[:, 0], x.transpose(0, 1)):
        with torch.set_grad_enabled(gradients):
            want = under_autocast(torchs, half, source)
            with torch.autocast("cpu", dtype=half):
                got = tree_leaves(ours(source))
        assert [v.dtype for v in got] == [v.dtype for v in tree_leaves(want)] == [half, half, half]
        # bfloat16 keeps 8 bits, 4e-3 relative: states below 1, gates of some ten terms of order one
        agree([v.float() for v in got], [v.float() for v in tree_leaves(want)], rtol=0, atol=2e-2)


@every_half
def test_torchs_kernels_are_refused_just_where_they_fail(half):
    torchs, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    ours = fastrnn.convert(torchs)
    cannot = torch.backends.mkldnn.is_available() and not supported(half)
    with torch.autocast("cpu", dtype=half):
        with pytest.raises(RuntimeError, match="primitive") if cannot else nullcontext():
            torchs(x)
        with fastrnn.backend("aten"):
            with pytest.raises(RuntimeError, match="autocast_lstm") if cannot else nullcontext():
                ours(x)
            fastrnn.convert(nn.LSTM(3, 4, proj_size=2))(x)  # these two torch runs step by step
            ours(nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]]))
    with fastrnn.backend("aten"):
        ours(x), ours.to(half)(x.to(half))
