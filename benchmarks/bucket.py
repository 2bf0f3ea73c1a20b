"""What lies in a bucket, as its listing says."""

from contextlib import AsyncExitStack

from app.core.stores.remote.s3_client import S3Options, open_client
from tests.helpers.seaweed import SeaweedS3

Objects = dict[tuple[str, str], int]
"""Bytes by key and ETag: an object written anew counts again."""


async def objects(seaweed: SeaweedS3, bucket: str) -> Objects:
    found: Objects = {}
    async with AsyncExitStack() as stack:
        client = await open_client(
            stack,
            S3Options(bucket=bucket, endpoint_url=seaweed.endpoint, region=seaweed.region),
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        async for page in pages:
            for each in page.get("Contents", ()):
                found[each["Key"], each["ETag"]] = each["Size"]
    return found


def added_bytes(before: Objects, after: Objects) -> int:
    return sum(size for each, size in after.items() if each not in before)
