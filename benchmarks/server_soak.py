"""Many jobs on one server: does it grow, and does it lose any?

    python benchmarks/server_soak.py [--jobs 500] [--seed 1] [--json FILE]

A server with the demo models gets generations, edits, layers, captions it cannot write and compositions, as requests
and as jobs, from six clients at once. Some jobs are cancelled while they wait or generate; some clients hang up on a
request, or stop listening to a job; some send nonsense; now and then models are released. The queue is short and full.
Every job must end, as what its client did to it allows, and the queue must be empty afterwards. The server's memory is
noted after every twentieth part; the first fifth is warm-up.

Takes 10 minutes and 1 GB of memory.
"""

from __future__ import annotations

import base64
import io
import random
import statistics
import subprocess
import threading
import time
from collections import Counter
from typing import Any

from common import MIB, Table, Targets, finish, parser, preload_blas, serving

_CLIENTS = 6
_MODELS = ("--model", "demo", "--edit-model", "demo-edit", "--layered-model", "demo-layered")
_FLAGS = ("--queue", "5", *_MODELS)
_ACTS = ("request", "request", "follow", "follow", "poll", "cancel", "cancel", "hang up", "stop listening", "nonsense",
         "compose", "release")  # fmt: skip
_ENDS = {"done", "failed", "cancelled"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=500, help="how many (500)")
    options.add_argument("--seed", type=int, default=1, help="of what is done to them (1)")
    arguments = options.parse_args()
    preload_blas()
    with serving(*_FLAGS) as (address, process):
        soak = Soak(address, process.pid, arguments.jobs, arguments.seed)
        soak.run()
        process.terminate()
        code = process.wait(60)
    table = Table("after so many jobs, MiB", ("jobs", "server"), soak.memory)
    table.print()
    fates = Table("what became of them", ("", "jobs"), sorted(soak.fates.items()))
    fates.print()
    settled = [nbytes for number, nbytes in soak.memory if number > arguments.jobs // 5]
    middle = len(settled) // 2
    targets = Targets()
    grown = statistics.mean(settled[middle:]) / statistics.mean(settled[:middle])
    targets.check("memory: second half / first", grown, 1.03)
    targets.check("jobs lost, stuck or ended otherwise than asked", len(soak.faults), 0)
    targets.check("exit code after SIGTERM", code, 0)
    for fault in soak.faults[:10]:
        print(fault)
    finish([table, fates, targets], arguments.json)


class Soak:
    """Clients that take numbers of jobs until there are none left."""

    def __init__(self, address: str, pid: int, jobs: int, seed: int):
        import httpx

        self.memory: list[tuple[int, float]] = []
        self.fates: Counter[str] = Counter()
        self.faults: list[str] = []
        self._address, self._pid, self._jobs, self._seed = address, pid, jobs, seed
        self._lock = threading.Lock()
        self._taken = 0
        self._httpx = httpx
        self._image = _image()

    def run(self) -> None:
        threads = [threading.Thread(target=self._client) for _ in range(_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with self._open() as client:
            end = time.monotonic() + 60
            while client.get("/health").json()["queue"] != {"running": 0, "waiting": 0}:
                if time.monotonic() > end:
                    self.faults.append("the queue is not empty")
                    return
                time.sleep(0.1)

    def _open(self) -> Any:
        return self._httpx.Client(base_url=self._address, timeout=300, trust_env=False)

    def _client(self) -> None:
        while (number := self._next()) is not None:
            lots = random.Random(self._seed * 1_000_003 + number)
            try:
                with self._open() as client:
                    fate = self._one(client, lots)
            except Exception as error:
                fate = "fault"
                self.faults.append(f"job {number}: {type(error).__name__} {error}")
            with self._lock:
                self.fates[fate] += 1

    def _next(self) -> int | None:
        with self._lock:
            if self._taken == self._jobs:
                return None
            self._taken += 1
            if self._taken % max(1, self._jobs // 20) == 0:
                self.memory.append((self._taken, _resident(self._pid) / MIB))
            return self._taken

    def _one(self, client: Any, lots: random.Random) -> str:
        """Sends one job and does something to it; what became of it, or an AssertionError."""
        act = lots.choice(_ACTS)
        task, body = self._body(lots)
        if act == "release":
            return self._settled(client.post("/models/unload", json={}), {200, 429})
        if act == "compose":
            layers = [{"image": self._image, "x": lots.randint(-9, 9)} for _ in range(3)]
            form = lots.choice(["png", "ora", "zip"])
            return self._settled(client.post("/api/qwen-image/compose", json={"layers": layers, "format": form}), {200})
        if act == "nonsense":
            return self._settled(client.post(f"/api/qwen-image/{task}", json=body | {"steps": "many"}), {422, 429})
        if act == "request":
            expected = {422, 429} if task == "caption" else {200, 429}
            return self._settled(client.post(f"/api/qwen-image/{task}", json=body), expected)
        if act == "hang up":
            try:
                client.post(f"/api/qwen-image/{task}", json=body, timeout=lots.uniform(0.05, 1.0))
            except self._httpx.TimeoutException:
                return "hung up"
            return "too late to hang up"
        answer = client.post("/jobs", json=body | {"task": task})
        if answer.status_code == 429:
            return self._settled(answer, {429})
        assert answer.status_code == 202, answer.text
        return self._follow(client, lots, act, task, answer.json()["id"])

    def _follow(self, client: Any, lots: random.Random, act: str, task: str, job: str) -> str:
        allowed = {"failed"} if task == "caption" else {"done"}
        if act == "cancel":
            time.sleep(lots.uniform(0, 1.5))
            client.delete(f"/jobs/{job}")
            allowed |= {"cancelled"}
        elif act in ("follow", "stop listening"):
            names = []
            with client.stream("GET", f"/jobs/{job}/events") as stream:
                for line in stream.iter_lines():
                    names += [line.removeprefix("event: ")] if line.startswith("event: ") else []
                    if act == "stop listening" and len(names) >= lots.randint(1, 8):
                        break
            if act == "follow":
                assert [name for name in names if name in _ENDS] == names[-1:], names
            else:
                allowed |= {"cancelled"}
        end = time.monotonic() + 120
        while (status := client.get(f"/jobs/{job}").json()["status"]) not in _ENDS:
            assert time.monotonic() < end, f"{job} is stuck"
            time.sleep(0.1)
        assert status in allowed, f"{task} {act}: {status}"
        return f"{act}: {status}"

    def _settled(self, answer: Any, expected: set[int]) -> str:
        assert answer.status_code in expected, f"{answer.status_code} {answer.text[:200]}"
        if answer.status_code == 429:
            time.sleep(0.3)
        return str(answer.status_code)

    def _body(self, lots: random.Random) -> tuple[str, dict[str, Any]]:
        seed, steps, image = lots.randint(0, 9), lots.choice([2, 4, 12]), self._image
        prompt = f"a {lots.choice(['red', 'blue', 'green'])} {lots.choice(['circle', 'square'])}"
        return lots.choice([
            ("generate", {"prompt": prompt, "seed": seed, "steps": steps, "num_images": lots.choice([1, 1, 3])}),
            ("generate", {"prompt": prompt, "steps": steps, "aspect": lots.choice(["1:1", "16:9"])}),
            ("edit", {"prompt": prompt, "image": image, "seed": seed, "steps": steps}),
            ("decompose", {"prompt": prompt, "image": image, "num_layers": lots.choice([1, 3]), "steps": steps}),
            ("caption", {"image": image}),
        ])  # fmt: skip


def _image() -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _resident(pid: int) -> int:
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


if __name__ == "__main__":
    main()
