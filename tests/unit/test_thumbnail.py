import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin
from pydantic import ValidationError

from app.jobs.kinds.thumbnail import KIND, Payload
from tests.unit.media_context import MemoryContext
from worker.errors import PermanentError
from worker.handlers import thumbnail

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int = 400, height: int = 200) -> Image.Image:
    """Red, green / blue, white: every turn and mirror image of it is another picture."""
    small = Image.new("RGB", (2, 2))
    for at, colour in zip(((0, 0), (1, 0), (0, 1), (1, 1)), (RED, GREEN, BLUE, WHITE), strict=True):
        small.putpixel(at, colour)
    return small.resize((width, height), Image.Resampling.NEAREST)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def thumb_bytes(data: bytes | BinaryIO, width: int = 100) -> bytes:
    ctx = MemoryContext()
    result = thumbnail.run(Payload(file_id=ctx.add(data), width=width), ctx.as_context())
    name, picture, content_type = ctx.saved[result.file_id]
    image = Image.open(io.BytesIO(picture))
    assert image.size == (result.width, result.height)
    assert content_type == f"image/{str(image.format).lower()}"
    assert name == f"thumbnail.{str(image.format).lower()}"
    return picture


def thumb(data: bytes | BinaryIO, width: int = 100) -> Image.Image:
    """The small picture as somebody else would open it."""
    image = Image.open(io.BytesIO(thumb_bytes(data, width)))
    image.load()
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The middles of the four quarters, with steps of 64, since JPEG and GIF are not exact."""
    image = image.convert("RGB")
    spots = ((1, 1), (3, 1), (1, 3), (3, 3))
    pixels = [image.getpixel((image.width * x // 4, image.height * y // 4)) for x, y in spots]
    return [tuple((value + 32) // 64 * 64 for value in cast(tuple[int, ...], pixel)) for pixel in pixels]


def colours(*expected: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple((value + 32) // 64 * 64 for value in colour) for colour in expected]


@pytest.mark.parametrize(
    ("file_format", "mode", "becomes"),
    [
        ("JPEG", "RGB", "JPEG"),
        ("PNG", "RGB", "PNG"),
        ("PNG", "RGBA", "PNG"),
        ("PNG", "P", "PNG"),
        ("WEBP", "RGB", "WEBP"),
        ("WEBP", "RGBA", "WEBP"),
        ("GIF", "P", "GIF"),
        ("BMP", "RGB", "PNG"),
        ("TIFF", "RGB", "PNG"),
        ("TIFF", "CMYK", "PNG"),
        ("JPEG", "CMYK", "JPEG"),
    ],
)
def test_each_format(file_format: str, mode: str, becomes: str) -> None:
    image = thumb(saved(quarters().convert(mode), file_format))
    assert (image.format, image.size) == (becomes, (100, 50))
    assert image.mode in ("RGB", "RGBA") or file_format == "GIF"
    assert corners(image) == colours(RED, GREEN, BLUE, WHITE)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grey(mode: str) -> None:
    left, right = (Image.new("L", (200, 200), value) for value in (0, 255))
    grey = Image.new("L", (400, 200))
    grey.paste(left, (0, 0))
    grey.paste(right, (200, 0))
    if mode == "I;16":
        middle = Image.new("I;16", (400, 200), 0x8000)
        assert thumb(saved(middle, "PNG")).getpixel((50, 25)) == 0x80
    else:
        image = thumb(saved(grey.convert(mode), "PNG"))
        assert corners(image) == colours((0, 0, 0), WHITE, (0, 0, 0), WHITE)
        assert image.mode == mode.replace("1", "L")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_channel_fail_for_good(mode: str) -> None:
    with pytest.raises(PermanentError, match=r"32 bits a channel\. Save it with 8 or 16"):
        thumb(saved(Image.new(mode, (40, 20)), "TIFF"))


@pytest.mark.parametrize(
    ("size", "width", "expected"),
    [
        ((400, 200), 100, (100, 50)),
        ((400, 200), 400, (400, 200)),
        ((400, 200), 401, (400, 200)),  # never larger than the original
        ((30, 20), 4096, (30, 20)),
        ((1000, 333), 10, (10, 3)),
        ((1000, 366), 10, (10, 4)),
        ((200, 29), 10, (10, 1)),
        ((200, 31), 10, (10, 2)),
        ((3000, 1), 100, (100, 1)),  # at least 1
        ((1, 3000), 100, (1, 3000)),
        ((1, 1), 1, (1, 1)),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_size(file_format: str, size: tuple[int, int], width: int, expected: tuple[int, int]) -> None:
    assert thumb(saved(Image.new("RGB", size), file_format), width).size == expected


UNDONE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(file_format: str, orientation: int) -> None:
    stored = quarters(800, 400)
    if orientation in UNDONE:
        stored = stored.transpose(UNDONE[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = thumb(saved(stored, file_format, exif=exif), width=100)
    assert image.size == (100, 50)
    assert corners(image) == colours(RED, GREEN, BLUE, WHITE)
    assert ImageOps.exif_transpose(image).size == (100, 50)  # nothing is left that would turn it again


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_passed_over(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert corners(thumb(saved(quarters(), "JPEG", exif=exif))) == colours(RED, GREEN, BLUE, WHITE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage, and no tags at all", b"MM\0*garbage, and no tags at all"])
def test_broken_exif_is_passed_over(file_format: str, exif: bytes) -> None:
    data = saved(quarters(), file_format, exif=b"Exif\0\0" + exif)
    assert corners(thumb(data)) == colours(RED, GREEN, BLUE, WHITE)


def with_profile(mode: str, profile: bytes, colour: Any) -> Image.Image:
    return thumb(saved(Image.new(mode, (64, 64), colour), "JPEG", icc_profile=profile), 16)


def swapped_srgb() -> bytes:
    """sRGB, but the names of its red and green primaries are exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


