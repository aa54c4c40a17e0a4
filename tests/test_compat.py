"""Programs that ask for torch.nn's classes, derive from them, or replace them: fastrnn.compat, RNNBase, and a patch."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import compat, torch_nn

KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
NETWORKS = KINDS[:3]
T, B, I, H = 5, 3, 4, 6

every_kind = pytest.mark.parametrize("kind", KINDS)
every_network = pytest.mark.parametrize("kind", NETWORKS)
every_library = pytest.mark.parametrize("library", [fastrnn, compat], ids=["fastrnn", "compat"])


def tensors(result):
    """All tensors in a result of a module, flat."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def same(a, b):
    for one, other in zip(tensors(a), tensors(b), strict=True):
        # float32 of order 1, a few hundred roundings of 1e-7 in two orders
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def an_input(kind, batch=B):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(batch, I, generator=rng) if "Cell" in kind else torch.randn(T, batch, I, generator=rng)


def gradients(module, x):
    return torch.autograd.grad(sum(t.square().sum() for t in tensors(module(x))), list(module.parameters()))


# ---------------------------------------------------------------------------------------- the classes of fastrnn.compat


@every_kind
def test_instances_of_both_libraries(kind):
    both = getattr(compat, kind)(I, H)
    assert isinstance(both, getattr(fastrnn, kind)) and isinstance(both, getattr(nn, kind))
    if kind in NETWORKS:
        assert isinstance(both, nn.RNNBase) and isinstance(both, fastrnn.RNNBase)
    plain = getattr(fastrnn, kind)(I, H)
    both.load_state_dict(plain.state_dict(), strict=True)
    assert repr(both) == repr(plain) and list(both.state_dict()) == list(getattr(nn, kind)(I, H).state_dict())
    x = an_input(kind)
    same(both(x), plain(x))
    assert all(map(torch.equal, gradients(both, x), gradients(plain, x)))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(module):
    """As DataParallel makes one: the weights are attributes."""
    other = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(other, name, parameter.detach().clone())
    return other


@every_kind
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file, replica],
    ids=["deepcopy", "pickle", "file", "replica"],
)
def test_copies_compute_the_same(kind, clone):
    module = getattr(compat, kind)(I, H)
    other = clone(module)
    assert type(other) is type(module)
    same(other(an_input(kind)), module(an_input(kind)))
    if kind in NETWORKS:  # the flat list is that of the copy
        assert all(w is getattr(other, n) for n, w in zip(other._flat_weights_names, other._flat_weights, strict=True))
        assert not any(a is b for a, b in zip(other._flat_weights, module.parameters(), strict=True))


@every_network
def test_weights_that_are_replaced_or_moved_are_the_ones_that_count(kind):
    module, twin = getattr(compat, kind)(I, H), getattr(fastrnn, kind)(I, H)
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    twin.load_state_dict(module.state_dict())
    x = an_input(kind)
    same(module(x), twin(x))
    assert module.double()(x.double())[0].dtype == torch.float64
    assert {w.dtype for w in module._flat_weights} == {torch.float64}
    parametrized = nn.utils.parametrizations.weight_norm(getattr(compat, kind)(I, H), "weight_hh_l0")
    same(parametrized(x), copy.deepcopy(parametrized)(x))


@every_kind
@pytest.mark.parametrize("backend", ["reference", None])
def test_options_of_fastrnn(kind, backend):
    with_norm = getattr(compat, kind)(I, H, layer_norm=True, backend=backend)
    plain = getattr(fastrnn, kind)(I, H, layer_norm=True, backend=backend)
    plain.load_state_dict(with_norm.state_dict(), strict=True)
    x = an_input(kind)
    same(with_norm(x), plain(x))


