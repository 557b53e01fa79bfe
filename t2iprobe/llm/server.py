"""An endpoint that OpenAI's clients talk to: models, completions and chat, whole or streamed.

One text is written at a time, in a thread of its own; requests wait for each other. The defaults are
OpenAI's (temperature 1, 16 tokens of a completion, a chat's answer up to the end of the context); what
cannot be done is refused by the parameter's name, never ignored.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, encode_prompt
from t2iprobe.llm.engine.generation import Generated, Trees, generate
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.parts import Parts

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise UserError(f"a server needs the package {error.name}: pip install 't2iprobe[serve]'") from None

__all__ = ["Writer", "listen", "make_app", "serve_engine"]

# Tokens of a chat's answer where neither the request nor the model's context ends it.
_MOST_TOKENS = 4096
# Bytes of a request for each token of the model's context, and at least: ten times what texts need.
_TOKEN_BYTES, _LEAST_BYTES = 64, 4 << 20
# Below, a temperature draws the most probable token as 0 does, and logits divided by it overflow.
_COLDEST = 1e-6
# Seconds in which clients must have read that the server ends.
_GRACE = 2


# -- requests ------------------------------------------------------------------------------------------


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """Return it as a response."""
        return JSONResponse(self.body, self.status)


def _join_parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("a message's parts must be texts")
    return "\n".join(part["text"] for part in content)


def _take_only(prompt: Any) -> Any:
    """Take the prompt out of a list of one."""
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and prompt[0] != [] else prompt


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


_StopText = Annotated[str, StringConstraints(min_length=1)]
_StopTexts = Annotated[list[_StopText], BeforeValidator(_listed)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_Nothing = Annotated[list[Any], Field(max_length=0)]


class _Part(BaseModel):
    """A JSON object of which null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class _Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    name: str = ""
    # As clients send answers back.
    tool_calls: _Nothing = []
    annotations: _Nothing = []

    def row(self) -> dict[str, str]:
        """Return it as chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class _StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Ask(_Part):
    """What both kinds of request share."""

    model: str
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: _StopTexts = []
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # OpenAI has none of these.
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    # Known, and accepted only with the value that asks for nothing.
    n: Literal[1] = 1
    frequency_penalty: _Zero = 0.0
    presence_penalty: _Zero = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    # Of no effect on the text.
    user: str = ""

    # Tokens to write at most where the request names no number; None: up to the end of the context.
    default_tokens: ClassVar[int | None] = None

    @property
    def tokens(self) -> int | None:
        """Tokens to write at most, None where that is left open."""
        return self.max_tokens

    @property
    def characters(self) -> int:
        """Characters of the texts to be read."""
        raise NotImplementedError

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; without a seed by a new one each time."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        temperature = self.temperature if self.temperature >= _COLDEST else 0.0
        filters = (self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.no_repeat_ngram)
        return Sampling(temperature, *filters, seed)


class _CompletionAsk(_Ask):
    prompt: Annotated[str | list[int], BeforeValidator(_take_only)]
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    default_tokens = 16

    @property
    def characters(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, str) else 0


class _ChatAsk(_Ask):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    tools: _Nothing = []
    tool_choice: Literal["none", "auto"] = "none"
    functions: _Nothing = []
    function_call: Literal["none", "auto"] = "none"
    response_format: dict[Literal["type"], Literal["text"]] = {}
    modalities: list[Literal["text"]] = []
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    # Of no effect on the text.
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = False
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    @property
    def tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def characters(self) -> int:
        return sum(len(message.content) for message in self.messages)


Ask = TypeVar("Ask", _CompletionAsk, _ChatAsk)


def _parse(kind: type[Ask], body: bytes) -> Ask:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if name is None:
        raise ApiError(f"the body is no JSON object that can be read: {first['msg']}")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        raise ApiError(f"Unsupported parameter: '{name}'.", param=name, code="unsupported_parameter")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        raise ApiError(
            f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
        )
    raise ApiError(
        f"Invalid value for '{name}': {first['msg']}, not {first['input']!r:.80}.",
        param=name,
        code="invalid_value",
    )


# -- writing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What is to be written: `prompt` int64 [T]."""

    prompt: torch.Tensor
    most: int
    sampling: Sampling
    stop: Sequence[str]


