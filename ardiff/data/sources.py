"""From the source of a data set to records of its videos: a folder or prefix of a bucket, tars, tables, or a list."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ardiff.data import storage
from ardiff.data.captions import CaptionReader, find_captions
from ardiff.data.clips import IMAGE_SUFFIXES
from ardiff.data.discovery import describe_suffixes, group_files, ignored_suffixes, unprobed_record, with_error
from ardiff.data.error_log import bad_sample
from ardiff.data.lance_tables import is_lance, with_tables
from ardiff.data.layouts import (
    SPLIT_FOLDERS,
    Assignment,
    LayoutName,
    assign,
    hashed_split,
    is_split_file,
    split_by_lists,
    split_of_name,
    with_labels,
)
from ardiff.data.manifest import VIDEO_SUFFIXES, VideoRecord
from ardiff.data.members import parse_member, unpacked
from ardiff.data.omissions import Omissions
from ardiff.data.storage import StoredFile
from ardiff.data.tars import (
    TarListing,
    TarVideo,
    is_compressed_tar,
    is_tar,
    list_tar,
    tar_videos,
)
from ardiff.data.uri_lists import ListedVideo, is_list, read_list
from ardiff.data.video_tables import VideoTable, WrittenGroup, WrittenVideo, is_table, open_table
from ardiff.errors import DataError, DecodeError, StorageError

_READERS = 16
_NO_CLASS = Assignment("", 0, "train")


@dataclass(frozen=True, slots=True)
class Discovery:
    """What lies below a source."""

    records: list[VideoRecord]
    """The videos."""
    unmatched: list[str] = field(default_factory=list)
    """Lines of the split lists that match no video."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Files that belong to no video, by suffix."""
    omitted: list[str] = field(default_factory=list)
    """Rows of lists and members of tars that are not taken, a line for each reason."""
    omitted_captions: list[str] = field(default_factory=list)
    """Captions that are not taken, a line for each reason."""
    tables: list[VideoTable] = field(default_factory=list)
    """Tables whose videos must be written as files first, see :func:`records_of_tables`."""


def discover(
    source: str,
    output: str,
    layout: LayoutName,
    test_fraction: float,
    split_lists: tuple[str, str] | None = None,
    uri_column: str = "uri",
    video_column: str = "",
    caption_column: str = "",
) -> Discovery:
    """The videos of ``source`` with class, split and captions, not probed yet.

    Args:
        source: Folder or ``s3://`` prefix of videos, of tars or of tables with videos; a tar or such a table; or a list
            of videos and tars, see :func:`ardiff.data.uri_lists.read_list`. Tars and tables beside videos are ignored,
            and tables beside tars: they may hold the same videos.
        output: Files below it are ignored: an earlier run wrote them.
        layout: How the videos lie in ``source``. Those in tars lie as if each tar were unpacked where it is.
        test_fraction: See :func:`ardiff.data.layouts.assign`.
        split_lists: URIs of the lists of training and test videos, which replace the splits of the layout.
        uri_column: The column of URIs in a list.
        video_column: See :func:`ardiff.data.video_tables.open_table`.
        caption_column: See :class:`ardiff.data.captions.CaptionReader`.

    Raises:
        DataError: There is no video, the videos do not fit the layout or the lists, or captions cannot be read.
    """
    reader, omitted = CaptionReader(caption_column), Omissions()
    source = storage.absolute(source).rstrip("/")
    _check_not_compressed(source)
    folder = source.rpartition("/")[0]
    columns = uri_column, video_column, caption_column
    if is_table(source) and (table := _table_at(source, folder, *columns)) is not None:
        return Discovery([], tables=[table])
    if is_list(source):
        if split_lists is not None:
            raise DataError(f"{source} is a list of videos: give their splits in its column 'split'.")
        rows = read_list(source, reader, omitted, uri_column)
        return _from_list(rows, test_fraction, reader, omitted)
    if is_tar(source):
        files = [_existing(source)]
    else:
        files = _list_source(source, output)
        folder = source
    videos = group_files(folder, files)
    tars = [] if videos else [file for file in files if is_tar(file.uri)]
    if _are_tables(files, videos):
        if split_lists is not None:
            raise DataError(f"{source} holds tables: give their splits in a column 'split'.")
        return _from_tables(source, files, *columns)
    captions, caption_files = find_captions(files, videos, reader)
    taken = {*caption_files, *(tar.uri for tar in tars)}
    ignored = ignored_suffixes(folder, [file for file in files if file.uri not in taken], videos)
    contents = _read_tars(tars, reader, omitted)
    ignored.update(contents.ignored)
    videos += [file for file, _ in contents.videos]
    captions |= {file.uri: video.captions for file, video in contents.videos}
    classes = {file.uri: video.class_name for file, video in contents.videos if video.class_name}
    if not videos:
        raise DataError(_no_video(source, ignored, files, contents.bad))
    paths = [_path_below(folder, video.uri) for video in videos]
    prefix = len(folder) + 1
    split_files = {f.uri[prefix:]: storage.read_bytes(f.uri) for f in files if is_split_file(layout, f.uri[prefix:])}
    assigned = assign(layout, paths, split_files, test_fraction)
    unmatched: list[str] = []
    if split_lists is not None:
        train, test = map(storage.read_bytes, split_lists)
        splits, unmatched = split_by_lists(paths, train, test)
        assigned = with_labels([a and s and (a.class_name, s) for a, s in zip(assigned, splits, strict=True)])
    if classes:
        pairs = zip(assigned, videos, strict=True)
        assigned = with_labels([a and (classes.get(video.uri, a.class_name), a.split) for a, video in pairs])
    records = [unprobed_record(v, a, captions.get(v.uri, ())) for v, a in zip(videos, assigned, strict=True)]
    return Discovery(records + contents.bad, unmatched, ignored, omitted.notes, reader.omitted.notes)


