"""Text to token ids, by vLLM's own `/tokenize`: the ids that it will serve, with its chat template."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import httpx

from hogwild.api.jsonl import Chat, Completion
from hogwild.errors import InvalidRequest, ServiceUnavailable
from hogwild.tasks.payloads import Sample

CONCURRENCY = 16  # requests to vLLM at once: it tokenises on a thread pool beside serving
TIMEOUT_S = 60.0


class ExampleTokenizer(ABC):
    """Splits examples into context and continuation, whatever turns text into ids."""

    @abstractmethod
    async def ids(self, line: int, body: dict[str, Any]) -> list[int]:
        """Ids of `{"prompt"}` or of `{"messages", "add_generation_prompt", "tools"?}`, as vLLM's /tokenize takes it."""

    async def samples(self, examples: Sequence[Chat | Completion]) -> list[tuple[int, Sample]]:
        """(line, sample) of all examples, in order. Raises InvalidRequest (with the line), ServiceUnavailable."""
        found: list[list[tuple[int, Sample]]] = []
        # In slices, so that a file of a hundred thousand lines is not a hundred thousand coroutines at once.
        for start in range(0, len(examples), 16 * CONCURRENCY):
            part = examples[start:start + 16 * CONCURRENCY]
            try:
                async with asyncio.TaskGroup() as group:
                    jobs = [group.create_task(self._example(example)) for example in part]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # one line's error is the answer; the others were cancelled
            found += [job.result() for job in jobs]
        return [sample for samples in found for sample in samples]

    async def _example(self, example: Chat | Completion) -> list[tuple[int, Sample]]:
        if isinstance(example, Completion):
            whole, prompt = await asyncio.gather(
                self.ids(example.line, {"prompt": example.prompt + example.completion}),
                self.ids(example.line, {"prompt": example.prompt}))
            # A token can span the border: then the completion begins with that token.
            n = common(prompt, whole)
            return [(example.line, Sample(whole[:n], whole[n:]))]
        return [(example.line, sample) for sample in await self._chat(example)]

    async def _chat(self, chat: Chat) -> list[Sample]:
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
        ids = await asyncio.gather(*(
            self.ids(chat.line, {"messages": chat.messages[:end], "add_generation_prompt": prompt,
                                 **({"tools": chat.tools} if chat.tools else {})})
            for i in turns for end, prompt in ((i, True), (i + 1, False))))
        return chat_samples(turns, ids[::2], ids[1::2], set(chat.trained))


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
        self._http = httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S)
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


def chat_samples(turns: Sequence[int], starts: Sequence[list[int]], ends: Sequence[list[int]],
                 trained: set[int]) -> list[Sample]:
    """Samples of a conversation.

    `turns`: positions of the assistant's messages; `starts[k]`: ids of everything before turn k with the generation
    prompt; `ends[k]`: ids up to the end of turn k; `trained`: positions to learn.

    Where the template only ever appends, the conversation is one sample, with weight 0 on what others said. A template
    that rewrites earlier turns (drops old reasoning, say) makes one sample of each turn, as it is served.
    """
    whole = ends[-1]
    if all(whole[:len(ids)] == ids for ids in (*starts, *ends)) and all(
            len(start) < len(end) for start, end in zip(starts, ends, strict=True)):
        first = next(len(start) for i, start in zip(turns, starts, strict=True) if i in trained)
        weights = [0.0] * (len(whole) - first)
        for i, start, end in zip(turns, starts, ends, strict=True):
            if i in trained:
                weights[len(start) - first:len(end) - first] = [1.0] * (len(end) - len(start))
        return [Sample(whole[:first], whole[first:], None if all(weights) else weights)]
    samples = []
    for i, start, end in zip(turns, starts, ends, strict=True):
        if i in trained:
            n = common(start, end)
            samples.append(Sample(end[:n], end[n:]))
    return samples


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
