"""A person's own program: Stable Diffusion 3 with one static scale for each layer.

sd3_w8a8.py PIPELINE DUMP_FOLDER WEIGHT_FOLDER
"""

import os
import sys

import torch
from diffusers import StableDiffusion3Pipeline

from quant_core import (
    DumperManager,
    SaveProcessorConfig,
    SessionConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    get_rank,
    get_rank_suffix_file,
    quant_model,
    safe_torch_load,
)

MODEL_PATH, DUMP_CALIB_FOLDER, SAFE_TENSOR_FOLDER = sys.argv[1:]

rank = get_rank()
is_distributed = rank >= 0
dump_name = get_rank_suffix_file(base_name="calib_data", ext="pth", is_distributed=is_distributed, rank=rank)
dump_data_path = os.path.join(DUMP_CALIB_FOLDER, dump_name)

pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_PATH, torch_dtype=torch.float16).to("cpu")
model = pipeline.transformer

if not os.path.exists(dump_data_path):
    dumper_manager = DumperManager(model, capture_mode="args")
    pipeline(
        prompt=["A photo of an astronaut riding a horse on mars"],
        negative_prompt=[""],
        width=64,
        height=64,
        num_inference_steps=2,
        output_type="latent",
    )
    dumper_manager.save(dump_data_path)

calib_dataset = safe_torch_load(dump_data_path, map_location="cpu")
safetensors_name = get_rank_suffix_file("quant_model_weight_w8a8", "safetensors", is_distributed, rank)
json_name = get_rank_suffix_file("quant_model_description_w8a8", "json", is_distributed, rank)
session_cfg = SessionConfig(
    processor_cfg_map={
        "w8a8": W8A8ProcessorConfig(
            cfg=W8A8QuantConfig(act_method="minmax"),
            disable_names=["context_embedder"],
        ),
        "save": SaveProcessorConfig(
            output_path=SAFE_TENSOR_FOLDER,
            safetensors_name=safetensors_name,
            json_name=json_name,
            save_type=["safe_tensor"],
            part_file_size=None,
        ),
    },
    calib_data=calib_dataset,
    device="cpu",
)
session_cfg.model_validate(session_cfg)
quant_model(model, session_cfg)
