"""The endpoint, spoken to with OpenAI's own client."""

import asyncio
import http.client
import importlib
import json
import os
import random
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import NamedTuple

import pytest
from language_toys import make_toy
from real_command import call, start

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, load_engine, write_texts
from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.generation import Trees
from t2iprobe.llm.engine.processing import Sampling

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

KEY = "sesame"
MODEL = "toy"
CONTEXT = 256
TREES = Trees("optimal", 3)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant{{ '\\n' }}"
)
HELLO = [{"role": "user", "content": "hello there"}]
# Bytes as byte-level tokenizers write them; é is two tokens.
LETTERS = [*"ĠĊÃ©abcdefghijklmnopqrstuvwxyz"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def save_toy(folder: Path, endless: bool = False) -> Path:
    """Write a random Llama, with a tokenizer of bytes that has a chat template.

    An `endless` one has a long context, and at temperature 0 no text of its ends before.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *LETTERS]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    model = make_toy(layers=2, vocabulary=len(words), sharpness=2.0)
    if endless:
        model.lm_head.weight[SPECIAL.index("</s>")] = 0
        model.config.max_position_embeddings = 100_000
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("models") / MODEL)


class Served(NamedTuple):
    """A server in a thread, and its engine."""

    engine: Engine
    url: str

    def client(self, key: str = KEY, **how: object) -> "openai.OpenAI":
        return openai.OpenAI(base_url=self.url, api_key=key, **({"max_retries": 0, "timeout": 60} | how))


@pytest.fixture(scope="module")
def served(toy: Path) -> Iterator[Served]:
    from t2iprobe.llm.server import Writer, make_app

    with load_engine(str(toy), "early-exit:1") as engine:
        writer = Writer(engine, TREES)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(writer, KEY), lifespan="off", log_config=None, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield Served(engine, f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        server.should_exit = True
        thread.join()
        writer.close()


@pytest.fixture
def client(served: Served) -> Iterator["openai.OpenAI"]:
    with served.client() as client:
        yield client


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def complete(client: "openai.OpenAI", **asked: object):
    return client.completions.create(
        **({"model": MODEL, "prompt": "once upon", "max_tokens": 24, "seed": 1} | asked)
    )


def chat(client: "openai.OpenAI", **asked: object):
    return client.chat.completions.create(
        **({"model": MODEL, "messages": HELLO, "max_tokens": 24, "seed": 1} | asked)
    )


class TestModels:
    def test_lists_the_one_model(self, client):
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).object == "model"

    def test_another_model_does_not_exist(self, client):
        with pytest.raises(openai.NotFoundError, match="only 'toy'"):
            client.models.retrieve("gpt-4o")
        with pytest.raises(openai.NotFoundError) as refused:
            chat(client, model="gpt-4o")
        assert refused.value.code == "model_not_found"

    def test_another_path_is_answered_in_json(self, client):
        with pytest.raises(openai.NotFoundError) as refused:
            client.embeddings.create(model=MODEL, input="x")
        assert refused.value.type == "invalid_request_error"


class TestAnswers:
    @pytest.mark.parametrize("seed", [2, 3])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_the_text_is_the_engines_own(self, client, served, temperature, seed):
        for row, make in (({"prompt": "once upon"}, complete), ({"messages": HELLO}, chat)):
            how = {"trees": TREES, "max_new_tokens": 24, "raw": True}
            sampling = Sampling(temperature, top_k=20, top_p=0.9, seed=seed)
            (own,) = write_texts(served.engine, [row], sampling=sampling, **how)
            asked = {"temperature": temperature, "top_p": 0.9, "extra_body": {"top_k": 20}}
            answer = make(client, seed=seed, **asked)
            choice = answer.choices[0]
            text = choice.text if make is complete else choice.message.content
            assert text == own["text"]
            assert choice.finish_reason == {"eos": "stop", "length": "length"}[own["stop_reason"]]
            assert answer.usage.completion_tokens == len(own["token_ids"])
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(own["token_ids"])

    def test_the_prompt_is_counted_with_its_template(self, client):
        rendered = "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
        count = len(rendered) - len("<|im_start|>") * 2 - len("<|im_end|>") + 3
        assert chat(client).usage.prompt_tokens == count
        assert complete(client).usage.prompt_tokens == len("once upon")

    def test_a_prompt_may_be_tokens(self, client, served):
        ids = served.engine.tokenizer("once upon").input_ids
        texts = {complete(client, prompt=prompt).choices[0].text for prompt in ("once upon", ids, [ids])}
        assert len(texts) == 1

    def test_a_message_may_have_parts(self, client):
        parts = [{"type": "text", "text": "hello there"}]
        answers = [
            chat(client, messages=[{"role": "user", "content": each}]) for each in (parts, "hello there")
        ]
        assert answers[0].choices[0].message == answers[1].choices[0].message

    def test_defaults_are_openais(self, client):
        assert complete(client, max_tokens=openai.omit, temperature=0.0).usage.completion_tokens <= 16
        long = [{"role": "user", "content": "a" * (CONTEXT - 60)}]
        answer = chat(client, messages=long, max_tokens=openai.omit, temperature=0.0)
        assert answer.usage.completion_tokens > 16
        assert answer.usage.total_tokens == CONTEXT or answer.choices[0].finish_reason == "stop"

    def test_the_seed_decides(self, client):
        texts = [
            complete(client, seed=seed).choices[0].text for seed in (1, 1, 2, -5, openai.omit, openai.omit)
        ]
        assert texts[0] == texts[1]
        assert len(set(texts)) == 5

    def test_values_that_ask_for_nothing_are_accepted(self, client):
        nothing = {"n": 1, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "user": "me"}
        assert complete(client, **nothing | {"logprobs": None}).choices == complete(client).choices
        nothing |= {"stop": None, "store": False, "service_tier": "auto", "metadata": {"run": "1"}}
        nothing |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"]}
        nothing |= {"functions": [], "function_call": "none", "response_format": {"type": "text"}}
        nothing |= {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s"}
        nothing |= {"audio": None, "prediction": None, "reasoning_effort": None, "web_search_options": None}
        assert chat(client, **nothing).choices == chat(client).choices

    def test_an_answer_may_be_sent_back(self, client):
        said = chat(client).choices[0].message
        row = {"role": "assistant", "content": said.content}
        more = {"tool_calls": [], "annotations": [], "refusal": None, "audio": None, "function_call": None}
        back = [said.model_dump(), said, row, row | more]
        answers = [chat(client, messages=[*HELLO, each, *HELLO], max_tokens=4) for each in back]
        assert all(answer.choices == answers[0].choices for answer in answers)

    def test_the_coldest_temperatures_are_greedy(self, client):
        greedy = chat(client, temperature=0).choices
        assert all(chat(client, temperature=cold).choices == greedy for cold in (1e-300, 1e-38, 1e-6))


class TestStreams:
    @pytest.mark.parametrize("seed", [4, 5])
    @pytest.mark.parametrize("stop", [None, ["e", "qu"]])
    def test_the_parts_are_the_whole(self, client, seed, stop):
        asked = {"seed": seed, "stop": stop}
        whole = complete(client, **asked).choices[0]
        choices = [chunk.choices[0] for chunk in complete(client, **asked, stream=True)]
        assert "".join(choice.text for choice in choices) == whole.text
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [
            whole.finish_reason
        ]
        whole = chat(client, **asked).choices[0]
        choices = [chunk.choices[0] for chunk in chat(client, **asked, stream=True)]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content
        assert choices[-1].finish_reason == whole.finish_reason
        assert len(choices) > 3

    def test_usage_comes_last_where_it_is_asked_for(self, client):
        chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert chunks[-1].usage == chat(client).usage
        assert len({chunk.id for chunk in chunks}) == 1

    def test_a_stop_string_ends_the_text_and_is_never_seen(self, client):
        text = complete(client).choices[0].text
        stop = next(text[i : i + 3] for i in range(4, len(text)) if text[i : i + 3].isascii())
        found = complete(client, stop=stop).choices[0]
        assert found.text == text[: text.index(stop)]
        assert found.finish_reason == "stop"

    def test_no_part_is_taken_back(self):
        from t2iprobe.llm.parts import Parts

        class Bytes:
            def decode(self, tokens, skip_special_tokens):
                return bytes(tokens).decode(errors="replace")

        draws = random.Random(0)
        for _ in range(2000):
            stop = ["".join(draws.choices("abé", k=draws.randint(1, 4))) for _ in range(draws.randint(0, 2))]
            tokens = draws.choices([*b"ab", *"é".encode()], k=20)
            parts, told = Parts(Bytes(), stop), ""
            for end in range(1, len(tokens) + 1):
                told += parts.extend(tokens[end - 1 : end])
                text = bytes(tokens[:end]).decode(errors="replace")
                places = [text.index(each) for each in stop if each in text]
                if places:
                    text = text[: min(places)]
                    break
            assert text.startswith(told), (stop, tokens)
            assert told + parts.cut(text) == text


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "param", "code"),
        [
            ({"n": 2}, "n", "invalid_value"),
            ({"presence_penalty": 0.5}, "presence_penalty", "invalid_value"),
            ({"logprobs": True}, "logprobs", "invalid_value"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "invalid_value"),
            ({"response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
            ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
            ({"extra_body": {"beams": 4}}, "beams", "unsupported_parameter"),
            ({"temperature": 3}, "temperature", "invalid_value"),
            ({"temperature": "hot"}, "temperature", "invalid_value"),
            ({"top_p": 0}, "top_p", "invalid_value"),
            ({"max_tokens": 0}, "max_tokens", "invalid_value"),
            ({"stop": ""}, "stop", "invalid_value"),
            ({"messages": []}, "messages", "invalid_value"),
            (
                {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
                "messages",
                "invalid_value",
            ),
            ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
            ({"store": True}, "store", "invalid_value"),
            ({"service_tier": "flex"}, "service_tier", "invalid_value"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "invalid_value"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages",
                "invalid_value",
            ),
            ({"max_tokens": CONTEXT}, "messages", "context_length_exceeded"),
            (
                {"messages": [{"role": "user", "content": "x" * CONTEXT}]},
                "messages",
                "context_length_exceeded",
            ),
        ],
    )
    def test_a_chat_is_refused_by_the_parameters_name(self, client, asked, param, code):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, **asked)
        assert (refused.value.param, refused.value.code) == (param, code)
        assert refused.value.type == "invalid_request_error"
        assert param in refused.value.message

    @pytest.mark.parametrize(
        ("asked", "param", "code"),
        [
            ({"echo": True}, "echo", "invalid_value"),
            ({"best_of": 3}, "best_of", "invalid_value"),
            ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
            ({"suffix": "."}, "suffix", "invalid_value"),
            ({"prompt": ["a", "b"]}, "prompt", "invalid_value"),
            ({"prompt": [3, 999]}, "prompt", None),
            ({"prompt": ""}, "prompt", None),
            ({"prompt": "x" * CONTEXT, "max_tokens": openai.omit}, "prompt", "context_length_exceeded"),
        ],
    )
    def test_a_completion_is_refused_by_the_parameters_name(self, client, asked, param, code):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, **asked)
        assert (refused.value.param, refused.value.code) == (param, code)

    @pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'{"model": "toy"}', b'{"model": "\\ud800"}'])
    def test_a_body_that_is_no_request(self, client, body):
        with pytest.raises(openai.BadRequestError):
            client.post("/completions", content=body, cast_to=object)

    def test_filters_that_leave_no_token_are_the_requests_fault(self, client, caplog):
        asked = {"extra_body": {"repetition_penalty": 1e-300}}
        with pytest.raises(openai.BadRequestError, match="forbid every next token"):
            chat(client, **asked)
        with pytest.raises(openai.APIError, match="forbid every next token"):
            list(chat(client, **asked, stream=True))
        assert caplog.records == []

    def test_a_text_that_cannot_fit_is_not_read(self, client, monkeypatch):
        def read(*_: object, **__: object) -> None:
            raise AssertionError

        monkeypatch.setattr("t2iprobe.llm.server.encode_prompt", read)
        text = "x" * (CONTEXT * len("<|im_start|>") + 1)
        for asked in (
            lambda: chat(client, messages=[{"role": "user", "content": text}]),
            lambda: complete(client, prompt=text),
        ):
            with pytest.raises(openai.BadRequestError, match="cannot fit") as refused:
                asked()
            assert refused.value.code == "context_length_exceeded"

    def test_a_body_that_is_too_large(self, client, served):
        with pytest.raises(openai.APIStatusError, match="4194304 bytes") as refused:
            complete(client, prompt="x" * 5_000_000)
        assert refused.value.status_code == 413

        def parts() -> Iterator[bytes]:  # its length is not told before
            for _ in range(80):
                yield b"x" * 65536

        connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=60)
        connection.request(
            "POST", "/v1/completions", parts(), {"Authorization": f"Bearer {KEY}"}, encode_chunked=True
        )
        assert connection.getresponse().status == 413
        connection.close()
        assert complete(client).choices

    @pytest.mark.parametrize("key", ["wrong", KEY + "x"])
    def test_a_wrong_key(self, served, key):
        with served.client(key) as client, pytest.raises(openai.AuthenticationError) as refused:
            client.post("/completions", content=b"{", cast_to=object, options={"headers": {}})
        assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(("given", "status"), [(b"Bearer \xff\xc3", 200), (b"Bearer \xff", 401)])
def test_a_key_is_bytes(given, status):
    """As one of the environment may be."""
    from starlette.responses import Response

    from t2iprobe.llm.server import _Guard

    told = []

    async def send(message: dict) -> None:
        told.append(message)

    guard = _Guard(Response(), os.fsdecode(b"\xff\xc3"))
    asyncio.run(guard({"type": "http", "headers": [(b"authorization", given)]}, None, send))
    assert told[0]["status"] == status


class Gate:
    """Makes a decoder wait before every pass, and counts them."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        self.open = threading.Semaphore(0)
        forward = engine.target.forward

        def wait(*args: object, **how: object) -> object:
            self.passes += 1
            assert self.open.acquire(timeout=60)
            return forward(*args, **how)

        monkeypatch.setattr(engine.target, "forward", wait)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tells the bytes of all keys and values that are alive, of caches made from now on."""
    made: list[weakref.ref[RowCache]] = []
    new_cache = Decoder.new_cache

    def remember(*words: object) -> RowCache:
        cache = new_cache(*words)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Decoder, "new_cache", remember)
    return lambda: sum(cache.nbytes for each in made if (cache := each()) is not None)


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the texts that the server has cancelled."""
    from t2iprobe.llm.server import _Job

    count, cancel = threading.Semaphore(0), _Job.cancel
    monkeypatch.setattr(_Job, "cancel", lambda job: (cancel(job), count.release()))
    return count


class TestGone:
    def test_a_client_that_closes_its_stream(self, client, served, held, cancelled, monkeypatch):
        gate = Gate(served.engine, monkeypatch)
        gate.open.release(2)
        stream = chat(client, max_tokens=200, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        until(lambda: gate.passes == 3)  # in its third round
        assert held() > 0
        stream.close()
        assert cancelled.acquire(timeout=60)
        gate.open.release()
        until(lambda: held() == 0)
        assert gate.passes == 3
        gate.open.release(100)
        assert chat(client, max_tokens=4).choices[0].finish_reason

    def test_a_client_that_waits_no_longer(self, client, served, cancelled, monkeypatch):
        expected = complete(client).choices
        assert cancelled.acquire(timeout=60)  # of no effect on what is done
        gate = Gate(served.engine, monkeypatch)
        with pytest.raises(openai.APITimeoutError):
            complete(client.with_options(timeout=0.5))
        with pytest.raises(openai.APITimeoutError):  # one that has not begun
            complete(client.with_options(timeout=0.5))
        assert cancelled.acquire(timeout=60)
        assert cancelled.acquire(timeout=60)
        assert gate.passes == 1
        gate.open.release(1)
        monkeypatch.undo()
        assert complete(client).choices == expected
        assert gate.passes == 1

    def test_a_client_that_leaves_before_it_has_asked(self, client, served, caplog):
        host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        with socket.create_connection((host, int(port))) as half:
            half.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            time.sleep(0.1)
        assert complete(client).choices
        assert caplog.records == []


def test_clients_take_turns(client):
    seeds = range(3)
    alone = [complete(client, seed=seed).choices for seed in seeds]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda seed: complete(client, seed=seed).choices, seeds))
    assert together == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told_and_the_next_request_works(client, served, monkeypatch, stream):
    expected = chat(client).choices

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a layer broke")

    monkeypatch.setattr(served.engine.target, "forward", fail)
    with pytest.raises(openai.APIError, match="a layer broke") as told:
        list(chat(client, stream=stream))
    assert stream or told.value.status_code == 500
    monkeypatch.undo()
    assert chat(client).choices == expected


