"""The FastAPI application of port 8100, and the router that vLLM's port gets as well.

    uvicorn --factory hogwild.api.app:main
"""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

import hogwild
from hogwild.api.auth import authenticator
from hogwild.api.problems import REQUEST_ID, problem_of, responses, route_class
from hogwild.api.routes_checkpoint import checkpoint_router
from hogwild.api.routes_files import files_router
from hogwild.api.routes_finetune import finetune_router
from hogwild.api.routes_train import train_router
from hogwild.api.service import Service
from hogwild.config import Settings, load_settings
from hogwild.errors import Forbidden

# For the OpenAPI document only: the route class has checked the key before a dependency is asked.
_BEARER = Security(HTTPBearer(auto_error=False, description="HOGWILD_API_KEY, or a key of HOGWILD_API_KEYS_FILE."))


def create_router(settings: Settings, *, extra_keys: Iterable[str] = (), service: Service | None = None,
                  usable: Callable[[], None] = lambda: None, beside_vllm: bool = False) -> APIRouter:  # fmt: skip
    """All routes of the job service, for this application or a foreign one (vLLM's).

    Nothing is registered on the application that includes it: errors become problem documents, bodies are limited
    and keys are checked per route.

    `extra_keys`: keys that are valid besides the deployment's own: vLLM's `--api-key`. `usable` raises the
    HogwildError that every request with a valid key is answered with, as long as there is one. `beside_vllm`: the
    process streams tokens too, so JSON bodies have a limit of their own.
    """
    service = service or Service(settings, extra_keys)
    authenticate = authenticator(lambda: service.keys)

    async def caller(request: Request) -> None:
        _check_site(request, service)
        request.state.api_key = await authenticate(request)
        usable()
        if service.settings.rate_limit:
            await run_in_threadpool(service.check_rate, request.state.api_key)

    most_json = settings.vllm_max_json_bytes if beside_vllm else None
    router = APIRouter(route_class=route_class(settings.max_body_bytes, caller, most_json=most_json),
                       dependencies=_security(service))
    train_router(service, router)
    checkpoint_router(service, router)
    files_router(service, router)
    finetune_router(service, router)
    return router


def _security(service: Service) -> list[Any]:
    """What the OpenAPI document says about keys: nothing when none is asked for."""
    return [_BEARER] if service.keys else []


def _check_site(request: Request, service: Service) -> None:
    """Without keys everybody on this machine is let in; web pages of other sites in its browsers are not.

    A page's own request names its site in Origin. A site whose name was made to point at this machine has a dot in it,
    which localhost, addresses and the names of containers have not.
    """
    settings = service.settings
    if service.keys or "*" in settings.cors_origins:
        return
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        site = urlsplit(origin or "").netloc
    except ValueError:
        raise Forbidden("Host or Origin can't be read.") from None
    known = {settings.api_host, settings.vllm_host, *(urlsplit(named).hostname for named in settings.cors_origins)}
    if "." in name and name not in known and not name.endswith(".localhost") and not _is_address(name):
        raise Forbidden(f"Without an API key nothing is answered as {name[:100]!r}: set HOGWILD_API_KEY, or "
                        "name it in HOGWILD_CORS_ORIGINS.")
    if origin is not None and origin not in settings.cors_origins and site.lower() != host.lower():
        raise Forbidden(f"Without an API key pages of {origin[:100]!r} may not use this API: set HOGWILD_API_KEY, or "
                        "name them in HOGWILD_CORS_ORIGINS.")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def create_app(settings: Settings) -> FastAPI:
    """The API of its own port: the router, probes, metrics and documentation."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="Hogwild", version=hogwild.__version__, lifespan=lifespan, redoc_url=None, docs_url=None,
                  openapi_url=None, summary="Train a language model while vLLM serves it.",
                  description="Errors are RFC 9457 problem documents. With HOGWILD_API_KEY set, every route but "
                  "/livez needs `Authorization: Bearer <key>`.")
    app.include_router(create_router(settings, service=service))
    app.include_router(_operator_router(service, app))
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"],
                           allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID",
                                          REQUEST_ID], expose_headers=["Location", "Retry-After", REQUEST_ID])

    async def on_http_error(request: Request, error: Exception) -> Response:
        return problem_of(error, request)

    app.add_exception_handler(HTTPException, on_http_error)  # what no route matched: 404 and 405
    return app


def _operator_router(service: Service, app: FastAPI) -> APIRouter:
    """Probes, metrics, documentation: on our own port only, vLLM has its own."""
    from fastapi.openapi.docs import get_swagger_ui_html

    from hogwild.api.metrics import CONTENT_TYPE, render

    authenticate = authenticator(lambda: service.keys)

    async def caller(request: Request) -> None:
        _check_site(request, service)
        request.state.api_key = await authenticate(request)

    async def anyone(_: Request) -> None:
        """Probes of the process itself need no key."""

    limit = service.settings.max_body_bytes
    opened = APIRouter(route_class=route_class(limit, anyone), tags=["operations"])
    router = APIRouter(route_class=route_class(limit, caller), tags=["operations"],
                       dependencies=_security(service))

    @opened.get("/livez", operation_id="live", summary="Is the process alive?", response_class=PlainTextResponse)
    async def live() -> PlainTextResponse:
        """Needs no key and no Redis."""
        return PlainTextResponse("ok")

    @router.get("/readyz", operation_id="ready", summary="Can a job be accepted?", response_class=PlainTextResponse,
                responses=responses())
    def ready() -> PlainTextResponse:
        """Redis answers and writes, and the served model is known; 503 says what is missing."""
        service.ready()
        return PlainTextResponse("ok")

    @router.get("/metrics", operation_id="metrics", summary="Prometheus metrics", response_class=PlainTextResponse,
                responses=responses())
    def metrics() -> Response:
        """Jobs, queue, steps, tokens, weight version, syncs and the worker's state."""
        return Response(render(service), media_type=CONTENT_TYPE)

    @router.get("/openapi.json", include_in_schema=False)
    def openapi() -> dict[str, Any]:
        return app.openapi()

    @router.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return get_swagger_ui_html(openapi_url="openapi.json", title="Hogwild")

    router.include_router(opened)
    return router


def main() -> FastAPI:
    """Factory for uvicorn: settings from the environment."""
    return create_app(load_settings())
