"""The page in a real browser, on a desktop and on a phone: everything it offers, mistakes, two visitors at once.

VLMO_SCREENSHOTS=FOLDER keeps a picture of every tab.
"""

import base64
import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import tables, tiny
from tests.tables import VOCABULARY, picture
from vlmo.app.__main__ import parser, prepare
from vlmo.inference import Predictor

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = "/usr/bin/chromium"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs chromium"),
]

TASKS = {
    "pairs": "task_mlm_itm_itc_base",
    "vqa": "task_finetune_vqa_base_image480",
    "nlvr2": "task_finetune_nlvr2_base",
}
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ARGUMENTS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
MAY = ["camera", "clipboard-read", "clipboard-write"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def saved(folder: Path, name: str) -> str:
    torch.manual_seed(0)
    model = tiny.model(TASKS[name])
    model.vocabulary, model.answers = list(dict.fromkeys(VOCABULARY)), ["yes", "no", "red"]
    model.save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "images").mkdir()
    for seed in range(6):
        picture(seed, (80, 60)).save(folder / "images" / f"{seed}.png")
    (folder / "data").mkdir()
    tables.write_coco(folder / "data")
    tables.write_vocabulary(folder / "data")
    columns = {"image": [b"no image"], "caption": [["a dog"]], "image_id": ["a"], "split": ["train"]}
    tables.write_table(folder / "data" / "sbu_0.arrow", columns)
    (folder / "wrong.png").write_text("this is no image")
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    """Of the page with three checkpoints and data."""
    yield from served(page_of(folder, [saved(folder, name) for name in TASKS], data=True))


def page_of(folder: Path, checkpoints: list[str], data: bool = False, images: str = "images"):
    words = ["--checkpoint", *checkpoints, "--images", str(folder / images), "--cache", str(folder / "cache")]
    words += ["--device", "cpu", "--requests-per-minute", "1000"]
    if data:
        options = {**tiny.SMALL, "tokenizer": folder / "data" / "vocab.txt"}
        options = {name: value for name, value in options.items() if name not in ("num_workers", "num_gpus")}
        words += ["--data", str(folder / "data"), "--config", TASKS["pairs"], 'datasets=["coco", "sbu"]']
        words += [f"{name}={value}" for name, value in options.items()]
    return prepare(parser().parse_intermixed_args(words))


def served(page):
    from vlmo.app.page import launch

    blocks = launch(page, "127.0.0.1", 0, wait=False)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visitor:
    """One window; what it asks for from outside is kept."""

    def __init__(self, chromium, url: str, size: str) -> None:
        width, height = SIZES[size]
        self.size, self.outside = size, []
        self.page = chromium.new_context(viewport={"width": width, "height": height}, permissions=MAY).new_page()
        self.page.set_default_timeout(20_000)
        own = (url, "data:", "blob:", url.replace("http", "ws"))
        self.page.on("request", lambda each: self.outside.append(each.url) if not each.url.startswith(own) else None)
        self.page.goto(url)
        self.page.get_by_role("tab").first.wait_for()

    @property
    def panel(self):
        return self.page.locator("[role=tabpanel]:visible")

    def open(self, title: str) -> None:
        tab = self.page.get_by_role("tab", name=title, exact=True)
        self.page.wait_for_timeout(300)
        if tab.count() and tab.first.is_visible():
            tab.first.click()
        else:  # there is no room for it: it is in the menu of further ones
            self.page.locator(".overflow-menu > button").click()
            self.page.locator(".overflow-dropdown button", has_text=title).click()
        self.page.wait_for_timeout(300)

    def upload(self, path: Path, place: int = 0) -> None:
        self.panel.locator("input[type=file]").nth(place).set_input_files(str(path))
        self.page.wait_for_timeout(800)

    def press(self, name: str) -> None:
        self.panel.get_by_role("button", name=name, exact=True).click()

    def matches_an_example(self) -> None:
        self.panel.locator("button:has(img), .gallery-item").first.click()
        self.page.wait_for_timeout(800)
        self.panel.get_by_label("Texts, one a line").fill("a red cat\na dog")
        self.press("Compare")
        self.panel.get_by_text("a dog", exact=True).first.wait_for()

    def sees(self, text: str) -> None:
        self.panel.get_by_text(text).first.wait_for()

    def note(self, text: str) -> None:
        self.panel.locator(".note", has_text=text).first.wait_for()

    def done(self, name: str) -> None:
        """Looks at the whole, keeps a picture, and checks that nothing is wider than the window."""
        self.page.wait_for_timeout(600)  # until what is new has faded in
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[self.size][0], (name, width)
        if place := os.environ.get("VLMO_SCREENSHOTS"):
            Path(place).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{place}/{self.size}_{name}.png", full_page=True)


