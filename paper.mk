# The study of the paper (D. Boychev 2023, arXiv 2307.02500) as a graph of files, once per profile. The Makefile calls it:
#
#   make paper DATA=cifar10 ROOT=DIR SCALE=cpu             scaled down, 9 minutes of two CPU cores
#   make paper DATA=cifar10 ROOT=DIR SCALE=gpu             full network and images, short training: minutes of a large GPU
#   make paper DATA=small-imagenet-150 ROOT=DIR PROFILE=paper
#   make paper-figure-ig, make paper-table-accuracy, ...   one figure or table, with what it needs
#
# PROFILE=paper is the published recipe with its defects, each a named option; PROFILE=sound trains, selects and measures
# as it should be done. Both, which is the default, are compared on one page.

DATA    ?= cifar10
PROFILE ?= paper sound
SCALE   ?= full
# cifar10: binary or Python batches, or a folder DIR/train/CLASS/PICTURE, DIR/test/...; small-imagenet-150: ImageNet
ROOT    ?=
# yes: fetch CIFAR-10 into data/ where there is no ROOT
DOWNLOAD ?=
SEED    ?= 0
OUT     ?= out

pick = $($(1)_$(DATA)_$(SCALE))
# By scale: $(call at,cpu,gpu,full)
at = $(if $(filter cpu,$(SCALE)),$(1),$(if $(filter gpu,$(SCALE)),$(2),$(3)))
# Attacks in TF32 where a GPU has it, judged in float32.
FAST = $(call at,,--tf32,--tf32)
cifar := cifar10
small := small-imagenet-150

# Training and test rows (nothing: all), pixels, network.
NTRAIN_cifar10_cpu            := 5000
NTEST_cifar10_cpu             := 500
ARCH_cifar10_full             := resnet18
ARCH_cifar10_gpu              := resnet18
ARCH_cifar10_cpu              := resnet8
ARCH_small-imagenet-150_full  := torchvision:resnet50
ARCH_small-imagenet-150_gpu   := torchvision:resnet50
ARCH_small-imagenet-150_cpu   := resnet8
SUBSET_small-imagenet-150_full := --classes 150 --per-class 600,50,60 --size 128
SUBSET_small-imagenet-150_gpu  := $(SUBSET_small-imagenet-150_full)
SUBSET_small-imagenet-150_cpu  := --classes 10 --per-class 200,20,20 --size 64
NTRAIN ?= $(call pick,NTRAIN)
NTEST  ?= $(call pick,NTEST)
ARCH   ?= $(call pick,ARCH)
SUBSET ?= $(call pick,SUBSET)

# Rows that maps, inversions, class images and the strongest attack are made of; background images of SHAP.
NMAPS  ?= 24
NINV   ?= $(if $(filter cpu,$(SCALE)),8,64)
NCLASS ?= $(call at,200,1000,$(if $(filter $(small),$(DATA)),7500,10000))
NAUTO  ?= $(call at,100,256,1000)
NBACK  ?= 176

# The ball, and the step of an attack of 20 steps.
EPS    ?= $(if $(filter $(small),$(DATA)),1.5,0.5)
STEP   ?= $(if $(filter $(small),$(DATA)),0.1875,0.1)
LINF   := --norm linf --eps 4/255 --step-size 0.01

# ---------------------------------------------------------------------------------------------------- profile: paper
# The paper's code: a schedule twice as long as the training, gradients clipped by value, the epoch chosen on the test
# images; an inner attack in training mode from the clean image, which keeps the iterate of the best batch and never
# judges the last one; class seeds fitted on the test images.

