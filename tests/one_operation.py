"""For tests of the whole-network operation: a call that does not run by it fails."""

import pytest

from fastrnn import functional


@pytest.fixture
def only_the_operation(monkeypatch):
    """Makes the general path fail on backend `cpu`."""
    general = functional.recurrent

    def recurrent(cell, input, hx, params, backend, **options):
        assert backend == "reference"
        return general(cell, input, hx, params, backend, **options)

    monkeypatch.setattr(functional, "recurrent", recurrent)
