"""Does the diagnosis tell which trainings will fail, and does following it help? `python -m experiments.clinic`.

A patient is a task, a length, a cell and settings that people really use. Each is trained `as it is`; those
that fail are trained again from the same start under every prescription, a remedy drawn at random, and an LSTM with
chrono initialisation. Every finished training is written at once to experiments/results/clinic.json, and is skipped
when it is there. `python -m experiments.clinic_page` makes docs/clinic.md from it.

A training has failed if its test loss at the end is above `FAILED` times that of the best constant answer (for
text, the entropy of single characters). The thresholds were fixed before any training was looked at.
"""

import argparse
import json
import math
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrnn
from bench import files, machine
from fastrnn import tasks
from fastrnn.monitoring.prescription import rebuilt

RESULTS = Path(__file__).parent / "results" / "clinic.json"
HIDDEN, BATCH, STEPS, CHECKS, TEST = 32, 32, 500, (0, 50, 200), 256
FAILED = {"adding": 0.5, "order": 0.5, "copy": 0.5, "digits": 0.5, "sunspots": 0.5, "text": 0.85}
TUNED_ON = ("adding", "digits", "sunspots")
"""The half of the tasks that is listed first; see docs/clinic.md on what it was used for."""
POINT = 25
"""The number of training steps whose mean loss is a point of the recorded curve."""
AHEAD = 3
"""The number of years ahead for which the sunspots are forecast."""


# --------------------------------------------------------------------------------------------------------- tasks


@cache
def _digits() -> tasks.Digits:
    data = tasks.sequential_digits()
    mean, std = data.x_train.mean(), data.x_train.std()
    return tasks.Digits((data.x_train - mean) / std, data.y_train, (data.x_test - mean) / std, data.y_test)


@cache
def _sunspots(T: int) -> tuple[Tensor, Tensor]:
    """Yearly sunspot numbers 1700 to 2008 (statsmodels): windows `[T, N, 1]` and numbers AHEAD years on `[N, 1]`."""
    from statsmodels.datasets import sunspots

    series = torch.tensor(sunspots.load_pandas().data["SUNACTIVITY"].values, dtype=torch.float32)
    series = (series - series.mean()) / series.std()
    windows = series.unfold(0, T + AHEAD, 1)  # [N, T + AHEAD]
    return windows[:, :T].t().unsqueeze(-1).contiguous(), windows[:, -1:].contiguous()


