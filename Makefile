# Needs make and Python 3.10 to 3.13 with venv (on Debian: python3 and python3-venv); installs all else into .venv.
# PYTHON names the Python to use; otherwise the first one that fits is used
PYTHON ?=
FIND_PYTHON := sh tools/find_python.sh
VENV := .venv
PY := $(VENV)/bin/python
RUN := $(PY) -m monai.bundle run
STEP := @sh tools/step.sh

.PHONY: demo bench test test-unit test-slow test-gpu test-monailabel test-all lint weights brain package

# phantom subjects, a training of some minutes, a table, a segmentation and pictures, all in demo/; what is there is kept
demo: demo/.segmented
	@echo && cat demo/metrics.md
	@echo "network:      demo/model.pt"
	@echo "scores:       demo/metrics.csv, drawn in demo/subject-6-scored.png"
	@echo "segmentation: demo/segmentation/subject-7-label.nii.gz, drawn in demo/segmentation/subject-7-label.png"
	@echo "volumes:      demo/segmentation/volumes.csv"
	@echo "reports:      demo/report.html and demo/segmentation/report.html, to be opened in a browser"

demo/.phantom: | $(VENV)/.installed
	$(STEP) "1/4 make seven synthetic subjects (phantoms) in data/phantom" demo/log/phantom.txt \
		$(PY) -m scripts phantom --output_dir data/phantom --subjects 6 --unlabeled 1 --seed 0
	@touch $@

demo/.trained: demo/.phantom
	$(STEP) "2/4 train a network on five of them, about 4 minutes on 2 cores" demo/log/training.txt \
		$(RUN) training --config_file "['configs/train.json','configs/demo.json']"
	@touch $@

demo/.evaluated: demo/.trained
	$(STEP) "3/4 score it on subject 6, which it didn't train on" demo/log/evaluating.txt \
		$(RUN) evaluating --config_file "['configs/train.json','configs/evaluate.json','configs/demo.json']"
	@touch $@

demo/.segmented: demo/.evaluated
	$(STEP) "4/4 segment subject 7, which has no label" demo/log/segmenting.txt \
		$(RUN) --config_file configs/inference.json --ckpt_dir demo --output_dir demo/segmentation
	@touch $@

# how fast this machine is, beside the published way and other networks; run nothing else meanwhile
bench: $(VENV)/.installed
	$(PY) -m scripts bench

