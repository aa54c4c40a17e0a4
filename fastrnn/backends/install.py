"""How this package is installed again, with the libraries that it lacks."""

import json
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SWITCHES = {"_C": "FASTRNN_BUILD_CPU", "_C_cuda": "FASTRNN_BUILD_CUDA"}  # of setup.py


def command(library: str) -> str:
    """What installs this package with a library of csrc, where there is a compiler.

    pip may have cached a wheel without the library, and an installed version that is the same would be kept.
    """
    return f"{SWITCHES[library]}=1 pip install --force-reinstall --no-deps --no-cache-dir {source()}"


def source() -> str:
    """Where this package came from, as an argument of pip."""
    checkout = PACKAGE.parent
    if (checkout / "setup.py").exists():  # imported from a clone, installed or not
        return f"-e {checkout}"
    try:
        origin = json.loads(metadata.distribution("fastrnn").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    if origin.get("url", ".whl").endswith(".whl"):  # a wheel that lacks a library would lack it again
        return "--no-binary fastrnn fastrnn"
    if "vcs_info" not in origin:
        return f"'fastrnn @ {origin['url']}'"
    vcs = origin["vcs_info"]
    return f"'fastrnn @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}'"
