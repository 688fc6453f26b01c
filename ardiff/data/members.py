"""URIs of files inside a tar. They name bytes of the tar, so members are read in place and nothing is unpacked.

``s3://bucket/shard-000.tar#bytes=1536-20479/cats/a.mp4`` is the member ``cats/a.mp4``: the bytes 1536 to 20479 of the
tar, both included, as in an HTTP range. The name is a label; it is never a path on a disk.
"""

import re
from typing import NamedTuple

TAR_SUFFIX = ".tar"
_MEMBER = re.compile(r"(.+?\.tar)#bytes=(\d{1,18})-(\d{1,18})/(.+)", re.IGNORECASE | re.DOTALL)


class Member(NamedTuple):
    """A file inside a tar."""

    tar: str
    """URI of the tar."""
    start: int
    """Position of its content in the tar."""
    size: int
    """Bytes of its content."""
    name: str

    @property
    def uri(self) -> str:
        """The URI that :func:`parse_member` reads."""
        return f"{self.tar}#bytes={self.start}-{self.start + self.size - 1}/{self.name}"


def parse_member(uri: str) -> Member | None:
    """The member that ``uri`` names; None if it names another file."""
    if (match := _MEMBER.fullmatch(uri)) is None:
        return None
    start, end = int(match[2]), int(match[3])
    return Member(match[1], start, max(end + 1 - start, 0), match[4])


def unpacked(uri: str) -> str:
    """The URI that a member would have if its tar were unpacked where it is; other URIs as they are."""
    member = parse_member(uri)
    return uri if member is None else "/".join([*member.tar.split("/")[:-1], member.name])
