"""Which path a call takes does not show: each use of a module works, or fails with the same exception, as torch.nn's.

The lengths lie on both sides of the number of steps at which `dispatch` changes the backend, in either gradient mode.
"""

import copy
import pickle
import warnings

import pytest
import torch
from setups import fewest_steps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import evidence

I, H, B = 3, 5, 2
LONGER = 33  # where torch runs the calls at every length, which has no other side
KINDS = ("LSTM", "GRU", "RNN")
CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
FORMS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "two layers": {"num_layers": 2, "bidirectional": True},
    "packed": {},
}


class Subclass(torch.Tensor):
    pass


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def leading(states):
    return states[0] if isinstance(states, tuple) else states


def initial(module, x, dtype=torch.float32):
    D = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(D, B, H, dtype=dtype)
    return (h, h.clone()) if isinstance(module, (nn.LSTM, fastrnn.LSTM)) else h


def in_place(change):
    """The output, or another tensor of the call, is changed between forward and backward."""

    def use(module, x):
        hx = initial(module, x)
        y = module(x, hx)[0]
        y = y if torch.is_tensor(y) else y.data
        with torch.no_grad():
            change(module, x, hx)
        y.sum().backward()

    return use


def on_output(change):
    def use(module, x):
        y, states = module(x)
        y = y if torch.is_tensor(y) else y.data
        change(y, states)
        (y.sum() + leading(states).sum()).backward()

    return use


def per_sample(module, x):
    y = call_for_per_sample_grads(module, loss_reduction="sum", batch_first=module.batch_first, batch_size=B)(x)[0]
    (y if torch.is_tensor(y) else y.data).sum().backward()
    assert all(p.grad_sample.shape == (B, *p.shape) for p in module.parameters())


def jit_trace(module, x):
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x), module(x))
    traced(x)[0].sum().backward()
    assert module.weight_hh_l0.grad.any()


def subclass_as_parameters(kind):
    def use(module, x):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(p.detach().as_subclass(kind)))
        y = module(x)[0]
        (y if torch.is_tensor(y) else y.data).sum().backward()
        assert module.weight_hh_l0.grad is not None

    return use


def subclass_as_input(kind):
    def use(module, x):
        y = module(x.as_subclass(kind))[0]
        assert type(y) is kind
        y.sum().backward()

    return use


def to_dtype(dtype):
    def use(module, x):
        y = module.to(dtype)(x.to(dtype))[0]
        (y if torch.is_tensor(y) else y.data).abs().sum().backward()
        assert module.weight_hh_l0.grad.dtype == dtype

    return use


def fake(module, x):
    with FakeTensorMode():
        built = type(module)(I, H, batch_first=module.batch_first)
        built(torch.randn(x.shape))[0].sum().backward()


def inference_input(module, x):
    with torch.inference_mode():
        given = x.clone()
    module(given)[0].sum().backward()


def inference_output(module, x):
    with torch.inference_mode():
        y = module(x)[0]
    assert y.is_inference()
    y.requires_grad_()


def without_gradients(module, x):
    with torch.no_grad():
        y, states = module(x)
        kept = leading(states).clone()
        y.zero_()  # the states are no views of it
        assert torch.equal(leading(states), kept)
    leading(states).requires_grad_()


def frozen(module, x):
    y, states = module.requires_grad_(False)(x)
    y.mul_(2), leading(states).mul_(2)
    y.requires_grad_().sum().backward()


def tied(module, x):
    module.bias_hh_l0 = module.bias_ih_l0
    module(x)[0].sum().backward()


def strided_weights(module, x):
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().t().contiguous().t())
    module(x)[0].sum().backward()


def default_device(module, x):
    with torch.device("meta"):
        assert module(x)[0].device.type == "cpu"


def default_dtype(module, x):
    torch.set_default_dtype(torch.float64)
    try:
        assert module(x)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def dual_number(module, x):
    with forward_ad.dual_level():
        y = module(forward_ad.make_dual(x, torch.ones_like(x)))[0]
        assert forward_ad.unpack_dual(y).tangent is not None


def offloaded(module, x):
    with torch.autograd.graph.save_on_cpu():
        y = module(x)[0]
    y.sum().backward()


def twice(retain):
    def use(module, x):
        y = module(x)[0]
        y.sum().backward(retain_graph=retain)
        y.sum().backward()

    return use


def second_derivative(module, x):
    (g,) = torch.autograd.grad(module(x.requires_grad_())[0].sum(), x, create_graph=True)
    g.sum().backward()


def hooks(module, x):
    y, states = module(x)
    seen = []
    y.register_hook(seen.append), leading(states).register_hook(seen.append), y.retain_grad()
    (y.sum() + leading(states).sum()).backward()
    assert len(seen) == 2 and y.grad is not None


