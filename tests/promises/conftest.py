"""What the promises' tests share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture(scope="module")
def plain(model: Any) -> Tensor:
    """What the unpatched model samples."""
    from ..shared.models import sample

    return sample(model)
