"""The web page in a real Chromium: it plays an unfinished stream, cancels, and shows errors."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, sync_playwright
from toy_text import ToyEncoder

from ardiff.diffusion.sampling_defaults import SamplingDefaults
from ardiff.diffusion.student import Student
from ardiff.errors import DataError

from .conftest import SHORT_LEASE, Proxy, Serve, Served, eventually

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM.exists(), "run `make chromium`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS, timeout=180_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page on which no script has failed when the test ends."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(120_000)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def until(page: Page, expression: str, patience: float = 240.0) -> Any:
    """Waits until the expression is true in the page, whose security policy forbids it to evaluate text itself."""
    deadline = time.monotonic() + patience
    while not (value := page.evaluate(expression)):
        assert time.monotonic() < deadline, (expression, page.inner_text("body"))
        time.sleep(0.02)
    return value


def begin(page: Page, served: Served | Proxy, **fields: str) -> None:
    page.goto(served.url)
    until(page, "document.querySelectorAll('#class_label option').length == 4")
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#go")


def test_the_page_plays_a_video_while_it_is_generated_and_cancels_it(page: Page, serve: Serve) -> None:
    served = serve()
    let = served.hold()
    let(420)  # 81 frames, ten seconds of video
    begin(page, served, num_frames="1000", num_inference_steps="20", seed="3")
    until(page, "document.querySelector('#video').currentTime > 0.2")
    video = served.client.get("/v1/videos").json()["data"][0]
    assert video["status"] == "in_progress"
    assert 0 < video["frames_done"] < 1000
    until(page, "Number(document.querySelector('#schedule').dataset.done) > 0")
    before = page.evaluate("Number(document.querySelector('#schedule').dataset.done)")
    let(100)
    until(page, f"Number(document.querySelector('#schedule').dataset.done) > {before}")  # it fills
    page.click("#cancel")
    let(math.inf)
    until(page, "document.querySelector('#status').dataset.state == 'cancelled'")
    served.wait(video, "cancelled")
    until(page, "document.querySelector('#history').innerText.includes('Cancelled')")


def test_a_finished_video_can_be_downloaded_and_is_in_the_history(page: Page, serve: Serve) -> None:
    served = serve()
    begin(page, served, num_frames="8", num_inference_steps="10", seed="3")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    until(page, "document.querySelector('#history a') != null")
    with page.expect_download() as download:
        page.click("#links a")
    assert download.value.path().stat().st_size > 500
    page.reload()
    until(page, "document.querySelector('#history a') != null")
    assert "Class disc, Frames 8, Steps per frame 10, ar_step" in page.inner_text("#history")
    page.click("#history button")
    until(page, "document.querySelector('#video').currentTime > 0")


def test_bad_input_is_explained_at_its_field(page: Page, serve: Serve) -> None:
    served = serve()
    begin(page, served, num_frames="99999")
    until(page, "!document.querySelector('#error').hidden")
    assert page.inner_text("#error").startswith("Frames is 99999: at most 1024")
    assert page.evaluate("document.activeElement.id") == "num_frames"
    assert page.get_attribute("#num_frames", "aria-invalid") == "true"
    page.fill("#num_frames", "4")
    page.click("#go")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    assert page.is_hidden("#error")


def test_typing_the_steps_keeps_the_chosen_ar_step(page: Page, serve: Serve) -> None:
    served = serve()
    page.goto(served.url)
    until(page, "document.querySelectorAll('#class_label option').length == 4")
    page.fill("#num_frames", "8")
    page.evaluate("document.querySelector('#ar_step').value = 7")
    page.dispatch_event("#ar_step", "input")
    page.fill("#num_inference_steps", "")
    page.type("#num_inference_steps", "20")  # 2 on the way, which allows no more than 2
    assert page.inner_text("#ar_step_value") == "7"
    page.fill("#num_inference_steps", "4")
    assert page.inner_text("#ar_step_value") == "4"
    page.fill("#num_inference_steps", "30")
    assert page.inner_text("#ar_step_value") == "7"
    page.click("#go")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    assert served.client.get("/v1/videos").json()["data"][0]["ar_step"] == 7


def test_every_running_job_can_be_cancelled_and_the_history_stays_true(page: Page, serve: Serve) -> None:
    served = serve()
    let = served.hold()
    begin(page, served, num_frames="200", num_inference_steps="10", seed="1")
    until(page, "document.querySelectorAll('#history li').length == 1")
    page.fill("#num_frames", "8")
    page.fill("#seed", "2")
    page.click("#go")
    until(page, "document.querySelectorAll('#history li').length == 2")
    page.click("#history li:nth-child(2) button:has-text('Cancel')")  # not the video that is shown
    let(math.inf)
    until(page, "document.querySelector('#history li:nth-child(2)').innerText.includes('Cancelled')")
    until(page, "document.querySelector('#history li:nth-child(1)').innerText.includes('Completed')")
    assert page.query_selector("#history button:has-text('Cancel')") is None
    # A job that ends while another video is shown, or none.
    page.reload()
    other = served.ask(num_frames=300, num_inference_steps=10)
    page.evaluate(f"localStorage.setItem('videos', JSON.stringify(['{other['id']}']))")
    page.reload()
    until(page, "document.querySelector('#history .state') != null")
    until(page, "document.querySelector('#history').innerText.includes('Completed')")


def test_a_streamed_video_is_looped_when_it_is_complete(page: Page, serve: Serve) -> None:
    served = serve()
    begin(page, served, num_frames="8", num_inference_steps="10", seed="3")
    until(page, "document.querySelector('#video').currentTime > 0.2")
    until(page, "document.querySelector('#video').loop")
    until(page, "document.querySelector('#video').currentTime > 0.6")
    until(page, "document.querySelector('#video').currentTime < 0.4")  # again from the beginning
    assert not page.evaluate("document.querySelector('#video').paused")


def test_the_page_plays_on_through_the_crash_of_a_replica(
    page: Page, serve: Serve, proxy: Callable[[str], Proxy]
) -> None:
    first = serve("a")
    through, let = proxy(first.url), first.hold()
    let(200)  # 19 frames
    begin(page, through, num_frames="48", num_inference_steps="20", seed="3")
    until(page, "document.querySelector('#video').currentTime > 0.2")
    source = page.evaluate("document.querySelector('#video').src")
    video = first.client.get("/v1/videos").json()["data"][0]
    eventually(lambda: first.look(video)["frames_done"] >= 16)
    first.crash()
    second = serve("b", lease_seconds=SHORT_LEASE)
    through.point(second.url)
    until(page, "document.querySelector('#video').duration > 5.9")
    second.wait(video)
    assert second.record(video).begun == 1
    until(page, "document.querySelector('#video').loop")
    assert page.evaluate("document.querySelector('#video').src") == source  # the same player has all frames


def test_an_upload_shows_that_it_is_decoded(page: Page, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served, go_on = serve(), threading.Event()

    async def decode(*arguments: Any) -> np.ndarray:
        await asyncio.to_thread(go_on.wait, 120)
        raise DataError("The upload cannot be used: it is damaged.")

    monkeypatch.setattr("ardiff.serving.admission.decode_upload", decode)
    page.goto(served.url)
    until(page, "document.querySelectorAll('#class_label option').length == 4")
    page.set_input_files("#input_reference", {"name": "ring.png", "mimeType": "image/png", "buffer": b"x"})
    page.click("#go")
    until(page, "!document.querySelector('#progress').hasAttribute('value')")
    assert "Sending ring.png" in page.inner_text("#status")
    go_on.set()
    until(page, "!document.querySelector('#error').hidden")
    assert page.evaluate("document.querySelector('#progress').value") == 0
    assert "Choose settings" in page.inner_text("#status")


def test_the_player_keeps_its_place_and_inputs_are_large_enough(page: Page, serve: Serve) -> None:
    served = serve()
    page.goto(served.url)
    until(page, "document.querySelectorAll('#class_label option').length == 4")
    for name in ("num_frames", "class_label", "seed", "input_reference", "ar_step"):  # phones zoom in on smaller text
        assert page.evaluate(f"getComputedStyle(document.querySelector('#{name}')).fontSize") == "16px"
    box = "JSON.stringify(document.querySelector('#video').getBoundingClientRect())"
    progress = "document.querySelector('#progress').getBoundingClientRect().top"
    before = page.evaluate(box), page.evaluate(progress)
    page.fill("#num_frames", "8")
    page.click("#go")
    until(page, "document.querySelector('#video').currentTime > 0")
    assert (page.evaluate(box), page.evaluate(progress)) == before
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    assert (page.evaluate(box), page.evaluate(progress)) == before


def test_the_schedule_follows_the_colour_scheme(page: Page, serve: Serve) -> None:
    served = serve()
    corner = "document.querySelector('#schedule').getContext('2d').getImageData(0, 0, 1, 1).data[0]"
    for scheme, dark in (("light", False), ("dark", True), ("light", False)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        if scheme == "light" and page.url == "about:blank":
            page.goto(served.url)
            until(page, "document.querySelectorAll('#class_label option').length == 4")
        until(page, f"({corner} < 100) == {str(dark).lower()}")


def test_the_page_works_with_the_keyboard_and_on_a_phone(browser: Any, serve: Serve) -> None:
    served = serve()
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(served.url)
    until(page, "document.querySelectorAll('#class_label option').length == 4")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        if reached[-1] == "num_frames":
            page.keyboard.type("6")
        if reached[-1] == "go":
            break
    assert {"class_label", "num_frames", "ar_step", "guidance_scale", "seed", "go"} <= set(reached)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    assert "6 of 6 frames" in page.inner_text("#counts")
    context.close()


def test_the_page_requests_a_key_if_the_service_needs_one(page: Page, serve: Serve, tmp_path: Path) -> None:
    from ardiff.serving.keys import digest

    (tmp_path / "keys.yaml").write_text(f"alice: {{sha256: {digest('ka')}}}")
    served = serve(keys=str(tmp_path / "keys.yaml"))
    page.goto(served.url)
    until(page, "!document.querySelector('#key-field').hidden")
    page.fill("#key", "ka")
    page.keyboard.press("Tab")
    until(page, "document.querySelectorAll('#class_label option').length == 4")
    page.fill("#num_frames", "4")
    page.click("#go")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    until(page, "document.querySelector('#video').currentTime > 0")


def test_a_model_with_text_has_a_box_for_prompts(page: Page, serve: Serve, make_pipeline: Any) -> None:
    text = {"text_encoder": ToyEncoder(), "condition": "cross_attention", "condition_dim": 5}
    served = serve(pipelines={"text": make_pipeline(num_classes=0, **text), "plain": make_pipeline()})
    page.goto(served.url)
    until(page, "!document.querySelector('#prompt-field').hidden")
    assert page.is_hidden("#class-field")
    page.select_option("#model", "plain")
    assert page.is_visible("#class-field")
    assert page.is_hidden("#prompt-field")
    assert page.is_hidden("#advanced")
    page.select_option("#model", "text")
    hostile = "a red ring <img src=x onerror=\"document.title='broken'\">"
    page.fill("#prompt", hostile)
    page.click("#advanced summary")
    page.fill("#negative_prompt", "a disc")
    page.click("#advanced summary")
    page.fill("#num_frames", "8")
    page.fill("#num_inference_steps", "10")
    page.click("#go")
    until(page, "!document.querySelector('#error').hidden")
    assert page.inner_text("#error") == "Negative prompt acts through guidance only: set Guidance above 1."
    assert page.evaluate("document.activeElement.id") == "negative_prompt"
    assert page.is_visible("#negative_prompt")
    page.fill("#guidance_scale", "2")
    page.click("#go")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    until(page, "document.querySelector('#history a') != null")
    (video,) = served.client.get("/v1/videos").json()["data"]
    assert (video["prompt"], video["negative_prompt"], video["class_label"]) == (hostile, "a disc", None)
    assert f"Prompt “{hostile}”, Negative prompt “a disc”, Frames 8, " in page.inner_text("#history")
    assert page.query_selector("#history img") is None
    assert page.title() != "broken"
    page.select_option("#model", "plain")
    page.click("#go")
    until(page, "document.querySelectorAll('#history li').length == 2")
    assert page.inner_text("#history li").startswith("Class disc, Frames 8, ")


def test_a_model_of_several_sizes_has_a_choice_of_them(
    page: Page, serve: Serve, make_pipeline: Any, make_vae: Any
) -> None:
    several = make_pipeline(num_shapes=2)
    several.vae = make_vae(resolution=16, buckets=[[16, 40]])
    served = serve(pipelines={"plain": make_pipeline(), "several": several})
    page.goto(served.url)
    until(page, "document.querySelectorAll('#model option').length == 2")
    assert page.is_hidden("#size-field")
    page.select_option("#model", "several")
    assert page.is_visible("#size-field")
    page.select_option("#size", "40x16")
    page.fill("#num_frames", "4")
    page.fill("#num_inference_steps", "4")
    page.click("#go")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    (video,) = served.client.get("/v1/videos").json()["data"]
    assert video["size"] == "40x16"
    until(page, "document.querySelector('#history li') != null")
    assert "Size 40x16, Frames 4, " in page.inner_text("#history li")


def test_a_student_brings_its_own_settings(page: Page, serve: Serve, make_pipeline: Any) -> None:
    """And the other model has its own again."""
    student = make_pipeline(student=Student(timesteps=(999, 614), num_steps=2))
    teacher = make_pipeline(sampling_defaults=SamplingDefaults(num_inference_steps=20, ar_step=4))
    served = serve(pipelines={"teacher": teacher, "student": student})
    page.goto(served.url)
    until(page, "document.querySelectorAll('#model option').length == 2")
    assert [page.input_value(field) for field in ("#num_inference_steps", "#ar_step")] == ["20", "4"]
    page.select_option("#model", "student")
    assert page.input_value("#num_inference_steps") == page.input_value("#ar_step") == "2"
    assert page.is_disabled("#guidance_scale")
    page.fill("#num_frames", "4")
    page.click("#go")
    until(page, "document.querySelector('#status').dataset.state == 'completed'")
    page.select_option("#model", "teacher")
    assert [page.input_value(field) for field in ("#num_inference_steps", "#ar_step")] == ["20", "4"]
    assert page.is_enabled("#guidance_scale")


def test_a_running_video_is_changed_by_keyboard(page: Page, serve: Serve, make_pipeline: Callable[..., Any]) -> None:
    text = make_pipeline(text_encoder=ToyEncoder(), condition="cross_attention", condition_dim=5)
    served = serve(pipelines={"text": text}, engine={"long_prompts": "error"})
    let = served.hold()
    let(60)
    begin(page, served, num_frames="400", num_inference_steps="20", seed="3", prompt="a ring")
    until(page, "!document.querySelector('#change').hidden")
    assert served.held.wait(240)
    form = page.locator("#change")
    assert form.get_by_label("Prompt").input_value() == "a ring"
    form.get_by_label("Prompt").fill("one two three four five six seven eight nine")
    form.get_by_label("Prompt").press("Enter")
    until(page, "document.querySelector('#change-status').textContent.includes('more than the 8 tokens')")
    form.get_by_label("Prompt").fill("a disc")
    form.get_by_label("Class").select_option(label="square")
    form.get_by_role("button").press("Enter")
    (job,) = served.replica.running
    eventually(lambda: job.record.changes)
    let(1)
    until(page, "document.querySelector('#change-status').textContent.startsWith('Changed after')")
    (change,) = served.look({"id": job.record.id})["changes"]
    assert (change["prompt"], change["class_label"]) == ("a disc", 2)
    assert page.inner_text("#change-status") == f"Changed after {change['from_frame']} frames."
    page.click("#cancel")
    let(math.inf)
    until(page, "document.querySelector('#status').dataset.state == 'cancelled'")
    assert page.is_hidden("#change")
