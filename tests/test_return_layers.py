"""`return_layers=True`: the outputs of all layers, held to a chain of networks of one layer each."""

import pytest
import torch
from setups import DOUBLE, every_backend
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

T, B, I, H, L = 12, 4, 3, 5, 3
KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 2}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {"nonlinearity": "elu"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **settings):
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    return getattr(fastrnn, name)(I, H, **{"num_layers": L, "dtype": torch.float64, **extra, **settings})


def chain(network, x, **call):
    """The output of each layer, by networks of one layer with the same weights."""
    outputs = []
    for layer in range(network.num_layers):
        names = {n: p for n, p in network.named_parameters() if f"_l{layer}" in n}
        one = type(network)(
            x.shape[-1], H, bidirectional=network.bidirectional, batch_first=network.batch_first, bias=network.bias,
            dtype=torch.float64, backend="reference",
            **({"proj_size": network.proj_size} if network.proj_size else {}),
            **({"nonlinearity": network.nonlinearity} if hasattr(network, "nonlinearity") else {}),
        )  # fmt: skip
        renamed = {n.replace(f"_l{layer}", "_l0"): p for n, p in names.items()}
        y = functional_call(one, renamed, (x,), call)[0]
        x = y + x if network.residual and layer > 0 else y
        outputs.append(x)
    return outputs


def data(*shape):
    return torch.randn(*(shape or (T, B, I)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def agree(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)


def gradients(layers, network, x):
    loss = sum(((k + 1) * y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for k, y in
               enumerate(layers))  # fmt: skip
    return torch.autograd.grad(loss, (x, *network.parameters()))


@every_kind
@every_backend
@pytest.mark.parametrize(
    "settings",
    [{}, {"bidirectional": True}, {"batch_first": True, "bias": False}, {"residual": True, "bidirectional": True}],
    ids=str,
)
def test_each_layer_and_its_gradient(kind, backend, settings):
    network = make(kind, backend=backend, **settings)
    x = data().requires_grad_()
    output, state, layers = network(x, return_layers=True)
    expected = chain(network, x)
    assert isinstance(layers, tuple) and layers[-1] is output
    agree(layers, expected)
    agree(gradients(layers, network, x), gradients(expected, network, x))
    with torch.no_grad():
        quiet = network(x, return_layers=True)
    agree(quiet[2], expected)
    plain = network(x)
    agree([output], [plain[0]])
    agree(state if isinstance(state, tuple) else [state], plain[1] if isinstance(state, tuple) else [plain[1]])


@every_backend
def test_lengths_resets_and_cells(backend):
    network, x = make("LSTM", backend=backend), data()
    call = {"lengths": torch.tensor([12, 3, 0, 7]), "reset_mask": torch.rand(T, B) < 0.2}
    _, _, cells, layers = network(x, **call, return_cells=True, return_layers=True)
    agree(layers, chain(network, x, **call))
    agree([cells], [network(x, **call, return_cells=True)[2]])


@every_kind
def test_every_layout(kind):
    network, x = make(kind), data()
    _, _, expected = network(x, return_layers=True)
    output, _, layers = make(kind, batch_first=True)(x.transpose(0, 1), return_layers=True)
    assert layers[-1] is output
    agree([y.transpose(0, 1) for y in layers], expected)
    agree(network(x[:, 1], return_layers=True)[2], [y[:, 1] for y in expected])


@every_backend
@pytest.mark.parametrize("lengths", [[12, 9, 4, 1], [3, 12, 1, 8]], ids=["sorted", "unsorted"])
def test_packed(backend, lengths):
    network, x = make("GRU", bidirectional=True, backend=backend), data()
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, _, layers = network(packed, return_layers=True)
    assert layers[-1] is output and all(isinstance(y, PackedSequence) for y in layers)
    expected = network(x, lengths=torch.tensor(lengths), return_layers=True)[2]
    agree([pad_packed_sequence(y)[0] for y in layers], expected)


def test_one_layer():
    network, x = make("GRU", num_layers=1), data()
    output, _, layers = network(x, return_layers=True)
    assert len(layers) == 1 and layers[0] is output
    agree([output], [network(x)[0]])


@pytest.mark.parametrize("locked", [False, True])
def test_they_are_taken_before_dropout(locked):
    network, x = make("GRU", dropout=0.9, locked_dropout=locked).train(), data()
    layers = network(x, return_layers=True)[2]
    first = network.eval()(x, return_layers=True)[2]
    agree(layers[:1], first[:1])
    assert not torch.allclose(layers[1], first[1])


@every_backend
def test_they_may_be_changed_in_place(backend):
    network, x = make("GRU", backend=backend), data()
    x.requires_grad_()
    expected = gradients(network(x, return_layers=True)[2], network, x)
    layers = network(x, return_layers=True)[2]
    for y in layers:
        y.mul_(1)
    agree(gradients(layers, network, x), expected)


def test_compile_and_vmap():
    network, x = make("LSTM", num_layers=2), data()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    agree(compiled(x, return_layers=True)[2], network(x, return_layers=True)[2])
    torch._dynamo.reset()
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters, sequence):
        return sum(
            y.square().sum() for y in functional_call(network, parameters, (sequence,), {"return_layers": True})[2]
        )

    each = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    one = grad(loss)(parameters, x[:, 2])
    agree([each[name][2] for name in parameters], [one[name] for name in parameters])


def test_under_autocast_all_layers_have_the_dtype_of_the_output():
    network, x = make("RNN", dtype=torch.float32), data().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _, layers = network(x, return_layers=True)
    assert {y.dtype for y in layers} == {output.dtype}


def test_a_monitor_sees_the_call():
    network = make("GRU", num_layers=2)
    with fastrnn.GradientMonitor(network) as monitor:
        sum(y.sum() for y in network(data(), return_layers=True)[2]).backward()
    assert len(monitor.report()) == 2


def test_torchs_own_kernels_do_not_give_them():
    network = make("GRU")
    with pytest.raises(RuntimeError, match="return_layers"):
        make("GRU", backend="aten")(data(), return_layers=True)
    assert "return_layers" in str(fastrnn.explain(network, data(), return_layers=True))
    parameters = dict(network.named_parameters())
    layers = fastrnn.functional.gru(data(), None, parameters, num_layers=L, return_layers=True)[2]
    agree(layers, network(data(), return_layers=True)[2])


def test_it_composes_with_a_probe_of_a_layer():
    """What people stack modules of one layer for: a loss on an inner layer."""
    network, head = make("LSTM"), nn.Linear(H, 1).double()
    _, _, (_, middle, _) = network(data(), return_layers=True)
    head(middle).square().mean().backward()
    assert network.weight_ih_l1.grad.any()
    assert network.weight_ih_l2.grad is None or not network.weight_ih_l2.grad.any()
