"""What a page says of a target store: its size against raw values, its time, its teacher."""

import re
from typing import Any, Final

from pydantic import ValidationError

from pipeline.extraction.report import REPORT, RUN_FILE, ExtractionReport
from pipeline.report.page import Amount, Amounts, Facts
from pipeline.ui.tables import counts_text, size_text
from storage.stores import open_store
from storage.targets.summary import StoreSummary

_CHECKPOINT: Final = re.compile(r"^teacher:\n(?:  .*\n)*?  checkpoint: (.+)$", re.MULTILINE)
"""Of the run file that the extraction saved."""


def target_sizes(stored: StoreSummary) -> Amounts:
    """Bytes as stored, and of the same maps and logits as plain 16-bit floats."""
    raw_logits, raw_maps = stored.raw_logit_bytes, stored.raw_square_bytes
    others = stored.total_bytes - stored.map_bytes
    sizes = {
        "all, coded": stored.total_bytes,
        "all, raw": raw_maps + raw_logits,
        "maps, coded": stored.map_bytes,
        "maps, raw": raw_maps,
        "rest, coded": others,
        "logits, raw": raw_logits,
    }
    bars = (Amount(name, size, size_text(size)) for name, size in sizes.items())
    return Amounts("Targets: coded, and as raw 16-bit floats", tuple(bars))


def extraction_seconds(url: str) -> float | None:
    """Seconds of the last extraction into a store; None where its report is absent or of another version."""
    store = open_store(url)
    if not store.exists(REPORT):
        return None
    try:
        return ExtractionReport.model_validate_json(store.read(REPORT)).seconds
    except ValidationError:
        return None


def teacher_name(stored: StoreSummary) -> str:
    """The checkpoint that the extraction named; where that was not saved, the teacher's architecture."""
    store = open_store(stored.url)
    if store.exists(RUN_FILE) and (found := _CHECKPOINT.search(store.read(RUN_FILE).decode(errors="replace"))):
        return found[1].strip("'\"")
    architectures = stored.fingerprint["teacher_config"].get("architectures") or ["unknown"]
    return f"a {architectures[0]}"


def store_facts(stored: StoreSummary) -> Facts:
    """What the store holds, and of which teacher."""
    fingerprint: dict[str, Any] = stored.fingerprint
    rows = {
        "place": stored.url,
        "teacher": teacher_name(stored),
        "teacher's weights": fingerprint["teacher_weights"],
        "shards": f"{stored.num_committed:,} of {stored.num_planned:,}",
        "samples": f"{stored.num_samples:,}",
        "skipped": counts_text(stored.skipped_by_reason),
        "answer tokens": f"{stored.num_answer_rows:,}",
        "maps": f"{stored.num_maps:,} for {stored.num_map_references:,} samples with an image",
        "teacher layers": ", ".join(map(str, fingerprint["layers"])),
        "map codec": str(fingerprint["map_codec"].get("name")),
        "logit codec": str(fingerprint["logit_codec"].get("name")),
        "computed in": fingerprint["dtype"],
    }
    return Facts("Target store", (), tuple(rows.items()))
