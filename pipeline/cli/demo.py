"""`cdp demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for all that the demo makes.")] = Path("demo"),
    images: Annotated[int, typer.Option(help="Training images; fewer is faster and teaches less.")] = 1500,
    steps: Annotated[int | None, typer.Option(help="Steps of each student's longest stage.")] = None,
    variant: Annotated[str, typer.Option(help="shapes, or digits: handwritten digits instead.")] = "shapes",
) -> None:
    """Runs the whole pipeline on the bundled example: pack, extract, train, evaluate, compare."""
    from pipeline.demo.demo import DemoConfig, run_demo

    run_demo(output, DemoConfig(num_images=images, steps=steps, variant=variant))
