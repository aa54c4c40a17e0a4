"""Each way of installing, into fresh environments: the C++ library is there and is used, or the install fails with one
sentence.

An environment borrows this one's torch. A wrapper around the compiler takes the objects that `make` has compiled from
the same sources, or compiles them once, without optimisation; it links each library.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from fastrnn.__main__ import main

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "docs", "experiments", "fastrnn", "kernels", "tests")
CXX = os.environ.get("CXX", "g++")
PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX.split()[0]) is None, reason=f"no C++ compiler {CXX}"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wrapper knows the options of a link on Linux"),
]

COMPILE_ONCE = """#!{python} -IS
import hashlib, pathlib, shutil, subprocess, sys

line, to = sys.argv[1:], pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
known, code = None, 0
if "-c" in line:
    files = sorted(path for path in pathlib.Path("csrc").rglob("*.*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    known = pathlib.Path({store!r}, digest + to.name)  # an object's name is its source's
if known is not None and known.exists():
    shutil.copy(known, to)
else:
    code = subprocess.run([*{compiler!r}, *line]).returncode
    if known is not None and code == 0:
        shutil.copy(to, known)
sys.exit(code)
"""

USE = """
import warnings
import torch, fastrnn
from fastrnn.backends import cpu
warnings.simplefilter("error")  # a slow way is warned of
assert cpu.MISSING is None, cpu.MISSING
x = torch.randn(64, 2, 3)
assert fastrnn.explain(fastrnn.GRU(3, 4), x).chosen == "cpu"
module, x = fastrnn.GRU(3, 4, layer_norm=True).double(), x.double()
assert fastrnn.explain(module, x).chosen == "cpu"
output, _ = module(x)
module.backend = "reference"
# float64 in another order. torch.testing would import more than all of this.
want, _ = module(x)
assert (output.dtype, output.shape) == (want.dtype, want.shape)
assert torch.allclose(output, want, rtol=1e-9, atol=1e-12)
print(fastrnn.__file__)
"""

WITHOUT_LIBRARY = """
import sys
import torch, fastrnn
x = torch.randn(64, 2, 3)
for module in (fastrnn.GRU(3, 4), fastrnn.LSTM(3, 4, layer_norm=True)):
    for _ in range(2):
        module(x)
print("info", file=sys.stderr)
from fastrnn.__main__ import main
main(["info"])
"""


def environment(**changes):
    """The caller's, without what bears on a build; a None removes a variable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CXX", "FASTRNN_", "LDFLAGS", "PYTHONPATH"))}
    kept.pop("VIRTUAL_ENV", None)
    return {k: v for k, v in (kept | changes).items() if v is not None}


def run(*command, folder, ok=True, **changes):
    """What a command printed; `ok`: whether it is to succeed."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment(**changes), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The repository as git would clone it, and a repository again."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.log"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    run("git", "init", "--quiet", folder=copy)
    run("git", "add", "--all", folder=copy)
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "a", folder=copy)
    return copy


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """What CXX is set to."""
    folder = tmp_path_factory.mktemp("compiler")
    wrapper = folder / "compile once"
    wrapper.write_text(COMPILE_ONCE.format(python=sys.executable, store=str(folder), compiler=[*CXX.split(), "-w"]))
    wrapper.chmod(0o755)
    sources = sorted(ROOT.glob("csrc/**/*.*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    changed = max(path.stat().st_mtime for path in (*sources, ROOT / "setup.py"))
    for made in ROOT.glob("build/temp*/csrc/*.o"):
        if made.stat().st_mtime > changed:
            shutil.copy(made, folder / (digest + made.name))
    # The last -O counts. The symbols of release wheels are in it, to see that they compile and that none is missing.
    return {"CXX": f"'{wrapper}'", "CXXFLAGS": f"-O0 {ROOT / 'csrc/wheels/manylinux_2_28.cpp'}"}


def borrow(env):
    """Lets an environment import what this one has; an editable fastrnn is not among it."""
    (site,) = env.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(packages))


@pytest.fixture
def env(tmp_path):
    """A fresh environment: its folder."""
    folder = tmp_path / "env"
    venv.create(folder, symlinks=True, with_pip=False)
    borrow(folder)
    return folder


def pip(env, *arguments, folder, **changes):
    command = (sys.executable, "-m", "pip", "--python", env / "bin/python", "--disable-pip-version-check")
    return run(*command, *arguments, folder=folder, **changes)


def uv(*arguments, folder, **changes):
    return run(sys.executable, "-m", "uv", *arguments, folder=folder, **changes)


def assert_used(env, package=None):
    """The C++ library that was installed runs what it should; `package`: where it is."""
    package = package or env
    where = run(env / "bin/python", "-c", USE, folder=env, PATH=str(env / "bin"))
    assert where.startswith(f"{package}{os.sep}"), where


def test_pip(checkout, env, compiler):
    pip(env, "install", "--no-deps", ".", folder=checkout, **compiler)
    assert_used(env)


def test_pip_editable(checkout, env, compiler):
    pip(env, "install", "--no-deps", "--editable", ".", folder=checkout, **compiler)
    assert_used(env, checkout)


def test_pip_from_git_without_isolation(checkout, env, compiler):
    arguments = ("install", "--no-deps", "--no-build-isolation", "--no-cache-dir", f"git+file://{checkout}")
    pip(env, *arguments, folder=env, **compiler)
    assert_used(env)


@pytest.fixture(scope="module")
def wheel(checkout, compiler, tmp_path_factory):
    """What `build` makes: the sdist, and out of it the wheel."""
    to = tmp_path_factory.mktemp("dist")
    # Without isolation, which pip's tests have: it would make an environment for each of the two.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", to, folder=checkout, **compiler)
    (made,) = to.glob("*.whl")
    return made


def test_what_build_makes_serves_an_environment_without_a_compiler(wheel, env):
    pip(env, "install", "--no-deps", "--no-index", wheel, folder=env, PATH=str(env / "bin"))
    assert_used(env)


def test_the_tags_and_metadata_of_a_wheel(wheel):
    assert re.fullmatch(rf"fastrnn-[\d.]+-py3-none-{PLATFORM}\.whl", wheel.name)
    with ZipFile(wheel) as archive:
        (tags,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/WHEEL"))
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert f"Tag: py3-none-{PLATFORM}\n" in tags and "Root-Is-Purelib: false" in tags
    assert not re.search(r"\]\((?!\w+:|#)", metadata)  # a link that the package index could not follow
    assert not re.search(r"^Requires-Dist: triton(?!.*extra)", metadata, re.MULTILINE)


def test_uv_pip(checkout, env, compiler):
    uv("pip", "install", "--python", env / "bin/python", "--no-deps", ".", folder=checkout, **compiler)
    assert_used(env)


def test_uv_sync(checkout, env, compiler, tmp_path):
    """In a project that depends on fastrnn; torch is borrowed afterwards, so uv finds none."""
    (tmp_path / "pyproject.toml").write_text(f"""
[project]
name = "consumer"
version = "1"
requires-python = ">=3.10"
dependencies = ["fastrnn"]
[tool.uv]
override-dependencies = ["torch; sys_platform == 'nowhere'"]
[tool.uv.sources]
fastrnn = {{path = "{checkout}"}}
""")
    uv("sync", "--python", sys.executable, folder=tmp_path, **compiler)
    borrow(tmp_path / ".venv")
    assert_used(tmp_path / ".venv")


def newest(library, name):
    """The newest version that a compiled library asks for."""
    versions = re.findall(rb"\0" + name + rb"_([\d.]+)(?=\0)", library)
    return max(tuple(map(int, version.split(b"."))) for version in versions)


def test_the_symbols_of_a_release_wheel(wheel):
    """`make wheels` asks auditwheel, too, which knows all of them."""
    version = subprocess.check_output([*CXX.split(), "-dumpversion"], text=True)
    if "clang" in CXX or int(version.split(".")[0]) > 12:
        pytest.skip("release wheels are compiled by GCC 12 (.github/workflows/release.yml)")
    with ZipFile(wheel) as archive:
        library = archive.read("fastrnn/_C.so")
    assert newest(library, b"GLIBC") <= (2, 28)
    assert newest(library, b"GLIBCXX") <= (3, 4, 24)
    assert newest(library, b"CXXABI") <= (1, 3, 11)


@pytest.mark.parametrize("front_end", ["pip", "uv"])
def test_without_a_compiler_the_install_fails_with_a_sentence(checkout, env, front_end, tmp_path):
    if front_end == "pip":
        arguments = ("install", "--no-deps", "--no-build-isolation", ".")
        said = pip(env, *arguments, folder=checkout, ok=False, PATH=str(env / "bin"))
    else:
        arguments = ("--python", env / "bin/python", "--no-deps", ".")
        said = uv("pip", "install", *arguments, folder=checkout, ok=False, PATH=str(env / "bin"))
    sentence = (
        "fastrnn: cannot build fastrnn._C: there is no C++ compiler (g++, c++ or clang++): install one or set CXX; "
        "or install fastrnn, slow, without its C++ library, with FASTRNN_BUILD_CPU=0"
    )
    assert "".join(sentence.split()) in "".join(said.split())  # uv wraps what it prints to COLUMNS
    assert "Traceback" not in said
    assert not list(env.glob("lib/python*/site-packages/fastrnn*"))


def test_a_compiler_that_fails_ends_the_install_with_a_sentence(checkout, env):
    arguments = ("install", "--no-deps", "--no-build-isolation", ".")
    said = pip(env, *arguments, folder=checkout, ok=False, CXX="false")
    assert "fastrnn: false ended with exit code 1" in said and "Traceback" not in said


def test_an_install_without_the_library_says_what_mends_it(checkout, env):
    arguments = ("install", "--no-deps", "--no-build-isolation", f"git+file://{checkout}")
    pip(env, *arguments, folder=env, FASTRNN_BUILD_CPU="0")
    (package,) = env.glob("lib/python*/site-packages/fastrnn")
    assert not list(package.glob("*.so"))
    commit = run("git", "rev-parse", "HEAD", folder=checkout).strip()
    remedy = (
        "FASTRNN_BUILD_CPU=1 pip install --force-reinstall --no-deps --no-cache-dir "
        f"'fastrnn @ git+file://{checkout}@{commit}'"
    )
    said = run(env / "bin/python", "-c", WITHOUT_LIBRARY, folder=env)
    warned, info = said.split("info\n", 1)
    assert warned.count("this gru runs on torch's kernels") == warned.count("runs as a Python loop") == 1, warned
    assert warned.count(remedy) == 2
    assert f"csrc's library _C is not in {package}; to build it: {remedy}" in info


def test_a_switch_is_0_or_1(checkout):
    said = run(sys.executable, "setup.py", "--version", folder=checkout, ok=False, FASTRNN_BUILD_CPU="no")
    assert said == "fastrnn: FASTRNN_BUILD_CPU must be 0, 1 or unset, got 'no'\n"


def test_one_version(wheel, capsys):
    """The command and the metadata say the same."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fastrnn {wheel.name.split('-')[1]}\n"
