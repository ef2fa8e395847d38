"""How a storage is asked; what it answers is in tests/integration/test_s3.py and test_files.py."""

import pytest
from obstore.exceptions import GenericError
from pydantic import SecretStr

from app.files import store
from app.settings import Settings

HERE = {
    "database_url": SecretStr("postgresql://db/jobs"),
    "redis_url": SecretStr("redis://cache"),
    "storage_url": "s3://files-x1/jobs",
    "aws_access_key_id": SecretStr("key"),
    "aws_secret_access_key": SecretStr("secret"),
}


@pytest.mark.parametrize(
    ("virtual", "endpoint", "asked"),
    [
        (False, "https://storage.example", "https://storage.example"),
        # Railway and Tigris answer at the bucket's own host, and say the common one.
        (True, "https://storage.example", "https://files-x1.storage.example"),
        (True, "http://storage.example:9000/", "http://files-x1.storage.example:9000"),
        (True, "https://files-x1.storage.example", "https://files-x1.storage.example"),
        (True, None, None),
    ],
)
def test_where_a_bucket_is(virtual: bool, endpoint: str | None, asked: str | None) -> None:
    settings = Settings.model_validate(
        HERE | {"aws_endpoint_url": endpoint, "aws_virtual_hosted_style_request": virtual}
    )
    opened = store._open_store(settings)
    assert opened.config.get("endpoint") == asked  # type: ignore[union-attr]
    assert opened.config["bucket"] == "files-x1"  # type: ignore[union-attr, typeddict-item]
    assert str(opened.config["virtual_hosted_style_request"]).lower() == str(virtual).lower()  # type: ignore[union-attr, typeddict-item]


def test_an_error_in_short_says_what_and_not_who() -> None:
    answer = (
        "<?xml version='1.0'?><Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKIA1</AWSAccessKeyId></Error>"
    )
    error = GenericError(f"GET https://s3/b/f - status code: 403 Forbidden: {answer}\n\nDebug source:\nGeneric {{}}")
    assert store.in_short(error) == "GET https://s3/b/f - status code: 403 Forbidden: SignatureDoesNotMatch"
    assert store.in_short(GenericError("no answer")) == "no answer"
