"""The dense formula, as one would write it on paper: the specification that every other path is tested against.

Shapes: B queries of this rank (rows), N passages and Q queries of all ranks that are columns, D dimension of a prefix.

    s(a, b) = a . b / temperature                        or, for texts of several vectors, max_sim(a, b) / temperature
    l_i     = log( exp s(q_i, d_i) + sum over directions and columns j in C(i) of exp s(row_i, column_j) ) - s(q_i, d_i)
    loss    = sum over terms of weight * sum_i weight_i * l_i

C(i) leaves out the row itself (its positive), its false negatives and columns that are not its candidates. Hardness
adds strength * (the similarity), as a constant, to the scores of negatives. Autograd does the rest.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inbatch.losses.masking import Keys, by_group, mask, match


def dense_loss(
    terms: Sequence[tuple[Tensor, Mapping[str, Tensor], float]], places: Mapping[str, Tensor], row_keys: Keys,
    column_keys: Mapping[str, Keys], temperature: Tensor | float, margin: float | None, weights_B: Tensor | None,
    rules_B: Tensor | None, hardness: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss, 0-d, and int64 [B, 2]: by row the columns masked and those that beat the positive (first term).

    terms: of each, the similarities with the positives [B, 1], those with all columns [B, C] by direction, its weight.
    places, column_keys: by kind of column, "passage" or "query": the place of each row's positive (or of the row
    itself) among them [B], and their keys. weights_B: of the rows. rules_B: what their groups decide (`masking`), if
    anything does. hardness: strengths for negatives of the row's group and for others, in query_to_passage.
    """
    loss, counts = torch.zeros((), dtype=terms[0][0].dtype, device=terms[0][0].device), None
    for similarity_B1, similarities, weight in terms:
        candidates = [similarity_B1 / temperature]
        counts_B2 = torch.zeros(len(similarity_B1), 2, dtype=torch.int64, device=similarity_B1.device)
        for direction, similarity_BC in similarities.items():
            column = direction.split("_to_")[1]
            pairs = match(row_keys, column_keys[column], only_itself=direction == "passage_to_query")
            masked_BC = mask(pairs, *similarity_BC.shape, device=similarity_BC.device)
            if margin is not None:
                masked_BC |= similarity_BC.detach() > similarity_B1.detach() + margin
            hardness_BC = 0.0
            if rules_B is not None:
                group_BC, left_out_BC, kept_BC = by_group(row_keys.groups, column_keys[column].groups, rules_B)
                masked_BC = (masked_BC & ~kept_BC) | left_out_BC
                if direction == "query_to_passage":
                    hardness_BC = torch.where(group_BC, *(strength * similarity_BC.detach() for strength in hardness))
            itself_BC = places[column][:, None] == torch.arange(similarity_BC.shape[1], device=similarity_BC.device)
            masked_BC &= ~itself_BC
            # Divided first, filled last: no -inf meets the temperature, whose gradient would be 0 * inf.
            scores_BC = (similarity_BC / temperature + hardness_BC).masked_fill(masked_BC | itself_BC, -math.inf)
            candidates.append(scores_BC)
            counts_B2 += torch.stack([masked_BC.sum(1), (scores_BC > candidates[0]).sum(1)], dim=1)
        loss_B = torch.logsumexp(torch.cat(candidates, dim=1), dim=1) - candidates[0][:, 0]
        loss = loss + weight * (loss_B if weights_B is None else loss_B * weights_B).sum()
        counts = counts_B2 if counts is None else counts
    assert counts is not None
    return loss, counts


def dot_products(
    queries_BD: Tensor, positives_BD: Tensor, columns: Mapping[str, Tensor], dim: int, directions: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the similarities of a term of `dense_loss`, of one vector a text, in float32 (float64 for float64)."""
    dtype = torch.float64 if queries_BD.dtype == torch.float64 else torch.float32
    rows = {"query": _prefix(queries_BD, dim).to(dtype), "passage": _prefix(positives_BD, dim).to(dtype)}
    similarities = {}
    for direction in directions:
        row, column = direction.split("_to_")
        similarities[direction] = rows[row] @ _prefix(columns[column], dim).to(dtype).T
    return (rows["query"] * rows["passage"]).sum(1, keepdim=True), similarities


def max_similarities(queries: Sequence[Tensor], passages: Sequence[Tensor], *, mean: bool) -> Tensor:
    """Return max_sim(query, passage) of all pairs [B, C], of several vectors a text, each [its tokens, D].

    The sum (or mean) over the query's tokens of the maximum over the passage's tokens of their products.
    """
    dtype = torch.promote_types((*queries, *passages)[0].dtype, torch.float32)
    rows = []
    for query_tD in queries:
        best = [(query_tD.to(dtype) @ passage_TD.to(dtype).T).max(dim=1).values for passage_TD in passages]
        rows.append(torch.stack([best_t.mean() if mean else best_t.sum() for best_t in best]))
    return torch.stack(rows)


def _prefix(embeddings: Tensor, dim: int) -> Tensor:
    """Return the first `dim` dimensions, renormalised; the full dimension unchanged."""
    if dim == embeddings.shape[1]:
        return embeddings
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return F.normalize(embeddings[:, :dim].to(dtype), dim=1).to(embeddings.dtype)
