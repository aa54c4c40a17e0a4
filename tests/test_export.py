"""Models that leave Python: ONNX, torch.export, AOTInductor. Numbers are compared with eager mode at other T and B."""

import io
import json
import select
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from setups import H, I, agree, make, needs_cpu_library
from torch import nn
from torch.utils import cpp_extension

import fastrnn
from fastrnn.backends import extension

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))), reason="onnx, onnxruntime or onnxscript is missing"
)
T, B = 5, 3  # of the example that an exporter gets
SIZES = [(9, 2), (1, 4)]
# 30 products of float32 numbers of order 1 per step, over up to 9 steps of a contraction: some 1e-6, in another order.
SINGLE = {"rtol": 1e-5, "atol": 3e-6}
ANY = torch.export.Dim.DYNAMIC


def rnn(name, **settings):
    torch.manual_seed(0)
    return getattr(fastrnn, name)(I, H, **settings)


class Plain(nn.Module):
    """What ONNX has operators for."""

    def __init__(self):
        super().__init__()
        self.lstm = rnn("LSTM", num_layers=2, bidirectional=True)
        self.gru = rnn("GRU", batch_first=True, clip_state_grad_norm=1.0)
        self.rnn = rnn("RNN", nonlinearity="relu", bias=False)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return y, h, c, *self.gru(x.transpose(0, 1)), *self.rnn(x)


class Beyond(nn.Module):
    """What ONNX has no operator for."""

    def __init__(self):
        super().__init__()
        self.lstm = rnn("LSTM", proj_size=2, layer_norm=True, zoneout=0.2)
        self.gru = rnn("GRU", bidirectional=True)
        self.cell = fastrnn.GRUCell(I, H, layer_norm=True)
        self.own = fastrnn.Recurrent(fastrnn.cells.peephole_lstm, I, H)

    def forward(self, x, lengths, resets):
        y, (h, c), cells = self.lstm(x, lengths=lengths, return_cells=True)
        own, own_states = self.own(x, lengths=lengths)
        return y, h, c, cells, *self.gru(x, lengths=lengths, reset_mask=resets), self.cell(x[0]), own, *own_states


class Whole(nn.Module):
    """One network with much in it, because AOTInductor takes long."""

    def __init__(self):
        super().__init__()
        self.lstm = rnn("LSTM", bidirectional=True, layer_norm=True, proj_size=2, zoneout=0.2)

    def forward(self, x, lengths, resets):
        y, (h, c) = self.lstm(x, lengths=lengths, reset_mask=resets)
        return y, h, c


def inputs(model, steps, batch):
    rng = torch.Generator().manual_seed(steps)
    x = torch.randn(steps, batch, I, generator=rng)
    if isinstance(model, Plain):
        return (x,)
    lengths = torch.randint(0, steps + 1, (batch,), generator=rng)
    lengths[0] = 0
    return x, lengths, torch.rand(steps, batch, generator=rng) < 0.3


def dynamic(model):
    steps_and_batch = {0: ANY, 1: ANY}
    return (steps_and_batch,) if isinstance(model, Plain) else (steps_and_batch, {0: ANY}, steps_and_batch)


@cache
def exported(kind):
    """A model, and its program for ONNX."""
    model = kind().eval()
    options = {"dynamo": True, "dynamic_shapes": dynamic(model), "verbose": False}
    return model, torch.onnx.export(model, inputs(model, T, B), **options)


