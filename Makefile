# make quickstart | test | test-all | fuzz | faults | bench | table3. `make PYTHON=python3.12 VENV=~/env …` uses another Python or
# environment, JOBS=8 runs 8 tests at a time, CONSTRAINTS= installs the newest packages instead of the tested ones.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
TEST = $(RUN) -m pytest -q -n $(JOBS) --dist=worksteal
JOBS ?= 2
MODEL ?= gpt2
FUZZ ?= 4000

.PHONY: help install install-dev quickstart test test-all fuzz faults bench table3 clean

help:
	@echo 'make quickstart   prepare text, train a small GPT, sample from it: 4 to 9 minutes on 2 CPU cores'
	@echo 'make test         the tests: 2 to 4 minutes, no network'
	@echo 'make test-all     all but the longest: also several processes, kills, real runs'
	@echo 'make fuzz         random damage to every kind of input; FUZZ=4000 examples of each: about 6 minutes'
	@echo 'make faults       kills, full disks, hangs, ten minutes of random faults: about 25 minutes'
	@echo 'make bench        how fast this machine trains, samples, scores, prepares, and how fast it could be'
	@echo 'make table3       MODEL=gpt2: the benchmarks of the GPT-2 paper, measured and printed'
	@echo 'make install      only the environment; make install-dev: with what the tests need'

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; make PYTHON=python3.12 names another one'; exit 1; }
	@test -x $(RUN) || $(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo 'this Python cannot make environments; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

quickstart: install
	$(RUN) data/prepare.py
	$(RUN) train.py config/quickstart.py
	$(RUN) sample.py --model=out/quickstart -p 'The import statement' -m 120
	$(RUN) plot.py out/quickstart
	@echo
	@echo 'The GPT that ships with the repository, trained on 171 novels:'
	$(RUN) sample.py --model=checkpoint -p 'It was a dark night' -m 100
	@echo
	@echo 'The loss curve is in out/quickstart/loss.png. What next?  (source $(VENV)/bin/activate first)'
	@echo '  python sample.py -p "Return the" -m 200                        # another sample'
	@echo '  python train.py config/quickstart.py --max_iters=1000          # resume, and train longer'
	@echo '  python data/prepare.py --name=mine --tokenizer=bpe:2048 FOLDER_OR_FILE.txt'
	@echo '  python train.py config/quickstart.py --dataset=mine --out_dir=out/first'

test: install-dev
	$(TEST)

test-all: install-dev
	$(TEST) --slow

fuzz: install-dev
	FUZZ=$(FUZZ) $(TEST) --slow tests/test_fuzz.py tests/test_tokenizer.py

faults: install-dev
	$(TEST) --faults tests/test_faults.py tests/test_processes.py tests/test_hosts.py

bench: install
	$(RUN) bench.py

# Measures what has no result yet (much faster on a GPU); what cannot be measured is named in the table.
RESULTS = out/results/$(shell echo '$(MODEL)' | sed -E 's/[^[:alnum:]_.-]+/_/g; s/^_+|_+$$//g')
table3: install
	@test -f $(RESULTS)/cbt-paper-valid-detok-CN-NE.json || $(RUN) eval_cbt.py --model=$(MODEL) || true
	@for name in lambada-paper lambada-harness wikitext2-paper wikitext2-harness ptb-paper enwik8-paper \
	    text8-paper wikitext103-paper 1bw-paper; do \
	  test -f $(RESULTS)/$$name.json || \
	  $(RUN) eval_lm.py --model=$(MODEL) --task=$${name%-*} --protocol=$${name#*-} || true; done
	$(RUN) eval_lm.py --model=$(MODEL) --table3

clean:
	rm -rf $(VENV) .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
