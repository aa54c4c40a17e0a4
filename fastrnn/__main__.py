"""The command line.

- `python -m fastrnn train` trains a network on handwritten digits, read pixel by pixel, and draws its gradients.
- `python -m fastrnn flow` compares how far back the gradient comes, by cell and remedy.
- `python -m fastrnn doctor` trains a copy of a model for some steps, and tries what its gradient asks for.
- `python -m fastrnn tune` measures the backends on this machine.
- `python -m fastrnn info` prints versions, and which backends can run here.

Exit codes: 0 done, 1 a package is missing, 2 a bad option, 130 interrupted, 141 the reader of a pipe is gone.
"""

import argparse
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fastrnn

from . import dispatch, distributed
from .cell_table import NONLINEARITIES
from .cells import WITHOUT_INPUTS
from .monitoring import Report, flow, plots
from .monitoring.doctor import doctor, errors_placed, load
from .tasks import Digits, sequential_digits
from .training import INPUT_NOISE, MONITORED, WARM_UP, Classifier, build, fit, watch
from .tuning import command as tune_command


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line, without the usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="fastrnn", description="Recurrent networks that show what their gradient does.")
    top.add_argument("--version", action="version", version=f"fastrnn {fastrnn.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{train,flow,doctor,tune,info}")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser(
        "train", formatter_class=formatter, help="train on sequential digits (T = 64), with pictures of the gradient"
    )
    add = train.add_argument
    add("--cell", choices=("lstm", "gru", "rnn", *WITHOUT_INPUTS), default="lstm", help="the recurrent cell")
    add("--nonlinearity", choices=NONLINEARITIES, default="tanh", help="of --cell rnn")
    add("--hidden", type=_count, default=128, metavar="H", help="hidden units")
    add("--layers", type=_count, default=1, metavar="L", help="stacked layers")
    add("--bidirectional", action="store_true", help="read the pixels in both directions")
    add("--epochs", type=_count, default=40, metavar="N", help="passes over the training images")
    add("--batch", type=_count, default=32, metavar="B", help="images per step")
    add("--lr", type=_positive, default=1e-2, help="peak learning rate of Adam (one cycle)")
    add(
        "--init", choices=("chrono", "default"), default="chrono",
        help="chrono: gates that remember up to T steps, orthogonal W_hh; default: torch.nn's, whose gradient vanishes",
    )  # fmt: skip
    add("--clip-norm", type=_positive, default=1.0, metavar="N", help="bound on the norm of all parameters' gradient")
    add("--seed", type=int, default=0, help="of initialisation, shuffling and masks")
    add("--threads", type=_count, default=1, help="CPU threads; the tensors are too small to share")
    add("--backend", help=f"force one of {', '.join(dispatch.BACKENDS)}")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for the pictures")
    remedy = train.add_argument_group("remedies for vanishing and exploding gradients, and regularisers").add_argument
    remedy("--clip-state-norm", type=_positive, metavar="N", help="bound on dL/d state of each sample at every step")
    remedy("--layer-norm", action="store_true", help="layer norm inside the cell")
    remedy("--residual", action="store_true", help="from the second layer on, add a layer's input to its output")
    remedy("--zoneout", type=float, default=0.0, metavar="P", help="probability that a unit keeps its state")
    remedy("--recurrent-dropout", type=float, default=0.0, metavar="P", help="of h on its way into W_hh")
    remedy("--weight-dropout", type=float, default=0.0, metavar="P", help="of the entries of W_hh")
    ranks = train.add_argument_group("several ranks, under torchrun (docs/distributed.md)").add_argument
    ranks("--distributed", choices=distributed.KINDS, help="share every batch out among the ranks")
    ranks("--checkpoint", type=Path, metavar="DIR", help="write a checkpoint after every epoch")
    ranks("--resume", action="store_true", help="begin with --checkpoint, written by any number of ranks")
    train.set_defaults(run=_train)
    side_by_side = commands.add_parser(
        "flow", formatter_class=formatter, help="how far back the gradient comes: cells and remedies in one picture"
    )
    add = side_by_side.add_argument
    add("--cell", choices=WITHOUT_INPUTS, nargs="+", default=[], help="cells of fastrnn.cells to show, too")
    add("--steps", type=_several, default=200, metavar="T", help="length of the sequence")
    add("--hidden", type=_count, default=64, metavar="H", help="hidden units")
    add("--batch", type=_count, default=32, metavar="B", help="sequences; the picture shows their median")
    add("--seed", type=int, default=0, help="of weights, input and readout")
    add("--threads", type=_count, default=1, help="CPU threads; the tensors are too small to share")
    add("--out", type=Path, default=Path("flow.png"), metavar="PNG", help="the picture")
    side_by_side.set_defaults(run=_flow)
    checkup = commands.add_parser(
        "doctor", formatter_class=formatter, help="train a copy of your model, diagnose it, and try every prescription"
    )
    add = checkup.add_argument
    add(
        "script",
        metavar="SCRIPT:FACTORY",
        help="a Python file and a function in it: () -> (model, batch, loss_fn[, held_out])",
    )
    add("--steps", type=_count, default=50, metavar="N", help="training steps per trial")
    add("--lr", type=_positive, default=1e-3, help="learning rate of Adam")
    add("--clip-norm", type=_positive, metavar="N", help="bound on the norm of all parameters' gradient")
    add("--seed", type=int, default=0, help="of dropout, batches and new weights")
    add("--threads", type=_count, default=1, help="CPU threads")
    add("--out", type=Path, default=Path("doctor.png"), metavar="PNG", help="the picture")
    checkup.set_defaults(run=_doctor)
    tune_command.add_to(commands, formatter, _count, _positive)
    info = commands.add_parser("info", help="versions, GPU, and which backends can run here, or why not")
    info.set_defaults(run=_info)
    return top


