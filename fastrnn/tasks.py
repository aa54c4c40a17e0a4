"""Sequence tasks with a known answer to "how far back must the network remember?".

Used by the demo, the tests and the experiments. Every tensor is time first. The synthetic tasks draw from the
`torch.Generator` that they are given, on its device, and leave PyTorch's global random state alone; the same
generator state gives the same batch.

| task                | input         | target          | the network must                              |
|---------------------|---------------|-----------------|-----------------------------------------------|
| `adding_problem`    | [T, B, 2]     | [B, 1] float    | hold a real number over up to T steps         |
| `copy_memory`       | [T+20, B, 10] | [T+20, B] class | hold ten symbols over T steps                 |
| `temporal_order`    | [T, B, 6]     | [B] class       | tell in which order two rare symbols came     |
| `sequential_digits` | [64, N, 1]    | [N] class       | name a real image, read pixel by pixel        |
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

ADDING_BASELINE = 1 / 6
"""Mean squared error of always answering 1 in the adding problem: the variance of a sum of two U[0, 1)."""

COPY_SYMBOLS = 8
"""Symbols of the copy task that carry data: classes 0 to 7."""
COPY_LENGTH = 10
"""The number of symbols to remember."""
COPY_BLANK = 8
"""The class that fills every other step, in the input and in the target."""
COPY_DELIMITER = 9
"""The class that means "answer now"; in the input only."""


def adding_problem(batch: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The adding problem: two numbers of a long sequence are marked, and the target is their sum.

    The idea is experiment 4 of Hochreiter & Schmidhuber, "Long short-term memory", 1997. The variant is that
    of Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", 2016, which most later papers
    use; the choices of 1997 are in brackets.

    - All sequences have length T (a random length in [T, 1.1 T]).
    - Values come from U[0, 1) ([-1, 1]); markers are 0 or 1 (also -1 at both ends).
    - One marked step is uniform in the first half, [0, T//2), the other in the second, [T//2, T) (one of the
      first ten, and one of the first T/2 - 1 left).
    - The target is the plain sum (0.5 + sum / 4).

    A network that remembers nothing answers 1 and has mean squared error `ADDING_BASELINE` = 1/6.

    Args:
        batch: number of sequences B, at least 0.
        T: steps, at least 2.
        generator: source of randomness; its device is the device of the result.

    Returns:
        x: float32 [T, B, 2]; `x[..., 0]` the values, `x[..., 1]` the markers.
        target: float32 [B, 1], shaped like the output of `nn.Linear(H, 1)` at the last step.

    Raises:
        ValueError: batch is negative or T is below 2.
    """
    _check(batch, T, least=2)
    device = generator.device
    values = torch.rand(T, batch, generator=generator, device=device)
    half = T // 2
    first = torch.randint(0, half, (1, batch), generator=generator, device=device)
    second = torch.randint(half, T, (1, batch), generator=generator, device=device)
    marked = torch.cat([first, second])  # [2, B]
    markers = torch.zeros_like(values).scatter_(0, marked, 1.0)
    target = values.gather(0, marked).sum(0)
    return torch.stack([values, markers], dim=-1), target.unsqueeze(-1)


