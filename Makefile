# `make demo` and `make test` set everything up in .venv and print what they run, so that you can type it yourself.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo record-demo probe record-probe test lint clean

demo: $(VENV)/demo-installed
	rm -rf runs/demo
	$(BIN)/torchrun train_pretrain.py --model vit_test --img-size 48 --decoder-embed-dim 64 --decoder-depth 3 \
	    --decoder-num-heads 2 --global-batch 32 --batch-size 32 --steps 450 --lr 3e-3 --picture-images 5 \
	    --output-dir runs/demo

# What the README says of the demo: its figures and its picture, from the run that `make demo` left.
record-demo:
	mkdir -p results docs/figures
	cp runs/demo/metrics.json results/demo.json
	cp runs/demo/reconstruction.png docs/figures/demo.png
	$(BIN)/python tests/generated.py

# Which layers of the demo's encoder tell what; `make demo` comes first where it did not run yet.
probe: $(VENV)/demo-installed
	test -e runs/demo/encoder.pt || $(MAKE) demo
	$(BIN)/torchrun train_probe.py --checkpoint runs/demo --layers all --layer-images 4000 --pool avg \
	    --output-dir runs/demo-probe

record-probe:
	mkdir -p results docs/figures
	cp runs/demo-probe/metrics.json results/probe_shapes_cpu.json
	cp runs/demo-probe/layers.png docs/figures/probe_layers.png

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
