# `make demo` and `make test` set everything up in .venv and print what they run, so that you can type it yourself.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo record-demo probe record-probe finetune record-finetune segment record-segment detect record-detect \
    study record-study figures gpu gpu-study record-gpu-study test test-rest test-all claims test-oldest \
    faults faults-caused faults-noticed faults-long record-faults lint clean

SMALL = --model vit_test

demo: $(VENV)/demo-installed
	rm -rf runs/demo
	$(BIN)/torchrun train_pretrain.py $(SMALL) --steps 450 --picture-images 5 --output-dir runs/demo
	$(BIN)/python -m tools.report runs/demo

# What the README says of the demo: its figures and its pictures, from the run that `make demo` left. Figures need
# matplotlib, an extra: the record-* targets install it.
record-demo: $(VENV)/figures-installed
	mkdir -p results docs/figures
	$(BIN)/python -m tools.analyze runs/demo --record results/demo.json
	cp runs/demo/reconstruction.png docs/figures/demo.png
	$(BIN)/python tests/generated.py

# Which layers of a small encoder tell what: the demo's model, trained for longer, and a probe of six of its blocks.
probe: $(VENV)/demo-installed
	$(BIN)/torchrun train_pretrain.py $(SMALL) --steps 800 --output-dir runs/probed --resume auto
	$(BIN)/python -m tools.probe_layers --checkpoint runs/probed --layers 0,2,4,6,8,11 --images 4000 --pool avg \
	    --output-dir runs/probed-layers

record-probe: $(VENV)/figures-installed
	mkdir -p results
	cp runs/probed-layers/metrics.json results/probe_shapes_cpu.json
	$(BIN)/python tests/generated.py

# The demo's encoder trained with labels, against the same network from random weights, trained for as long. Of
# 5e-4, 1e-3 and 2e-3 with layer decay 1, 5e-4 was the best learning rate for random weights.
TUNE = --data shapes:50000 --img-size 32 --crop simple --global-batch 32 --batch-size 32 --steps 200 \
    --rand-augment 0 --mixup 0 --cutmix 0 --drop-path 0 --resume auto

finetune: $(VENV)/demo-installed
	test -f runs/demo/encoder.pt || $(MAKE) demo
	$(BIN)/torchrun train_finetune.py --checkpoint runs/demo $(TUNE) --lr 5e-4 --layer-decay 1 --random-init \
	    --output-dir runs/finetune-random
	$(BIN)/torchrun train_finetune.py --checkpoint runs/demo $(TUNE) --lr 4e-3 --output-dir runs/finetune
	PYTHONPATH=tests $(BIN)/python -c 'from generated import finetuned; \
	    print(finetuned("runs/finetune/metrics.json", "runs/finetune-random/metrics.json"))'

record-finetune: $(VENV)/figures-installed
	mkdir -p results
	cp runs/finetune/metrics.json results/finetune_shapes_cpu.json
	cp runs/finetune-random/metrics.json results/finetune_random_cpu.json
	$(BIN)/python tests/generated.py

# The demo's encoder trained to segment the embedded scenes, against the same network from random weights, all layers
# of which get one learning rate. Of 2e-3, 5e-3 and 1e-2 for random weights, 1e-2 was the best.
segment: $(VENV)/demo-installed
	test -f runs/demo/encoder.pt || $(MAKE) demo
	$(BIN)/python train_segment.py --checkpoint runs/demo --small --random-init --layer-decay 1 --resume auto \
	    --output-dir runs/segment-random
	$(BIN)/python train_segment.py --checkpoint runs/demo --small --resume auto --output-dir runs/segment
	PYTHONPATH=tests $(BIN)/python -c 'from generated import segmented; \
	    print(segmented("runs/segment/metrics.json", "runs/segment-random/metrics.json"))'

record-segment: $(VENV)/figures-installed
	mkdir -p results docs/figures
	cp runs/segment/metrics.json results/segmentation_shapes_cpu.json
	cp runs/segment-random/metrics.json results/segmentation_random_cpu.json
	cp runs/segment/segmentation.png docs/figures/segmentation.png
	$(BIN)/python tests/generated.py

