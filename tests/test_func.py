"""Modules under torch.func: per-sample gradients, ensembles, higher derivatives, and forward mode."""

import copy

import pytest
import torch
from setups import KINDS, I, agree, every_backend, every_kind, flat, make, random, twin
from torch.func import functional_call, grad, hessian, jacrev, vmap

import fastrnn

T, B = 4, 3


def per_sample_loss(module):
    def loss(params, x):
        y, state = functional_call(module, params, (x,))
        return y.square().sum() + flat(state)[-1].sum()

    return loss


@every_backend
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_layers": 2, "bidirectional": True}, {"layer_norm": True}, {"clip_state_grad_norm": 0.1}],
    ids=str,
)
@every_kind
def test_per_sample_gradients(kind, settings, backend):
    """vmap(grad) over the batch equals one backward per sample."""
    ours = make(kind, backend, **settings)
    params = {name: p.detach() for name, p in ours.named_parameters()}
    x = random(T, B, I, requires_grad=False)
    loss = per_sample_loss(ours)
    got = vmap(grad(loss), in_dims=(None, 1))(params, x)
    for b in range(B):
        expected = grad(loss)(params, x[:, b])
        agree([got[name][b] for name in params], [expected[name] for name in params])
        values = torch.autograd.grad(loss(dict(ours.named_parameters()), x[:, b]), list(ours.parameters()))
        agree(values, [expected[name] for name in params])


@every_kind
@every_backend
def test_gradients_of_many_losses_at_once(kind, backend):
    """vmap over the backward of a forward that ran outside of any transform."""
    ours = make(kind, backend=backend)
    x = random(9, 8, I).requires_grad_()
    y = ours(x)[0]
    losses = random(3, *y.shape)
    leaves = (x, *ours.parameters())
    got = vmap(lambda loss: torch.autograd.grad(y, leaves, loss, retain_graph=True))(losses)
    for k, loss in enumerate(losses):
        agree([g[k] for g in got], torch.autograd.grad(y, leaves, loss, retain_graph=True))


@every_kind
def test_vmap_over_weights_and_lengths(kind):
    """An ensemble in which every member has its own weights; and reset masks per sample."""
    members = [make(kind) for _ in range(3)]
    for k, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.add_(0.1 * k)
    params, _ = torch.func.stack_module_state(members)
    x, base = random(T, B, I, requires_grad=False), members[0]
    got = vmap(lambda p: functional_call(base, p, (x,))[0])(params)
    agree(got, [member(x)[0] for member in members])
    got = vmap(grad(lambda p: functional_call(base, p, (x,))[0].square().sum()))(params)
    for k, member in enumerate(members):
        expected = torch.autograd.grad(member(x)[0].square().sum(), list(member.parameters()))
        agree([got[name][k] for name, _ in member.named_parameters()], expected)
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.5
    single = vmap(lambda x, r: base(x, reset_mask=r)[0], in_dims=1, out_dims=1)(x, reset)
    agree([single], [base(x, reset_mask=reset)[0]])


