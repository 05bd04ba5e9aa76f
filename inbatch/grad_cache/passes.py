"""Two passes over the micro-batches within a memory budget: encode all, then again what kept no graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from inbatch.grad_cache.graph import leaves
from inbatch.grad_cache.group import Group, Pass
from inbatch.grad_cache.memory import (
    CPU_TOKENS,
    FIRST_TOKENS,
    LEAST_TOKENS,
    MIB,
    MOST_TOKENS,
    PassState,
    Trial,
    fewest_tokens_that_fill,
    free_bytes,
    graph_bytes,
    on_cuda,
    restored_random_state,
    timed_trial,
)
from inbatch.grad_cache.micro_batches import MicroBatch, cut, placeholder


@dataclass(kw_only=True)
class Passes:
    """GradCache's options on size, and what they came to. sharded: every rank must encode equally often."""

    budget: int | str | None
    keep_mib: int | str
    multiple: int
    packed: bool
    max_over_ranks: Callable[[int], int]
    sharded: bool
    _keep_share: float = 1.0
    _peak_per_token: float | None = None  # forward and backward, where it was measured

    def first(self, groups: Sequence[Group], reserved: int, *, look: bool) -> None:
        """Encode every micro-batch of every group.

        reserved: bytes that are free and not for graphs. look: also note the leaves behind each group's embeddings.
        """
        if self.budget == "auto" and torch.is_grad_enabled():
            self.budget = self._find_budget(groups, reserved)
        held = 0
        for group in groups:
            micro_batches = self._cut(group, FIRST_TOKENS if self.budget == "auto" else self.budget)
            micro_batches += [placeholder(1)] * (self.max_over_ranks(len(micro_batches)) - len(micro_batches))
            held += self._encode_all(group, micro_batches, reserved, held, look)

    def _cut(self, group: Group, budget) -> list[MicroBatch]:
        return cut(group.batches, budget=budget, multiple=self.multiple, packed=self.packed)

    def _encode_all(self, group: Group, micro_batches: list[MicroBatch], reserved: int, held: int, look: bool) -> int:
        """Encode the group, its first micro-batches with a graph, as many as fit; the bytes that those hold."""
        # The first always with a graph: it tells whether the encoder trains, and what a graph weighs.
        state = PassState()
        output, size = graph_bytes(lambda: group.encoded(micro_batches[0]), state)
        group.trains, kept, kept_bytes = output.requires_grad, 0, 0
        if group.trains:
            if look:
                group.leaves = leaves(output)
            kept, kept_bytes = self._graphs_that_fit(micro_batches, size, reserved, output.device, held)
        group.passes.append(Pass(micro_batches[0], state, output if kept else output.detach()))
        del output
        for index, micro_batch in enumerate(micro_batches[1:], 1):
            if index == max(1, kept):
                # A weight that autocast cast in one grad mode must not serve the other.
                torch.clear_autocast_cache()
            state = PassState()
            output = self._with_graph(group, micro_batch, state) if index < kept else None
            if output is None:
                kept = min(kept, index)
                with torch.no_grad():
                    output = group.encoded(micro_batch)
            group.passes.append(Pass(micro_batch, state, output))
        torch.clear_autocast_cache()
        return kept_bytes

    def _with_graph(self, group: Group, micro_batch: MicroBatch, state: PassState) -> Tensor | None:
        """Encode with a graph; None if memory is out: the estimate was too high, in later steps as well."""
        try:
            return group.encoded(micro_batch)
        except torch.OutOfMemoryError:
            if self.sharded:  # the other ranks are inside a collective by now
                raise
        self._keep_share *= 0.8
        torch.clear_autocast_cache()
        state.restore()
        if on_cuda():
            torch.cuda.empty_cache()
        return None

    def _graphs_that_fit(
        self, micro_batches: list[MicroBatch], size: int, reserved: int, device: torch.device, held: int
    ) -> tuple[int, int]:
        """Return how many micro-batches keep their graph, equal on all ranks, and the bytes that this takes.

        size: of the first one's graph, which is there already. held: of those of other groups.
        """
        if self.keep_mib == "auto":
            # One is made again only when the kept ones are gone, so that what is spare serves a backward's temporaries,
            # as measured, or as much as a graph. The CPU's saved tensors may be the weights, which take nothing new.
            spare = size if self._peak_per_token is None else self._peak_per_token * micro_batches[0].tokens - size
            spare = max(spare, size / 8) - 0.9 * size if device.type == "cuda" else held
            budget = (free_bytes(reserved, device) - spare) * self._keep_share
        else:
            budget = int(self.keep_mib) * MIB * self._keep_share - held
        per_token = size / micro_batches[0].tokens
        taken = [per_token * tokens for tokens in accumulate(one.tokens for one in micro_batches)]
        fits = -self.max_over_ranks(-sum(total <= budget for total in taken))
        return fits, int(taken[fits - 1]) if fits else 0

    def _find_budget(self, groups: Sequence[Group], reserved: int) -> int:
        """Return the token budget by what the longest rows take forward and backward."""
        if not on_cuda() or not self._encodes_on_cuda(groups):
            return CPU_TOKENS
        tried, most = FIRST_TOKENS, MOST_TOKENS
        peaks: dict[int, float] = {}

        def attempt(tokens: int) -> Trial:
            nonlocal tried
            tried = tokens
            trial = self._attempt(groups, tokens)
            peaks[tokens] = self.max_over_ranks(trial.peak_bytes) / self.max_over_ranks(trial.tokens)
            return trial

        while True:
            try:
                found = fewest_tokens_that_fill(
                    attempt,
                    first=min(FIRST_TOKENS, most),
                    most=most,
                    free=-self.max_over_ranks(-free_bytes(reserved, torch.device("cuda"))),
                    max_over_ranks=self.max_over_ranks,
                )
                # Of the size itself: in a smaller one, what the weights' gradients take weighs more for each token.
                self._peak_per_token = peaks.get(found, max(peaks.values()))
                return found
            except torch.OutOfMemoryError as error:
                if tried <= LEAST_TOKENS or self.sharded:
                    raise torch.OutOfMemoryError(
                        f"GradCache: {tried} tokens forward and backward do not fit; set micro_batch_tokens lower, or "
                        "use gradient checkpointing, shorter texts or sharded parameters"
                    ) from error
            most = tried // 2
            torch.cuda.empty_cache()

    def _encodes_on_cuda(self, groups: Sequence[Group]) -> bool:
        """Return False for a model on the CPU, in a process that uses a GPU for something else."""
        with torch.no_grad(), restored_random_state():
            return all(group.encoded(self._cut(group, LEAST_TOKENS)[0]).is_cuda for group in groups)

    def _attempt(self, groups: Sequence[Group], tokens: int) -> Trial:
        """Return what the first micro-batch of every group takes together."""
        micro_batches = [self._cut(group, tokens)[0] for group in groups]

        def forward_and_backward() -> None:
            for group, micro_batch in zip(groups, micro_batches, strict=True):
                output = group.encoded(micro_batch)
                if output.requires_grad:
                    output.backward(torch.zeros_like(output))

        with restored_random_state():
            return timed_trial(forward_and_backward, sum(micro_batch.tokens for micro_batch in micro_batches))


def second_pass(
    groups: Sequence[Group],
    gradients: Mapping[int, Tensor],
    give: Callable[[Tensor, Tensor], None],
    give_last: Callable[[Tensor, Tensor], None] | None = None,
) -> bool:
    """Go backward through the kept graphs, which frees them, then encode the rest again, each with its backward.

    gradients: of the embeddings, by the number of the batch. give: (output, its gradient) -> None, the backward;
    give_last: that of the last micro-batch. Returns False where there was none.
    """
    jobs = [
        (group, one, gradient)
        for group in groups
        if group.trains
        for one, gradient in zip(group.passes, group.gradients(gradients), strict=True)
    ]
    jobs.sort(key=lambda job: not job[1].output.requires_grad)
    for left, (group, one, gradient) in zip(reversed(range(len(jobs))), jobs, strict=True):
        output, one.output = one.output, one.output.detach()
        if not output.requires_grad:
            with one.state.again():
                output = group.encoded(one.micro_batch)
        (give if left or give_last is None else give_last)(output, gradient)
    return bool(jobs)
