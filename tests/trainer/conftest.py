"""Fixtures of several files."""

import pytest


@pytest.fixture(params=["torch", "dali"])
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


@pytest.fixture
def dali():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
