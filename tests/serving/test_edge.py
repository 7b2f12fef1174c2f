"""What Serve's proxy would say itself, in OpenAI's shape: the middleware over proxies that refuse as Serve's does."""

import json

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from serve.edge import Edge, middlewares


async def _silent(scope, receive, send):
    """As Serve's proxy when the replica of the endpoint died with the request."""


async def _cut_off(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})


def ask(app, path="/v1/images/generations"):
    return TestClient(Edge(app)).get(path, headers={"x-request-id": "mine"})


@pytest.mark.parametrize(
    ("of_serve", "status", "code"),
    [
        (PlainTextResponse("timed out", 408), 504, "deadline_exceeded"),
        (PlainTextResponse("backpressure", 429), 429, "queue_full"),
        (PlainTextResponse("unavailable", 503), 503, "endpoint_down"),
        (PlainTextResponse("Internal Server Error", 500), 503, "endpoint_down"),
        (PlainTextResponse("Path '/' not found", 404), 404, "route_not_found"),
        (_silent, 503, "endpoint_down"),
    ],
)
def test_every_refusal_of_serve_has_openais_shape(of_serve, status, code):
    response = ask(of_serve)
    assert response.status_code == status
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) is (status in (429, 503))


def test_a_stream_that_is_cut_off_ends_in_an_error_event():
    comment, event = ask(_cut_off).text.split("event: error\ndata: ")
    assert comment == ": keep-alive\n\n"
    assert json.loads(event)["error"]["code"] == "endpoint_down"


def test_what_the_endpoint_says_passes_as_it_is():
    own = JSONResponse({"error": {"code": "queue_full"}}, 429, headers={"retry-after": "7"})
    assert ask(own).json() == {"error": {"code": "queue_full"}}
    assert ask(own).headers["retry-after"] == "7"
    whole = StreamingResponse(iter(["data: 1\n\n"]), media_type="text/event-stream")
    assert ask(whole).text == "data: 1\n\n"
    assert ask(PlainTextResponse("no", 503), "/-/healthz").text == "no"


def test_serve_takes_it_as_a_middleware_of_its_proxies():
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert validate_http_proxy_callback_return(middlewares())[0].cls is Edge
