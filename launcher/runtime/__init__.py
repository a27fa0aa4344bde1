"""The runtime that loads the checkpoint, MindIE-SD, on this machine: imported as it is, also where there is no NPU."""
