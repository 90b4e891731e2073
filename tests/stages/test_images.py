import io
import pickle
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from transformers.image_transforms import convert_to_rgb

from stages.images import convert_image, decode_image, read_picture
from stages.unusable_sample import UnusableSample
from storage.samples.image_settings import ExifTurn


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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate", "big_tiff": True}),
        ("TIFF", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    ],
)
def test_lossless_formats_come_back_pixel_for_pixel(kind: str, options: dict[str, object]) -> None:
    decoded = decode_image(encoded(gradient(), kind, **options))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(gradient()))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    grey = gradient().convert("L")
    data = encoded(grey, "GIF", save_all=True, append_images=[ImageOps.invert(grey)], duration=9)
    np.testing.assert_array_equal(seen(data)[..., 0], np.asarray(grey))


def seen(data: bytes) -> np.ndarray:
    """`[height, width, 3]`."""
    return np.asarray(decode_image(data))


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"),
    "WEBP": ("RGBA",),
    "BMP": ("1", "L", "P", "RGBA"),
    "JPEG": ("L", "CMYK"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_colours_and_transparency_are_those_that_the_teachers_processor_makes(kind: str, mode: str) -> None:
    image = gradient().convert(mode)
    if "A" in image.getbands():
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image, kind)
    assert decode_image(data).mode == "RGB"
    np.testing.assert_array_equal(seen(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))


@pytest.mark.parametrize(
    ("mode", "transparency"), [("L", 0), ("RGB", (0, 1, 2)), ("P", 0), ("P", bytes(range(64))), ("1", 0)]
)
def test_a_transparent_colour_is_white_and_decodes_without_a_warning(mode: str, transparency: object) -> None:
    data = encoded(gradient().convert(mode), "PNG", transparency=transparency)
    np.testing.assert_array_equal(seen(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))


def test_a_black_bar_on_a_transparent_ground_is_seen_on_white() -> None:
    logo = np.zeros((6, 6, 4), np.uint8)
    logo[2:4, :, 3] = 255
    assert seen(encoded(Image.fromarray(logo), "PNG"))[:, 0, 0].tolist() == [255, 255, 0, 0, 255, 255]


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_grey_of_16_bits_keeps_its_levels(kind: str, order: str) -> None:
    ramp = np.linspace(300, 65535, 48).astype(order)[None].repeat(2, 0)
    np.testing.assert_array_equal(seen(encoded(Image.fromarray(ramp), kind))[..., 1], ramp >> 8)


