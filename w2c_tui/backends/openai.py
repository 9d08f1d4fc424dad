"""Any OpenAI-compatible chat server as a backend: vLLM, SGLang, llama-server, Ollama, LM Studio.

For those who outgrew one machine: the model, its template, its tokenizer and its cache are the
server's. Owns what goes over the wire: messages with pictures as data URLs, retries before the
first token, cancelling, and what the server's refusals mean. Knows nothing about torch or weights.

The key comes from OPENAI_API_KEY or from the system keyring; it is in no file and no log of ours.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgspec

from w2c_tui.backends.base import (
    Event,
    Finished,
    FinishReason,
    ModelInfo,
    Prefill,
    Report,
    Stats,
    Text,
    Trimmed,
)
from w2c_tui.backends.turn import AnswerText, without_oldest_exchange
from w2c_tui.core.config import GenerationParams, LoadSpec, checked
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import (
    ConfigError,
    ContextOverflowError,
    EngineError,
    MissingPackageError,
    ModelNotFoundError,
    PromptError,
    W2CError,
)
from w2c_tui.core.image import open_image
from w2c_tui.core.printable import without_password
from w2c_tui.core.prompt import image_list, user_content
from w2c_tui.core.reference import is_this_machine

try:
    import openai
except ImportError as missing:  # pragma: no cover - the extra is installed where this is tested
    raise MissingPackageError(
        "The package openai is not installed.", hint="Install it: pip install 'w2c-tui[openai]'"
    ) from missing

_ATTEMPTS = 4
_FIRST_WAIT_S = 0.5
_CONNECT_S = 10.0
_SILENCE_S = 600.0
"""The longest a server may say nothing: a long prompt on a busy server takes its time."""
_MAX_KEPT_IMAGES = 16
_POLL_S = 0.05
_SEE_LOG = "The server's log says more."

T = TypeVar("T")


class _Cancelled(Exception):
    """The user ended the answer."""


class OpenAIBackend:
    """A server behind the backend protocol. Prompts and pictures leave this process for it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: openai.AsyncOpenAI | None = None
        self._info: ModelInfo | None = None
        self._key = ""
        self._images: OrderedDict[str, str] = OrderedDict()

    # --- connecting ------------------------------------------------------------------------------

    def load(self, spec: LoadSpec, report: Report) -> ModelInfo:
        """See `Backend.load`. Asks the server which models it has; loads nothing here."""
        began = time.perf_counter()
        url = _server(spec.base_url)
        self._key = _key_for(url)
        self._loop = asyncio.new_event_loop()
        timeout = openai.Timeout(_SILENCE_S, connect=_CONNECT_S)
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=timeout,
            # The user was told who gets the pictures; a redirect would send them to another.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout),
        )

        def stopped() -> bool:
            # A report raises once the user has cancelled.
            report(f"Asking {urlsplit(url).netloc}", 0, 0)
            return False

        try:
            models = self._wait(self._with_retries(self._list_models), stopped)
            model = _choose(models, spec.name, url)
        except BaseException:
            self.close()
            raise
        context = int(model.get("max_model_len") or (model.get("meta") or {}).get("n_ctx") or 0)
        able = model.get("capabilities") or []
        self._info = ModelInfo(
            name=str(model["id"]),
            backend="openai",
            family="served",
            template="the server's",
            # Few servers say; one that reads no pictures refuses them by itself.
            reads_images=not able or bool({"multimodal", "vision", "image"} & set(able)),
            context_length=spec.context or context,
            num_parameters=int((model.get("meta") or {}).get("n_params") or 0),
            dtype="as served",
            quantization="none",
            devices=(urlsplit(url).netloc,),
            incremental=True,
            load_time_s=time.perf_counter() - began,
            sends_to="" if is_this_machine(urlsplit(url).hostname or "") else urlsplit(url).netloc,
        )
        return self._info

    async def _list_models(self) -> list[dict[str, Any]]:
        assert self._client is not None
        page = await self._client.models.list()
        # JSON may hold half a character, which nothing here can pass on.
        return [model.model_dump() | {"id": _whole(str(model.id))} for model in page.data]

    def prefill(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
    ) -> Iterator[Prefill]:
        """See `Backend.prefill`. The protocol knows only whole answers, and they may cost money."""
        return iter(())

    def close(self) -> None:
        """See `Backend.close`."""
        if self._client is not None:
            self._run(self._client.close())
        if self._loop is not None:
            self._loop.close()
        self._client = self._loop = None
        self._info = None
        self._images.clear()

    # --- answering -------------------------------------------------------------------------------

    def stream(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
        ahead: int = 0,
        until: str = "",
    ) -> Iterator[Event]:
        """See `Backend.stream`. The server's tokenizer counts, so no `Prefill` can be told.

        `ahead` is not used: one answer is asked for at a time.
        """
        if self._client is None or self._info is None:
            raise EngineError("No model is loaded.", hint="Load one first.")
        params = checked(params)
        began = time.perf_counter()
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(3), "big")
        messages = list(messages)
        max_tokens = params.max_new_tokens
        dropped = 0
        while True:
            request = self._request(messages, params, seed, max_tokens)
            try:
                reply = self._wait(self._open(request), cancelled)
                break
            except _Cancelled:
                yield Finished("cancelled", self._stats(None, 0, began, 0.0, seed))
                return
            except ContextOverflowError as error:
                length = self._learn_context(error.message)
                room = max(length // 4, 16)
                if length and max_tokens > room:
                    max_tokens = room
                    continue
                fewer = without_oldest_exchange(messages)
                if fewer is None:
                    raise error
                messages, dropped = fewer, dropped + 2
        if dropped:
            yield Trimmed(dropped, self._info.context_length)
        begun = messages[-1].text if messages[-1].role == "assistant" else ""
        text = AnswerText("", params.stop, until, begun)
        yield from self._answer(reply, text, cancelled, began, seed)

    def _answer(
        self,
        reply: _Reply,
        answer: AnswerText,
        cancelled: Callable[[], bool],
        began: float,
        seed: int,
    ) -> Iterator[Event]:
        assert self._info is not None
        reason: FinishReason | None = None
        first_token_s = 0.0
        num_pieces = 0
        piece: _Piece | None = reply.first
        try:
            while piece is not None:
                if piece.text:
                    first_token_s = first_token_s or time.perf_counter() - began
                    num_pieces += 1
                    if shown := answer.push(piece.text):
                        yield Text(shown)
                if piece.finish:
                    reason = "length" if piece.finish == "length" else "stop"
                if answer.stopped:
                    reason = "stop"
                    break
                if cancelled():
                    raise _Cancelled
                piece = self._wait(reply.next(), cancelled)
        except _Cancelled:
            reason = "cancelled"
        finally:
            self._run(reply.close())
        if reason is None:
            raise EngineError("The server broke off in the middle of its answer.", hint=_SEE_LOG)
        if rest := answer.flush():
            yield Text(rest)
        yield Finished(reason, self._stats(reply, num_pieces, began, first_token_s, seed))

    async def _open(self, request: dict[str, Any]) -> _Reply:
        return await self._with_retries(lambda: self._first(request))

    async def _first(self, request: dict[str, Any]) -> _Reply:
        """The stream after its first piece, so that until then a lost connection can be retried."""
        assert self._client is not None
        create = self._client.chat.completions.create
        reply = _Reply(await create(**request))
        try:
            reply.first = await reply.next()
        except BaseException:
            await reply.close()
            raise
        if reply.first is None:
            await reply.close()
            # Some servers refuse only once they have begun to stream, cannot say why then, and
            # close the connection.
            whole = {key: request[key] for key in request if not key.startswith("stream")}
            await self._with_retries(lambda: create(**(whole | {"max_tokens": 1})))
            raise EngineError("The server ended its answer before it began.", hint=_SEE_LOG)
        return reply

    def _learn_context(self, refusal: str) -> int:
        """The context length that the server names when it refuses, if it was not known yet."""
        assert self._info is not None
        named = re.search(
            r"(?:context (?:window|length|size)[^0-9]{0,12}|n_ctx: \d+ > )(\d+)", refusal
        )
        if named and not self._info.context_length:
            self._info = msgspec.structs.replace(self._info, context_length=int(named[1]))
        return self._info.context_length

    def _request(
        self, messages: Sequence[Message], params: GenerationParams, seed: int, max_tokens: int
    ) -> dict[str, Any]:
        assert self._info is not None
        extra: dict[str, Any] = {}
        if params.top_k:
            extra["top_k"] = params.top_k
        if params.repetition_penalty != 1.0:
            # vLLM and SGLang use the first name, llama.cpp and Ollama the second.
            extra["repetition_penalty"] = extra["repeat_penalty"] = params.repetition_penalty
        if messages[-1].role == "assistant":
            # vLLM's way to go on inside a message; llama-server does so without being told.
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        in_use = {image.sha256 for image in image_list(messages)}
        shaped = [self._message(message) for message in messages]
        while len(self._images) > max(_MAX_KEPT_IMAGES, len(in_use)):
            self._images.popitem(last=False)
        return {
            "model": self._info.name,
            "messages": shaped,
            "temperature": params.temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"top_p": params.top_p} if params.top_p != 1.0 else {}),
            **({"stop": list(params.stop)} if params.stop else {}),
            **({"extra_body": extra} if extra else {}),
        }

    def _message(self, message: Message) -> dict[str, Any]:
        text = user_content(message) if message.role == "user" else message.text
        if not message.attachments:
            return {"role": message.role, "content": text}
        assert self._info is not None
        if not self._info.reads_images:
            bare = [image for image in message.attachments if not image.page_text]
            if bare:
                raise PromptError(
                    f"{self._info.name} reads no images, and {bare[0].name} is one.",
                    hint="Use --ocr to send the text on it instead, or another model.",
                )
            return {"role": message.role, "content": text}
        pictures = [
            {"type": "image_url", "image_url": {"url": self._data_url(image)}}
            for image in message.attachments
        ]
        return {"role": message.role, "content": [*pictures, {"type": "text", "text": text}]}

    def _data_url(self, image: Attachment) -> str:
        """The picture as every backend sees it, upright, and without what a camera noted in it."""
        if image.sha256 not in self._images:
            buffer = io.BytesIO()
            open_image(image).save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode("ascii")
            self._images[image.sha256] = f"data:image/png;base64,{data}"
        self._images.move_to_end(image.sha256)
        return self._images[image.sha256]

    def _stats(
        self,
        reply: _Reply | None,
        num_pieces: int,
        began: float,
        first_token_s: float,
        seed: int,
    ) -> Stats:
        assert self._info is not None
        usage = reply.usage if reply is not None else None
        total = time.perf_counter() - began
        prompt_tokens = usage.prompt_tokens if usage else 0
        details = usage.prompt_tokens_details if usage else None
        new_tokens = usage.completion_tokens if usage else num_pieces
        decode_s = total - first_token_s
        return Stats(
            prompt_tokens=prompt_tokens,
            reused_tokens=(details.cached_tokens or 0) if details else 0,
            new_tokens=new_tokens,
            time_to_first_token_s=first_token_s or total,
            tokens_per_s=(new_tokens - 1) / decode_s if new_tokens > 1 and decode_s > 0 else 0.0,
            total_s=total,
            # The server's memory is not ours to see.
            peak_memory_bytes=0,
            context_used=prompt_tokens + new_tokens,
            context_length=self._info.context_length,
            seed=seed,
        )

    # --- waiting ---------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run_until_complete(work)

    def _wait(self, work: Coroutine[Any, Any, T], cancelled: Callable[[], bool]) -> T:
        """The result of `work`, unless `cancelled` comes first: then _Cancelled, at once."""
        with _server_errors(self._key):
            assert self._loop is not None
            task = self._loop.create_task(work)
            try:
                while not task.done():
                    self._run(asyncio.wait({task}, timeout=_POLL_S))
                    if not task.done() and cancelled():
                        raise _Cancelled
                return task.result()
            finally:
                if not task.done():
                    task.cancel()
                    self._run(asyncio.wait({task}))

    async def _with_retries(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`attempt`, again with growing pauses while the server is out of reach or overloaded."""
        for number in range(_ATTEMPTS):
            try:
                return await attempt()
            except openai.APIStatusError as error:
                if number == _ATTEMPTS - 1 or error.status_code not in (408, 429, 502, 503, 504):
                    raise
            except openai.APIConnectionError:
                if number == _ATTEMPTS - 1:
                    raise
            await asyncio.sleep(_FIRST_WAIT_S * 2**number)
        raise AssertionError("the last attempt returns or raises")


class _Piece(msgspec.Struct):
    text: str
    finish: str | None


class _Reply:
    """One streamed answer: its pieces, and the usage that the server tells at the end."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.usage: Any = None
        self.first: _Piece | None = None
        self._rest = self._pieces()

    async def next(self) -> _Piece | None:
        return await anext(self._rest, None)

    async def _pieces(self) -> AsyncIterator[_Piece]:
        async for chunk in self._response:
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices[:1]:
                text = _whole(choice.delta.content or "")
                if text or choice.finish_reason:
                    yield _Piece(text, choice.finish_reason)

    async def close(self) -> None:
        """Hang up, which tells the server to stop."""
        await self._response.close()


def _whole(text: str) -> str:
    """`text` with each half of a surrogate pair, as JSON may hold it, replaced."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _server(base_url: str) -> str:
    """`base_url` as the client needs it: a bare host gets the usual `/v1`."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--base-url {base_url!r} is no address of a server."
            if base_url
            else "The openai backend needs the address of a server.",
            hint="Give it as --base-url http://localhost:8000/v1.",
        )
    if parts.username or parts.password:
        raise ConfigError(
            "--base-url holds a password, which would end up in logs.",
            hint="Put the server's key into OPENAI_API_KEY or the system keyring.",
        )
    path = parts.path.rstrip("/") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _key_for(url: str) -> str:
    """The server's key: the environment's, else the keyring's (service w2c-tui, user: the URL)."""
    if key := os.environ.get("OPENAI_API_KEY", ""):
        return key
    try:
        import keyring
        import keyring.errors
    except ImportError:
        return ""
    try:
        return keyring.get_password("w2c-tui", url) or ""
    except keyring.errors.KeyringError:
        # No keyring on this machine, or a locked one; a server that wants a key will say so.
        return ""


