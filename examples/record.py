"""What a run is, in a few values: how two records differ, and hashes that stand for contents."""

import hashlib
import json
from collections.abc import Mapping

__all__ = ["content_hash", "differences", "short"]


def differences(was: Mapping, now: Mapping) -> list[str]:
    """ "key was this, is that" for each entry that two records do not share."""
    return [
        f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in {**now, **was}
        if was.get(key) != now.get(key)
    ]


def content_hash(content) -> str:
    """Of what json can write."""
    return short(hashlib.sha256(json.dumps(content).encode()))


def short(digest) -> str:
    """The digits of a hashlib digest that records keep."""
    return digest.hexdigest()[:12]
