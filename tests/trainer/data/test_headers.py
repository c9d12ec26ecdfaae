"""``header_holds``: what DALI decodes like Pillow passes, a header that it cannot read does not."""

import numpy as np

from njepa.data.headers import header_holds
from njepa.data.index import measure
from tests.support.pictures import encoded, picture, special_images

LEFT_TO_PILLOW = {"lzw.tif", "turned.tiff"}


def test_good_images_of_the_formats_that_dali_decodes():
    files = special_images()
    held = {name for name, data in files.items() if header_holds(data, *measure(data, 0)[:2])}
    assert held == set(files) - LEFT_TO_PILLOW


def test_another_size():
    for format in ("JPEG", "PNG", "BMP", "WEBP", "PPM"):
        data = encoded(picture(0, 60, 40), format)
        assert header_holds(data, 60, 40)
        assert not header_holds(data, 60, 41)


def test_damaged_headers():
    """Cut anywhere in the header, or with a segment's length or mark written over."""
    jpeg, png = encoded(picture(0)), encoded(picture(0), "PNG")
    frame = jpeg.index(b"\xff\xc0")
    for end in range(frame + 8):
        assert not header_holds(jpeg[:end], 60, 40)
    for end in range(len(png)):
        assert not header_holds(png[:end], 60, 40)
    for at in (4, 5, frame, frame + 1):
        assert not header_holds(jpeg[:at] + b"\x00" + jpeg[at + 1 :], 60, 40) or jpeg[at] == 0
    assert not header_holds(png[:8] + b"\xff" + png[9:], 60, 40)
    rng = np.random.default_rng(0)
    for _ in range(300):  # whatever it holds, no error
        noise = bytearray(jpeg)
        for place in rng.integers(0, frame + 9, 4):
            noise[place] = rng.integers(256)
        header_holds(bytes(noise), 60, 40)