def green_ink() -> bytes:
    """The profile of a press on which cyan ink is green, and all else is white paper."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    ramp, paper, green = bytes(range(256)), bytes((255, 128, 128)), bytes((153, 68, 168))
    grid = b"".join(green if (c, m, y, k) == (1, 0, 0, 0) else paper for c, m, y, k in corners_of_four())
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    head = struct.pack(">4xI4s4s4s", 0x02100000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1, 0.8249) + bytes(48)
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    return struct.pack(">I", 4 + len(head) + len(tags) + len(table)) + head + tags + table


def corners_of_four() -> Iterator[tuple[int, ...]]:
    return (tuple(n >> bit & 1 for bit in (3, 2, 1, 0)) for n in range(16))


def test_colours_go_through_the_embedded_profile() -> None:
    assert corners(with_profile("RGB", swapped_srgb(), RED)) == colours(GREEN) * 4
    red, green, blue = cast(tuple[int, ...], with_profile("CMYK", green_ink(), (255, 0, 0, 0)).getpixel((8, 8)))
    assert green > red + 80
    assert green > blue + 40
    png = saved(Image.new("RGBA", (64, 64), (*RED, 128)), "PNG", icc_profile=swapped_srgb())
    assert thumb(png).getpixel((8, 8)) == (*GREEN, 128)


@pytest.mark.parametrize("profile", [b"no profile", green_ink(), swapped_srgb()[:200]])
def test_a_useless_profile_is_passed_over(profile: bytes) -> None:
    assert corners(with_profile("RGB", profile, RED)) == colours(RED) * 4


def test_without_a_profile_cyan_ink_is_cyan() -> None:
    jpeg = saved(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), "JPEG")
    assert b"Adobe" in jpeg  # such files hold their values inverted
    assert corners(thumb(jpeg)) == colours((0, 255, 255)) * 4


def half_clear() -> Image.Image:
    image = quarters().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 200, 100))
    return image


def transparent_files() -> Iterator[Any]:
    clear = half_clear()
    yield pytest.param(saved(clear, "PNG"), id="PNG RGBA")
    yield pytest.param(saved(clear.convert("LA"), "PNG"), id="PNG LA")
    yield pytest.param(saved(clear.quantize(16), "PNG"), id="PNG palette")
    yield pytest.param(saved(quarters(), "PNG", transparency=RED), id="PNG colour key")
    yield pytest.param(saved(clear, "WEBP"), id="WebP")
    paletted = quarters().quantize(16)
    yield pytest.param(saved(paletted, "GIF", transparency=paletted.getpixel((0, 0))), id="GIF")


@pytest.mark.parametrize("data", list(transparent_files()))
def test_transparency_is_kept(data: bytes) -> None:
    original = Image.open(io.BytesIO(data)).convert("RGBA")
    assert [cast(tuple[int, ...], original.getpixel(at))[3] for at in ((2, 2), (398, 198))] == [0, 255]
    image = thumb(data)
    assert image.format == Image.open(io.BytesIO(data)).format
    image = image.convert("RGBA")
    alphas = [cast(tuple[int, ...], image.getpixel(at))[3] for at in ((10, 10), (90, 10), (10, 40), (90, 40))]
    assert alphas == [0, 255, 255, 255]


def test_a_gif_of_many_colours_stays_transparent() -> None:
    alpha = Image.linear_gradient("L")
    picture = Image.merge("RGBA", (alpha, Image.radial_gradient("L"), Image.new("L", (256, 256)), alpha))
    gif = Image.open(io.BytesIO(thumbnail.encoded(picture, "GIF"))).convert("RGBA")
    assert gif.getchannel("A").tobytes() == alpha.point(lambda value: 255 * (value >= 128)).tobytes()


def test_clear_pixels_do_not_bleed_into_their_neighbours() -> None:
    image = Image.new("RGBA", (400, 400), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (201, 0, 400, 400))
    edge = thumb(saved(image, "PNG"), 40).getpixel((20, 20))
    assert cast(tuple[int, ...], edge)[:3] == BLUE


def test_nothing_but_pixels_is_kept() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "secret"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 0.0)
    profile = swapped_srgb()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "secret")
    for data in (
        saved(quarters(), "JPEG", exif=exif, icc_profile=profile, comment=b"secret", xmp=b"secret", dpi=(72, 72)),
        saved(quarters(), "PNG", exif=exif, icc_profile=profile, pnginfo=text),
        saved(quarters(), "WEBP", exif=exif, icc_profile=profile, xmp=b"secret"),
        saved(quarters(), "GIF", comment=b"secret"),
    ):
        small = thumb_bytes(data)
        assert b"secret" in data
        assert b"secret" not in small
        image = Image.open(io.BytesIO(small))
        assert not image.getexif()
        assert not {"icc_profile", "comment", "Comment", "xmp", "dpi"} & set(image.info)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    image = thumb(data, 16)
    assert corners(image) == colours(RED) * 4
    assert getattr(image, "n_frames", 1) == 1


def test_a_telephones_double_jpeg() -> None:
    data = saved(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (400, 200))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    image = thumb(data)
    assert image.format == "JPEG"
    assert corners(image) == colours(RED, GREEN, BLUE, WHITE)


def test_a_large_jpeg_is_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    resizable = thumbnail._resizable

    def watched(image: Image.Image) -> Image.Image:
        decoded.append(image.size)
        return resizable(image)

    monkeypatch.setattr(thumbnail, "_resizable", watched)
    thumb(saved(quarters(4000, 3000), "JPEG"), 200)
    assert decoded == [(1000, 750)]


def test_decoding_small_does_not_shift_the_picture() -> None:
    image = Image.new("L", (809, 809), 0)  # a last block of one pixel
    image.paste(255, (728, 0, 809, 809))
    small = thumb(saved(image, "JPEG", quality=95), 50)
    assert cast(int, small.getpixel((44, 25))) < 40  # the edge is at 728 / 809 * 50 = 44.99
    assert cast(int, small.getpixel((45, 25))) > 215


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some before it raises
def test_a_truncated_file_fails_for_good(file_format: str, part: float) -> None:
    data = saved(Image.effect_noise((300, 300), 90).convert("RGB"), file_format)
    with pytest.raises(PermanentError, match=r"damaged or incomplete: .* Upload it again|not a JPEG"):
        thumb(data[: int(len(data) * part)])


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError])
def test_whatever_a_decoder_raises_is_damage(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise error("bad block")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(PermanentError, match="bad block"):
        thumb(saved(quarters(), "PNG"))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_raise_anything_else(file_format: str) -> None:
    data = saved(Image.effect_noise((64, 64), 90).convert("RGB"), file_format)
    for position in range(0, len(data), max(1, len(data) // 150)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        with contextlib.suppress(PermanentError):
            thumb(bytes(damaged), 16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"just text",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        saved(quarters(), "PPM"),
        saved(quarters(), "ICO"),
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_picture_fails_for_good(data: bytes) -> None:
    with pytest.raises(PermanentError, match="not a JPEG, PNG, WebP, GIF, BMP or TIFF picture"):
        thumb(data)


def png_of(width: int, height: int) -> bytes:
    """Only the header: what is refused before decoding is refused without any pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (13_000, 13_000), (60_000, 60_000), (100_000_001, 1)])
