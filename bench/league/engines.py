"""The fleet of engines: fresh mock engines for each run, and faults while it lasts; or engines that run
already, whose caches are emptied before each run."""

from __future__ import annotations

import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from processes import LeagueError, Process, free_port, http, wait_until

#: Name of the model that all engines serve.
MODEL = "model"

#: Time that an engine has to start.
START_SECONDS = 15.0

#: Time that a running engine has to end the requests of the last run.
RESET_SECONDS = 60.0


@dataclass(frozen=True)
class EngineApi:
    """Endpoint and metrics of an engine's program."""

    reset_path: str
    #: Counters of prompt tokens, and of those that were in the prefix cache.
    prompt_tokens: str
    cached_tokens: str
    #: Gauges of requests.
    running: str
    waiting: str
    #: How to make the engine accept `reset_path`.
    reset_remedy: str


VLLM = EngineApi(
    reset_path="/reset_prefix_cache",
    prompt_tokens="vllm:prompt_tokens_total",
    cached_tokens="vllm:prefix_cache_hits_total",
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    reset_remedy="start vLLM with VLLM_SERVER_DEV_MODE=1",
)

SGLANG = EngineApi(
    reset_path="/flush_cache",
    prompt_tokens="sglang:prompt_tokens_total",
    cached_tokens="sglang:cached_tokens_total",
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    reset_remedy="wait until SGLang has no requests",
)


@dataclass(frozen=True)
class EngineMetrics:
    """Metrics of an engine at one time."""

    api: EngineApi
    #: Sum of each metric over its labels.
    sums: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> EngineMetrics:
        """Parses the text of `/metrics`. The names of the metrics tell SGLang from vLLM."""
        sums: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name = line.partition("{")[0].partition(" ")[0]
                sums[name] = sums.get(name, 0.0) + float(line.split()[-1])
        is_sglang = any(name.startswith("sglang:") for name in sums)
        return cls(SGLANG if is_sglang else VLLM, sums)

    @property
    def is_idle(self) -> bool:
        """Whether the engine has neither running nor waiting requests."""
        return self.sums.get(self.api.running, 0) == 0 and self.sums.get(self.api.waiting, 0) == 0

    @property
    def computed_tokens(self) -> int:
        """Number of prompt tokens computed since the start, those in the cache left out."""
        prompt_tokens = self.sums.get(self.api.prompt_tokens, 0)
        return int(prompt_tokens - self.sums.get(self.api.cached_tokens, 0))


@dataclass
class Engine:
    """A mock engine, which may not have been started yet, or an engine that runs already, which has no
    command."""

    port: int
    events_port: int
    replay_port: int
    command: list[str]
    log: Path
    process: Process | None = None
    #: Prompt tokens that the engine had computed when the run began.
    computed_before: int = 0

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Waits until a running engine has no requests, and empties its prefix cache."""
        deadline = time.monotonic() + RESET_SECONDS
        while (metrics := self._metrics()) is None or not metrics.is_idle:
            if time.monotonic() > deadline:
                raise LeagueError(f"engine {self.url} still has requests")
            time.sleep(0.1)
        status, text = http("POST", f"{self.url}{metrics.api.reset_path}")
        if status != 200:
            raise LeagueError(
                f"engine {self.url} cannot empty its cache: {status} {text}; "
                f"{metrics.api.reset_remedy}"
            )
        self.computed_before = metrics.computed_tokens

    @property
    def events(self) -> str:
        """Endpoint of the KV events."""
        return f"tcp://127.0.0.1:{self.events_port}"

    @property
    def replay(self) -> str:
        """Endpoint of the replay of KV events."""
        return f"tcp://127.0.0.1:{self.replay_port}"

    def start(self) -> None:
        """Starts the process, which takes a moment until it listens."""
        self.process = Process.start(self.command, self.log)

    def wait_until_healthy(self) -> None:
        """Waits until the engine answers health checks."""
        if self.process is None:
            raise LeagueError(f"engine {self.url} was not started")
        is_healthy = lambda: http("GET", f"{self.url}/health")[0] == 200
        wait_until(f"engine {self.url}", is_healthy, self.process, START_SECONDS)

    def set_fault(self, *, slowdown: float = 1.0, failing: bool = False) -> None:
        """Makes the engine slower, or makes it fail its requests; by default it recovers."""
        body = {"slowdown": slowdown, "failing": failing}
        status, text = http("POST", f"{self.url}/fault", body)
        if status != 200:
            raise LeagueError(f"engine {self.url} refused the fault: {status} {text}")

    def computed_tokens(self) -> int | None:
        """Returns the number of prompt tokens that the engine computed in this run, those in its cache
        left out; `None` if the engine does not run."""
        if self.process is None and self.command:
            return None
        metrics = self._metrics()
        return None if metrics is None else metrics.computed_tokens - self.computed_before

    def is_idle(self) -> bool:
        """Returns whether the engine has neither running nor waiting requests."""
        metrics = self._metrics()
        return metrics is not None and metrics.is_idle

    def _metrics(self) -> EngineMetrics | None:
        """Returns the metrics; `None` if the engine does not respond."""
        status, text = http("GET", f"{self.url}/metrics")
        return EngineMetrics.parse(text) if status == 200 else None


@dataclass
class Fleet:
    """The engines of one run."""

    engines: list[Engine] = field(default_factory=list)
    late: frozenset[int] = frozenset()

    @classmethod
    def prepare(
        cls,
        foresee: Path,
        count: int,
        flags: list[str],
        speeds: list[float],
        late: frozenset[int],
        seed: int,
        logs: Path,
    ) -> Fleet:
        """Assigns ports and commands. `speeds` has the speed-up of each engine; the engines in
        `late` are not started with the others."""
        fleet = cls(late=late)
        for index in range(count):
            port, events_port, replay_port = free_port(), free_port(), free_port()
            command = [str(foresee), "mock-engine", "--listen", f"127.0.0.1:{port}"]
            command += ["--model", MODEL, "--speedup", str(speeds[index])]
            command += ["--seed", str(seed * 1000 + index), *flags]
            command += ["--kv-events", f"tcp://127.0.0.1:{events_port}"]
            command += ["--kv-replay", f"tcp://127.0.0.1:{replay_port}"]
            log = logs / f"engine-{index}.log"
            fleet.engines.append(Engine(port, events_port, replay_port, command, log))
        return fleet

    @classmethod
    def running(cls, urls: tuple[str, ...], logs: Path) -> Fleet:
        """Returns the engines that run at these URLs, without KV events."""
        ports = [urllib.parse.urlsplit(url).port or 80 for url in urls]
        return cls([Engine(port, 0, 0, [], logs / "none") for port in ports])

    @property
    def initial(self) -> list[Engine]:
        """The engines that run from the beginning."""
        return [engine for index, engine in enumerate(self.engines) if index not in self.late]

    def start(self) -> None:
        """Starts all mock engines but the late ones, and waits until they are healthy. Engines that run
        already are reset."""
        for engine in self.initial:
            if engine.command:
                engine.start()
            else:
                engine.reset()
        for engine in self.initial:
            if engine.command:
                engine.wait_until_healthy()

    def stop(self) -> None:
        """Kills all engines."""
        for engine in self.engines:
            if engine.process is not None:
                engine.process.kill()
