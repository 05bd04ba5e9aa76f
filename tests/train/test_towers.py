"""Towers as the configuration opens them."""

import pytest

from inbatch import BiEncoderModel
from inbatch.train.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from inbatch.train.towers import open_towers
from tests.tiny_models import save_tiny


@pytest.mark.parametrize(("asked", "kept"), [(None, "dot"), ("cosine", "cosine")])
def test_the_similarity_and_lengths_that_were_used_are_saved(tmp_path, asked, kept):
    model = BiEncoderModel.from_pretrained(save_tiny("bert", tmp_path / "backbone"))
    model.similarity, model.query_length = "dot", 50
    model.save_pretrained(tmp_path / "model")
    config = Config(
        model=ModelConfig(name_or_path=str(tmp_path / "model")),
        data=DataConfig(train="unused", query_max_len=7, passage_max_len=9),
        train=TrainConfig(output_dir=str(tmp_path / "run")),
        eval=EvalConfig(similarity=asked),
    )
    open_towers(config)["model"].save_pretrained(tmp_path / "trained")
    trained = BiEncoderModel.from_pretrained(tmp_path / "trained")
    assert (trained.similarity, trained.query_length, trained.document_length) == (kept, 7, None)
    assert trained.max_seq_length == 9
