"""Spread an encoder over the ranks: whole on every rank (DDP), or a part of each layer on each (FSDP2).

Under FSDP2 every parameter, its gradient and the optimizer's moments lie in float32, sharded; a layer is gathered when
it is needed, and with bf16 it is gathered as a bfloat16 copy that it computes with. That serves one process as well:
float32 master weights, bfloat16 computation, no casts in between.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from inbatch import collectives
from inbatch.encoder.model import BiEncoderModel

LARGE = 100_000_000  # parameters of all layers


def replicate(model: BiEncoderModel, device: torch.device) -> nn.Module:
    """Return the model on its device, in DDP where several ranks train it; GradCache starts its reduction."""
    model.to(device)
    if collectives.world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def shard(model: BiEncoderModel, device: torch.device, *, bf16: bool) -> nn.Module:
    """Make the model an FSDP2 module: each transformer layer is a unit, all the rest is the root's.

    The model comes on the CPU, so that a device never holds more of it than its share and one layer. Needs a process
    group, if only of one process (`collectives.group_of_one`).
    """
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for unit in [*transformer_layers(model.backbone), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        if device.type == "cpu":
            # gloo cannot average: torch 2.8 took its sum for the mean.
            unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def is_spread(network: nn.Module) -> bool:
    """Return True if its gradients are reduced over ranks: not in one process, nor if nothing is trained."""
    return isinstance(network, (DistributedDataParallel, FSDPModule))


def transformer_layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the elements of the backbone's largest module list, which are its layers in every encoder and decoder."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(backbone).__name__} keeps its layers in no ModuleList: use train.parallel ddp")
    # The first of equals: experts, say, lie in lists within a layer.
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())))


def compile_layers(model: BiEncoderModel) -> None:
    """Compile each transformer layer (torch.compile), for any batch size and length. Call it before `shard`.

    Only `forward`: hooks of FSDP2 and gradient checkpointing stay around the compiled code. All layers share it.

    Large layers keep what products and attention gave alone for their backward pass; norms, rotations and activations
    are computed again there, within kernels that read the same anyway. A Qwen3 keeps a third less, so that more graphs
    fit. Not where something is dropped: torch draws anew what it computes again, and the gradient would be another's.

    The sums over tokens that the gradients of LayerNorm's weights need get kernels of their own. Since 2.10 torch puts
    them in one with the sums over dimensions, and that backward pass takes 2.9 instead of 1.2 ms for a layer of MiniLM
    (262144 tokens, H200). With RMSNorm torch's way is the faster one: a step of Qwen3-0.6B takes 1634 and not 1747 ms.
    """
    layers = transformer_layers(model.backbone)
    large = sum(parameter.numel() for layer in layers for parameter in layer.parameters()) > LARGE
    lean = large and not _drops(model.backbone)
    apart = "triton.mix_order_reduction"
    normed = any(isinstance(module, nn.LayerNorm) for module in model.backbone.modules())
    options: dict[str, Any] | None = {apart: False} if normed and apart in torch._inductor.list_options() else None
    for layer in layers:
        compiled = torch.compile(layer.forward, dynamic=True, options=options)
        layer.forward = partial(_keeping_less, compiled) if lean else compiled


def _drops(backbone: nn.Module) -> bool:
    """Return True if some module or setting drops anything at random."""
    settings = backbone.config.to_dict().items()  # type: ignore[union-attr, operator]
    probabilities = [module.p for module in backbone.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    probabilities += [value for name, value in settings if "drop" in name and isinstance(value, float)]
    return any(probabilities)


def _keeping_less(compiled: Callable, *args: object, **options: object) -> object:
    # Read where a call compiles. Set for good, it would hold for models that drop something, too. Not by config.patch,
    # which takes 0.2 ms a call, for each layer of each pass.
    config = torch._functorch.config
    before, config.aggressive_recomputation = config.aggressive_recomputation, True
    try:
        return compiled(*args, **options)
    finally:
        config.aggressive_recomputation = before


@contextmanager
def gathered(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Let sharded networks hold all their parameters inside (as bfloat16 where they compute so), for forward passes.

    A pass then needs no communication, so ranks may run different numbers of them, as evaluation does.
    """
    sharded = [network for network in networks if isinstance(network, FSDPModule)]
    for network in sharded:
        network.set_reshard_after_forward(False)
        token = torch.ones(1, 1, dtype=torch.int64, device=next(network.parameters()).device)  # type: ignore[attr-defined]
        with torch.no_grad():
            network({"input_ids": token, "attention_mask": token})  # type: ignore[operator]
    try:
        yield
    finally:
        for network in sharded:
            for unit in network.modules():  # type: ignore[attr-defined]
                if isinstance(unit, FSDPModule):
                    unit.reshard()
                    # The root's parameters are the first that a backward pass needs: it keeps them, as by default.
                    unit.set_reshard_after_forward(unit is not network, recurse=False)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state with every tensor whole and on the CPU, on rank 0; empty on other ranks. All ranks call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if collectives.rank() == 0 else {}  # type: ignore[return-value]
