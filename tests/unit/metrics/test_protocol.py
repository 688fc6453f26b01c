import re
from dataclasses import fields, replace

import pytest

from ardiff.errors import ArdiffError
from ardiff.metrics.protocol import Protocol, same_protocol_or_raise

PROTOCOL = Protocol(
    name="styleganv",
    metric="fvd",
    network="i3d",
    weights="d8922d",
    feature="400 logits",
    num_frames=16,
    stride=1,
    resolution="256x256",
    resize="bilinear to 224x224",
    value_range="[-1, 1]",
    codec_real="h264",
    codec_fake="h264",
    num_real=256,
    num_fake=256,
    ddof=1,
    real_split="test",
    real_data="0123",
)


def test_equal_protocols_pass():
    same_protocol_or_raise(PROTOCOL, replace(PROTOCOL))


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_every_field_is_compared_and_named(field):
    value = getattr(PROTOCOL, field)
    other = replace(PROTOCOL, **{field: 0 if field == "ddof" else value + ("x" if isinstance(value, str) else 1)})
    with pytest.raises(ArdiffError, match=re.escape(f"'{field}' is {value!r}")):
        same_protocol_or_raise(PROTOCOL, other)


def test_the_first_difference_is_named():
    with pytest.raises(ArdiffError, match="'stride'"):
        same_protocol_or_raise(PROTOCOL, replace(PROTOCOL, codec_real="mp4v", stride=4))


@pytest.mark.parametrize("change", [{"num_fake": 1}, {"num_frames": 0}, {"stride": 0}, {"ddof": 2}, {"version": 0}])
def test_impossible_protocols_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        replace(PROTOCOL, **change)
