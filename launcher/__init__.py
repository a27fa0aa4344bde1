"""Run a quantization job: command line, configuration, ranks, stages, run folder, exit codes."""

import os

# torch imports every installed backend by itself, and the torch_npu wheel raises on a machine without CANN, so that
# even a `--device cpu` run would die at `import torch`. launcher.devices.npu imports it explicitly when the device is
# npu. This line must run before torch is imported, and only a package's __init__ is certain to.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
