from dataclasses import fields, replace

import pytest

from ardiff.errors import ArdiffError
from ardiff.metrics.protocol import Protocol, same_protocol_or_raise

PROTOCOL = Protocol(
    name="random3d-frechet",
    extractor="random3d-seed0-v1",
    num_frames=16,
    stride=1,
    resolution=32,
    num_real=256,
    num_fake=256,
    ddof=1,
    real_split="test",
    codec="lossless",
)


def test_equal_protocols_pass():
    same_protocol_or_raise(PROTOCOL, replace(PROTOCOL))


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_every_field_is_compared_and_named(field):
    value = getattr(PROTOCOL, field)
    other = replace(PROTOCOL, **{field: 0 if field == "ddof" else value + ("x" if isinstance(value, str) else 1)})
    with pytest.raises(ArdiffError, match=f"'{field}' is {value!r}"):
        same_protocol_or_raise(PROTOCOL, other)


def test_the_first_difference_is_named():
    with pytest.raises(ArdiffError, match="'stride'"):
        same_protocol_or_raise(PROTOCOL, replace(PROTOCOL, codec="mp4v", stride=4))


@pytest.mark.parametrize("change", [{"num_fake": 1}, {"num_frames": 0}, {"stride": 0}, {"ddof": 2}, {"version": 0}])
def test_impossible_protocols_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        replace(PROTOCOL, **change)
