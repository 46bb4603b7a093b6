# What people do with a checkout. Every target sets up .venv first and reuses it afterwards.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-memory bench-team

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## create .venv and install (torch with CUDA only where a GPU is)
	@scripts/setup

demo: setup  ## start a whole cluster here, hold a conversation, print a card, stop it
	@.venv/bin/briolette demo

test: setup  ## run the tests
	@scripts/test

check: setup  ## style, types, generated stubs, import rules
	@scripts/check

bench: setup .venv/briolette-bench  ## measure Briolette beside its peers; cards and JSON under bench/results/
	@.venv/bin/python -m bench

bench-memory: .venv/briolette-bench  ## measure what is remembered: bytes, TTFT from memory and Redis, equal bits
	@.venv/bin/python -m bench.memory

bench-team: .venv/briolette-bench  ## measure sharing: fairness, many clients for minutes, what gateway and metrics cost
	@.venv/bin/python -m bench.team

.venv/briolette-bench: requirements/bench.txt | setup
	@.venv/bin/pip install --quiet --require-hashes --no-deps --requirement requirements/bench.txt
	@touch $@
