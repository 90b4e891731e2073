"""Writes a scenes data set.

    python -m examples.scenes.write_dataset OUT --images 2000 --seed 0 --variant shapes

`pipeline.demo.scenes.dataset` says what is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.demo.scenes.dataset import write_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=("shapes", "digits"), default="shapes")
    parser.add_argument("--pairs", type=int, default=100, help="held-out caption pairs of each kind")
    args = parser.parse_args()
    print(write_dataset(args.out, args.images, args.seed, args.variant, args.pairs))


if __name__ == "__main__":
    main()