def find_tables(
    source: str, output: str, uri_column: str = "uri", video_column: str = "", caption_column: str = ""
) -> list[VideoTable]:
    """The tables with videos that :func:`discover` finds, without its other work. Remote folders are not listed."""
    source = storage.absolute(source).rstrip("/")
    _check_not_compressed(source)
    columns = uri_column, video_column, caption_column
    if is_table(source):
        table = _table_at(source, source.rpartition("/")[0], *columns)
        return [] if table is None else [table]
    if storage.is_remote(source) or not storage.exists(source) or is_list(source) or is_tar(source):
        return []
    files = _list_source(source, output)
    return _from_tables(source, files, *columns).tables if _are_tables(files, group_files(source, files)) else []


def is_remote_folder(source: str) -> bool:
    """Whether the source is remote and its name is not that of a table, list or tar."""
    source = source.rstrip("/")
    return storage.is_remote(source) and not (is_table(source) or is_list(source) or is_tar(source))


def _list_source(source: str, output: str) -> list[StoredFile]:
    """The files below ``source`` that no earlier run wrote below ``output``."""
    output = storage.absolute(output).rstrip("/")
    listed = storage.list_objects(source, unreadable=True)
    return with_tables(file for file in listed if output == source or not file.uri.startswith(f"{output}/"))


def _are_tables(files: Sequence[StoredFile], videos: Sequence[StoredFile]) -> bool:
    """Whether the tables among the files are taken: there are neither videos nor tars beside them."""
    return not videos and not any(is_tar(f.uri) for f in files) and any(is_table(f.uri) for f in files)


def _check_not_compressed(source: str) -> None:
    if is_compressed_tar(source):
        raise DataError(
            f"{source} is a compressed tar, whose members cannot be read in place: decompress it to a .tar first."
        )


def _existing(uri: str) -> StoredFile:
    """The file or Lance table at ``uri``. Raises DataError if it cannot be read."""
    file = StoredFile(uri, 0, "") if is_lance(uri) else storage.find_file(uri)
    if file.problem:
        raise DataError(f"{uri} cannot be read ({file.problem}): check the path.")
    return file


