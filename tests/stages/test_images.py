import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from stages.images import decode_image
from stages.unusable_sample import UnusableSample


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) % 251
    return Image.fromarray(pixels.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_pixel_for_pixel(kind: str, options: dict[str, object]) -> None:
    decoded = decode_image(encoded(gradient(), kind, **options))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode_image(encoded(gradient().convert(mode), kind))
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))


def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    data = encoded(gradient().convert("P"), "PNG", transparency=bytes(range(64)))
    assert decode_image(data).mode == "RGB"


def test_orientation_in_exif_is_dropped_and_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    decoded = decode_image(encoded(gradient(), "JPEG", exif=exif))
    assert decoded.size == (40, 30)
    assert dict(decoded.getexif()) == {}
    assert decoded.info == {}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0, 12, 40, 0.5, 0.9])
def test_truncated_images_are_broken_images(kind: str, kept: float) -> None:
    data = encoded(gradient(), kind)
    with pytest.raises(UnusableSample) as caught:
        decode_image(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    assert caught.value.reason == "broken_image"


def test_a_damaged_png_is_a_broken_image() -> None:
    data = bytearray(encoded(gradient(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnusableSample) as caught:
        decode_image(bytes(data))
    assert caught.value.reason == "broken_image"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_unsupported(kind: str) -> None:
    with pytest.raises(UnusableSample, match="expected JPEG, PNG or WebP") as caught:
        decode_image(encoded(gradient(), kind))
    assert caught.value.reason == "unsupported_image"


def test_text_is_unsupported_and_its_opening_is_shown() -> None:
    with pytest.raises(UnusableSample, match="<html>") as caught:
        decode_image(b"<html>not found</html>")
    assert caught.value.reason == "unsupported_image"


# Beyond 89 million pixels Pillow warns (here: raises), beyond 179 million it refuses by itself.
@pytest.mark.parametrize("side", [7100, 10_000, 20_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    with pytest.raises(UnusableSample) as caught:
        decode_image(png_header(side, side))
    assert caught.value.reason == "image_too_large"


def test_a_bomb_is_refused_where_warnings_are_not_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnusableSample) as caught:
            decode_image(png_header(10_000, 10_000))
    assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize("size", [(1, 49_000_000), (49_000_000, 1), (2**16 + 1, 2)])
def test_an_image_of_millions_of_rows_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(UnusableSample, match="at most 65536 are decoded on a side") as caught:
        decode_image(png_header(*size))
    assert caught.value.reason == "image_too_large"


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded() -> None:
    data = encoded(gradient(), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 2 + data[start + 3])]
    assert 2 <= data.count(b"\xff\xda") < 20
    assert decode_image(data).size == (40, 30)
    with pytest.raises(UnusableSample, match=r"a JPEG of 3[0-9]{3} scans, at most 500 are decoded") as caught:
        decode_image(data[:-2] + 3000 * scan + data[-2:])
    assert caught.value.reason == "image_too_large"


def test_the_limit_is_inclusive_and_names_the_size() -> None:
    data = encoded(gradient(), "PNG")
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(UnusableSample, match="40x30 pixels, at most 1199"):
        decode_image(data, max_pixels=1199)


def test_a_bad_image_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnusableSample("broken_image", "why")))
    assert (error.reason, error.detail, str(error)) == ("broken_image", "why", "broken_image: why")
