"""Pooled tokens against sentence-transformers' pooling of one document at a time, by scipy's clusters."""

import pytest
import torch
from torch.nn.functional import normalize

from inbatch.encoder import token_pooling


@pytest.mark.parametrize(("factor", "protected"), [(1, 1), (2, 1), (3, 0), (4, 2), (100, 1)])
def test_documents_are_pooled_as_in_sentence_transformers(factor, protected, monkeypatch):
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    monkeypatch.setattr(token_pooling, "_ELEMENTS", 4 * 30**2)  # several pieces
    vectors_BTD = normalize(torch.randn(9, 30, 5, generator=torch.Generator().manual_seed(factor)), dim=-1)
    for row, length in enumerate((30, 1, 2, 7, 0, 29, 3, 13, 30)):
        vectors_BTD[row, length:] = 0
    vectors_BTD[:, 4] = 0  # left out, as by a skip word
    pooled_BTD = token_pooling.pool_tokens(vectors_BTD, factor, protected)
    theirs = HierarchicalTokenPooling(factor, num_protected_tokens=protected)
    for before_TD, after_TD in zip(vectors_BTD, pooled_BTD, strict=True):
        found, expected = (
            sorted(some.tolist())
            for some in (after_TD[after_TD.any(-1)], theirs.pool_one(before_TD[before_TD.any(-1)]))
        )
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