@every_network
def test_the_compiler_takes_them_only_when_it_is_told_to(kind):
    """A graph break, which fullgraph refuses; the reason why they are not the default."""
    module, x = getattr(compat, kind)(I, H), an_input(kind)
    torch._dynamo.reset()
    same(torch.compile(module, backend="eager")(x), module(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(module, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        same(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------- convert


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(I, H, 2, dropout=0.5, bidirectional=True)
        self.again = self.rnn
        self.gru, self.elman = nn.GRU(2 * H, H, bias=False), nn.RNN(H, H, nonlinearity="relu")
        self.cell = nn.LSTMCell(H, H)

    def forward(self, x):
        x = self.elman(self.gru(self.rnn(x)[0])[0])[0]
        return torch.stack([self.cell(step)[0] for step in x])


def classes(model):
    return {type(m) for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase, fastrnn.RNNBase))}


def test_convert_keeps_the_type():
    model = Model().eval()
    reference, parameters, x = copy.deepcopy(model), list(model.parameters()), an_input("LSTM")
    assert fastrnn.convert(model, keep_type=True) is model
    assert classes(model) == {compat.LSTM, compat.GRU, compat.RNN, compat.LSTMCell}
    assert model.rnn is model.again and model.rnn.dropout == 0.5 and not model.rnn.training
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    same(model(x), reference(x))
    fastrnn.convert(model, to="torch")
    assert classes(model) == {nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell}
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


@every_kind
def test_convert_between_the_two_with_all_options(kind):
    options = {"layer_norm": True, "backend": "reference"}
    if kind in NETWORKS:
        options |= {"num_layers": 2, "zoneout": 0.1, "clip_state_grad_norm": torch.tensor(1.0), "residual": True}
    if kind.startswith("RNN"):
        options["nonlinearity"] = "elu"
    module = getattr(fastrnn, kind)(I, H, **options)
    module.label = "encoder"
    both = fastrnn.convert(module, keep_type=True)
    back = fastrnn.convert(both)
    assert type(both) is getattr(compat, kind) and type(back) is getattr(fastrnn, kind)
    assert repr(module) == repr(both) == repr(back) and both.label == back.label == "encoder"
    assert all(p is q for p, q in zip(module.parameters(), back.parameters(), strict=True))
    assert fastrnn.convert(both, keep_type=True) is both and fastrnn.convert(back) is back


def test_convert_keep_type_leaves_subclasses_alone_and_warns():
    class Own(fastrnn.GRU):
        pass

    class OwnOfBoth(compat.GRU):
        pass

    with pytest.warns(UserWarning, match="Own is a subclass"):
        own = fastrnn.convert(nn.Sequential(Own(I, H)), keep_type=True)[0]
    assert type(own) is Own
    assert type(fastrnn.convert(OwnOfBoth(I, H), keep_type=True)) is OwnOfBoth  # it is what was asked for
    with pytest.raises(ValueError, match="keep_type"):
        fastrnn.convert(Model(), "torch", keep_type=True)


# ------------------------------------------------------------------------------------------- files that hold a module


@every_kind
@every_library
def test_loading_a_module_with_weights_only_names_its_class(kind, library):
    """torch.load refuses a pickled module by the name of its class; allowing that one class is enough."""
    module, file = getattr(library, kind)(I, H), io.BytesIO()
    torch.save(module, file)
    name = f"{type(module).__module__}.{kind}"
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=re.escape(f"add_safe_globals([{name}])")):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([getattr(library, kind)]):
        loaded = torch.load(file, weights_only=True)
    same(loaded(an_input(kind)), module(an_input(kind)))


# ----------------------------------------------------------------------------------- what subclasses of torch.nn's use


def networks(kind, library, **settings):
    """torch.nn's module, and the library's with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torch_nn, kind)(I, H, **settings)
    ours = getattr(library, kind)(I, H, **settings)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


SETTINGS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}, {"proj_size": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@every_network
@every_library
def test_torch_nns_own_forward_runs_on_our_modules(kind, library, settings):
    """It uses all that a subclass with a forward of its own can use."""
    if "proj_size" in settings and kind != "LSTM":
        settings = {}
    theirs, ours = networks(kind, library, **settings)
    theirs_forward, x = getattr(torch_nn, kind).forward, an_input(kind)
    _, state = theirs(x)
    batch = x.shape[0 if theirs.batch_first else 1]
    packed = pack_padded_sequence(an_input(kind, batch), [2, 5, 3, 1, 4][:batch], enforce_sorted=False)
    for arguments in ((x,), (x, state), (packed,), (packed, state), (x[:, 0],)):
        same(theirs_forward(ours, *arguments), theirs(*arguments))


@every_network
@every_library
def test_checks_raise_what_torch_nn_raises(kind, library):
    theirs, ours = networks(kind, library, num_layers=2)
    h, x = torch.zeros(2, B, H), torch.zeros(T, B, I)

    def state(h, c=h):
        return (h, c) if kind == "LSTM" else h

    wrong = [(x[..., :-1], state(h), None), (x[0], state(h), None), (x, state(h[:1]), None), (x, state(h[:, :1]), None)]
    wrong += [(x, state(h), torch.tensor([B])), (x[0], state(h), torch.tensor([1]))]
    wrong += [(x, (h, h[..., :1]), None)] if kind == "LSTM" else []
    for arguments in wrong:
        messages = []
        for module in (theirs, ours):
            with pytest.raises(RuntimeError) as caught:
                module.check_forward_args(*arguments)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    order = torch.tensor([2, 0, 1])
    h = torch.randn(2, B, H)
    same(ours.permute_hidden(state(h), order), theirs.permute_hidden(state(h), order))
    assert ours.permute_hidden(h, None) is h
    for module in (theirs, ours):
        assert module.get_expected_hidden_size(x, None) == (2, B, H)
        assert module.get_expected_hidden_size(x[0], torch.tensor([2, 1])) == (2, 2, H)


@pytest.mark.parametrize("base", [nn.RNNBase, fastrnn.RNNBase], ids=["torch.nn", "fastrnn"])
def test_a_subclass_of_the_base_with_a_loop_of_its_own(base):
    """As TorchRL's and others': the base class for its parameters, the steps by hand, a mask that resets."""

    class Masked(base):
        def __init__(self, *args, **kwargs):
            super().__init__("LSTM", *args, **kwargs)

        def forward(self, x, mask):
            assert self.mode == "LSTM" and len(self._flat_weights) == 4 * self.num_layers
            steps = x
            for names in self._all_weights:
                w_ih, w_hh, b_ih, b_hh = (getattr(self, name) for name in names)
                h = c = x.new_zeros(x.shape[1], self.hidden_size)
                outputs = []
                for step, keep in zip(steps, mask, strict=True):
                    h, c = torch.lstm_cell(step, (h * keep, c * keep), w_ih, w_hh, b_ih, b_hh)
                    outputs.append(h)
                steps = torch.stack(outputs)
            return steps

    torch.manual_seed(0)
    module = Masked(I, H, num_layers=2)
    torch.manual_seed(0)
    weights = nn.LSTM(I, H, 2).state_dict()
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())  # the same draws
    mask = torch.ones(T, B, 1)
    mask[2, 1] = 0
    network = fastrnn.LSTM(I, H, 2)
    network.load_state_dict(weights)
    same(module(an_input("LSTM"), mask), network(an_input("LSTM"), reset_mask=mask[..., 0] == 0)[0])


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_the_base_takes_torch_nns_arguments(mode):
    arguments = (mode, I, H, 2, False, True, 0.0, True)
    torch.manual_seed(0)
    theirs = nn.RNNBase(*arguments)
    torch.manual_seed(0)
    ours = fastrnn.RNNBase(*arguments)
    kind = mode.split("_")[0]
    assert ours.mode == mode and str(ours) == str(theirs)
    settings = {"num_layers": 2, "bias": False, "batch_first": True, "bidirectional": True}
    theirs = getattr(nn, kind)(I, H, **settings, **({"nonlinearity": "relu"} if mode == "RNN_RELU" else {}))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    same(ours(an_input(kind)), theirs(an_input(kind)))
    assert fastrnn.RNNBase(mode, I, H, proj_size=0).proj_size == 0
    assert all(issubclass(getattr(fastrnn, kind), fastrnn.RNNBase) for kind in NETWORKS)


def test_the_base_refuses():
    with pytest.raises(ValueError, match="Unrecognized RNN mode: lstm; it should be one of LSTM, GRU, RNN_TANH"):
        fastrnn.RNNBase("lstm", I, H)
    with pytest.raises(ValueError, match="proj_size"):
        fastrnn.RNNBase("GRU", I, H, proj_size=2)


# ----------------------------------------------------------------------------------------- what published programs do


def hidden_of(module, x):
    """Asks for the class to know the form of the state."""
    _, state = module(x)
    return state[0] if isinstance(module, nn.LSTM) else state


def draw_by_type(module):
    if isinstance(module, nn.LSTM):
        for name, parameter in module.named_parameters():
            if "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
            elif "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
                parameter.data[module.hidden_size : 2 * module.hidden_size].fill_(1)


def draw_by_names(module):
    if isinstance(module, (nn.RNN, nn.GRU, nn.LSTM)):
        for layer in module._all_weights:
            for name in layer:
                if name.startswith("weight"):
                    nn.init.uniform_(getattr(module, name), -0.1, 0.1)
                else:
                    nn.init.constant_(module.__getattr__(name), 0.5)


@pytest.mark.parametrize("draw", [draw_by_type, draw_by_names])
def test_initialisers_that_ask_for_the_class(draw):
    models = [nn.Sequential(nn.LSTM(I, H, 2, bidirectional=True))]
    models.append(fastrnn.convert(copy.deepcopy(models[0]), keep_type=True))
    for model in models:
        torch.manual_seed(3)
        model.apply(draw)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    before = copy.deepcopy(models[1].state_dict())
    torch.manual_seed(4)
    models[1].apply(draw)
    assert not torch.equal(before["0.weight_hh_l0"], models[1][0].weight_hh_l0)


@every_network
def test_a_program_that_asks_for_the_class_to_know_the_state(kind):
    module = fastrnn.convert(getattr(nn, kind)(I, H), keep_type=True)
    assert hidden_of(module, an_input(kind)).shape == (1, B, H)


class WeightDrop(nn.Module):
    """As AWD-LSTM's: the weight becomes an attribute that is drawn before every call."""

    def __init__(self, module, name="weight_hh_l0"):
        super().__init__()
        self.module, self.name = module, name
        weight = getattr(module, name)
        delattr(module, name)
        self.register_parameter(f"{name}_raw", nn.Parameter(weight.data))
        setattr(module, name, weight.clone())
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters = lambda: None

    def forward(self, x):
        raw = getattr(self, f"{self.name}_raw")
        setattr(self.module, self.name, F.dropout(raw, 0.5, training=self.training))
        return self.module(x)


@every_network
@every_library
def test_weight_drop(kind, library):
    theirs, ours = (WeightDrop(module) for module in networks(kind, library))
    results = []
    for wrapper in (theirs, ours):
        torch.manual_seed(5)
        results.append((wrapper(an_input(kind)), gradients(wrapper, an_input(kind))))
    same(*results)
    assert ours.module._flat_weights[1] is ours.module.weight_hh_l0


@every_network
def test_a_computed_weight_is_computed_once_per_call(kind):
    """torch.nn computes it four times, which docs/migrating.md says: spectral norm's iterations count them."""
    counts = []
    for library in (nn, fastrnn, compat):
        calls = []

        class Counted(nn.Module):
            def forward(self, weight, calls=calls):
                calls.append(1)
                return weight * 1

        module = getattr(library, kind)(I, H)
        nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Counted())
        calls.clear()
        module(an_input(kind))
        counts.append(len(calls))
    assert counts == [4, 1, 1]