FOR_TENSORS = {
    "jit.trace": jit_trace,
    "subclass as input": subclass_as_input(Subclass),
    "overriding subclass as input": subclass_as_input(Overriding),
    "input in place": in_place(lambda module, x, hx: x.mul_(2)),
    "zero of one step": on_output(lambda y, states: y[0].zero_()),
    "detach_ of the output": lambda module, x: module(x)[0].detach_(),
    "flat view of the output": lambda module, x: module(x)[0].view(-1),
    "meta": lambda module, x: module.to("meta")(x.to("meta"))[0].sum().backward(),
    "fake tensors": fake,
    "input of inference mode": inference_input,
    "no gradients": without_gradients,
    "frozen": frozen,
    "tied biases": tied,
    "strided weights": strided_weights,
    "expanded input": lambda module, x: module(x[:, :1].expand(x.shape))[0].sum().backward(),
    "strided input": lambda module, x: module(x.mT.contiguous().mT)[0].sum().backward(),
    "lazily negated input": lambda module, x: module(torch._neg_view(x))[0].sum().backward(),
    "one element's gradient": lambda module, x: module(x)[0].sum((0, 1))[0].backward(),
    "default device": default_device,
    "default dtype": default_dtype,
    "dual number": dual_number,
    "hooks": hooks,
    "saved tensors elsewhere": offloaded,
    "backward twice": twice(False),
    "backward twice, retained": twice(True),
    "second derivative": second_derivative,
    "parameter as input": lambda module, x: module(nn.Parameter(x))[0].sum().backward(),
    "float64 input": lambda module, x: module(x.double()),
    "integer input": lambda module, x: module(x.long()),
    "float64 states": lambda module, x: module(x, initial(module, x, torch.float64)),
    "no batch": lambda module, x: module(x[:0] if module.batch_first else x[:, :0])[0].sum().backward(),
    "no step": lambda module, x: module(x[:, :0] if module.batch_first else x[:0]),
    "NumPy": lambda module, x: module(x.numpy()),
    "pickle": lambda module, x: pickle.dumps(module(x)[0].detach()),
}
FOR_ALL = {
    "per-sample gradients": per_sample,
    "complex64": to_dtype(torch.complex64),
    "complex128": to_dtype(torch.complex128),
    "float64": to_dtype(torch.float64),
    "bfloat16": to_dtype(torch.bfloat16),
    "float16": to_dtype(torch.float16),
    "subclass as parameters": subclass_as_parameters(Subclass),
    "overriding subclass as parameters": subclass_as_parameters(Overriding),
    "output in place": on_output(lambda y, states: y.mul_(2)),
    "relu_ of the output": on_output(lambda y, states: torch.relu_(y)),
    "state in place": on_output(lambda y, states: leading(states).mul_(2)),
    "W_ih in place": in_place(lambda module, x, hx: module.weight_ih_l0.mul_(2)),
    "W_hh in place": in_place(lambda module, x, hx: module.weight_hh_l0.mul_(2)),
    "biases in place": in_place(lambda module, x, hx: (module.bias_ih_l0.mul_(2), module.bias_hh_l0.mul_(2))),
    "states in place": in_place(lambda module, x, hx: leading(hx).mul_(2)),
}


def outcome(use, library, kind, form, steps):
    """None where it works, else the exception's type."""
    torch.manual_seed(0)
    module = getattr(library, kind)(I, H, **FORMS[form])
    x = torch.randn(*((B, steps) if module.batch_first else (steps, B)), I)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([steps, (steps + 1) // 2]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            use(copy.deepcopy(module), x)
    except AssertionError:
        raise
    except Exception as error:
        return type(error)
    return None


CASES = [
    *((form, name) for form in FORMS for name in FOR_ALL),
    *((form, name) for form in ("plain", "batch_first") for name in FOR_TENSORS),
]


@pytest.mark.parametrize("form, use", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_use_works_at_every_length_where_it_does_in_torch_nn(kind, form, use):
    call, packed = {**FOR_ALL, **FOR_TENSORS}[use], 0.75 if form == "packed" else None
    firsts = [fewest_steps(CELLS[kind], gradients, packed) for gradients in (True, False)]
    firsts = [steps if steps in evidence.STEPS else LONGER for steps in firsts]
    lengths = (min(firsts) - 1, max(firsts))
    want = outcome(call, nn, kind, form, lengths[0])
    found = {steps: outcome(call, fastrnn, kind, form, steps) for steps in lengths}
    assert found == dict.fromkeys(lengths, want)


def test_complex_numbers_are_refused_by_name_in_what_only_the_scan_can():
    module = fastrnn.GRU(I, H).to(torch.complex64)
    x = torch.randn(3, B, I, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"no backend can run this call.*resets.*it has no torch.complex64"):
        module(x, reset_mask=torch.zeros(3, B, dtype=torch.bool))