def test_a_decompression_bomb_fails_for_good(size: tuple[int, int]) -> None:
    with pytest.raises(PermanentError, match=r"The picture has .* pixels, at most 100 million .*Scale it down"):
        thumb(png_of(*size))


def test_a_picture_without_pixels_fails_for_good() -> None:
    with pytest.raises(PermanentError):
        thumb(png_of(0, 10))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_hundred_megapixels_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert thumb(saved(Image.new("1", (10_000, 10_000), 1), "PNG")).size == (100, 100)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_file_that_is_too_big_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnail, "MOST_BYTES", 1024**2)
    with pytest.raises(PermanentError, match="more than 1 MiB"):
        thumb(bytes(1024**2 + 1))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("failure", [ConnectionError("gone"), OSError("gone"), KeyboardInterrupt()])
def test_a_storage_that_fails_is_not_a_bad_picture(file_format: str, failure: BaseException) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 20_000:
                raise failure
            return super().read(min(20_000, size or 0))

    data = saved(Image.effect_noise((300, 300), 90).convert("RGB"), file_format)
    with pytest.raises(type(failure)) as raised:
        thumb(Failing(data), 50)
    assert raised.value is failure


@pytest.mark.parametrize("width", [0, 4097, 1.5, "wide", None])
def test_width_is_bounded(width: object) -> None:
    with pytest.raises(ValidationError, match="width"):
        Payload.model_validate({"file_id": "019ac000-0000-7000-8000-000000000000", "width": width})


def test_the_kind_protects_the_file() -> None:
    file_id = MemoryContext().add(b"")
    assert list(KIND.file_ids(Payload(file_id=file_id, width=1))) == [file_id]