@every_kind
@pytest.mark.parametrize("mapped", ["weights", "input"])
def test_a_backward_from_outside_of_vmap(kind, mapped):
    """Where every tensor that requires grad is mapped over, as in training an ensemble, none inside seems to."""
    members = [make(kind) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(members)
    x = random(3, T, B, I)
    if mapped == "input":
        weights = {name: p.detach() for name, p in weights.items()}
    else:
        x = x.detach()
    leaves = (x,) if mapped == "input" else tuple(weights.values())

    def member(p, x):
        return functional_call(members[0], p, (x,))[0].square().sum()

    got = torch.autograd.grad(vmap(member)(weights, x).sum(), leaves)
    one_by_one = [member({name: p[k] for name, p in weights.items()}, x[k]) for k in range(3)]
    agree(got, torch.autograd.grad(sum(one_by_one), leaves))


def test_vmap_without_gradients_folds_the_batch():
    """There is no loop over the samples, of which PyTorch would warn."""
    model, x = make("LSTM"), random(3, T, B, I, requires_grad=False)
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        with torch.no_grad():
            got = vmap(lambda x: model(x)[0])(x)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(enabled)
    agree(got, [model(each)[0] for each in x])


@every_backend
def test_forward_mode_of_a_forced_backend_is_the_loop_s_or_refused(backend):
    """The raw op alone would silently drop the tangent."""
    model, x = make("GRU", backend).requires_grad_(False), random(T, B, I, requires_grad=False)
    _, want = torch.func.jvp(lambda x: make("GRU")(x)[0], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        if backend == "reference":
            tangent = torch.autograd.forward_ad.unpack_dual(model(dual)[0]).tangent
            agree([tangent], [want])
        else:
            with pytest.raises(NotImplementedError, match=f"{backend}.* no derivative in forward mode"):
                model(dual)
        assert torch.equal(model(x)[0], make("GRU", backend)(x)[0])


@every_kind
def test_jacobian_and_hessian(kind):
    ours, theirs_at = make(kind), random(T, I, requires_grad=False)
    jacobian = jacrev(lambda x: ours(x)[0])(theirs_at)
    rows = [
        torch.autograd.grad(ours(x)[0].flatten()[k], x)[0]
        for k in range(jacobian[..., 0, 0].numel())
        for x in [theirs_at.clone().requires_grad_()]
    ]
    agree([jacobian.flatten(0, 1)], [torch.stack(rows)])
    # forward over reverse would need a jvp; reverse over reverse is what create_graph promises
    second = jacrev(jacrev(lambda x: twin(kind, ours)(x)[0].square().sum()))
    with torch.backends.mkldnn.flags(enabled=False):
        expected = second(theirs_at)
    got = jacrev(jacrev(lambda x: ours(x)[0].square().sum()))(theirs_at)
    agree([got], [expected])
    agree([got.flatten(0, 1).flatten(1)], [got.flatten(0, 1).flatten(1).t()])


# --------------------------------------------------------------------------------------------------- higher derivatives


GRADCHECKED = [
    ("LSTM", {}),
    ("LSTM", {"layer_norm": True}),
    ("LSTM", {"bidirectional": True}),
    ("LSTM-proj", {"zoneout": 0.3}),
    ("LSTM-proj", {"layer_norm": True}),
    ("GRU", {}),
    ("GRU", {"layer_norm": True, "zoneout": 0.3}),
    ("RNN", {"num_layers": 2, "residual": True}),
    ("leaky_relu", {}),
    ("elu", {}),
]


@pytest.mark.parametrize("kind, settings", GRADCHECKED, ids=str)
def test_gradcheck_and_gradgradcheck(kind, settings):
    """First and second derivatives in float64 against differences, through module, functional and scan."""
    settings = {"dtype": torch.float64, "backend": "reference", **settings}
    torch.manual_seed(0)
    if kind in KINDS:
        name, extra = KINDS[kind]
        extra = {option: 2 for option in extra} if "proj_size" in extra else extra
        ours = getattr(fastrnn, name)(2, 3, **extra, **settings).eval()
    else:
        ours = fastrnn.RNN(2, 3, nonlinearity=kind, **settings).eval()
    names = [name for name, _ in ours.named_parameters()]
    lengths = torch.tensor([3, 1])

    def function(x, *params):
        y, state = functional_call(ours, dict(zip(names, params, strict=True)), (x,), {"lengths": lengths})
        return y, *flat(state)

    inputs = (random(3, 2, 2), *(p.detach().requires_grad_() for p in ours.parameters()))
    # gradcheck's defaults: differences of 1e-6 in float64 leave some 1e-9; atol 1e-5 and rtol 1e-3 catch any wrong term
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_backend
@every_kind
def test_gradient_penalty_equals_torch_nns_double_backward(kind, backend):
    settings = {"num_layers": 2, "bidirectional": True}
    ours = make(kind, backend, **settings)
    theirs = twin(kind, ours, **settings)

    def penalty(module):
        x = random(T, B, I)
        y, state = module(x)
        loss = y.square().sum() + sum(s.sin().sum() for s in flat(state))
        first = torch.autograd.grad(loss, (x, *module.parameters()), create_graph=True)
        total = sum(g.square().sum() for g in first)
        return (total, *torch.autograd.grad(total, (x, *module.parameters())))

    with torch.backends.mkldnn.flags(enabled=False):
        agree(penalty(ours), penalty(theirs))


# -------------------------------------------------------------------------------------------------------- forward mode


@every_kind
@pytest.mark.parametrize("steps", [4, 40])
def test_forward_mode_of_a_plain_call_is_torchs(kind, steps):
    ours = make(kind)
    theirs = fastrnn.convert(copy.deepcopy(ours), to="torch")
    x = random(steps, B, I, requires_grad=False)
    found = []
    for module in (ours, theirs):

        def total(x, module=module):
            return module(x)[0].square().sum()

        value, tangent = torch.func.jvp(total, (x,), (torch.ones_like(x),))
        found.append([value, tangent, torch.func.jacfwd(total)(x), hessian(total)(x[:2])])
    agree(*found)
