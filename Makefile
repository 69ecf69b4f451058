# The study as a graph of files whose edges are pipelines. Knobs first; `make` alone shows the targets.
#
#   make study                             the embedded data, 5 minutes on 2 cores
#   make study DATA=fashion-mnist          real data; cifar10 and folder need ROOT=DIR
#   make paper DATA=cifar10 ROOT=DIR       the paper's study, whose graph and knobs are in paper.mk
#   make test                              the tests

DATA   ?= shapes
# where the files of cifar10 or folder are; shapes has none, fashion-mnist looks in its Debian package
ROOT   ?=
# training and test rows; rows that maps and inversions are made of
N      ?= $(or $(N_$(DATA)),8000)
NTEST  ?= 1000
NMAPS  ?= 200
NINV   ?= 64
EPOCHS ?= $(or $(EPOCHS_$(DATA)),8)
JUDGE_EPOCHS ?= 5
BATCH  ?= $(or $(BATCH_$(DATA)),32)
LR     ?= $(or $(LR_$(DATA)),0.1)
ARCH   ?= resnet8
# width of resnet8 or resnet18 where it is not the usual one
WIDTH  ?= $(if $(filter resnet8,$(ARCH)),$(WIDTH_$(DATA)))
# share of the training rows by which the best epoch is chosen
VAL    ?= 0.05
NORM   ?= l2
# radius of the ball that the robust model is trained in; attacks use EPSS
EPS    ?= $(if $(filter linf,$(NORM)),8/255,$(or $(EPS_$(DATA)),0.5))
EPSS   ?= $(shell awk 'BEGIN { print $(EPS) / 2 }') $(EPS) $(shell awk 'BEGIN { print $(EPS) * 2 }')
STEPS  ?= 3
# share of the steps over which the robust model's ball grows to EPS
RAMP   ?= 0.5
SEED   ?= 0
AUGMENT ?= $(or $(AUGMENT_$(DATA)),crop-flip)
# more options of rb-train and of rb-attack, such as --amp and --tf32 on a GPU
TRAIN_ARGS ?=
ATTACK_ARGS ?=
# picture size of DATA=folder
SIZE   ?= 32
# where the study would be worthless: the standard model's clean accuracy outside CLEAN, or the robust model less than
# GAP above it under attack
CLEAN  ?= $(or $(CLEAN_$(DATA)),0.5:1)
GAP    ?= $(or $(GAP_$(DATA)),0.3)
METHODS ?= gradient ig smoothgrad shap
# points of the path (ig) and draws (smoothgrad, shap) per map
POINTS  ?= 16
# make link: radii (0 is standard training) and seeds of the population; rows that each model is attacked and explained on
LINK_EPS   ?= 0 0.125 0.25 0.5 1.0
LINK_SEEDS ?= 0 1 2 3
LINK_NTEST ?= 500
LINK_NMAPS ?= 100
LINK_METHODS ?= gradient ig
# controls: smooth by noise or a gradient penalty, labels at random, fresh weights, a standard model stopped early
CONTROLS   ?= noise penalty shuffled untrained early
CONTROL_SEEDS ?= 0 1
# cluster/study.sh: parts that each attack, map, inversion and score is cut into
SHARDS ?= 16
OUT    ?= out
PIP_ARGS ?=
PYTHON ?= python3

N_shapes       := 4000
EPOCHS_shapes  := 12
BATCH_shapes   := 64
LR_shapes      := 0.12
WIDTH_shapes   := 8
AUGMENT_shapes := crop
AUGMENT_fashion-mnist := none
AUGMENT_cifar10 := flip
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

.PHONY: help setup study test test-cluster lint man cases bench bench-autoattack clean FORCE

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
value_nmaps := $(NMAPS) $(POINTS)
value_ninv := $(NINV)
value_train := $(EPOCHS) $(BATCH) $(LR) $(ARCH) $(WIDTH) $(VAL) $(SEED) $(AUGMENT)$(if $(TRAIN_ARGS), $(TRAIN_ARGS))
value_ball := $(NORM) $(EPS) $(STEPS) $(RAMP)
value_attack := $(NORM) $(EPSS)$(if $(ATTACK_ARGS), $(ATTACK_ARGS))
value_judge := $(JUDGE_EPOCHS)
value_bounds := $(CLEAN) $(GAP)

