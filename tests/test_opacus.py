"""Differentially private training with Opacus: its per-sample gradients of a fastrnn layer, and its PrivacyEngine.

Opacus computes the gradients of a layer that it does not know by `torch.func`: vmap over the samples, one tensor in,
one tensor out. A layer that returns `(output, state)` needs the three lines of `Outputs` therefore. It lets nothing
draw random numbers, so the dropouts and zoneout are out of reach.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrnn

opacus = pytest.importorskip("opacus", reason="opacus is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning",  # the input needs no gradient
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
)

N, T, I, H = 5, 6, 3, 4
SETTINGS = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "layer_norm": True, "backend": "reference"}),
    ("LSTM", {"proj_size": 2}),
    ("GRU", {"num_layers": 2, "residual": True}),
    ("RNN", {"nonlinearity": "elu", "bias": False}),
]


class Classifier(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()

        class Outputs(getattr(fastrnn, kind)):
            def forward(self, x):
                return super().forward(x)[0]

        self.rnn = Outputs(I, H, batch_first=True, **settings)
        self.out = nn.Linear((settings.get("proj_size") or H) * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x):
        return self.out(self.rnn(x)[:, -1])


def data(n):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, T, I, generator=rng), torch.randint(2, (n,), generator=rng)


@pytest.mark.parametrize("kind, settings", SETTINGS, ids=str)
def test_per_sample_gradients(kind, settings):
    torch.manual_seed(0)
    plain = Classifier(kind, **settings).double()
    private = opacus.GradSampleModule(copy.deepcopy(plain), loss_reduction="sum")
    x, labels = data(N)
    x = x.double()
    F.cross_entropy(private(x), labels, reduction="sum").backward()
    per_sample = [p.grad_sample for p in private.parameters()]
    for b in range(N):
        loss = F.cross_entropy(plain(x[b : b + 1]), labels[b : b + 1])
        for got, want in zip(per_sample, torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            # float64: some ten roundings of 1e-16, which layer norms of few elements magnify some thousandfold.
            torch.testing.assert_close(got[b], want, rtol=0, atol=1e-11)


def test_the_privacy_engine_trains():
    """Clipped to 1 and without noise, a step is the sum of the clipped per-sample gradients over the batch size."""
    torch.manual_seed(0)
    model = Classifier("LSTM", backend="reference")
    before = copy.deepcopy(model)
    x, labels = data(8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=8)
    bound, rate = 0.05, 1.0
    private, optimizer, _ = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), rate), data_loader=loader,
        noise_multiplier=0.0, max_grad_norm=bound, poisson_sampling=False,
    )  # fmt: skip
    F.cross_entropy(private(x), labels).backward()
    optimizer.step()
    step = [torch.zeros_like(p) for p in before.parameters()]
    for b in range(8):
        loss = F.cross_entropy(before(x[b : b + 1]), labels[b : b + 1])
        gradients = torch.autograd.grad(loss, list(before.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > bound  # all of them are clipped
        for total, g in zip(step, gradients, strict=True):
            total += g * bound / norm / 8
    for old, new, g in zip(before.parameters(), model.parameters(), step, strict=True):
        # As above, on parameters of order one; Opacus adds 1e-6 to the norm of 0.05 and more that it divides by.
        torch.testing.assert_close(new, old - rate * g, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"recurrent_dropout": 0.5}, {"weight_dropout": 0.5}, {"zoneout": 0.5}], ids=str)
def test_random_masks_are_refused_by_torch(settings):
    private = opacus.GradSampleModule(Classifier("GRU", **settings))
    x, labels = data(N)
    with pytest.raises(RuntimeError, match="random"):
        F.cross_entropy(private(x), labels).backward()
