"""`lstm`, `gru`, `rnn`: a recurrent network as a function of its input and its parameters, by name.

A call is checked, a backend chosen and run, and the result brought back to the user's layout.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import aten, dispatch, export, network_call, recomputation, stack
from .activations import leaky_cell_of
from .checks import Call, check, check_leak, check_step, rnn_cell
from .equations import accumulate_dtype
from .linear import in_forward_mode, tracing, transformed
from .packing import pack, packed_lengths, packed_positions, pad
from .scan import AUTOCAST, without_autocast


def lstm(input, hx, params: Mapping[str, Tensor], *, backend=None, **options):
    """A (stacked, bidirectional) LSTM.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(..),  c' = f c + i g,  h' = o tanh(c')

    Args:
        input: `[T, B, I]`, `[B, T, I]` with `batch_first`, `[T, I]` unbatched, or a PackedSequence.
        hx: `(h0 [L*D, B, P], c0 [L*D, B, H])` (without B when unbatched), or None for zeros.
        params: the parameters under torch.nn.LSTM's names (`weight_ih_l0`, ...); the names present decide on bias,
            projection and layer norm (`ln_ih_l0 [G*H]`, `ln_hh_l0 [G*H]`, `ln_c_l0 [H]`, `ln_c_bias_l0 [H]`). A
            `weight_hh_l0 [N, G*H/N, H/N]` is in N heads.
        backend: a name of the backend table (`fastrnn.dispatch.BACKENDS`); None chooses.
        options: num_layers, bidirectional, batch_first, dropout, residual, locked_dropout, recurrent_dropout,
            recurrent_dropout_per_gate, zoneout, weight_dropout, clip_state_grad_norm, clip_state_grad_value,
            layer_norm (its kind, where `params` have one), layer_norm_eps, layer_norm_cell (None where there is no
            `ln_c_l0`), as in `fastrnn.LSTM`; training, a bool, without which no mask is drawn; lengths, reset_mask,
            decay, tap, return_cells, return_layers, as in `fastrnn.LSTM.forward`.

    Returns:
        `(output [T, B, D*P], (h_n, c_n))` as torch.nn.LSTM does, in the layout of the input; with `return_cells` also
        c `[T, B, D*H]` of every step of the last layer; with `return_layers`, as the last value, all layers' outputs.

    Raises:
        ValueError, RuntimeError, TypeError: an argument does not fit; the message names it, what came and what was
            expected. RuntimeError also where a forced backend cannot run the call.
    """
    return recurrent("lstm", input, hx, params, backend, **options)


def gru(input, hx, params: Mapping[str, Tensor], *, backend=None, **options):
    """A (stacked, bidirectional) GRU; arguments as for `lstm`, `hx` and `h_n` one tensor `[L*D, B, H]`.

    r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h' = n + z (h - n)
    """
    return recurrent("gru", input, hx, params, backend, **options)


def rnn(input, hx, params: Mapping[str, Tensor], *, nonlinearity="tanh", leak=None, backend=None, **options):
    """A (stacked, bidirectional) Elman RNN, h' = nonlinearity(W_ih x + b_ih + W_hh h + b_hh); arguments as for `gru`.

    `nonlinearity`: "tanh", "relu", "leaky_relu" (slope 0.01), "elu" (alpha 1) or a pointwise function. `leak`: a number
    a in (0, 1], h' = (1 - a) h + a nonlinearity(..); not needed where `params` has it (`leak_l0 [H]`, ...).
    """
    learnt = "leak_l0" in params
    if leak is None and not learnt:
        return recurrent(rnn_cell(nonlinearity), input, hx, params, backend, **options)
    check_leak(leak, False)
    return recurrent(leaky_cell_of(nonlinearity, leak or 1.0, learnt).text, input, hx, params, backend, **options)


def recurrent(
    cell,
    input,
    hx,
    params: Mapping[str, Tensor],
    backend=None,
    *,
    batch_first=False,
    return_cells=False,
    return_layers=False,
    watch=None,
    **options,
):
    """A network of any cell; arguments and result as of `lstm`.

    `cell`: the name of a built-in one, or what `fastrnn.cell` made. The inputs of a user's cell are keyword arguments;
    its parameters are in `params` under their names (`alpha_l0`). With more than two states, `return_cells` gives a
    tuple: every state but the first, at every step.

    `watch`: a monitor's (`monitoring/watch.py`). `watch.begin(call)` returns the call, perhaps with a tap, and a note
    of it; `watch.end(note, call, y, states)` is told what came out.
    """
    cell = _text(cell)
    call = check(
        cell, input, hx, params, batch_first=batch_first, return_cells=return_cells, return_layers=return_layers,
        **options,
    )  # fmt: skip
    note = None
    if isinstance(call.options.clip_norm, Tensor):
        call = _with_own_bound(call)
    if watch is not None:
        call, note = watch.begin(call)
    elif recomputation.some and not torch.compiler.is_compiling() and recomputation.held("tapped", False, False)[0]:
        call = with_tap(call)  # as in the forward, where a monitor was active
    name = export.choose(call.request, backend)
    params = stack.drop_weights(params, call.options)
    whole = None
    if name == "cpu" and not return_cells:
        whole = network_call.run(call, params, return_layers)
    if whole is not None:
        (y, states, layers), c = whole, None
    elif name in dispatch.TRUSTED or torch.compiler.is_compiling():
        y, states, c, layers = _run(call, params, name, return_cells, return_layers)
    else:
        try:
            y, states, c, layers = _run(call, params, name, return_cells, return_layers)
        except Exception as error:
            name = dispatch.after_failure(call.request, backend, name, error)
            y, states, c, layers = _run(call, params, name, return_cells, return_layers)
    if watch is not None:
        watch.end(note, call, y, states)
    return _present(call, input, y, states, c, layers, batch_first)


def _text(cell) -> str:
    """A cell as every backend reads it: a built-in one's name, a user's text."""
    text = cell if isinstance(cell, str) else getattr(cell, "text", None)
    if text is None:
        raise TypeError(f"cell should be a name, or made by fastrnn.cell, got {cell!r}")
    return text


def _run(call: Call, params, name: str, return_cells: bool, return_layers: bool):
    """A call on a backend: the output, the final states, c of every step and the outputs of the layers below."""
    if name != "aten":
        return _scanned(call, params, name, return_cells, return_layers)
    batch_sizes = None if call.packed is None else call.packed.batch_sizes
    return *aten.network(call.options, call.x, call.states, params, batch_sizes), None, None


def _with_own_bound(call: Call) -> Call:
    """The call with a copy of its bound, which its owner may change in place before the backward."""
    bound = call.options.clip_norm.detach().clone()
    if not torch.compiler.is_compiling():
        stored, _ = recomputation.held("bound", bound, None)
        bound = bound if stored is None else stored
    return call._replace(options=call.options._replace(clip_norm=bound))


def steps_and_batch(call: Call) -> tuple[int, int]:
    """T and B of a call."""
    return (call.x if call.packed is None else call.packed.batch_sizes).shape[0], call.states[0].shape[1]


def with_tap(call: Call, tap: Tensor | None = None) -> Call:
    """The call with `tap [L*D, 2, S, T, B]`, or with a new leaf of zeros."""
    if tap is None:
        x, states = call.x, call.states
        shape = (states[0].shape[0], 2, len(states), *steps_and_batch(call))
        tap = torch.zeros(shape, dtype=accumulate_dtype(x.dtype), device=x.device, requires_grad=True)
    return call._replace(tap=tap, request=call.request._replace(features=call.request.features | {"tap"}))


def step(cell: str, x: Tensor, states: tuple[Tensor, ...], params: Mapping[str, Tensor], backend: str | None, **norms):
    """One step, as the single-step cells take it.

    Args:
        cell: a name of the cell table.
        x: `[B, I]`.
        states: `[B, H]` each; none are zeros.
        params: of one layer, under the names of a network's first layer (`weight_ih_l0`, ...).
        backend: as of `lstm`.
        norms: layer_norm, layer_norm_eps and layer_norm_cell, as of `lstm`.

    Returns:
        The new states, a tuple.
    """
    plain = cell in aten.KNOWN_CELLS and "ln_hh_l0" not in params and params["weight_hh_l0"].dim() == 2
    # vmap knows the scan and not all of torch's cells; forward mode knows only these.
    needs_scan = not torch.compiler.is_compiling() and transformed() and not in_forward_mode()
    if plain and not needs_scan and dispatch.forced(backend) in (None, "aten"):
        return aten.step(cell, x, states, params.values())
    call = check_step(cell, x, states, params, **norms)
    name = export.choose(call.request, backend)
    _, states, _, _ = _scanned(call, params, name, step=True)
    # No views: the user may change the states in place, and detach them.
    return tuple(s[0].clone() if torch.is_grad_enabled() else s[0] for s in states)


def explain(cell, input, hx, params, *, backend=None, **options) -> dispatch.Explanation:
    """The backend table for a call: each backend, whether it can run it or why not, and what its rank rests on."""
    cell = _text(cell)
    return dispatch.explanation(check(cell, input, hx, params, **options).request, backend)


def _scanned(call: Call, params, backend: str, keep_c: bool = False, keep_layers: bool = False, step: bool = False):
    """A whole call on a scan: the output, the final states, c of every step and the outputs of the layers below."""
    x, (h0, *others), lengths, step_inputs = call.x, call.states, call.lengths, call.step_inputs
    h_dtype = c_dtype = x.dtype
    device = x.device.type
    if call.packed is not None:
        sizes = call.packed.batch_sizes  # torch.compile of 2.12 fails to read them off a PackedSequence that it traced
        x = PackedSequence(x, sizes)
        positions = packed_positions(sizes)
        lengths = packed_lengths(sizes, h0.shape[1]).to(h0.device)
        if backend != "cpu":
            x = pad(x, positions)
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        h_dtype, c_dtype = _autocast_dtypes(call, dtype, step)
        x, h0 = x.to(dtype), h0.to(dtype)
        params = {name: p.to(dtype) for name, p in params.items()}
        step_inputs = tuple(one.to(dtype) for one in step_inputs)
    with without_autocast(device):
        y, states, c, below = stack.run(
            x, (h0, *others), params, call.options, lengths=lengths, reset_mask=call.reset_mask, tap=call.tap,
            step_inputs=step_inputs, decay=call.decay, keep_c=keep_c, keep_layers=keep_layers, backend=backend,
        )  # fmt: skip
    ys = [v.to(h_dtype) for v in (*(below or ()), y)]
    states = (states[0].to(h_dtype), *(state.to(c_dtype) for state in states[1:]))
    if c is not None:
        c = _each(lambda one: one.to(c_dtype), c)
    if call.packed is not None:
        ys = [pack(v, sizes, positions).data for v in ys]
        if c is not None:
            c = _each(lambda one: pack(one, sizes, positions).data, c)
    return ys[-1], states, c, None if below is None else tuple(ys[:-1])


def _each(function, c):
    """`function` of c, or of each where it is a tuple."""
    return tuple(map(function, c)) if isinstance(c, tuple) else function(c)


def _autocast_dtypes(call: Call, dtype: torch.dtype, step: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes that torch.nn returns under autocast to `dtype`: of output and h, and of every other state.

    On a GPU that is `dtype` throughout. On a CPU autocast covers only some of torch.nn's kernels (seen on torch 2.13).
    In a single-step cell (`step`) it casts the products alone, and where the previous state enters a sum, the wider
    dtype wins.
    """
    plain, projected = call.states[0].dtype, "projection" in call.request.features
    if call.x.device.type != "cpu":
        return dtype, dtype
    if step:
        wider = torch.promote_types(dtype, call.states[-1].dtype)
        return dtype if call.options.cell.startswith("rnn") else wider, wider
    if call.options.cell == "gru" or (call.options.cell == "lstm" and call.packed is not None and not projected):
        return plain, plain
    return dtype, call.states[1].dtype if projected else dtype


def _present(call: Call, input, y, states, c, below, batch_first: bool):
    """The outputs in the user's own layout. `below`: the outputs of the layers below the last one, or None."""
    unsorted_indices = None if call.packed is None else call.packed.unsorted_indices

    def in_layout(v: Tensor):
        if call.packed is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = call.packed
            return PackedSequence(v, batch_sizes, sorted_indices, unsorted_indices)
        if input.dim() == 2:
            return v.squeeze(1)
        return v.transpose(0, 1) if batch_first else v

    if unsorted_indices is not None:
        states = tuple(s.index_select(1, unsorted_indices) for s in states)
    elif call.packed is None and input.dim() == 2:
        states = tuple(s.squeeze(1) for s in states)
    if call.packed is None and input.dim() == 3 and batch_first and y.device.type == "cpu" and not tracing():
        # In place, so that y is no view, as torch.nn's is none: detach_ takes none. On a GPU the scan keeps y.
        y = y.transpose_(0, 1)
    else:
        y = in_layout(y)
    extras = () if c is None else (_each(in_layout, c),)
    if below is not None:
        extras = (*extras, (*map(in_layout, below), y))
    return (y, states[0] if len(states) == 1 else states, *extras)
