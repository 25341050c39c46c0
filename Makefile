# make          creates .venv with all that the package needs; the other targets do so by themselves
# make demo     simulator and policy node as separate processes, 10 Lift episodes; out/demo/summary.json and a video
# make test     all tests, two files at a time: nodes wait more than they compute; PYTEST_ARGS='-m "not sim"' and the like
#               choose, '-n 0' runs one at a time
# make bench    one policy cycle by stage, beside the same cycle computed naively; tasks exchanged while a node runs; recordings
#               made and converted; datasets read and written, beside LeRobot where LEROBOT_PYTHON names the Python of an environment that has it; a training step,
#               beside the paper's public code where PAPER_CODE names a checkout of it. The cycle is measured beside both, the
#               paper's by PAPER_PYTHON, which has torchvision, diffusers and einops; an environment with LeRobot does
# make soak     an hour of a policy beside random faults, every command looked at; docs/bench/soak.json
# make evidence what docs/evidence lacks of the studies in config/studies, and their tables in docs/evidence.md; resumable
# make lint     ruff and mypy
#
# Where a ROS 2 is sourced and PYTHON imports its rclpy, .venv is laid over it and no ROS wheels are installed.
# Otherwise PyPI's ROS 2 wheels are, and nothing of ROS has to be there.
# TORCH names the PyTorch build that pip installs where none is there yet; choose yours, e.g. a CPU build, per
# PyTorch's own instructions.

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
LEROBOT_PYTHON ?=
PAPER_CODE ?=
PAPER_PYTHON ?= $(LEROBOT_PYTHON)

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -q --prefer-binary -c $(VENV)/constraints.txt

ifneq ($(ROS_DISTRO),)
ROS_IS_SOURCED := $(shell $(PYTHON) -c 'import rclpy' 2>/dev/null && echo yes)
endif

ifeq ($(ROS_IS_SOURCED),yes)
SYSTEM_SITE := true
EXTRAS := sim,train,dev
CONSTRAINT = $(PYTHON) scripts/constraints.py > $(VENV)/constraints.txt
export AMENT_PREFIX_PATH := $(VENV):$(AMENT_PREFIX_PATH)
else
SYSTEM_SITE := false
EXTRAS := ros,sim,train,dev
CONSTRAINT = : > $(VENV)/constraints.txt
export AMENT_PREFIX_PATH := $(VENV)
ifneq ($(ROS_DISTRO),)
# A sourced ROS for another Python: its modules and libraries must not mix with the wheels.
unexport PYTHONPATH
unexport LD_LIBRARY_PATH
endif
endif

# The wheels set their library path once and leave this mark; a mark from another environment is not ours.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE
export ROS_AUTOMATIC_DISCOVERY_RANGE ?= LOCALHOST
export MUJOCO_GL ?= egl

.PHONY: venv demo test bench soak evidence lint clean

venv: $(READY)

$(READY): setup.py
	@PYTHON='$(PYTHON)' ROS='$(if $(ROS_IS_SOURCED),$(ROS_DISTRO))' scripts/system_packages.sh
	@grep -qs 'include-system-site-packages = $(SYSTEM_SITE)' $(VENV)/pyvenv.cfg || \
	    $(PYTHON) -m venv --clear $(if $(filter true,$(SYSTEM_SITE)),--system-site-packages) $(VENV)
	@touch $(VENV)/COLCON_IGNORE
	@$(CONSTRAINT)
	@echo 'installing what the package needs into .venv: some minutes'
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)
	@$(BIN)/decoupled-policy demo --out out/demo

test: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: $(READY)
	@$(BIN)/python bench/policy_cycle.py $(if $(LEROBOT_PYTHON),--lerobot $(LEROBOT_PYTHON)) \
	    $(if $(PAPER_CODE),--theirs $(PAPER_CODE) $(if $(PAPER_PYTHON),--theirs-python $(PAPER_PYTHON)))
	@$(BIN)/python bench/policy_steady.py
	@$(BIN)/python bench/engines.py
	@if command -v nvidia-smi >/dev/null; then $(BIN)/python bench/gpu.py; fi
	@$(BIN)/python bench/precision.py
	@$(BIN)/python bench/guard.py
	@$(BIN)/python bench/inpainting.py
	@$(BIN)/python bench/seams.py
	@$(BIN)/python bench/outputs.py
	@$(BIN)/python bench/task_swap.py --stretches 1 --stretch-s 8 --json out/bench/task_swap.json
	@$(BIN)/python bench/recording.py --json out/bench/recording.json
	@$(BIN)/python bench/conversion.py
	@$(BIN)/python bench/dataset_reader.py $(if $(LEROBOT_PYTHON),--python $(LEROBOT_PYTHON))
	@$(BIN)/python bench/training_step.py $(if $(PAPER_CODE),--theirs $(PAPER_CODE))

soak: $(READY)
	@$(BIN)/python bench/soak.py

# Interrupt it and run it again as you like.
evidence: $(READY)
	@$(BIN)/decoupled-policy study config/studies/*.yaml --out out/studies --results docs/evidence --document docs/evidence.md

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf build install log out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
