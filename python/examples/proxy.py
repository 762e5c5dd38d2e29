"""An OpenAI-compatible proxy in front of vLLM that routes with Foresee. Needs aiohttp.

    python proxy.py --model-folder M http://gpu1:8000 http://gpu2:8000
"""

import argparse
import json
import re

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from foresee_router import BackpressureError, BodyError, Booking, Router, RouteError, Worker

ROUTER = web.AppKey("router", Router)
CLIENT = web.AppKey("client", ClientSession)
TOKEN_USAGE = re.compile(rb'"(prompt_tokens|completion_tokens|cached_tokens)": ?(\d+)')


def refusal(status: int, message: str, **headers: str) -> web.Response:
    """Return an error in OpenAI's shape."""
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


async def proxy(request: web.Request) -> web.StreamResponse:
    """Book the request on a worker, send it there, and stream the response back."""
    router, body = request.app[ROUTER], await request.read()
    try:
        booking = router.route(body=body, path=request.path)
    except BackpressureError as error:
        return refusal(429, str(error), **{"retry-after": f"{error.retry_after:.0f}"})
    except RouteError as error:
        return refusal(503, str(error))
    except (BodyError, ValueError) as error:
        return refusal(400, str(error))
    with booking:  # completes at the end, and releases if the client disconnects or the worker fails
        for tries_left in (1, 0):
            try:
                return await forward(request, body, booking)
            except ClientError as error:
                booking.report("failure")
                if tries_left == 0:
                    booking.release()
                    return refusal(502, f"{booking.worker}: {error}")
                booking.reroute(exclude=[booking.worker])
    raise AssertionError


async def forward(request: web.Request, body: bytes, booking: Booking) -> web.StreamResponse:
    """Send the request to the booked worker, and report its tokens to the booking."""
    url = booking.worker + request.path_qs
    headers = {"content-type": "application/json"}
    async with request.app[CLIENT].post(url, data=body, headers=headers) as upstream:
        if upstream.status in (429, 503):
            booking.report("backpressure")
        response = web.StreamResponse(status=upstream.status)
        response.content_type = upstream.content_type
        response.headers["x-foresee-worker"] = booking.worker
        response.headers["x-foresee-overlap-tokens"] = str(booking.overlap_tokens)
        await response.prepare(request)
        async for line in upstream.content:
            if line.startswith(b"data: {") and b'"choices":[]' not in line:
                booking.tokens(1)
            if usage := {key.decode(): int(count) for key, count in TOKEN_USAGE.findall(line)}:
                booking.usage(**usage)
            await response.write(line)
        await response.write_eof()
        return response


async def workers(request: web.Request) -> web.Response:
    """Show what the router knows."""
    return web.json_response(request.app[ROUTER].snapshot())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--model-folder", help="folder of the model, with its tokenizer")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    app = web.Application(client_max_size=64 << 20)
    app[ROUTER] = Router([Worker(url) for url in arguments.urls], tokenizer=arguments.model_folder)

    async def session(app: web.Application):  # type: ignore[no-untyped-def]
        async with ClientSession(timeout=ClientTimeout(total=None, sock_read=300)) as app[CLIENT]:
            yield

    app.cleanup_ctx.append(session)
    app.add_routes([web.post("/v1/{path:.*}", proxy), web.get("/workers", workers)])
    web.run_app(app, port=arguments.port, handler_cancellation=True)


if __name__ == "__main__":
    main()