# two tests at a time, so each computes on one core: more threads than cores wait for one another
test test-unit test-slow test-all: export OMP_NUM_THREADS := 1
# a GPU rounds otherwise than these tests allow
test test-unit test-slow test-all test-monailabel: export CUDA_VISIBLE_DEVICES :=
# files in their order: those of tests/system, which take longest, come first
PYTEST := $(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# the loop of a person who edits: the modules, without commands, servers and other processes
test-unit: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" tests/unit

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

# the demo from nothing and the set-up without make; the tests of the report want a browser (on Debian: chromium)
test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

# both of them at once, so that what both need is made once
test-all: $(VENV)/.installed-dev
	$(PYTEST)

# what is computed on an NVIDIA GPU; skipped where there is none
test-gpu: $(VENV)/.installed-dev
	$(PY) -m pytest tests/system/test_gpu.py

# a real MONAI Label server with the bundle, in an environment of its own; without it the tests would be skipped
test-monailabel: $(VENV)-monailabel/.installed
	$(VENV)-monailabel/bin/python -W ignore -c "import monailabel"
	$(VENV)-monailabel/bin/python -m pytest -m monailabel tests/system/test_monailabel.py

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# the weights that the bundle includes, in two trainings, from LABEL_MAPS and HEADS, folders of 14 label maps each, see
# docs/README.md; maps 1 to 11 train the first, and 12 chooses its epoch; 1 to 4 and 6 to 10 train the second, whose last
# epoch is taken; then how it does on 13 and 14, which stay unseen
# the first is for a GPU: without one it takes about a day; RESUME=True resumes the one that was stopped
LABEL_MAPS ?= data/label-maps
HEADS ?= data/heads
RESUME ?= False
weights: eval/weights/six-months/.trained | $(VENV)/.installed
	$(PY) -m scripts synthesize --labels_dir $(LABEL_MAPS) --output_dir data/anatomies-2 --draws 2 --names "['anatomy-01', \
		'anatomy-02','anatomy-03','anatomy-04','anatomy-06','anatomy-07','anatomy-08','anatomy-09','anatomy-10', \
		'anatomy-12']"
	$(RUN) training --config_file "['configs/train.json','configs/recipes/infant.json']" --dataset_dir data/anatomies-2 \
		--val_subjects "['anatomy-12','anatomy-12-2']" --heads_dir $(HEADS) --heads "['head-01','head-02','head-03', \
		'head-04','head-06','head-07','head-08','head-09','head-10']" --start_from eval/weights/six-months/model.pt \
		--patch_size "[48,48,48]" --crops_per_epoch 800 --epochs 34 --val_interval 34 --picture_interval 0 \
		--learning_rate 0.004 --resume $(RESUME) --output_dir eval/weights/infant --ckpt_dir eval/weights/infant
	cp --backup=numbered eval/weights/infant/model.pt models/model.pt
	$(PY) -m scripts robustness --labels_dir $(LABEL_MAPS) --names "['anatomy-13','anatomy-14']" \
		--output_dir eval/weights

eval/weights/six-months/.trained: | $(VENV)/.installed
	$(PY) -m scripts synthesize --labels_dir $(LABEL_MAPS) --output_dir data/anatomies --draws 4 --names "['anatomy-01', \
		'anatomy-02','anatomy-03','anatomy-04','anatomy-05','anatomy-06','anatomy-07','anatomy-08','anatomy-09', \
		'anatomy-10','anatomy-11','anatomy-12']"
	$(RUN) training --config_file "['configs/train.json','configs/recipes/robust.json']" --dataset_dir data/anatomies \
		--val_subjects "['anatomy-12','anatomy-12-2','anatomy-12-3','anatomy-12-4']" --patch_size "[64,64,64]" \
		--synthetic_share 0.12 --crops_per_epoch 1600 --epochs 37 --val_interval 9 --picture_interval 0 \
		--optimizer#_target_ torch.optim.AdamW --learning_rate 0.003 --resume $(RESUME) \
		--output_dir eval/weights/six-months --ckpt_dir eval/weights/six-months
	@touch $@

# the network that finds the brain in raw scans, from HEADS; maps 1 to 12 train it, about an hour on 2 cores
brain: | $(VENV)/.installed
	$(RUN) training --config_file configs/brain.json --heads_dir $(HEADS) --heads "['head-01','head-02','head-03', \
		'head-04','head-05','head-06','head-07','head-08','head-09','head-10','head-11','head-12']"
	cp --backup=numbered eval/weights/brain/brain.pt models/brain.pt
	$(PY) -m scripts brain_masks --heads_dir $(HEADS) --heads "['head-13','head-14']" --output_dir eval/weights/brain

# the bundle as a zip to publish, with its checksum, and beside it the list of the packages that it needs (SBOM)
VERSION := $(shell sed -n 's/^    "version": "\(.*\)",/\1/p' configs/metadata.json)
package: $(VENV)/.installed-dev
	$(PY) -m scripts package --output_dir dist
	grep -h '^torch==' requirements.txt | cat - requirements/hashed.txt | $(VENV)/bin/cyclonedx-py requirements \
		--output-reproducible --output-file dist/infant_brain_mri_skipdenseseg_v$(VERSION).cdx.json -

$(VENV)/bin/pip:
	@python=$$($(FIND_PYTHON) "$(PYTHON)") && echo "making $(VENV) with $$python" && \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and alone, so that a CPU build that is at hand is taken
$(VENV)/.installed: requirements.txt | $(VENV)/bin/pip
	@echo "installing PyTorch, MONAI and what they need into $(VENV): 1 to 5 GB, some minutes the first time"
	@$(VENV)/bin/pip install --quiet $$(grep '^torch==' requirements.txt)
	@$(VENV)/bin/pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	@echo "installing what the tests need into $(VENV), under a minute"
	@$(VENV)/bin/pip install --quiet -r requirements/dev.txt
	@touch $@

# as docs/annotating_in_3d_slicer.md says; torchvision 0.16.2 has builds for Python 3.11 and earlier
$(VENV)-monailabel/.installed: requirements.txt requirements/monailabel.txt requirements/monailabel-no-deps.txt
	python=$$($(FIND_PYTHON) "$(or $(PYTHON),python3.11)") && "$$python" -m venv --clear $(VENV)-monailabel
	@echo "installing MONAI Label and what it needs into $(VENV)-monailabel: 3 GB, some minutes"
	$(VENV)-monailabel/bin/pip install --quiet $$(grep '^torch==' requirements.txt)
	$(VENV)-monailabel/bin/pip install --quiet --no-deps -r requirements/monailabel-no-deps.txt
	$(VENV)-monailabel/bin/pip install --quiet -r requirements/monailabel.txt
	$(VENV)-monailabel/bin/pip install --quiet $$(grep '^pytest==' requirements/dev.txt)
	@touch $@
