"""Recipes: run files that come with the package, found by their bare names."""

from pathlib import Path

from storage.errors import UserError
from storage.regular_files import is_regular, open_regular

FOLDER = Path(__file__).parent / "configs"


def recipe_names() -> list[str]:
    """What `--config` takes beside paths."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_config(config: Path) -> Path:
    """The file itself, or the recipe of that name.

    Raises:
        UserError: If neither is there, naming the recipes, or the file is no regular one.
    """
    name = str(config).removesuffix(".yaml")
    if name in recipe_names() and not is_regular(config):
        return FOLDER / f"{name}.yaml"
    try:
        open_regular(config).close()
    except FileNotFoundError:
        raise UserError(
            f"run file {config} cannot be read: there is no such file, nor a recipe of that name; "
            f"recipes are {', '.join(recipe_names())}"
        ) from None
    return config
