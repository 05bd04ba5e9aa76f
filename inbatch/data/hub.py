"""Training data by its name on the hub, hf://owner/name or hf://owner/name/subset, through `datasets`."""

from pathlib import Path
from typing import Any

from inbatch.data.columns import one_line
from inbatch.data.corpus import Corpora, open_corpus, open_described

PREFIX = "hf://"


def open_hub(name: str, split: str, corpora: Corpora) -> tuple[Any, str | None]:
    """Return the records of a split, and the corpus_id of the documents that they name by id, if any.

    Documents are in a subset of the same name and `_corpus`, as NeMo AutoModel's data sets have them; their corpus_id
    and instructions are in dataset_metadata.json. Raises ValueError, in one line, if anything cannot be fetched.
    """
    repository, subset = _parts(name)
    try:
        import datasets
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{name} needs `datasets`, which fetches it: pip install 'inbatch[hub]'") from None
    try:
        records = datasets.load_dataset(repository, subset, split=split)
        if subset is None or f"{subset}_corpus" not in datasets.get_dataset_config_names(repository):
            return records, None
        documents = datasets.load_dataset(repository, f"{subset}_corpus", split="train")
        path = hf_hub_download(repository, f"{subset}/dataset_metadata.json", repo_type="dataset")
    except Exception as error:  # of any class: no network, no such name, no permission
        raise ValueError(
            f"{name} cannot be fetched from the hub ({type(error).__name__}: {one_line(error)}): "
            "without a network give a folder"
        ) from error
    usual = {"class": "TextQADataset", "corpus_id": subset}
    return records, open_described(Path(path), name, lambda: open_corpus(documents), corpora, usual)


def _parts(name: str) -> tuple[str, str | None]:
    parts = name.removeprefix(PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"{name}: expected hf://owner/name, or hf://owner/name/subset")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None
