"""The fleet of mock engines: fresh processes for each run, and faults while it lasts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from processes import LeagueError, Process, free_port, http, wait_until

#: Name of the model that all engines serve.
MODEL = "model"

#: Time that an engine has to start.
START_SECONDS = 15.0


@dataclass
class Engine:
    """A mock engine, which may not have been started yet."""

    port: int
    events_port: int
    replay_port: int
    command: list[str]
    log: Path
    process: Process | None = None

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.port}"

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
        """Returns the number of prompt tokens that the engine computed, those in its cache left out;
        `None` if the engine does not run."""
        status, text = http("GET", f"{self.url}/metrics")
        if self.process is None or status != 200:
            return None
        values = {
            line.partition("{")[0]: float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith("vllm:")
        }
        prompt_tokens = values.get("vllm:prompt_tokens_total", 0)
        return int(prompt_tokens - values.get("vllm:prefix_cache_hits_total", 0))

    def is_idle(self) -> bool:
        """Returns whether the engine has neither running nor waiting requests."""
        status, text = http("GET", f"{self.url}/metrics")
        if status != 200:
            return False
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        lines = [line for line in text.splitlines() if line.startswith(names)]
        return all(float(line.split()[-1]) == 0 for line in lines)


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

    @property
    def initial(self) -> list[Engine]:
        """The engines that run from the beginning."""
        return [engine for index, engine in enumerate(self.engines) if index not in self.late]

    def start(self) -> None:
        """Starts all engines but the late ones, and waits until they are healthy."""
        for engine in self.initial:
            engine.start()
        for engine in self.initial:
            engine.wait_until_healthy()

    def stop(self) -> None:
        """Kills all engines."""
        for engine in self.engines:
            if engine.process is not None:
                engine.process.kill()