@every_library
def test_the_flat_list_may_be_set(library):
    """As copies of torch.nn's own code set it, and as programs that swap the weights do."""
    module = library.LSTM(I, H)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    assert len(list(module.parameters())) == 4
    new = [nn.Parameter(torch.zeros_like(w)) for w in module._flat_weights]
    module._flat_weights = new
    assert module.weight_hh_l0 is new[1] and all(a is b for a, b in zip(module.parameters(), new, strict=True))
    module._init_flat_weights()
    module._update_flat_weights()
    assert not module._weights_have_changed() and float(module(an_input("LSTM"))[0].detach().abs().max()) == 0


# ------------------------------------------------------------------------------------- torch.nn.LSTM = fastrnn.LSTM


@pytest.fixture
def patched(monkeypatch):
    """torch.nn's classes replaced by fastrnn's, as some programs do; gives torch's own."""
    own = {kind: getattr(nn, kind) for kind in (*KINDS, "RNNBase")}
    for kind in own:
        monkeypatch.setattr(nn, kind, getattr(fastrnn, kind))
        monkeypatch.setattr(nn.modules.rnn, kind, getattr(fastrnn, kind))
    return own


@every_kind
@pytest.mark.parametrize("keep_type", [False, True])
def test_convert_after_a_patch(patched, kind, keep_type):
    theirs = patched[kind](I, H)
    ours = fastrnn.convert(nn.Sequential(theirs), keep_type=keep_type)[0]
    assert type(ours) is getattr(compat if keep_type else fastrnn, kind)
    back = fastrnn.convert(nn.Sequential(ours), "torch")[0]
    assert type(back) is patched[kind] and back.weight_hh_l0 is theirs.weight_hh_l0 if kind in NETWORKS else True
    same(ours(an_input(kind)), back(an_input(kind)))
    assert type(fastrnn.convert(nn.Sequential(getattr(nn, kind)(I, H)), "torch")[0]) is patched[kind]


