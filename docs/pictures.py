"""Makes the images of docs/layers.md: `python docs/pictures.py`.

The layers are drawn here, as a random model would show nothing; saving, reading back, moving and laying together are
the package's own.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qwen_image_mlx import compose
from qwen_image_mlx.layers.formats import FORMATS, load_layers, save_layers
from qwen_image_mlx.layers.stack import Layer, LayerStack, contact_sheet

FOLDER = Path(__file__).parent
SIZE = (480, 300)
SMOOTH = 4  # drawn so many times larger, then reduced
INK, FAINT, PAPER = "#24292f", "#8c959f", "#ffffff"


def main() -> None:
    stack = scene()
    contact_sheet(stack, max_side=1000).save(FOLDER / "layers.png", optimize=True)
    changed = [compose(stack), compose(stack, hide=[2]), compose(stack, scale={3: 1.6}, move={3: (-150, 6)})]
    side_by_side(changed).save(FOLDER / "composed.png", optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        save_layers(stack, Path(folder) / "lake-layers", FORMATS)
        formats(Path(folder) / "lake-layers").save(FOLDER / "formats.png", optimize=True)


def scene() -> LayerStack:
    """Sky, hills, trees and a boat."""
    sky = Image.linear_gradient("L").resize(SIZE)
    sky = Image.composite(Image.new("RGBA", SIZE, "#f6c89f"), Image.new("RGBA", SIZE, "#6fa3d8"), sky)
    hills = drawn([
        ("polygon", [(0, 190), (90, 120), (190, 185), (300, 100), (400, 170), (480, 140), (480, 300), (0, 300)],
         "#6b7fa3"),
        ("polygon", [(0, 230), (140, 185), (300, 225), (480, 190), (480, 300), (0, 300)], "#44546f"),
    ])  # fmt: skip
    trees = drawn([
        shape
        for x, height in ((40, 110), (75, 80), (110, 95), (410, 105), (450, 85))
        for shape in (
            ("rectangle", [(x - 4, 235), (x + 4, 262)], "#4a3728"),
            ("polygon", [(x - 26, 240), (x + 26, 240), (x, 240 - height)], "#2f5d45"),
        )
    ])  # fmt: skip
    boat = drawn([
        ("polygon", [(228, 250), (312, 250), (296, 270), (244, 270)], "#a63d2f"),
        ("polygon", [(268, 244), (268, 180), (304, 244)], "#fff4e0"),
        ("polygon", [(262, 244), (262, 196), (238, 244)], "#e8d9bd"),
    ])  # fmt: skip
    layers = map(Layer, (sky, hills, trees, boat), ("sky", "hills", "trees", "boat"))
    return LayerStack(SIZE, tuple(layers), {"prompt": "a boat on a lake", "seed": 42})


def drawn(shapes: list[tuple[str, list[tuple[int, int]], str]]) -> Image.Image:
    image = Image.new("RGBA", tuple(side * SMOOTH for side in SIZE))
    draw = ImageDraw.Draw(image)
    for kind, points, colour in shapes:
        getattr(draw, kind)([(x * SMOOTH, y * SMOOTH) for x, y in points], fill=colour)
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def side_by_side(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    width = sum(picture.width + gap for picture in pictures) - gap
    row = Image.new("RGB", (width, pictures[0].height), PAPER)
    for n, picture in enumerate(pictures):
        row.paste(picture, (n * (picture.width + gap), 0), picture)
    return row


def formats(folder: Path) -> Image.Image:
    """What lies in each format, read back from the files."""
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".json"))
    layers = load_layers(folder / FORMATS["psd"].file).layers
    columns = [
        ("png", f"{folder.name}/", files),
        ("psd", "layers.psd", [*(f"{layer.name}: RGBA, {layer.offset}" for layer in layers), "merged picture"]),
        *((name, f"layers.{name}", zipfile.ZipFile(folder / f"layers.{name}").namelist()) for name in ("ora", "zip")),
        ("pptx", "layers.pptx", ["one slide", *(f"picture: {layer.name}" for layer in layers)]),
    ]
    font, bold, line, width = ImageFont.load_default(15), ImageFont.load_default(17), 22, 236
    height = 60 + line * max(len(lines) for _, _, lines in columns)
    sheet = Image.new("RGB", (width * len(columns), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, (name, title, lines) in enumerate(columns):
        x = n * width + 14
        draw.text((x, 8), f"--format {name}", FAINT, font)
        draw.text((x, 28), title, INK, bold)
        for row, text in enumerate(lines):
            y = 56 + row * line
            draw.line([(x + 4, y - (4 if row == 0 else line - 8)), (x + 4, y + 8), (x + 14, y + 8)], FAINT)
            draw.text((x + 20, y - 1), text, INK, font)
    return sheet


if __name__ == "__main__":
    main()
