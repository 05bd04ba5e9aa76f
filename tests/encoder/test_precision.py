"""bfloat16 copies compute forward and backward, and gradients add up in the float32 parameters."""

import pytest
import torch

from inbatch import BiEncoderModel, GradCache, collectives, info_nce
from inbatch.encoder.lora import add_lora
from inbatch.encoder.precision import bf16_copies, chosen
from inbatch.train.parallel import compile_layers, is_spread, replicate
from tests.helpers import device
from tests.tiny_models import save_tiny

TEXTS = ["the cat sat", "a dog ran fast on the red mat", "what is blue", "who", "the dog of the cat", "where is a mat"]


def loss(queries_BD, passages_BD):
    return info_nce(queries_BD, passages_BD, temperature=0.5)


def open_tiny(folder, **options) -> BiEncoderModel:
    return BiEncoderModel.from_pretrained(folder, dtype="float32", **options).train().to(device())


def gradient(model, network=None, *, copies: bool, call=loss, texts=TEXTS, **options) -> torch.Tensor:
    """The gradient of all trained parameters by a step in which dropout is that of seed 1."""
    network = model if network is None else network
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    step = GradCache(
        lambda batch: network(model.to_device(batch)),
        call,
        modules=[network] if is_spread(network) else [],
        around=lambda: bf16_copies(*[model] * copies),
        **{"micro_batch_tokens": 16, **options},
    )
    step(model.tokenize(texts), model.tokenize(texts[1:] + texts[:1]), reduce=is_spread(network))
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return torch.cat([parameter.grad.flatten() for parameter in trained])


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("way", ["packed", "padded", "checkpointing", "lora", "frozen"])
def test_the_gradient_is_that_of_float32_to_what_bfloat16_resolves(tmp_path, kind, way):
    model = open_tiny(save_tiny(kind, tmp_path), packed=way == "packed")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
    if way == "lora":
        add_lora(model, r=4, alpha=8, dropout=0.1)
    if way == "frozen":
        model.backbone.get_input_embeddings().requires_grad_(False)
    expected = gradient(model, copies=False)
    actual = gradient(model, copies=True)
    assert 1e-4 < distance(actual, expected) < 6e-2
    # Dropout is replayed, and what was encoded twice computes with the same copies.
    assert distance(gradient(model, copies=True, keep_graph_mib=0), actual) < 1e-6


def test_gradients_add_up_in_float32(tmp_path):
    """In bfloat16 a sum of 512 does not grow by one."""
    model = open_tiny(save_tiny("bert", tmp_path))

    def total(queries_BD, passages_BD):
        weights_B = torch.ones(len(queries_BD), device=queries_BD.device)
        weights_B[len(weights_B) // 2] = 512
        return (queries_BD[:, :4].sum(1) * weights_B).sum() + passages_BD[:, 5] @ weights_B

    of_one = gradient(model, copies=True, call=total, texts=TEXTS[:1], micro_batch_tokens=1)
    of_many = gradient(model, copies=True, call=total, texts=TEXTS[:1] * 16, micro_batch_tokens=1)
    assert distance(of_many, of_one * (512 + 15) / 512) < 1e-5


def test_each_parameter_is_copied_once_a_step_and_ties_stay(tmp_path):
    model = open_tiny(save_tiny("bert", tmp_path))
    linear = torch.nn.Linear(2, 2)
    linear.also = torch.nn.Linear(2, 2)
    linear.also.weight = linear.weight
    before = dict(model.named_parameters())
    with bf16_copies(model, linear):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert linear.also.weight is linear.weight
        inside = dict(model.named_parameters())
        with bf16_copies(model), torch.no_grad():
            assert all(value is inside[name] for name, value in model.named_parameters())
    with pytest.raises(ArithmeticError), bf16_copies(model):
        raise ArithmeticError
    assert all(value is before[name] for name, value in model.named_parameters())
    assert [chosen(*given) for given in (("auto", torch.device("cpu")), ("bf16", device()))] == ["fp32", "bf16"]


def test_compiled_layers_are_compiled_with_a_graph_and_without_and_never_again(tmp_path, monkeypatch):
    model, compiled, real = open_tiny(save_tiny("bert", tmp_path), packed=True), [], torch.compile

    def backend(module, inputs, options=None):
        compiled.append([tensor.shape for tensor in inputs if isinstance(tensor, torch.Tensor)])
        return module

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    compile_layers(model)
    short = [text for text in TEXTS if len(text) < 20]  # two in a micro-batch; one alone is compiled for itself
    for rows in (5, 4, 3):
        gradient(model, copies=True, texts=short[:rows], keep_graph_mib=0)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with bf16_copies(model), torch.no_grad():
        model(model.tokenize(TEXTS))
    assert len(compiled) == 2
    assert all(isinstance(size, int) for size in compiled[0][1]), "weights have shapes that the compiler may rely on"


def ddp_body(rank: int, folder: str) -> None:
    model = open_tiny(folder)
    texts = TEXTS[: 2 + 2 * rank]

    def local(queries_BD, passages_BD):
        return info_nce(queries_BD, passages_BD, temperature=0.5, negatives="local")

    mine = gradient(model, copies=True, call=local, texts=texts, micro_batch_tokens=8)
    mean = collectives.all_reduce(mine) / 2
    network = replicate(model, device())
    assert is_spread(network)
    reduced = gradient(model, network, copies=True, call=local, texts=texts, micro_batch_tokens=8)
    assert distance(reduced, mean) < 1e-6


def test_ddp_reduces_float32_gradients(pool, tmp_path):
    pool.run(ddp_body, 2, str(save_tiny("bert", tmp_path)))
