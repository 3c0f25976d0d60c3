"""What the tabs of the page are made of: images, notes, examples, and what happens when a button is pressed."""

import os
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from vlmo.app.limits import Requests  # noqa: E402
from vlmo.errors import VLMoError  # noqa: E402


class Parts:
    """Makes parts of the page, and has work done for its visitors: one at a time, as the models are everybody's.

    Args:
        examples: paths of images.
    """

    def __init__(self, examples: Sequence[str], requests: Requests) -> None:
        import gradio

        self.gr = gradio
        self.examples, self.requests = list(examples), requests
        self._one_at_a_time = threading.Lock()

    def image(self, label: str = "Image", name: str = "image") -> Any:
        """An image is handed on as it was uploaded: it is looked at by `checked_image`, which says what is wrong."""
        image = self.gr.Image(
            label=label,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard", "webcam"],
            height=300,
            elem_classes=name,
            buttons=["fullscreen"],
            webcam_options=self.gr.WebcamOptions(mirror=False),  # (left would be right)
        )
        image.preprocess = lambda payload: payload.path if payload else None
        return image

    def examples_of(self, image: Any) -> None:
        """Pictures to begin with."""
        if self.examples:
            self.gr.Examples([[path] for path in self.examples], [image], examples_per_page=8, label="Examples")

    def note(self) -> Any:
        """A place for what went wrong."""
        return self.gr.Markdown(elem_classes="note", visible=False)

    def on(
        self,
        triggers: Sequence[Any],
        work: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        stop: Any = None,
    ) -> None:
        """Has `work` done when any of the triggers fires.

        Args:
            work: gives a value for each output but the first. Work that takes long is a generator, which yields a
                sentence now and then: meanwhile others have their turn.
            outputs: the first is the note for what went wrong.
            stop: a button that ends such work; it is there while the work is done.
        """
        count = len(outputs) - 1
        stops = [] if stop is None else [stop]

        def told(sentence: str, *values: Any, wrong: bool = False, working: bool = False) -> tuple[Any, ...]:
            note = self.gr.Markdown(
                sentence, visible=bool(sentence), elem_classes=["note"] if wrong else ["note", "told"]
            )
            return note, *values, *(self.gr.Button(visible=working) for _ in stops)

        def answer(request: Any, *given: Any) -> Any:
            try:
                self.requests.count(_visitor(request))
                with self._one_at_a_time:
                    found = work(*given)
                if isinstance(found, Generator):
                    found = yield from self._bit_by_bit(found, told, count)
            except VLMoError as error:
                yield told(str(error), *[None] * count, wrong=True)
            else:
                yield told("", *(found if count > 1 else [found]))

        answer.__annotations__["request"] = self.gr.Request  # (by which Gradio knows to hand it over)
        started = self.gr.on(
            triggers, answer, inputs, [*outputs, *stops], api_visibility="private", concurrency_limit=2
        )
        for button in stops:
            button.click(
                lambda: told("Stopped; what was done so far is kept.", *[self.gr.skip()] * count),
                None,
                [*outputs, *stops],
                cancels=[started],
                api_visibility="private",
            )

    def _bit_by_bit(
        self, work: Generator[str, None, Any], told: Callable[..., tuple[Any, ...]], count: int
    ) -> Generator[Any, None, Any]:
        while True:
            with self._one_at_a_time:
                try:
                    sentence = next(work)
                except StopIteration as end:
                    return end.value
            yield told(sentence, *[self.gr.skip()] * count, working=True)


def _visitor(request: Any) -> str:
    return str(getattr(getattr(request, "client", None), "host", "") or getattr(request, "session_hash", ""))
