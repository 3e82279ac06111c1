"""``fedalt serve``: OpenAI's protocol over a socket, answers as each client's own model gives."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fedalt
from fedalt.config import load_config
from fedalt.errors import InputError
from fedalt.serving import decoding, protocol, serve
from fedalt.serving.decoding import Busy, Decoder, Piece, Request
from fedalt.serving.server import application
from tests.serving.test_load_clients import IDS, train

uvicorn = pytest.importorskip("uvicorn", reason="the extra fedalt[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra fedalt[serve] is not installed")


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    return train(tiny_base, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def server(finished):
    """Its address, while it runs in a thread."""
    model, tokenizer = fedalt.load_clients(finished, IDS)
    app = application(model, tokenizer, load_config(finished / "config.yaml").data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    assert "fedalt-decoder" not in {each.name for each in threading.enumerate()}


def ask(address, route, body=None):
    """Status and text of the answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"{address}{route}", data, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def completion(address, client, prompt, **more):
    body = {"model": client, "prompt": prompt, "max_tokens": 12, **more}
    status, text = ask(address, "/v1/completions", body)
    assert status == 200, text
    return json.loads(text)


def alone(finished, client, prompt):
    """Greedy text of the client's own model."""
    model, tokenizer = fedalt.load_client(finished, client)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    start = ids.new_full((1, 1), tokenizer.bos_token_id)
    ids = start.new_tensor([[*start[0].tolist(), *ids[0].tolist()]])
    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_requests_of_many_clients_at_once_are_answered_as_by_each_alone(server, finished):
    prompts = [(client, f"say {i}") for i in range(4) for client in IDS]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda pair: completion(server, *pair), prompts))
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [alone(finished, *pair) for pair in prompts]
    assert len(set(texts)) > 1
    one = answers[0]
    assert (one["object"], one["model"]) == ("text_completion", "ann")
    assert one["choices"][0]["finish_reason"] in ("stop", "length")
    assert one["usage"]["prompt_tokens"] == len("say 0") + 1


def test_a_stream_is_the_answer_in_pieces(server):
    body = {"model": "ann", "messages": [{"role": "user", "content": "say 2"}], "max_tokens": 8}
    whole = json.loads(ask(server, "/v1/chat/completions", body)[1])
    status, text = ask(server, "/v1/chat/completions", {**body, "stream": True})
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert (status, lines.pop()) == (200, "[DONE]")
    chunks = [json.loads(line) for line in lines]
    assert len(chunks) > 1
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"] != ""
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + [whole["choices"][0]["finish_reason"]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_stop_words_and_lengths_end_an_answer(server):
    text = completion(server, "ann", "say 2")["choices"][0]["text"]
    assert len(text) > 1
    cut = completion(server, "ann", "say 2", stop=text[1:3])
    assert cut["choices"][0]["text"] == text[: text.find(text[1:3])]
    assert cut["choices"][0]["finish_reason"] == "stop"
    short = completion(server, "ann", "say 2", max_tokens=1)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 1
    assert completion(server, "ann", "say 2", temperature=1.5, top_p=0.9)["choices"]


def test_models_and_health(server):
    status, text = ask(server, "/v1/models")
    assert (status, [row["id"] for row in json.loads(text)["data"]]) == (200, list(IDS))
    assert ask(server, "/health") == (200, '{"status":"ok"}')


GOOD = {"model": "ann", "prompt": "say 1"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        ([], 400, "the body must be a JSON object"),
        ({**GOOD, "model": "dan"}, 404, "no client 'dan'; known: ann, bob, cyd"),
        ({**GOOD, "model": 3}, 400, "model must be a client's id, got 3"),
        ({**GOOD, "prompt": ["a"]}, 400, "prompt must be a text"),
        ({**GOOD, "max_tokens": 0}, 400, "max_tokens must be a whole number of at least 1"),
        ({**GOOD, "max_tokens": 1000}, 400, "are more than the model's 256"),
        ({**GOOD, "temperature": "hot"}, 400, "temperature must be a number from 0 to 2"),
        ({**GOOD, "top_p": 0}, 400, "top_p must be a number from 0.01 to 1"),
        ({**GOOD, "stop": [1]}, 400, "stop must be a text or a list of texts"),
        ({**GOOD, "stream": "yes"}, 400, "stream must be true or false"),
        ({**GOOD, "n": 2}, 400, "n must be 1, got 2"),
        ({**GOOD, "logit_bias": {}}, 400, "logit_bias is not known here; take it out"),
    ],
)
def test_malformed_requests_are_answered_in_one_line(server, body, status, message):
    got, text = ask(server, "/v1/completions", body)
    told = json.loads(text)["error"]["message"]
    assert (got, "\n" in told) == (status, False)
    assert message in told


