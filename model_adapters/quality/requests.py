"""Choose noise and, where there are any, prompts that the calibration did not use: a range looks best on what it saw.

Noise is always new, because pictures are numbered behind those of the calibration and a picture's noise comes from the
job's seed plus its number. Prompts are new as long as the file has any that were left out (`--max_num_prompt`,
`--data_split_num`), or when a file of their own is given; after that, prompts are used again, with other noise.

Worked example: a file of 5 prompts, 3 of them calibrated with one picture each, 4 pictures to evaluate. They are
numbers 3 and 4 of the prompts 3 and 4, which are new, then numbers 5 and 6 of the prompts 0 and 1 as second copies.
"""

from __future__ import annotations

from pathlib import Path

from model_adapters.options import PipelineOptions
from model_adapters.pipeline.prompts import Batch, ImageRequest, has_no_prompts, read_batches, read_prompts


def evaluation_batches(options: PipelineOptions, count: int, prompt_file: Path | None = None) -> list[Batch]:
    """Return the batches of `count` pictures to evaluate, of the whole job: share them out as those of a calibration.

    prompt_file: prompts of the evaluation alone, in the format of the job's. Raises InputError for a bad file.
    """
    if not count:
        return []
    without = prompt_file is not None and has_no_prompts(options)
    own = [] if without else read_prompts(Path(options.prompt_path), options.prompt_type)
    # Of a divided file the other parts are numbered too, and may be calibrated by other jobs in the same folders.
    numbered = min(len(own), options.max_num_prompt or len(own))
    first = numbered * options.num_images_per_prompt
    if prompt_file is None:
        calibrated = {request.prompt_number for batch in read_batches(options) for request in batch}
        prompts, seen = sorted(enumerate(own), key=lambda prompt: prompt[0] in calibrated), numbered
    else:
        prompts, seen = list(enumerate(read_prompts(prompt_file, options.prompt_type))), 0
    requests = []
    for place in range(count):
        index, (prompt, category) = prompts[place % len(prompts)]
        again = place // len(prompts) + (options.num_images_per_prompt if index < seen else 0)
        requests.append(ImageRequest(prompt, category, first + place, index, again))
    return [tuple(requests[start : start + options.batch_size]) for start in range(0, count, options.batch_size)]
