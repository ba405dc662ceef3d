"""A model that is only asked which kernels it would run."""

import pytest
import torch

from octavo.errors import IntegrityError
from octavo.kernels import Case
from octavo.models.weightless import NoWeights


def test_it_notes_which_weights_are_asked_for_and_refuses_to_compute():
    weights = NoWeights()
    case = Case("cpu", torch.float32, {"out_features": 3, "in_features": 4})
    weight = weights.create(case)
    assert weights.cases == [case]
    with pytest.raises(IntegrityError, match="without weights"):
        weight.apply(torch.zeros(1, 4), None)
    with pytest.raises(IntegrityError, match="without weights"):
        weight.gather_rows(torch.tensor([0]))
