#!/bin/sh
# Makes the configurations that come with the runtime. Run from the repository's root.
# TCA_CALIBRATE_FLAGS adds flags, such as --device cuda; PYTHON names the interpreter.
set -e

# calibrate MODEL NAME FLAGS...
calibrate() {
    model=$1
    output=build/calibration/$1$2.json
    shift 2
    # shellcheck disable=SC2086
    "${PYTHON:-python3}" -m tca_runtime.calibrate --model-path "$model" --resume \
        --samples 15 --seed 0 --objective output-error --output "$output" \
        "$@" ${TCA_CALIBRATE_FLAGS:-}
}

for model in ${*:-smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b}; do
    # For accuracy: prompts and the window that are served (docs/quality.md, "Prefill views").
    length=8192
    [ "$model" = smollm2-135m ] && length=8000
    calibrate "$model" "" --length $length --window 128 --threshold 0.9 0.95 \
        --ratio 0.39,0.24 0.39,0.39 --floor 0.05,0.08
    # For speed.
    calibrate "$model" -fast --length 4096 --threshold 0.6 0.8 \
        --ratio 0.03,0.08 0.05,0.15 --floor 0.02,0.05
    for threshold in 0.9 0.95; do
        cp "build/calibration/$model-$threshold.json" python/tca_runtime/sparsity/configs/
    done
    for threshold in 0.6 0.8; do
        cp "build/calibration/$model-fast-$threshold.json" \
            "python/tca_runtime/sparsity/configs/$model-$threshold.json"
    done
done
