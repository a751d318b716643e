"""Routes on vLLM's own port: Hogwild's API beside `/v1/completions`, and what the worker needs of vLLM.

Shaped as vLLM's `EndpointPlugin` (`name`, `required_tasks`, `attach_router`, `init_state`). Everything here runs in
vLLM's API server, so nothing may raise: a failure is logged and costs only these routes.
"""

import hmac
import inspect
import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Header, HTTPException

from hogwild.config import is_loopback, load_settings, served_name, url_host
from hogwild.errors import Conflict
from hogwild.frontend import FILE_NAME, Frontend
from hogwild.manifest import sweep
from hogwild.preflight import SAME_NAME, Problem
from hogwild.runtime_files import at_exit, private_dir, process_start_time, remove_at_exit
from hogwild.vllm_plugin.version_header import VersionSource, WeightVersionHeader

logger = logging.getLogger("vllm.hogwild")


class LateVersion(VersionSource):
    """The weight version, once vLLM has said which model it serves: middleware has to be added before that."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.source: VersionSource | None = None

    def read(self) -> int | None:
        """The present version, or None while nothing is exported."""
        return None if self.source is None else self.source.read()


def api_keys(args: Namespace) -> tuple[str, ...]:
    """vLLM's own keys: `--api-key` or VLLM_API_KEY."""
    keys = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY") or ()
    return tuple(key for key in ([keys] if isinstance(keys, str) else keys) if key)


class HogwildEndpoint:
    """One per vLLM API server process.

    `runtime_dir_of` finds the model's runtime directory in a VllmConfig, `withdraw` why this server must not be
    published there, if so.
    """

    name = "hogwild"
    required_tasks = None

    def __init__(
        self, runtime_dir_of: Callable[[Any], Path], withdraw: Callable[[Any], Problem | None] = lambda config: None
    ) -> None:
        self._runtime_dir_of = runtime_dir_of
        self._withdraw = withdraw
        self._engine: Any = None
        self._runtime_dir: Path | None = None
        self._version = LateVersion()
        self._withheld: Problem | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the version header; called by vLLM before it starts to listen."""
        try:
            app.post("/hogwild/prefix_cache/reset", include_in_schema=False)(self._reset_prefix_cache)
            app.add_middleware(WeightVersionHeader, source=self._version)
        except Exception:
            logger.exception("hogwild: its routes are missing on vLLM's port; vLLM serves without them")
        try:
            self._mount_api(app)
        except Exception:
            logger.exception("hogwild: /train is missing on vLLM's port; vLLM serves without it")

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Publish this server for the worker; called by vLLM when the engine is ready. `engine_client` may be None."""
        try:
            if engine_client is not None:
                self._publish(engine_client, args)
        except Exception:
            logger.exception("hogwild: vLLM's address was not published; the worker can't reset the prefix cache")

    def _mount_api(self, app: FastAPI) -> None:
        """The same routes as on the API's own port, for this model, guarded by vLLM's API keys as well as by ours."""
        try:
            from hogwild.api.app import create_router
            from hogwild.api.auth import keys_of
            from hogwild.api.service import LateService, Service
        except ImportError as error:
            logger.info("hogwild: the API is not installed beside vLLM (%s): only the worker's routes are added", error)
            return
        args = app.state.args
        name = served_name(getattr(args, "served_model_name", None), args.model)
        settings = load_settings().model_copy(update={"served_model_name": name})
        make = Service if settings.redis_url else LateService
        own_keys = api_keys(args)
        service = cast(Service, make(settings, own_keys))
        host = getattr(args, "host", None) or ""  # vLLM's default is every address
        # A deployment's keys come and go with it: what opens the port to a network is a key of this server's own.
        if not getattr(args, "uds", None) and not is_loopback(host) and not keys_of(settings, own_keys):
            logger.warning(
                "hogwild: /train is not on vLLM's port: whoever reaches %s could change the weights without a key. "
                "Set HOGWILD_API_KEY or vLLM's --api-key, or start vLLM with --host 127.0.0.1",
                host or "any address of this machine",
            )
            return
        app.include_router(create_router(settings, service=service, usable=self._usable, beside_vllm=True))

    def _usable(self) -> None:
        if self._withheld is not None and self._withheld.check == SAME_NAME:
            raise Conflict(f"These routes would reach the other model, not this one: {self._withheld.message}.")

    def _publish(self, engine_client: Any, args: Namespace) -> None:
        runtime_dir = private_dir(self._runtime_dir_of(engine_client.vllm_config))
        self._withheld = self._withdraw(engine_client.vllm_config)
        if (problem := self._withheld) is not None:
            logger.warning("hogwild: the worker is not told of this server: %s [%s]", problem.message, problem.check)
            return
        self._engine, self._runtime_dir = engine_client, runtime_dir
        self._version.source = VersionSource(self._runtime_dir)
        host = url_host(getattr(args, "host", None) or "")
        scheme = "https" if getattr(args, "ssl_keyfile", None) else "http"
        root = (getattr(args, "root_path", None) or "").rstrip("/")
        uds = getattr(args, "uds", None)
        pid = os.getpid()
        Frontend(
            url=f"{scheme}://{host}:{args.port}{root}" if not uds else f"http://localhost{root}",
            pid=pid,
            process_start_time=process_start_time(pid),
            token=secrets.token_urlsafe(32),
            uds=uds,
        ).write(self._runtime_dir)
        # vLLM's front end ends last and in good order; its engine and workers are killed by it and can't clean up.
        at_exit(partial(sweep, self._runtime_dir))
        remove_at_exit(self._runtime_dir / FILE_NAME)

    async def _reset_prefix_cache(self, running: bool = False, x_hogwild_token: str = Header("")) -> dict[str, bool]:
        # Several API servers can share one port: the file's token counts, whichever of them wrote it last.
        frontend = Frontend.load(self._runtime_dir) if self._runtime_dir else None
        if frontend is None or not hmac.compare_digest(frontend.token.encode(), x_hogwild_token.encode()):
            raise HTTPException(403, "Forbidden")
        reset = self._engine.reset_prefix_cache
        # Newer engines can preempt running requests and compute them anew; older ones refuse while one runs.
        options = {"reset_running_requests": True} if running and _takes_running(reset) else {}
        return {"reset": bool(await reset(**options))}


def _takes_running(reset: Callable[..., Any]) -> bool:
    return "reset_running_requests" in inspect.signature(reset).parameters
