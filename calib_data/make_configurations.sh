#!/bin/sh
# Makes the configurations that come with the runtime. Run from the repository's root.
# TCA_CALIBRATE_FLAGS adds flags, such as --device cuda; PYTHON names the interpreter.
set -e
for model in ${*:-smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b}; do
    # shellcheck disable=SC2086
    "${PYTHON:-python3}" -m tca_runtime.calibrate --model-path "$model" --resume \
        --samples 15 --length 4096 --seed 0 \
        --threshold 0.6 0.8 0.9 0.95 --objective output-error \
        --ratio 0.03,0.08 0.05,0.15 0.1,0.25 0.15,0.39 --floor 0.02,0.05 \
        --output "build/calibration/$model.json" ${TCA_CALIBRATE_FLAGS:-}
    cp "build/calibration/$model"-0.*.json python/tca_runtime/sparsity/configs/
done
