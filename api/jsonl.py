"""Training files: JSON Lines of chats or of prompt/completion pairs, as OpenAI's fine-tuning takes them.

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "…", "weight": 0 | 1}, …]}
    {"prompt": "…", "completion": "…"}

Every line is checked when the file is uploaded, and named when it is wrong.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hogwild.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MOST_ERRORS = 20
MOST_LEVELS = 100  # of lists and objects within each other in tools or a message: it goes on to vLLM as JSON


@dataclass(frozen=True)
class Chat:
    """A conversation. The loss is taken on the assistant's messages whose `weight` is not 0."""

    line: int
    messages: list[dict[str, Any]]
    trained: list[int]  # positions of the messages that are learned
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on. The loss is taken on the completion."""

    line: int
    prompt: str
    completion: str


@dataclass
class _Errors:
    found: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, message: str, pointer: str = "") -> None:
        self.count += 1
        if len(self.found) < MOST_ERRORS:
            self.found.append({"pointer": pointer, "field": "file", "line": line, "message": f"line {line}: {message}"})


def parse(content: bytes, *, max_lines: int) -> list[Chat | Completion]:
    """The examples of a training file. Raises InvalidRequest with the lines that are wrong."""
    errors = _Errors()
    examples: list[Chat | Completion] = []
    for number, raw in _lines(content):
        if len(examples) + errors.count >= max_lines:
            errors.add(number, f"the file has more than {max_lines} examples, which is the limit of one job")
            break
        try:
            examples.append(_example(number, raw))
        except ValueError as error:
            errors.add(number, str(error))
    if not examples and not errors.count:
        errors.add(1, "the file has no examples")
    if len({type(example) for example in examples}) > 1:
        errors.add(examples[0].line, "chats and prompt/completion pairs can't be mixed in one file")
    if errors.count:
        more = f" ({errors.count - 1} more)" if errors.count > 1 else ""
        raise InvalidRequest(f"The training file can't be used: {errors.found[0]['message']}{more}",
                             errors=errors.found)
    return examples


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    if content.startswith(b"\xef\xbb\xbf"):  # the byte order mark that editors on Windows write
        content = content[3:]
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, line


def _example(number: int, raw: bytes) -> Chat | Completion:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise ValueError("is not JSON: a number is too long") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 - of the input, not of the program
    if "messages" in value:
        return _chat(number, value)
    if "prompt" in value or "completion" in value:
        prompt, completion = _text(value.get("prompt", ""), "prompt"), _text(value.get("completion"), "completion")
        if not completion:
            raise ValueError("completion is empty: it is what the model learns")
        return Completion(number, prompt, completion)
    raise ValueError("has neither 'messages' nor 'prompt' and 'completion'")


def _chat(number: int, value: dict[str, Any]) -> Chat:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list that is not empty")
    kept, trained = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] is not an object")  # noqa: TRY004
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role must be one of {', '.join(ROLES)}")
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f"messages[{i}].weight must be 0 or 1")
        content = message.get("content")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"messages[{i}].content is missing")
        if isinstance(content, list):
            content = "".join(_part(part, i) for part in content)
        clean = {k: v for k, v in message.items() if k != "weight"}
        if content is not None:
            clean["content"] = _text(content, f"messages[{i}].content")
        _check_values(clean, f"messages[{i}]")
        kept.append(clean)
        if role == "assistant" and weight:
            trained.append(i)
    if not trained:
        raise ValueError("has no assistant message to learn (with a weight other than 0)")
    if trained[0] == 0:
        raise ValueError("begins with an assistant message: there is nothing to answer")
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError("tools must be a list")
    _check_values(tools, "tools")
    return Chat(number, kept[: trained[-1] + 1], trained, tools or None)


def _part(part: Any, i: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError(f"messages[{i}].content has a part that is not text: only text can be trained on")
    return _text(part.get("text"), f"messages[{i}].content")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string")  # noqa: TRY004
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half of a surrogate pair, which is no character") from None
    return value


def _check_values(value: Any, name: str, levels: int = MOST_LEVELS) -> None:
    """What goes on to vLLM must be JSON again: no lone surrogates, no NaN, not too deep."""
    if levels < 0:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(value, str):
        _text(value, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} has a number that is not finite")
    elif isinstance(value, list):
        for item in value:
            _check_values(item, name, levels - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _text(key, name)
            _check_values(item, name, levels - 1)