class TestCommand:
    @pytest.mark.parametrize("number", [SIGTERM, SIGINT])
    def test_serves_until_it_is_stopped(self, tmp_path, number):
        toy = save_toy(tmp_path / MODEL, endless=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = start("llm", "serve", "--model", toy, "--draft", "lookup", "--budget", 4, "--port", port)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)

        def answers() -> bool:
            with socket.socket() as trial:
                return trial.connect_ex(("127.0.0.1", port)) == 0

        until(answers, 200)
        assert chat(client).usage.completion_tokens <= 24
        stream = chat(client, stream=True, max_tokens=50_000, temperature=0)
        next(stream)
        done = command.kill_when(lambda: True, number)
        with pytest.raises(openai.APIError, match="the server ends"):
            list(stream)
        assert done.code == 0
        assert done.out == ""
        assert f"toy answers at http://127.0.0.1:{port}/v1" in done.err
        assert "Traceback" not in done.err

    def test_a_port_in_use(self, toy):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            words = ("--model", toy, "--draft", "lookup", "--budget", 4, "--port", port)
            done = call("llm", "serve", *words, code=2)
        assert f"port {port} (Address already in use)" in done.err

    @pytest.mark.parametrize(("host", "port"), [("nowhere.invalid", 0), ("127.0.0.1", 99999)])
    def test_an_address_that_is_none(self, host, port):
        from t2iprobe.llm.server import listen

        with pytest.raises(UserError, match="cannot listen on"):
            listen(host, port)

    def test_an_empty_key(self, served):
        from t2iprobe.llm.server import listen, serve_engine

        with listen("127.0.0.1", 0) as listener, pytest.raises(UserError, match="empty API key"):
            serve_engine(served.engine, TREES, listener, "")

    @pytest.mark.parametrize("package", ["uvicorn", "starlette"])
    def test_a_missing_extra(self, monkeypatch, package):
        monkeypatch.delitem(sys.modules, "t2iprobe.llm.server", raising=False)
        for name in [name for name in list(sys.modules) if name.split(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=r"pip install 't2iprobe\[serve\]'"):
            importlib.import_module("t2iprobe.llm.server")


def test_events_are_lines_of_ascii(client, served):
    """Some clients split lines at Unicode's own separators."""
    with served.client() as client:
        body = {"model": MODEL, "prompt": "o", "max_tokens": 40, "seed": 3, "stream": True}
        answer = client.completions.with_raw_response.create(**body)
        lines = answer.http_response.read().decode("ascii").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-2])
