"""From safetensors to GGUF at the command line.

python -m convert SRC OUT.gguf --quant Q4_K_M
"""

import argparse
import sys

from convert.errors import ConvertError
from convert.run import DEFAULT_QUANT, Progress, convert


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m convert", argument_default=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("source", metavar="SRC", help="a directory with safetensors")
    parser.add_argument(
        "out", metavar="OUT", help="the .gguf to write; with several types a directory or a {quant} in the name"
    )
    parser.add_argument("--quant", nargs="+", metavar="TYPE", help=f"one or more types; default: {' '.join(DEFAULT_QUANT)}")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--name", help="the model's name inside the file; default: the directory's")
    parser.add_argument("--threads", type=int, help="default: as many as this process may use")
    parser.add_argument("--allow-nan", action="store_true", help="convert weights that hold NaN or infinity")
    return parser.parse_args(argv)


def show(step: Progress) -> None:
    left = "" if step.seconds_left is None else f", {step.seconds_left:,.0f} s left"
    print(f"\r{step.stage}: {step.fraction:4.0%}, {step.rate / 1e6:,.1f} M {step.unit}/s{left}   ", end="", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    options = vars(parse(sys.argv[1:] if argv is None else argv))
    try:
        results = convert(options.pop("source"), options.pop("out"), progress=show, **options)
    except ConvertError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(file=sys.stderr)
    for result in results:
        for note in result.notes:
            print(note)
        print(f"{result.path}: {result.quant}, {result.size / 1e6:,.1f} MB, {result.bits_per_weight:.2f} bits per weight")
    return 0


if __name__ == "__main__":
    sys.exit(main())
