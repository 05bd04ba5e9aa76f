"""The model card, README.md of a saved folder, and the way of a folder to the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCardData

from inbatch.encoder.loading import failing_as, is_hub_name

if TYPE_CHECKING:
    from inbatch.encoder.model import BiEncoderModel

TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "inbatch"]


def model_card(model: "BiEncoderModel", *, training: str = "", datasets: Sequence[str] = ()) -> str:
    """Return the README.md of a model: what the hub reads, what it is, how to use it, and how it was trained.

    training: Markdown of the last section. datasets: names on the hub of the training data.
    """
    base = model.base_model
    on_hub = base is not None and not Path(base).exists() and is_hub_name(base)
    data = ModelCardData(
        library_name="sentence-transformers",
        tags=TAGS,
        base_model=base if on_hub else None,
        pipeline_tag="sentence-similarity",
        datasets=list(datasets) or None,
    )
    limit = "any length" if model.max_seq_length is None else f"up to {model.max_seq_length} tokens"
    prompts = "".join(f"\n- prompt `{name}`: {text!r}" for name, text in model.prompts.items())
    several = model.multi_vector is not None
    kind = "MultiVectorEncoder" if several else "SentenceTransformer"
    vectors = f"{'several ' if several else ''}vectors of {model.embedding_dim} numbers"
    return f"""---
{data.to_yaml()}
---

# A text encoder for retrieval

- texts of {limit} to {vectors}, compared by {model.similarity}
- {model.kind}{", normalised" if model.l2_normalize else ""}
- base model: {base or "not recorded"}{prompts}

## Use

```python
from sentence_transformers import {kind}

model = {kind}("path or name of this model")
queries = model.encode_query(["What is a queue?"])
documents = model.encode_document(["A queue is a collection that is read in the order of writing."])
print(model.similarity(queries, documents))
```

`inbatch evaluate`, `encode` and `mine` take it too.
{training}"""


def push(folder: str | Path, repo_id: str, *, private: bool | None = None, message: str = "Upload the model") -> str:
    """Upload a saved folder to the hub as `repo_id`, which is made where it is missing; return its address.

    Sign in with `hf auth login`, or set HF_TOKEN. Raises ValueError for a folder without a model, and with the hub's
    words where it refuses.
    """
    folder = Path(folder).expanduser()
    if not any((folder / name).is_file() for name in ("modules.json", "query/modules.json")):
        raise ValueError(f"{folder} is not a saved model: expected a folder with modules.json")
    api = HfApi()
    with failing_as(f"the hub takes no {repo_id}"):
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, repo_type="model")
    return str(address)
