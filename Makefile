# make demo: set-up and the whole chain on a data set that it makes itself.  make test: set-up and the tests.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(VENV)/bin/python -m src.demo

test: $(READY)
	$(VENV)/bin/ruff check src tests benchmarks notebooks
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) input/demo input/cache/demo runs/demo submissions/demo*
