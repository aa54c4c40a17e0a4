"""What all tests share: Triton's interpreter where there is no GPU, the `device` fixture, the `gpu` marker.

FASTRNN_TEST_DEVICE chooses the device; unset, it is a GPU where there is one.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before the first kernel is decorated: it decides once whether it will be compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("FASTRNN_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
