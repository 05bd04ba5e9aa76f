"""Records -> batches: readers of the usual formats, a plan of batches without state, a collator."""

from inbatch.data.collator import Collator
from inbatch.data.corpus import Documents, open_corpus
from inbatch.data.judged import load_retrieval
from inbatch.data.plan import BatchPlan, Mixture
from inbatch.data.readers import open_examples
from inbatch.data.records import Example, Passage, RetrievalData, TrainBatch
from inbatch.ids import stable_id

__all__ = [
    "BatchPlan",
    "Collator",
    "Documents",
    "Example",
    "Mixture",
    "Passage",
    "RetrievalData",
    "TrainBatch",
    "load_retrieval",
    "open_corpus",
    "open_examples",
    "stable_id",
]
