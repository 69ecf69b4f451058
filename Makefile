# The study as a graph of files whose edges are pipelines. Knobs first; `make` alone shows the targets.
#
#   make study                             the embedded data, about 6 minutes on 2 cores
#   make study DATA=fashion-mnist          real data; cifar10 and folder need ROOT=DIR
#   make test                              the tests

DATA   ?= shapes
# where the files of cifar10 or folder are; shapes has none, fashion-mnist looks in its Debian package
ROOT   ?=
# training and test rows; rows that maps and inversions are made of
N      ?= $(or $(N_$(DATA)),8000)
NTEST  ?= 1000
NMAPS  ?= 200
NINV   ?= 64
EPOCHS ?= 8
BATCH  ?= 32
LR     ?= 0.1
ARCH   ?= resnet8
NORM   ?= l2
# radius of the ball that the robust model is trained in; attacks use EPSS
EPS    ?= $(if $(filter linf,$(NORM)),8/255,$(or $(EPS_$(DATA)),0.5))
EPSS   ?= $(shell awk 'BEGIN { print $(EPS) / 2 }') $(EPS) $(shell awk 'BEGIN { print $(EPS) * 2 }')
STEPS  ?= 3
# share of the steps over which the robust model's ball grows to EPS
RAMP   ?= 0.5
SEED   ?= 0
AUGMENT ?= $(or $(AUGMENT_$(DATA)),crop-flip)
# picture size of DATA=folder
SIZE   ?= 32
# where the study would be worthless: the standard model's clean accuracy outside CLEAN, or the robust model less than
# GAP above it under attack
CLEAN  ?= $(or $(CLEAN_$(DATA)),0.5:1)
GAP    ?= $(or $(GAP_$(DATA)),0.3)
METHODS ?= gradient ig smoothgrad shap
OUT    ?= out
PIP_ARGS ?=
PYTHON ?= python3

N_shapes       := 4000
AUGMENT_shapes := crop
AUGMENT_fashion-mnist := none
CLEAN_shapes   := 0.85:0.97
EPS_fashion-mnist := 1.0
EPS_cifar10    := 0.5
EPS_folder     := 0.5
GAP_cifar10    := 0.15
GAP_folder     := 0.15

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

D := $(OUT)/$(DATA)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# One thread count for every run, so that make -j1 and make -j2 give equal bytes.
export RB_THREADS ?= $(shell nproc)

.PHONY: help setup study test lint man cases bench clean FORCE

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---------------------------------------------------------------------------------------------------- set-up

setup: $(VENV)/.installed  ## make .venv from pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "pip>=25.1" "setuptools>=77"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-build-isolation -e . --group test
	touch $@

# ---------------------------------------------------------------------------------------------------- knobs
# A stamp per knob changes only when its value does, so that a changed knob remakes what depends on it and no more.

$(D)/.knobs/%: FORCE
	@mkdir -p $(@D); printf '%s\n' '$(value_$*)' | cmp -s - $@ || printf '%s\n' '$(value_$*)' > $@
FORCE:

value_data := $(DATA) $(ROOT) $(SIZE) $(SEED)
value_n := $(N)
value_ntest := $(NTEST)
value_nmaps := $(NMAPS)
value_ninv := $(NINV)
value_train := $(EPOCHS) $(BATCH) $(LR) $(ARCH) $(SEED) $(AUGMENT)
value_ball := $(NORM) $(EPS) $(STEPS) $(RAMP)
value_attack := $(NORM) $(EPSS)
value_bounds := $(CLEAN) $(GAP)

K := $(D)/.knobs
.PRECIOUS: $(K)/%

# ---------------------------------------------------------------------------------------------------- data

source_shapes := shapes
source_fashion-mnist := fashion-mnist $(if $(ROOT),--root $(ROOT),$(if $(wildcard /usr/share/datasets/fashion-mnist),,--download --root data))
source_cifar10 := cifar10 $(if $(ROOT),--root $(ROOT),--download --root data)
source_folder := folder $(ROOT) --size $(SIZE)
SOURCE := $(source_$(DATA))

$(D)/train.safetensors: $(K)/data $(K)/n | setup
	rb-data $(SOURCE) --split train --n $(N) --seed $(SEED) -o $@
$(D)/test.safetensors: $(K)/data $(K)/ntest | setup
	rb-data $(SOURCE) --split test --n $(NTEST) --seed $(SEED) -o $@
$(D)/maps.safetensors: $(K)/data $(K)/nmaps | setup
	rb-data $(SOURCE) --split test --n $(NMAPS) --seed $(SEED) -o $@
$(D)/targets.safetensors: $(K)/data $(K)/ninv | setup
	rb-data $(SOURCE) --split test --n $(NINV) --seed $(SEED) -o $@

# ---------------------------------------------------------------------------------------------------- models

# A checkpoint older than what it depends on belongs to another run. A finished run is left as it is, hence the touch.
FRESH = @for p in $^; do [ ! "$$p" -nt "$@.ckpt" ] || rm -f "$@.ckpt"; done
TRAIN = rb-train $< --arch $(ARCH) --epochs $(EPOCHS) --batch $(BATCH) --lr $(LR) --augment $(AUGMENT) --resume -o $@
ROBUST = --norm $(NORM) --eps $(EPS) --steps $(STEPS) --eps-ramp $(RAMP)