@cache
def _text() -> tuple[Tensor, int]:
    """The reference pages that come with Python, as character indices `[N]`, and the number of characters."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([index[character] for character in text]), len(alphabet)


def batch(task: str, T: int, size: int, generator: torch.Generator, test: bool) -> tuple[Tensor, Tensor]:
    """`x [T, B, I]` and the target of a batch; test data are those that training never draws."""
    if task == "adding":
        return tasks.adding_problem(size, T, generator)
    if task == "copy":
        return tasks.copy_memory(size, T, generator)
    if task == "order":
        return tasks.temporal_order(size, T, generator)
    if task == "digits":
        data = _digits()
        x, y = (data.x_test, data.y_test) if test else (data.x_train, data.y_train)
        chosen = torch.randint(len(y), (size,), generator=generator)
        return x[:, chosen], y[chosen]
    if task == "sunspots":
        x, y = _sunspots(T)
        first = len(y) * 3 // 4  # the last quarter is the test; windows that share years with both are left out
        low, high = (first, len(y)) if test else (0, max(1, first - T))
        chosen = torch.randint(low, high, (size,), generator=generator)
        return x[:, chosen], y[chosen]
    text, letters = _text()
    split = len(text) * 9 // 10
    low, high = (split, len(text) - T - 1) if test else (0, split - T - 1)
    begin = torch.randint(low, high, (size,), generator=generator)
    chosen = text[begin + torch.arange(T + 1).unsqueeze(1)]
    return F.one_hot(chosen[:-1], letters).float(), chosen[1:]


def sizes(task: str) -> tuple[int, int]:
    """Inputs and outputs per step."""
    if task == "text":
        return _text()[1], _text()[1]
    return {"adding": (2, 1), "copy": (10, 9), "order": (6, 4), "digits": (1, 10), "sunspots": (1, 1)}[task]


def loss_of(task: str, scores: Tensor, target: Tensor) -> Tensor:
    """`scores [T, B, O]`; tasks other than copy and text look at the last step."""
    if task in ("copy", "text"):
        return F.cross_entropy(scores.flatten(0, 1), target.flatten())
    return F.mse_loss(scores[-1], target) if task in ("adding", "sunspots") else F.cross_entropy(scores[-1], target)


def constant(task: str, T: int) -> float:
    """The loss of the best answer that does not look at the input."""
    if task == "text":
        share = torch.bincount(_text()[0]).float().div(len(_text()[0]))
        return float(-(share * share.clamp(min=1e-12).log()).sum())
    if task == "sunspots":
        return float(batch(task, T, TEST, torch.Generator().manual_seed(7), True)[1].var())
    return {
        "adding": tasks.ADDING_BASELINE, "copy": tasks.copy_memory_baseline(T), "order": math.log(4),
        "digits": math.log(10),
    }[task]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ patients


def patient(task: str, T: int, cell: str, lr: float = 0.01, optimizer: str = "Adam", **module) -> dict:
    return {"task": task, "T": T, "cell": cell, "lr": lr, "optimizer": optimizer, "module": module}


RELU, DEEP = {"nonlinearity": "relu"}, {"num_layers": 2}
PATIENTS = (
    patient("adding", 10, "GRU"), patient("adding", 10, "LSTM"), patient("adding", 10, "RNN"),
    patient("adding", 60, "LSTM"), patient("adding", 60, "RNN"), patient("adding", 60, "GRU", lr=0.001),
    patient("order", 20, "GRU"), patient("order", 20, "LSTM"), patient("order", 20, "RNN"),
    patient("order", 80, "LSTM"), patient("order", 80, "GRU"), patient("order", 80, "RNN", **RELU),
    patient("copy", 1, "GRU"), patient("copy", 1, "LSTM"), patient("copy", 30, "GRU"), patient("copy", 30, "RNN"),
    patient("digits", 64, "LSTM"), patient("digits", 64, "GRU"), patient("digits", 64, "RNN"),
    patient("digits", 64, "RNN", **RELU), patient("digits", 64, "LSTM", lr=0.1, optimizer="SGD"),
    patient("sunspots", 22, "LSTM"), patient("sunspots", 22, "RNN"), patient("sunspots", 66, "GRU"),
    patient("sunspots", 66, "RNN", lr=0.05),
    patient("text", 30, "LSTM"), patient("text", 30, "GRU"), patient("text", 30, "RNN"),
    patient("text", 60, "LSTM", lr=0.001, **DEEP), patient("text", 60, "RNN", lr=0.05, **RELU),
)  # fmt: skip


class Model(nn.Module):
    """`[T, B, I] -> [T, B, O]`."""

    def __init__(self, patient: dict):
        super().__init__()
        inputs, outputs = sizes(patient["task"])
        self.rnn = getattr(fastrnn, patient["cell"])(inputs, HIDDEN, **patient["module"])
        self.out = nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


def start(patient: dict, seed: int) -> Model:
    """The untrained network; the same for every treatment."""
    torch.manual_seed(seed)
    return Model(patient)


def data_of(patient: dict, seed: int, test: bool = False):
    return batch(patient["task"], patient["T"], TEST, torch.Generator().manual_seed(2**40 + seed), test)


# ---------------------------------------------------------------------------------------------------- diagnosis


def observed(model: Model, patient: dict, seed: int) -> tuple[fastrnn.monitoring.Report, dict]:
    """The monitor's report on a batch of training data, and what a rule for the verdict may look at."""
    task, T = patient["task"], patient["T"]
    x, target = batch(task, T, 128, torch.Generator().manual_seed(2**41 + seed), False)
    with fastrnn.GradientMonitor(model) as monitor:
        loss = loss_of(task, model(x), target)
        loss.backward()
    report = monitor.report()
    model.zero_grad()
    first, last = report[0], report[-1]
    norms = first.total[first.valid > 0].nan_to_num()
    early = norms[: len(norms) // 2].sum() / norms.sum().clamp(min=1e-300)
    whole, near = gradients(model, patient, x, target), gradients(model, patient, x, target, cut=True)
    with torch.no_grad():
        h = model.rnn(x)[0].norm(dim=-1).mean(-1)  # [T]
    return report, {
        "verdict": first.verdict,
        "horizon": None if first.horizon is None else first.horizon / max(first.longest, 1),
        "gain": _number(last.gain_median),
        "growth": _number(first.growth),
        "early": _number(early),  # the share of the norms of dL/dh_t in the first half of the sequence
        "crossing": _number((whole - near).mean(0).norm() / whole.mean(0).norm().clamp(min=1e-300)),
        "noise": _number(signal_to_noise(whole)),
        "crossing noise": _number(signal_to_noise(whole - near)),
        "h growth": _number(h[-1] / h[0].clamp(min=1e-12)),
        "loss": _number(loss.item() / constant(task, T)),
        "held out": _number(test_loss(model, patient)),
    }


def test_loss(model: Model, patient: dict) -> float:
    """On data that training never draws, relative to the best constant answer."""
    x, target = data_of(patient, 0, test=True)
    with torch.no_grad():
        return float(loss_of(patient["task"], model(x), target)) / constant(patient["task"], patient["T"])


def gradients(model: Model, patient: dict, x: Tensor, target: Tensor, cut: bool = False, parts: int = 8) -> Tensor:
    """The gradient of the first W_hh on each part of a batch, float64 `[parts, G*H*H]`.

    Args:
        cut: whether no gradient crosses the middle of the sequence.
    """
    found, step, middle = [], x.shape[1] // parts, x.shape[0] // 2
    for i in range(0, parts * step, step):
        inputs = x[:, i : i + step]
        answer = target[:, i : i + step] if patient["task"] in ("copy", "text") else target[i : i + step]
        if cut:
            early, state = model.rnn(inputs[:middle])
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            scores = model.out(torch.cat((early, model.rnn(inputs[middle:], state)[0])))
        else:
            scores = model(inputs)
        (grad,) = torch.autograd.grad(loss_of(patient["task"], scores, answer), model.rnn.weight_hh_l0)
        found.append(grad.flatten())
    return torch.stack(found).double()


def signal_to_noise(gradients: Tensor) -> float:
    """The squared norm of the mean of the parts' gradients over their mean squared deviation from it."""
    mean = gradients.mean(0)
    return float(mean.square().sum() / (gradients - mean).square().sum(1).mean().clamp(min=1e-300))


def _number(value) -> float | None:
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------- training


def train(model: Model, patient: dict, seed: int, watch: bool = False, steps: int | None = None) -> tuple[dict, list]:
    """Trains in place. Returns the row's results, and the prescriptions after the last check where `watch`."""
    task, level = patient["task"], constant(patient["task"], patient["T"])
    generator = torch.Generator().manual_seed(seed)
    optimizer = getattr(torch.optim, patient["optimizer"])(model.parameters(), lr=patient["lr"])
    checks, prescriptions, losses = {}, [], []
    for step in range(STEPS if steps is None else steps):
        if watch and step in CHECKS:
            report, checks[str(step)] = observed(model, patient, seed)
            prescriptions = fastrnn.prescribe(report)
        x, target = batch(task, patient["T"], BATCH, generator, False)
        loss = loss_of(task, model(x), target)
        losses.append(loss.item() / level)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not math.isfinite(losses[-1]):
            break
    final = test_loss(model, patient)
    curve = [_number(sum(part) / len(part)) for part in (losses[i : i + POINT] for i in range(0, len(losses), POINT))]
    result = {"loss": _number(final), "failed": not final <= FAILED[task], "checks": checks, "curve": curve}
    return result, prescriptions


def random_remedy(model: Model, patient: dict, seed: int) -> tuple[str, Model]:
    """A remedy that fits the cell, drawn by the seed without a look at the gradient."""
    rnn, T = model.rnn, patient["T"]
    init = fastrnn.init
    remedies = {
        "orthogonal": lambda: init.orthogonal_(rnn),
        "xavier": lambda: init.xavier_(rnn),
        "clip": lambda: setattr(rnn, "clip_state_grad_norm", 1.0),
        "layer norm": lambda: rebuilt(rnn, type(rnn), layer_norm=True),
        "zoneout": lambda: setattr(rnn, "zoneout", 0.1),
    }
    if patient["cell"] == "RNN":
        remedies |= {"identity": lambda: init.identity_(rnn), "GRU": lambda: rebuilt(rnn, fastrnn.GRU)}
    else:
        remedies["chrono"] = lambda: init.chrono_(rnn, max(2, T))
    if patient["cell"] == "LSTM":
        remedies["forget bias"] = lambda: init.forget_bias_(rnn)
    names = sorted(remedies)
    name = names[int(torch.randint(len(names), (1,), generator=torch.Generator().manual_seed(977 * seed + T)))]
    new = remedies[name]()
    model.rnn = new if isinstance(new, nn.Module) else rnn
    return name, model


def lstm_chrono(model: Model, patient: dict) -> Model:
    model.rnn = fastrnn.init.chrono_(rebuilt(model.rnn, fastrnn.LSTM), max(2, patient["T"]))
    return model


# ---------------------------------------------------------------------------------------------------- the clinic


class Notes:
    """The rows on disk, by patient, seed and treatment."""

    def __init__(self, file: Path):
        self.file = file
        self.rows = files.read(file)["runs"] if file.exists() else []

    def find(self, **key) -> dict | None:
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        files.write(self.file, {"machine": machine.describe("cpu")}, "runs", self.rows)


class Clinic:
    """Trains what is not in the notes yet."""

    def __init__(self, notes: Notes):
        self.notes = notes
        self._prescriptions: dict[str, list] = {}  # of the trainings that were watched here

    def admit(self, patient: dict, seed: int) -> dict:
        """Trains one patient as it is."""
        return self._treated(patient, seed, "as it is")

    def treat(self, patient: dict, seed: int) -> None:
        """Trains one patient, if it failed as it is, under every treatment."""
        row = self.admit(patient, seed)
        if not row["failed"]:
            return
        missing = [n for n in row["prescribed"] if self._found(patient, seed, f"prescription {n}") is None]
        key = json.dumps((patient, seed))
        if missing and key not in self._prescriptions:
            self._prescriptions[key] = train(start(patient, seed), patient, seed, True, CHECKS[-1] + 1)[1]
        for prescription in self._prescriptions.get(key, ()):
            self._treated(patient, seed, f"prescription {prescription.name}", prescription.apply)
        name, _ = random_remedy(start(patient, seed), patient, seed)
        self._treated(patient, seed, "random", lambda model: random_remedy(model, patient, seed)[1], name)
        self._treated(patient, seed, "LSTM, chrono", lambda model: lstm_chrono(model, patient))

    def _found(self, patient: dict, seed: int, treatment: str) -> dict | None:
        return self.notes.find(patient=patient, seed=seed, treatment=treatment)

    def _treated(self, patient: dict, seed: int, treatment: str, build=None, detail: str = "") -> dict:
        row = self._found(patient, seed, treatment)
        if row is None:
            began, model = time.perf_counter(), start(patient, seed)
            model = build(model) if build else model
            result, prescriptions = train(model, patient, seed, watch=build is None)
            row = {"patient": patient, "seed": seed, "treatment": treatment, "detail": detail, **result}
            row |= {"prescribed": [p.name for p in prescriptions], "seconds": round(time.perf_counter() - began, 1)}
            self.notes.add(row)
            if build is None:
                self._prescriptions[json.dumps((patient, seed))] = prescriptions
        return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.clinic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 of every patient")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON", help="the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    clinic = Clinic(Notes(options.out))
    for seed in range(options.seeds):
        for what, visit in (("trained as it is", clinic.admit), ("treated", clinic.treat)):
            for number, sick in enumerate(PATIENTS):
                visit(sick, seed)
                print(f"seed {seed}, patient {number + 1} of {len(PATIENTS)}: {what}", flush=True)


if __name__ == "__main__":
    main()
