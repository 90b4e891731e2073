"""`cdp config`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from storage.errors import UserError

if TYPE_CHECKING:
    from stages.settings import Section, Setting

_INTRODUCTION = """\
# Settings

Every setting of a run file, by section. A run file is YAML: `train: {loader: {microbatch_size: 4}}` sets
`train.loader.microbatch_size`, and so does `--set train.loader.microbatch_size=4`. The list is that of `cdp config`;
a setting whose default is `null` is None until it is given.

*Resume* says what may become of a setting when a command goes on with what it began: `free` may change, `same data` may
name another folder with the same content, `unmatched` may change for stages without the attention loss. All others must
stay the same, or the command refuses to go on.
"""


def config(
    section: Annotated[
        str | None, typer.Argument(help="Show this section or setting only, such as train.loader.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
) -> None:
    """Lists every setting of a run file. Shows type, default, meaning, and whether it may change at resume."""
    from pipeline.run_file import RunFile
    from stages.settings import meant_by, sections_of

    sections = [found for found in sections_of(RunFile) if found.settings]
    if section is not None:
        shown = [found for found in sections if f"{found.name}.".startswith(f"{section}.")]
        shown = shown or [
            replace(found, settings=(one,)) for found in sections for one in found.settings if one.name == section
        ]
        if not shown:
            names = ", ".join(found.name for found in sections if found.name)
            meant = " or ".join(meant_by(section, RunFile))
            hint = f" (did you mean {meant}?)" if meant else ""
            raise UserError(f"there is no section or setting {section}{hint}; sections are {names}")
        sections = shown
    if markdown:
        typer.echo(settings_page(sections), nl=False)
    else:
        _print_sections(sections)


def settings_page(sections: "Sequence[Section]") -> str:
    """The sections as a page of Markdown."""
    parts = [_INTRODUCTION]
    for section in sections:
        rows = "\n".join(f"| {' | '.join(_cells(setting))} |" for setting in section.settings)
        title = f"## {section.name or 'Top level'}\n\n{section.meaning}".strip()
        parts.append(
            f"{title}\n\n| setting | type | default | resume | meaning |\n| --- | --- | --- | --- | --- |\n{rows}\n"
        )
    return "\n".join(parts)


def _cells(setting: "Setting") -> list[str]:
    default = f"`{setting.default}`" if setting.default else "required"
    cells = [f"`{setting.name}`", setting.type, default, setting.at_resume or "", setting.meaning]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def _print_sections(sections: "Sequence[Section]") -> None:
    from rich.padding import Padding
    from rich.text import Text

    from pipeline.ui.console import results

    for section in sections:
        results.print(Text.assemble((section.name or "top level", "bold"), f"  {section.meaning}"))
        for setting in section.settings:
            facts = [setting.type, f"default {setting.default}" if setting.default else "required"]
            facts += [f"resume: {setting.at_resume}"] * (setting.at_resume is not None)
            results.print(Text.assemble("  ", (setting.name, "cyan"), f"  {'; '.join(facts)}"))
            results.print(Padding(setting.meaning, (0, 0, 0, 4), expand=False), style="dim")
        results.print()
