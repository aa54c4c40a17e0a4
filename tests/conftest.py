"""What all tests share: Triton's interpreter where there is no GPU, the `device` fixture, the `gpu` marker.

FASTRNN_TEST_DEVICE chooses the device; unset, it is a GPU where there is one. A test that takes `device` is marked
`gpu` where that is a GPU.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before the first kernel is decorated: it decides once whether it will be compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = torch.device(os.environ.get("FASTRNN_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE.type == "cuda" and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """A kernel that went astray leaves its process without a GPU. pytest-xdist puts a fresh one in its place."""
    result = yield
    if torch.cuda.is_initialized() and hasattr(item.config, "workerinput"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