class _Cancelled(Exception):
    """Nobody waits for the text any more."""


class _Job:
    """A text that a thread writes and the event loop waits for."""

    made: Generated

    def __init__(self, order: _Order) -> None:
        self.order = order
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[str | Generated | ApiError] = asyncio.Queue()

    def cancel(self) -> None:
        """Let the thread stop after the round that it is in."""
        self._cancelled.set()

    def check(self) -> None:
        """Called in the thread: raise _Cancelled after `cancel`."""
        if self._cancelled.is_set():
            raise _Cancelled

    def tell(self, news: str | Generated | ApiError) -> None:
        """Called in the thread with new text, and last with the outcome."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
            self._loop.call_soon_threadsafe(self._told.put_nowait, news)

    async def texts(self) -> AsyncIterator[str]:
        """Yield the text in parts; then `made` holds the rest. Raises ApiError if writing failed."""
        while not isinstance(news := await self._told.get(), Generated):
            if isinstance(news, ApiError):
                raise news
            yield news
        self.made = news

    async def text(self) -> str:
        """Return the whole text."""
        return "".join([part async for part in self.texts()])


class Writer:
    """Writes with an engine, one text at a time, in the order in which they are asked for."""

    def __init__(self, engine: Engine, trees: Trees) -> None:
        self.engine, self.trees = engine, trees
        folder = Path(engine.files.name).expanduser()
        self.name = folder.resolve().name if folder.is_dir() else engine.files.name
        self.created = int(time.time())
        limit = engine.target.context_length
        self.most_bytes = max(_LEAST_BYTES, _TOKEN_BYTES * (limit or 0))  # of a request
        self._longest_token = max(map(len, engine.tokenizer.get_vocab()))
        self._thread = ThreadPoolExecutor(1, "writer")
        self._jobs: weakref.WeakSet[_Job] = weakref.WeakSet()
        self._has_ended = False

    def check_name(self, model: str) -> None:
        """Raise ApiError for another model than this."""
        if model != self.name:
            message = f"The model '{model}' does not exist here, only '{self.name}'."
            raise ApiError(message, 404, "model", "model_not_found")

    def end(self) -> None:
        """Tell all who wait for a text, from now on too, that they wait in vain."""
        self._has_ended = True
        for job in self._jobs:
            job.cancel()
            job.tell(ApiError("the server ends", 503))

    def close(self) -> None:
        """Wait for the text that is being written, and forget those that wait."""
        self._thread.shutdown(cancel_futures=True)

    def start(self, order: _Order) -> _Job:
        """Begin to write, as soon as what was asked for before is written."""
        if self._has_ended:
            raise ApiError("the server ends", 503)
        job = _Job(order)
        self._jobs.add(job)
        self._thread.submit(self._write, job)
        return job

    def _write(self, job: _Job) -> None:
        try:
            outcome: Generated | ApiError = self._generate(job)
        except _Cancelled:
            return
        except UserError as error:  # such as filters that leave no token
            outcome = ApiError(str(error))
        except BaseException as error:  # a tokenizer's panic is no Exception; a client would wait for ever
            logging.getLogger(__name__).exception("writing failed")
            # Only its words: the exception itself holds the caches of the text.
            outcome = ApiError(f"writing failed: {type(error).__name__}: {error}", 500)
        job.tell(outcome)

    def _generate(self, job: _Job) -> Generated:
        order, parts = job.order, Parts(self.engine.tokenizer, job.order.stop)

        def tell(_: int, tokens: list[int]) -> None:
            job.check()
            if part := parts.extend(tokens):
                job.tell(part)

        job.check()
        (made,) = generate(
            self.engine.target,
            self.engine.draft,
            [order.prompt],
            sampling=order.sampling,
            trees=self.trees,
            max_new_tokens=order.most,
            eos_token_ids=self.engine.eos_token_ids,
            stop=order.stop,
            tokenizer=self.engine.tokenizer,
            on_tokens=tell,
        )
        if part := parts.cut(made.text or ""):
            job.tell(part)
        return made

    def order(self, ask: _CompletionAsk | _ChatAsk) -> _Order:
        """Return what is asked for in the engine's words. Raises ApiError for what the model cannot do."""
        self.check_name(ask.model)
        param = "messages" if isinstance(ask, _ChatAsk) else "prompt"
        limit = self.engine.target.context_length
        if limit is not None and ask.characters > limit * self._longest_token:
            raise ApiError(
                f"This model's maximum context length is {limit} tokens, of {self._longest_token} characters "
                f"at most: the {ask.characters} of the {param} cannot fit.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            prompt = self._encode(ask)
        except UserError as error:
            raise ApiError(str(error), param=param) from None
        if not len(prompt):
            raise ApiError("an empty prompt has nothing to be continued", param=param)
        left = _MOST_TOKENS if limit is None else limit - len(prompt)
        most = ask.tokens or max(1, min(ask.default_tokens or left, left))
        if most > left and limit is not None:
            raise ApiError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + most} tokens ({len(prompt)} in the {param}, {most} in the completion). "
                f"Please reduce the length of the {param} or completion.",
                param=param,
                code="context_length_exceeded",
            )
        return _Order(prompt, most, ask.sampling(), ask.stop)

    def _encode(self, ask: _CompletionAsk | _ChatAsk) -> torch.Tensor:
        if isinstance(ask, _ChatAsk):
            return encode_prompt(self.engine, {"messages": [message.row() for message in ask.messages]})
        if isinstance(ask.prompt, str):
            return encode_prompt(self.engine, {"prompt": ask.prompt}, raw=True)
        size = self.engine.target.vocabulary
        if not all(0 <= token < size for token in ask.prompt):
            raise UserError(f"the prompt has tokens that the model's vocabulary of {size} lacks")
        return torch.tensor(ask.prompt, dtype=torch.int64)


