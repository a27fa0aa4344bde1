#!/bin/sh
# demo.sh: set up, quantize a small trained FLUX with two ranks on the CPU in the dual-card layout, and look at what it
# still paints. Everything lands in ./demo; running it again finds the job published and evaluated, and changes nothing.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
mkdir -p demo
# A clone's files may be read by all, which the job refuses for prompts.
install -m 640 scripts/tiny_models/prompts_calibration.txt scripts/tiny_models/prompts_evaluation.txt demo
exec .venv/bin/torchrun --standalone --nproc_per_node 2 -m launcher flux \
    --path scripts/tiny_models/flux --prompt_path demo/prompts_calibration.txt --max_num_prompt 4 \
    --device cpu --device_type A2-32g-dual --width 64 --height 64 --infer_steps 8 \
    --do_quant --quant_type w8a8_dynamic \
    --quant_weight_save_folder demo/quant/safetensors --quant_dump_calib_folder demo/quant/cache \
    --evaluate 4 --evaluate_prompts demo/prompts_evaluation.txt --min_psnr 30
