"""Pictures changed on their way: smaller previews, single channels, another alpha. Everything here blocks."""

from __future__ import annotations

import io
import warnings

from PIL import Image

_FORMATS = ("PNG", "JPEG", "WEBP")


class NotAPictureError(ValueError):
    """The bytes are no picture that can be opened here."""


def preview(data: bytes, form: str, quality: int, *, most_pixels: int) -> bytes:
    """The picture as WebP or JPEG. Raises NotAPictureError."""
    picture = _opened(data, most_pixels)
    if form == "jpeg" and picture.mode != "RGB":
        picture = picture.convert("RGB")
    return _saved(picture, form.upper(), quality=quality)


def channel(data: bytes, which: str, *, most_pixels: int) -> bytes:
    """The picture's colours (`rgb`), or its alpha as a picture of its own (`a`), as PNG. Raises NotAPictureError."""
    picture = _opened(data, most_pixels)
    if which == "rgb":
        return _saved(picture.convert("RGB"), "PNG")
    alpha = picture.convert("RGBA").getchannel("A")
    shown = Image.new("RGBA", picture.size)
    shown.putalpha(alpha)
    return _saved(shown, "PNG")


def with_alpha_of(original: bytes, mask: bytes, *, most_pixels: int) -> bytes:
    """The original with the mask's alpha, as PNG. Raises NotAPictureError."""
    picture, other = _opened(original, most_pixels).convert("RGBA"), _opened(mask, most_pixels).convert("RGBA")
    alpha = other.getchannel("A")
    picture.putalpha(alpha if alpha.size == picture.size else alpha.resize(picture.size))
    return _saved(picture, "PNG", compress_level=4)


def _opened(data: bytes, most_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            if picture.width * picture.height > most_pixels:
                raise NotAPictureError(f"it has more than {most_pixels:,} pixels")
            picture.load()
            return picture
    except NotAPictureError:
        raise
    except Exception as error:
        # What decoders raise is as various as broken files.
        raise NotAPictureError(str(error)) from error


def _saved(picture: Image.Image, form: str, **options: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()
