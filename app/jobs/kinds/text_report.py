"""`text_report`: counts characters, words and lines of a text or of an uploaded text file."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from app.jobs.kind import FileId, Kind, Model

SHORT_TEXT = 10_000  # characters; counted in about 3 ms


class Payload(Model):
    # The validator's rule in JSON Schema, so that OpenAPI promises neither more nor less than is accepted.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "required": ["file_id"],
                    "properties": {"file_id": {"type": "string"}, "text": {"type": "null"}},
                },
                {
                    "required": ["text"],
                    "properties": {"text": {"type": "string"}, "file_id": {"type": "null"}},
                },
            ]
        }
    )

    file_id: FileId | None = Field(None, description="An uploaded file in UTF-8, with or without BOM.")
    text: str | None = Field(None, description="The text itself; it may be empty.")
    top: int = Field(10, ge=1, le=100, description="How many of the most frequent words to list.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file_id is None) == (self.text is None):
            raise ValueError("give either file_id or text, exactly one of them")
        return self


class Result(Model):
    characters: int = Field(description="Unicode code points; a file's BOM is not counted.")
    words: int = Field(description=r"Runs of \w, also with apostrophes inside: don't is one word.")
    lines: int = Field(description="As Python's str.splitlines counts them.")
    unique_words: int = Field(description="Different words; upper and lower case are equal (casefolded).")
    top_words: list[Annotated[tuple[str, int], Field(description="[word, count]")]] = Field(
        description="Most frequent first, equally frequent ones alphabetically. "
        "Words over 100 characters are shown cut, with an ellipsis."
    )


KIND = Kind(
    "text_report",
    Payload,
    Result,
    description="Counts the characters, words and lines of a text, and its most frequent words.",
    short=lambda payload: payload.text is not None and len(payload.text) <= SHORT_TEXT,
)
