"""The queue of videos, without a cluster."""

from ray_jobs.generation.queue import VideoQueue


def test_every_batch_is_dealt_once_and_again_to_the_task_that_had_it() -> None:
    batches = [[{"id": str(n)}] for n in range(4)]
    queue = VideoQueue(total=4, done=0, failed=0, batches=batches)
    dealt = [queue.deal(0, 0), queue.deal(1, 0), queue.deal(1, 1)]
    assert dealt == [(0, batches[0], False), (1, batches[1], False), (2, batches[2], False)]
    queue.end(1)
    again = [queue.deal(1, turn) for turn in range(3)]  # its actor had died
    assert again == [(1, batches[1], True), (2, batches[2], False), (3, batches[3], False)]
    assert [queue.deal(0, 1), queue.deal(1, 3), queue.deal(2, 0)] == [None, None, None]
    assert queue.deal(0, 0) == (0, batches[0], False)


def test_videos_are_counted_once() -> None:
    queue = VideoQueue(total=10, done=2, failed=1, batches=[])
    for _ in range(2):  # the actor dies in between
        queue.begin(0, ["a", "b"])
        queue.finish(0, "a", ok=True, frames=16)
    assert queue.read()[0] == 16
    queue.finish(0, "b", ok=False, frames=16)
    queue.end(0)
    assert queue.read()[:2] == (32, "3/10 videos, 0 in flight, 2 failed")
