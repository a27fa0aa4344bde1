"""Write what an evaluation found beside the checkpoint: the card, and the contact sheet of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_adapters.pipeline.prompts import ImageRequest
from model_adapters.quality.card import PictureQuality, QualityCard
from model_adapters.quality.sheet import Row, write_sheet
from model_adapters.quality.store import FLOAT, QUANTIZED, PictureStore

CARD, SHEET = "quality.json", "contact_sheet.png"


def write_results(folder: Path, card: QualityCard, store: PictureStore, requests: Sequence[ImageRequest]) -> Path:
    """Publish contact sheet and card (last) in the folder; requests: the pictures of all ranks. Returns the card."""
    if card.pictures:
        by_number = {request.number: request for request in requests}
        rows = [_row(picture, store, by_number[picture.number]) for picture in card.pictures]
        write_sheet(folder / SHEET, rows, title=_title(card))
    return card.write(folder / CARD)


def _row(picture: PictureQuality, store: PictureStore, request: ImageRequest) -> Row:
    found, floor = picture.quantized, picture.floor
    figures = f"PSNR {found.psnr:.1f} dB, SSIM {found.ssim:.3f}, FLIP {found.flip:.3f}; noise floor {floor.psnr:.1f} dB"
    return Row(picture.prompt, figures, store.picture(FLOAT, request), store.picture(QUANTIZED, request))


def _title(card: QualityCard) -> str:
    assert card.mean is not None, "there are pictures"
    origin, mean = card.origin, card.mean
    return f"{origin.model} {origin.quant_type}: PSNR {mean.psnr:.1f} dB, SSIM {mean.ssim:.3f}, FLIP {mean.flip:.3f}"
