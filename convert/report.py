"""Several finished files side by side: size, bits per weight, distance from the source, speed on this machine."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import isfinite, log10, prod
from pathlib import Path

import gguf

from convert.errors import ConvertError
from convert.llama import Model
from convert.manifest import read_manifest
from convert.progress import Progress

UNKNOWN = "-"


@dataclass(frozen=True)
class Row:
    name: str  # of the file
    quant: str
    size: int  # bytes
    bits_per_weight: float
    kld_mean: float | None
    kld_interval: tuple[float, float] | None
    kld_p999: float | None
    same_top: float | None
    read_tps: float | None  # tokens per second, measured just now
    write_tps: float | None


def describe(path: Path) -> Row:
    """From the file's own metadata and the manifest beside it, if that is of this file. Raises ConvertError."""
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConvertError(f"{path} is not a GGUF file that can be read ({error}).") from error

    def value(key: str) -> float | None:
        field = reader.fields.get(key)
        number = float(field.contents()) if field else None
        return number if number is not None and isfinite(number) else None

    kind = value("general.file_type")
    try:
        quant = (
            gguf.LlamaFileType(int(kind)).name.removeprefix("MOSTLY_").removeprefix("ALL_") if kind is not None else UNKNOWN
        )
    except ValueError:
        quant = UNKNOWN
    weights = sum(prod(map(int, tensor.shape)) for tensor in reader.tensors)
    manifest = read_manifest(path)
    measured = None
    if manifest and manifest["file"]["size"] == path.stat().st_size:
        measured = (manifest.get("verification") or {}).get("divergence")
    interval = measured["kld_interval"] if measured else None
    return Row(
        name=path.name,
        quant=quant,
        size=path.stat().st_size,
        bits_per_weight=8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / weights,
        kld_mean=measured["kld_mean"] if measured else value("convert.kld.mean"),
        kld_interval=tuple(interval) if interval and None not in interval else None,
        kld_p999=measured["kld_p999"] if measured else value("convert.kld.p999"),
        same_top=measured["same_top"] if measured else value("convert.same_top"),
        read_tps=None,
        write_tps=None,
    )


def reporting(paths: Sequence[Path], threads: int, *, speed: bool) -> Generator[Progress, None, list[Row]]:
    """One row per file, smallest first. Raises ConvertError."""
    rows = []
    for number, path in enumerate(paths):
        row = describe(path)
        if speed:
            yield Progress("measure", number, len(paths), "files", 0.0)
            with Model(path, context=256, threads=threads) as model:
                read, write = model.speed()
            row = Row(**(row.__dict__ | {"read_tps": read, "write_tps": write}))
        rows.append(row)
    return sorted(rows, key=lambda row: row.size)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""

    def number(value: float | None, form: str) -> str:
        return UNKNOWN if value is None else format(value, form)

    def kld(row: Row) -> str:
        if row.kld_interval is None:
            return number(row.kld_mean, ".4g")
        low, high = row.kld_interval
        return f"{row.kld_mean:.4g} ({low:.4g} - {high:.4g})"

    lines = [
        "| file | type | MB | bits/weight | mean KLD (95 %) | 99.9 % KLD | same top token | reads tok/s | writes tok/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row.name,
            row.quant,
            f"{row.size / 1e6:,.1f}",
            f"{row.bits_per_weight:.2f}",
            kld(row),
            number(row.kld_p999, ".4g"),
            number(row.same_top, ".2%"),
            number(row.read_tps, ".1f"),
            number(row.write_tps, ".1f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> str:
    """SVG: size across, mean KLD up on a logarithmic scale. Raises ConvertError where nothing was measured."""
    from xml.sax.saxutils import escape

    points = [row for row in rows if row.kld_mean]
    if not points:
        raise ConvertError("No file states a KLD, so there is nothing to plot; `verify` them against their source first.")
    width, height, left, right, top, bottom = 720, 440, 80, 110, 30, 60
    most = max(row.size for row in points) * 1.05
    low = min(int(log10(row.kld_mean) // 1) for row in points)
    high = max(int(-(-log10(row.kld_mean) // 1)) for row in points)
    high = max(high, low + 1)

    def across(size: float) -> float:
        return left + size / most * (width - left - right)

    def up(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    step = 10 ** int(log10(most / unit) // 1) * unit
    step /= 2 if most / step < 4 else 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{(left + width - right) / 2}" y="{height - 14}" text-anchor="middle">size of the file, {name}</text>',
        f'<text transform="translate(20 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "mean KL divergence, nats per token</text>",
    ]
    for power in range(low, high + 1):
        y = up(power)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for i in range(int(most / step) + 1):
        x = across(i * step)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{i * step / unit:g}</text>')
    for row in points:
        x, y = across(row.size), up(log10(row.kld_mean))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#4338ca"/>')
        parts.append(f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(row.quant)}</text>')
    return "\n".join([*parts, "</svg>", ""])
