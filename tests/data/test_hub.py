"""Training data by its name on the hub, which a stand-in for the network serves."""

import json

import datasets
import huggingface_hub
import pytest

from inbatch.data import open_examples

DOCUMENTS = [{"id": "d1", "text": "a red dog"}, {"id": "d2", "text": "the cat"}, {"id": "d3", "text": "a mat"}]
QUESTIONS = [
    {"question_id": "1", "question": "what ran", "pos_doc": [{"id": "d1"}], "neg_doc": [{"id": "d3"}, {"id": "d2"}]},
    {"question_id": "2", "question": "what sat", "pos_doc": [{"id": "d2"}], "neg_doc": [{"id": "d1"}, {"id": "d3"}]},
]
SUBSETS = {
    None: [{"anchor": "what ran", "positive": "a red dog"}],
    "plain": [{"anchor": "what sat", "positive": "the cat"}],
    "FEVER": QUESTIONS,
    "FEVER_corpus": DOCUMENTS,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    metadata = {"corpus_id": "wiki", "query_instruction": "Find:"}

    def load(repository: str, subset: str | None = None, *, split: str) -> datasets.Dataset:
        if not repository.endswith("/some-data"):
            raise ConnectionError(f"Couldn't reach\n{repository} on the Hub")
        assert split == "train"
        return datasets.Dataset.from_list(SUBSETS[subset])

    def download(repository: str, name: str, *, repo_type: str) -> str:
        assert (name, repo_type) == ("FEVER/dataset_metadata.json", "dataset")
        path = tmp_path / "metadata.json"
        path.write_text(json.dumps(metadata))
        return str(path)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda repository: [name for name in SUBSETS if name])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return metadata


def test_data_on_the_hub_with_texts_and_with_documents_by_id(hub):
    both = open_examples(["hf://someone/some-data", {"path": "hf://someone/some-data/plain", "num_samples": 1}])
    assert [(example.query, example.positives[0].text) for example in both] == [
        ("what ran", "a red dog"), ("what sat", "the cat"),
    ]  # fmt: skip
    first, second = open_examples("hf://someone/some-data/FEVER")
    assert [passage.text for passage in (*first.positives, *first.negatives)] == ["a red dog", "a mat", "the cat"]
    assert (second.positives[0].doc_id, second.corpus, second.query_prefix) == ("d2", "wiki", "Find: ")
    assert second.passage_prefix is None


def test_two_corpora_of_one_id_and_metadata_that_are_none_are_refused(hub):
    fever = "hf://someone/some-data/FEVER"
    assert len(open_examples([fever, fever])) == 4
    with pytest.raises(ValueError, match=f"corpus_id 'wiki' names two corpora, {fever} and hf://another/some-data/FEV"):
        open_examples([fever, "hf://another/some-data/FEVER"])
    hub["query_instruction"] = ["Find:"]
    with pytest.raises(
        ValueError, match=r"metadata\.json: expected \{class: TextQADataset, corpus_id: <name>\}, found"
    ):
        open_examples(fever)


def test_what_cannot_be_had_is_one_line(hub):
    with pytest.raises(ValueError, match="expected hf://owner/name"):
        open_examples("hf://alone")
    with pytest.raises(
        ValueError, match=r"hf://no/one cannot be fetched .*ConnectionError: Couldn't reach no/one"
    ) as e:
        open_examples("hf://no/one")
    assert "\n" not in str(e.value)
