"""Makes a small copy of a picture. The file is a stranger's: nothing in it is believed, only pixels survive."""

import contextlib
import io
import struct
import zlib
from typing import IO, Any

from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from app.jobs.kinds.thumbnail import Payload, Result
from worker.context import Context
from worker.errors import PermanentError
from worker.handlers._reading import reading

MOST_PIXELS = 100_000_000
MOST_BYTES = 512 * 1024**2  # Pillow reads a WebP whole before anything is known of it
# Pillow would open some eighty formats, among them PostScript, for which it starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# All else becomes PNG. Telephones write MPO: a JPEG with a second one behind it.
SAVED_AS = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP", "GIF": "GIF"}
QUALITY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 85, "optimize": True}, "WEBP": {"quality": 85}}

_SRGB = ImageCms.createProfile("sRGB")
# What Pillow raises for damaged data. Not Exception: the soft time limit is one.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
# By EXIF orientation: how the stored picture becomes upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def run(payload: Payload, ctx: Context) -> Result:
    """Saves the small picture as a file.

    Raises:
        PermanentError: no picture, a damaged one, or one that is too large.
    """
    if ctx.file_info(payload.file_id).size > MOST_BYTES:
        raise PermanentError(f"The file has more than {MOST_BYTES // 1024**2} MiB. Scale the picture down first.")
    with ctx.open_file(payload.file_id) as stored, reading(stored) as file:
        picture, saved_as = shrunk(file, payload.width)
    ctx.checkpoint()
    data = encoded(picture, saved_as)
    file_id = ctx.save_file(f"thumbnail.{saved_as.lower()}", data, Image.MIME[saved_as])
    return Result(file_id=file_id, width=picture.width, height=picture.height)


def shrunk(file: IO[bytes], width: int) -> tuple[Image.Image, str]:
    """The picture, upright, in sRGB and at most `width` pixels wide, and the format to save it in."""
    try:
        # This reads the header only. Pillow's own limit is the process's: it warns at 89 megapixels, raises at 179.
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _too_large(f"{image.width} x {image.height}")
            return _in_srgb(_scaled(image, width)), SAVED_AS.get(str(image.format), "PNG")
    except Image.DecompressionBombError:
        raise _too_large("far too many") from None
    except UnidentifiedImageError:
        raise PermanentError("The file is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture.") from None
    except _DAMAGE as error:
        raise PermanentError(f"The picture is damaged or incomplete: {error}. Upload it again.") from error


def encoded(picture: Image.Image, saved_as: str) -> bytes:
    """The file's bytes."""
    options = dict(QUALITY.get(saved_as, {}))
    if saved_as == "GIF" and picture.mode == "RGBA":
        # Pillow's own way loses the transparency of many pictures; so one of the 256 colours is kept for it.
        clear = picture.getchannel("A").point(lambda alpha: 255 * (alpha < 128))
        picture = picture.convert("RGB").quantize(255)
        picture.paste(255, mask=clear)
        options["transparency"] = 255
    picture.info.clear()  # Pillow would save profile, comment and resolution from here
    out = io.BytesIO()
    picture.save(out, saved_as, **options)
    return out.getvalue()


def _too_large(pixels: str) -> PermanentError:
    limit = MOST_PIXELS // 10**6
    return PermanentError(
        f"The picture has {pixels} pixels, at most {limit} million are possible. Scale it down first."
    )


def _scaled(image: Image.Image, width: int) -> Image.Image:
    full = image.size
    # A JPEG can be decoded at a half, a quarter or an eighth at once: fast, and no full picture in memory.
    draft = image.draft(None, (2 * width, 2 * width))
    image.load()
    orientation = _orientation(image)
    on_its_side = orientation >= 5
    full_width, full_height = full[::-1] if on_its_side else full
    width = min(width, full_width)
    size = (width, max(1, round(full_height * width / full_width)))
    small = _resizable(image).resize(
        size[::-1] if on_its_side else size,
        Image.Resampling.LANCZOS,
        box=draft[1] if draft else None,
        reducing_gap=3.0,
    )
    return small.transpose(_TURNS[orientation]) if orientation > 1 else small


def _orientation(image: Image.Image) -> int:
    # Garbage beside the pixels is no reason to refuse them, and exif_transpose() would raise.
    with contextlib.suppress(*_DAMAGE):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in _TURNS else 1
    return 1


def _resizable(image: Image.Image) -> Image.Image:
    """In mode L, LA, RGB, RGBA or CMYK."""
    if image.mode.startswith("I;16"):
        # convert("L") alone clips: nearly everything would be white.
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise PermanentError("The picture has 32 bits a channel. Save it with 8 or 16.")
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """In mode L, LA, RGB or RGBA, by the picture's own colour profile if it has one."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha is not None else image
    if profile := image.info.get("icc_profile"):
        # A profile that is broken, or of another colour model than the picture, is as good as none.
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            colours = ImageCms.profileToProfile(colours, source, _SRGB, outputMode="RGB") or colours
    if colours.mode == "CMYK":
        colours = colours.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours
