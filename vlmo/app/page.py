"""The page itself, of Gradio's parts: a tab for each thing that a visitor can do. What the tabs show comes from the
other modules of this package.

Nothing is fetched from outside: fonts are the system's, Gradio's own files come from this process.
"""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from vlmo.app.attention import choices, layer_pictures
from vlmo.app.browser import Browser
from vlmo.app.data_tabs import browse_tab, negatives_tab
from vlmo.app.image_folder import ImageFolder
from vlmo.app.limits import MOST_BYTES, MOST_CLASSES, Requests, checked_image, checked_text
from vlmo.app.models import ABILITIES, Models, as_bars
from vlmo.app.parts import Parts
from vlmo.errors import InputError

SHOWN_PAIRS = 3  # examples of two images
MOST_WAITING = 32  # requests that wait for their turn; further ones are told to come again
CSS = """
.gradio-container { width: 100%; max-width: 60em !important; margin: auto }
.note { border-left: 4px solid #c33; padding: .5em .8em; background: #c331 }
.note.told { border-color: #36c; background: #36c1 } .note .note { border: 0; padding: 0; background: none }
.token { display: inline-block; border: 1px solid #8886; border-radius: 3px; padding: 0 .3em; margin: .1em }
.masked { background: #f8b26a88 } .another { background: #e5737388 } .kept { background: #81c78488 }
.scroll { overflow-x: auto; overflow-wrap: anywhere; width: 0; min-width: 100% }
.scroll table { border: 0 !important }
.scroll td, .scroll th { padding: .3em .6em; vertical-align: top; min-width: 7em; border: 0 !important;
  border-bottom: 1px solid #8884 !important }
.grid-wrap.fixed-height { min-height: 0 !important; max-height: none !important }
.thumbnail-lg { display: flex; flex-direction: column; height: auto !important; aspect-ratio: auto !important }
.thumbnail-lg > img { flex: 1; min-height: 0 } .grid-container { grid-auto-rows: auto !important }
.caption-label { position: static !important; white-space: normal !important; max-width: 100% !important }
@media (max-width: 640px) {
  .gradio-container { padding: .4em !important; overflow-x: clip } .gradio-container .row { flex-wrap: wrap }
  .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important }
  .scroll td, .scroll th { padding: .3em; min-width: 4.5em }
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
        self.parts = Parts(examples, requests)
        self.gr = self.parts.gr
        self.models, self.folders, self.browser = models, folders, browser

    def build(self) -> Any:
        """Gives the Blocks."""
        with self.gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            self.gr.Markdown(f"# {TITLE}\nCheckpoints: {', '.join(self.models.by_name) or 'none'}")
            with self.gr.Tabs():
                if self.models.by_name:
                    for ability, (title, meaning) in ABILITIES.items():
                        with self.gr.Tab(title, id=ability):
                            self.gr.Markdown(meaning)
                            self._tab(ability)
                if self.browser:
                    with self.gr.Tab("Data", id="browse"):
                        browse_tab(self.parts, self.browser)
                    with self.gr.Tab("Negatives", id="negatives"):
                        negatives_tab(self.parts, self.browser, self.models)
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

    # --- what a model can do -----------------------------------------------------------------------------------------

    def _answer(self, model: Any) -> None:
        image = self.parts.image()
        question = self.gr.Textbox(label="Question", placeholder="what color is the square?")
        ask = self.gr.Button("Ask", variant="primary")
        note, answers = self.parts.note(), self.gr.Label(label="Answers", num_top_classes=5)

        def work(name: str, path: str, text: str) -> Any:
            picture, words = checked_image(path), checked_text(text, "question")
            return as_bars(self.models.get(name, "answer").answer(picture, words, top_k=5))

        self.parts.on([ask.click, question.submit], work, [model, image, question], [note, answers])
        self.parts.examples_of(image)

    def _match(self, model: Any) -> None:
        image = self.parts.image()
        texts = self.gr.Textbox(label="Texts, one a line", lines=3, placeholder="a red circle\na blue square")
        ask = self.gr.Button("Compare", variant="primary")
        note, scores = self.parts.note(), self.gr.Label(label="How well each fits, by itself")

        def work(name: str, path: str, text: str) -> Any:
            lines = [checked_text(line) for line in checked_text(text).splitlines() if line.strip()]
            found = self.models.get(name, "match").match(checked_image(path), lines)
            return as_bars(zip(lines, found, strict=True))

        self.parts.on([ask.click], work, [model, image, texts], [note, scores])
        self.parts.examples_of(image)

    def _search(self, model: Any) -> None:
        text = self.gr.Textbox(label="Text", placeholder="a red circle")
        by_text = self.gr.Button("Search by text", variant="primary")
        with self.gr.Accordion("or by an image", open=False):
            image = self.parts.image()
            by_image = self.gr.Button("Search by image", variant="primary")
            self.parts.examples_of(image)
        number = self.gr.Slider(1, 24, 9, step=1, label="How many")
        note, stop = self.parts.note(), self.gr.Button("Stop", visible=False)
        found = self.gr.Gallery(label="Found", columns=3, object_fit="contain", height="auto")

        def search(name: str, number: float, embed: Callable[[Any], Any]) -> Generator[str, None, Any]:
            predictor, folder = self.models.get(name, "search"), self.folders[name]
            for done, total in folder.refresh():
                yield f"Images are embedded before they can be searched, each once: {done:,} of {total:,} done."
            hits = folder.search(embed(predictor)[0], int(number))
            return [(path, f"{score:.3f}  {Path(path).name}") for path, score in hits]

        def by_words(name: str, words: str, number: float) -> Any:
            checked = checked_text(words)
            return search(name, number, lambda predictor: predictor.embed_texts([checked]))

        def by_picture(name: str, path: str, number: float) -> Any:
            picture = checked_image(path)
            return search(name, number, lambda predictor: predictor.embed_images([picture]))

        self.parts.on([by_text.click, text.submit], by_words, [model, text, number], [note, found], stop)
        self.parts.on([by_image.click], by_picture, [model, image, number], [note, found], stop)

    def _compare(self, model: Any) -> None:
        with self.gr.Row():
            left, right = self.parts.image("Left image", "left"), self.parts.image("Right image", "right")
        text = self.gr.Textbox(label="Statement", placeholder="there is a red circle in both pictures.")
        ask = self.gr.Button("Judge", variant="primary")
        note, judged = self.parts.note(), self.gr.Label(label="The statement is")

        def work(name: str, one: str, other: str, statement: str) -> Any:
            pictures = checked_image(one, "a left image"), checked_image(other, "a right image")
            true = self.models.get(name, "compare").compare(*pictures, checked_text(statement, "statement"))
            return {"true": true, "false": 1 - true}

        self.parts.on([ask.click, text.submit], work, [model, left, right, text], [note, judged])
        if self.parts.examples:
            pairs = zip(self.parts.examples, [*self.parts.examples[1:], self.parts.examples[0]], strict=True)
            self.gr.Examples([list(pair) for pair in pairs][:SHOWN_PAIRS], [left, right], label="Examples")

    def _fill_mask(self, model: Any) -> None:
        text = self.gr.Textbox(label="Text with [MASK]", placeholder="a [MASK] circle")
        with self.gr.Accordion("with an image, if you like", open=True):
            image = self.parts.image()
            self.parts.examples_of(image)
        ask = self.gr.Button("Fill in", variant="primary")
        note = self.parts.note()
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

        self.parts.on([ask.click, text.submit], work, [model, text, image], [note, *found])

    def _attention(self, model: Any) -> None:
        image = self.parts.image()
        text = self.gr.Textbox(label="Text", placeholder="a red circle")
        ask = self.gr.Button("Show", variant="primary")
        note = self.parts.note()
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

        self.parts.on([ask.click, text.submit], work, [model, image, text], [note, state, word, layers])
        self.parts.on([word.input], redraw, [state, word], [note, layers])
        self.parts.examples_of(image)

    def _classify(self, model: Any) -> None:
        image = self.parts.image()
        names = self.gr.Textbox(label="Classes, one a line or with commas", lines=3, placeholder="circle, square, star")
        template = self.gr.Textbox("a photo of a {}.", label="Sentence, with {} for the class")
        ask = self.gr.Button("Classify", variant="primary")
        note, classes = self.parts.note(), self.gr.Label(label="Classes", num_top_classes=10)

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

        self.parts.on([ask.click], work, [model, image, names, template], [note, classes])
        self.parts.examples_of(image)


def launch(page: Page, host: str, port: int, wait: bool = True) -> Any:
    """Serves the page; returns what stops it (`close()`), at once if it is not to wait."""
    gr = page.gr
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    blocks = page.build().queue(max_size=MOST_WAITING, api_open=False)
    allowed = [str(each.folder) for each in page.folders.values()] + page.parts.examples
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
