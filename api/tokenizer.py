"""Text to token ids, by vLLM's own `/tokenize`: the ids that it will serve, with its chat template."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from hogwild.api.jsonl import Chat, Completion
from hogwild.config import is_loopback
from hogwild.errors import InvalidRequest, ServiceUnavailable
from hogwild.tasks.payloads import Sample

CONCURRENCY = 16  # requests to vLLM at once: it tokenises on a thread pool beside serving
TURNS = 4  # of one conversation at once: each comes with everything before it
TIMEOUT_S = 60.0


@dataclass
class Limits:
    """How long a sample may be, and how many tokens conversations of which each turn is a sample may still come to."""

    sample: int
    left: int

    def take(self, line: int, tokens: int) -> None:
        """Raises InvalidRequest when no more are left."""
        self.left -= tokens
        if self.left < 0:
            message = ("the chat template rewrites earlier turns, so that each turn is a sample with everything before "
                       "it; these come to too many tokens: give the file fewer or shorter conversations")
            raise InvalidRequest(f"line {line}: {message}", errors=[
                {"pointer": "", "field": "file", "line": line, "message": message}])


class Turn(NamedTuple):
    """An answer within a conversation: up to `cut` what it answers, up to `end` the answer."""

    cut: int
    end: int
    ids: list[int] | None  # None: the conversation's own, which the template only appended to


class ExampleTokenizer(ABC):
    """Splits examples into context and continuation, whatever turns text into ids."""

    @abstractmethod
    async def ids(self, line: int, body: dict[str, Any]) -> list[int]:
        """Ids of `{"prompt"}` or of `{"messages", "add_generation_prompt", "tools"?}`, as vLLM's /tokenize takes it."""

    async def samples(self, examples: Sequence[Chat | Completion], limits: Limits | None = None,
                      ) -> list[tuple[int, Sample]]:
        """(line, sample) of all examples, in order. Raises InvalidRequest (with the line), ServiceUnavailable.

        A conversation that is longer than `limits` let a sample be comes back as one sample, for the caller to refuse.
        """
        found: list[list[tuple[int, Sample]]] = [[] for _ in examples]
        rest = iter(enumerate(examples))

        async def work() -> None:
            for i, example in rest:
                found[i] = [(example.line, sample) for sample in await self._example(example, limits)]

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CONCURRENCY):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one line's error is the answer; the others were cancelled
        return [sample for samples in found for sample in samples]

    async def _example(self, example: Chat | Completion, limits: Limits | None) -> list[Sample]:
        if isinstance(example, Chat):
            return await self._chat(example, limits)
        whole, prompt = await asyncio.gather(
            self.ids(example.line, {"prompt": example.prompt + example.completion}),
            self.ids(example.line, {"prompt": example.prompt}))
        # A token can span the border: then the completion begins with that token.
        n = common(prompt, whole)
        return [Sample(whole[:n], whole[n:])]

    async def _chat(self, chat: Chat, limits: Limits | None) -> list[Sample]:
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
        last, trained = turns[-1], set(chat.trained)

        async def ids(messages: int, prompt: bool) -> list[int]:
            return await self.ids(chat.line, {"messages": chat.messages[:messages], "add_generation_prompt": prompt,
                                              **({"tools": chat.tools} if chat.tools else {})})

        whole = await ids(last + 1, False)
        if limits is not None and len(whole) > limits.sample:
            return [Sample([], whole)]

        async def turn(i: int) -> Turn:
            if i == last:
                return turn_of(whole, await ids(i, True), whole)
            found = turn_of(whole, *await asyncio.gather(ids(i, True), ids(i + 1, False)))
            if found.ids is not None and i not in trained:
                return found._replace(ids=[])
            if found.ids is not None and limits is not None:
                limits.take(chat.line, found.end)
            return found

        found: list[Turn] = []
        for k in range(0, len(turns), TURNS):
            found += await asyncio.gather(*(turn(i) for i in turns[k:k + TURNS]))
        if limits is not None and any(turn.ids is not None for turn in found):
            limits.take(chat.line, sum(
                turn.end for i, turn in zip(turns, found, strict=True) if turn.ids is None and i in trained))
        return chat_samples(whole, turns, found, trained)


class LocalTokenizer(ExampleTokenizer):
    """A `transformers` tokenizer of the client's own."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    async def ids(self, line: int, body: dict[str, Any]) -> list[int]:
        """See the base class."""
        if "prompt" in body:
            return list(self.tokenizer(body["prompt"])["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(
                body["messages"], tools=body.get("tools"), tokenize=False,
                add_generation_prompt=body["add_generation_prompt"])
        except ValueError as error:
            raise InvalidRequest(f"line {line}: the chat template can't be applied: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Tokenizer(ExampleTokenizer):
    """vLLM's own tokenizer over HTTP. Use as an async context manager."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # On this machine no proxy is in between, and vLLM's certificate is for its public name.
        local = is_loopback(urlsplit(self.url).hostname or "")
        self._http = httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S, trust_env=not local, verify=not local)
        self._slots = asyncio.Semaphore(CONCURRENCY)

    async def __aenter__(self) -> "Tokenizer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ids(self, line: int, body: dict[str, Any]) -> list[int]:
        """See the base class. Raises InvalidRequest, ServiceUnavailable."""
        if self.model:
            body = {"model": self.model, **body}
        try:
            async with self._slots:
                response = await self._http.post(f"{self.url}/tokenize", json=body)
        except httpx.HTTPError as error:
            raise ServiceUnavailable(f"vLLM at {self.url} does not answer, and only it can tokenise text: "
                                     f"{type(error).__name__}.", retry_after=10) from error
        if response.status_code in (400, 422):
            raise InvalidRequest(f"line {line}: vLLM can't tokenise this: {_message(response)}", errors=[
                {"pointer": "", "field": "file", "line": line, "message": _message(response)}])
        if response.status_code != 200:
            raise ServiceUnavailable(f"vLLM's /tokenize answered {response.status_code}: {_message(response)}",
                                     retry_after=10)
        tokens = response.json()["tokens"]
        return [int(token) for token in tokens]


def turn_of(whole: list[int], start: list[int], end: list[int]) -> Turn:
    """A turn by the ids of everything before it with the generation prompt (`start`), and up to its end (`end`)."""
    cut = common(start, end)
    appended = cut == len(start) < len(end) and whole[:len(end)] == end
    return Turn(cut, len(end), None if appended else end)


def chat_samples(whole: list[int], turns: Sequence[int], found: Sequence[Turn], trained: set[int]) -> list[Sample]:
    """Samples of the conversation with the ids `whole`.

    `turns`: positions of the assistant's messages, `found`: what they are in ids; `trained`: positions to learn.

    Where the template only ever appends, the conversation is one sample, with weight 0 on what others said. A template
    that rewrites earlier turns (drops old reasoning, say) makes one sample of each turn, as it is served.
    """
    learned = [turn for i, turn in zip(turns, found, strict=True) if i in trained]
    if all(turn.ids is None for turn in found):
        first = learned[0].cut
        weights = [0.0] * (len(whole) - first)
        for cut, end, _ in learned:
            weights[cut - first:end - first] = [1.0] * (end - cut)
        return [Sample(whole[:first], whole[first:], None if all(weights) else weights)]
    return [Sample(ids[:cut], ids[cut:]) for cut, ids in ((turn.cut, turn.ids or whole[:turn.end]) for turn in learned)]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def _message(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:200]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
