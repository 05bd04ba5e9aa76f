"""Keywords of other libraries are answered with the name of ours."""

import inspect

import pytest
import torch

from inbatch import GradCache, InfoNCELoss, info_nce
from inbatch.other_names import OTHER_NAMES


@pytest.mark.parametrize(
    ("call", "name", "words"),
    [
        (lambda **o: info_nce(torch.eye(2), torch.eye(2), **o), "scale", "info_nce has no scale: give temperature"),
        (lambda **o: info_nce(torch.eye(2), torch.eye(2), **o), "labels", "info_nce has no labels: give positives"),
        (InfoNCELoss, "gather_across_devices", 'InfoNCELoss has no gather_across_devices: give negatives="gather"'),
        (lambda **o: GradCache(len, len, **o), "mini_batch_size", "GradCache has no mini_batch_size: give micro_batch"),
    ],
)
def test_the_error_names_our_argument(call, name, words):
    with pytest.raises(TypeError, match=words):
        call(**{name: 1})


def test_no_name_is_ours_and_signatures_stay():
    for function in (info_nce, InfoNCELoss, GradCache):
        parameters = inspect.signature(function).parameters
        assert len(parameters) > 3
        assert not OTHER_NAMES.keys() & parameters.keys()
