"""Writes the videos of tables as files on Ray."""

from collections.abc import Sequence
from typing import Any

import ray.data

from ardiff.data.omissions import Omissions
from ardiff.data.sources import Discovery, records_of_tables
from ardiff.data.video_tables import VideoTable, WrittenGroup, write_group
from ardiff.errors import DecodeError
from ray_jobs.runtime.crash_guard import MAX_CRASHES, TASK_RETRIES, crash_guard
from ray_jobs.runtime.progress import remote_progress, report_errors


def write_tables(tables: Sequence[VideoTable], output: str, test_fraction: float) -> Discovery:
    """Writes the videos of tables below ``output``, an input for each row group; their records, not probed yet.

    Row groups that an earlier run has written are not read again. Raises DataError if there is no video.
    """
    items = [{"table": i, "group": group} for i, table in enumerate(tables) for group in range(table.num_groups)]
    groups: list[list[WrittenGroup]] = [[] for _ in tables]
    with remote_progress("writing", len(items), "row group") as progress:

        def write(row: dict[str, Any]) -> dict[str, Any]:
            table, group = tables[int(row["table"])], int(row["group"])
            with report_errors(progress), crash_guard(progress, f"{table.file.uri} {group}") as crashes:
                if crashes < MAX_CRASHES:
                    written = write_group(table, group, output)
                else:
                    error = DecodeError(f"the process that reads its row group {group} crashes", "crashed")
                    written = WrittenGroup([], Omissions(), Omissions(), error)
            progress.add.remote(1)
            return {"table": row["table"], "written": written.to_json()}

        if items:
            dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 512))
            for row in dataset.map(write, max_retries=TASK_RETRIES).iter_rows():
                groups[row["table"]].append(WrittenGroup.from_json(row["written"]))
    return records_of_tables(zip(tables, groups, strict=True), output, test_fraction)
