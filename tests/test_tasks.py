"""The tasks are what their papers say: each property is read off the values, not off the code."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from fastrnn import tasks


def rng(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


SYNTHETIC = [tasks.adding_problem, tasks.copy_memory, tasks.temporal_order]


# --- all synthetic tasks --------------------------------------------------------------------------


@pytest.mark.parametrize("task", SYNTHETIC)
def test_one_generator_state_gives_one_batch(task):
    x, target = task(7, 20, rng(3))
    again, target_again = task(7, 20, rng(3))
    other, _ = task(7, 20, rng(4))
    assert torch.equal(x, again) and torch.equal(target, target_again)
    assert not torch.equal(x, other)


@pytest.mark.parametrize("task", SYNTHETIC)
def test_successive_batches_differ(task):
    generator = rng()
    assert not torch.equal(task(7, 20, generator)[0], task(7, 20, generator)[0])


@pytest.mark.parametrize("task", SYNTHETIC)
def test_global_random_state_is_left_alone(task):
    before = torch.get_rng_state()
    task(7, 20, rng())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("task", SYNTHETIC)
def test_empty_batch(task):
    x, target = task(0, 20, rng())
    full_x, full_target = task(1, 20, rng())
    batch_dim = 1 if task is tasks.copy_memory else 0
    assert x.shape == (full_x.shape[0], 0, full_x.shape[2])
    assert target.ndim == full_target.ndim and target.shape[batch_dim] == 0


@pytest.mark.parametrize("task, least", [(tasks.adding_problem, 2), (tasks.copy_memory, 1), (tasks.temporal_order, 10)])
def test_shortest_length_works_and_shorter_is_refused(task, least):
    task(3, least, rng())
    with pytest.raises(ValueError, match=rf"T must be at least {least}, got {least - 1}"):
        task(3, least - 1, rng())
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        task(-1, least, rng())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("task", SYNTHETIC)
def test_result_lies_on_the_generators_device(task):
    x, target = task(7, 20, rng(device="cuda"))
    assert x.is_cuda and target.is_cuda


# --- adding problem -------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 3, 17, 50])
def test_adding_marks_one_step_of_each_half_and_sums_them(T):
    x, target = tasks.adding_problem(64, T, rng(T))
    assert x.shape == (T, 64, 2) and x.dtype == torch.float32
    assert target.shape == (64, 1) and target.dtype == torch.float32
    values, markers = x.unbind(-1)
    assert ((values >= 0) & (values < 1)).all()
    for b in range(64):
        marked = [t for t in range(T) if markers[t, b] == 1]
        assert len(marked) == 2 and marked[0] < T // 2 <= marked[1]
        assert (markers[:, b] == 0).sum() == T - 2
        # Two float32 numbers below 1: their sum is rounded once, in whichever order.
        assert target[b, 0] == values[marked[0], b] + values[marked[1], b]


def test_adding_marks_reach_every_step():
    # 7 steps, 2,000 sequences: a step is never marked with probability below (3/4)^2000.
    markers = tasks.adding_problem(2000, 7, rng())[0][..., 1]
    assert (markers.sum(1) > 0).all()
    # The steps of a half are equally likely: the count of each is within 5 standard deviations.
    for steps in (markers[:3], markers[3:]):
        p = 1 / len(steps)
        deviation = (steps.sum(1) - 2000 * p).abs().max()
        assert deviation < 5 * math.sqrt(2000 * p * (1 - p))


def test_adding_baseline_is_the_error_of_answering_one():
    _, target = tasks.adding_problem(50_000, 4, rng())
    # (s - 1)^2, with s a sum of two U[0, 1), has variance 7/180: five deviations of the mean of 50,000.
    assert (target - 1).square().mean().item() == pytest.approx(tasks.ADDING_BASELINE, abs=4.5e-3)


# --- copy memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 30])
def test_copy_has_the_layout_of_the_paper(T):
    x, target = tasks.copy_memory(32, T, rng(T))
    assert x.shape == (T + 20, 32, 10) and x.dtype == torch.float32
    assert target.shape == (T + 20, 32) and target.dtype == torch.int64
    assert torch.equal(x.sum(-1), torch.ones(T + 20, 32)) and torch.equal(x.max(-1).values, x.sum(-1))
    shown = x.argmax(-1)
    assert (shown[:10] < 8).all()
    assert (shown[10 : T + 9] == 8).all() and len(shown[10 : T + 9]) == T - 1
    assert (shown[T + 9] == 9).all()
    assert (shown[T + 10 :] == 8).all()
    assert (target[: T + 10] == 8).all()
    assert torch.equal(target[T + 10 :], shown[:10])


def test_copy_uses_all_eight_symbols_equally():
    _, target = tasks.copy_memory(2000, 1, rng())
    counts = torch.bincount(target[-10:].flatten(), minlength=9)
    assert len(counts) == 9 and counts[8] == 0
    # 20,000 draws, p = 1/8: five standard deviations.
    assert (counts[:8] - 2500).abs().max() < 5 * math.sqrt(20_000 * 1 / 8 * 7 / 8)


def test_copy_baseline_is_the_loss_of_the_best_answer_without_memory():
    T = 50
    _, target = tasks.copy_memory(8, T, rng())
    logits = torch.full((T + 20, 8, 9), -1e9)
    logits[: T + 10, :, 8] = 0  # sure of the blank
    logits[T + 10 :, :, :8] = 0  # guesses among the eight
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert loss.item() == pytest.approx(tasks.copy_memory_baseline(T), rel=1e-5)  # float32 mean of 560 terms
    assert tasks.copy_memory_baseline(T) == pytest.approx(10 * 3 * math.log(2) / 70)


# --- temporal order -------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [10, 25, 100])
def test_temporal_order_target_follows_from_the_sequence(T):
    x, target = tasks.temporal_order(64, T, rng(T))
    assert x.shape == (T, 64, 6) and x.dtype == torch.float32
    assert target.shape == (64,) and target.dtype == torch.int64
    assert torch.equal(x.sum(-1), torch.ones(T, 64)) and torch.equal(x.max(-1).values, x.sum(-1))
    symbols = x.argmax(-1)
    for b in range(64):
        steps = [t for t in range(T) if symbols[t, b] < 2]
        assert len(steps) == 2
        assert T // 10 <= steps[0] < 2 * (T // 10) and T // 2 <= steps[1] < T // 2 + T // 10
        word = "".join("AB"[symbols[t, b]] for t in steps)
        assert ["AA", "AB", "BA", "BB"][target[b]] == word


def test_temporal_order_is_balanced():
    x, target = tasks.temporal_order(4000, 30, rng())
    # 4,000 draws, p = 1/4: five standard deviations.
    assert (torch.bincount(target, minlength=4) - 1000).abs().max() < 5 * math.sqrt(4000 * 1 / 4 * 3 / 4)
    counts = torch.bincount(x.argmax(-1).flatten(), minlength=6)
    noise = 4000 * 28
    assert (counts[2:] - noise / 4).abs().max() < 5 * math.sqrt(noise * 1 / 4 * 3 / 4)
    # Both positions move: three steps each, all of them used.
    marked_steps = (x[..., :2].sum(-1).sum(1) > 0).nonzero().flatten().tolist()
    assert marked_steps == [3, 4, 5, 15, 16, 17]


# --- sequential digits ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the images")
    bunch = datasets.load_digits()
    return torch.from_numpy(bunch.images), torch.from_numpy(bunch.target)


def as_set(x, y):
    """Images and labels as a sorted list, so that two orders of the same data compare equal."""
    return sorted((*image, label) for image, label in zip(x.squeeze(-1).t().tolist(), y.tolist(), strict=True))


def test_digits_shapes_and_range(raw):
    x_train, y_train, x_test, y_test = tasks.sequential_digits()
    for x, y in ((x_train, y_train), (x_test, y_test)):
        assert x.shape == (64, len(y), 1) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.dtype == torch.int64 and x.min() == 0 and x.max() == 1
    assert len(y_train) + len(y_test) == len(raw[1]) == 1797


def test_digits_parts_together_are_the_data_set_read_row_by_row(raw):
    images, labels = raw
    x_train, y_train, x_test, y_test = tasks.sequential_digits(test_fraction=0.3)
    rows = torch.stack([images[:, t // 8, t % 8] / 16 for t in range(64)]).float()
    assert as_set(torch.cat([x_train, x_test], 1), torch.cat([y_train, y_test])) == as_set(rows, labels)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_digits_split_is_stratified(raw, fraction):
    y_test = tasks.sequential_digits(test_fraction=fraction).y_test
    per_digit = torch.bincount(raw[1], minlength=10)
    assert (torch.bincount(y_test, minlength=10) - fraction * per_digit).abs().max() <= 0.5  # rounding


def test_digits_seed_chooses_the_split(raw):
    first, same, other = (tasks.sequential_digits(seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert as_set(first.x_test, first.y_test) != as_set(other.x_test, other.y_test)


def test_digits_permutation_is_one_for_all_images_and_leaves_the_split_alone(raw):
    plain, permuted = tasks.sequential_digits(), tasks.sequential_digits(permutation_seed=5)
    order = torch.randperm(64, generator=rng(5))
    assert torch.equal(permuted.x_train, plain.x_train[order])
    assert torch.equal(permuted.x_test, plain.x_test[order])
    assert not torch.equal(permuted.x_train, plain.x_train)
    assert torch.equal(permuted.y_train, plain.y_train) and torch.equal(permuted.y_test, plain.y_test)


def test_digits_leave_the_global_random_state_alone(raw):
    before = torch.get_rng_state()
    tasks.sequential_digits(permutation_seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrnn\[train\]'"):
        tasks.sequential_digits()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_digits_refuse_a_fraction_outside_the_open_interval(fraction):
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1"):
        tasks.sequential_digits(test_fraction=fraction)