def answer_of(folder: Path, image: str, question: str):
    return Predictor.from_pretrained(folder / "vqa", device="cpu").answer(folder / "images" / image, question, top_k=3)


@pytest.mark.parametrize("size", SIZES)
def test_everything(folder, url, chromium, size):
    visitor = Visitor(chromium, url, size)
    images = folder / "images"
    visitor.open("Question")
    visitor.upload(images / "0.png")
    question = visitor.panel.get_by_label("Question")
    question.fill("what is left ?")
    question.press("Enter")  # by keyboard
    best = answer_of(folder, "0.png", "what is left ?")[0]
    visitor.sees(best.text)
    visitor.sees(f"{best.score:.0%}")
    visitor.done("question")

    visitor.open("Match")
    visitor.matches_an_example()
    visitor.done("match")

    visitor.open("Search")
    visitor.panel.get_by_label("Text", exact=True).fill("a red cat")
    visitor.press("Search by text")
    visitor.panel.locator(".caption-label, .thumbnail-item").nth(5).wait_for()
    visitor.panel.get_by_role("button", name="or by an image").click()
    visitor.upload(images / "3.png")
    visitor.press("Search by image")
    visitor.sees("1.000 3.png")
    visitor.done("search")

    visitor.open("Two images")
    visitor.upload(images / "0.png")
    visitor.upload(images / "1.png", -1)
    visitor.panel.get_by_label("Statement").fill("a dog .")
    visitor.press("Judge")
    visitor.panel.get_by_text("false", exact=True).first.wait_for()
    visitor.done("two_images")

    visitor.open("Mask")
    visitor.panel.get_by_label("Text with [MASK]").fill("a [MASK] cat [MASK]")
    visitor.press("Fill in")
    visitor.panel.get_by_text("[MASK] 2").first.wait_for()
    visitor.done("mask")

    visitor.open("Attention")
    visitor.upload(images / "0.png")
    visitor.panel.get_by_label("Text", exact=True).fill("a red cat")
    visitor.press("Show")
    visitor.sees("on the image")
    visitor.panel.get_by_label("Word").click()
    visitor.page.get_by_role("option", name="2: red").click()
    visitor.page.wait_for_timeout(1000)
    visitor.sees("layer 3:")
    visitor.done("attention")

    visitor.open("Classify")
    visitor.upload(images / "0.png")
    visitor.panel.get_by_label("Classes, one a line or with commas").fill("cat, dog, table")
    visitor.press("Classify")
    visitor.panel.get_by_text("table", exact=True).first.wait_for()
    visitor.done("classify")

    visitor.open("Data")
    visitor.press("Show")
    visitor.sees("as the model sees it, 32 x 32")
    visitor.press("→")
    visitor.page.wait_for_timeout(1000)
    assert visitor.panel.get_by_label("Sample").input_value() == "1"
    visitor.panel.get_by_role("button", name="Search and filter").click()
    visitor.panel.get_by_label("Text has these words").fill("cat")
    visitor.press("Search from the sample on")
    visitor.page.wait_for_timeout(1000)
    assert "looked at 1 to" in visitor.panel.get_by_label("Found").input_value()
    visitor.done("data")
    visitor.panel.get_by_label("Data set and split").click()
    visitor.page.get_by_role("option", name="sbu, train").click()
    visitor.panel.get_by_label("Sample").fill("0")
    visitor.press("Show")
    visitor.note("cannot be read")

    visitor.open("Negatives")
    visitor.press("Draw")
    visitor.sees("image drawn against it")
    visitor.done("negatives")
    assert visitor.outside == []


COPY = """async data => {
  const blob = await (await fetch("data:image/png;base64," + data)).blob();
  await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
}"""


