"""A person's own program: FLUX with a scale for each denoising step, from a loop that says which step it is in.

flux_timestep.py PIPELINE DUMP_FOLDER WEIGHT_FOLDER
"""

import os
import sys

import numpy as np
import torch
from diffusers import FluxPipeline

from quant_core import (
    DumperManager,
    SaveProcessorConfig,
    SessionConfig,
    TimestepManager,
    W8A8TimeStepProcessorConfig,
    W8A8TimeStepQuantConfig,
    get_disable_layer_names,
    get_rank,
    get_rank_suffix_file,
    quant_model,
    safe_torch_load,
)

MODEL_PATH, DUMP_CALIB_FOLDER, SAFE_TENSOR_FOLDER = sys.argv[1:]
STEPS, SIDE = 3, 64

rank = get_rank()
is_distributed = rank >= 0
dump_name = get_rank_suffix_file(base_name="calib_data", ext="pth", is_distributed=is_distributed, rank=rank)
dump_data_path = os.path.join(DUMP_CALIB_FOLDER, dump_name)

pipeline = FluxPipeline.from_pretrained(MODEL_PATH, torch_dtype=torch.bfloat16).to("cpu")
model = pipeline.transformer


@torch.no_grad()
def denoise(prompt):
    """Run the denoising loop, written out."""
    embeds, pooled, text_ids = pipeline.encode_prompt(prompt=prompt, prompt_2=None)
    generator = torch.Generator().manual_seed(42)
    latents, image_ids = pipeline.prepare_latents(1, 16, SIDE, SIDE, embeds.dtype, "cpu", generator)
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=0.5)
    for step_id, t in enumerate(pipeline.scheduler.timesteps):
        TimestepManager.set_timestep_idx(step_id)
        noise = model(
            hidden_states=latents,
            timestep=t.expand(latents.shape[0]).to(latents.dtype) / 1000,
            guidance=torch.full([1], 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        latents = pipeline.scheduler.step(noise, t, latents, return_dict=False)[0]


if not os.path.exists(dump_data_path):
    dumper_manager = DumperManager(model, capture_mode="timestep")
    denoise("A photo of an astronaut riding a horse on mars")
    dumper_manager.save(dump_data_path)

calib_dataset = safe_torch_load(dump_data_path, map_location="cpu")
safetensors_name = get_rank_suffix_file("quant_model_weight_w8a8_timestep", "safetensors", is_distributed, rank)
json_name = get_rank_suffix_file("quant_model_description_w8a8_timestep", "json", is_distributed, rank)
session_cfg = SessionConfig(
    processor_cfg_map={
        "w8a8_timestep": W8A8TimeStepProcessorConfig(
            cfg=W8A8TimeStepQuantConfig(act_method="minmax"),
            disable_names=get_disable_layer_names(model, layer_include="*", layer_exclude="*net.2*"),
            timestep_sep=25,
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
