"""Can this be trained on? Checked against the served model before anything is queued.

Errors name the field, the place and the limit, as in RFC 9457's `errors` extension.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hogwild.api.problems import MOST_ERRORS
from hogwild.api.schemas import SampleIn, TrainRequest
from hogwild.config import Settings
from hogwild.errors import InvalidRequest
from hogwild.gpu_worker.config import TrainConfig
from hogwild.tasks.payloads import Payload, Sample, pack
from hogwild.tasks.registry import ModelInfo

_NOT_CONFIG = {"context_ids", "continuation_ids", "weights", "samples", "priority", "metadata"}


class Findings:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []
        self.count = 0

    def add(self, pointer: str, message: str, limit: Any = None) -> None:
        """`pointer`: JSON pointer (RFC 6901) into the body."""
        self.count += 1
        if len(self.errors) < MOST_ERRORS:
            field = next((part for part in reversed(pointer.split("/")) if part and not part.isdigit()), "body")
            error = {"pointer": pointer, "field": field, "message": message}
            self.errors.append(error if limit is None else {**error, "limit": limit})

    def raise_any(self) -> None:
        """Raises InvalidRequest when something was found."""
        if self.errors:
            first = self.errors[0]
            more = f" ({self.count - 1} more)" if self.count > 1 else ""
            raise InvalidRequest(f"{first['pointer'] or 'The body'}: {first['message']}{more}", errors=self.errors)


def sample_limit(model: ModelInfo, settings: Settings) -> int:
    """Most tokens of one sample: what vLLM serves and the operator permits. What memory allows depends on the whole
    job, and on the moment: the worker's plan finds out."""
    return min(limit for limit in (model.max_model_len, settings.max_sample_tokens) if limit is not None)


def check_samples(request: TrainRequest, model: ModelInfo, settings: Settings) -> Payload:
    """The packed samples of a request. Raises InvalidRequest."""
    found = Findings()
    top = [name for name in ("context_ids", "continuation_ids", "weights") if getattr(request, name) is not None]
    samples: Sequence[SampleIn]
    if request.samples is not None:
        for name in top:
            found.add(f"/{name}", "give either this or samples, not both")
        samples, base = request.samples, "/samples"
        if not samples:
            found.add(base, "must hold at least one sample", 1)
        if len(samples) > settings.max_job_samples:
            found.add(base, f"has {len(samples)} samples; one job may have {settings.max_job_samples}",
                      settings.max_job_samples)
    elif request.continuation_ids is not None:
        samples = [SampleIn.model_construct(context_ids=request.context_ids or [], weights=request.weights,
                                            continuation_ids=request.continuation_ids)]
        base = ""
    else:
        found.add("/continuation_ids", "is missing: send context_ids and continuation_ids, or samples")
        samples, base = [], ""
    found.raise_any()
    longest = sample_limit(model, settings)
    for i, sample in enumerate(samples):
        _check_sample(found, sample, f"{base}/{i}" if base else "", model, longest)
    found.raise_any()
    return pack(Sample(s.context_ids, s.continuation_ids, s.weights) for s in samples)


def check_lines(samples: Sequence[tuple[int, Sample]], model: ModelInfo, settings: Settings) -> Payload:
    """The packed samples of a training file; errors name its lines. Raises InvalidRequest."""
    found = Findings()
    longest = sample_limit(model, settings)
    for line, s in samples:
        one = Findings()
        _check_sample(one, SampleIn.model_construct(
            context_ids=list(s.context_ids), continuation_ids=list(s.continuation_ids),
            weights=None if s.weights is None else list(s.weights)), "", model, longest)
        for error in one.errors:
            found.add("", f"line {line}: {error['message']}", error.get("limit"))
    found.raise_any()
    return pack(sample for _, sample in samples)


def _check_sample(found: Findings, sample: SampleIn, at: str, model: ModelInfo, longest: int) -> None:
    context, continuation = sample.context_ids, sample.continuation_ids
    total = len(context) + len(continuation)
    if not continuation:
        found.add(f"{at}/continuation_ids", "must not be empty: it is what the model learns", 1)
    elif total < 2:
        found.add(f"{at}/context_ids", "a single token has nothing before it to be predicted from: give context_ids, "
                  "or a continuation of two tokens", 1)
    if total > longest:
        found.add(f"{at}/continuation_ids", f"the sample has {total} tokens; {longest} is the limit", longest)
    for name, ids in (("context_ids", context), ("continuation_ids", continuation)):
        if ids and (min(ids) < 0 or max(ids) >= model.vocab_size):
            k, wrong = next((k, t) for k, t in enumerate(ids) if not 0 <= t < model.vocab_size)
            shown = wrong if abs(wrong) < 10**12 else "a number far outside"
            found.add(f"{at}/{name}/{k}", f"token id {shown} is not in the vocabulary: 0 to {model.vocab_size - 1}",
                      model.vocab_size - 1)
    weights = sample.weights
    if weights is not None:
        if len(weights) != len(continuation):
            found.add(f"{at}/weights", f"has {len(weights)} entries for {len(continuation)} continuation tokens",
                      len(continuation))
        elif weights and min(weights) < 0:
            found.add(f"{at}/weights", "must be 0 or more", 0)
        elif weights and max(weights) > 1e6:
            found.add(f"{at}/weights", "must be at most 1000000", 1e6)
        elif weights and not any(array("f", weights if context else weights[1:])):  # as they are stored
            found.add(f"{at}/weights", "all are 0 in single precision: nothing would be learned from this sample")


def check_config(request: TrainRequest, model: ModelInfo) -> dict[str, Any]:
    """The job's configuration: what was given, and the worker's defaults. Raises InvalidRequest."""
    return complete_config(request.model_dump(exclude=_NOT_CONFIG), model)


def complete_config(given: dict[str, Any], model: ModelInfo) -> dict[str, Any]:
    """`given` with the worker's optimizer and rate, as the engine will take it. Raises InvalidRequest.

    The worker's, not this process': vLLM's port has an environment of its own. None is as good as nothing: kept with
    the job, it would hide the defaults from whoever reads it.
    """
    config = {"optimizer": model.optimizer, **{name: value for name, value in given.items() if value is not None}}
    if model.learning_rate is not None and config["optimizer"] == model.optimizer:
        config.setdefault("learning_rate", model.learning_rate)
    try:
        with _option_named():
            TrainConfig.from_dict(config)
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The options hold half of a surrogate pair, which is no character.") from None
    return config


def check_length(config: dict[str, Any], payload: Payload) -> None:
    """That the samples are not trained so often that no plan could hold it. Raises InvalidRequest."""
    with _option_named():
        TrainConfig.from_dict(config).check_length(payload.samples)


@contextmanager
def _option_named() -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        field = str(error.details.get("field", "body"))
        raise InvalidRequest(error.message, errors=[
            {"pointer": f"/{field}", "field": field, "message": error.message}]) from error
