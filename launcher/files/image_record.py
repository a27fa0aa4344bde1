"""Say of an image which job it shows: a record in a hidden folder beside it, written after it.

The record vouches for the very bytes of the image, so the two need not be written at once: whatever an interruption
leaves, an image without a record that fits is made again.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.files.digests import digest_of_file
from quant_core.atomic_file import write_text_atomically

RECORDS = ".records"


class ImageRecord(BaseModel):
    """Join the sha256 of an image with the digest of the fingerprint that it was made under."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    sha256: str


def record(image: Path, fingerprint: str) -> None:
    """Note that an image shows the job of that fingerprint."""
    made = ImageRecord(fingerprint=fingerprint, sha256=digest_of_file(image))
    write_text_atomically(_record_of(image), made.model_dump_json() + "\n")


def shows(image: Path, fingerprint: str) -> bool:
    """Tell whether an image is there and shows the job of that fingerprint."""
    try:
        made = ImageRecord.model_validate_json(_record_of(image).read_text(encoding="utf-8"))
        return made == ImageRecord(fingerprint=fingerprint, sha256=digest_of_file(image))
    except (OSError, UnicodeDecodeError, ValidationError):
        return False


def _record_of(image: Path) -> Path:
    return image.parent / RECORDS / f"{image.name}.json"