# The demo's encoder trained to detect the shapes of the embedded scenes.
detect: $(VENV)/demo-installed
	test -f runs/demo/encoder.pt || $(MAKE) demo
	$(BIN)/python train_detect.py --checkpoint runs/demo --small --resume auto --output-dir runs/detect

record-detect: $(VENV)/figures-installed
	mkdir -p results docs/figures
	cp runs/detect/metrics.json results/detection_shapes_cpu.json
	cp runs/detect/detection.png docs/figures/detection.png
	$(BIN)/python tests/generated.py

# Five methods, three seeds, the number of fused levels: tiny encoders on two cores. The same command goes on with it.
study: $(VENV)/demo-installed
	$(BIN)/python -m tools.study --preset minutes

# What docs/results.md says of the studies: from those that were run here.
record-study: $(VENV)/figures-installed
	mkdir -p results docs/figures
	cp runs/study/study_*.json results/
	$(BIN)/python tests/generated.py

# Ten minutes on a machine with a GPU, without network or .venv: MAE and MFF_MAE from the next seed, on DATA, which is
# Imagenette as a folder or a .zip. OUT is the folder to bring home.
gpu-study:
	PYTHON="$(PYTHON)" bash tools/gpu/study.sh "$(DATA)" "$(OUT)"

# The file in FROM, the folder that was brought home, continues the one in results/ and replaces it.
record-gpu-study: $(VENV)/figures-installed
	cp $(FROM)/study_imagenette_gpu.json results/
	$(BIN)/python tests/generated.py

# Every figure and table of README.md and docs/ anew: from results/, and from the demo, which runs if it has not.
figures: $(VENV)/figures-installed
	test -f runs/demo/metrics.json || $(MAKE) demo
	$(MAKE) record-demo

# The method against timm and the published arrays, and what every run promises: some five minutes on two cores.
CORE = tests/method tests/run

test: $(VENV)/test-installed
	$(BIN)/python -m pytest $(CORE) -m "not slow"

test-rest: $(VENV)/test-installed
	$(BIN)/python -m pytest $(CORE) -m slow
	$(BIN)/python -m pytest $(CORE:%=--ignore=%)

test-all: $(VENV)/test-installed
	$(BIN)/python -m pytest

# The lines of README.md's table of claims, in one process: under two minutes on two free cores.
CLAIMS = $(subst |, or ,$(shell sed -n 's/.*`pytest -k \([a-z_]*\)`.*/\1/p' README.md | paste -s -d '|' -))
claims: $(VENV)/test-installed
	$(BIN)/python -m pytest -k "$(CLAIMS)"

# The method and a run, on the oldest PyTorch and Triton that pyproject.toml allows.
OLD = $(VENV)-oldest
test-oldest: $(OLD)/test-installed
	$(OLD)/bin/python -m pytest $(CORE) tests/data/test_data.py tests/test_package.py -m "not slow"

# On a machine with a GPU, with the Python that is there: everything that waits for one, in less than ten minutes.
gpu:
	$(PYTHON) tools/gpu/first.py $(or $(OUT),results) $(FLAGS)

# Every fault of docs/reliability.md, and without each guard in turn: some fifteen minutes on two cores with --jobs 2.
faults: faults-caused faults-noticed

faults-caused: $(VENV)/test-installed
	$(BIN)/python tests/faults --output-dir runs/faults

faults-noticed: $(VENV)/test-installed
	$(BIN)/python tests/faults --controls --output-dir runs/faults

# Ten times as many of the cases that are drawn from a seed, which changes with the date, and of the points of a save.
faults-long: $(VENV)/test-installed
	$(BIN)/python tests/faults --long --output-dir runs/faults-long

record-faults: $(VENV)/figures-installed
	mkdir -p results
	cp runs/faults/faults_cpu.json runs/faults/controls_cpu.json results/
	$(BIN)/python tests/generated.py

lint: $(VENV)/test-installed
	$(BIN)/ruff check .

$(VENV)/demo-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/figures-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[figures]'
	touch $@ $(VENV)/demo-installed

$(VENV)/test-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/demo-installed $(VENV)/figures-installed

$(OLD)/test-installed: pyproject.toml
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/pip install --quiet --editable '.[test]' 'torch==2.11.*' 'triton==3.6.*'
	touch $@

clean:
	rm -rf $(VENV) $(OLD) runs
