"""A model folder with random weights of a known model's size, to try training at that size without its download.

    python -m benchmarks.step.make_model OUTPUT --tokenizer FOLDER [--size llama-3.2-1b] [--layers N]

Saved in bfloat16. Made on the GPU where there is one, which takes a second.
"""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen3Config


def sizes() -> dict[str, PretrainedConfig]:
    return {
        "llama-3.2-1b": LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        "qwen3-0.6b": Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer, of any model with fewer words")
    parser.add_argument("--size", choices=sorted(sizes()), default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than that model has")
    known = parser.parse_args()
    config = sizes()[known.size]
    config.num_hidden_layers = known.layers or config.num_hidden_layers
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModel.from_config(config)
    model.save_pretrained(known.output)
    tokenizer = AutoTokenizer.from_pretrained(known.tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(known.output)
    print(f"{known.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