def run_onnx(file, *tensors):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options)
    fed = dict(zip([given.name for given in session.get_inputs()], (x.numpy() for x in tensors), strict=True))
    return [torch.from_numpy(found) for found in session.run(None, fed)]


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "kind, operators",
    [(Plain, {"LSTM": 4, "GRU": 1, "RNN": 1}), pytest.param(Beyond, {"Scan": 4}, marks=pytest.mark.slow)],
)
def test_onnx(kind, operators):
    """Plain layers are ONNX's own operators, the rest is its Scan; T and B are free."""
    model, program = exported(kind)
    names = [node.op_type for node in program.model_proto.graph.node]
    assert {name: names.count(name) for name in ("LSTM", "GRU", "RNN", "Scan") if name in names} == operators
    file = program.model_proto.SerializeToString()
    for sizes in SIZES:
        given = inputs(model, *sizes)
        agree(run_onnx(file, *given), model(*given), **SINGLE)


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", [Plain, Beyond])
def test_openvino_reads_the_file(kind, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model, program = exported(kind)
    program.save(tmp_path / "network.onnx")
    run = openvino.compile_model(tmp_path / "network.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = inputs(model, *SIZES[0])
    found = run(dict(zip(run.inputs, (x.numpy() for x in given), strict=True)))
    agree([torch.from_numpy(found[k].copy()) for k in range(len(run.outputs))], model(*given), **SINGLE)


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN-relu"])
def test_onnx_by_tracing_takes_a_plain_module_as_it_is(kind):
    """As the root, and at a T at which another backend would run the example."""
    model, file = make(kind, num_layers=2, bidirectional=True, dtype=torch.float32).eval(), io.BytesIO()
    torch.onnx.export(
        model, (torch.randn(40, B, I),), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "T", 1: "B"}}
    )
    for sizes in SIZES:
        x = torch.randn(*sizes, I)
        y, state = model(x)
        agree(run_onnx(file.getvalue(), x), (y, *(state if isinstance(state, tuple) else (state,))), **SINGLE)


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_by_tracing_says_what_it_cannot_write():
    with pytest.raises(RuntimeError, match=r"dynamo=False has no operator for this gru.*use dynamo=True"):
        torch.onnx.export(rnn("GRU", layer_norm=True), (torch.randn(T, B, I),), io.BytesIO(), dynamo=False)


ELSEWHERE = """
import json, sys, traceback
import torch

for line in sys.stdin:
    path, expected, libraries = json.loads(line)
    failure = None
    try:
        for library in libraries:
            torch.ops.load_library(library)
        given, wanted = torch.load(expected, weights_only=True)
        package = path.endswith("package.pt2")
        run = torch._inductor.aoti_load_package(path) if package else torch.export.load(path).module()
        with torch.no_grad():
            for got, want in zip(run(*given), wanted, strict=True):
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                assert torch.allclose(got, want, rtol=1e-5, atol=3e-6), (got - want).abs().max()
        assert "fastrnn" not in sys.modules
    except Exception:
        failure = traceback.format_exc()
    print(json.dumps(failure), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A process without fastrnn, which runs one saved program after the other, since it takes long to start."""
    folder = tmp_path_factory.mktemp("elsewhere")
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    )
    yield process
    process.stdin.close()
    process.wait(60)