def _count(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _several(text: str) -> int:
    value = _count(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


# ------------------------------------------------------------------------------------------------------------ train


def prepare(options: argparse.Namespace) -> tuple[Classifier, Digits]:
    """Model and data. It also makes the folder and runs one forward, so that a bad option fails before training."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.empty(0, device=options.device)
    model = build(options)
    data = sequential_digits()
    mean, std = data.x_train.mean(), data.x_train.std()
    data = Digits((data.x_train - mean) / std, data.y_train, (data.x_test - mean) / std, data.y_test)
    data = Digits(*(part.to(options.device) for part in data))
    model(data.x_test[:, :1])
    for picture in _pictures(options.out):
        _check_writable(picture)
    return model, data


def _pictures(folder: Path) -> tuple[Path, Path]:
    """The files that `train` writes."""
    return folder / "learning_curves.png", folder / "gradient_norms.png"


def _check_writable(path: Path) -> None:
    """Raises OSError unless the file can be written; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    path.open("ab").close()
    if new:
        path.unlink(missing_ok=True)  # another rank may have done it


def _train(options: argparse.Namespace) -> None:
    plots.figure_class()
    tqdm = _progress_bar()
    if not options.distributed and (options.checkpoint or options.resume):
        raise _BadOption("--checkpoint and --resume are for --distributed")
    if options.resume and not options.checkpoint:
        raise _BadOption("--resume needs --checkpoint")
    if options.distributed:
        try:
            with distributed.ranks(options.device) as ranks:
                _train_on(ranks, options, tqdm)
        except RuntimeError as error:
            raise _BadOption(f"--distributed: {str(error).splitlines()[0]}") from error
        return
    rnn, model, data, before = _prepared(options, watch)
    started = time.perf_counter()
    with tqdm(total=_steps(options, data), unit="step", mininterval=0.5, dynamic_ncols=True) as bar:
        history = fit(model, data, options, bar)
    seconds = time.perf_counter() - started
    _show(options, rnn, history, before, watch(model, data), seconds)


def _train_on(ranks: distributed.Ranks, options: argparse.Namespace, tqdm) -> None:
    """`_train` as one of several ranks; the first one prints."""

    def report(network, data):
        return distributed.watch(network, data, ranks, MONITORED)

    def wrap(model):
        return distributed.wrapped(model, options.distributed)

    rnn, network, data, before = _prepared(options, report, wrap, quiet=ranks.rank > 0)
    started = time.perf_counter()
    with tqdm(total=_steps(options, data), unit="step", mininterval=0.5, disable=ranks.rank > 0) as bar:
        history = distributed.fit(
            network, data, ranks, epochs=options.epochs, batch=options.batch, lr=options.lr, warm_up=WARM_UP,
            clip_norm=options.clip_norm, noise=INPUT_NOISE, seed=options.seed, checkpoint=options.checkpoint,
            resume=options.resume, bar=bar,
        )  # fmt: skip
    seconds, after = time.perf_counter() - started, report(network, data)
    if ranks.rank == 0:
        _show(options, rnn, history, before, after, seconds)
        for epoch, row in enumerate(history, options.epochs - len(history) + 1):
            print(f"epoch {epoch}: training loss {row['train_loss']:.6f}, test loss {row['test_loss']:.6f}")


def _steps(options: argparse.Namespace, data: Digits) -> int:
    return math.ceil(len(data.y_train) / options.batch) * options.epochs


def _prepared(options: argparse.Namespace, report, wrap=lambda model: model, quiet: bool = False):
    """The recurrent module, the model (by `wrap`), the data, and `report(model, data)` before the training."""
    try:
        model, data = prepare(options)
        parameters, rnn, model = sum(p.numel() for p in model.parameters()), model.rnn, wrap(model)
        before = report(model, data)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise _BadOption(str(error).splitlines()[0]) from error
    if not quiet:
        print(f"{rnn}, {parameters:,} parameters, on {options.device}")
    return rnn, model, data, before


def _show(options: argparse.Namespace, rnn: nn.Module, history, before: Report, after: Report, seconds: float) -> None:
    """The pictures and the words after a training."""
    curves, norms = _pictures(options.out)
    title = f"sequential digits, {type(rnn).__name__}, {options.hidden} units; training pixels are noisy"
    plots.learning_curves(curves, history, title)
    plots.gradient_norms(norms, {"before training": before, "after training": after})
    print(f"\nbefore training\n{before}\n\nafter training\n{after}\n")
    print(f"test accuracy {100 * history[-1]['test_accuracy']:.2f} % after {len(history)} epochs in {seconds:.0f} s")
    print(f"pictures: {curves}, {norms}")


def _progress_bar():
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install fastrnn[train]") from error
    return tqdm


# ------------------------------------------------------------------------------------------------------------- flow


def _flow(options: argparse.Namespace) -> None:
    plots.figure_class()
    tqdm = _progress_bar()
    torch.set_num_threads(options.threads)
    try:
        _check_writable(options.out)
    except OSError as error:
        raise _BadOption(f"--out: {error}") from error
    started, flows = time.perf_counter(), []
    arms = [*flow.ARMS, *flow.arms_of({name: WITHOUT_INPUTS[name] for name in options.cell})]
    with tqdm(arms, unit="network", dynamic_ncols=True) as bar:
        for arm in bar:
            bar.set_postfix_str(f"{arm.network}: {arm.name}")
            try:
                flows.append(flow.flow(arm, options.steps, options.hidden, options.batch, options.seed))
            except RuntimeError as error:  # a backend that the environment forces
                raise _BadOption(str(error).splitlines()[0]) from error
    plots.flows(options.out, flow.by_network(flows))
    seconds = time.perf_counter() - started
    print(f"\n{flow.as_table(flows)}\n\n{len(flows)} networks in {seconds:.0f} s, T = {options.steps}")
    print(f"picture: {options.out}")


# ----------------------------------------------------------------------------------------------------------- doctor


def _doctor(options: argparse.Namespace) -> None:
    plots.figure_class()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        _check_writable(options.out)
        model, batch, loss_fn, held_out = load(options.script)
        with errors_placed(options.script):
            found = doctor(
                model, batch, loss_fn, steps=options.steps, clip_grad_norm=options.clip_norm, seed=options.seed,
                held_out=held_out,
                optimizer=lambda parameters: torch.optim.Adam(parameters, lr=options.lr),
            )  # fmt: skip
    except (ValueError, OSError) as error:
        raise _BadOption(str(error)) from error
    found.plot(options.out)
    print(f"{found}\n\npicture: {options.out}")


# ------------------------------------------------------------------------------------------------------------- info


def _info(options: argparse.Namespace) -> None:
    print(f"fastrnn  {fastrnn.__version__} in {Path(fastrnn.__file__).parent}")
    print(f"torch    {torch.__version__}\ntriton   {_triton_version()}")
    print(f"CUDA     {torch.version.cuda or 'torch is built without it'}\npython   {platform.python_version()}")
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    print(f"GPU      {', '.join(gpus) or 'none'}")
    print(f"C++      {dispatch.cpu.MISSING or 'the library is there, and loads'}")
    for device in ("cpu", *(["cuda"] if gpus else [])):
        rnn = fastrnn.LSTM(8, 16, device=device)
        x = torch.zeros(4, 2, 8, device=device)
        tap = torch.zeros(1, 2, 2, 4, 2, device=device, requires_grad=True)
        try:
            print(f"\na plain call:\n{fastrnn.explain(rnn, x)}")
            print(f"\na call with gradient norms:\n{fastrnn.explain(rnn, x, tap=tap)}")
        except RuntimeError as error:  # a backend that the environment forces
            raise _BadOption(str(error)) from error


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


# ------------------------------------------------------------------------------------------------------------- main


class _BadOption(Exception):
    """An option that the parser accepted and the library refused."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code. argparse's own errors raise SystemExit."""
    options = parser().parse_args(argv)
    try:
        dispatch.forced(None)
    except ValueError as error:  # an unknown name in FASTRNN_BACKEND
        print(f"fastrnn {options.command}: {error}", file=sys.stderr)
        return 2
    try:
        options.run(options)
        sys.stdout.flush()  # here, because Python's own flush at the end of the process could only complain
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (_BadOption, OSError) as error:  # OSError: a file that cannot be written, a full disk
        print(f"fastrnn {options.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"fastrnn {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