def copy_memory(batch: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Copy memory: read ten symbols, wait, and repeat them in the same order after a delimiter.

    The settings of Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", 2016 (the task
    goes back to Hochreiter & Schmidhuber, 1997): 10 symbols drawn from 8, then T - 1 blanks, one delimiter,
    and 10 blanks during which the symbols are due. The sequence is T + 20 steps long.

        step     0 .. 9    10 .. T+8   T+9         T+10 .. T+19
        input    symbols   blank       delimiter   blank
        target   blank     blank       blank       symbols

    A network that remembers nothing has cross entropy `copy_memory_baseline(T)`.

    Args:
        batch: number of sequences B, at least 0.
        T: the delay, at least 1. Each symbol is due T + 10 steps after it was shown.
        generator: source of randomness; its device is the device of the result.

    Returns:
        x: float32 [T + 20, B, 10], one-hot; channels 0-7 symbols, 8 blank, 9 delimiter.
        target: int64 [T + 20, B], classes 0-8 (a model needs 9 outputs: the delimiter is never due).

    Raises:
        ValueError: batch is negative or T is below 1.
    """
    _check(batch, T, least=1)
    symbols = torch.randint(0, COPY_SYMBOLS, (COPY_LENGTH, batch), generator=generator, device=generator.device)
    shown = symbols.new_full((T + 2 * COPY_LENGTH, batch), COPY_BLANK)
    target = shown.clone()
    shown[:COPY_LENGTH] = symbols
    shown[T + COPY_LENGTH - 1] = COPY_DELIMITER
    target[-COPY_LENGTH:] = symbols
    return one_hot(shown, COPY_SYMBOLS + 2).float(), target


def copy_memory_baseline(T: int) -> float:
    """Cross entropy of the copy task without memory, 10 ln 8 / (T + 20), in nats per step.

    The mean over all T + 20 steps for a network that knows when the target is blank, and guesses the symbols.
    """
    return COPY_LENGTH * math.log(COPY_SYMBOLS) / (T + 2 * COPY_LENGTH)


def temporal_order(batch: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Temporal order: two of the symbols are A or B, the rest is noise; classify AA, AB, BA or BB at the end.

    Experiment 6a of Hochreiter & Schmidhuber, "Long short-term memory", 1997, in the form of the published code
    of Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", 2013: the length T
    is fixed (1997: 100 to 110, between a start and a trigger symbol), the first symbol's step is uniform in
    [T//10, 2*(T//10)), the second's in [T//2, T//2 + T//10), and every other step is uniform over c, d, e, f.

    Guessing scores 1/4, cross entropy ln 4.

    Args:
        batch: number of sequences B, at least 0.
        T: steps, at least 10.
        generator: source of randomness; its device is the device of the result.

    Returns:
        x: float32 [T, B, 6], one-hot; channels A, B, c, d, e, f.
        target: int64 [B]; 0 = AA, 1 = AB, 2 = BA, 3 = BB.

    Raises:
        ValueError: batch is negative or T is below 10.
    """
    _check(batch, T, least=10)
    device = generator.device
    tenth, half = T // 10, T // 2
    symbols = torch.randint(2, 6, (T, batch), generator=generator, device=device)
    first = torch.randint(tenth, 2 * tenth, (1, batch), generator=generator, device=device)
    second = torch.randint(half, half + tenth, (1, batch), generator=generator, device=device)
    letters = torch.randint(0, 2, (2, batch), generator=generator, device=device)
    symbols.scatter_(0, torch.cat([first, second]), letters)
    return one_hot(symbols, 6).float(), 2 * letters[0] + letters[1]


class Digits(NamedTuple):
    """Train and test split of `sequential_digits`: x float32 [64, N, 1] in [0, 1], y int64 [N] in 0-9."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def sequential_digits(test_fraction: float = 0.2, seed: int = 0, permutation_seed: int | None = None) -> Digits:
    """Handwritten digits read one pixel per step: 1,797 images of 8 x 8, so T = 64, with one label at the end.

    A small version of sequential MNIST (Le, Jaitly & Hinton, "A simple way to initialize recurrent networks
    of rectified linear units", 2015). The images are scikit-learn's `load_digits` (the test part of UCI's
    "Optical recognition of handwritten digits", Alpaydin & Kaynak, 1998); they come inside scikit-learn, so
    nothing is downloaded. Pixels 0..16 become 0..1 and are read row by row.

    The split is stratified: of each digit's n images, round(test_fraction * n) are drawn at random for the test
    part. Within a part the images keep the order of the data set.

    Args:
        test_fraction: between 0 and 1, both excluded.
        seed: of the split.
        permutation_seed: of one permutation of the pixels, the same for all images of both parts (the
            "permuted" task, without local structure); None reads them in order. It does not change the split.

    Returns:
        Digits(x_train, y_train, x_test, y_test), on the CPU.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: test_fraction is outside (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, both excluded, got {test_fraction}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "sequential_digits needs scikit-learn, which holds the images: pip install 'fastrnn[train]' "
            "or pip install scikit-learn"
        ) from error

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().div(16).t()  # [64, N]
    y = torch.from_numpy(labels).long()  # [N]
    if permutation_seed is not None:
        x = x[torch.randperm(64, generator=torch.Generator().manual_seed(permutation_seed))]

    generator = torch.Generator().manual_seed(seed)
    is_test = torch.zeros_like(y, dtype=torch.bool)
    for digit in range(10):
        members = (y == digit).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        is_test[members[order[: round(test_fraction * len(members))]]] = True

    def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, chosen].unsqueeze(-1).contiguous(), y[chosen]

    return Digits(*part(~is_test), *part(is_test))


def _check(batch: int, T: int, least: int) -> None:
    if batch < 0:
        raise ValueError(f"batch must be at least 0, got {batch}")
    if T < least:
        raise ValueError(f"T must be at least {least}, got {T}")
