"""What lies beside a model is copied, or the mistake names the place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from modelstock_jax.checkpoint_merge.companions import copy_companions
from modelstock_jax.errors import UserError


def test_a_folder_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    plan = SimpleNamespace(base=SimpleNamespace(directory=gone), finetuned=(), companion=0)
    with pytest.raises(UserError, match=f"{gone}: cannot be copied"):
        copy_companions(plan, tmp_path)
