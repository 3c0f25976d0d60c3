"""A server of its own process, asked over a real socket by many at once; limits, clients that go away, and its end."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from tests import tiny
from tests.tables import VOCABULARY, encoded, picture
from vlmo.inference import Predictor

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow

IMAGES = [picture(seed) for seed in range(4)]
TEXTS = ["the red cat", "a dog runs on the table", "what is left", "a table"]
CLIENTS, REQUESTS = 12, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = tiny.model("task_mlm_itm_itc_base")
    model.vocabulary = list(dict.fromkeys(VOCABULARY))
    path = tmp_path_factory.mktemp("served") / "model"
    model.save_pretrained(path)
    return path


@contextmanager
def server(folder, *words):
    """Gives the process and its address; kills it at the end if it still runs."""
    command = [sys.executable, "-m", "vlmo.serve", str(folder), "--port", "0", "--threads", "1", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
        yield process, re.match(r"http://[\d.:]+\d", line)[0]
    finally:
        process.kill()
        process.communicate()


def body(number):
    image = base64.b64encode(encoded(IMAGES[number % 4])).decode()
    return {"image": image, "text": TEXTS[number // 4 % 4]}


def at_once(number, ask):
    """What `ask(i)` gives for each i, all started together."""
    together = threading.Barrier(number)

    def work(i):
        together.wait()
        return ask(i)

    with ThreadPoolExecutor(number) as clients:
        return list(clients.map(work, range(number)))


def metric(url, name):
    return float(re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{url}/metrics").text, re.M)[1])


def waits_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def test_many_clients_get_right_answers_from_batches(folder):
    predictor = Predictor.from_pretrained(folder, device="cpu")
    expected = [predictor.match(IMAGES[n % 4], TEXTS[n // 4 % 4]) for n in range(16)]
    features = predictor.embed_images(IMAGES)
    texts = predictor.embed_texts(TEXTS)

    def ask(client):
        with httpx.Client(base_url=url, timeout=60) as session:
            for request in range(REQUESTS):
                number = client * 5 + request
                given, kind = body(number), number % 3
                if kind == 0:
                    found, right = session.post("/match", json=given).json()["match"], expected[number % 16]
                elif kind == 1:
                    found = session.post("/embed/image", json={"image": given["image"]}).json()["embedding"]
                    right = features[number % 4].tolist()
                else:
                    found = session.post("/embed/text", json={"text": given["text"]}).json()["embedding"]
                    right = texts[number // 4 % 4].tolist()
                torch.testing.assert_close(torch.tensor(found), torch.tensor(right), atol=1e-5, rtol=0)

    with server(folder, "--wait-ms", "50") as (process, url):
        at_once(CLIENTS, ask)
        assert metric(url, "vlmo_batched_rows_total") == CLIENTS * REQUESTS
        assert metric(url, "vlmo_batches_total") < CLIENTS * REQUESTS / 2
        assert metric(url, "vlmo_queue_length") == 0


def test_limits(folder):
    words = ["--queue", "4", "--batch-size", "8", "--wait-ms", "1500", "--max-body", "200000", "--max-pixels", "5000"]
    with server(folder, *words) as (process, url):
        answers = at_once(12, lambda i: httpx.post(f"{url}/match", json=body(i), timeout=60))
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 8
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["Retry-After"] == "1" and "4 requests wait" in refused.json()["error"]
        large = {"image": base64.b64encode(encoded(picture(0, (100, 51)))).decode(), "text": "a"}
        answer = httpx.post(f"{url}/match", json=large)
        assert answer.status_code == 413 and "100 x 51 pixels" in answer.json()["error"]
        for size in (200_001, 30_000_000):  # (the second is still being sent when it is refused)
            answer = httpx.post(f"{url}/match", content=b"a" * size, timeout=60)
            assert answer.status_code == 413 and "longer than 200000 bytes" in answer.json()["error"]
        assert httpx.post(f"{url}/match", json=body(0), timeout=60).status_code == 200


def test_clients_that_go_away(folder):
    with server(folder, "--wait-ms", "1500") as (process, url):
        address = url.removeprefix("http://").split(":")
        data = json.dumps(body(0)).encode()
        head = f"POST /match HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        for sent in (data[:100], data):  # in the middle of the body; before the answer
            with socket.create_connection((address[0], int(address[1]))) as client:
                client.sendall(head + sent)
                if sent is data:
                    waits_for(lambda: metric(url, "vlmo_queue_length") == 1)
        waits_for(lambda: 'path="/match",status="499"} 2' in httpx.get(f"{url}/metrics").text)
        assert httpx.post(f"{url}/match", json=body(0), timeout=60).status_code == 200
        assert metric(url, "vlmo_batched_rows_total") == 1  # nothing was computed for nobody
        process.terminate()
        assert process.communicate(timeout=30)[1] == ""


def test_a_server_that_is_stopped_answers_what_it_has_taken(folder):
    predictor = Predictor.from_pretrained(folder, device="cpu")
    with server(folder, "--wait-ms", "2000") as (process, url), ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(httpx.post, f"{url}/match", json=body(i), timeout=60) for i in range(4)]
        waits_for(lambda: metric(url, "vlmo_queue_length") == 4)
        process.send_signal(signal.SIGTERM)
        for number, answer in enumerate(answers):
            right = predictor.match(IMAGES[number], TEXTS[0])
            assert answer.result().json()["match"] == pytest.approx(right, abs=1e-5)
        assert process.communicate(timeout=30)[1] == "" and process.returncode in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_an_address_that_is_taken_is_said_before_the_model_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = [sys.executable, "-m", "vlmo.serve", "nowhere.ckpt", "--port", str(other.getsockname()[1])]
        ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and "give another" in ended.stderr
