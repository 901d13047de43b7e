"""A server that speaks the part of vLLM's protocol that roll-outs use, with the bundled tiny model. For tests.

    python tests/vllm_protocol.py PORT [FAULT]

FAULT is what a broken server does: "ignores" answers with the base model under every name, "stale" keeps the first LoRA,
"prompt" changes the prompt, "name" answers with the base's name, "replicas" has the LoRA in every other answer only.
"""

import itertools
import json
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from rl.config import Config  # noqa: E402
from rl.model.policy import load_policy  # noqa: E402
from rl.model.sampling import Sampling  # noqa: E402
from rl.rollout import rollout  # noqa: E402

BASE = "data/tiny"


class TinyServer:
    """Answers requests one after the other; those that arrive together are one roll-out, with the seed of the first."""

    def __init__(self, fault: str):
        self.fault = fault
        self.policy = load_policy(Config(model=BASE, device="cpu"))
        self.names = set()
        self.requests = queue.Queue()
        self.count = itertools.count()
        threading.Thread(target=self.work, daemon=True).start()

    def load(self, body: dict) -> tuple[int, object]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.names:
            return 400, "The lora adapter has already been loaded"
        if not (path / "adapter_config.json").exists():
            return 404, "No adapter found"
        self.call(lambda: self.policy.model.load_adapter(path, name, is_trainable=False))
        self.names.add(name)
        return 200, "Success"

    def unload(self, body: dict) -> tuple[int, object]:
        if body["lora_name"] not in self.names:
            return 404, "not found"
        self.names.remove(body["lora_name"])
        self.call(lambda: self.policy.model.delete_adapter(body["lora_name"]))
        return 200, "Success"

    def call(self, function) -> None:
        done = threading.Event()
        self.requests.put((None, function, done))
        done.wait()

    def complete(self, body: dict) -> tuple[int, object]:
        name = body["model"]
        if name != BASE and name not in self.names:
            return 404, {"error": {"message": f"The model {name} does not exist."}}
        done = threading.Event()
        result = []
        self.requests.put((body, result, done))
        done.wait()
        prompt = body["prompt"] + [7] if self.fault == "prompt" else body["prompt"]
        choices = [
            {
                "index": i,
                "token_ids": episode.completion_ids,
                "prompt_token_ids": prompt,
                "logprobs": {"token_logprobs": episode.sampler_logprobs},
                "finish_reason": episode.finish_reason,
            }
            for i, episode in enumerate(result)
        ]
        return 200, {"model": BASE if self.fault == "name" else name, "choices": choices}

    def work(self) -> None:
        while True:
            waiting = [self.requests.get()]
            while waiting[0][0]:
                try:
                    waiting.append(self.requests.get(timeout=0.01))
                except queue.Empty:
                    break
                if not waiting[-1][0]:
                    break
            bodies = [item for item in waiting if item[0]]
            for key in {self.key(body) for body, *_ in bodies}:
                self.answer([item for item in bodies if self.key(item[0]) == key])
            for body, function, done in waiting:
                if not body:
                    function()
                    done.set()

    def key(self, body: dict) -> tuple:
        return tuple(body[name] for name in ("model", "n", "max_tokens", "temperature", "top_p", "top_k"))

    def answer(self, items: list[tuple]) -> None:
        body = items[0][0]
        sampling = Sampling(
            body["temperature"], body["top_k"], body["top_p"], body["min_p"], body["repetition_penalty"]
        )
        generator = torch.Generator().manual_seed(body["seed"])
        uses_base = (
            body["model"] == BASE or self.fault == "ignores" or (self.fault == "replicas" and next(self.count) % 2)
        )
        name = sorted(self.names)[0] if self.fault == "stale" and self.names else body["model"]
        if self.fault == "stale":
            self.first = getattr(self, "first", name)
            name = self.first if self.first in self.names else name
        prompts = [item[0]["prompt"] for item in items]
        with self.policy.model.disable_adapter() if uses_base else self.policy.adapter(name):
            episodes = rollout(self.policy, prompts, body["n"], body["max_tokens"], sampling, generator, 512)
        for i, (_, result, done) in enumerate(items):
            result += episodes[i * body["n"] : (i + 1) * body["n"]]
            done.set()


def make_handler(server: TinyServer) -> type:
    paths = {
        "/v1/load_lora_adapter": server.load,
        "/v1/unload_lora_adapter": server.unload,
        "/v1/completions": server.complete,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": BASE, "parent": None}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*paths[self.path](body))

        def reply(self, status: int, content) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    return Handler


if __name__ == "__main__":
    tiny = TinyServer(sys.argv[2] if len(sys.argv) > 2 else "")
    http = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), make_handler(tiny))
    print("ready", flush=True)
    http.serve_forever()