K := $(D)/.knobs
.PRECIOUS: $(K)/%

# ---------------------------------------------------------------------------------------------------- data

source_shapes := shapes
source_fashion-mnist := fashion-mnist $(if $(ROOT),--root $(ROOT),$(if $(wildcard /usr/share/datasets/fashion-mnist),,--download --root data))
source_cifar10 := $(if $(and $(ROOT),$(wildcard $(ROOT)/train/*/)),folder $(ROOT) --size 32,cifar10 $(if $(ROOT),--root $(ROOT),--download --root data))
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
TRAIN_OPTIONS = --arch $(ARCH) $(if $(WIDTH),--width $(WIDTH)) --epochs $(EPOCHS) --batch $(BATCH) --lr $(LR) --val $(VAL) \
    --augment $(AUGMENT) $(TRAIN_ARGS) --resume
TRAIN = rb-train $< $(TRAIN_OPTIONS) -o $@
STANDARD = --seed $(SEED)
ROBUST = --seed $(SEED) --norm $(NORM) --eps $(EPS) --steps $(STEPS) --eps-ramp $(RAMP)
# A third model, of another seed and trained for less long, judges the images that the two make.
JUDGE = --epochs $(JUDGE_EPOCHS) --seed $$(( $(SEED) + 1000 ))

$(D)/standard.safetensors: $(D)/train.safetensors $(K)/train
	$(FRESH)
	$(TRAIN) $(STANDARD) && touch $@
$(D)/robust.safetensors: $(D)/train.safetensors $(K)/train $(K)/ball
	$(FRESH)
	$(TRAIN) $(ROBUST) && touch $@
$(D)/judge.safetensors: $(D)/train.safetensors $(K)/train $(K)/judge
	$(FRESH)
	$(TRAIN) $(JUDGE) && touch $@

# ---------------------------------------------------------------------------------------------------- artefacts

MODELS := standard robust
ATTACK = --norm $(NORM) --seed $(SEED) $(ATTACK_ARGS)
MAP_OPTIONS = --steps $(POINTS) --samples $(POINTS) --seed $(SEED)
INVERT = --steps 100 --seed $(SEED)

$(D)/%.attacked.rbs: $(D)/%.safetensors $(D)/test.safetensors $(K)/attack
	rb-attack $(word 2,$^) -m $< $(ATTACK) $(foreach e,$(EPSS),--eps $(e)) -o $@

define MAPS
$$(D)/%.$(1).safetensors: $$(D)/%.safetensors $$(D)/maps.safetensors $$(D)/train.safetensors
	rb-saliency $$(word 2,$$^) -m $$< --method $(1) $$(MAP_OPTIONS) \
	    $$(if $$(filter shap,$(1)),--background $$(D)/train.safetensors) -o $$@
endef
$(foreach m,$(METHODS),$(eval $(call MAPS,$(m))))

$(D)/%.inverted.safetensors: $(D)/%.safetensors $(D)/targets.safetensors
	rb-invert $(word 2,$^) -m $< $(INVERT) -o $@
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

study: $(D)/.sound  ## data, models, attacks, maps, inversions, scores and report in OUT/DATA
	@echo "the report is $(D)/report.html"

$(D)/report.html: $(SCORES) $(PICTURES) $(foreach m,$(MODELS),$(D)/$(m).safetensors) $(K)/bounds
	rb-report $(filter-out $(K)/%,$^) --figures $(D)/figures/ --title '$(DATA)' --clean $(CLEAN) --gap $(GAP) -o $@
# Apart from the page, which stays to be read where the study is found to be worthless.
$(D)/.sound: $(D)/report.html
	rb-report $(SCORES) --title '$(DATA)' --require --clean $(CLEAN) --gap $(GAP) -o /dev/null
	@touch $@

# ---------------------------------------------------------------------------------------------------- clusters
# cluster/study.sh submits the graph above to Slurm: it begins with `inputs`, and asks `knobs` for what is set and typed here.

.PHONY: inputs knobs
inputs: $(foreach f,train test maps targets,$(D)/$(f).safetensors) $(foreach k,train ball judge attack bounds,$(K)/$(k))

KNOBS := D SHARDS MODELS EPSS METHODS TRAIN_OPTIONS STANDARD ROBUST JUDGE ATTACK MAP_OPTIONS INVERT
knobs:
	@$(foreach k,$(KNOBS),printf '%s\n' '$(k)=($($(k)))';)

# ---------------------------------------------------------------------------------------------------- the control
# Images with a planted cue that a standard model leans on and a robust one, of twice the cue's radius, cannot: metrics
# that do not tell these two apart in the right direction prove nothing elsewhere. Of shapes, where the truth is known.

X := $(D)/control
CUE       ?= 0.5
CUE_SHIFT ?= 3
cue_ball  := --norm l2 --eps $(shell awk 'BEGIN { print 2 * $(CUE) }') --steps $(STEPS) --eps-ramp $(RAMP)

value_control := $(CUE) $(CUE_SHIFT) $(SEED) $(STEPS) $(RAMP) $(POINTS)

.PHONY: control
control: $(X)/standard.jsonl $(X)/robust.jsonl  ## the positive control: images whose explanation is known

$(X)/train.safetensors: $(K)/control | setup
	@mkdir -p $(@D)
	rb-data shapes --split train --n 4000 --seed $(SEED) --cue $(CUE) -o $@
CONTROL_TRAIN = rb-train $< --arch resnet8 --epochs 8 --augment none --seed $(SEED) --resume -o $@
$(X)/standard.safetensors: $(X)/train.safetensors
	$(FRESH)
	$(CONTROL_TRAIN) && touch $@
$(X)/robust.safetensors: $(X)/train.safetensors
	$(FRESH)
	$(CONTROL_TRAIN) $(cue_ball) && touch $@
$(X)/%.jsonl: $(X)/%.safetensors
	{ for shift in 0 $(CUE_SHIFT); do \
	      rb-data shapes --n 1000 --seed $(SEED) --cue $(CUE) --cue-shift $$shift | rb-score -m $< --json --quiet; \
	  done; \
	  for method in gradient ig smoothgrad; do \
	      rb-data shapes --n 200 --seed $(SEED) --cue $(CUE) | rb-saliency -m $< --method $$method --steps $(POINTS) --samples $(POINTS) --quiet; \
	  done | rb-score -m $< --metrics all --json --quiet; } > $@.tmp
	mv $@.tmp $@

# ---------------------------------------------------------------------------------------------------- the link
# A population of models, trained at LINK_EPS with LINK_SEEDS, and controls of the same seeds: do they become more
# interpretable as they become more robust?

L := $(D)/link
value_link := $(EPOCHS) $(BATCH) $(LR) $(ARCH) $(WIDTH) $(VAL) $(AUGMENT) $(NORM) $(STEPS) $(RAMP)$(if $(TRAIN_ARGS), $(TRAIN_ARGS))
value_linkattack := $(NORM) $(EPSS) $(LINK_NTEST)$(if $(ATTACK_ARGS), $(ATTACK_ARGS))
value_linkmaps := $(LINK_NMAPS) $(POINTS)

$(L)/test.safetensors: $(K)/data $(K)/linkattack | setup
	@mkdir -p $(@D)
	rb-data $(SOURCE) --split test --n $(LINK_NTEST) --seed $(SEED) -o $@
$(L)/maps.safetensors: $(K)/data $(K)/linkmaps | setup
	@mkdir -p $(@D)
	rb-data $(SOURCE) --split test --n $(LINK_NMAPS) --seed $(SEED) -o $@
$(L)/shuffled-labels.safetensors: $(K)/data $(K)/n | setup
	@mkdir -p $(@D)
	rb-data $(SOURCE) --split train --n $(N) --seed $(SEED) --shuffle-labels -o $@

# $(1) name, $(2) seed, $(3) options of rb-train, $(4) training rows
define LINK_MODEL
$$(L)/$(1)-$(2).safetensors: $(4) $$(K)/link
	@mkdir -p $$(@D)
	$$(FRESH)
	$$(TRAIN) --quiet --seed $(2) $(3) && touch $$@
endef
link_ball = $(if $(filter-out 0,$(1)),--norm $(NORM) --eps $(1) --steps $(STEPS) --eps-ramp $(RAMP))
control_noise     := --method noise --sigma 0.1
control_penalty   := --method gradient-penalty --beta 0.1
control_shuffled  :=
control_untrained := --epochs 0
control_early     := --epochs 7
$(foreach s,$(LINK_SEEDS),$(foreach e,$(LINK_EPS),\
    $(eval $(call LINK_MODEL,eps$(e),$(s),$(call link_ball,$(e)),$(D)/train.safetensors))))
$(foreach s,$(CONTROL_SEEDS),$(foreach c,$(CONTROLS),\
    $(eval $(call LINK_MODEL,$(c),$(s),$(control_$(c)),\
        $(if $(filter shuffled,$(c)),$(L)/shuffled-labels.safetensors,$(D)/train.safetensors)))))

# Attacked images and maps flow through pipes: what is kept of a model are its records. The braces stand in a line of their
# own: before && bash would not stop at a command that fails in them.
$(L)/%.jsonl: $(L)/%.safetensors $(L)/test.safetensors $(L)/maps.safetensors $(K)/linkattack
	{ rb-attack $(L)/test.safetensors -m $< --norm $(NORM) $(foreach e,$(EPSS),--eps $(e)) $(ATTACK_ARGS) --quiet | rb-score -m $< --json --quiet; \
	  for method in $(LINK_METHODS); do \
	      rb-saliency $(L)/maps.safetensors -m $< --method $$method --steps $(POINTS) --samples $(POINTS) --quiet; \
	  done | rb-score -m $< --metrics all --json --quiet; } > $@.tmp
	mv $@.tmp $@

LINK_MAIN := $(foreach e,$(LINK_EPS),$(foreach s,$(LINK_SEEDS),$(L)/eps$(e)-$(s).jsonl))
LINK_CONTROLS := $(foreach c,$(CONTROLS),$(foreach s,$(CONTROL_SEEDS),$(L)/$(c)-$(s).jsonl))
LINK_PROOF := $(if $(filter shapes,$(DATA)),$(X)/standard.jsonl $(X)/robust.jsonl)

# Models; passes of training and of judging through the network; passes per second of 2 cores, from the trainings of make study.
RATE ?= 2000
define LINK_PLAN
BEGIN { n = split("$(LINK_EPS)", eps, " "); seeds = split("$(LINK_SEEDS)", s, " "); controls = split("$(CONTROLS)", c, " ");
  twins = split("$(CONTROL_SEEDS)", t, " ");
  for (i in eps) cost += eps[i] > 0 ? $(STEPS) + 1 : 1;
  models = seeds * n + twins * controls; train = $(N) * $(EPOCHS) * (seeds * cost + twins * controls);
  judge = models * (20 * $(LINK_NTEST) * $(words $(EPSS)) + 600 * $(LINK_NMAPS));
  printf "%d models (%d radii of %d seeds, %d controls of %d), %.1f million passes: about %d minutes on 2 cores\n",
    models, n, seeds, controls, twins, (train + judge) / 1e6, (train + judge) / $(RATE) / 60 }
endef
export LINK_PLAN

.PHONY: link link-plan
link: link-plan  ## robustness against interpretability over a population of models; resumable
	@$(MAKE) --no-print-directory $(L)/report.html
	@echo "the report is $(L)/report.html"
	rb-report $(L)/link.jsonl --require --clean $(CLEAN) -o /dev/null
link-plan:  ## what make link would cost
	@awk "$$LINK_PLAN"

# Class images of the first seed, begun alike, by models of rising radius: the dose and the response as one sheet.
$(L)/begun.safetensors: $(K)/data | setup
	@mkdir -p $(@D)
	rb-data $(SOURCE) --split test --n 8 --seed $(SEED) -o $@
define DOSE
$$(L)/eps$(1)-$(firstword $(LINK_SEEDS)).classes.safetensors: $$(L)/eps$(1)-$(firstword $(LINK_SEEDS)).safetensors $$(L)/begun.safetensors $$(D)/train.safetensors
	rb-invert $$(word 2,$$^) -m $$< --mode class --seeds-from $$(D)/train.safetensors --steps 60 --seed $$(SEED) --block 32 --quiet -o $$@
endef
$(foreach e,$(LINK_EPS),$(eval $(call DOSE,$(e))))
$(L)/dose.png: $(foreach e,$(LINK_EPS),$(L)/eps$(e)-$(firstword $(LINK_SEEDS)).classes.safetensors)
	rb-view $^ -o $@

$(L)/link.jsonl: $(LINK_MAIN) $(LINK_CONTROLS)
	rm -rf $(L)/figures
	rb-link $(LINK_MAIN) $(foreach f,$(LINK_CONTROLS),--controls $(f)) --figures $(L)/figures/ --json --quiet > $@.tmp && mv $@.tmp $@
$(L)/report.html: $(L)/link.jsonl $(LINK_PROOF) $(L)/dose.png
	rb-report $^ $(L)/figures/*.svg --title 'the link on $(DATA)' --clean $(CLEAN) -o $@

# ---------------------------------------------------------------------------------------------------- the paper
# DATA=shapes, the default of the other targets, is none of the paper's.

PAPER = $(MAKE) --no-print-directory -f paper.mk $@ DATA=$(if $(filter file,$(origin DATA)),cifar10,$(DATA))

.PHONY: paper
paper: setup  ## the paper's study, published against ours: DATA=cifar10|small-imagenet-150 PROFILE= SCALE= ROOT=
	@+$(PAPER)
paper-%: setup
	@+$(PAPER)

# ---------------------------------------------------------------------------------------------------- tests

# A process per core, each of one thread.
test: setup  ## the tests
	OMP_NUM_THREADS=1 pytest -n $(shell nproc) --dist worksteal

test-cluster: setup  ## the jobs of cluster/ in a real Slurm on this machine, which root installs by apt
	tests/cluster/with-slurm pytest tests/cluster

lint: setup  ## style and types
	ruff format --check . && ruff check .
	rm -rf build && pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed mypy

man: setup  ## man pages and completions from the commands
	python man/make.py

cases: setup  ## rewrite the golden shell cases; review with git diff
	RB_REWRITE=1 pytest tests/test_cases.py

# Other libraries stand in an environment of their own, which sees the packages of .venv.
BENCH := .venv-bench
$(BENCH)/.installed: benchmarks/peers.txt | setup
	$(VENV)/bin/python -m venv $(BENCH)
	$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(BENCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -r benchmarks/peers.txt
	touch $@
# Options of bench.py; folders of code that no registry has: the reference AutoAttack (without one, pyautoattack of the
# registry) and the paper's; a folder of train|test/CLASS/PICTURE, for what is measured on pictures.
BENCH_ARGS ?=
PICTURES ?=
AUTOATTACK ?=
PAPER_CODE ?=
bench: $(BENCH)/.installed  ## our tools, the commands and other libraries side by side
	$(BENCH)/bin/python benchmarks/bench.py $(if $(AUTOATTACK),--auto-attack $(AUTOATTACK)) $(if $(PAPER_CODE),--paper $(PAPER_CODE)) \
	    $(if $(PICTURES),--pictures $(PICTURES)) $(BENCH_ARGS)

# On the study's models of each data set at hand, in two balls that leave about as much.
AUTOATTACK_IMAGES ?= 200
FASHION := $(wildcard /usr/share/datasets/fashion-mnist)
in_balls = $(foreach b,$(3),$(1)-$(2)=$(OUT)/$(1)/$(2).safetensors,$(OUT)/$(1)/test.safetensors,$(b))
AUTOATTACK_CASES = $(foreach m,standard robust,$(call in_balls,shapes,$(m),l2:0.5 linf:2/255)) \
    $(if $(FASHION),$(call in_balls,fashion-mnist,robust,l2:1.0 linf:8/255)) \
    $(if $(PICTURES),$(call in_balls,folder,robust,l2:0.5 linf:2/255))
study_files = $(MAKE) --no-print-directory DATA=$(1) $(foreach f,$(2) robust test,$(OUT)/$(1)/$(f).safetensors)
bench-autoattack: $(BENCH)/.installed  ## auto and fab-t against the reference: AUTOATTACK=DIR PICTURES=DIR
	$(call study_files,shapes,standard)
	$(if $(FASHION),$(call study_files,fashion-mnist))
	$(if $(PICTURES),$(call study_files,folder) ROOT=$(PICTURES))
	$(BENCH)/bin/python benchmarks/auto_attack.py $(AUTOATTACK_CASES) --images $(AUTOATTACK_IMAGES) \
	    $(if $(AUTOATTACK),--reference $(AUTOATTACK))

clean:  ## remove out/ (the study) but not .venv
	rm -rf $(OUT)
