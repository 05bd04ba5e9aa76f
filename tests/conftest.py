import os

import pytest
import torch

from tests.pool import Pool

# Several test processes and workers share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