def _table_at(source: str, folder: str, uri_column: str, video_column: str, caption_column: str) -> VideoTable | None:
    """The table with videos at ``source``; None if it may be a list: reading it as one says what is wrong."""
    try:
        table = open_table(_existing(source), folder, uri_column, video_column, caption_column)
    except DecodeError as error:
        if is_list(source):
            return None
        raise DataError(f"{source}: {error}.") from error
    if table is None and not is_list(source):
        raise DataError(
            f"{source} has no column with bytes of videos, or one with URIs too: set video_column, or write a list as "
            ".csv or .parquet."
        )
    return table


def _from_tables(
    source: str, files: Sequence[StoredFile], uri_column: str, video_column: str, caption_column: str
) -> Discovery:
    """The tables with videos below a folder. Tables that cannot be read are records with an error."""

    def open_or_fail(file: StoredFile) -> VideoTable | VideoRecord | None:
        try:
            return open_table(file, source, uri_column, video_column, caption_column)
        except (DecodeError, StorageError) as error:
            return _bad_file(file, error)

    candidates = [file for file in files if is_table(file.uri)]
    with ThreadPoolExecutor(_READERS) as pool:  # the threads wait for storage
        opened = list(pool.map(open_or_fail, candidates))
    tables = [table for table in opened if isinstance(table, VideoTable)]
    bad = [record for record in opened if isinstance(record, VideoRecord)]
    if not tables:
        first = f"{bad[0].uri}: {bad[0].reason}" if bad else f"{candidates[0].uri} has no column with bytes of videos"
        raise DataError(f"There is no video in {source}. {first}. For a table of URIs, give the file as source.")
    used = {table.file.uri for table in tables} | {record.uri for record in bad}
    return Discovery(bad, ignored=ignored_suffixes(source, [f for f in files if f.uri not in used], []), tables=tables)


def records_of_tables(
    written: Iterable[tuple[VideoTable, Sequence[WrittenGroup]]], output: str, test_fraction: float
) -> Discovery:
    """The videos of tables, after :func:`ardiff.data.video_tables.write_group` has written them below ``output``."""
    omitted, omitted_captions = Omissions(), Omissions()
    files: list[StoredFile] = []
    rows: list[tuple[VideoTable, WrittenVideo]] = []
    bad: list[VideoRecord] = []
    for table, groups in written:
        folder = table.folder(output)
        stored = {file.uri: file for file in storage.list_objects(folder)} if storage.exists(folder) else {}
        for group in groups:
            omitted.update(group.omitted)
            omitted_captions.update(group.omitted_captions)
            files += [stored[storage.join(folder, video.name)] for video in group.videos]
            rows += [(table, video) for video in group.videos]
        bad += [_bad_file(table.file, group.problem) for group in groups if group.problem is not None][:1]
    if not files and not bad:
        raise DataError(f"The tables hold no video. {'; '.join(omitted.notes)}")
    assigned = with_labels(
        [
            (
                video.class_name or "video",
                SPLIT_FOLDERS.get(video.split) or hashed_split(f"{table.file.uri}/{video.name}", test_fraction),
            )
            for table, video in rows
        ]
    )
    captions = [video.captions for _, video in rows]
    records = [unprobed_record(*each) for each in zip(files, assigned, captions, strict=True)]
    return Discovery(records + bad, omitted=omitted.notes, omitted_captions=omitted_captions.notes)


def _path_below(folder: str, uri: str) -> str:
    """The path of a video below ``folder``, as if tars were unpacked.

    If the name of a tar begins with that of a split, its videos lie in a folder of the split.
    """
    path = unpacked(uri)[len(folder) + 1 :]
    member = parse_member(uri)
    split = "" if member is None else split_of_name(member.tar.rpartition("/")[2])
    return f"{split}/{path}" if split and path.partition("/")[0].lower() not in SPLIT_FOLDERS else path