@every_kind
def test_init_after_a_patch(patched, kind):
    for module in (patched[kind](I, H), getattr(nn, kind)(I, H)):
        fastrnn.init.orthogonal_(nn.Sequential(module))
        weight = next(p for name, p in module.named_parameters() if name.startswith("weight_hh"))[:H]
        torch.testing.assert_close(weight @ weight.T, torch.eye(H), rtol=0, atol=1e-5)  # float32


def test_the_rest_after_a_patch(patched):
    rnn, x = nn.LSTM(I, H), an_input("LSTM")
    assert isinstance(rnn, nn.RNNBase) and type(rnn) is fastrnn.LSTM
    assert "aten" in str(fastrnn.explain(rnn, x)) and "aten" in str(fastrnn.explain(nn.GRUCell(I, H), x[0]))
    with pytest.raises(TypeError, match=r"explain takes a fastrnn\.LSTM, GRU, RNN or cell"):
        fastrnn.explain(patched["LSTM"](I, H), x)
    with fastrnn.GradientMonitor(nn.Sequential(rnn)) as monitor:
        rnn(x)[0].sum().backward()
    assert len(monitor.report()) > 0
    with pytest.raises(ValueError, match=r"holds no fastrnn\.LSTM, GRU or RNN"):
        fastrnn.GradientMonitor(nn.Sequential(patched["LSTM"](I, H)))
    assert fastrnn.penalties.omega(rnn, x, lambda y: y.sum()).isfinite()
    with pytest.raises(ValueError, match="omega takes a fastrnn"):
        fastrnn.penalties.omega(patched["LSTM"](I, H), x, lambda y: y.sum())
    assert isinstance(compat.LSTM(I, H), patched["LSTM"])
