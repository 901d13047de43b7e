"""Several processes of one run, started by torchrun, each with its own GPU.

    torchrun --nproc-per-node 4 train.py --config FILE

Every process answers and scores its share of the questions and then receives the episodes of the others, so that filters,
advantages, metrics and decisions are computed in each of them as in a single process. In the update, a process computes the
gradient of its share of the groups, with the divisor of the whole batch; one all-reduce follows before the optimizer's
step. The number of collectives does not depend on the data, and there is none between micro-batches.

Process 0 prints and owns the run folder. The others write to a copy in a temporary folder, so that they take the same path
through the code. Without torchrun, there is one process, and nothing is exchanged.
"""

import atexit
import contextlib
import datetime
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from grading import RewardError
from rl.config import Config, RunError

TIMEOUT = datetime.timedelta(hours=2)  # longer than any roll-out; a process that has died is noticed at once


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(config: Config) -> None:
    """Connect the processes that torchrun has started. Call it before the run folder is chosen."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with lost_process():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    if rank():
        use_copy_of_folder(config)
    all_ranks(None)  # process 0 changes the folder once all copies are made


def use_copy_of_folder(config: Config) -> None:
    """Let a process other than 0 write to a temporary folder, with a copy of the run that is resumed."""
    folder = Path(tempfile.mkdtemp(prefix="ponder-rank-")) / "run"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    if config.resume:
        original = Path(config.output_dir)
        logs = shutil.ignore_patterns("rollouts", "tokens", "lock", "*.unfinished")
        shutil.copytree(original, folder, ignore=logs)
        config.resume = str(folder / Path(config.resume).resolve().relative_to(original.resolve()))
    config.output_dir = str(folder)
    config.report_to = []


@contextlib.contextmanager
def lost_process():
    """Report in one line, by process 0, that another process has stopped."""
    try:
        yield
    except RuntimeError as error:
        if rank():
            raise SystemExit(1) from error
        raise RunError("another process of this run has stopped; see its message above") from error


def all_ranks(value) -> list:
    """Return the values of all processes, which must be picklable, in the order of their numbers."""
    values = [value] * world_size()
    if world_size() > 1:
        with lost_process():
            dist.all_gather_object(values, value)
    return values


def own_seed(seed: int) -> int:
    """Return a seed for this process: `seed` itself in process 0, unrelated ones in the others."""
    if not rank():
        return seed
    return int.from_bytes(
        hashlib.sha256(f"{seed} {rank()}".encode()).digest()[:4], "big"
    )  # torch uses 32 bits on a CPU


def raise_first(error: RewardError | None) -> None:
    """Raise the first error of any process in process 0; the others end with it."""
    if error:
        for completion in error.completions:
            completion.environment = None  # cannot be sent
    for failure in filter(None, all_ranks(error)):
        if rank():
            all_ranks(None)  # ends this process once process 0, which writes the failed completions, has ended
        raise failure


# --- shares of the work


def share(items: list) -> list:
    """Return the items that this process handles."""
    return items[rank() :: world_size()]


def gather_shares(own: list, count: int) -> list:
    """Return all `count` items in their order, given what this process has made of its `share`."""
    shares = all_ranks(own)
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


def own(episodes: list) -> list:
    """Return the episodes of the groups whose gradients this process computes."""
    return [episode for episode in episodes if episode.group % world_size() == rank()]


def exchange(episodes: list, name: str) -> None:
    """Set an attribute, a tensor, of all episodes, which each process has computed for its own."""
    if world_size() == 1:
        return
    size = world_size()
    values = [getattr(episode, name).cpu() for episode in own(episodes)]
    parts = [iter(part) for part in all_ranks(values)]
    for episode in episodes:
        setattr(episode, name, next(parts[episode.group % size]))


# --- gradients


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum the gradients of all processes by one all-reduce. They stay None if no process has any."""
    if world_size() == 1 or not any(all_ranks(any(p.grad is not None for p in parameters))):
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    with lost_process():
        dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def sum_counts(counts: Counter) -> Counter:
    """Return the sums of all processes' counts; of names that begin with "max", the maxima."""
    total = Counter()
    for other in all_ranks(counts):
        for name, value in other.items():
            total[name] = max(total[name], value) if name.startswith("max") else total[name] + value
    return total


def check_equal(parameters: list[torch.nn.Parameter]) -> None:
    """Raise RunError if the parameters differ between processes."""
    if world_size() == 1:
        return
    sha = hashlib.sha256()
    for p in parameters:
        sha.update(p.detach().cpu().numpy().tobytes())
    if len(set(all_ranks(sha.hexdigest()))) > 1:
        raise RunError("the processes have different LoRAs: use equal machines and versions, and resume")