def _no_video(source: str, ignored: Counter[str], files: Sequence[StoredFile], bad: Sequence[VideoRecord]) -> str:
    content = f" It holds {describe_suffixes(ignored)}." if ignored else ""
    if bad:
        return f"There is no video in {source}.{content} {bad[0].uri} cannot be used: {bad[0].reason}."
    if any(is_compressed_tar(file.uri) for file in files):
        return f"There is no video in {source}.{content} Compressed tars are not read: decompress them to .tar first."
    kinds = f"{', '.join(VIDEO_SUFFIXES)} files, folders of pictures, and tars of such files"
    return f"There is no video in {source}.{content} Videos are {kinds}."


@dataclass(frozen=True, slots=True)
class _TarContents:
    """What several tars hold."""

    videos: list[tuple[StoredFile, TarVideo]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that belong to no video, by suffix."""
    bad: list[VideoRecord] = field(default_factory=list)
    """A record for each tar that cannot be read to its end."""


def _read_tars(tars: Sequence[StoredFile], reader: CaptionReader, omitted: Omissions) -> _TarContents:
    contents = _TarContents()
    with ThreadPoolExecutor(_READERS) as pool:  # the threads wait for storage
        for listing in pool.map(_try_list_tar, tars):
            for video in tar_videos(listing, reader):
                file = StoredFile(video.member.uri, video.member.size, listing.tar.etag)
                contents.videos.append((file, video))
            contents.ignored.update(listing.ignored)
            omitted.update(listing.omitted)
            if listing.problem is not None:
                contents.bad.append(_bad_file(listing.tar, listing.problem))
    return contents


def _try_list_tar(tar: StoredFile) -> TarListing:
    """The listing of a tar, with a problem if it cannot be read. Raises StorageError if storage is unavailable."""
    if tar.problem:
        return TarListing(tar, problem=StorageError(tar.problem))
    try:
        return list_tar(tar)
    except StorageError as error:
        if error.transient:
            raise
        return TarListing(tar, problem=error)


def _bad_file(file: StoredFile, problem: DataError) -> VideoRecord:
    """A record for a tar or table that cannot be read to its end, which belongs to no class."""
    return with_error(unprobed_record(file, _NO_CLASS), bad_sample(file.uri, -1, problem))


def _from_list(
    rows: Sequence[ListedVideo], test_fraction: float, reader: CaptionReader, omitted: Omissions
) -> Discovery:
    """The videos of a list. Those of a tar have the split of its row, and its class unless the tar names theirs."""
    with ThreadPoolExecutor(_READERS) as pool:  # the threads wait for storage
        files = list(pool.map(_find_video, (row.uri for row in rows)))
    videos = [(file, row) for file, row in zip(files, rows, strict=True) if not is_tar(file.uri)]
    row_of = {row.uri: row for row in rows}
    contents = _read_tars([file for file in files if is_tar(file.uri)], reader, omitted)
    for file, video in contents.videos:
        row = row_of[video.member.tar]
        videos.append((file, replace(row, class_name=video.class_name or row.class_name, captions=video.captions)))
    for row in rows:
        if is_tar(row.uri) and row.captions:
            reader.omitted.add("captions in a list belong to a tar, not to a video", row.uri)
    assigned = with_labels(
        [
            (row.class_name or "video", row.split or hashed_split(unpacked(file.uri), test_fraction))
            for file, row in videos
        ]
    )
    records = [unprobed_record(file, a, row.captions) for (file, row), a in zip(videos, assigned, strict=True)]
    return Discovery(records + contents.bad, [], contents.ignored, omitted.notes, reader.omitted.notes)


def _find_video(uri: str) -> StoredFile:
    """The file or folder of pictures at ``uri``, with a ``problem`` if there is none."""
    if is_compressed_tar(uri):
        return StoredFile(uri, 0, "", "it is a compressed tar: decompress it to .tar")
    if not uri.endswith("/"):
        return storage.find_file(uri)
    try:
        pictures = storage.list_objects(uri, IMAGE_SUFFIXES, unreadable=True)
    except DataError as error:
        return StoredFile(uri, 0, "", bad_sample(uri, -1, error).message)
    videos = {video.uri: video for video in group_files(uri.rstrip("/").rpartition("/")[0], pictures)}
    return videos.get(uri, StoredFile(uri, 0, "", "it holds no picture"))
