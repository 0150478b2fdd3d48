"""A server in Python (CPython, wasi:http 0.2): a guest that no Rust made.

    /  /hello           "hello"                 /echo        the body back, as it comes
    /json?items         builds, writes and reads a document; the answer is that of web.wasm to the same path
    else 404
"""

import json
from urllib.parse import parse_qs, urlsplit

from componentize_py_types import Err, Ok
from wit_world import exports
from wit_world.imports.streams import OutputStream, StreamError_Closed
from wit_world.imports.types import (
    Fields,
    IncomingRequest,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)

READ = 64 * 1024
# All that `blocking-write-and-flush` takes at once.
WRITE = 4096


class IncomingHandler(exports.IncomingHandler):
    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        url = urlsplit(request.path_with_query() or "/")
        if url.path in ("/", "/hello"):
            text(response_out, 200, "hello\n")
        elif url.path == "/echo":
            echo(request, response_out)
        elif url.path == "/json":
            text(response_out, 200, prices(int(parse_qs(url.query).get("items", ["100"])[0])))
        else:
            text(response_out, 404, "not found\n")


def text(response_out: ResponseOutparam, status: int, answer: str) -> None:
    content = answer.encode()
    headers = [("content-type", b"text/plain"), ("content-length", str(len(content)).encode())]
    body = begin(response_out, status, headers)
    with body.write() as stream:
        put(stream, content)
    OutgoingBody.finish(body, None)


def echo(request: IncomingRequest, response_out: ResponseOutparam) -> None:
    body = begin(response_out, 200, [("content-type", b"application/octet-stream")])
    with request.consume() as question, question.stream() as source, body.write() as sink:
        while True:
            try:
                piece = source.blocking_read(READ)
            except Err as end:
                if isinstance(end.value, StreamError_Closed):
                    break
                raise
            put(sink, piece)
    OutgoingBody.finish(body, None)


def begin(response_out: ResponseOutparam, status: int, headers: list[tuple[str, bytes]]) -> OutgoingBody:
    response = OutgoingResponse(Fields.from_list(headers))
    response.set_status_code(status)
    body = response.body()
    ResponseOutparam.set(response_out, Ok(response))
    return body


def put(stream: OutputStream, content: bytes) -> None:
    for start in range(0, len(content), WRITE):
        stream.blocking_write_and_flush(content[start : start + WRITE])


def prices(items: int) -> str:
    """ITEMS BYTES SUM: how long the document was, and the sum of its prices as read back from it."""
    document = [
        {"id": item, "name": f"item {item}", "price": item * 3, "tags": ["a", "b", "c"]} for item in range(items)
    ]
    written = json.dumps({"items": document}, separators=(",", ":"))
    total = sum(item["price"] for item in json.loads(written)["items"])
    return f"{items} {len(written)} {total}\n"