def test_a_picture_of_8_bits_that_was_saved_in_16_comes_back() -> None:
    grey = np.arange(256, dtype=np.uint16)[None]
    for widened in (grey << 8, grey * 257):
        np.testing.assert_array_equal(seen(encoded(Image.fromarray(widened), "PNG"))[..., 0], grey)


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    data = encoded(Image.fromarray(np.array([[0, 700, 40_000]], np.uint16)), "PNG", transparency=700)
    assert seen(data)[0, :, 0].tolist() == [0, 255, 40_000 >> 8]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.25, 0.5, 1]], np.float32), [0, 64, 128, 255]),
        (np.array([[0, 1, 254.6, 255]], np.float32), [0, 1, 255, 255]),
        (np.array([[0, 257, 25_700, 65_535]], np.int32), [0, 1, 100, 255]),
        (np.array([[0, 0.5, 1, 1.001]], np.float32), [0, 128, 255, 255]),
        (np.array([[0, 100, 255, 258]], np.int32), [0, 100, 255, 255]),
        (np.array([[0, 25_700, 65_535, 66_000]], np.float32), [0, 100, 255, 255]),
        (np.array([[0, 1, 2]], np.float32), [0, 1, 2]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 128, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[7, 7]], np.int32), [7, 7]),
        (np.array([[-7, -7]], np.int32), [0, 0]),
    ],
)
def test_grey_of_32_bits_is_scaled_by_the_range_that_its_values_have(values: np.ndarray, expected: list[int]) -> None:
    assert seen(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == expected


def test_a_tiff_that_says_0_is_white_is_inverted() -> None:
    data = encoded(Image.fromarray(np.array([[0, 65_535]], np.uint16)), "TIFF", tiffinfo={262: 0})
    assert seen(data)[0, :, 0].tolist() == [255, 0]


def test_floats_that_are_no_numbers_are_refused_by_name() -> None:
    with pytest.raises(UnusableSample, match="no finite numbers") as caught:
        decode_image(encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"))
    assert caught.value.reason == "unsupported_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_exif_is_applied_when_asked_for_and_dropped_otherwise(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), kind, exif=exif)
    stored = Image.open(io.BytesIO(data))
    ignored, applied = read_picture(data), read_picture(data, exif="apply")
    assert ignored.is_turned == applied.is_turned == (orientation > 1)
    for picture, expected in ((ignored, stored), (applied, ImageOps.exif_transpose(stored))):
        np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(expected))
        assert (dict(picture.image.getexif()), picture.image.info) == ({}, {})


def test_the_orientation_of_a_tiff_is_its_decoders() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(gradient(), "TIFF", exif=exif)
    for choice in ("ignore", "apply"):
        picture = read_picture(data, exif=choice)
        assert (picture.image.size, picture.is_turned) == ((30, 40), False)


def test_damaged_exif_data_turn_nothing() -> None:
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", dpi=(72, 72))
    assert not read_picture(data, exif="apply").is_turned


def exif_of(orientation: int, num_rationals: int) -> bytes:
    """EXIF data with an orientation, then a tag of many numbers, which Pillow makes objects of."""
    entries = struct.pack("<HHLHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHLL", 0x011A, 5, num_rationals, 50)
    unit = struct.pack("<HHLHH", 0x0128, 3, 1, 2, 0)
    return b"II*\0" + struct.pack("<LH", 8, 3) + entries + unit + bytes(4) + bytes(8) * num_rationals


@pytest.mark.parametrize("num_rationals", [1, 10**6])
def test_of_exif_data_of_any_size_the_orientation_is_read_in_little_time(num_rationals: int) -> None:
    exif = exif_of(6, num_rationals)
    flat, step = gradient(), 65_000
    parts = [exif[start : start + step] for start in range(0, len(exif), step)]
    jpeg = encoded(flat, "JPEG")
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
    pictures = {
        "PNG": encoded(flat, "PNG", exif=exif),
        "WEBP": encoded(flat, "WEBP", exif=exif),
        "JPEG": jpeg[:2] + b"".join(segments) + jpeg[2:],
    }
    for name, data in pictures.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = time.process_time()
            picture = read_picture(data, exif="apply")
        assert time.process_time() - started < 0.5, name
        assert (picture.is_turned, picture.image.size) == (True, (30, 40)), name


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_orientation_of_a_million_numbers_is_none_and_is_not_read(kind: str) -> None:
    exif = b"II*\0" + struct.pack("<LHHHLL", 8, 1, 0x0112, 5, 10**6, 26) + bytes(4) + bytes(8 * 10**6)
    data = encoded(gradient(), kind, exif=exif)
    started = time.process_time()
    assert not read_picture(data, exif="apply").is_turned
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(("num_rationals", "turned"), [(1, True), (10**4, False)])
def test_exif_data_written_as_text_are_read_up_to_the_limit(num_rationals: int, turned: bool) -> None:
    digits = exif_of(6, num_rationals).hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2}\n{lines}")
    assert read_picture(encoded(gradient(), "PNG", pnginfo=info)).is_turned is turned


def test_nothing_that_pillow_says_of_damaged_exif_data_reaches_the_terminal() -> None:
    data = encoded(gradient(), "PNG", exif=exif_of(6, 10**6)[:5000])
    code = "import sys; from stages.images import read_picture; print(read_picture(sys.stdin.buffer.read()).is_turned)"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == (b"True\n", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [18, 40, 0.5, 0.9])