def _choose(models: Sequence[dict[str, Any]], name: str, url: str) -> dict[str, Any]:
    """The served model called `name`; the only one there is where none was asked for."""
    by_name = {str(model["id"]): model for model in models}
    if name in by_name:
        return by_name[name]
    if name == LoadSpec().name and len(models) == 1:
        return models[0]
    known = ", ".join(sorted(by_name)) or "none"
    raise ModelNotFoundError(
        f"The server at {url} has no model called {name}.", hint=f"It serves: {known}."
    )


class _server_errors:
    """Turns what the client library raises into our errors, without the key in any of them."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, openai.OpenAIError):
            raise _translated(error, self._key) from (None if self._key else error)


def _translated(error: openai.OpenAIError, key: str) -> W2CError:
    text = str(error).replace(key, "***") if key else str(error)
    text = _whole(re.sub(r"\s+", " ", text)[:600])
    if isinstance(error, openai.APITimeoutError):
        return EngineError(
            f"The server said nothing for {_SILENCE_S:.0f} s or could not be reached.",
            hint="See whether it is running and how busy it is.",
        )
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        return EngineError(
            f"The connection to {error.request.url.host} failed: {cause}.",
            hint="Start the server, or correct --base-url.",
        )
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return ConfigError(
            f"The server refused the key: {text}",
            hint="Set OPENAI_API_KEY, or keep the key with: keyring set w2c-tui URL",
        )
    if isinstance(error, openai.NotFoundError):
        return ConfigError(
            f"The server does not know this address or model: {text}",
            hint="The address usually ends in /v1.",
        )
    if isinstance(error, openai.APIStatusError) and error.response.has_redirect_location:
        elsewhere = _whole(without_password(error.response.headers["location"]))[:300]
        return ConfigError(
            f"The server sends its users to {elsewhere} and was not followed.",
            hint="Give that address as --base-url if text and pictures may go there.",
        )
    if isinstance(error, openai.APIStatusError) and error.status_code in (400, 413, 422, 500):
        if _says_too_long(text):
            return ContextOverflowError(
                f"The last message is too long for the server's model: {text}",
                hint="Shorten the message, attach fewer images, or serve it with more context.",
            )
        if error.status_code != 500:
            return PromptError(
                f"The server refused the conversation: {text}",
                hint="A model that reads no images, or fewer than these, is the usual reason.",
            )
    return EngineError(f"The server failed: {text}", hint=_SEE_LOG)


def _says_too_long(text: str) -> bool:
    """vLLM, SGLang, llama-server, llama-cpp-python and OpenAI each have words of their own."""
    lowered = text.lower()
    return any(word in lowered for word in ("context", "n_ctx")) and any(
        word in lowered for word in ("exceed", "maximum", "too long", "length", "larger")
    )
