"""The ASGI application of a server."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import signal
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib import metadata
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recis_hybrid.serving.columns import Rows
from recis_hybrid.serving.errors import InputError
from recis_hybrid.serving.server.batching import Batcher
from recis_hybrid.serving.server.body import Memory, Receive, Share, read_body
from recis_hybrid.serving.server.errors import DisconnectedError, RequestError
from recis_hybrid.serving.server.layout import Layout
from recis_hybrid.serving.server.live import LiveBundle
from recis_hybrid.serving.server.metrics import CONTENT_TYPE, Metrics
from recis_hybrid.serving.server.options import ServerOptions
from recis_hybrid.serving.server.protocol import load_json, parse_infer, render_infer

Scope = dict[str, Any]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
_JSON = (b"content-type", b"application/json")
# Number of bodies of the largest size that memory is for; there may be many more small ones.
_BODIES = 8
# Smaller answers are not compressed.
_COMPRESSED_SIZE = 4096
# After an error the rest of a body is discarded for this long, because a client that still sends would lose the answer.
_LINGER_SECONDS = 1.0
_log = logging.getLogger("recis_hybrid.serving")


class Service:
    """The routes of a server.

    Args:
        live: Bundle in use.
        name: Name of the model.
        options: Settings.
        metrics: Metrics, shared with ``live``.
    """

    def __init__(self, live: LiveBundle, name: str, options: ServerOptions, metrics: Metrics) -> None:
        self._live = live
        self._name = name
        self._options = options
        self._metrics = metrics
        self._batcher = Batcher(options.threads, options.max_batch, options.max_queue, metrics)
        self._memory = Memory(_BODIES * options.max_request_bytes)

    def app(self) -> App:
        """Return the application, which also looks for newer bundles while it runs."""
        model = "/v2/models/{name}"
        infer, predict = _Scoring(self, "infer", self._infer), _Scoring(self, "predict", self._predict)
        routes = [
            Route(f"{model}/infer", infer, methods=["POST"]),
            Route(f"{model}/versions/{{version}}/infer", infer, methods=["POST"]),
            Route("/predict", predict, methods=["POST"]),
            Route("/v2", self._server_metadata),
            Route("/v2/health/live", self._health),
            Route("/v2/health/ready", self._health),
            Route(model, self._model_metadata),
            Route(f"{model}/versions/{{version}}", self._model_metadata),
            Route(f"{model}/ready", self._model_ready),
            Route(f"{model}/versions/{{version}}/ready", self._model_ready),
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
        ]
        app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, RequestError: _request_error},
        )
        app.router.redirect_slashes = False
        scoring = {"/predict": predict, f"/v2/models/{self._name}/infer": infer}

        async def direct(scope: Scope, receive: Receive, send: Send) -> None:
            # Starlette's middleware and search for a route take longer than the rest of a small request's HTTP.
            route = scoring.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
            await (app if route is None else route)(scope, receive, send)

        return direct

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[Any]] = set()

        def reload() -> None:
            task = loop.create_task(asyncio.to_thread(self._live.poll, again=True))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        # Signals exist on the main thread only; a server on another thread polls.
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            loop.add_signal_handler(signal.SIGHUP, reload)
        if self._options.poll:
            tasks.add(loop.create_task(self._poll()))
        yield
        for task in list(tasks):
            task.cancel()
        self._batcher.close()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._options.poll)
            await asyncio.to_thread(self._live.poll)

    async def _infer(self, layout: Layout, body: bytes, headers: dict[bytes, bytes]) -> tuple[bytes, Headers]:
        bundle = layout.bundle
        request = parse_infer(body, headers.get(b"inference-header-content-length"), bundle.outputs)
        rows = _checked(bundle, layout.columns(request.tensors))
        outputs = await self._batcher.run(bundle, rows)
        return render_infer(self._name, layout.version, request, outputs)

    async def _predict(self, layout: Layout, body: bytes, headers: dict[bytes, bytes]) -> tuple[bytes, Headers]:
        document = load_json(body)
        columns = document.get("columns")
        if type(columns) is not dict or len(document) != 1:
            raise RequestError(400, 'the body must be {"columns": {"NAME": [VALUE, ...], ...}}.')
        outputs = await self._batcher.run(layout.bundle, _checked(layout.bundle, columns))
        answer = {"step": layout.bundle.step, "outputs": {name: values.copy() for name, values in outputs.items()}}
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), [_JSON]

    async def score(self, scope: Scope, receive: Receive, run: _Run) -> tuple[bytes, Headers]:
        """Answer a scoring request.

        Args:
            scope: ASGI scope.
            receive: Source of the body.
            run: Parses the body and computes the answer.

        Returns:
            Body and headers.

        Raises:
            RequestError: The request is answered with an error.
        """
        layout = self._live.layout
        path = scope.get("path_params")
        if path:
            self._check_model(layout, path.get("name"), path.get("version"))
        headers = dict(scope["headers"])
        limit = self._options.max_request_bytes
        is_read = False
        try:
            with Share(self._memory) as share:
                async with asyncio.timeout(self._options.timeout):
                    body = await read_body(receive, headers, limit, share)
                    is_read = True
                    return await run(layout, body, headers)
        except TimeoutError as error:
            seconds = self._options.timeout
            if not is_read:
                raise RequestError(408, f"the body did not arrive within {seconds:g} s.", close=True) from error
            raise RequestError(504, f"the scores were not ready within {seconds:g} s. Send fewer rows.") from error
        except InputError as error:
            raise RequestError(400, str(error)) from error
        except RecursionError as error:
            raise RequestError(400, "the lists of the body are nested too deeply.") from error

    def count(self, route: str, code: int, seconds: float) -> None:
        """Count an answer in the metrics."""
        self._metrics.request(route, code, seconds)

    def _check_model(self, layout: Layout, name: str | None, version: str | None) -> None:
        if name is not None and name != self._name:
            raise RequestError(404, f"there is no model {name[:100]!r}; this server has {self._name!r}.", close=True)
        if version is not None and version != layout.version:
            raise RequestError(
                404, f"model {name!r}: version {version[:30]!r} is not loaded; {layout.version} is.", close=True
            )

    async def _server_metadata(self, request: Request) -> Response:
        version = metadata.version("recis_hybrid")
        return _json({"name": "recis_hybrid", "version": version, "extensions": ["binary_tensor_data"]})

    async def _health(self, request: Request) -> Response:
        bundle = self._live.layout.bundle
        return _json({"live": True, "ready": True, "model": self._name, "step": bundle.step, "digest": bundle.digest})

    async def _model_metadata(self, request: Request) -> Response:
        layout = self._live.layout
        self._check_model(layout, request.path_params["name"], request.path_params.get("version"))
        return _json(layout.metadata(self._name))

    async def _model_ready(self, request: Request) -> Response:
        layout = self._live.layout
        self._check_model(layout, request.path_params["name"], request.path_params.get("version"))
        return _json({"name": self._name, "ready": True})

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)


_Run = Callable[[Layout, bytes, dict[bytes, bytes]], Awaitable[tuple[bytes, Headers]]]


class _Scoring:
    """A scoring route: an ASGI application, which spares the objects that Starlette makes for functions."""

    def __init__(self, service: Service, route: str, run: _Run) -> None:
        self._service = service
        self._route = route
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        status, close = 200, False
        try:
            body, headers = await self._service.score(scope, receive, self._run)
        except DisconnectedError:
            # 499 is nginx's status for it; nobody reads the answer.
            self._service.count(self._route, 499, time.perf_counter() - begin)
            return
        except RequestError as error:
            status, close = error.status, error.close
            body, headers = _error_body(str(error)), [_JSON]
        except Exception:
            _log.exception("a request failed")
            status, body, headers = 500, _error_body("internal error; the server's log has the details."), [_JSON]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        accepted = next((value for name, value in scope["headers"] if name == b"accept-encoding"), None)
        if accepted is not None and len(body) >= _COMPRESSED_SIZE:
            body, headers = _compressed(body, headers, accepted)
        headers.append((b"content-length", str(len(body)).encode()))
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": close})
        self._service.count(self._route, status, time.perf_counter() - begin)
        if close:
            await _discard(receive)
            await send({"type": "http.response.body", "body": b""})


def _checked(bundle: Any, columns: Mapping[str, Any]) -> Rows:
    """Return the validated rows of a request, of which there must be some."""
    rows: Rows = bundle.check(columns)
    if len(rows) == 0:
        raise InputError("the request has no rows; send at least one element in every column")
    return rows


async def _discard(receive: Receive) -> None:
    """Discard what remains of a body for a short time, in order that the client reads the answer before a reset."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


def _compressed(body: bytes, headers: Headers, accepted: bytes) -> tuple[bytes, Headers]:
    """Return a body compressed by gzip or deflate if the client accepts one of them."""
    codings = {}
    for each in accepted.decode("latin-1").lower().split(","):
        coding, _, quality = each.partition(";")
        codings[coding.strip()] = quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    if codings.get("gzip", False):
        return gzip.compress(body, 1, mtime=0), [*headers, (b"content-encoding", b"gzip")]
    if codings.get("deflate", False):
        return zlib.compress(body, 1), [*headers, (b"content-encoding", b"deflate")]
    return body, headers


def _json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


def _error_body(text: str) -> bytes:
    # A message may quote half of a surrogate pair, which UTF-8 cannot hold.
    return orjson.dumps({"error": text.encode("utf-8", "replace").decode()})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"there is no route {request.url.path[:100]!r}; see /v2."
    elif error.status_code == 405:
        text = f"{request.url.path[:100]!r} does not take {request.method}."
    else:
        text = error.detail
    return Response(_error_body(text), error.status_code, error.headers, "application/json")


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return Response(_error_body(str(error)), error.status, media_type="application/json")