def test_truncated_images_are_broken_images(kind: str, kept: float) -> None:
    data = encoded(gradient(), kind)
    with pytest.raises(UnusableSample) as caught:
        decode_image(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    assert caught.value.reason == "broken_image"
    assert "0x" not in caught.value.detail


@pytest.mark.parametrize(
    "start", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0+", b"RIFF\x20\0\0\0WEBP", b"BM"]
)
def test_what_only_begins_as_an_image_is_broken_and_named_without_a_memory_address(start: bytes) -> None:
    for rest in (b"", b"\x07\0\0\0" * 16, b"text " * 50, bytes(200)):
        with pytest.raises(UnusableSample) as caught:
            decode_image(start + rest)
        assert caught.value.reason in ("broken_image", "unsupported_image", "image_too_large")
        assert "0x" not in caught.value.detail


def test_a_damaged_png_is_a_broken_image() -> None:
    data = bytearray(encoded(gradient(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnusableSample) as caught:
        decode_image(bytes(data))
    assert caught.value.reason == "broken_image"


def test_a_file_without_a_byte_is_empty() -> None:
    with pytest.raises(UnusableSample, match="the file is empty") as caught:
        decode_image(b"")
    assert caught.value.reason == "empty_image"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<html>not found</html>", "an HTML page"),
        (b"\xef\xbb\xbf\n <!DOCTYPE HTML>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "a Git LFS pointer .*git lfs pull"),
        (b"<?xml version='1.0'?><Error>", "an XML document"),
        (b"%PDF-1.7", "a PDF document"),
        (b"\0\0\0\x18ftypheic", "a HEIC, AVIF or video file"),
        (b"BM is a word", "begins with b'BM is a '"),
    ],
)
def test_what_is_no_image_is_named_as_what_it_is(data: bytes, name: str) -> None:
    with pytest.raises(UnusableSample, match=f"{name}.*; expected JPEG, PNG, WebP, GIF, BMP or TIFF") as caught:
        decode_image(data)
    assert caught.value.reason == "unsupported_image"


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PDF"])
def test_other_formats_are_unsupported(kind: str) -> None:
    with pytest.raises(UnusableSample, match="expected JPEG") as caught:
        decode_image(encoded(gradient(), kind))
    assert caught.value.reason == "unsupported_image"


def tiff(*tags: tuple[int, int, int], rest: bytes = b"") -> bytes:
    """A TIFF of (tag, count, value or offset), all numbers of 32 bits."""
    entries = b"".join(struct.pack("<HHLL", tag, 4, count, value) for tag, count, value in tags)
    return struct.pack("<4sLH", b"II*\0", 8, len(tags)) + entries + bytes(4) + rest


def grey_tiff(width: int, height: int, rows: int, strips: int) -> bytes:
    """Grey of 8 bits, whose strips of `rows` rows all lie in the same bytes."""
    at = 8 + 2 + 9 * 12 + 4
    sizes = ((256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, strips, at))
    offsets = struct.pack("<L", at) * strips
    more = ((277, 1, 1), (278, 1, rows), (279, strips, at))
    return tiff(*sizes, *more, rest=offsets + bytes(width * rows))


def test_a_tiff_whose_strips_are_the_same_rows_again_and_again_is_refused() -> None:
    assert decode_image(grey_tiff(40, 30, 15, 2)).size == (40, 30)
    with pytest.raises(UnusableSample, match="a TIFF whose strips have 60000 pixels in all for 40x30") as caught:
        decode_image(grey_tiff(40, 30, 15, 100))
    assert caught.value.reason == "broken_image"


def test_a_tiff_of_very_many_numbers_or_tags_is_refused_before_pillow_reads_them() -> None:
    for data in (tiff((256, 2**18 + 1, 8)), tiff(*[(tag, 1, 1) for tag in range(5000)])):
        with pytest.raises(UnusableSample, match=r"a TIFF .* are read") as caught:
            decode_image(data)
        assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a"
        + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 9, 9, 0)
        + b"\x08",
        b"BM" + struct.pack("<LLLLllHHLLllLL", 99, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        grey_tiff(60_000, 1, 1, 1).replace(struct.pack("<HHLL", 257, 4, 1, 1), struct.pack("<HHLL", 257, 4, 1, 60_000)),
    ],
    ids=["GIF", "BMP", "TIFF"],
)
def test_bombs_of_every_format_are_refused_from_their_header(data: bytes) -> None:
    with pytest.raises(UnusableSample) as caught:
        decode_image(data)
    assert caught.value.reason == "image_too_large"


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


def test_no_memory_address_of_a_librarys_message_reaches_a_ledger() -> None:
    error = UnusableSample("refused_by_processor", f"cannot use {io.BytesIO()!r}: {object()!r}")
    assert error.detail == "cannot use <_io.BytesIO object>: <object object>"


def test_a_bad_image_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnusableSample("broken_image", "why")))
    assert (error.reason, error.detail, str(error)) == ("broken_image", "why", "broken_image: why")


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, mode) for kind, modes in MODES.items() for mode in modes), ("PNG", "I;16")]
)
@pytest.mark.parametrize("turn", ["ignore", "apply"])
def test_an_image_that_pillow_opened_is_converted_as_its_file_is_decoded(kind: str, mode: str, turn: ExifTurn) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(gradient().convert(mode), kind, **({"exif": exif} if kind not in ("GIF", "BMP") else {}))
    with Image.open(io.BytesIO(data)) as opened:
        info = dict(opened.info)
        converted = convert_image(opened, exif=turn)
        np.testing.assert_array_equal(np.asarray(converted), np.asarray(decode_image(data, exif=turn)))
        assert opened.info == info
    assert (converted.mode, converted.info) == ("RGB", {})


def test_an_opened_image_that_is_truncated_or_too_large_is_refused_with_the_reason() -> None:
    data = encoded(gradient(), "PNG")
    with Image.open(io.BytesIO(data[: len(data) // 2])) as opened, pytest.raises(UnusableSample, match="broken_image"):
        convert_image(opened)
    with pytest.raises(UnusableSample, match="image_too_large: 40x30"):
        convert_image(gradient(), max_pixels=1000)
