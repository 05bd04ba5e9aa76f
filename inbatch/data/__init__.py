"""Records -> batches: readers of the usual formats, a plan of batches without state, a collator."""

from inbatch.data.collator import Collator as Collator
from inbatch.data.corpus import Documents as Documents
from inbatch.data.corpus import open_corpus as open_corpus
from inbatch.data.judged import load_retrieval as load_retrieval
from inbatch.data.plan import BatchPlan as BatchPlan
from inbatch.data.plan import Mixture as Mixture
from inbatch.data.readers import open_examples as open_examples
from inbatch.data.records import Example as Example
from inbatch.data.records import Passage as Passage
from inbatch.data.records import RetrievalData as RetrievalData
from inbatch.data.records import TrainBatch as TrainBatch
from inbatch.ids import stable_id as stable_id
