"""BiVLC: SugarCrepe's pairs of captions with a picture for the negative as well. Miranda et al., 2024."""

from collections.abc import Iterator, Sequence

from stages.evaluation.suites.captions import share_unread
from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Suite, percent_of_items
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.two_by_two import TWO_BY_TWO_PROTOCOLS, comparisons, two_by_two_questions
from storage.errors import UserError


class BiVLC(Suite):
    """The makers' seven scores of all rows (kind `all`), of each type and of each subtype; say which one you quote.

    I2T: the right caption for both pictures; T2I: the right picture for both captions; group: both. T2I compares
    scores across pictures, which likelihoods are not made for: some pictures make every caption likely. With
    `--protocol compodistill` only captions are chosen (Ipos2T, Ineg2T, I2T), as the mean over both orders of options.
    """

    name = "bivlc"
    source = "IMirandaM/BiVLC, VQAScore_BiVLC.py"
    fetch = "data/*.parquet of imirandam/BiVLC from the Hub (2,933 rows with their images), or that data set saved"
    protocols = TWO_BY_TWO_PROTOCOLS
    chance = dict.fromkeys(("Ipos2T", "Ineg2T", "Tpos2I", "Tneg2I"), 50.0) | {
        "I2T": 25.0,
        "T2I": 25.0,
        "group": 100 / 6,
    }
    main = ("all", "I2T")
    all_kinds = ("replace", "add", "swap")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        if not (tables := files.tables()):
            raise UserError(f"{files.folder} holds no data/*.parquet; expected {self.fetch}")
        number = 0
        for path in tables:
            for row, record in enumerate(files.rows(path)):
                texts = fields(record, f"{path}, row {row}", caption=str, negative_caption=str, type=str, subtype=str)
                pictures = fields(record, f"{path}, row {row}", image=SuitePicture, negative_image=SuitePicture)
                kinds = (f"{texts[2]}_{texts[3]}", texts[2], "all")
                questions = two_by_two_questions(texts[:2], pictures, protocol)
                yield Item(str(number), kinds, questions, None, unit=str(pictures[0].source))
                number += 1

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        found = comparisons(answers, protocol)
        counts = {"I2T": found.both_texts, "Ipos2T": found.first_text, "Ineg2T": found.second_text}
        if found.first_image is None or found.second_image is None:
            return counts | {"unread": share_unread(answers)}
        both_images = found.first_image and found.second_image
        return counts | {
            "T2I": both_images,
            "group": found.both_texts and both_images,
            "Tpos2I": found.first_image,
            "Tneg2I": found.second_image,
        }

    def metrics(self, counts: KindCounts) -> Metrics:
        return {kind: percent_of_items(sums) for kind, sums in counts.items()}
