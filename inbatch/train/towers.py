"""The encoders of a run: one tower for queries and passages alike ("model"), or one for each ("query", "passage").

Opened as the configuration says, and saved as folders that sentence-transformers opens.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from inbatch import collectives
from inbatch.data.files import replacing, write_text
from inbatch.encoder.card import model_card
from inbatch.encoder.lora import add_lora, check_adapter, has_lora, merge_lora
from inbatch.encoder.model import BiEncoderModel
from inbatch.encoder.sentence_transformer import open_encoder
from inbatch.train import checkpoint
from inbatch.train.card import hub_data, training_section
from inbatch.train.config import Config
from inbatch.train.config_file import load
from inbatch.train.parallel import whole_state
from inbatch.train.run_folder import read_metrics


def open_towers(config: Config, packed: bool | None = False) -> dict[str, BiEncoderModel]:
    """Return the towers by name, as training starts: on the CPU, float32, LoRA added, a frozen tower frozen.

    packed: as `BiEncoderModel.from_pretrained` takes it.
    """
    names = ("query", "passage") if config.model.separate_towers else ("model",)
    return {name: _open(config, packed, frozen=name == config.model.freeze) for name in names}


def _open(config: Config, packed: bool | None = False, *, frozen: bool = False) -> BiEncoderModel:
    prompts = {"query": config.data.query_prefix, "document": config.data.passage_prefix}
    tower = open_encoder(
        config.model.name_or_path,
        backend=config.model.backend,
        pooling=config.model.pooling,
        l2_normalize=config.model.l2_normalize,
        bidirectional=config.model.bidirectional,
        prompts={name: text for name, text in prompts.items() if text is not None},
        # The model is used at the lengths it was trained at: evaluation here and sentence-transformers later agree.
        max_seq_length=max(config.data.query_max_len, config.data.passage_max_len),
        dtype=torch.float32,
        attn_implementation=config.model.attn_implementation,
        packed=packed,
        trust_remote_code=config.model.trust_remote_code,
        multi_vector={name: value for name, value in vars(config.multi_vector).items() if value is not None} or None,
    ).train()
    several = tower.multi_vector is not None
    if several:
        _check_multi_vector(config)
    # Lengths by task are saved as those trained at, too, and the comparison as the one that was measured.
    if several or tower.query_length:
        tower.query_length = config.data.query_max_len
    if several or tower.document_length:
        tower.document_length = config.data.passage_max_len
    tower.similarity = config.eval.similarity or tower.similarity
    if frozen:
        # In evaluation mode too: dropout would only be noise.
        return tower.requires_grad_(False).eval()
    if config.model.gradient_checkpointing:
        tower.gradient_checkpointing_enable()
    lora = config.lora
    if lora.r is not None:
        if tower.backend_because is not None:
            raise ValueError(
                f"lora.r is {lora.r}, which is for models that inbatch opens itself ({tower.backend_because}): set it "
                "to null"
            )
        if not lora.merge:
            check_adapter(tower)
        add_lora(
            tower,
            r=lora.r,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            seed=config.train.seed,
        )
    return tower


def _check_multi_vector(config: Config) -> None:
    """Raise ValueError for settings that have no meaning with several vectors a text."""
    wrong = {
        "eval.similarity": config.eval.similarity,
        "loss.detach_remote": config.loss.detach_remote or None,
        "loss.impl": "fused" if config.loss.impl == "fused" else None,
        "loss.objective": None if config.loss.objective in ("info_nce", "clip") else config.loss.objective,
    }
    for key, value in wrong.items():
        if value is not None:
            raise ValueError(f"{key} is {value}, which a multi-vector model does not have: leave it out")


def save_towers(towers: Mapping[str, BiEncoderModel], config: Config, folder: Path) -> None:
    """Write the whole models on rank 0, LoRA merged into their weights or apart; every rank calls it."""
    states = {name: whole_state(tower) for name, tower in towers.items()}

    def write() -> None:
        with replacing(folder) as filled:
            for name, tower in towers.items():
                state = states[name]
                if has_lora(tower) and config.lora.merge:
                    # Merged in a copy: the towers in training may be sharded.
                    tower = _open(config)
                    tower.load_state_dict(state)
                    merge_lora(tower)
                    state = None
                tower.save_pretrained(_place(filled, name), state_dict=state)
            write_cards(towers, config, filled)

    collectives.on_rank_0(write)


def write_cards(towers: Mapping[str, BiEncoderModel], config: Config, folder: Path) -> None:
    """Write the cards of saved models, with the run's figures so far."""
    section = training_section(config, read_metrics(config.train.output_dir), collectives.world_size())
    for name, tower in towers.items():
        card = model_card(tower, training=section, datasets=hub_data(config))
        write_text(_place(folder, name) / "README.md", card)


def _place(folder: Path, name: str) -> Path:
    return folder if name == "model" else folder / name


def export(source: str | Path, output: str | Path) -> Path:
    """Write the model of a checkpoint, or of a run's newest one, to the folder `output`; return the checkpoint.

    One process does it, on the CPU, whatever the number of ranks that wrote the checkpoint. With separate towers the
    models are `output`/query and `output`/passage. Raises ValueError where there is no checkpoint of a run, and where
    `output` exists.
    """
    if Path(output).exists():
        raise ValueError(f"{output} exists already: name a folder that does not")
    while True:
        newest = checkpoint.newest_whole(Path(source) / "checkpoints")
        path = newest[1] if newest else Path(source).resolve()
        run = path.parent.parent
        if path.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
            raise ValueError(
                f"{source} is neither a run with checkpoints nor a checkpoint in one: expected RUN or "
                "RUN/checkpoints/step-00000100"
            )
        if newest is None and (problem := checkpoint.damage(path)) is not None:
            raise ValueError(problem)
        config = load(run / "config.yaml")
        towers = open_towers(config)
        try:
            checkpoint.load(path, modules=towers)
            break
        except FileNotFoundError:
            if newest is None or path.exists():
                raise
            # The run goes on and has deleted this one: there is a newer one.
    with replacing(output) as filled:
        for name, tower in towers.items():
            if config.lora.merge:
                merge_lora(tower)
            tower.save_pretrained(_place(filled, name))
        write_cards(towers, config, filled)
    return path