def run_elsewhere(process, path, model, *libraries):
    """Runs a saved program in the process without fastrnn, and compares."""
    given, expected = inputs(model, *SIZES[0]), path.parent / "expected"
    with torch.no_grad():
        torch.save((given, tuple(model(*given))), expected)
    process.stdin.write(json.dumps([str(path), str(expected), libraries]) + "\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], 300)[0], "no answer after 300 s"
    failure = json.loads(process.stdout.readline())
    assert failure is None, failure


def library():
    return str(extension.path("_C"))


# The ONNX file of `Beyond` holds each of its networks on backend `reference`.
@pytest.mark.parametrize("kind, backend", [pytest.param(Beyond, None, marks=needs_cpu_library), (Whole, "reference")])
def test_a_saved_program_runs_without_fastrnn(elsewhere, tmp_path, kind, backend):
    """With the C++ library alone, or on backend `reference` with PyTorch alone."""
    model = kind().eval()
    with fastrnn.backend(backend or "auto"):
        program = torch.export.export(model, inputs(model, T, B), dynamic_shapes=dynamic(model))
    graphs = [part.graph for part in program.graph_module.modules()]
    ops = {str(node.target) for graph in graphs for node in graph.nodes}
    ours = {op for op in ops if "fastrnn" in op}
    assert ours == ({"fastrnn_c.scan_forward.default"} if backend is None else set()) and ("scan" in ops) != bool(ours)
    saved = [node.args[-1] for node in program.graph.nodes if "fastrnn_c" in str(node.target)]
    assert sum(saved) == (backend is None)  # planes are kept for return_cells alone
    torch.export.save(program, tmp_path / "program.pt2")
    run_elsewhere(elsewhere, tmp_path / "program.pt2", model, *([library()] if backend is None else []))


@needs_cpu_library
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_compiled_package_runs_without_fastrnn(elsewhere, tmp_path):
    model = Whole().eval()
    with torch.no_grad():
        program = torch.export.export(model, inputs(model, T, B), dynamic_shapes=dynamic(model))
        # How fast the package runs does not matter here.
        quick = {
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,
            "cpp.vec_isa_ok": False,
        }
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "package.pt2"), inductor_configs=quick
        )
    assert path == str(tmp_path / "package.pt2")
    run_elsewhere(elsewhere, tmp_path / "package.pt2", model, library())
    run_in_cpp(path, model, tmp_path)


IN_CPP = """
#include <ATen/ops/arange.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW) == nullptr) return std::puts(dlerror()), 1;
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  at::Tensor x = at::arange(7 * 3 * 3, at::kFloat).reshape({7, 3, 3}).div(63);
  at::Tensor lengths = at::arange(3, at::kLong).mul(3), resets = x.select(2, 0).gt(0.9);
  for (const at::Tensor& result : loader.run({x, lengths, resets})) {
    at::Tensor values = result.contiguous();
    for (int64_t k = 0; k < values.numel(); ++k) std::printf("%.9g\\n", values.const_data_ptr<float>()[k]);
  }
}
"""


def run_in_cpp(path, model, folder):
    """Runs a compiled package in a C++ program, and compares."""
    assert I == 3
    (folder / "main.cpp").write_text(IN_CPP)
    libraries = cpp_extension.library_paths()
    command = [
        "g++", "-std=c++20", "-O0", "-w", "main.cpp", "-o", "main", "-ldl",
        *(f"-I{path}" for path in cpp_extension.include_paths()),
        *(part for path in libraries for part in (f"-L{path}", f"-Wl,-rpath,{path}")),
        "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True)
    printed = subprocess.run([folder / "main", library(), path], capture_output=True, text=True, check=True).stdout
    x = torch.arange(7 * 3 * 3.0).reshape(7, 3, 3) / 63
    with torch.no_grad():
        want = torch.cat([v.flatten() for v in model(x, torch.arange(3) * 3, x[..., 0] > 0.9)])
    torch.testing.assert_close(torch.tensor([*map(float, printed.split())]), want, rtol=1e-5, atol=3e-6)


@needs_cpu_library
def test_the_gradient_of_a_program_is_refused():
    program = torch.export.export(make("GRU"), (torch.randn(T, B, I, dtype=torch.float64),)).module()
    with pytest.raises(RuntimeError, match="has no gradient by itself"):
        program(torch.randn(T, B, I, dtype=torch.float64))[0].sum().backward()


def test_what_compiles_source_or_runs_on_proxies_is_told_the_way():
    for model in (nn.Sequential(rnn("LSTM")), fastrnn.GRUCell(I, H)):
        with pytest.raises(TypeError, match=r"script fastrnn\.convert\(model, to='torch', copy=True\)") as caught:
            torch.jit.script(model)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace fastrnn's gru: trace fastrnn\.convert"):
        torch.fx.symbolic_trace(rnn("GRU"))


def test_the_options_of_a_forward_are_named():
    with pytest.raises(TypeError, match="options by name, but got 3 positional"):
        rnn("GRU")(torch.zeros(T, B, I), None, torch.tensor([1, 2, 3]))
