# make demo       the whole pipeline on drawn scenes, about 4.5 minutes on 2 free CPU cores
# make camvid     CamVid as it is published, from CAMVID=<its folder>: the figures of docs/RESULTS.md
# make test       lint, types, all tests
# make test-fast  the tests that are not marked slow, about 2.5 minutes on 2 free CPU cores
# make lint       ruff, codespell, mypy
# Each target first installs what it needs into .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SAM := assets/sam_vit_tiny_scenes.pth
ON_TRAIN := -i demo/npy/train --val_npy_path demo/npy/val -model_type vit_tiny -checkpoint $(SAM) \
	-work_dir demo/work_dir -batch_size 4 --grad_acc_steps 1 -num_workers 1 -use_amp
ON_VAL := --val_npy_path demo/npy/val --sam_checkpoint $(SAM) --model_type vit_tiny --batch_size 4 --use_amp

ON_CAMVID_TRAIN := -i camvid/npy/train --val_npy_path camvid/npy/val -model_type vit_tiny -checkpoint $(SAM) \
	-work_dir camvid/work_dir -batch_size 8 --grad_acc_steps 1 -num_workers 0
ON_CAMVID := --val_npy_path camvid/npy/val --sam_checkpoint $(SAM) --model_type vit_tiny --num_workers 0

# pip then shows each package that it downloads.
SAY := echo "Installing into $(VENV): PyTorch and its CUDA libraries are gigabytes, which takes minutes"

.PHONY: demo camvid test test-fast lint clean

demo: export OMP_WAIT_POLICY := passive  # by default idle threads spin, which takes the cores from other programs
demo: $(VENV)/.installed
	rm -rf demo
	$(PY) -m utils.scenes --output_dir demo/bdd100k --train 128 --val 32 --seed 0 --num_workers 2
	$(PY) pre_bdd100k.py --bdd100k_root demo/bdd100k --output_path demo/npy --image_size 288x512 --image_dtype uint8
	$(PY) infer_bdd100k.py $(ON_VAL) --output_dir demo/before
	$(PY) train_bdd100k.py $(ON_TRAIN) -task_name box -num_epochs 5 -lr 2e-4 --lr_scheduler cosine --bbox_shift 5
	$(PY) infer_bdd100k.py $(ON_VAL) --model_checkpoint demo/work_dir/box-*/medsam_model_best.pth \
		--output_dir demo/after --visualize
	$(PY) train_bdd100k.py $(ON_TRAIN) -task_name semantic -num_epochs 15 --val_every 3 --prompt_mode semantic
	$(PY) infer_bdd100k.py $(ON_VAL) --model_checkpoint demo/work_dir/semantic-*/medsam_model_best.pth \
		--output_dir demo/semantic --visualize
	$(PY) -m utils.compare demo/before demo/after demo/semantic
	@echo "The built-in weights know boxes of these scenes, so box mode gains nothing here: docs/RESULTS.md"
	@echo "Pictures: demo/after/visualizations (boxes from the ground truth), demo/semantic/visualizations (no boxes)"
	@echo "Reports:  demo/after/report.html, demo/semantic/report.html"

# CAMVID is the folder of its 11-class edition, or of its colour masks: docs/datasets.md
camvid: export OMP_NUM_THREADS := 1  # other numbers of threads round otherwise
camvid: $(VENV)/.installed
	rm -rf camvid/work_dir
	$(PY) pre_bdd100k.py --dataset camvid --root $(CAMVID) --output_path camvid/npy --image_size 256 --image_dtype uint8
	$(PY) infer_bdd100k.py $(ON_CAMVID) --output_dir camvid/sam
	$(PY) train_bdd100k.py $(ON_CAMVID_TRAIN) -task_name box -num_epochs 4 -lr 1e-3 --lr_scheduler cosine \
		--warmup_epochs 0.5 --bbox_shift 5 --val_every 100 --seed 0
	$(PY) infer_bdd100k.py $(ON_CAMVID) --model_checkpoint camvid/work_dir/box-*/medsam_model_best.pth \
		--output_dir camvid/box
	$(PY) train_bdd100k.py $(ON_CAMVID_TRAIN) -task_name semantic -num_epochs 20 --prompt_mode semantic -use_amp \
		--val_every 5 --seed 0
	$(PY) infer_bdd100k.py $(ON_CAMVID) --model_checkpoint camvid/work_dir/semantic-*/medsam_model_best.pth \
		--output_dir camvid/semantic
	$(PY) -m utils.compare camvid/sam camvid/box camvid/semantic

test: $(VENV)/.tested lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

test-fast: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

lint: $(VENV)/.tested
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy segment_anything utils tools benchmarks examples tests *.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py pyproject.toml | $(VENV)/bin/python
	@$(SAY)
	$(PY) -m pip install -e .
	touch $@

$(VENV)/.tested: setup.py pyproject.toml | $(VENV)/bin/python
	@$(SAY)
	$(PY) -m pip install -e ".[test]"
	$(PY) -m pip install --upgrade --no-deps --target $(VENV)/oracle segment-anything==1.0  # has our package's name
	touch $@ $(VENV)/.installed

clean:
	rm -rf demo build *.egg-info
