"""convert: there and back, what it keeps, and what it leaves alone with a warning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from setups import KINDS, H, I, agree, every_torch_kind, pair, random, results
from torch import nn
from torch.nn.utils import prune

import fastrnn

T, B = 5, 3


class Model(nn.Module):
    """Networks that are nested, shared and in a list, a cell, and a linear layer, which convert leaves alone."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(I, I), nn.ModuleDict({"rnn": nn.LSTM(I, H, 2, dropout=0.5)})["rnn"])
        self.stack = nn.ModuleList([nn.GRU(H, H, bidirectional=True), nn.RNN(2 * H, H, nonlinearity="relu")])
        self.tied = self.stack[0]
        self.cell = nn.GRUCell(H, H, bias=False)
        self.projected = nn.LSTM(H, H, proj_size=2, batch_first=True)

    def forward(self, x):
        x = self.encoder[0](x)
        x = self.encoder[1](x)[0]
        x = self.tied(self.stack[0](x)[0][..., :H])[0]
        x = self.stack[1](x)[0]
        x = torch.stack([self.cell(step) for step in x])
        return self.projected(x)[0]


RECURRENT = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


def libraries(model):
    return {type(m).__module__.split(".")[0] for m in model.modules() if type(m).__name__ in RECURRENT}


def test_convert_there_and_back():
    torch.manual_seed(0)
    model = Model().double().eval()
    reference = copy.deepcopy(model)
    parameters, x = dict(model.named_parameters()), random(T, B, I)
    expected = results_of_model(reference, x)

    assert fastrnn.convert(model) is model
    assert libraries(model) == {"fastrnn"}
    assert model.stack[0] is model.tied, "a module shared by two names stays shared"
    assert not any(m.training for m in model.modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(reference.state_dict())
    agree(expected, results_of_model(model, x))
    assert model.encoder[1].dropout == 0.5

    assert fastrnn.convert(model, "torch") is model
    assert libraries(model) == {"torch"}
    assert model.stack[0] is model.tied and repr(model) == repr(reference)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    agree(expected, results_of_model(model, x))


def results_of_model(model, x):
    y = model(x)
    return {"y": y, **dict(enumerate(torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))}


def test_convert_keeps_an_optimisers_references():
    torch.manual_seed(0)
    model = Model().double().eval()
    twin = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, twin)]
    fastrnn.convert(model)
    for _ in range(2):
        for m, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            m(random(T, B, I)).square().sum().backward()
            optimiser.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Adam divides by sqrt(v): gradients near zero magnify rounding, so a looser float64 bound.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@every_torch_kind
def test_convert_of_a_bare_module(kind):
    theirs, _ = pair(kind)
    ours = fastrnn.convert(theirs)
    assert type(ours) is getattr(fastrnn, KINDS[kind][0])
    assert ours.weight_hh_l0 is theirs.weight_hh_l0
    back = fastrnn.convert(ours, "torch")
    assert type(back) is type(theirs) and repr(back) == repr(theirs)
    x = random(T, B, I)
    agree(results(theirs, x, None), results(back, x, None))


@pytest.mark.parametrize(
    "extra, name",
    [
        ({"zoneout": 0.1}, "zoneout"),
        ({"layer_norm": True}, "layer_norm"),
        ({"clip_state_grad_norm": 1.0}, "clip_state_grad_norm"),
        ({"clip_state_grad_norm": torch.tensor(1.0)}, "clip_state_grad_norm"),
        ({"residual": True, "num_layers": 2}, "residual"),
        ({"weight_dropout": 0.5, "recurrent_dropout": 0.5}, "recurrent_dropout, weight_dropout"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_convert_back_refuses_what_torch_nn_has_not(extra, name):
    with pytest.raises(ValueError, match=name):
        fastrnn.convert(nn.Sequential(fastrnn.LSTM(I, H, **extra)), "torch")


def test_convert_back_refuses_other_nonlinearities_and_unknown_libraries():
    with pytest.raises(ValueError, match="leaky_relu"):
        fastrnn.convert(fastrnn.RNN(I, H, nonlinearity="leaky_relu"), "torch")
    with pytest.raises(ValueError, match="'fastrnn' or 'torch'"):
        fastrnn.convert(nn.LSTM(I, H), "jax")


def test_convert_leaves_subclasses_alone_and_warns():
    class Own(nn.LSTM):
        pass

    model = nn.Sequential(Own(I, H))
    with pytest.warns(UserWarning, match="Own"):
        fastrnn.convert(model)
    assert type(model[0]) is Own


def drop_weight(module, name):
    """Drop a weight as wrappers do: rename the parameter, and set the weight as an attribute before every call."""
    raw = module._parameters.pop(name)
    module.register_parameter(f"{name}_raw", nn.Parameter(raw.data))
    return lambda: setattr(module, name, F.dropout(module._parameters[f"{name}_raw"], 0.5))


def test_a_weight_that_is_not_there_before_the_call():
    """The module may change its dtype in between, as torch.nn's may."""
    theirs, ours = pair("LSTM")
    results = []
    for module in (theirs, ours):
        set_weight = drop_weight(module, "weight_hh_l0")
        module.to(torch.float32).flatten_parameters()
        torch.manual_seed(0)
        set_weight()
        results.append(module(torch.ones(T, B, I))[0])
    assert torch.equal(*results)


def test_flattening_does_not_look_at_computed_weights():
    """In training, spectral norm updates its estimate whenever the weight is read."""
    ours = nn.utils.parametrizations.spectral_norm(fastrnn.GRU(I, H), "weight_hh_l0")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.flatten_parameters()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.nn.utils.spectral_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
        lambda m: drop_weight(m, "weight_hh_l0"),
    ],
    ids=["spectral_norm", "prune", "weight drop"],
)
def test_convert_leaves_modules_alone_whose_weights_hooks_compute(change):
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    change(model[0])
    with pytest.warns(UserWarning, match="hooks or a wrapper compute"):
        fastrnn.convert(model)
    assert type(model[0]) is torch.nn.GRU and not any(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="hooks or a wrapper compute"):
        fastrnn.init.orthogonal_(model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "GRUCell"])