@pytest.mark.parametrize("size", SIZES)
def test_camera_and_clipboard(folder, url, chromium, size):
    visitor = Visitor(chromium, url, size)
    visitor.open("Question")
    visitor.press("Capture from camera")
    visitor.panel.get_by_title("grant webcam access").get_by_role("button").click()
    visitor.page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
    visitor.panel.get_by_label("capture photo").click()
    visitor.panel.get_by_label("Remove Image").wait_for()
    visitor.panel.get_by_label("Question").fill("what is left ?")
    visitor.press("Ask")
    visitor.sees("yes")
    visitor.done("camera")
    visitor.panel.get_by_label("Remove Image").click()

    data = (folder / "images" / "4.png").read_bytes()
    visitor.page.evaluate(COPY, base64.b64encode(data).decode())
    visitor.press("Paste from clipboard")
    visitor.panel.get_by_label("Remove Image").wait_for()
    visitor.press("Ask")
    for best in answer_of(folder, "4.png", "what is left ?"):
        visitor.sees(f"{best.score:.0%}")
    visitor.done("clipboard")


def test_a_folder_that_takes_long(folder, chromium):
    """Embedding tells how far it is, lets others have their turn, and can be stopped; what was done is kept."""
    (folder / "many").mkdir()
    for seed in range(60):
        picture(seed, (80, 60)).save(folder / "many" / f"{seed}.png")
    page = page_of(folder, [saved(folder, "pairs"), saved(folder, "vqa")], images="many")
    (searched,) = page.folders.values()
    embed, seen = searched.predictor.embed_images, []

    def slowly(images):
        seen.extend(images)
        time.sleep(0.7)
        return embed(images)

    searched.predictor.embed_images = slowly
    running = served(page)
    url = next(running)
    visitor, other = Visitor(chromium, url, "desktop"), Visitor(chromium, url, "phone")
    visitor.open("Search")
    visitor.panel.get_by_label("Text", exact=True).fill("a red cat")
    visitor.press("Search by text")
    visitor.note("of 60 done")
    visitor.done("embedding")
    other.open("Match")
    other.matches_an_example()
    visitor.press("Stop")
    visitor.note("Stopped")
    visitor.page.wait_for_timeout(1500)
    done = len(seen)
    assert 0 < done < 60 and len(set(seen)) == done
    visitor.done("stopped")
    visitor.press("Search by text")
    visitor.note(f"of {60 - done} done")
    visitor.panel.locator(".caption-label, .thumbnail-item").nth(8).wait_for()
    assert sorted(seen) == sorted(str(path) for path in (folder / "many").iterdir())
    next(running, None)


def test_mistakes(folder, url, chromium):
    visitor = Visitor(chromium, url, "desktop")
    visitor.open("Question")
    visitor.press("Ask")
    visitor.note("Give an image first")
    visitor.upload(folder / "images" / "0.png")
    visitor.press("Ask")
    visitor.note("The question is empty")
    for name, told in (("wrong.png", "no image that can be read"), ("large.png", "100 megapixels")):
        visitor.open("Attention")
        if visitor.panel.get_by_label("Remove Image").count():
            visitor.panel.get_by_label("Remove Image").first.click()
        visitor.upload(folder / name)
        visitor.panel.get_by_label("Text", exact=True).fill("a")
        visitor.press("Show")
        visitor.note(told)
    visitor.done("mistakes")


def test_a_checkpoint_without_the_head(folder, chromium):
    page = served(page_of(folder, [saved(folder, "vqa")]))
    visitor = Visitor(chromium, next(page), "phone")
    visitor.open("Match")
    visitor.sees("cannot do this: matching needs a checkpoint with itm_score")
    visitor.done("without_head")
    next(page, None)


def test_two_visitors_at_once(folder, url, chromium):
    visitors = [Visitor(chromium, url, size) for size in SIZES]
    asked = [("0.png", "what is left ?"), ("4.png", "what colour is the dog ?")]
    for visitor, (image, question) in zip(visitors, asked, strict=True):
        visitor.open("Question")
        visitor.upload(folder / "images" / image)
        visitor.panel.get_by_label("Question").fill(question)
    for visitor in visitors:
        visitor.press("Ask")
    for visitor, (image, question) in zip(visitors, asked, strict=True):
        best = answer_of(folder, image, question)[0]
        visitor.sees(best.text)
        visitor.sees(f"{best.score:.0%}")
