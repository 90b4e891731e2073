"""The base of every config, report and stored record."""

import json

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Cannot be changed once made; an unknown key is an error; the text below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def to_json(self) -> str:
        """A report for people: in ASCII, as a terminal that shows it obeys what is not; null for what is not finite."""
        finite = json.loads(json.dumps(self.model_dump(mode="json")), parse_constant=lambda _: None)
        return json.dumps(finite, indent=1)
