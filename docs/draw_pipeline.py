"""Draw the figure of training and sampling: `python docs/draw_pipeline.py` writes docs/pipeline.svg.

Training fills the upper row from left to right, sampling the lower row from right to left. The autoencoder and the velocity
network are between the rows because both use them. Data (t = 0) is always on the left and noise (t = 1) on the right.
"""

import random
from pathlib import Path

OUTPUT = Path(__file__).with_name("pipeline.svg")

WIDTH, HEIGHT = 880, 484
TOP, MIDDLE, BOTTOM = 116, 242, 368  # center lines of training, shared networks and sampling
COLUMNS = {"image": 89, "autoencoder": 246, "latent": 404, "path": 594, "noise": 791}  # center lines
TALL, SHORT = 108, 72  # heights of boxes

INK, MUTED, LINE = "#1e293b", "#52606d", "#94a3b8"
TRAINING, SAMPLING, SHARED = "#1d4ed8", "#b45309", "#312e81"
TRAINING_BAND, SAMPLING_BAND = "#eff5ff", "#fff7ea"
FONT = "-apple-system, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, sans-serif"


def text(
    x: float, y: float, content: str, size: int = 13, color: str = MUTED, style: str = "", anchor: str = "middle"
) -> str:
    """Text whose baseline is at `y`; `style` holds further SVG attributes."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" {style}>{content}</text>'
    )


def title(x: float, y: float, content: str, color: str = INK) -> str:
    """The bold name of a box."""
    return text(x, y, content, 15, color, 'font-weight="600"')


def box(x: float, y: float, width: float, height: float, fill: str = "#ffffff", stroke: str = LINE) -> str:
    """A rounded box centered at (x, y)."""
    return (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="9" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    """A horizontal or vertical line from (x1, y1), with an arrowhead whose tip is at (x2, y2)."""
    length, half_width = 9, 5
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    back_x, back_y = x2 - length * dx, y2 - length * dy
    left = f"{back_x - half_width * dy:g},{back_y + half_width * dx:g}"
    right = f"{back_x + half_width * dy:g},{back_y - half_width * dx:g}"
    return (
        f'<path d="M{x1:g},{y1:g} L{back_x:g},{back_y:g}" stroke="{color}" stroke-width="2"/>'
        f'<polygon points="{x2:g},{y2:g} {left} {right}" fill="{color}"/>'
    )


def picture(x: float, y: float, sun: int, hills: tuple[int, ...]) -> str:
    """A stack of small landscapes centered at (x, y); `hills` are five heights, `sun` is a horizontal position."""
    parts = []
    for shift in (-6, 0, 6):
        left, top = x - 24 + shift, y - 18 - shift * 0.7
        parts.append(f'<rect x="{left:g}" y="{top:g}" width="48" height="36" rx="3" fill="#dbeafe" stroke="{MUTED}"/>')
    left, top = x - 18, y - 22.2
    parts.append(f'<circle cx="{left + sun:g}" cy="{top + 10:g}" r="5" fill="#fbbf24"/>')
    ridge = " ".join(f"{left + 2 + 11 * index:g},{top + 34 - height:g}" for index, height in enumerate(hills))
    parts.append(f'<polygon points="{left + 2:g},{top + 34:g} {ridge} {left + 46:g},{top + 34:g}" fill="#4d7c5b"/>')
    return "".join(parts)


def grid(x: float, y: float, shades: list[list[float]]) -> str:
    """Square cells centered at (x, y), from white (0) to indigo (1)."""
    cell, parts = 44 / len(shades), []
    for row, values in enumerate(shades):
        for column, shade in enumerate(values):
            red, green, blue = (round(238 + (dark - 238) * shade) for dark in (67, 56, 202))
            parts.append(
                f'<rect x="{x - 22 + column * cell:g}" y="{y - 22 + row * cell:g}" width="{cell - 0.6:g}" '
                f'height="{cell - 0.6:g}" fill="#{red:02x}{green:02x}{blue:02x}"/>'
            )
    return "".join(parts)


def latent(x: float, y: float, center: tuple[float, float]) -> str:
    """A grid of shades that fade from `center` (row, column)."""
    top, left = center
    return grid(
        x,
        y,
        [[max(0.0, 1 - 0.09 * ((row - top) ** 2 + (column - left) ** 2)) for column in range(6)] for row in range(6)],
    )


def noise(x: float, y: float, seed: int) -> str:
    """A grid of random shades, a function of the seed."""
    generator = random.Random(seed)
    return grid(x, y, [[round(generator.random(), 2) for _ in range(6)] for _ in range(6)])


def sample_box(column: str, y: float, name: str, note: str, icon: str) -> str:
    """A box that holds data: an icon, a name and a note."""
    x = COLUMNS[column]
    return box(x, y, 122, TALL) + icon + title(x, y + 27, name) + text(x, y + 44, note)


def backgrounds() -> list[str]:
    """The white panel, and a band for each row."""
    band = 'x="12" width="856" height="170" rx="12"'
    return [
        f'<rect x="0.75" y="0.75" width="{WIDTH - 1.5}" height="{HEIGHT - 1.5}" rx="16" fill="#ffffff" stroke="#d5dbe3"/>',
        f'<rect {band} y="12" fill="{TRAINING_BAND}"/>',
        f'<rect {band} y="{HEIGHT - 182}" fill="{SAMPLING_BAND}"/>',
    ]


def captions() -> list[str]:
    """One sentence for each row."""
    bold = '<tspan font-weight="700" fill="{}">{}</tspan>'
    training = (
        bold.format(TRAINING, "Training") + " learns the velocity of straight paths from data (t = 0) to noise (t = 1)"
    )
    sampling = bold.format(SAMPLING, "Sampling") + " follows the velocity from noise (t = 1) back to data (t = 0)"
    return [
        text(28, 42, training, 15, INK, anchor="start"),
        text(28, HEIGHT - 32, sampling, 15, INK, anchor="start"),
    ]


def autoencoder() -> list[str]:
    """One tall box with the encoder in the training row and the decoder in the sampling row."""
    x = COLUMNS["autoencoder"]
    parts = [box(x, MIDDLE, 122, BOTTOM - TOP + TALL, "#f1f5f9")]
    for y, name in ((TOP, "Encoder"), (BOTTOM, "Decoder")):
        parts.append(
            f'<polygon points="{x - 48},{y - 42} {x + 48},{y - 22} {x + 48},{y + 22} {x - 48},{y + 42}" fill="#475569" '
            'stroke="#475569" stroke-width="4" stroke-linejoin="round"/>'
        )
        parts.append(title(x, y + 5, name, "#ffffff"))
    return [*parts, title(x, MIDDLE - 2, "Autoencoder"), text(x, MIDDLE + 16, "pretrained")]


def path() -> list[str]:
    """The straight path between a latent and its noise, and a point on it."""
    left, right, x = COLUMNS["latent"] + 61, COLUMNS["noise"] - 61, COLUMNS["path"]
    parts = [f'<path d="M{left},{TOP} H{right}" stroke="{TRAINING}" stroke-width="2" stroke-dasharray="5 4"/>']
    parts += [f'<circle cx="{end}" cy="{TOP}" r="5" fill="{TRAINING}"/>' for end in (left, right)]
    parts.append(text(x, TOP - 22, "x = (1 &#8722; t) data + t noise"))
    parts.append(text(left + 12, TOP + 22, "t = 0", 13, TRAINING, anchor="start"))
    parts.append(text(right - 12, TOP + 22, "t = 1", 13, TRAINING, anchor="end"))
    return parts


def training() -> list[str]:
    """The upper row and the loss."""
    image, coder, latents, middle, end = COLUMNS.values()
    return [
        sample_box("image", TOP, "Images", "dataset", picture(image, TOP - 18, 11, (6, 13, 7, 20, 8))),
        sample_box("latent", TOP, "Latents", "cached on disk", latent(latents, TOP - 21, (3.5, 2))),
        sample_box("noise", TOP, "Noise", "Gaussian", noise(end, TOP - 21, 7)),
        arrow(image + 61, TOP, coder - 61, TOP, TRAINING),
        arrow(coder + 61, TOP, latents - 61, TOP, TRAINING),
        *path(),
        arrow(middle, TOP, middle, MIDDLE - SHORT / 2, TRAINING),
        f'<circle cx="{middle}" cy="{TOP}" r="7" fill="#ffffff" stroke="{TRAINING}" stroke-width="2.5"/>',
        box(end, MIDDLE, 122, SHORT, stroke=TRAINING),
        title(end, MIDDLE - 10, "Training loss"),
        text(end, MIDDLE + 8, "squared error"),
        text(end, MIDDLE + 24, "to noise &#8722; data"),
        arrow(middle + 87, MIDDLE, end - 61, MIDDLE, TRAINING),
    ]


def sampling() -> list[str]:
    """The lower row and the score."""
    image, coder, latents, middle, end = COLUMNS.values()
    return [
        sample_box("noise", BOTTOM, "Noise", "from the seed", noise(end, BOTTOM - 21, 3)),
        sample_box("latent", BOTTOM, "Latents", "generated", latent(latents, BOTTOM - 21, (2.5, 3.5))),
        sample_box("image", BOTTOM, "Images", "generated", picture(image, BOTTOM - 18, 36, (9, 20, 11, 8, 4))),
        box(middle, BOTTOM, 174, TALL, stroke=SAMPLING),
        title(middle, BOTTOM - 17, "ODE solver"),
        text(middle, BOTTOM + 6, "steps from t = 1 to t = 0"),
        text(middle, BOTTOM + 24, "with guidance"),
        arrow(end - 61, BOTTOM, middle + 87, BOTTOM, SAMPLING),
        arrow(middle - 87, BOTTOM, latents + 61, BOTTOM, SAMPLING),
        arrow(latents - 61, BOTTOM, coder + 61, BOTTOM, SAMPLING),
        arrow(coder - 61, BOTTOM, image + 61, BOTTOM, SAMPLING),
        arrow(middle - 30, BOTTOM - TALL / 2, middle - 30, MIDDLE + SHORT / 2, SAMPLING),
        arrow(middle + 30, MIDDLE + SHORT / 2, middle + 30, BOTTOM - TALL / 2, SAMPLING),
        text(middle - 39, (MIDDLE + BOTTOM) / 2 - 4, "x, t", 13, SAMPLING, anchor="end"),
        text(middle + 39, (MIDDLE + BOTTOM) / 2 - 4, "velocity", 13, SAMPLING, anchor="start"),
        box(image, MIDDLE, 122, SHORT, stroke=SAMPLING),
        title(image, MIDDLE - 3, "Score"),
        text(image, MIDDLE + 16, "FID and others"),
        arrow(image, TOP + TALL / 2, image, MIDDLE - SHORT / 2, SAMPLING),
        arrow(image, BOTTOM - TALL / 2, image, MIDDLE + SHORT / 2, SAMPLING),
    ]


def velocity_network() -> list[str]:
    """The network that both rows use."""
    x = COLUMNS["path"]
    return [
        box(x, MIDDLE, 174, SHORT, SHARED, SHARED),
        title(x, MIDDLE - 3, "Velocity network", "#ffffff"),
        text(x, MIDDLE + 17, "v(t, x, condition)", 14, "#e0e7ff"),
    ]


def draw() -> str:
    """Return the figure as SVG text."""
    description = (
        "Training: the encoder of a pretrained autoencoder turns images into latents, which are cached. The velocity network "
        "learns the velocity of straight paths from latents at t = 0 to noise at t = 1. Sampling: an ODE solver follows the "
        "velocity from noise at t = 1 to latents at t = 0, the decoder turns them into images, and these are scored."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="{FONT}">',
        "<title>Latent flow matching: training and sampling</title>",
        f"<desc>{description}</desc>",
        *backgrounds(),
        *captions(),
        *autoencoder(),
        *training(),
        *sampling(),
        *velocity_network(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(draw(), encoding="utf-8", newline="\n")
