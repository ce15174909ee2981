"""What a reader of a page would run into: opens it in a browser, lists its faults, takes its picture.

``python tests/page_audit.py REPORT.html PICTURE.png`` takes the picture of the README, the top of a report.
"""

import struct
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from chromium import MISSING, Chromium, Page, find_program

WIDTHS = {1280: 900, 390: 844}  # width and height of a laptop's and of a phone's window, in CSS pixels
PHONE = 500  # windows narrower than this are a phone's: the page's viewport tag counts
SCREENSHOTS = Path(__file__).parents[1] / "var" / "screenshots"
AUDIT = Path(__file__).with_name("page_audit.js")


@dataclass(frozen=True)
class Look:
    """Faults of a page, each ``kind: details``, and its pictures from top to end as PNGs, as a rule one."""

    faults: list[str]
    pictures: list[bytes]

    def keep(self, name: str) -> None:
        """Write the pictures to ``var/screenshots``: ``<name>.png``, ``<name>-2.png`` and so on."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(self.pictures, 1):
            suffix = f"-{number}" if number > 1 else ""
            (SCREENSHOTS / f"{name}{suffix}.png").write_bytes(picture)


def look_at(
    browser: Chromium, file: Path, width: int, scheme: str = "light", has_schemes: bool = True
) -> Look:
    """Open a file in a window of this width; ``has_schemes``: the page promises a light and a dark form.

    The pictures show the page as it arrives; its faults are looked for with every ``<details>`` open.
    """
    page = Page(browser)
    try:
        page.show_as(width, WIDTHS[width], scheme, is_phone=width < PHONE)
        page.open(file.resolve().as_uri())
        pictures = page.pictures(width)
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        asked = f"({AUDIT.read_text()})({width}, {scheme if has_schemes else ''!r})"
        found = page.evaluate(asked)
        return Look([*page.complaints(), *found], pictures)
    finally:
        page.close()


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk is whole and whose pixels are all there.

    Raises:
        ValueError: it is no such PNG.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("no PNG: its first bytes are others")
    place, chunks = 8, []
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        body = content[place + 4 : place + 8 + length]
        if content[place + 8 + length : place + 12 + length] != zlib.crc32(body).to_bytes(4, "big"):
            raise ValueError(f"no PNG: the chunk at byte {place} is cut or spoiled")
        chunks.append((body[:4], body[4:]))
        place += 12 + length
    if not chunks or chunks[0][0] != b"IHDR" or chunks[-1][0] != b"IEND":
        raise ValueError("no PNG: head or end is missing")
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[0][1])
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    pixels = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    if len(pixels) != height * (1 + (width * channels * depth + 7) // 8):
        raise ValueError(f"no PNG: {len(pixels)} bytes of pixels for {width} x {height}")
    return width, height


def picture_of_top(report: Path, picture: Path) -> str:
    """Write the picture of a report's top, three quarters of its size; returns the report's faults."""
    program = find_program()
    if program is None:
        return MISSING
    with tempfile.TemporaryDirectory() as folder, Chromium(program, Path(folder)) as browser:
        page = Page(browser)
        page.show_as(1280, WIDTHS[1280], "light", is_phone=False)
        page.open(report.resolve().as_uri())
        picture.write_bytes(page.picture(1280, 1990, scale=0.75))
        return "\n".join(look_at(browser, report, 1280).faults)


if __name__ == "__main__":
    sys.exit(picture_of_top(Path(sys.argv[1]), Path(sys.argv[2])) or 0)
