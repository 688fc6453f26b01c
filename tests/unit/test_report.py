import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ray_jobs.reports.html import Curve, Report, Score, Sheet, Stage, Table, Video, render_report, write_report
from ray_jobs.reports.sweep_media import _of_one_size

VOID = {"meta", "img", "br", "link", "input", "hr", "source"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


REPORT = Report(
    title="A run",
    subtitle="of a test",
    summary=["It took a minute."],
    stages=[Stage("train", 83.4, 1536.0, "done", "1620 steps"), Stage("score", 9.94, 512.0, "failed", "")],
    curves=[
        Curve("Loss", "step", "loss", {"train": ([1, 50, 100], [1.0, 0.1, 0.01]), "test": ([1, 100], [2.0, 0.5])}, True)
    ],
    sheets=[Sheet("Real", "Held out.", png())],
    videos=[Video("Fake", "16 at once", b"mp4 bytes", "video/mp4"), Video("Old", "", b"webp bytes", "image/webp")],
    scores=[
        Score("noise", 36105.2, "distance", ""),
        Score("model A", 31.24, "distance", "recognised 93 %", highlight=True),
        Score("real", 5.912, "distance", ""),
    ],
    config_yaml="train:\n  lr: 0.001\n",
    versions={"torch": "2.13.0"},
    caveats=["Not FVD."],
)


class Page(HTMLParser):
    """Elements and text of a page; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_well_formed_and_shows_everything(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, REPORT)
    page = Page(path.read_text(encoding="utf-8"))
    for text in ("A run", "of a test", "It took a minute.", "1620 steps", "1 min 23 s", "1.5 GiB", "512 MiB", "9.9 s"):
        assert text in page.text
    for text in (
        "Held out.",
        "16 at once",
        "31.2",
        "36,105",
        "5.91",
        "recognised 93 %",
        "lr: 0.001",
        "2.13.0",
        "Not FVD.",
    ):
        assert text in page.text
    assert "1 min 33 s" in page.text  # all stages


def test_nothing_is_loaded_from_elsewhere():
    html = render_report(REPORT)
    page = Page(html)
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    sources = [a["src"] for _, a in page.elements if "src" in a]
    assert len(sources) == 3
    assert all(source.startswith("data:") for source in sources)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_everything_given_is_escaped():
    evil = "<script>alert(1)</script>\"'&"
    html = render_report(
        Report(
            title=evil,
            subtitle=evil,
            summary=[evil],
            stages=[Stage(evil, 1.0, 1.0, evil, evil)],
            curves=[Curve(evil, evil, evil, {evil: ([0.0, 1.0], [0.0, 1.0])}, False)],
            sheets=[Sheet(evil, evil, png())],
            videos=[Video(evil, evil, b"", "video/" + evil), Video(evil, evil, b"", "image/" + evil)],
            scores=[Score(evil, 1.0, evil, evil)],
            config_yaml=evil,
            versions={evil: evil},
            caveats=[evil],
        )
    )
    page = Page(html)
    assert "<script" not in html.lower()
    assert page.text.count(evil) >= 20
    assert not any("alert" in name or "<" in name for _, attributes in page.elements for name in attributes)


def test_videos_play_by_themselves_and_pictures_have_words():
    page = Page(render_report(REPORT))
    (video,) = page.all("video")
    assert {"controls", "loop", "muted", "playsinline", "autoplay"} <= set(video)
    assert video["aria-label"] == "Fake"
    assert video["src"] == "data:video/mp4;base64,bXA0IGJ5dGVz"
    assert [image["alt"] for image in page.all("img")] == ["Old", "Real. Held out."]
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in header for header in page.all("th"))
    assert all("aria-label" in svg or svg.get("aria-hidden") == "true" for svg in page.all("svg"))


def test_scores_are_sorted_and_drawn_on_a_log_scale():
    html = render_report(REPORT)
    names = re.findall(r'<th scope="row"><span>(.*?)</span>', html)
    assert names == ["real", "model A", "noise"]
    widths = [float(width) for width in re.findall(r'<i style="width: ([\d.]+)%', html)]
    assert widths == pytest.approx([15.4, 29.9, 91.2])  # log10(value) / 5, from 1 to 100k
    assert html.count('class="model"') == 1


def test_scores_of_different_units_are_not_on_one_scale():
    scores = [Score("a", 3.0, "distance", ""), Score("b", 27.0, "dB", ""), Score("c", 4.0, "distance", "")]
    html = render_report(replace(REPORT, scores=scores, stages=[]))
    assert html.count("<tbody>") == 3  # two of scores, one of versions
    assert html.index(">c<") < html.index(">b<")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_score_without_a_logarithm_has_no_bar(value):
    html = render_report(
        replace(REPORT, scores=[Score("odd", value, "distance", ""), Score("one", 1.0, "distance", "")])
    )
    assert html.count("<i style") == 1
    assert "odd" in html


def test_curves_are_inside_their_box_and_in_order():
    page = Page(render_report(REPORT))
    train = next(path["d"] for path in page.all("path") if "c0" in path["class"])
    points = [tuple(map(float, point.split())) for point in train[1:].split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[1][1] - points[0][1] == pytest.approx(
        points[2][1] - points[1][1], abs=0.2
    )  # 1, 0.1, 0.01 on a log axis
    assert all(50 <= x <= 428 and 10 <= y <= 210 for x, y in points)
    assert "train ends at 0.01" in page.all("svg")[0]["aria-label"]


@pytest.mark.parametrize(
    ("log_y", "values", "labels"),
    [
        (False, [0.0, 1.0], ["0", "0.5", "1"]),
        (False, [7.0, 7.0], ["7"]),
        (False, [0.0, 2e6], ["500k", "2M"]),
        (False, [0.0, 1e8], ["50M", "100M"]),
        (True, [1e-4, 1.0], ["0.0001", "0.1", "1"]),
        (True, [0.04, 0.9], ["0.05", "0.1", "0.5"]),
        (True, [0.40, 0.44], ["0.4", "0.42", "0.44"]),
        (True, [3.0, 3.0], ["2", "5"]),
    ],
)
def test_axes_have_round_labels(log_y, values, labels):
    curve = Curve("c", "x", "y", {"s": ([1.0, 2.0], values)}, log_y)
    page = render_report(replace(REPORT, curves=[curve]))
    found = re.findall(r'text-anchor="end">(.*?)</text>', page)
    assert set(labels) <= set(found), found
    assert 2 <= len(found) <= 9


def test_values_that_cannot_be_drawn_are_left_out():
    nan = float("nan")
    curve = Curve("c", "x", "y", {"s": ([1.0, 2.0, 3.0, nan], [1.0, nan, 0.0, 1.0]), "t": ([1.0], [-1.0])}, True)
    html = render_report(replace(REPORT, curves=[curve]))
    assert "nan" not in html
    assert html.count('<path class="curve') == 2  # a line and its key
    empty = render_report(replace(REPORT, curves=[replace(curve, series={"t": ([1.0], [0.0])})]))
    assert "No values were recorded." in empty


def test_an_empty_report_has_no_empty_sections():
    empty = Report("t", "", [], [], [], [], [], [], "", {}, [])
    page = Page(render_report(empty))
    assert [a["id"] for a in page.all("h2")] == ["reproduce"]
    assert not page.all("table")


def test_long_durations():
    html = render_report(
        replace(REPORT, stages=[Stage("long", 7265.0, 1.0, "done", ""), Stage("mid", 59.7, 1.0, "done", "")])
    )
    assert "2 h 1 min" in html
    assert "1 min 0 s" in html


def test_bad_curves_and_videos_are_refused():
    with pytest.raises(ValueError, match="2 x but 1 y"):
        Curve("c", "x", "y", {"s": ([1.0, 2.0], [1.0])}, False)
    with pytest.raises(ValueError, match="mime"):
        Video("v", "", b"", "text/html")


def test_points_are_marked_and_leading_plots_come_first() -> None:
    points = {"a": ([1.0, 2.0, float("nan")], [3.0, 4.0, 5.0])}
    curve = Curve("Cost", "seconds", "score", points, False, {"a": ["<5>", "10", "lost"]}, "Down is better.")
    html = render_report(replace(REPORT, leading=[curve]))
    page = Page(html)
    assert sum(tag == "circle" for tag, _ in page.elements) == 2
    assert "<5>" in page.text
    assert "lost" not in page.text
    assert page.text.index("Cost") < page.text.index("Fake")
    assert not any(tag == "circle" for tag, _ in Page(render_report(REPORT)).elements)
    with pytest.raises(ValueError, match="other labels"):
        Curve("Cost", "x", "y", points, False, {"a": ["one"]})


def test_tables_and_the_command_are_shown_escaped() -> None:
    table = Table("Cells", "All of <them>.", ["cell", "score"], [["a & b", "3.5"]])
    page = Page(render_report(replace(REPORT, tables=[table], command="ardiff sweep 'a<b'")))
    for text in ("All of <them>.", "a & b", "3.5", "ardiff sweep 'a<b'"):
        assert text in page.text
    with pytest.raises(ValueError, match="must have 2 cells"):
        Table("Cells", "", ["cell", "score"], [["a"]])


def test_clips_of_two_shapes_are_shown_beside_each_other() -> None:
    wide, square = np.full((2, 4, 8, 3), 10, np.uint8), np.full((2, 8, 8, 3), 20, np.uint8)
    first, second = _of_one_size([wide, square])
    assert first.shape == second.shape == (2, 8, 16, 3)
    assert (first == 10).all()
    assert (second[:, :, :8] == 20).all()
    assert (second[:, :, 8:] == 255).all()
