"""`step` as one operation: its numbers, its memory, and what runs beside it. test_streaming.py has its weights."""

import copy
import ctypes
import threading
import time

import pytest
import torch
from setups import needs_cpu_library
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import dispatch, modules, network

pytestmark = needs_cpu_library
KINDS = [("LSTM", {}), ("GRU", {}), ("RNN", {"nonlinearity": "tanh"}), ("RNN", {"nonlinearity": "relu"})]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


@pytest.fixture
def only_the_operation(monkeypatch):
    """Makes the general path fail."""
    monkeypatch.setattr(modules._Recurrent, "forward", None)


def torch_nns(module, x, state):
    """The same by torch.nn, in float64."""
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, fastrnn.RNN) else {}
    if module.proj_size:
        options["proj_size"] = module.proj_size
    kind = getattr(torch.nn, module.mode.partition("_")[0])
    sizes = (module.input_size, module.hidden_size, module.num_layers)
    theirs = kind(*sizes, bias=module.bias, dtype=torch.float64, **options)
    theirs.load_state_dict(module.state_dict())
    with torch.no_grad():
        y, state = theirs(x.double().unsqueeze(0), torch.utils._pytree.tree_map(torch.Tensor.double, state))
    return y[0], state


def state_of(module, batch):
    h, c = (
        torch.randn(module.num_layers, batch, size, dtype=module.weight_ih_l0.dtype)
        for size in (module.proj_size or module.hidden_size, module.hidden_size)
    )
    return (h, c) if isinstance(module, fastrnn.LSTM) else h


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("layers", [{}, {"num_layers": 2, "bias": False}], ids=str)
@pytest.mark.usefixtures("only_the_operation")
def test_a_step_is_torch_nns(kind, options, dtype, tolerance, layers):
    torch.manual_seed(0)
    for input_size, hidden_size in ((1, 1), (3, 8), (8, 17), (35, 33)):  # around the lanes of a vector, and units
        module = getattr(fastrnn, kind)(input_size, hidden_size, dtype=dtype, **options, **layers)
        x, state = torch.randn(3, input_size, dtype=dtype), state_of(module, 3)
        got, want = module.step(x, state), torch_nns(module, x, state)
        for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
            assert one.dtype == dtype and not one.requires_grad
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("only_the_operation")
def test_a_projection_and_any_layout():
    torch.manual_seed(0)
    module = fastrnn.LSTM(6, 19, num_layers=2, proj_size=5, dtype=torch.float64)
    x, (h, c) = torch.randn(6, 3, dtype=torch.float64).t(), state_of(module, 3)
    want = torch_nns(module, x, (h, c))
    with torch.no_grad():
        module.weight_ih_l0.set_(module.weight_ih_l0.t().contiguous().t())
    states = (h.transpose(0, 2).contiguous().transpose(0, 2), c.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(module.step(x, states), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.step(x, [h, c]), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.usefixtures("only_the_operation")
def test_rows_and_threads_do_not_change_the_bits(kind):
    torch.manual_seed(0)
    module, threads = getattr(fastrnn, kind)(200, 200), torch.get_num_threads()
    x, state = torch.randn(5, 200), state_of(module, 5)
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(tree_leaves(module.step(x, state)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
    own = module.step(x[3:4], torch.utils._pytree.tree_map(lambda s: s[:, 3:4], state))
    assert all(
        torch.equal(one, all_rows[..., 3:4, :]) for one, all_rows in zip(tree_leaves(own), found[0], strict=True)
    )


@pytest.mark.usefixtures("only_the_operation")
def test_results_are_new_tensors_and_the_only_memory():
    module = fastrnn.LSTM(4, 8, num_layers=2)
    x, state = torch.randn(1, 4), None
    y, first = module.step(x, state)
    kept = [t.clone() for t in (y, *first)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        later, second = module.step(x, first)
    taken = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sorted(size for size in taken if size > 0) == sorted(t.nbytes for t in (later, *second))
    assert all(map(torch.equal, (y, *first), kept))
    results = [y, *first, later, *second]
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


@pytest.mark.usefixtures("only_the_operation")
def test_changed_copied_and_exchanged_weights():
    torch.manual_seed(0)
    module, other, x = fastrnn.LSTM(3, 5), fastrnn.LSTM(3, 5), torch.randn(2, 3)
    module.step(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin.step(x)[0], module.step(x)[0])
    with torch.no_grad():
        twin.weight_ih_l0[0, 0] += 1
    assert not torch.equal(twin.step(x)[0], module.step(x)[0])
    torch.utils.swap_tensors(module.weight_hh_l0, other.weight_hh_l0)
    torch.utils.swap_tensors(module.weight_ih_l0, other.weight_ih_l0)
    module.bias_ih_l0.data = other.bias_ih_l0.data
    module.bias_hh_l0.data.copy_(other.bias_hh_l0)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        setattr(other, name, torch.nn.Parameter(getattr(module, name).detach().clone()))
    assert torch.equal(module.step(x)[0], other.step(x)[0])


def test_what_step_leaves_to_the_modules_call_and_what_it_refuses():
    torch.manual_seed(0)
    module, x = fastrnn.LSTM(3, 5), torch.randn(2, 3)
    want = module.step(x)[0]
    for name in ("reference", "aten", "cpu"):
        with fastrnn.backend(name):
            torch.testing.assert_close(module.step(x)[0], want)
    torch.testing.assert_close(module.step(x.repeat(40, 1))[0][:2], want)
    torch.testing.assert_close(torch.vmap(lambda row: module.step(row)[0])(x[None])[0], want)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.step(x)[0].dtype == torch.bfloat16
    torch.testing.assert_close(module.bfloat16().step(x.bfloat16())[0].float(), want, rtol=0.05, atol=0.05)
    for name in ("lengths", "reset_mask", "tap"):
        with pytest.raises(TypeError, match=f"step takes no {name}"):
            module.step(x, **{name: None})
    for state in (torch.zeros(1, 2, 5), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4)), (torch.zeros(1, 3, 5),) * 2):
        with pytest.raises((RuntimeError, ValueError)):
            fastrnn.LSTM(3, 5).step(x, state)


def test_an_error_of_the_operation_itself_is_raised(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(network, "_STEPS", {"lstm": fails, "gru": fails})
    for module in (fastrnn.GRU(3, 5, num_layers=2), fastrnn.LSTM(3, 5, proj_size=2)):
        with pytest.raises(RuntimeError, match="out of memory"):
            module.step(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="out of memory"):
            module.step(torch.randn(2, 3), state_of(module, 2))
        with pytest.raises(RuntimeError, match=r"input\.size"):
            module.step(torch.randn(2, 4))


def test_hooks_of_the_module_are_called():
    module, seen = fastrnn.GRU(3, 5), []
    want = module.step(torch.ones(1, 3))[0]
    hook = module.register_forward_hook(lambda *call: seen.append("after"))
    before = module.register_forward_pre_hook(lambda *call: seen.append("before"))
    torch.testing.assert_close(module.step(torch.ones(1, 3))[0], want)
    assert seen == ["before", "after"]
    hook.remove()
    before.remove()
    assert torch.equal(module.step(torch.ones(1, 3))[0], want) and len(seen) == 2


def test_a_hook_that_leaves_no_state_is_named():
    module = fastrnn.GRU(3, 5)
    module.register_forward_hook(lambda module, inputs, outputs: outputs[0])
    with pytest.raises(
        RuntimeError, match="step needs the output and the state of the module's call, and got a Tensor"
    ):
        module.step(torch.ones(1, 3))


def moments_of_another_thread(call) -> list[float]:
    """When another Python thread ran during the call: 0 is its begin, 1 its end."""
    moments, done = [], threading.Event()

    def run():
        while not done.is_set():
            moments.append(time.monotonic())
            time.sleep(1e-3)

    thread = threading.Thread(target=run)
    thread.start()
    begin = time.monotonic()
    call()
    end = time.monotonic()
    done.set()
    thread.join()
    return [(moment - begin) / (end - begin) for moment in moments]


@pytest.mark.usefixtures("only_the_operation")
def test_other_python_threads_run_during_a_step(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_ROWS_IN_PLACE", 1 << 20)
    module, x = fastrnn.LSTM(256, 256), torch.randn(4096, 256)  # takes some tenths of a second
    assert any(0.3 < moment < 0.7 for moment in moments_of_another_thread(lambda: module.step(x)))
    # The measurement sees a call that keeps the interpreter's lock: libc's, by way of PyDLL.
    held = moments_of_another_thread(lambda: ctypes.PyDLL(None).usleep(200_000))
    assert not any(0.3 < moment < 0.7 for moment in held)