RECIPE_paper_cifar10_full            := --epochs 100 --schedule-epochs 200 --batch 128 --lr 0.01 --augment crop-flip
RECIPE_paper_small-imagenet-150_full := --epochs 150 --schedule-epochs 200 --batch 200 --lr 1e-4 --optimizer adam --augment resized
RECIPE_paper_cifar10_gpu             := --epochs 4 --schedule-epochs 8 --batch 128 --lr 0.01 --augment crop-flip --amp
RECIPE_paper_small-imagenet-150_gpu  := --epochs 4 --schedule-epochs 8 --batch 200 --lr 1e-4 --optimizer adam --augment resized --amp
RECIPE_paper_cifar10_cpu             := --epochs 6 --schedule-epochs 12 --batch 32 --lr 0.05 --augment flip
RECIPE_paper_small-imagenet-150_cpu  := $(RECIPE_paper_cifar10_cpu)
UNJUDGED := --last-iterate unjudged
TRAIN.paper  = $(RECIPE_paper_$(DATA)_$(SCALE)) --schedule cosine --no-nesterov --clip-value 0.1 --val $(SELECT.paper)
INNER.paper  = $(if $(filter cpu,$(SCALE)),--steps 5,--steps 20 --step-size $(STEP))
BALL.paper   = $(INNER.paper) --attack-bn train --attack-start clean --attack-keep batch $(UNJUDGED)
ATTACK.paper := --steps 20 --start clean --keep batch $(UNJUDGED) --block 128 $(FAST)
IG.paper     := --explain probability --target predicted --baseline uniform --baselines 10 --steps 50
SHAP.paper   := --target predicted --samples 200
INVERT.paper := --steps $(call at,100 --block 32,1000 --block 64,10000) --step-size 1 --fake-relu --keep last $(UNJUDGED)
CLASS.paper  := --objective logit --steps 60 --fake-relu --keep batch $(UNJUDGED)
REFERENCE.paper := test
SELECT.paper = $(B)/$(call at,test,hard,test).safetensors

# ---------------------------------------------------------------------------------------------------- profile: sound
# A schedule that ends at 0, averaged weights, the epoch chosen on held-out training rows, a random start; per-example
# iterates, the last one judged; one target class for both models, paths refined to one error; seeds and background images
# from the training rows.

RECIPE_sound_cifar10_full            := --epochs 60 --batch 128 --lr 0.2 --ema 0.999 --augment crop-flip --tf32
RECIPE_sound_small-imagenet-150_full := --epochs 60 --batch 128 --lr 0.1 --ema 0.999 --augment resized --tf32
RECIPE_sound_cifar10_gpu             := --epochs 16 --batch 256 --lr 0.2 --ema 0.995 --augment crop-flip --amp
RECIPE_sound_small-imagenet-150_gpu  := --epochs 8 --batch 256 --lr 0.1 --ema 0.995 --augment resized --amp
RECIPE_sound_cifar10_cpu             := --epochs 6 --batch 32 --lr 0.1 --ema 0.99 --augment flip
RECIPE_sound_small-imagenet-150_cpu  := $(RECIPE_sound_cifar10_cpu)
TRAIN.sound  = $(RECIPE_sound_$(DATA)_$(SCALE)) --schedule onecycle --val $(or $(SELECT.sound),$(call at,0.1,0.02,0.1)) --select robust
BALL.sound   = $(call at,--steps 4 --eps-ramp 0.5,--steps 7,--steps 10)
ATTACK.sound := --steps 20 $(FAST)
IG.sound     := --explain probability --target label --baseline uniform --baselines 10 --steps 50 --ig-tolerance 0.02 \
    --max-steps $(call at,100,400,1600)
SHAP.sound   := --target label --samples 200
INVERT.sound := --steps $(call at,100 --block 32,1000 --block 64,1000) --step-size 0.5
CLASS.sound  := --objective ce --steps 60
REFERENCE.sound := train
SELECT.sound = $(if $(filter $(small),$(DATA)),$(B)/val.safetensors)

# How far a class image may go from its seed, and its step.
GROW := $(if $(filter $(small),$(DATA)),--eps 40 --step-size 1,--eps 30 --step-size 0.5)
AUTO := --attack auto $(call at,--steps 10 --queries 200,--block 256 $(FAST),$(FAST))
# Where a pair of models would decide nothing: see --clean and --gap of rb-report.
BOUNDS := --clean $(if $(filter cpu,$(SCALE)),0.4:1,0.5:1) --gap 0.15
# Metrics of maps; those that explain again cost as much as all the rest.
MAPS := insertion,deletion,gini,alignment,completeness_error,completeness_error_median

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.SECONDARY:
MAKEFLAGS += --no-builtin-rules
export RB_THREADS ?= $(shell nproc)

B := $(OUT)/paper/$(DATA)-$(SCALE)
K := $(B)/.knobs
MODELS := standard robust

$(foreach p,$(PROFILE),$(if $(filter $(p),paper sound),,$(error PROFILE=$(p): expected paper, sound or both)))
$(if $(filter $(DATA),$(cifar) $(small)),,$(error DATA=$(DATA): the paper has $(cifar) and $(small)))
$(if $(filter $(SCALE),cpu gpu full),,$(error SCALE=$(SCALE): expected cpu, gpu or full))

