"""What the tests of both implementations share."""

from collections.abc import Iterator

import pytest
import torch

from fedalt_kernels import plans


@pytest.fixture(autouse=True)
def _fresh_plans() -> Iterator[None]:
    """A test may patch what plans are made by, and leaves none behind."""
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialized memory is NaN, so a result that reads it cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
