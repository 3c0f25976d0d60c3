"""Serving: what is answered is what the model computes, together with others or alone; what is refused, and how."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests import tiny
from tests.tables import VOCABULARY, encoded, picture
from vlmo.errors import InputError
from vlmo.inference import Predictor
from vlmo.serve.app import Limits, create_app
from vlmo.serve.batching import Batcher, Busy

pytest.importorskip("fastapi")
testclient = pytest.importorskip("fastapi.testclient", reason="needs httpx")

IMAGES = [picture(seed) for seed in range(3)]
TEXTS = ["the red cat", "a dog runs on the table", "what is left"]


def served(task, limits=Limits()):  # noqa: B008
    model = tiny.model(task)
    model.vocabulary = list(dict.fromkeys(VOCABULARY))
    model.answers = ["yes", "no", "red", "blue"]
    predictor = Predictor(model)
    return predictor, testclient.TestClient(create_app(predictor, limits))


@pytest.fixture(scope="module")
def pairs():
    predictor, client = served("task_mlm_itm_itc_base", Limits(body=1 << 20, pixels=10_000))
    with client:
        yield predictor, client


@pytest.fixture(scope="module")
def questions():
    predictor, client = served("task_finetune_vqa_base_image480", Limits(wait=0.2))
    with client:
        yield predictor, client


def text_of(image):
    return base64.b64encode(encoded(image)).decode()


def test_every_endpoint_says_what_the_model_says(pairs):
    predictor, client = pairs
    image, text = IMAGES[0], TEXTS[0]
    given = {"image": text_of(image), "text": text}
    assert client.get("/health").json()["endpoints"] == ["/embed/image", "/embed/text", "/fill_mask", "/match"]
    assert client.post("/match", json=given).json()["match"] == pytest.approx(predictor.match(image, text), abs=1e-5)
    for side, embed, value in (("image", predictor.embed_images, image), ("text", predictor.embed_texts, text)):
        found = client.post(f"/embed/{side}", json={side: given[side]}).json()["embedding"]
        torch.testing.assert_close(torch.tensor(found), embed([value])[0], atol=1e-5, rtol=0)
    masked = client.post("/fill_mask", json={"text": "a [MASK]", "top_k": 2}).json()["masks"]
    assert [each["text"] for each in masked[0]] == [each.text for each in predictor.fill_mask("a [MASK]", top_k=2)[0]]


def test_two_users_at_once(questions):
    predictor, client = questions
    given = [
        {"image": f"data:image/png;base64,{text_of(i)}", "question": t} for i, t in zip(IMAGES, TEXTS, strict=True)
    ]
    with ThreadPoolExecutor(3) as users:
        answers = list(users.map(lambda row: client.post("/answer", json=row).json()["answers"], given))
    expected = predictor.answer(IMAGES, TEXTS, top_k=5)
    assert [[each["text"] for each in row] for row in answers] == [[each.text for each in row] for row in expected]
    printed = client.get("/metrics").text
    assert 'vlmo_requests_total{path="/answer",status="200"} 3' in printed
    assert "vlmo_batched_rows_total 3" in printed and "vlmo_batches_total 3" not in printed


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        ({"text": "a"}, 400, "image: is missing"),
        ({"image": text_of(IMAGES[0]), "text": " "}, 400, "text: must be a text"),
        ({"image": text_of(IMAGES[0]), "text": 3}, 400, "text: must be a text"),
        ({"image": "/etc/passwd", "text": "a"}, 400, "image: is not"),
        ({"image": "!", "text": "a"}, 400, "not base64"),
        ({"image": base64.b64encode(b"no image").decode(), "text": "a"}, 400, "no image that can be decoded"),
        ({"image": base64.b64encode(encoded(IMAGES[0])[:60]).decode(), "text": "a"}, 400, "no image"),
        ({"image": text_of(picture(0, (101, 100))), "text": "a"}, 413, "101 x 100 pixels"),
        ({"image": "a" * (1 << 20), "text": "a"}, 413, "longer than"),
        ({"image": text_of(IMAGES[0]), "text": "a" * 10_001}, 413, "longer than"),
        ({"image": text_of(IMAGES[0]), "text": "a", "colour": 1}, 400, "colour: is not known"),
    ],
)
def test_what_is_refused(pairs, body, status, said):
    response = pairs[1].post("/match", content=body if isinstance(body, bytes) else json.dumps(body))
    assert response.status_code == status and said in response.json()["error"]


def test_options_and_paths_that_there_are_not(pairs):
    client = pairs[1]
    assert "top_k" in client.post("/fill_mask", json={"text": "a [MASK]", "top_k": 0}).json()["error"]
    assert "no [MASK]" in client.post("/fill_mask", json={"text": "a"}).json()["error"]
    missing = client.post("/answer", json={})
    assert missing.status_code == 404 and "POST /match" in missing.json()["error"]


def test_too_many_requests_and_a_failure():
    predictor, client = served("task_finetune_vqa_base_image480", Limits(queue=0))
    given = {"image": text_of(IMAGES[0]), "question": "what"}
    with client:
        response = client.post("/answer", json=given)
        assert response.status_code == 429 and "Retry-After" in response.headers
    predictor, client = served("task_finetune_vqa_base_image480")
    predictor.compute = None
    with client:
        response = client.post("/answer", json=given)
        assert response.status_code == 500 and "log" in response.json()["error"]


def test_batches():
    seen, go = [], threading.Event()

    def compute(kind, rows):
        go.wait(5)
        seen.append((kind, rows))
        if "bad" in rows:
            raise InputError("bad")
        return [row.upper() for row in rows]

    batcher = Batcher(compute, batch_size=3, wait=0, limit=6)
    first = batcher.submit("x", "a")
    while len(batcher):
        time.sleep(0.001)
    rest = [
        batcher.submit(*each) for each in (("x", "b"), ("y", "c"), ("x", "d"), ("x", "bad"), ("x", "e"), ("y", "f"))
    ]
    with pytest.raises(Busy):
        batcher.submit("x", "g")
    go.set()
    batcher.close()
    assert first.result() == "A" and [rest[i].result() for i in (0, 1, 2, 4, 5)] == ["B", "C", "D", "E", "F"]
    assert isinstance(rest[3].exception(), InputError)
    assert [rows for kind, rows in seen if kind == "y"] == [["c", "f"]]
    assert ("x", ["b", "d", "bad"]) in seen and batcher.sizes == {1: 2, 2: 1, 3: 1}
