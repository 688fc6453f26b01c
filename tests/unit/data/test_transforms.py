import torch

from ardiff.data.transforms import to_uint8, to_unit


def test_every_pixel_value_survives() -> None:
    video = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 8, 16)[..., None].repeat(1, 1, 1, 1, 3)
    unit = to_unit(video)
    assert unit.shape == (1, 2, 3, 8, 16)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), video)


def test_channels_move_and_nothing_else() -> None:
    video = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_unit(video)[2, 1], video[2, :, :, 1].float() / 127.5 - 1)


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-3.0, -1.0, -1 + 0.6 / 127.5, 1.0, 9.0])
    pixels = to_uint8(values[None, :, None].expand(3, 5, 1))
    assert pixels[:, 0, 0].tolist() == [0, 0, 1, 255, 255]
    assert to_uint8(torch.full((3, 1, 1), 2.0, dtype=torch.bfloat16)).tolist() == [[[255, 255, 255]]]
