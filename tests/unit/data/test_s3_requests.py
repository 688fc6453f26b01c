"""What reading costs at a store that charges for requests: counts of a real server against the formulas."""

from collections import Counter
from pathlib import Path

import pytest
from broken_videos import still
from s3_server import S3Server
from test_streams import LENGTHS, ROWS, SHAPE, clip_stream
from test_streams import files as files
from test_streams import videos as videos

from ardiff.data import storage
from ardiff.data.streams import LatentStream, Stream
from ardiff.train.config import TrainConfig
from ardiff.train.estimate.scaling import clip_reads, latent_reads
from ray_jobs.training.batches import rows_of_rank


def copied(paths: list[str], bucket: str) -> list[str]:
    """The places on S3 of copies of the files."""
    places = [f"{bucket}/{Path(path).name}" for path in paths]
    for path, place in zip(paths, places, strict=True):
        storage.write_bytes(place, Path(path).read_bytes())
    return places


def read_epoch(
    server: S3Server, bucket: str, stream: Stream, samples: int, batch_size: int, workers: int
) -> Counter[str]:
    """Has each worker load its share of an epoch, as in training; returns the requests by method."""
    before = len(server.requests(bucket.removeprefix("s3://")))
    config = TrainConfig(batch_size=batch_size, num_workers=workers, min_workers=1)
    for rank in range(workers):
        for chunk in range(stream.locate(0)[0], stream.locate(samples - 1)[0] + 1):
            rows = rows_of_rank(stream, chunk, 0, samples, config.micro_batches(rank, workers)[0], batch_size)
            if len(rows):
                stream.load(chunk, rows)
    return Counter(method for method, _ in server.requests(bucket.removeprefix("s3://"))[before:])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_epoch_of_clips_reads_each_video_once(
    s3_server: S3Server, s3_bucket: str, videos: list[str], workers: int
) -> None:
    places = copied(videos, s3_bucket)
    counted = read_epoch(s3_server, s3_bucket, clip_stream(places), len(LENGTHS), len(LENGTHS), workers)
    assert counted == {"GET": clip_reads(len(LENGTHS), 1, workers)}
    twice = clip_stream(places, clips_per_visit=2, chunk_size=10)
    counted = read_epoch(s3_server, s3_bucket, twice, 2 * len(LENGTHS), 2 * len(LENGTHS), workers)
    assert counted.keys() == {"GET"}
    assert len(LENGTHS) <= counted["GET"] <= clip_reads(2 * len(LENGTHS), 2, workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_epoch_of_latents_reads_each_file_once_a_worker(
    s3_server: S3Server, s3_bucket: str, files: list[str], workers: int
) -> None:
    stream = LatentStream(copied(files, s3_bucket), ROWS, SHAPE, seed=0, files_per_chunk=5)
    counted = read_epoch(s3_server, s3_bucket, stream, sum(ROWS), 3, workers)
    assert counted == {"GET": latent_reads(len(files), workers)}


def test_a_clip_of_a_folder_of_pictures_lists_it_and_reads_each_frame(s3_server: S3Server, s3_bucket: str) -> None:
    for number in range(5):
        storage.write_bytes(f"{s3_bucket}/frames/{number}.jpg", still(number, "JPEG"))
    stream = clip_stream([f"{s3_bucket}/frames/"], [5], chunk_size=1)  # clips of frames 0, 2 and 4
    assert read_epoch(s3_server, s3_bucket, stream, 1, 1, 1) == {"GET": 1 + 3}  # S3 lists by GET too
