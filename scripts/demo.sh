#!/bin/sh
# demo.sh: set up, make a tiny FLUX pipeline, and quantize it with two ranks on the CPU in the dual-card layout.
# Everything lands in ./demo; running it again finds the job published and changes nothing.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
[ -d demo/flux ] || .venv/bin/python scripts/make_tiny_pipeline.py flux demo/flux --prompts demo/calib_prompts.txt
exec .venv/bin/torchrun --standalone --nproc_per_node 2 -m launcher flux \
    --path demo/flux --prompt_path demo/calib_prompts.txt \
    --device cpu --device_type A2-32g-dual --width 64 --height 64 --infer_steps 4 \
    --do_quant --quant_type w8a8_dynamic \
    --quant_weight_save_folder demo/quant/safetensors --quant_dump_calib_folder demo/quant/cache
