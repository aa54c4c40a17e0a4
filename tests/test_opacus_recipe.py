"""The recipe for Opacus in docs/recipes.md: no subclass, and both ways in which Opacus takes per-sample gradients."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrnn

opacus = pytest.importorskip("opacus", reason="opacus is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # the input needs no gradient

N, T, I, H = 5, 6, 3, 4
RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"


class Classifier(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = getattr(fastrnn, kind)(I, H, batch_first=True, **settings)
        self.rnn.register_forward_hook(lambda rnn, arguments, result: result[0])
        self.head = nn.Linear(H * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x):
        return self.head(self.rnn(x)[:, -1])


def agree(private, plain, x, labels):
    """Per-sample gradients of a private model against those of the plain one on each sample alone."""
    F.cross_entropy(private(x), labels, reduction="sum").backward()
    per_sample = [p.grad_sample for p in private.parameters()]
    for b in range(len(x)):
        loss = F.cross_entropy(plain(x[b : b + 1]), labels[b : b + 1])
        for got, want in zip(per_sample, torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            # Some ten to a hundred roundings: of 1e-7 in float32, of 1e-16 in float64.
            torch.testing.assert_close(got[b], want, rtol=0, atol=1e-5 if x.dtype == torch.float32 else 1e-11)


def data(n=N, steps=T):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, steps, I, generator=rng), torch.randint(2, (n,), generator=rng)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("LSTM", {}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "layer_norm": True, "backend": "reference"}),
        ("GRU", {"num_layers": 2, "residual": True}),
        ("RNN", {"nonlinearity": "elu", "bias": False}),
    ],
    ids=str,
)
def test_hooks(mode, kind, settings):
    torch.manual_seed(0)
    model = Classifier(kind, **settings).double()
    private = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum", force_functorch=mode == "functorch")
    x, labels = data()
    agree(private, model, x.double(), labels)


@pytest.mark.parametrize("steps", [T, 40])  # both sides of every threshold of dispatch
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_expanded_weights(kind, steps):
    """torch's decomposition of its LSTM refuses oneDNN's, torch.nn's own module's too."""
    torch.manual_seed(0)
    model = Classifier(kind)
    private = opacus.grad_sample.GradSampleModuleExpandedWeights(copy.deepcopy(model), loss_reduction="sum")
    with torch.backends.mkldnn.flags(enabled=False):
        agree(private, model, *data(steps=steps))


@pytest.mark.parametrize("mode", ["hooks", "ew"])
def test_the_privacy_engine_trains(mode):
    torch.manual_seed(0)
    model = Classifier("GRU")
    before = copy.deepcopy(model.state_dict())
    x, labels = data(8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=8)
    private, optimizer, _ = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), data_loader=loader, noise_multiplier=0.0,
        max_grad_norm=1e6, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    F.cross_entropy(private(x), labels).backward()
    optimizer.step()
    plain = Classifier("GRU")
    plain.load_state_dict(before)
    F.cross_entropy(plain(x), labels).backward()
    for new, (name, old) in zip(model.parameters(), plain.named_parameters(), strict=True):
        # nothing is clipped and nothing added: a plain step, in float32
        torch.testing.assert_close(new, before[name] - old.grad, rtol=0, atol=1e-5)


def test_the_recipe_runs():
    blocks = re.findall(r"^```py\n(.*?)^```", RECIPES.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1 and "import opacus" in blocks[0]
    names = {"torch": torch, "fastrnn": fastrnn, "observation": I, "hidden": H, "sequences": torch.randn(16, 40, I)}
    exec(compile(blocks[0], str(RECIPES), "exec"), names)
    assert names["per_sample"].shape == (16, 4 * H, H)
