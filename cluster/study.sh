#!/usr/bin/env bash
# Submits the study of the Makefile to Slurm: study.sh [KNOB=VALUE]..., or knobs from the environment, as for make.
#
#   study.sh DATA=cifar10 ROOT=/data/cifar10 OUT=/scratch/out SHARDS=32
#
# SHARDS is the number of parts of every array. Account, partition, time and memory are those of sbatch: SBATCH_ACCOUNT,
# SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_MEM_PER_NODE. Relative paths begin at the Makefile. Run again, it makes what
# is missing or older than what it depends on. The last job is make study, which finds the files of the arrays made.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export RB_THREADS=${RB_THREADS:-1} PATH=$PWD/.venv/bin:$PATH
make=(make --no-print-directory -o setup "$@")
eval "$("${make[@]}" --silent knobs)"  # as arrays; a plain knob is the first element of one
mkdir -p "$D/log"

submit() {  # NAME DEPENDENCY [OPTION]... FILE [ARG]...: prints the id of the job
    local options=(--parsable --kill-on-invalid-dep=yes --cpus-per-task="$RB_THREADS" --job-name="$1" --output="$D/log/%x-%j.log")
    [[ -z $2 ]] || options+=(--dependency="$2")
    sbatch "${options[@]}" "${@:3}"
}

part() { echo "$D/parts/$1.%-of-$SHARDS.rbs"; }  # NAME

shards() {  # NAME DEPENDENCY COMMAND [ARG]...: an array; prints its id
    submit "$1" "$2" --array="1-$SHARDS" --output="$D/log/%x-%A_%a.log" cluster/array.sbatch "$SHARDS" "$(part "$1")" "${@:3}"
}

join() {  # OUTPUT DEPENDENCY NAME...: prints the id of the job
    local name patterns=()
    for name in "${@:3}"; do patterns+=("$(part "$name")"); done
    submit "join-$1" "$2" cluster/join.sbatch "$SHARDS" "$D/$1" "${patterns[@]}"
}

data=afterok:$(submit data "" cluster/job.sbatch "${make[@]}" inputs)
train() {  # MODEL OPTION...
    submit "$1" "$data" cluster/train.sbatch rb-train "$D/train.safetensors" "${TRAIN_OPTIONS[@]}" "${@:2}" -o "$D/$1.safetensors"
}
standard=$(train standard "${STANDARD[@]}")
robust=$(train robust "${ROBUST[@]}")
last=afterok:$(train judge "${JUDGE[@]}")

for model in "${MODELS[@]}"; do
    weights=$D/$model.safetensors trained=afterok:${!model}

    names=() arrays=afterany
    for eps in "${EPSS[@]}"; do
        names+=("$model.attacked-$eps")
        arrays+=:$(shards "${names[-1]}" "$trained" rb-attack "$D/test.safetensors" -m "$weights" "${ATTACK[@]}" --eps "$eps")
    done
    attacked=$(join "$model.attacked.rbs" "$arrays" "${names[@]}")
    scored=$(shards "$model.robustness" "afterok:$attacked" rb-score "$D/$model.attacked.rbs" -m "$weights")
    last+=:$(join "$model.robustness.jsonl" "afterany:$scored" "$model.robustness")

    files=() joins=afterok
    for method in "${METHODS[@]}"; do
        name=$model.$method files+=("$D/$model.$method.safetensors")
        background=()
        [[ $method != shap ]] || background=(--background "$D/train.safetensors")
        array=$(shards "$name" "$trained" rb-saliency "$D/maps.safetensors" -m "$weights" --method "$method" "${MAP_OPTIONS[@]}" "${background[@]}")
        joins+=:$(join "$name.safetensors" "afterany:$array" "$name")
    done
    scored=$(shards "$model.maps" "$joins" rb-score "${files[@]}" -m "$weights" --background "$D/train.safetensors")
    last+=:$(join "$model.maps.jsonl" "afterany:$scored" "$model.maps")

    inverted=$(shards "$model.inverted" "$trained" rb-invert "$D/targets.safetensors" -m "$weights" "${INVERT[@]}")
    last+=:$(join "$model.inverted.safetensors" "afterany:$inverted" "$model.inverted")
done

submit study "$last" cluster/job.sbatch "${make[@]}" study