def test_convert_keeps_what_was_added_to_a_module(kind):
    theirs = getattr(nn, kind)(I, H)
    theirs.register_buffer("seen", torch.ones(1))
    theirs.register_buffer("scratch", torch.zeros(1), persistent=False)
    theirs.head, theirs.inner, theirs.label = nn.Linear(H, 1), nn.GRU(I, H), "encoder"
    theirs.extra = nn.Parameter(torch.ones(2))
    names = [set(theirs.state_dict()), {name for name, _ in theirs.named_buffers()}]
    ours = fastrnn.convert(theirs)
    back = fastrnn.convert(ours, "torch")
    for module, library in ((ours, fastrnn), (back, nn)):
        assert type(module) is getattr(library, kind) and module.label == "encoder"
        assert module.seen is theirs.seen and module.extra is theirs.extra and module.head is theirs.head
        assert [set(module.state_dict()), {name for name, _ in module.named_buffers()}] == names
    assert type(back.inner) is nn.GRU and back.inner.weight_hh_l0 is theirs.inner.weight_hh_l0


@pytest.mark.parametrize("name", ["bias_ih_l0", "weight_hr_l1_reverse"])
def test_convert_misses_no_weight_that_is_not_there_before_the_call(name):
    model = nn.Sequential(nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2))
    drop_weight(model[0], name)
    with pytest.warns(UserWarning, match="hooks or a wrapper compute"):
        fastrnn.convert(model)
    assert type(model[0]) is nn.LSTM


def test_convert_goes_into_what_was_added_to_a_module():
    theirs = nn.LSTM(I, H)
    theirs.inner = nn.GRU(I, H)
    assert type(fastrnn.convert(theirs).inner) is fastrnn.GRU


@pytest.mark.parametrize(
    "register",
    [
        lambda m, hook: m.register_forward_hook(hook),
        lambda m, hook: m.register_forward_pre_hook(hook),
        lambda m, hook: m.register_full_backward_hook(hook),
        lambda m, hook: m.register_full_backward_pre_hook(hook),
        lambda m, hook: m.register_state_dict_pre_hook(hook),
        lambda m, hook: m.register_state_dict_post_hook(hook),
        lambda m, hook: m.register_load_state_dict_pre_hook(hook),
        lambda m, hook: m.register_load_state_dict_post_hook(hook),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre", "state_pre", "state_post", "load_pre", "load_post"],
)
def test_convert_says_that_hooks_stay_behind(register):
    model = nn.Sequential(nn.GRU(I, H))
    register(model[0], lambda *_: None)
    with pytest.warns(UserWarning, match="GRU has hooks, which its twin does not get"):
        fastrnn.convert(model)


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "compiled", [compiled_in_place, lambda m: torch.compile(m, backend="eager")], ids=["in place", "wrapped"]
)
def test_convert_leaves_a_module_alone_that_is_compiled_by_itself(compiled):
    """Its compiled call would still run the old module."""
    model = nn.Sequential(compiled(nn.LSTM(I, H)))
    with pytest.warns(UserWarning, match="LSTM is compiled and was left as it is"):
        fastrnn.convert(model)
    assert not any(isinstance(module, fastrnn.LSTM) for module in model.modules())


def test_convert_leaves_a_module_alone_that_is_compiled_beside_itself():
    model = nn.Module()
    model.rnn = nn.GRU(I, H)
    model.fast = torch.compile(model.rnn, backend="eager")
    with pytest.warns(UserWarning, match="GRU is compiled and was left as it is"):
        fastrnn.convert(model)
    assert type(model.rnn) is nn.GRU and model.fast._orig_mod is model.rnn


def test_convert_goes_into_a_compiled_model():
    model, x = nn.Sequential(nn.LSTM(I, H)), torch.randn(T, B, I)
    expected = torch.compile(model, backend="eager")(x)[0]
    ours = fastrnn.convert(torch.compile(model, backend="eager"))
    assert type(model[0]) is fastrnn.LSTM
    torch.testing.assert_close(ours(x)[0], expected)
    model[0].zoneout = 0.9
    assert not torch.allclose(ours(x)[0], expected)


def test_convert_takes_modules_only():
    with pytest.raises(TypeError, match="convert takes a module, got"):
        fastrnn.convert({"encoder": nn.GRU(I, H)})


def test_convert_leaves_a_module_alone_whose_method_was_replaced():
    model = nn.Sequential(nn.LSTM(I, H))
    model[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="LSTM has its own forward and was left as it is"):
        fastrnn.convert(model)
    assert type(model[0]) is nn.LSTM
