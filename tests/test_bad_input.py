"""What is refused, with which exception and which words: one table, and torch.nn beside it where it refuses too."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

T, B, I, H = 5, 3, 4, 6
NO_PROBABILITY = "dropout should be a number in range [0, 1]"


def x(*shape, dtype=torch.float32, device=None):
    return torch.zeros(*(shape or (T, B, I)), dtype=dtype, device=device)


def call(name="LSTM", *args, **forward):
    """The call of a module: `(input, hx)` in args, keywords of the constructor under `build`."""
    build = forward.pop("build", {})
    return lambda library: getattr(library, name)(I, H, **build)(*args, **forward)


def build(name="LSTM", *args, **settings):
    return lambda library: getattr(library, name)(*args, **settings)


def packed():
    return pack_padded_sequence(x(), torch.tensor([5, 3, 1]))


# (what is wrong, the call given a library, exception, fragment of the message): torch.nn refuses these as well.
SHARED = [
    ("hidden_size zero", build("LSTM", I, 0), ValueError, "hidden_size must be greater than zero"),
    ("hidden_size negative", build("GRU", I, -1), ValueError, "hidden_size must be greater than zero"),
    ("hidden_size no int", build("LSTM", I, 6.0), TypeError, "hidden_size should be of type int, got: float"),
    ("input_size zero", build("RNN", 0, H), ValueError, "input_size must be greater than zero"),
    ("input_size no int", build("GRU", "4", H), TypeError, "input_size should be of type int, got: str"),
    ("num_layers zero", build("LSTM", I, H, 0), ValueError, "num_layers must be greater than zero"),
    ("num_layers no int", build("LSTM", I, H, 2.0), TypeError, ""),
    ("bias no bool", build("LSTM", I, H, bias=1), TypeError, "bias should be of type bool, got: int"),
    ("batch_first no bool", build("LSTM", I, H, batch_first="yes"), TypeError, "batch_first should be of type bool"),
    ("dropout negative", build("LSTM", I, H, 2, dropout=-0.1), ValueError, NO_PROBABILITY),
    ("dropout above one", build("GRU", I, H, 2, dropout=1.5), ValueError, NO_PROBABILITY),
    ("dropout bool", build("RNN", I, H, 2, dropout=True), ValueError, NO_PROBABILITY),
    ("dropout string", build("LSTM", I, H, 2, dropout="half"), ValueError, ""),
    ("proj_size negative", build("LSTM", I, H, proj_size=-1), ValueError, "proj_size should be a positive integer"),
    (
        "proj_size too large",
        build("LSTM", I, H, proj_size=H),
        ValueError,
        "proj_size has to be smaller than hidden_size",
    ),
    ("proj_size no int", build("LSTM", I, H, proj_size=1.5), TypeError, ""),
    (
        "proj_size of a GRU",
        build("GRU", I, H, proj_size=2),
        ValueError,
        "proj_size argument is only supported for LSTM",
    ),
    ("proj_size of an RNN", build("RNN", I, H, proj_size=2), ValueError, "only supported for LSTM"),
    ("nonlinearity unknown", build("RNN", I, H, nonlinearity="sinh"), ValueError, "nonlinearity 'sinh'"),
    ("nonlinearity of an LSTM", build("LSTM", I, H, nonlinearity="tanh"), TypeError, "nonlinearity"),
    ("keyword unknown", build("LSTM", I, H, zoneouts=0.1), TypeError, "zoneouts"),
    ("too few arguments", build("LSTM", I), TypeError, "hidden_size"),
    ("input 1-D", call("LSTM", x(I)), ValueError, "Expected input to be 2D or 3D, got 1D"),
    ("input 4-D", call("GRU", x(1, T, B, I)), ValueError, "Expected input to be 2D or 3D, got 4D"),
    ("input too wide", call("LSTM", x(T, B, I + 1)), RuntimeError, "Expected 4, got 5"),
    ("input too wide, RNN", call("RNN", x(T, B, I + 1)), RuntimeError, "Expected 4, got 5"),
    ("input too wide, unbatched", call("LSTM", x(T, I + 1)), RuntimeError, "Expected 4, got 5"),
    ("input of float64", call("LSTM", x(dtype=torch.float64)), ValueError, "does not match weight dtype"),
    ("input of float64, GRU", call("GRU", x(dtype=torch.float64)), ValueError, "does not match weight dtype"),
    ("input of int64", call("RNN", x(dtype=torch.int64)), ValueError, "torch.int64"),
    ("input without steps", call("LSTM", x(0, B, I)), RuntimeError, "sequence length to be larger than 0"),
    (
        "input without steps, batch_first",
        call("GRU", x(B, 0, I), build={"batch_first": True}),
        RuntimeError,
        "larger than 0",
    ),
    ("input on another device", call("LSTM", x(device="meta")), RuntimeError, "device"),
    ("input no tensor", call("LSTM", [[1.0]]), AttributeError, ""),
    ("h0 of the wrong batch", call("GRU", x(), x(1, B + 1, H)), RuntimeError, "(1, 3, 6), got [1, 4, 6]"),
    ("h0 of the wrong width", call("RNN", x(), x(1, B, H + 1)), RuntimeError, "(1, 3, 6), got [1, 3, 7]"),
    (
        "h0 with too few rows",
        call("GRU", x(), x(1, B, H), build={"num_layers": 2}),
        RuntimeError,
        "(2, 3, 6), got [1, 3, 6]",
    ),
    (
        "h0 2-D for a batch",
        call("GRU", x(), x(1, H)),
        RuntimeError,
        "For batched 3-D input, hx should also be 3-D but got 2-D",
    ),
    (
        "h0 3-D unbatched",
        call("GRU", x(T, I), x(1, 1, H)),
        RuntimeError,
        "For unbatched 2-D input, hx should also be 2-D but got 3-D",
    ),
    ("h0, c0 3-D unbatched", call("LSTM", x(T, I), (x(1, 1, H),) * 2), RuntimeError, "For unbatched 2-D input, hx"),
    ("h0, c0 2-D for a batch", call("LSTM", x(), (x(1, H), x(1, H))), RuntimeError, "For batched 3-D input, hx"),
    (
        "h0 of an LSTM wrong",
        call("LSTM", x(), (x(1, B, 2), x(1, B, H))),
        RuntimeError,
        "hidden[0] size (1, 3, 6), got [1, 3, 2]",
    ),
    (
        "c0 of an LSTM wrong",
        call("LSTM", x(), (x(1, B, H), x(1, B, 2))),
        RuntimeError,
        "hidden[1] size (1, 3, 6), got [1, 3, 2]",
    ),
    (
        "h0 of a projection unprojected",
        call("LSTM", x(), (x(1, B, H),) * 2, build={"proj_size": 2}),
        RuntimeError,
        "(1, 3, 2)",
    ),
    ("h0 of a packed batch", call("GRU", packed(), x(1, B + 1, H)), RuntimeError, "(1, 3, 6), got [1, 4, 6]"),
    ("h0 of float64", call("LSTM", x(), (x(1, B, H, dtype=torch.float64),) * 2), RuntimeError, "dtype"),
    (
        "packed input too wide",
        call("LSTM", pack_padded_sequence(x(T, B, 9), torch.tensor([5, 3, 1]))),
        RuntimeError,
        "Expected 4, got 9",
    ),
    ("cell: input 3-D", call("LSTMCell", x()), ValueError, "LSTMCell: Expected input to be 1D or 2D, got 3D instead"),
    (
        "cell: input 3-D, GRU",
        call("GRUCell", x()),
        ValueError,
        "GRUCell: Expected input to be 1D or 2D, got 3D instead",
    ),
    ("cell: h 3-D", call("RNNCell", x(B, I), x(1, B, H)), ValueError, "Expected h"),
    (
        "cell: c 3-D",
        call("LSTMCell", x(B, I), (x(B, H), x(1, B, H))),
        ValueError,
        "Expected hx[1] to be 1D or 2D, got 3D",
    ),
    ("cell: input too wide", call("GRUCell", x(B, I + 1)), RuntimeError, ""),
    ("cell: h of the wrong width", call("RNNCell", x(B, I), x(B, H + 1)), RuntimeError, ""),
    ("cell: h of the wrong batch", call("GRUCell", x(B, I), x(B + 1, H)), RuntimeError, ""),
    ("cell: input of float64", call("LSTMCell", x(B, I, dtype=torch.float64)), RuntimeError, "dtype"),
]

LENGTHS = {"lengths": torch.tensor([5, 3, 1])}

# The same for what torch.nn does not know.
OWN = [
    ("zoneout above one", build("LSTM", I, H, zoneout=1.1), ValueError, "zoneout should be a number in range [0, 1]"),
    ("zoneout bool", build("LSTM", I, H, zoneout=True), ValueError, "zoneout should be a number in range [0, 1]"),
    (
        "zoneout NaN",
        build("LSTM", I, H, zoneout=float("nan")),
        ValueError,
        "zoneout should be a number in range [0, 1]",
    ),
    ("zoneout of a triple", build("LSTM", I, H, zoneout=(0.1, 0.1, 0.1)), ValueError, "(p_c, p_h) for the LSTM"),
    ("zoneout pair for a GRU", build("GRU", I, H, zoneout=(0.1, 0.1)), ValueError, "(p_c, p_h) for the LSTM"),
    ("zoneout pair out of range", build("LSTM", I, H, zoneout=(0.1, -0.1)), ValueError, "zoneout should be a number"),
    (
        "recurrent_dropout",
        build("GRU", I, H, recurrent_dropout=-0.5),
        ValueError,
        "recurrent_dropout should be a number",
    ),
    ("weight_dropout", build("RNN", I, H, weight_dropout=2), ValueError, "weight_dropout should be a number"),
    ("layer_norm no bool", build("LSTM", I, H, layer_norm=1), TypeError, "layer_norm should be of type bool, got: int"),
    ("residual no bool", build("LSTM", I, H, residual="on"), TypeError, "residual should be of type bool"),
    (
        "locked_dropout no bool",
        build("LSTM", I, H, locked_dropout=0),
        TypeError,
        "locked_dropout should be of type bool",
    ),
    (
        "clip norm zero",
        build("LSTM", I, H, clip_state_grad_norm=0),
        ValueError,
        "clip_state_grad_norm should be a positive",
    ),
    ("clip norm negative", build("GRU", I, H, clip_state_grad_norm=-1.0), ValueError, "clip_state_grad_norm should be"),
    ("clip norm NaN", build("GRU", I, H, clip_state_grad_norm=float("nan")), ValueError, "clip_state_grad_norm"),
    ("clip norm infinite", build("GRU", I, H, clip_state_grad_norm=float("inf")), ValueError, "finite"),
    ("clip norm bool", build("RNN", I, H, clip_state_grad_norm=True), ValueError, "clip_state_grad_norm"),
    ("clip norm 1-D", build("LSTM", I, H, clip_state_grad_norm=torch.ones(2)), ValueError, "0-d float tensor"),
    ("clip norm of ints", build("LSTM", I, H, clip_state_grad_norm=torch.tensor(1)), ValueError, "0-d float tensor"),
    (
        "clip norm a negative tensor",
        build("LSTM", I, H, clip_state_grad_norm=torch.tensor(-1.0)),
        ValueError,
        "positive",
    ),
    ("clip norm a tensor of 0", build("GRU", I, H, clip_state_grad_norm=torch.tensor(0.0)), ValueError, "positive"),
    (
        "clip norm a tensor of NaN",
        build("GRU", I, H, clip_state_grad_norm=torch.tensor(float("nan"))),
        ValueError,
        "pos",
    ),
    (
        "clip norm an AdaptiveClip",
        build("GRU", I, H, clip_state_grad_norm=fastrnn.penalties.AdaptiveClip()),
        ValueError,
        "pass its .threshold",
    ),
    (
        "clip value negative",
        build("LSTM", I, H, clip_state_grad_value=-1),
        ValueError,
        "clip_state_grad_value should be a positive",
    ),
    ("clip value string", build("LSTM", I, H, clip_state_grad_value="1"), ValueError, "clip_state_grad_value"),
    (
        "clip value tensor",
        build("LSTM", I, H, clip_state_grad_value=torch.tensor(1.0)),
        ValueError,
        "clip_state_grad_value",
    ),
    (
        "backend unknown",
        build("LSTM", I, H, backend="cudnn"),
        ValueError,
        "unknown backend 'cudnn'; known are auto, aten",
    ),
    (
        "nonlinearity unknown lists the known",
        build("RNN", I, H, nonlinearity="gelu"),
        ValueError,
        "'tanh', 'relu', 'leaky_relu', 'elu'",
    ),
    ("cell nonlinearity unknown", build("RNNCell", I, H, nonlinearity="gelu"), ValueError, "'leaky_relu'"),
    ("cell hidden_size negative", build("LSTMCell", I, -1), RuntimeError, "hidden_size should not be negative, got -1"),
    ("cell backend unknown", build("GRUCell", I, H, backend="cudnn"), ValueError, "unknown backend 'cudnn'"),
    ("cell has no zoneout", build("LSTMCell", I, H, zoneout=0.1), TypeError, "zoneout"),
    (
        "lengths negative",
        call("LSTM", x(), lengths=torch.tensor([5, -1, 1])),
        ValueError,
        "lengths should lie within [0, 5]",
    ),
    (
        "lengths beyond T",
        call("GRU", x(), lengths=torch.tensor([5, 6, 1])),
        ValueError,
        "the number of steps, got [5, 6, 1]",
    ),
    (
        "lengths floating",
        call("LSTM", x(), lengths=torch.tensor([5.0, 3.0, 1.0])),
        ValueError,
        "integer dtype, got torch.float32",
    ),
    (
        "lengths bool",
        call("LSTM", x(), lengths=torch.tensor([True, True, True])),
        ValueError,
        "integer dtype, got torch.bool",
    ),
    ("lengths too few", call("LSTM", x(), lengths=torch.tensor([5, 3])), ValueError, "lengths should have shape (3,)"),
    ("lengths 2-D", call("LSTM", x(), lengths=torch.tensor([[5, 3, 1]])), ValueError, "lengths should have shape (3,)"),
    ("lengths beside a PackedSequence", call("LSTM", packed(), **LENGTHS), ValueError, "pass one or the other"),
    (
        "reset_mask of floats",
        call("LSTM", x(), reset_mask=x(T, B)),
        ValueError,
        "reset_mask should be of dtype torch.bool",
    ),
    (
        "reset_mask transposed",
        call("GRU", x(), reset_mask=x(B, T, dtype=torch.bool)),
        ValueError,
        "reset_mask should have shape (5, 3), got (3, 5)",
    ),
    (
        "reset_mask not transposed",
        call("GRU", x(B, T, I), reset_mask=x(T, B, dtype=torch.bool), build={"batch_first": True}),
        ValueError,
        "shape (3, 5), got (5, 3)",
    ),
    (
        "reset_mask a list of ints",
        call("GRU", x(), reset_mask=[[0] * B] * T),
        ValueError,
        "dtype torch.bool, got torch.int",
    ),
    ("reset_mask a list too short", call("GRU", x(), reset_mask=[[True] * B]), ValueError, "shape (5, 3), got (1, 3)"),
    (
        "reset_mask on another device",
        call("GRU", x(), reset_mask=x(T, B, dtype=torch.bool, device="meta")),
        RuntimeError,
        "reset_mask is on meta",
    ),
    ("tap of the wrong shape", call("LSTM", x(), tap=x(1, 2, 1, T, B)), ValueError, "= (1, 2, 2, 5, 3), got"),
    ("tap of a GRU with two states", call("GRU", x(), tap=x(1, 2, 2, T, B)), ValueError, "tap should have shape"),
    (
        "tap of float64",
        call("LSTM", x(), tap=x(1, 2, 2, T, B, dtype=torch.float64)),
        ValueError,
        "tap should be of dtype torch.float32",
    ),
    (
        "tap of bfloat16",
        call(
            "LSTM", x(dtype=torch.bfloat16), tap=x(1, 2, 2, T, B, dtype=torch.bfloat16), build={"dtype": torch.bfloat16}
        ),
        ValueError,
        "tap should be of dtype torch.float32 for torch.bfloat16",
    ),
    ("tap without grad", call("GRU", x(), tap=x(1, 2, 1, T, B)), ValueError, "tap should require grad"),
    ("tap no tensor", call("GRU", x(), tap=True), TypeError, "tap should be a tensor"),
    ("tap on another device", call("LSTM", x(), tap=x(1, 2, 2, T, B, device="meta")), RuntimeError, "tap is on meta"),
    (
        "return_cells of a GRU",
        call("GRU", x(), return_cells=True),
        ValueError,
        "return_cells needs a cell with a cell state; gru has none",
    ),
    (
        "hx of an LSTM as one tensor",
        call("LSTM", x(), x(1, B, H)),
        RuntimeError,
        "hx of an LSTM should be a pair (h0, c0), got Tensor",
    ),
    (
        "cell: hx of an LSTM as one tensor",
        call("LSTMCell", x(B, I), x(B, H)),
        RuntimeError,
        "a pair (h, c), got Tensor",
    ),
    ("cell: hx of an LSTM as a triple", call("LSTMCell", x(B, I), (x(B, H),) * 3), RuntimeError, "got 3 states"),
    ("cell: hx of another shape", call("GRUCell", x(B, I), x(B, 2)), RuntimeError, "hx[0] of shape [3, 6], got [3, 2]"),
    ("cell: hx of an unbatched one", call("RNNCell", x(I), x(2)), RuntimeError, "Expected hx[0] of shape [6], got [2]"),
    ("hx of an LSTM as a triple", call("LSTM", x(), (x(1, B, H),) * 3), RuntimeError, "(h0, c0), got tuple of 3"),
    ("h0 on another device", call("GRU", x(), x(1, B, H, device="meta")), RuntimeError, "hx[0] is on meta"),
    (
        "h0 of float64, GRU",
        call("GRU", x(), x(1, B, H, dtype=torch.float64)),
        RuntimeError,
        "hx[0] has dtype torch.float64, but input has torch.float32",
    ),
    (
        "aten forced on a feature",
        call("LSTM", x(), **LENGTHS, build={"backend": "aten"}),
        RuntimeError,
        "backend 'aten' cannot run this call: torch's own kernels take only plain calls",
    ),
    (
        "aten forced on an activation",
        call("RNN", x(), build={"backend": "aten", "nonlinearity": "elu"}),
        RuntimeError,
        "torch has no rnn_elu",
    ),
    (
        "triton forced on float64",
        call("LSTM", x(dtype=torch.float64), build={"backend": "triton", "dtype": torch.float64}),
        RuntimeError,
        "backend 'triton' cannot run this call",
    ),
]


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore:dropout option adds")
@pytest.mark.parametrize(
    "what, function, exception, fragment", SHARED + OWN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_is_refused(what, function, exception, fragment):
    error = raised(lambda: function(fastrnn))
    assert error is not None, "accepted"
    assert isinstance(error, exception), f"{type(error).__name__}: {error}"
    assert fragment in str(error)


SINCE_2_11 = ("input_size zero", "bias no bool", "batch_first no bool")  # what torch.nn of 2.10 lets pass


@pytest.mark.filterwarnings("ignore:dropout option adds")
@pytest.mark.parametrize("what, function", [row[:2] for row in SHARED], ids=[row[0] for row in SHARED])
def test_with_the_exception_of_torch_nn(what, function):
    if what in SINCE_2_11 and torch.__version__ < "2.11":
        pytest.skip("torch.nn refuses it since torch 2.11")
    theirs, ours = raised(lambda: function(nn)), raised(lambda: function(fastrnn))
    assert theirs is not None, "torch.nn accepts it: then fastrnn should too"
    assert type(ours) is type(theirs), f"torch.nn: {theirs!r}; fastrnn: {ours!r}"


# What torch.nn accepts is accepted.
ACCEPTED = [
    ("a batch of none", call("LSTM", x(T, 0, I))),
    ("unbatched", call("GRU", x(T, I), x(1, H))),
    ("hx as a list", call("LSTM", x(), [x(1, B, H), x(1, B, H)])),
    ("dropout as an int", build("LSTM", I, H, 2, dropout=1)),
    ("bidirectional as an int", build("LSTM", I, H, bidirectional=1)),
    ("hx by keyword", call("LSTM", x(), hx=(x(1, B, H), x(1, B, H)))),
    ("input by keyword", call("GRU", input=x())),
    ("a cell's batch of none", call("LSTMCell", x(0, I))),
    ("a cell unbatched", call("GRUCell", x(I), x(H))),
]


@pytest.mark.parametrize("extra", ["residual", "locked_dropout"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_what_acts_between_layers_warns_where_there_is_one(name, extra):
    with pytest.warns(UserWarning, match=f"{extra} acts between layers, and does nothing with num_layers=1"):
        getattr(fastrnn, name)(I, H, **{extra: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fastrnn, name)(I, H, 2, **{extra: True})


def test_numbers_of_numpy_are_numbers():
    for name in ("clip_state_grad_norm", "clip_state_grad_value"):
        module = fastrnn.LSTM(I, H, **{name: np.float32(0.5)})
        module(x().requires_grad_())[0].sum().backward()
        assert fastrnn.explain(module, x()).request.features == {"clip"}


@pytest.mark.parametrize("what, function", ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_what_torch_nn_accepts_is_accepted(what, function):
    theirs, ours = function(nn), function(fastrnn)
    if isinstance(theirs, tuple):
        assert ours[0].shape == theirs[0].shape


def test_a_reset_mask_may_be_an_array_or_a_list():
    module, inputs, mask = fastrnn.GRU(I, H), torch.randn(T, B, I), torch.rand(T, B) < 0.5
    expected = module(inputs, reset_mask=mask)[0]
    for other in (mask.numpy(), mask.tolist()):
        with fastrnn.GradientMonitor(module) as monitor:
            output = module(inputs, reset_mask=other)[0]
            output.sum().backward()
        assert torch.equal(output, expected) and len(monitor.report()) == 1


def test_functional_form_checks_the_same():
    params = dict(fastrnn.LSTM(I, H).named_parameters())
    with pytest.raises(ValueError, match="zoneout should be a number"):
        fastrnn.functional.lstm(x(), None, params, zoneout=2)
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        fastrnn.functional.rnn(x(), None, params, nonlinearity="sinh")
    with pytest.raises(ValueError, match="unknown backend"):
        fastrnn.functional.lstm(x(), None, params, backend="cudnn")
    with pytest.raises(TypeError, match="zone_out"):
        fastrnn.functional.lstm(x(), None, params, zone_out=0.5)


def test_values_are_not_read_back_while_compiling_or_under_vmap():
    """Lengths whose values may not be read are clamped to [0, T] instead of being refused."""
    module, inputs = fastrnn.GRU(I, H), torch.randn(T, B, I)
    expected = module(inputs, lengths=torch.tensor([5, 0, 2]))[0]

    def function(x, n):
        return module(x, lengths=n.unsqueeze(0))[0]

    wild = torch.tensor([9, -3, 2])
    got = torch.func.vmap(function, in_dims=(1, 0), out_dims=1)(inputs.unsqueeze(2), wild)
    # float32: the same sums in another batch shape
    torch.testing.assert_close(got.squeeze(2), expected, rtol=1e-5, atol=1e-6)


def test_a_scalar_as_the_state_of_an_unbatched_call():
    with pytest.raises(RuntimeError, match="hx should also be 2-D but got 0-D"):
        fastrnn.GRU(I, H)(torch.zeros(4, I), torch.zeros(()))


def test_a_setting_that_equals_an_accepted_one_is_refused_all_the_same():
    """True == 1, and settings are checked once."""
    x, module = torch.zeros(2, 1, I), fastrnn.LSTM(I, H, zoneout=(1, 0.5))
    module(x)
    module.zoneout = (True, 0.5)
    with pytest.raises(ValueError, match=r"zoneout should be a number in range \[0, 1\]"):
        module(x)


@pytest.mark.parametrize("wrong", [True, "0.1", None, 1.5])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_dropout_that_was_set_later_is_refused_on_every_path(wrong, backend):
    module = fastrnn.GRU(2, 3, num_layers=2, backend=backend)
    module.dropout = wrong
    with pytest.raises((ValueError, RuntimeError), match="dropout"):
        module(torch.zeros(4, 1, 2))
