"""Do the least that a job on a pipeline folder can do: the floor of the launcher's jobs.

    python -m scripts.bench.from_disk stream FOLDER OUT --keep_float '*net.2*'
    python -m scripts.bench.from_disk pipeline FOLDER OUT --prompts P.txt --width 64 --height 64 --num_inference_steps 4

`stream` reads every tensor of the transformer once, in the order of the files, takes maxima and codes in blocks, and
writes each byte once, digesting it on the way: one thread a core, each with a file of its own, as ranks have.
`pipeline` loads the pipeline, runs it once for each prompt up to the latent, and then does the same from memory, with
two threads in the kernels. With `--device cuda` the card computes, reached through memory that it can read by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone that is not installed works as well
from scripts.bench.in_memory import as_bytes, quantized
from scripts.bench.kernel import Workspace, quantize_rows

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
THREADS = 2


class Place(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` of a file."""

    name: str
    path: Path
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def places(folder: Path) -> list[Place]:
    """Return the tensors of all safetensors files of a folder, in the order of their bytes."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + size + place for place in entry["data_offsets"])
                found.append(Place(name, path, start, stop, DTYPES[entry["dtype"]], tuple(entry["shape"])))
    return sorted(found, key=lambda place: (place.path, place.start))


class DigestedFile:
    """Write a file from its beginning to its end, and know its digest."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest = path.open("wb", buffering=0), hashlib.sha256()

    def write(self, tensor: Tensor) -> None:
        """Append the bytes of a contiguous tensor."""
        data = as_bytes(tensor)
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> str:
        """Flush the file to the disk; returns its digest."""
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def stream(folder: Path, out: Path, keep_float: Sequence[str], device: str) -> None:
    """Quantize the transformer from disk to disk; each thread takes a stretch of the same number of bytes."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS) as threads:
        for done in [
            threads.submit(_stream_share, share, DigestedFile(out / f"floor{number}.bin"), keep_float, device)
            for number, share in enumerate(_even_shares(places(folder / "transformer")))
        ]:
            done.result()


def _even_shares(tensors: Sequence[Place]) -> list[list[Place]]:
    shares: list[list[Place]] = [[] for _ in range(THREADS)]
    total, before = sum(place.stop - place.start for place in tensors), 0
    for place in tensors:
        shares[before * THREADS // total].append(place)
        before += place.stop - place.start
    return shares


def _stream_share(tensors: Sequence[Place], file: DigestedFile, keep_float: Sequence[str], device: str) -> None:
    largest, is_cpu = max(place.stop - place.start for place in tensors), device == "cpu"
    read, written = (torch.empty(largest, dtype=torch.uint8, pin_memory=not is_cpu) for _ in range(2))
    codes = torch.empty(largest, dtype=torch.int8, device=device)
    work = Workspace.of(max(place.shape[-1] for place in tensors), largest, device)
    for place in tensors:
        raw = read.numpy().data[: place.stop - place.start]
        with place.path.open("rb", buffering=0) as source:
            assert os.preadv(source.fileno(), [raw], place.start) == len(raw), "a tensor is read in one piece"
            os.posix_fadvise(source.fileno(), place.start, len(raw), os.POSIX_FADV_DONTNEED)
        tensor = torch.frombuffer(raw, dtype=place.dtype).view(place.shape)
        if _is_quantized(place, keep_float):
            codes_OI = codes[: tensor.numel()].view(tensor.shape)
            scale_O1 = quantize_rows(tensor.to(device), codes_OI, work)
            host_OI = codes_OI if is_cpu else written.view(torch.int8)[: codes_OI.numel()].copy_(codes_OI.view(-1))
            file.write(host_OI)
            file.write(scale_O1.cpu())
        else:
            file.write(tensor)
    file.close()


def _is_quantized(place: Place, keep_float: Sequence[str]) -> bool:
    is_linear = place.name.endswith(".weight") and len(place.shape) == 2
    return is_linear and not any(fnmatchcase(place.name, pattern) for pattern in keep_float)


def run_pipeline(
    folder: Path, out: Path, keep_float: Sequence[str], prompts: Path, dtype: str, device: str, **options: int
) -> None:
    """Run the float pipeline on the prompts, then quantize its transformer; options: width, height and steps."""
    import diffusers

    torch.set_num_threads(THREADS)
    diffusers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, dtype), local_files_only=True
        ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in prompts.read_text().splitlines():
        pipeline(prompt, output_type="latent", **options)
    file = DigestedFile(out / "floor.bin")
    for tensor in quantized(pipeline.transformer, list(keep_float)):
        file.write(tensor)
    file.close()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=("stream", "pipeline"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep_float", nargs="*", default=[])
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    for option in ("width", "height", "num_inference_steps"):
        parser.add_argument(f"--{option}", type=int)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(asked, name) for name in ("width", "height", "num_inference_steps")}
    kinds: dict[str, Callable[[], None]] = {
        "stream": lambda: stream(asked.folder, asked.out, asked.keep_float, asked.device),
        "pipeline": lambda: run_pipeline(
            asked.folder, asked.out, asked.keep_float, asked.prompts, asked.dtype, asked.device, **options
        ),
    }
    kinds[asked.kind]()


if __name__ == "__main__":
    main()