# -- answers -------------------------------------------------------------------------------------------


class _Answer:
    """The bodies of an answer in OpenAI's words: one as a whole, or one for each chunk of a stream."""

    def __init__(self, ask: _CompletionAsk | _ChatAsk, order: _Order) -> None:
        self.is_chat, self.order = isinstance(ask, _ChatAsk), order
        kind = "chat.completion" if self.is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if self.is_chat and ask.stream else kind,
            "created": int(time.time()),
            "model": ask.model,
        }

    def whole(self, text: str, made: Generated) -> dict[str, Any]:
        """Return the one body of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        words = {"message": message} if self.is_chat else {"text": text}
        return self._body(words, made) | {"usage": self.usage(made)}

    def first(self) -> dict[str, Any] | None:
        """Return the chunk before the text, None where there is none."""
        return self._body({"delta": {"role": "assistant", "content": ""}}) if self.is_chat else None

    def part(self, text: str) -> dict[str, Any]:
        """Return the chunk of a part of the text."""
        return self._body({"delta": {"content": text}} if self.is_chat else {"text": text})

    def last(self, made: Generated) -> dict[str, Any]:
        """Return the chunk behind the text."""
        return self._body({"delta": {}} if self.is_chat else {"text": ""}, made)

    def counted(self, made: Generated) -> dict[str, Any]:
        """Return the chunk that only counts."""
        return self._head | {"choices": [], "usage": self.usage(made)}

    def usage(self, made: Generated) -> dict[str, int]:
        """Count the tokens."""
        read, written = len(self.order.prompt), len(made.token_ids)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _body(self, words: dict[str, Any], made: Generated | None = None) -> dict[str, Any]:
        reason = None if made is None else "stop" if made.stop_reason in ("eos", "stop") else "length"
        return self._head | {"choices": [{"index": 0, **words, "logprobs": None, "finish_reason": reason}]}


async def _events(answer: _Answer, job: _Job, counts: bool) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer."""
    usage = {"usage": None} if counts else {}
    try:
        if first := answer.first():
            yield _event(first | usage)
        async for text in job.texts():
            yield _event(answer.part(text) | usage)
        yield _event(answer.last(job.made) | usage)
        if counts:
            yield _event(answer.counted(job.made))
    except ApiError as error:
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class _Stream(StreamingResponse):
    """Events of a job, which is cancelled when nobody listens any more."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], job: _Job) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _read(request: Request, most: int) -> bytes:
    """Return a request's body. Raises ApiError for more than `most` bytes, and once the client has gone."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(f"A request may have {most} bytes here.", 413)
    except ClientDisconnect:
        raise ApiError("the client has gone", 499) from None
    return bytes(body)


