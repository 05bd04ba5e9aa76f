"""Records -> batches: readers of the usual formats, a plan of batches without state, a collator."""

from inbatch.data.beir import load_retrieval
from inbatch.data.plan import BatchPlan
from inbatch.data.records import Example, Passage, RetrievalData, TrainBatch, stable_id

__all__ = ["BatchPlan", "Example", "Passage", "RetrievalData", "TrainBatch", "load_retrieval", "stable_id"]