.PHONY: paper FORCE
paper: $(B)/report.html
	@echo "the report is $<"

# ---------------------------------------------------------------------------------------------------- knobs
# Stamps that change with their values, as in the Makefile.

$(K)/%: FORCE
	@mkdir -p $(@D); printf '%s\n' '$(value_$*)' | cmp -s - $@ || printf '%s\n' '$(value_$*)' > $@
FORCE:
value_data  = $(ROOT) $(SUBSET) $(SEED) $(NTRAIN) $(NTEST) $(NMAPS) $(NINV) $(NCLASS) $(NAUTO) $(NBACK)
value_paper = $(ARCH) $(SEED) $(EPS) $(TRAIN.paper) $(BALL.paper)
value_sound = $(ARCH) $(SEED) $(EPS) $(TRAIN.sound) $(BALL.sound)

# ---------------------------------------------------------------------------------------------------- data

FETCHED := $(wildcard data/cifar-10-batches-bin data/cifar-10-batches-py)
PICTURES := $(if $(ROOT),$(filter-out %.bin,$(wildcard $(ROOT)/train/*/)))
source_cifar10 = $(if $(PICTURES),folder $(ROOT) --size 32,cifar10 --root $(or $(ROOT),data) $(if $(DOWNLOAD),--download))
source_small-imagenet-150 = imagenet-subset $(ROOT) $(SUBSET) --manifest $(@:.safetensors=.sha256)
missing_cifar10 := $(if $(ROOT)$(FETCHED)$(DOWNLOAD),,ROOT=DIR with the batches of CIFAR-10 or a folder of its pictures, or DOWNLOAD=yes)
missing_small-imagenet-150 := $(if $(ROOT),,ROOT=DIR with ImageNet, as DIR/train/CLASS/PICTURE)

# $(1) name, $(2) split, $(3) rows, $(4) seed
define ROWS
$$(B)/$(1).safetensors: $$(K)/data
	@test -z '$$(missing_$$(DATA))' || { echo 'make paper: no images; give $$(missing_$$(DATA))' >&2; exit 2; }
	rb-data $$(source_$$(DATA)) --split $(2) $(if $(3),--n $(3)) --seed $(4) -q -o $$@
endef
next = $(shell echo $$(( $(SEED) + $(1) )))
# Images apart from those that are explained: of another seed, which for a drawn subset would be another subset.
other_split := $(if $(filter $(small),$(DATA)),val,test)
other_seed = $(if $(filter $(small),$(DATA)),$(SEED),$(call next,$(1)))
$(eval $(call ROWS,train,train,$(NTRAIN),$(SEED)))
$(eval $(call ROWS,test,test,$(NTEST),$(SEED)))
$(eval $(call ROWS,maps,test,$(NMAPS),$(SEED)))
$(eval $(call ROWS,targets,test,$(NINV),$(SEED)))
$(eval $(call ROWS,labels,test,$(NCLASS),$(SEED)))
$(eval $(call ROWS,hard,test,$(NAUTO),$(SEED)))
$(eval $(call ROWS,starts,$(other_split),32,$(call other_seed,1)))
$(eval $(call ROWS,background-test,$(other_split),$(NBACK),$(call other_seed,2)))
$(eval $(call ROWS,val,val,,$(SEED)))
$(eval $(call ROWS,background-train,train,$(NBACK),$(SEED)))

# ---------------------------------------------------------------------------------------------------- models

# A checkpoint older than what it depends on belongs to another run. A finished run is left as it is, hence the touch.
FRESH = @for p in $^; do [ ! "$$p" -nt "$@.ckpt" ] || rm -f "$@.ckpt"; done
TRAIN = rb-train $< --arch $(ARCH) --resume -o $@

# One judge for both profiles, so that its numbers can be compared; of another seed.
$(B)/judge.safetensors: $(B)/train.safetensors $(SELECT.sound) $(K)/sound
	$(FRESH)
	$(TRAIN) $(TRAIN.sound) --seed $(call next,1000) && touch $@

# ---------------------------------------------------------------------------------------------------- one profile
# $(1) profile; attacks, maps, inversions and class images of both models, and their scores.

define STUDY
$$(B)/$(1)/standard.safetensors: $$(B)/train.safetensors $$(SELECT.$(1)) $$(K)/$(1)
	@mkdir -p $$(@D)
	$$(FRESH)
	$$(TRAIN) $$(TRAIN.$(1)) --seed $$(SEED) && touch $$@
$$(B)/$(1)/robust.safetensors: $$(B)/train.safetensors $$(SELECT.$(1)) $$(K)/$(1)
	@mkdir -p $$(@D)
	$$(FRESH)
	$$(TRAIN) $$(TRAIN.$(1)) --seed $$(SEED) --norm l2 --eps $$(EPS) $$(BALL.$(1)) && touch $$@

$$(B)/$(1)/%.attacked.rbs: $$(B)/$(1)/%.safetensors $$(B)/test.safetensors
	rb-attack $$(B)/test.safetensors -m $$< --norm l2 --eps $$(EPS) --step-size $$(STEP) $$(ATTACK.$(1)) --seed $$(SEED) -o $$@
$$(B)/$(1)/%.linf.rbs: $$(B)/$(1)/%.safetensors $$(B)/test.safetensors
	rb-attack $$(B)/test.safetensors -m $$< $$(LINF) $$(ATTACK.$(1)) --seed $$(SEED) -o $$@
$$(B)/$(1)/%.auto.rbs: $$(B)/$(1)/%.safetensors $$(B)/hard.safetensors
	rb-attack $$(B)/hard.safetensors -m $$< --norm l2 --eps $$(EPS) $$(AUTO) --seed $$(SEED) -o $$@

$$(B)/$(1)/%.ig.safetensors: $$(B)/$(1)/%.safetensors $$(B)/maps.safetensors
	rb-saliency $$(B)/maps.safetensors -m $$< --method ig $$(IG.$(1)) --seed $$(SEED) -o $$@
$$(B)/$(1)/%.shap.safetensors: $$(B)/$(1)/%.safetensors $$(B)/maps.safetensors $$(B)/background-$$(REFERENCE.$(1)).safetensors
	rb-saliency $$(B)/maps.safetensors -m $$< --method shap $$(SHAP.$(1)) --background $$(lastword $$^) --seed $$(SEED) -o $$@

$$(B)/$(1)/%.inverted.safetensors: $$(B)/$(1)/%.safetensors $$(B)/targets.safetensors
	rb-invert $$(B)/targets.safetensors -m $$< $$(INVERT.$(1)) --seed $$(SEED) -o $$@
$$(B)/$(1)/%.inverted-1.safetensors: $$(B)/$(1)/%.safetensors $$(B)/targets.safetensors $$(B)/starts.safetensors
	rb-invert $$(B)/targets.safetensors -m $$< $$(INVERT.$(1)) --start-from $$(lastword $$^) --seed $$(SEED) -o $$@
$$(B)/$(1)/%.inverted-2.safetensors: $$(B)/$(1)/%.safetensors $$(B)/targets.safetensors $$(B)/starts.safetensors
	rb-invert $$(B)/targets.safetensors -m $$< $$(INVERT.$(1)) --start-from $$(lastword $$^) --seed $(call next,1) -o $$@
$$(B)/$(1)/%.classes.safetensors: $$(B)/$(1)/%.safetensors $$(B)/labels.safetensors $$(B)/$$(REFERENCE.$(1)).safetensors
	rb-invert $$(B)/labels.safetensors -m $$< --mode class --seeds-from $$(lastword $$^) $$(GROW) $$(CLASS.$(1)) --seed $$(SEED) -o $$@

$$(B)/$(1)/%.robustness.jsonl: $$(B)/$(1)/%.attacked.rbs $$(B)/$(1)/%.linf.rbs $$(B)/$(1)/%.auto.rbs $$(B)/$(1)/%.safetensors
	rb-score $$(filter %.rbs,$$^) -m $$(lastword $$^) --tag $(1) --json > $$@.tmp && mv $$@.tmp $$@
$$(B)/$(1)/%.maps.jsonl: $$(B)/$(1)/%.ig.safetensors $$(B)/$(1)/%.shap.safetensors $$(B)/$(1)/%.safetensors
	rb-score $$(wordlist 1,2,$$^) -m $$(lastword $$^) --metrics $$(MAPS) --tag $(1) --json > $$@.tmp && mv $$@.tmp $$@
$$(B)/$(1)/%.images.jsonl: $$(B)/$(1)/%.inverted.safetensors $$(B)/$(1)/%.inverted-1.safetensors $$(B)/$(1)/%.inverted-2.safetensors \
    $$(B)/$(1)/%.classes.safetensors $$(B)/$(1)/%.safetensors $$(B)/judge.safetensors
	rb-score $$(wordlist 1,4,$$^) -m $$(word 5,$$^) --judge $$(lastword $$^) --tag $(1) --json > $$@.tmp && mv $$@.tmp $$@

$$(B)/$(1)/sheet-attacked.png: $$(foreach m,$$(MODELS),$$(B)/$(1)/$$(m).attacked.rbs)
	rb-view $$^ --rows 12 --spread -o $$@
$$(B)/$(1)/sheet-%.png: $$(foreach m,$$(MODELS),$$(B)/$(1)/$$(m).%.safetensors)
	rb-view $$^ --rows 24 --spread -o $$@
$$(B)/$(1)/accuracy.png: $$(foreach m,$$(MODELS),$$(B)/$(1)/$$(m).safetensors)
	rb-view $$^ -o $$@
$$(B)/$(1)/loss.png: $$(foreach m,$$(MODELS),$$(B)/$(1)/$$(m).safetensors)
	rb-view $$^ --metric loss -o $$@
endef
$(foreach p,$(PROFILE),$(eval $(call STUDY,$(p))))

SCORES := $(foreach p,$(PROFILE),$(foreach m,$(MODELS),$(foreach s,robustness maps images,$(B)/$(p)/$(m).$(s).jsonl)))
TRAINED := $(foreach p,$(PROFILE),$(foreach m,$(MODELS),$(B)/$(p)/$(m).safetensors))

# ---------------------------------------------------------------------------------------------------- figures
# Drawn of stored tensors alone.

figure_curves    := accuracy loss
figure_attack    := sheet-attacked
figure_ig        := sheet-ig
figure_shap      := sheet-shap
figure_inversion := sheet-inverted sheet-inverted-1 sheet-inverted-2
figure_classes   := sheet-classes
FIGURES := curves attack ig shap inversion classes
drawn = $(foreach p,$(PROFILE),$(patsubst %,$(B)/$(p)/%.png,$(figure_$(1))))
define FIGURE
.PHONY: paper-figure-$(1)
paper-figure-$(1): $(call drawn,$(1))
	@printf '%s\n' $$^
endef
$(foreach f,$(FIGURES),$(eval $(call FIGURE,$(f))))
SHEETS := $(foreach f,$(filter-out curves,$(FIGURES)),$(call drawn,$(f)))

# ---------------------------------------------------------------------------------------------------- tables, report

PUBLISHED := results/paper/$(DATA).jsonl
TITLE := the paper's study on $(DATA)$(call at, scaled down (SCALE=cpu), with short training (SCALE=gpu))
SCALED := Scaled down for a CPU (SCALE=cpu): $(ARCH) instead of $(ARCH_$(DATA)_full), few images and epochs, shorter \
    attacks. The graph is that of the whole study; the numbers are not comparable with the published ones.
LOSSY := The images come from a folder of pictures, which may be recompressed copies of the data set.
SHORT := Short training (SCALE=gpu): network and images are those of the full study, its epochs are a few, in bfloat16; \
    attacks search in TF32 and are judged in float32.
NOTE := $(call at,$(strip $(SCALED)),$(strip $(SHORT))) $(if $(filter $(cifar),$(DATA)),$(if $(PICTURES),$(LOSSY)))
REPORT = rb-report $^ --published $(PUBLISHED) --title "$(TITLE)" --note "$(strip $(NOTE))" \
    $(BOUNDS) --ours "ours$(if $(filter full,$(SCALE)),, (SCALE=$(SCALE)))"

TABLES := accuracy curves completeness inversion distance fid
needs_accuracy     := robustness
needs_curves       := robustness
needs_completeness := maps
needs_inversion    := images
needs_distance     := images
needs_fid          := images
define TABLE
.PHONY: paper-table-$(1)
paper-table-$(1): $(B)/table-$(1).html
	@echo $$<
$(B)/table-$(1).html: $(foreach p,$(PROFILE),$(foreach m,$(MODELS),$(B)/$(p)/$(m).$(needs_$(1)).jsonl)) $(TRAINED)
	$$(REPORT) --table $(1) -o $$@
endef
$(foreach t,$(TABLES),$(eval $(call TABLE,$(t))))

$(B)/report.html: $(SCORES) $(TRAINED) $(SHEETS)
	$(REPORT) --figures $(B)/figures/ -o $@
