"""The stores of the pipeline's tests, for what is built on them."""

from tests.pipeline.conftest import s3_bucket, s3_server

__all__ = ["s3_bucket", "s3_server"]