def test_messages_must_be_texts():
    for messages in ([], "hello", [{"role": "user"}], [{"role": "user", "content": [1]}]):
        with pytest.raises(InputError, match="messages must"):
            protocol.read({"model": "ann", "messages": messages}, chat=True)


def test_what_is_not_there_is_named(finished, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"config.yaml: cannot read"):
        serve(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: cannot listen at 127.0.0.1:{port}: "):
            serve(finished, port=port)
    with pytest.raises(InputError, match=r"--port: cannot listen at 127\.0\.0\.1:70000"):
        serve(finished, port=70000)
    for package in ("uvicorn", "fastapi"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"wants {package}: pip install 'fedalt\[serve\]'"):
            serve(finished)


class Failing:
    """A model whose generate waits to be let go, then fails."""

    def __init__(self):
        self.go = threading.Event()

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, *args, **kwargs):
        self.go.wait(10)
        raise RuntimeError("out of memory\nmore")


def test_failures_full_queues_and_closing_are_told(finished, monkeypatch):
    _, tokenizer = fedalt.load_clients(finished, ["ann"])
    monkeypatch.setattr(decoding, "MOST_WAITING", 1)
    monkeypatch.setattr(decoding, "MOST_ROWS", 1)
    model, told = Failing(), []
    decoder = Decoder(model, tokenizer)
    decoder.put(Request("ann", [1, 2], told.append))
    while decoder._waiting:
        time.sleep(0.01)
    decoder.put(Request("ann", [1, 2], told.append))
    with pytest.raises(Busy, match="1 requests wait; try again later"):
        decoder.put(Request("ann", [1, 2], told.append))
    closing = threading.Thread(target=decoder.close)
    closing.start()
    while not decoder._closed:
        time.sleep(0.01)
    model.go.set()
    closing.join(10)
    assert told == [Piece("out of memory", "error"), Piece("the server is closing", "error")]
    with pytest.raises(Busy):
        decoder.put(Request("ann", [1, 2], told.append))


def test_letters_in_two_tokens_and_stop_words_are_held_back(finished):
    _, tokenizer = fedalt.load_clients(finished, ["ann"])
    told = []
    request = Request("ann", [1], told.append, 20, stop=("END",))
    row = decoding._Row(request, tokenizer)
    for token in tokenizer("é ENé END x", add_special_tokens=False)["input_ids"]:
        row.take(token)
    assert "".join(piece.text for piece in told) == "é ENé "
    assert (told[0].text, told[-1].end) == ("é", "stop")
    assert not any("�" in piece.text for piece in told)


def test_openais_own_client_understands(server):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == list(IDS)
    asked = {"model": "bob", "messages": [{"role": "user", "content": "say 2"}], "max_tokens": 8}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole != ""
    made = client.completions.create(model="bob", prompt="say 2", max_tokens=8)
    assert made.usage.completion_tokens <= 8
    with pytest.raises(openai.NotFoundError, match="no client 'dan'"):
        client.chat.completions.create(**{**asked, "model": "dan"})
    with pytest.raises(openai.BadRequestError, match="n must be 1"):
        client.chat.completions.create(**asked, n=2)
    client.close()


def listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_serves_until_it_is_interrupted(finished):
    command = [sys.executable, "-m", "fedalt", "serve", str(finished), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background has them, and what they start, ignore the signal.
    with subprocess.Popen(command, **pipes, preexec_fn=listen_to_interrupts) as process:
        line = process.stdout.readline()
        assert line.startswith("3 clients at http://127.0.0.1:"), process.stderr.read()
        address = line.split()[3].removesuffix("/v1;")
        assert completion(address, "cyd", "say 1")["choices"][0]["text"]
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "fedalt: interrupted; the clients are as they were"
    assert "Traceback" not in told
