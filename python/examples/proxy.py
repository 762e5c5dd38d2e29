"""An OpenAI-compatible proxy that routes with Foresee. Needs aiohttp.

    python proxy.py --model-folder M http://gpu1:8000 http://gpu2:8000
"""

import argparse
import re
from collections.abc import AsyncIterator

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, web

from foresee_router import BackpressureError, Booking, Router, RouteError

ROUTER = web.AppKey("router", Router)
CLIENT = web.AppKey("client", ClientSession)
USAGE = re.compile(rb'"(prompt_tokens|completion_tokens|cached_tokens)": ?(\d+)')


def refusal(status: int, message: str, **headers: str) -> web.Response:
    """Return an error in OpenAI's shape."""
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


async def proxy(request: web.Request) -> web.StreamResponse:
    """Book the request on a worker, send it there, and stream the response back."""
    body = await request.read()
    try:
        booking = request.app[ROUTER].route(body=body, path=request.path)
    except BackpressureError as error:
        return refusal(429, str(error), **{"Retry-After": f"{error.retry_after:.0f}"})
    except RouteError as error:
        return refusal(503, str(error))
    except ValueError as error:
        return refusal(400, str(error))
    with booking:  # completes at the end, and releases if the client or the worker disconnects
        try:
            upstream = await send(request, body, booking)
        except (ClientError, RouteError) as error:
            booking.release()
            return refusal(502, f"{booking.worker}: {error}")
        async with upstream:
            return await stream_back(request, upstream, booking)


async def send(request: web.Request, body: bytes, booking: Booking) -> ClientResponse:
    """Send the request to its worker, or to another one if that one cannot be reached."""
    client, headers = request.app[CLIENT], {"Content-Type": "application/json"}
    try:
        return await client.post(booking.worker + request.path_qs, data=body, headers=headers)
    except ClientError:
        booking.report("failure")
        booking.reroute(exclude=[booking.worker])
    return await client.post(booking.worker + request.path_qs, data=body, headers=headers)


async def stream_back(request: web.Request, upstream: ClientResponse, booking: Booking) -> web.StreamResponse:
    """Pass the response on line by line, and report its tokens to the booking."""
    response = web.StreamResponse(status=upstream.status, headers={"x-foresee-worker": booking.worker})
    response.content_type = upstream.content_type
    await response.prepare(request)
    if upstream.status != 200:
        if upstream.status >= 429:
            booking.report("backpressure" if upstream.status in (429, 503) else "failure")
        booking.release()  # an error says nothing about the worker's speed
    async for line in upstream.content:
        if not booking.ended and line.startswith(b"data: {") and b'"choices":[]' not in line:
            booking.tokens(1)
        if not booking.ended and (usage := USAGE.findall(line)):
            booking.usage(**{key.decode(): int(count) for key, count in usage})
        await response.write(line)
    return response


async def workers(request: web.Request) -> web.Response:
    """Show what the router knows."""
    return web.json_response(request.app[ROUTER].snapshot())


async def client_session(app: web.Application) -> AsyncIterator[None]:
    """Keep connections to the workers while the proxy runs. A line may have 8 MiB."""
    async with ClientSession(timeout=ClientTimeout(None, sock_read=300), read_bufsize=8 << 20) as app[CLIENT]:
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("urls", nargs="+", help="URLs of the engines")
    parser.add_argument("--model-folder", help="folder with the tokenizer of the model")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    app = web.Application(client_max_size=64 << 20)
    app[ROUTER] = Router(arguments.urls, tokenizer=arguments.model_folder)
    app.cleanup_ctx.append(client_session)
    app.add_routes([web.post("/v1/{path:.*}", proxy), web.get("/workers", workers)])
    web.run_app(app, host="127.0.0.1", port=arguments.port, handler_cancellation=True)
