"""Generation and gates on meshes of devices are those of one device."""

from __future__ import annotations

import numpy as np
import pytest

from tests.forced_devices import on_eight_cpu_devices
from tests.model.sharded_decode import MESHES


@pytest.mark.slow
def test_every_mesh_draws_the_same_tokens_and_makes_the_same_decisions() -> None:
    found = on_eight_cpu_devices("tests.model.sharded_decode")
    one = found.pop("one")
    assert set(found) == set(MESHES) and all(len(tokens) == 7 for tokens in one["continuations"])
    assert 0 < np.mean(one["gates"]) < 1
    assert sum(likeliest for _, likeliest in one["scores"]) == 1
    for name, other in found.items():
        assert other["continuations"] == one["continuations"], name
        assert other["gates"] == one["gates"], name
        np.testing.assert_allclose(other["scores"], one["scores"], rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(other["nll"], one["nll"], rtol=2e-5, err_msg=name)