$(D)/standard.safetensors: $(D)/train.safetensors $(K)/train
	$(FRESH)
	$(TRAIN) --seed $(SEED) && touch $@
$(D)/robust.safetensors: $(D)/train.safetensors $(K)/train $(K)/ball
	$(FRESH)
	$(TRAIN) --seed $(SEED) $(ROBUST) && touch $@
# A third model, of another seed, judges the images that the two make.
$(D)/judge.safetensors: $(D)/train.safetensors $(K)/train
	$(FRESH)
	$(TRAIN) --seed $$(( $(SEED) + 1000 )) && touch $@

# ---------------------------------------------------------------------------------------------------- artefacts

MODELS := standard robust

$(D)/%.attacked.rbs: $(D)/%.safetensors $(D)/test.safetensors $(K)/attack
	rb-attack $(word 2,$^) -m $< --norm $(NORM) $(foreach e,$(EPSS),--eps $(e)) --seed $(SEED) -o $@

define MAPS
$$(D)/%.$(1).safetensors: $$(D)/%.safetensors $$(D)/maps.safetensors $$(D)/train.safetensors
	rb-saliency $$(word 2,$$^) -m $$< --method $(1) --steps 24 --samples 24 --seed $$(SEED) \
	    $$(if $$(filter shap,$(1)),--background $$(D)/train.safetensors) -o $$@
endef
$(foreach m,$(METHODS),$(eval $(call MAPS,$(m))))

$(D)/%.inverted.safetensors: $(D)/%.safetensors $(D)/targets.safetensors
	rb-invert $(word 2,$^) -m $< --steps 100 --seed $(SEED) -o $@
$(D)/%.classes.safetensors: $(D)/%.safetensors $(D)/targets.safetensors $(D)/train.safetensors
	rb-invert $(word 2,$^) -m $< --mode class --seeds-from $(D)/train.safetensors --steps 60 --seed $(SEED) -o $@
$(D)/%.units.safetensors: $(D)/%.safetensors $(D)/test.safetensors
	rb-invert $(word 2,$^) -m $< --mode feature --units 0,1,2,3,4,5,6,7 --steps 60 --seed $(SEED) -o $@

# ---------------------------------------------------------------------------------------------------- scores

$(D)/%.robustness.jsonl: $(D)/%.attacked.rbs $(D)/%.safetensors
	rb-score $< -m $(word 2,$^) --json > $@.tmp && mv $@.tmp $@
$(D)/%.maps.jsonl: $(foreach m,$(METHODS),$(D)/%.$(m).safetensors) $(D)/%.safetensors
	rb-score $(filter-out $(D)/$*.safetensors,$^) -m $(D)/$*.safetensors --background $(D)/train.safetensors --json > $@.tmp && mv $@.tmp $@
$(D)/%.images.jsonl: $(D)/%.inverted.safetensors $(D)/%.classes.safetensors $(D)/%.safetensors $(D)/judge.safetensors
	rb-score $(word 1,$^) $(word 2,$^) -m $(word 3,$^) --judge $(word 4,$^) --json > $@.tmp && mv $@.tmp $@

SCORES := $(foreach m,$(MODELS),$(D)/$(m).robustness.jsonl $(D)/$(m).maps.jsonl $(D)/$(m).images.jsonl)

# ---------------------------------------------------------------------------------------------------- pictures

SHEETS := attacked $(METHODS) inverted classes units
sheet_file = $(D)/$(1).$(if $(filter attacked,$(2)),attacked.rbs,$(2).safetensors)
define SHEET
$$(D)/sheet-$(1).png: $(foreach m,$(MODELS),$(call sheet_file,$(m),$(1)))
	rb-view $$^ --rows 12 -o $$@
endef
$(foreach s,$(SHEETS),$(eval $(call SHEET,$(s))))
PICTURES := $(foreach s,$(SHEETS),$(D)/sheet-$(s).png)

# ---------------------------------------------------------------------------------------------------- report

study: $(D)/report.html  ## data, models, attacks, maps, inversions, scores and report in OUT/DATA
	@echo "the report is $<"

$(D)/report.html: $(SCORES) $(PICTURES) $(foreach m,$(MODELS),$(D)/$(m).safetensors) $(K)/bounds
	rb-report $(filter-out $(K)/%,$^) --figures $(D)/figures/ --title '$(DATA)' --require --clean $(CLEAN) --gap $(GAP) -o $@

# ---------------------------------------------------------------------------------------------------- tests

test: setup  ## the tests
	pytest

lint: setup  ## style and types
	ruff format --check . && ruff check .
	rm -rf build && pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed mypy

man: setup  ## man pages and completions from the commands
	python man/make.py

cases: setup  ## rewrite the golden shell cases; review with git diff
	RB_REWRITE=1 pytest tests/test_cases.py

clean:  ## remove out/ (the study) but not .venv
	rm -rf $(OUT)
