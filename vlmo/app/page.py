"""The page itself, of Gradio's parts: a tab for each thing that a visitor can do. What the tabs show comes from the
other modules of this package.

Nothing is fetched from outside: fonts are the system's, Gradio's own files come from this process.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from vlmo.app.attention import choices, layer_pictures  # noqa: E402
from vlmo.app.browser import FILTERS, MOST_PAIRS, Browser, Sample  # noqa: E402
from vlmo.app.image_folder import ImageFolder  # noqa: E402
from vlmo.app.limits import MOST_BYTES, MOST_CLASSES, Requests, checked_image, checked_text  # noqa: E402
from vlmo.app.models import ABILITIES, Models, as_bars  # noqa: E402
from vlmo.errors import InputError, VLMoError  # noqa: E402
from vlmo.pages import Html, image_uri, markup, table  # noqa: E402

log = logging.getLogger(__name__)

MOST_WAITING = 32  # requests that wait for their turn; further ones are told to come again
CSS = """
.gradio-container { max-width: 60em !important; margin: auto }
.note { border-left: 4px solid #c33; padding: .5em .8em; background: #c331 }
.token { display: inline-block; border: 1px solid #8886; border-radius: 3px; padding: 0 .3em; margin: .1em }
.masked { background: #f8b26a88 } .another { background: #e5737388 } .kept { background: #81c78488 }
.scroll { overflow-x: auto; overflow-wrap: anywhere; width: 0; min-width: 100% }
.scroll td { padding: .3em .6em; vertical-align: top; min-width: 7em }
.caption-label { white-space: normal !important; max-width: 100% !important }
@media (max-width: 640px) {
  .gradio-container { padding: .4em !important; overflow-x: clip } .gradio-container .row { flex-wrap: wrap }
  .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important }
}
"""
TITLE = "VLMo"


class Page:
    """Builds the tabs.

    Args:
        models: the checkpoints.
        folders: by checkpoint, what its visitors can search; empty without a folder.
        browser: the data; None without.
        examples: paths of images.
    """

    def __init__(
        self,
        models: Models,
        folders: dict[str, ImageFolder],
        browser: Browser | None,
        examples: Sequence[str],
        requests: Requests,
    ) -> None:
        import gradio

        self.gr = gradio
        self.models, self.folders, self.browser = models, folders, browser
        self.examples, self.requests = list(examples), requests
        self._one_at_a_time = threading.Lock()  # the models are everybody's

    def build(self) -> Any:
        """Gives the Blocks."""
        with self.gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            self.gr.Markdown(f"# {TITLE}\n{', '.join(self.models.by_name) or 'no checkpoint'}")
            with self.gr.Tabs():
                if self.models.by_name:
                    for ability, (title, meaning) in ABILITIES.items():
                        with self.gr.Tab(title, id=ability):
                            self.gr.Markdown(meaning)
                            self._tab(ability)
                if self.browser:
                    with self.gr.Tab("Data", id="browse"):
                        self._browse(self.browser)
                    with self.gr.Tab("Negatives", id="negatives"):
                        self._negatives(self.browser)
        return page

    def _tab(self, ability: str) -> None:
        """What a visitor can do; or, in a sentence, why none of the checkpoints can."""
        able = self.models.able(ability)
        if not able:
            self.gr.Markdown(self.models.why_not(ability))
            return
        if ability == "search" and not self.folders:
            self.gr.Markdown("There is no folder to search: start the page with `--images FOLDER`.")
            return
        model = self.gr.Dropdown(able, value=able[0], label="Checkpoint", visible=len(able) > 1)
        getattr(self, f"_{ability}")(model)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _image(self, label: str = "Image", name: str = "image") -> Any:
        """An image is handed on as it was uploaded: it is looked at by `checked_image`, which says what is wrong."""
        image = self.gr.Image(
            label=label,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard", "webcam"],
            height=300,
            elem_classes=name,
            buttons=["fullscreen"],
        )
        image.preprocess = lambda payload: payload.path if payload else None
        return image

    def _examples(self, image: Any, others: Sequence[Any] = (), values: Sequence[Any] = ()) -> None:
        if self.examples:
            rows = [[path, *values] for path in self.examples]
            self.gr.Examples(rows, [image, *others], examples_per_page=8, label="Examples")

    def _note(self) -> Any:
        return self.gr.Markdown(elem_classes="note", visible=False)

    def _on(
        self, triggers: Sequence[Any], work: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Has `work` done when any of the triggers fires; the first output is the note for what went wrong."""
        count = len(outputs) - 1

        def answer(request: Any, *given: Any) -> Any:
            try:
                self.requests.count(_visitor(request))
                with self._one_at_a_time:
                    found = work(*given)
            except VLMoError as error:
                return self.gr.Markdown(str(error), visible=True), *[None] * count
            return self.gr.Markdown("", visible=False), *(found if count > 1 else [found])

        answer.__annotations__["request"] = self.gr.Request  # (by which Gradio knows to hand it over)
        self.gr.on(triggers, answer, inputs, outputs, api_visibility="private", concurrency_limit=2)

    # --- what a model can do -----------------------------------------------------------------------------------------

    def _answer(self, model: Any) -> None:
        image = self._image()
        question = self.gr.Textbox(label="Question", placeholder="what color is the square?")
        ask = self.gr.Button("Ask", variant="primary")
        note, answers = self._note(), self.gr.Label(label="Answers", num_top_classes=5)

        def work(name: str, path: str, text: str) -> Any:
            picture, words = checked_image(path), checked_text(text, "question")
            return as_bars(self.models.get(name, "answer").answer(picture, words, top_k=5))

        self._on([ask.click, question.submit], work, [model, image, question], [note, answers])
        self._examples(image)

    def _match(self, model: Any) -> None:
        image = self._image()
        texts = self.gr.Textbox(label="Texts, one a line", lines=3, placeholder="a red circle\na blue square")
        ask = self.gr.Button("Compare", variant="primary")
        note, scores = self._note(), self.gr.Label(label="How well each fits, by itself")

        def work(name: str, path: str, text: str) -> Any:
            lines = [checked_text(line) for line in checked_text(text).splitlines() if line.strip()]
            found = self.models.get(name, "match").match(checked_image(path), lines)
            return as_bars(zip(lines, found, strict=True))

        self._on([ask.click], work, [model, image, texts], [note, scores])
        self._examples(image)

    def _search(self, model: Any) -> None:
        text = self.gr.Textbox(label="Text", placeholder="a red circle")
        by_text = self.gr.Button("Search by text", variant="primary")
        with self.gr.Accordion("or by an image", open=False):
            image = self._image()
            by_image = self.gr.Button("Search by image", variant="primary")
            self._examples(image)
        number = self.gr.Slider(1, 24, 9, step=1, label="How many")
        note, found = self._note(), self.gr.Gallery(label="Found", columns=3, object_fit="contain", height="auto")

        def search(name: str, number: float, embed: Callable[[Any], Any]) -> Any:
            predictor = self.models.get(name, "search")
            folder = self.folders[name]
            folder.refresh()
            hits = folder.search(embed(predictor)[0], int(number))
            return [(path, f"{score:.3f}  {Path(path).name}") for path, score in hits]

        def by_words(name: str, words: str, number: float) -> Any:
            checked = checked_text(words)
            return search(name, number, lambda predictor: predictor.embed_texts([checked]))

        def by_picture(name: str, path: str, number: float) -> Any:
            picture = checked_image(path)
            return search(name, number, lambda predictor: predictor.embed_images([picture]))

        self._on([by_text.click, text.submit], by_words, [model, text, number], [note, found])
        self._on([by_image.click], by_picture, [model, image, number], [note, found])

    def _compare(self, model: Any) -> None:
        with self.gr.Row():
            left, right = self._image("Left image", "left"), self._image("Right image", "right")
        text = self.gr.Textbox(label="Statement", placeholder="there is a red circle in both pictures.")
        ask = self.gr.Button("Judge", variant="primary")
        note, judged = self._note(), self.gr.Label(label="The statement is")

        def work(name: str, one: str, other: str, statement: str) -> Any:
            pictures = checked_image(one, "a left image"), checked_image(other, "a right image")
            true = self.models.get(name, "compare").compare(*pictures, checked_text(statement, "statement"))
            return {"true": true, "false": 1 - true}

        self._on([ask.click, text.submit], work, [model, left, right, text], [note, judged])
        if self.examples:
            pairs = list(zip(self.examples, [*self.examples[1:], self.examples[0]], strict=True))
            self.gr.Examples([list(pair) for pair in pairs], [left, right], label="Examples")

    def _fill_mask(self, model: Any) -> None:
        text = self.gr.Textbox(label="Text with [MASK]", placeholder="a [MASK] circle")
        with self.gr.Accordion("with an image, if you like", open=True):
            image = self._image()
            self._examples(image)
        ask = self.gr.Button("Fill in", variant="primary")
        note = self._note()
        found = [
            self.gr.Label(label=f"[MASK] {number}", num_top_classes=5, visible=number == 1) for number in (1, 2, 3)
        ]

        def work(name: str, words: str, path: str) -> Any:
            predictor = self.models.get(name, "fill_mask")
            checked = checked_text(words).replace("[mask]", "[MASK]")
            picture = checked_image(path) if path else None
            masks = predictor.fill_mask(checked, picture)[: len(found)]
            bars = [as_bars(each) for each in masks]
            shown = [self.gr.Label(value=each, visible=True) for each in bars]
            return [*shown, *(self.gr.Label(value=None, visible=False) for _ in range(len(found) - len(bars)))]

        self._on([ask.click, text.submit], work, [model, text, image], [note, *found])

    def _attention(self, model: Any) -> None:
        image = self._image()
        text = self.gr.Textbox(label="Text", placeholder="a red circle")
        ask = self.gr.Button("Show", variant="primary")
        note = self._note()
        word = self.gr.Dropdown([], label="Word", interactive=True)
        layers = self.gr.Gallery(label="Layer by layer", columns=3, object_fit="contain", height="auto")
        state = self.gr.State()

        def work(name: str, path: str, words: str) -> Any:
            picture, checked = checked_image(path), checked_text(words)
            shown = self.models.get(name, "attention").attention(picture, checked)
            names = choices(shown)
            return shown, self.gr.Dropdown(names, value=names[0]), layer_pictures(shown, names[0])

        def redraw(shown: Any, choice: str) -> Any:
            return layer_pictures(shown, choice) if shown else None

        self._on([ask.click, text.submit], work, [model, image, text], [note, state, word, layers])
        self._on([word.input], redraw, [state, word], [note, layers])
        self._examples(image)

    def _classify(self, model: Any) -> None:
        image = self._image()
        names = self.gr.Textbox(label="Classes, one a line or with commas", lines=3, placeholder="circle, square, star")
        template = self.gr.Textbox("a photo of a {}.", label="Sentence, with {} for the class")
        ask = self.gr.Button("Classify", variant="primary")
        note, classes = self._note(), self.gr.Label(label="Classes", num_top_classes=10)

        def work(name: str, path: str, given: str, sentence: str) -> Any:
            parts = [
                each.strip() for line in checked_text(given, "list of classes").splitlines() for each in line.split(",")
            ]
            listed = list(dict.fromkeys(part for part in parts if part))[:MOST_CLASSES]
            sentence = checked_text(sentence, "sentence")
            if "{}" not in sentence:
                raise InputError("The sentence has no {}: write it where the name of the class belongs.")
            predictor = self.models.get(name, "classify")
            sentence = sentence.replace("{}", "\0").replace("{", "{{").replace("}", "}}").replace("\0", "{}")
            return as_bars(predictor.classify([checked_image(path)], listed, [sentence])[0])

        self._on([ask.click], work, [model, image, names, template], [note, classes])
        self._examples(image)

    # --- data --------------------------------------------------------------------------------------------------------

    def _browse(self, browser: Browser) -> None:
        names = browser.names
        with self.gr.Row():
            dataset = self.gr.Dropdown(names, value=names[0], label="Data set and split")
            number = self.gr.Number(0, label="Sample", precision=0, minimum=0)
            seed = self.gr.Number(0, label="Epoch (seed of augmentation and masking)", precision=0, minimum=0)
        with self.gr.Row():
            back, show, forth = self.gr.Button("←"), self.gr.Button("Show", variant="primary"), self.gr.Button("→")
        with self.gr.Accordion("Search and filter", open=False):
            words = self.gr.Textbox(label="Text has these words")
            kept = self.gr.Dropdown(list(FILTERS), value=FILTERS[0], label="Only those")
            look = self.gr.Button("Search from the sample on")
            hits = self.gr.Textbox(label="Found", interactive=False, lines=2)
        note = self._note()
        images = self.gr.Gallery(label="Before and after augmentation", columns=2, object_fit="contain", height="auto")
        text = self.gr.Textbox(label="Text", interactive=False)
        tokens = self.gr.HTML(label="Tokens", show_label=True)
        facts = self.gr.HTML()
        outputs = [note, number, images, text, tokens, facts]

        def open_at(step: int) -> Callable[..., Any]:
            def work(name: str, at: float, epoch: float) -> Any:
                place = min(max(int(at or 0) + step, 0), browser.size(name) - 1) if step else int(at or 0)
                return place, *shown_sample(browser.sample(name, place, int(epoch or 0)))

            return work

        def search(name: str, text_has: str, only: str, at: float) -> Any:
            found, end = browser.find(name, text_has or "", only, int(at or 0))
            size = browser.size(name)
            told = ", ".join(map(str, found)) or "nothing"
            return f"{told} (looked at {int(at or 0):,} to {end - 1:,} of {size:,})", found[0] if found else int(
                at or 0
            )

        self._on([show.click, number.submit, dataset.input], open_at(0), [dataset, number, seed], outputs)
        self._on([back.click], open_at(-1), [dataset, number, seed], outputs)
        self._on([forth.click], open_at(1), [dataset, number, seed], outputs)
        self._on([look.click, words.submit], search, [dataset, words, kept, number], [note, hits, number])

    def _negatives(self, browser: Browser) -> None:
        able = self.models.able("search")
        if not able:
            self.gr.Markdown(
                self.models.why_not("search")
                or "Hard negatives are drawn by a contrast: start the page with a `--checkpoint` that has one."
            )
            return
        model = self.gr.Dropdown(able, value=able[0], label="Checkpoint", visible=len(able) > 1)
        with self.gr.Row():
            dataset = self.gr.Dropdown(browser.names, value=browser.names[0], label="Data set and split")
            start = self.gr.Number(0, label="First sample", precision=0, minimum=0)
            size = self.gr.Slider(2, MOST_PAIRS, 8, step=1, label="Batch")
        draw = self.gr.Button("Draw", variant="primary")
        note = self._note()
        drawn = self.gr.HTML()

        def work(name: str, data: str, first: float, count: float) -> Any:
            return negatives_table(
                browser.negatives(data, int(first or 0), int(count), self.models.get(name, "search"))
            )

        self._on([draw.click], work, [model, dataset, start, size], [note, drawn])


def tokens_line(tokens: Sequence[tuple[str, str]]) -> str:
    """Gives tokens as markup, with what becomes of each."""
    kinds = dict.fromkeys(kind for _, kind in tokens if kind)
    legend = " ".join(f'<span class="token {kind}">{kind}</span>' for kind in kinds)
    line = "".join(f'<span class="token {kind}">{markup(token)}</span>' for token, kind in tokens)
    return f"{line}<br><small>{legend}</small>"


def negatives_table(rows: Sequence[dict[str, Any]]) -> str:
    """Gives pairs with what was drawn against them, as markup."""

    def picture(image: Any) -> Html:
        return Html(f'<img alt="" width="120" src="{image_uri(image)}">')

    cells = [
        [
            picture(row["image"]),
            row["text"],
            f"{row['other text']} ({row['chance of text']:.0%})",
            Html(f"{picture(row['other image'])}<br>({row['chance of image']:.0%})"),
        ]
        for row in rows
    ]
    return table(["image", "text", "text drawn against the image", "image drawn against the text"], cells)


def shown_sample(found: Sample) -> tuple[Any, ...]:
    """Gives images with captions, text, tokens and facts, as the page shows them.

    Raises:
        InputError: for a sample that cannot be read, saying why.
    """
    if found.problem:
        raise InputError(f"Sample {found.facts['number']:,} cannot be read: {found.problem}")
    before = [(image, f"as it is, {image.width} x {image.height}") for image in found.before]
    after = [(image, f"as the model sees it, {image.width} x {image.height}") for image in found.after]
    return (
        [*before, *after],
        found.text,
        tokens_line(found.tokens),
        table(["", ""], found.facts.items(), plain=True),
    )


def _visitor(request: Any) -> str:
    return str(getattr(getattr(request, "client", None), "host", "") or getattr(request, "session_hash", ""))


def launch(page: Page, host: str, port: int, wait: bool = True) -> Any:
    """Serves the page; returns what stops it (`close()`), at once if it is not to wait."""
    gr = page.gr
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    blocks = page.build().queue(max_size=MOST_WAITING, api_open=False)
    allowed = [str(each.folder) for each in page.folders.values()] + page.examples
    blocks.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=not wait,
        theme=gr.themes.Default(**fonts),
        css=CSS,
        footer_links=[],
        max_file_size=MOST_BYTES,
        allowed_paths=allowed,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        strict_cors=True,
    )
    return blocks
