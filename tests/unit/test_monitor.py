"""What the jobs' monitor decides, without a cluster around it."""

from ray_jobs.monitor import VideoMonitor


def test_every_pack_is_dealt_once_and_again_to_the_task_that_had_it() -> None:
    monitor = VideoMonitor(total=8, done=0, packs=4)
    assert [monitor.deal(0, 0), monitor.deal(1, 0), monitor.deal(1, 1)] == [0, 1, 2]
    assert [monitor.deal(1, turn) for turn in range(3)] == [1, 2, 3]  # its actor died in its second turn
    assert [monitor.deal(0, 0), monitor.deal(0, 1), monitor.deal(1, 3), monitor.deal(2, 0)] == [0, None, None, None]