async def _wait(request: Request, job: _Job) -> str | None:
    """Return a job's text, or None once the client has gone."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    text, gone = asyncio.create_task(job.text()), asyncio.create_task(leave())
    try:
        await asyncio.wait((text, gone), return_when=asyncio.FIRST_COMPLETED)
        return text.result() if text.done() else None
    finally:
        job.cancel()
        text.cancel()
        gone.cancel()


# -- the server ----------------------------------------------------------------------------------------


class _Guard:
    """Lets only requests with the key pass."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._wanted = app, f"Bearer {api_key}".encode(errors="surrogateescape")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if secrets.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
        else:
            refusal = ApiError("Incorrect API key provided.", 401, code="invalid_api_key")
            await refusal.response()(scope, receive, send)


def make_app(writer: Writer, api_key: str | None = None) -> Starlette:
    """Return the web application that answers with what `writer` writes."""
    model = {"id": writer.name, "object": "model", "created": writer.created, "owned_by": "t2iprobe"}

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def show_model(request: Request) -> Response:
        writer.check_name(request.path_params["name"])
        return JSONResponse(model)

    async def complete(request: Request) -> Response:
        return await answer(request, _parse(_CompletionAsk, await _read(request, writer.most_bytes)))

    async def chat(request: Request) -> Response:
        return await answer(request, _parse(_ChatAsk, await _read(request, writer.most_bytes)))

    async def answer(request: Request, ask: _CompletionAsk | _ChatAsk) -> Response:
        order = await run_in_threadpool(writer.order, ask)
        answer, job = _Answer(ask, order), writer.start(order)
        if ask.stream:
            return _Stream(_events(answer, job, ask.stream_options.include_usage), job)
        text = await _wait(request, job)
        return Response(status_code=499) if text is None else JSONResponse(answer.whole(text, job.made))

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.detail, error.status_code)
        elif not isinstance(error, ApiError):
            error = ApiError(f"{type(error).__name__}: {error}", 500)
        return error.response()

    return Starlette(
        routes=[
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, api_key)] if api_key is not None else [],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), refuse),
    )


class _Server(uvicorn.Server):
    """Ends at once, and tells those who wait."""

    def __init__(self, writer: Writer, api_key: str | None) -> None:
        config = uvicorn.Config(
            make_app(writer, api_key),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_GRACE,
        )
        super().__init__(config)
        self._writer = writer

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._writer.end()
        await super().shutdown(sockets)


def serve_engine(engine: Engine, trees: Trees, listener: socket.socket, api_key: str | None = None) -> None:
    """Answer requests until SIGINT or SIGTERM; a text that is being written then is cut.

    Args:
        engine: who writes.
        trees: how its trees grow.
        listener: what clients reach, of `listen`; its address is printed on stderr.
        api_key: what clients must send, None: nothing.

    Raises UserError for an empty key.
    """
    if api_key == "":
        raise UserError("an empty API key protects nothing: leave it out, or give one")
    host, port = listener.getsockname()[:2]
    writer = Writer(engine, trees)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"t2iprobe: {writer.name} answers at {url}, Ctrl-C ends it", file=sys.stderr, flush=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            _Server(writer, api_key).run([listener])
    finally:
        writer.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a name or address and a port, 0: any free one.

    Raises UserError for an address that cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]  # the address comes below
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}): "
            "choose another --port (0: any free one) or --host"
        ) from None
