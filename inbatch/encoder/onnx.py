"""A model as one ONNX file, from tokens to the pooled embedding."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from inbatch.encoder.model import BiEncoderModel


class _OfTensors(nn.Module):
    def __init__(self, model: BiEncoderModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model({"input_ids": input_ids, "attention_mask": attention_mask})


def save_onnx(model: BiEncoderModel, path: str | Path) -> None:
    """Write input_ids and attention_mask, int64 [B, T], to sentence_embedding, float32 [B, D], for any B > 0 and T.

    Pooling and normalisation are inside; prompts are for the caller, who tokenises. Raises ValueError where onnx and
    onnxscript are not installed, and for a packed model.
    """
    if model.packed:
        raise ValueError("a packed model has no ONNX form: open it with packed=False")
    if model.pooling == "multi_vector":
        raise ValueError("a multi-vector model has no ONNX form here: sentence-transformers exports its backbone")
    model, batch = model.cpu().eval(), model.tokenize(["a text", "another text, of more tokens"])
    any_size = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    names = ("input_ids", "attention_mask")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                _OfTensors(model),
                tuple(batch[name] for name in names),
                dynamo=True,
                input_names=names,
                output_names=["sentence_embedding"],
                dynamic_shapes=dict.fromkeys(names, any_size),
                verbose=False,
            )
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'inbatch[onnx]'") from None
    assert program is not None
    program.save(str(path))
