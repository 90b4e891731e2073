"""The base of every config, report and stored record."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Cannot be changed once made; an unknown key is an error; the text below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
