"""Roll-outs from a vLLM server, which may run on other GPUs or on another machine with the same file system.

The server is stock vLLM (`launch_command`). Whenever the LoRA has changed, it is saved and loaded into the server under a
new name, because the server's prefix cache is keyed by the name. Every answer is checked: the name, the prompt's tokens, one
log-probability for each token. The check of the sampler before a run (rl/run/checks.py) compares the log-probabilities with
the trainer's under a LoRA of noise, so that a server that ignores the LoRA, or has another base model, is refused. A server that
was restarted gets the LoRA again.
"""

import atexit
import contextlib
import hashlib
import shutil
import tempfile
import time
import uuid
from pathlib import Path

import httpx
from peft.tuners.tuners_utils import BaseTunerLayer

from rl.config import Config, ConfigError, RunError
from rl.model import distributed
from rl.model.sampling import Sampling

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
PATIENCE = 120.0  # seconds for a server to come back
PAUSE = 2.0  # seconds between two attempts
TIMEOUT = httpx.Timeout(3600.0, connect=30.0)  # seconds; an answer takes as long as its completions
UNREACHABLE = (502, 503, 504)  # status codes of a proxy or a server that starts


def launch_command(config: Config, prompt_length: int) -> str:
    """Return the shell command that starts a server for this run. prompt_length: tokens of the longest prompt."""
    rank = next((rank for rank in RANKS if rank >= config.lora_r), RANKS[-1])
    length = prompt_length + config.max_completion_length
    port = httpx.URL(config.rollout_url).port or 80
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {config.model} --enable-lora --max-lora-rank {rank} --max-loras 2 "
        f"--logprobs-mode processed_logprobs --generation-config vllm --max-model-len {length} --port {port}"
    )


class Server:
    """A client of the server. Keeps two LoRAs loaded, the current one and the one before."""

    def __init__(self, config: Config):
        self.config = config
        self.client = httpx.Client(base_url=config.rollout_url, timeout=TIMEOUT)
        self.run = distributed.all_ranks(f"ponder-{uuid.uuid4().hex[:8]}")[0]  # all processes load the same LoRAs
        Path("runs").mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=".lora-", dir="runs"))  # the server reads it
        self.folder.chmod(0o755)
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.paths: dict[str, Path] = {}  # of the saved LoRAs, by name
        self.loaded: list[str] = []
        try:
            models = self.client.get("/v1/models").raise_for_status().json()["data"]
            base = next(model for model in models if not model.get("parent"))
            self.base = base["id"]
            self.max_model_len = base.get("max_model_len")  # tokens
        except (httpx.HTTPError, ValueError, KeyError, StopIteration) as error:
            raise ConfigError(
                f"rollout_url: no vLLM server answers at {config.rollout_url} ({type(error).__name__}). To start one, see the "
                "command that --dry-run prints"
            ) from None

    # --- the LoRA

    def publish(self, policy) -> str:
        """Load the active LoRA into the server, unless it is there, and return its name; without one, the base's."""
        if any(m.disable_adapters for m in policy.model.modules() if isinstance(m, BaseTunerLayer)):
            return self.base
        active = policy.model.active_adapter
        sha = hashlib.sha256()
        for key, tensor in sorted(policy.lora_weights(active).items()):
            sha.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
        name = f"{self.run}-{sha.hexdigest()[:16]}"
        if name in self.loaded:
            return name
        if name not in self.paths:
            policy.model.save_pretrained(self.folder / name, selected_adapters=[active])
            self.paths[name] = self.folder / name / ("" if active == "default" else active)
        self.load(name)
        self.loaded.append(name)
        while len(self.loaded) > 2:
            self._post("/v1/unload_lora_adapter", {"lora_name": self.loaded.pop(0)})
        for old in list(self.paths)[:-3]:  # the files stay a step longer than the name
            shutil.rmtree(self.folder / old, ignore_errors=True)
            del self.paths[old]
        return name

    def load(self, name: str) -> None:
        """Load a saved LoRA. Raises ConfigError if the server refuses it."""
        answer = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.paths[name].resolve())})
        if answer.status_code == 404:
            raise ConfigError(
                f"rollout_url: the server cannot load a LoRA ({shorten(answer)}): start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, on a machine that can read this one's files"
            )
        if answer.status_code != 200 and "already" not in answer.text:
            raise ConfigError(f"rollout_url: the server does not load the LoRA: {shorten(answer)}")

    # --- completions

    def complete(
        self,
        name: str,
        prompt: list[int],
        n: int,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        eos_ids: frozenset[int],
    ) -> list[tuple[list[int], list[float], bool]]:
        """Return n completions of a prompt: token ids, log-probabilities, and whether they are truncated.

        Raises RunError if the answer is not one to this request.
        """
        request = {
            "model": name,
            "prompt": prompt,
            "n": n,
            "max_tokens": max_tokens,
            "logprobs": 0,
            "return_token_ids": True,
            "seed": seed,
            "stop_token_ids": sorted(eos_ids),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
        }
        answer = self._post("/v1/completions", request)
        deadline = time.monotonic() + PATIENCE
        while answer.status_code == 404 and name in self.paths and time.monotonic() < deadline:  # it was restarted
            self.load(name)
            answer = self._post("/v1/completions", request)
            if answer.status_code == 404:
                time.sleep(PAUSE)
        if answer.status_code != 200:
            raise RunError(f"rollout_url: the server refuses a request for completions: {shorten(answer)}")
        try:
            body = answer.json()
            model = body["model"]
            completions = []
            for choice in sorted(body["choices"], key=lambda choice: choice["index"]):
                ids = choice["token_ids"]
                logprobs = choice["logprobs"]["token_logprobs"]
                sent = choice["prompt_token_ids"]
                completions.append((ids, logprobs, choice["finish_reason"], sent))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"rollout_url: the server's answer has no {error}: vLLM 0.11 or newer is needed ({shorten(answer)})"
            ) from None
        problem = None
        if model != name:
            problem = f"answers with {model} in place of {name}"
        elif len(completions) != n:
            problem = f"returns {len(completions)} of {n} completions"
        elif any(sent != prompt for *_, sent in completions):
            problem = "answers another prompt than was sent: its tokenizer or its settings change it"
        elif any(not ids or len(ids) != len(logprobs) or None in logprobs for ids, logprobs, *_ in completions):
            problem = "returns completions without a log-probability for each token"
        elif any(reason == "stop" and ids[-1] not in eos_ids for ids, _, reason, _ in completions):
            problem = "ends completions at other tokens than the trainer: start it with --generation-config vllm"
        if problem:
            raise RunError(f"rollout_url: the server {problem}")
        return [(ids, logprobs, ids[-1] not in eos_ids) for ids, logprobs, *_ in completions]

    def _post(self, path: str, body: dict) -> httpx.Response:
        """Send a request, for PATIENCE seconds again and again if the server cannot be reached. Raises RunError."""
        deadline = None
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = self.client.post(path, json=body)
                if answer.status_code not in UNREACHABLE:
                    return answer
            deadline = deadline or time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise RunError(
                    f"rollout_url: the server at {self.config.rollout_url} has not answered for {PATIENCE:.0f} s. Once it runs "
                    "again, continue with --resume"
                )
            time.sleep(PAUSE)


def shorten(answer: httpx.Response) -> str:
    """Return the status and the beginning of an answer's text, in one line."""
    return f"{answer.status_code} {' '.join(answer.text.split())[:160]}"
