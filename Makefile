# make demo | test | check | bench: each first makes .venv from the pinned versions
PYTHON ?= python3
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1
DEMO_PROMPTS := \
	"a red seven on a black background" \
	"a blue three on a white background" \
	"a yellow five to the left of a cyan two on a gray background" \
	"a green nine above a magenta four on a black background"

STREAMED := "window 4, streamed" "window 8, streamed" "window 16, streamed" "window 8 + context 4, streamed"

.PHONY: demo test check bench

demo: .venv/installed
	$(OFFLINE) $(BIN)/python infer_t2i.py --prompt $(DEMO_PROMPTS) --num_images 4 --seed 0 --grid --overwrite \
		--output output/demo_t2i.png
	$(OFFLINE) $(BIN)/python infer_i2i.py --image docs/images/red_seven.png --prompt "a blue seven on a white background" \
		--strength 0.6 --num_images 4 --seed 0 --grid --overwrite --output output/demo_i2i.png

test: .venv/installed
	$(OFFLINE) $(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(OFFLINE) $(BIN)/python -m pytest

# all that docs/performance.md has goals for; on a CPU it takes its time
bench: .venv/installed
	$(BIN)/python -m localdit.benchmarks.attention --part layer block training --keep_freed_memory
	$(BIN)/python -m localdit.benchmarks.attention --part block --side 128 --dtype bfloat16 --keep_freed_memory --mixer $(STREAMED)
	$(BIN)/python -m localdit.benchmarks.attention --part block --side 128 256 --dtype bfloat16 --memory --mixer $(STREAMED)

# torch first and by its exact version, so that nothing pulls in another build of it
.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
