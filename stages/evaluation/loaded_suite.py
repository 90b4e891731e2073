"""A suite's folder, read and checked before a model is loaded: its items, and those whose pictures are missing."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from stages.evaluation.config import SuiteConfig
from stages.evaluation.suites.pictures import PictureSource
from stages.evaluation.suites.registry import find_suite
from stages.evaluation.suites.suite import Item, Protocol, Suite
from stages.evaluation.suites.suite_files import SuiteFiles
from storage.errors import UserError

_SHOWN: Final = 5
"""Missing images that an error names."""


@dataclass(frozen=True)
class LoadedSuite:
    """A suite's items, as they are asked.

    Attributes:
        config: what it was read by.
        items: those that have their pictures.
        missing: those that have not.
    """

    suite: Suite
    protocol: Protocol
    config: SuiteConfig
    items: list[Item]
    missing: list[Item]

    @property
    def all_items(self) -> list[Item]:
        """Those with their pictures, then those without."""
        return [*self.items, *self.missing]

    @property
    def compares_first_tokens(self) -> bool:
        """Whether answers are compared by their first tokens, which a tokenizer then needs."""
        return any(question.first_token_only for item in self.items for question in item.questions)

    @property
    def notes(self) -> list[str]:
        """What users should know of these items."""
        kinds = {kind for item in self.items for kind in item.kinds}
        if not (lacking := [kind for kind in self.suite.all_kinds if kind not in kinds]):
            return []
        found = f"{self.suite.name}: {len(lacking)} of {len(self.suite.all_kinds)} kinds are lacking"
        whole = f"`{self.suite.main[0]}` is over the others, and no published number is like it"
        return [f"{found} ({', '.join(lacking)}); {whole}"]


def load_suite(name: str, config: SuiteConfig) -> LoadedSuite:
    """Reads a suite's folder and looks for its pictures.

    Raises:
        UserError: If files are missing or have another layout, or pictures are missing that may not be; names what to
            fetch.
    """
    suite, protocol = find_suite(name, config.protocol)
    files = SuiteFiles(config.data, config.images, suite.fetch)
    items = _first_of_each_kind(suite.load(files, protocol), config.limit)
    if not items:
        raise UserError(f"{config.data} has no items of {name}; fetch {suite.fetch}")
    if twice := [key for key, count in Counter(item.id for item in items).items() if count > 1]:
        raise UserError(f"{config.data}: {len(twice)} items of {name} stand there twice, the first {twice[0]}")
    pictures = dict.fromkeys(source for item in items for source in _sources(item))
    absent = {source for source in pictures if not source.exists()}
    missing = [item for item in items if any(source in absent for source in _sources(item))]
    if missing and (not config.allow_missing_images or len(missing) == len(items)):
        named = [str(source) for source in pictures if source in absent]
        shown = ", ".join(named[:_SHOWN]) + ", ..." * (len(named) > _SHOWN)
        raise UserError(
            f"{len(absent)} of {len(pictures)} images of {name} are missing, so {len(missing)} of {len(items)} items "
            f"cannot be asked: {shown}; fetch {suite.fetch}; or name the folder of images with --images, or count such "
            "items as missing with --allow-missing-images"
        )
    gone = {item.id for item in missing}
    return LoadedSuite(suite, protocol, config, [item for item in items if item.id not in gone], missing)


def _first_of_each_kind(items: Iterable[Item], limit: int | None) -> list[Item]:
    counts: Counter[str] = Counter()
    chosen = []
    for item in items:
        counts[item.kinds[0]] += 1
        if limit is None or counts[item.kinds[0]] <= limit:
            chosen.append(item)
    return chosen


def _sources(item: Item) -> Iterator[PictureSource]:
    return (source for question in item.questions for picture in question.pictures for source in picture.sources)
