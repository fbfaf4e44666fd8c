"""A line or stacked-area chart as SVG text and as a PNG, from the same geometry. No plotting library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 30
COLORS = ("#1f6feb", "#d1642b", "#2a9d5c", "#8a5cd1", "#c23b6b", "#6b7280", "#b08900")


@dataclass(frozen=True)
class Line:
    """Points (x, y), with the half width of an interval around each when `spread` is given."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """`stacked` draws areas on top of each other; else lines."""

    title: str
    unit: str
    lines: Sequence[Line]
    stacked: bool = False
    marks: Sequence[float] = field(default_factory=tuple)

    def layers(self) -> list[Line]:
        if not self.stacked:
            return list(self.lines)
        base: dict[float, float] = {}
        stacked = []
        for line in self.lines:
            for x, y in line.points:
                base[x] = base.get(x, 0.0) + y
            stacked.append(Line(line.name, [(x, base[x]) for x, _ in line.points]))
        return stacked

    def bounds(self) -> tuple[float, float, float, float]:
        points = []
        for line in self.layers():
            spreads = line.spread or [0.0] * len(line.points)
            for (x, y), spread in zip(line.points, spreads, strict=True):
                if math.isfinite(y):
                    points.append((x, y, spread if math.isfinite(spread) else 0.0))
        points = points or [(0.0, 0.0, 0.0)]
        xs, low, high = [p[0] for p in points], min(p[1] - p[2] for p in points), max(p[1] + p[2] for p in points)
        if self.stacked:
            low = 0.0
        if high == low:
            low, high = low - 0.5, high + 0.5
        margin = 0.04 * (high - low)
        return min(xs), max(max(xs), min(xs) + 1), low if self.stacked else low - margin, high + margin

    def place(self):
        """(x, y) of the data -> pixels."""
        x0, x1, y0, y1 = self.bounds()
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return lambda x, y: (LEFT + (x - x0) / (x1 - x0) * wide, TOP + (y1 - y) / (y1 - y0) * high)

    def ticks(self) -> tuple[list[float], list[float]]:
        x0, x1, y0, y1 = self.bounds()
        return nice(x0, x1, 6), nice(y0, y1, 5)

    def svg(self) -> str:
        place, (xs, ys) = self.place(), self.ticks()
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">']
        title = f'{escape(self.title)} <tspan class="unit">{escape(self.unit)}</tspan>'
        parts.append(f'<text x="{LEFT}" y="14" class="title">{title}</text>')
        for y in ys:
            _, top = place(xs[0] if xs else 0, y)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{short(y)}</text>')
        for x in xs:
            left, _ = place(x, ys[0] if ys else 0)
            parts.append(f'<text x="{left:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(x)}</text>')
        for polygon, color in self.areas():
            parts.append(f'<polygon points="{joined(polygon)}" fill="{color}" fill-opacity="{1 if self.stacked else 0.15}"/>')
        for index, line in enumerate(self.layers()):
            color, points = COLORS[index % len(COLORS)], [place(x, y) for x, y in line.points if math.isfinite(y)]
            if not self.stacked and not line.dots:
                parts.append(f'<polyline points="{joined(points)}" fill="none" stroke="{color}" stroke-width="1.6"/>')
            if line.dots or (len(points) < 12 and not self.stacked):
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in points]
        for x, name, color in self.legend():
            parts.append(
                f'<rect x="{x}" y="20" width="9" height="9" fill="{color}"/><text x="{x + 13}" y="29">{escape(name)}</text>'
            )
        return "".join([*parts, "</svg>"])

    def areas(self) -> list[tuple[list[tuple[float, float]], str]]:
        """Polygons: the stack's layers, top first, or the intervals around lines."""
        place = self.place()
        found = []
        layers = list(enumerate(self.layers()))
        for index, line in reversed(layers) if self.stacked else layers:
            color = COLORS[index % len(COLORS)]
            if self.stacked and line.points:
                first, last = line.points[0][0], line.points[-1][0]
                found.append(([place(first, 0), *(place(x, y) for x, y in line.points), place(last, 0)], color))
            elif line.spread:
                both = [
                    (x, y, s)
                    for (x, y), s in zip(line.points, line.spread, strict=True)
                    if math.isfinite(y) and math.isfinite(s)
                ]
                upper, lower = [place(x, y + s) for x, y, s in both], [place(x, y - s) for x, y, s in both]
                found.append((upper + lower[::-1], color))
        return [(polygon, color) for polygon, color in found if len(polygon) > 2]

    def legend(self) -> list[tuple[int, str, str]]:
        x, found = LEFT, []
        for index, line in enumerate(self.lines):
            found.append((x, line.name, COLORS[index % len(COLORS)]))
            x += 24 + 7 * len(line.name)
        return found

    def png(self, path: Path, scale: int = 2) -> None:
        """The same picture as a PNG file, `scale` times as large."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), "white")
        draw, font, bold = (
            ImageDraw.Draw(image, "RGBA"),
            ImageFont.load_default(11 * scale),
            ImageFont.load_default(13 * scale),
        )
        at = lambda point: tuple(value * scale for value in point)  # noqa: E731
        place, (xs, ys) = self.place(), self.ticks()
        draw.text(at((LEFT, 2)), f"{self.title}  {self.unit}", "#111", bold)
        for y in ys:
            _, top = place(xs[0] if xs else 0, y)
            draw.line([at((LEFT, top)), at((WIDTH - RIGHT, top))], "#dddddd", scale)
            draw.text(at((LEFT - 6, top)), short(y), "#444", font, anchor="rm")
        for x in xs:
            draw.text(at((place(x, ys[0] if ys else 0)[0], HEIGHT - 14)), short(x), "#444", font, anchor="mm")
        for polygon, color in self.areas():
            draw.polygon([at(point) for point in polygon], color + ("ff" if self.stacked else "26"))
        for index, line in enumerate(self.layers()):
            color, points = COLORS[index % len(COLORS)], [at(place(x, y)) for x, y in line.points if math.isfinite(y)]
            if not self.stacked and not line.dots and len(points) > 1:
                draw.line(points, color, 2 * scale, joint="curve")
            if line.dots or (len(points) < 12 and not self.stacked):
                for x, y in points:
                    draw.ellipse([x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale], color)
        for x, name, color in self.legend():
            draw.rectangle([*at((x, 20)), *at((x + 9, 29))], color)
            draw.text(at((x + 13, 25)), name, "#111", font, anchor="lm")
        image.save(path)


def joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def nice(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between the bounds."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    first = math.ceil(low / step)
    return [round(step * number, 12) for number in range(first, math.floor(high / step) + 1)]


def short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"
