"""What the jobs' monitor decides, without a cluster around it."""

from ray_jobs.monitor import VideoMonitor


def test_every_pack_is_dealt_once_and_again_to_the_task_that_had_it() -> None:
    monitor = VideoMonitor(total=8, done=0, failed=0, packs=4)
    assert [monitor.deal(0, 0), monitor.deal(1, 0), monitor.deal(1, 1)] == [0, 1, 2]
    assert [monitor.deal(1, turn) for turn in range(3)] == [1, 2, 3]  # its actor died in its second turn
    assert [monitor.deal(0, 0), monitor.deal(0, 1), monitor.deal(1, 3), monitor.deal(2, 0)] == [0, None, None, None]


def test_videos_are_counted() -> None:
    monitor = VideoMonitor(total=10, done=2, failed=1, packs=2)
    monitor.begin(0, ["a", "b"])
    monitor.finish(0, ok=True, frames=16)
    assert monitor.read()[:2] == (16, "3/10 videos, 1 in flight, 1 failed")
