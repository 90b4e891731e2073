"""`cdp demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.options import output_folder
from storage.stores import LocalStore


def demo(
    output: Annotated[Path, typer.Option(callback=output_folder, help="Folder for all that the demo makes.")] = Path(
        "demo"
    ),
    images: Annotated[int, typer.Option(help="Training images; fewer is faster and teaches less.", min=1)] = 400,
    steps: Annotated[int | None, typer.Option(help="Steps of each student's longest stage.", min=1)] = None,
    variant: Annotated[
        Literal["shapes", "digits"], typer.Option(help="What the images show; digits are handwritten.")
    ] = "shapes",
) -> None:
    """Runs the whole pipeline on a bundled example. It packs, extracts, trains, evaluates and compares."""
    from pipeline.preflight import check_new

    check_new(LocalStore(output), None)

    from pipeline.demo.report import DemoConfig
    from pipeline.demo.run import run_demo

    run_demo(output, DemoConfig(num_images=images, steps=steps, variant=variant))
