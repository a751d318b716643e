"""Every error that Hogwild raises on purpose.

    HogwildError
    ├── ConfigError              a setting is missing or wrong
    ├── InvalidRequest           the client sent something that can't be trained on (422)
    │   └── IdempotencyConflict  same key, other body
    ├── NotFound                 no such job, generation, file
    ├── Conflict                 not possible in the present state (409)
    ├── Unauthorized / Forbidden
    ├── PayloadTooLarge
    ├── TooManyRequests          queue full or rate limit; carries retry_after
    ├── ServiceUnavailable       Redis away, no model attached yet; carries retry_after
    ├── ShareError               the served weights can't be shared
    │   ├── ManifestError        manifest missing, truncated, hostile, of another user or version
    │   ├── ExporterGone         the vLLM that exported the weights is not running any more
    │   ├── AttachRefused        sharing would not be safe; says why
    │   └── AlreadyAttached      another worker holds these weights
    ├── TrainingError
    │   ├── DoesNotFit           the job needs more memory than there is; carries the numbers
    │   ├── NonFinite            too many steps in a row without a finite gradient
    │   └── JobCancelled         control flow: the user asked for it
    └── CheckpointError
        ├── CheckpointCorrupt    disk and fingerprints disagree
        ├── CheckpointForeign    files changed by somebody else since the last generation
        ├── CheckpointInUse      another process writes to it
        ├── CheckpointOtherModel began with another model than the one that is named
        └── CheckpointLayout     the directory is not a safetensors checkpoint we can write

The docstring is the default message. `status` is the HTTP status, `slug` the last part of the problem type
(RFC 9457 §3.1.1); keyword arguments become extension members of the problem document, so they must be JSON.
"""

from typing import Any, ClassVar


class HogwildError(Exception):
    """Hogwild failed."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"

    def __init__(self, message: str | None = None, **details: Any) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.details = details
        super().__init__(self.message)

    @classmethod
    def title(cls) -> str:
        """Short summary of the kind of problem, the same for every occurrence (RFC 9457 §3.1.3)."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")


class ConfigError(HogwildError):
    """A setting is missing or wrong."""

    slug = "config"


class InvalidRequest(HogwildError):
    """The request can't be accepted as it is."""

    status = 422
    slug = "invalid-request"


class IdempotencyConflict(InvalidRequest):
    """This Idempotency-Key was used before with another body."""

    slug = "idempotency-conflict"


class NotFound(HogwildError):
    """There is no such thing."""

    status = 404
    slug = "not-found"


class Conflict(HogwildError):
    """Not possible in the present state."""

    status = 409
    slug = "conflict"


class Unauthorized(HogwildError):
    """A valid API key is needed: send 'Authorization: Bearer <key>'."""

    status = 401
    slug = "unauthorized"


class Forbidden(HogwildError):
    """This API key may not do that."""

    status = 403
    slug = "forbidden"


class PayloadTooLarge(HogwildError):
    """The request body is too large."""

    status = 413
    slug = "payload-too-large"


class TooManyRequests(HogwildError):
    """Too many requests: try again later."""

    status = 429
    slug = "too-many-requests"


class ServiceUnavailable(HogwildError):
    """Not available right now: try again later."""

    status = 503
    slug = "unavailable"


class ShareError(HogwildError):
    """The served weights can't be shared."""

    slug = "share"


class ManifestError(ShareError):
    """The weight manifest can't be used."""

    slug = "manifest"


class ExporterGone(ShareError):
    """The vLLM process that exported these weights is not running any more."""

    slug = "exporter-gone"


class AttachRefused(ShareError):
    """Attaching to these weights would not be safe."""

    slug = "attach-refused"


class AlreadyAttached(ShareError):
    """Another worker is attached to these weights: stop it first."""

    status = 409
    slug = "already-attached"


class TrainingError(HogwildError):
    """The training job failed."""

    slug = "training"


class DoesNotFit(TrainingError):
    """The job needs more memory than is free."""

    status = 422
    slug = "does-not-fit"


class NonFinite(TrainingError):
    """Too many steps in a row had a loss or a gradient that is not finite."""

    slug = "non-finite"


class JobCancelled(TrainingError):
    """The job was cancelled."""

    slug = "cancelled"


class CheckpointError(HogwildError):
    """The checkpoint could not be read or written."""

    slug = "checkpoint"


class CheckpointCorrupt(CheckpointError):
    """The checkpoint's files do not match their fingerprints."""

    slug = "checkpoint-corrupt"


class CheckpointForeign(CheckpointError):
    """The checkpoint's files were changed by something else since the last generation."""

    status = 409
    slug = "checkpoint-foreign"


class CheckpointInUse(CheckpointError):
    """Another process keeps the checkpoint."""

    status = 409
    slug = "checkpoint-in-use"


class CheckpointOtherModel(CheckpointError):
    """The checkpoint began with another model than the one it was opened for."""

    status = 409
    slug = "checkpoint-other-model"


class CheckpointLayout(CheckpointError):
    """The directory is not a safetensors checkpoint that can be updated in place."""

    slug = "checkpoint-layout"
