# `make demo` and `make test` set everything up in .venv and print what they run, so that you can type it yourself.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/demo-installed
	rm -rf runs/demo
	$(BIN)/torchrun train_pretrain.py --model vit_test --img-size 64 --decoder-embed-dim 96 --decoder-depth 2 \
	    --decoder-num-heads 3 --global-batch 128 --batch-size 128 --steps 1000 --blr 1e-3 --output-dir runs/demo

test: $(VENV)/test-installed
	$(BIN)/python -m pytest

lint: $(VENV)/test-installed
	$(BIN)/ruff check .

$(VENV)/demo-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/demo-installed

clean:
	rm -rf $(VENV) runs
